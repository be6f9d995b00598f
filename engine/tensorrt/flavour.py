"""Which TensorRT is here: `tensorrt` (data centre, Jetson) or `tensorrt_rtx` (RTX PCs), behind one object.

The two libraries, and the majors 10 and 11 of the first, differ in names that this project does without: precision
flags (the graph holds the precision), plug-ins, calibrators, and memory calls that are not the ``_v2`` forms. What is
left of the differences is here: where a library builds for, and which attributes only one of them has.

For developers: nothing may be used of a library that the others lack without `hasattr`; tests/engine/test_tensorrt_api
holds every name that is used against the real bindings of each.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import re
import signal
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, get_args

from ...kernels.driver import Context, first_line
from ..errors import BackendError, DeviceError

__all__ = ["CURRENT", "Flavour", "FlavourName", "Log", "deferred_interrupt"]

logger = logging.getLogger(__name__)

FlavourName = Literal["tensorrt", "tensorrt-rtx"]

CURRENT = "current"
"""The target that stands for the GPU that is here."""

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_TITLES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
# The oldest of each whose bindings have every name that is used, and the first major that nobody has looked at. 10.3 is
# what JetPack 6.2 brings; TensorRT-RTX is not looked at before 1.7.
_OLDEST = {"tensorrt": (10, 3), "tensorrt-rtx": (1, 7)}
_UNKNOWN_MAJOR = {"tensorrt": 12, "tensorrt-rtx": 2}
# What only one of the two has; a module under the wrong name would fail much later.
_RTX_ONLY = "ComputeCapability"


class Log:
    """What a TensorRT library says: forwarded to `logging`, its last errors kept for messages.

    Attributes:
        errors: How many error lines there were so far.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._lock = threading.Lock()
        self._open: list[deque[str]] = []
        self._recent: deque[tuple[int, str]] = deque(maxlen=8)
        self.errors = 0

    def take(self, level: int, text: str) -> None:
        """Take one line. Called from any thread of the library, and never raises."""
        with self._lock:
            if level >= logging.ERROR:
                self.errors += 1
                self._recent.append((self.errors, text))
                for lines in self._open:
                    lines.append(text)
                # Whoever collects makes an exception of it.
                level = logging.DEBUG if self._open else logging.WARNING
        logger.log(level, "%s: %s", self._title, text)

    def since(self, errors: int) -> list[str]:
        """The error lines, of the last eight, that were logged since `errors` had this value; costs nothing before."""
        with self._lock:
            return [text for number, text in self._recent if number > errors]

    @contextlib.contextmanager
    def collect(self, limit: int = 8) -> Iterator[deque[str]]:
        """Collect the last `limit` error lines that are logged inside the ``with``, by whichever thread."""
        lines: deque[str] = deque(maxlen=limit)
        with self._lock:
            self._open.append(lines)
        try:
            yield lines
        finally:
            with self._lock:
                # By identity: two empty collections are equal.
                self._open = [other for other in self._open if other is not lines]


@dataclass(frozen=True)
class Flavour:
    """One TensorRT library, imported and found fit.

    Attributes:
        name: How users ask for it.
        module: The imported Python module.
        version: The library's full version; engines are of no use to another.
        ahead_of_time: Whether it builds for named GPUs on a machine that has none.
        targets: The GPUs that it can be told to build for, e.g. ``("sm_75", "sm_86")``; empty if only for the GPU that
            is here. `CURRENT` is understood besides.
    """

    name: FlavourName
    module: Any
    version: str
    ahead_of_time: bool
    targets: tuple[str, ...]

    @classmethod
    def load(cls, name: str) -> Flavour:
        """Import a library by the name of its flavour.

        Raises:
            BackendError: If the flavour is unknown, or its library is missing, broken, of the other flavour, too old or
                too new.
        """
        known: tuple[FlavourName, ...] = get_args(FlavourName)
        flavour = next((one for one in known if one == name), None)
        if flavour is None:
            raise BackendError(f"there is no TensorRT flavour {name!r}; take one of {', '.join(known)}")
        return cls.of(_imported(flavour), flavour)

    @classmethod
    def of(cls, module: ModuleType | Any, name: FlavourName) -> Flavour:
        """Take a library that is imported already as the flavour `name`.

        Raises:
            BackendError: If it is not that flavour, too old, too new, or incomplete.
        """
        title = _TITLES[name]
        version = str(getattr(module, "__version__", ""))
        numbers = re.match(r"(\d+)\.(\d+)", version)
        if numbers is None or not hasattr(module, "Builder") or not hasattr(module, "Runtime"):
            raise BackendError(
                f"the installed {title} is incomplete (version {version or 'unknown'}, no builder or runtime); "
                f"install it again with {_install(name)}"
            )
        if hasattr(module, _RTX_ONLY) != (name == "tensorrt-rtx"):
            other: FlavourName = "tensorrt" if name == "tensorrt-rtx" else "tensorrt-rtx"
            raise BackendError(
                f"the module {getattr(module, '__name__', module)!r} is {_TITLES[other]}, not {title}; ask for the "
                f"backend {other!r}, or install {title} with {_install(name)}"
            )
        found = (int(numbers[1]), int(numbers[2]))
        if found < _OLDEST[name]:
            oldest = ".".join(map(str, _OLDEST[name]))
            raise BackendError(
                f"{title} {version} is too old, {oldest} is the oldest that serves; update it with {_install(name)}"
            )
        if found[0] >= _UNKNOWN_MAJOR[name]:
            raise BackendError(
                f"{title} {version} is newer than this release knows (before {_UNKNOWN_MAJOR[name]}.0); "
                f"install an older one with {_install(name)}"
            )
        targets = _targets(module)
        return cls(name, module, version, bool(targets), targets)

    @property
    def title(self) -> str:
        """The library's name as its vendor writes it."""
        return _TITLES[self.name]

    @property
    def log(self) -> Log:
        """What the library says; one for all that it makes in this process."""
        return _log_and_logger(self.module, self.title)[0]

    @property
    def trt_logger(self) -> Any:
        """The library's own logger object, which feeds `log`; made once, because a library keeps its first for good."""
        return _log_and_logger(self.module, self.title)[1]

    def resolve(self, targets: tuple[str, ...], *, device: int = 0) -> tuple[str, ...]:
        """What to build for: `CURRENT` replaced by the GPU that is here, sorted, without repeats.

        Args:
            targets: Names of GPU architectures, or `CURRENT`.
            device: The number of the GPU that `CURRENT` means.

        Returns:
            Architectures, e.g. ``("sm_86", "sm_120")``, in the order of their numbers.

        Raises:
            BackendError: If there is none, or one that the library does not know.
            DeviceError: If `CURRENT` is among them and there is no GPU.
        """
        if not targets:
            raise BackendError(f"{self.title} was given no GPU to build for; name {self._known()}")
        for target in targets:
            if target == CURRENT or target in self.targets or self._is_here(target, device):
                continue
            if not self.ahead_of_time:
                raise BackendError(
                    f"{self.title} builds for the GPU that is here only, not for {target!r}; build on a machine with "
                    f"that GPU, or take 'tensorrt-rtx'"
                )
            raise BackendError(f"{self.title} {self.version} does not build for {target!r}; it knows {self._known()}")
        found = {self._current(device) if target == CURRENT else target for target in targets}
        return tuple(sorted(found, key=_number))

    def _is_here(self, target: str, device: int) -> bool:
        """Whether a library that builds for the GPU that is here only was given that GPU's name: a resolved target."""
        if self.ahead_of_time:
            return False
        try:
            return self._current(device) == target
        except DeviceError:
            return False

    def _current(self, device: int) -> str:
        try:
            context = Context(device)
        except DeviceError as exc:
            named = f"; or name one of {', '.join(self.targets)}" if self.targets else ""
            raise DeviceError(f"{self.title} cannot build for the GPU that is here: {exc}{named}") from exc
        try:
            architecture = context.architecture
        finally:
            context.close()
        if self.targets and architecture not in self.targets:
            raise BackendError(
                f"{self.title} {self.version} has no code for {context} ({context.name}, {architecture}); it knows "
                f"{', '.join(self.targets)}; take 'tensorrt' or 'onnxruntime' on this GPU"
            )
        return architecture

    def _known(self) -> str:
        return ", ".join((*self.targets, CURRENT))


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Set the event given on Ctrl-C and raise at the end, around calls of a library that logs.

    It calls back into Python thousands of times, Python delivers signals there, and what is raised through the
    library's own frames is lost or ends the process.
    """
    interrupted = threading.Event()
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield interrupted
        return
    signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)
        if interrupted.is_set():
            previous(signal.SIGINT, None)


def _imported(name: FlavourName) -> ModuleType:
    try:
        return importlib.import_module(_MODULES[name])
    except ModuleNotFoundError as exc:
        if exc.name != _MODULES[name]:
            raise BackendError(
                f"{_TITLES[name]} cannot be imported, because it needs {exc.name!r}; install it"
            ) from exc
        raise BackendError(_missing(name)) from exc
    except (ImportError, OSError, RuntimeError) as exc:
        # The wheels' loaders raise what they like when a shared library does not open.
        raise BackendError(
            f"{_TITLES[name]} is installed but cannot be loaded ({first_line(exc)}); install it again with "
            f"{_install(name)}"
        ) from exc


def _targets(module: Any) -> tuple[str, ...]:
    """Members SM75, SM120 of the library's enumeration as sm_75, sm_120; it has two more that are no GPU."""
    members = getattr(getattr(module, _RTX_ONLY, None), "__members__", {})
    found = [f"sm_{name[2:]}" for name in members if re.fullmatch(r"SM\d+", name)]
    return tuple(sorted(found, key=_number))


def _number(target: str) -> int:
    return int(target.removeprefix("sm_"))


def _install(name: FlavourName) -> str:
    return f'pip install "warpcache[{name}]"'


def _missing(name: FlavourName) -> str:
    other: FlavourName = "tensorrt" if name == "tensorrt-rtx" else "tensorrt-rtx"
    sentence = f"{_TITLES[name]} is not installed; install it with {_install(name)}"
    try:
        there = importlib.util.find_spec(_MODULES[other]) is not None
    except (ImportError, ValueError):
        there = False
    return f"{sentence}, or take the backend {other!r}, which is installed" if there else sentence


# A library complains about every logger after its first, and objects of it may log until the process ends: so there is
# one a library, kept as long as the library is.
_loggers: weakref.WeakKeyDictionary[Any, tuple[Log, Any]] = weakref.WeakKeyDictionary()
_loggers_lock = threading.Lock()


def _log_and_logger(module: Any, title: str) -> tuple[Log, Any]:
    with _loggers_lock:
        made = _loggers.get(module)
        if made is None:
            log = Log(title)
            made = _loggers[module] = (log, _trt_logger(module, log))
        return made


def _trt_logger(trt: Any, log: Log) -> Any:
    severity = trt.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.WARNING,
        severity.INFO: logging.DEBUG,
    }

    class ForwardingLogger(trt.ILogger):  # type: ignore[misc]  # the base is known at run time only
        def __init__(self) -> None:
            # The bindings ask for exactly this call; super() leaves their half unmade.
            trt.ILogger.__init__(self)

        def log(self, level: Any, text: str) -> None:
            # Thousands of lines a build are of a lower severity.
            known = levels.get(level)
            if known is not None:
                log.take(known, text)

    return ForwardingLogger()

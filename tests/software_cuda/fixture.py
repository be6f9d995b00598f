"""Fixtures: the process's CUDA driver in software, and the process without any driver."""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from .build import BuildError, build_driver, build_kernels

__all__ = ["SoftwareCuda", "SoftwareCudaUnavailable", "no_cuda_driver", "software_cuda", "software_cuda_driver"]

KERNELS = Path(__file__).resolve().parents[2] / "kernels"

# What a test must leave as it found it, in the words of swcuda_count.
LIVE = ("device_blocks", "device_bytes", "pinned_blocks", "pinned_bytes", "streams", "events", "graphs", "graph_execs")


class SoftwareCudaUnavailable(Exception):
    """Software CUDA cannot be used here: a real driver is present, or it cannot be built."""


class SoftwareCuda:
    """The software driver, loaded into this process, and what tests turn and read in it.

    Attributes:
        path: Of its libcuda.so.1.
        library: The driver for ctypes: the functions of CUDA's own interface by the names of cuda.h's macros.

    Raises:
        SoftwareCudaUnavailable: If there is a real driver, or no compiler or headers.
    """

    def __init__(self) -> None:
        if _has_real_driver():
            raise SoftwareCudaUnavailable("an NVIDIA driver is installed here: the tests marked gpu run on it")
        if not sys.platform.startswith("linux"):
            raise SoftwareCudaUnavailable("software CUDA is built on Linux only")
        try:
            path = build_driver()
        except BuildError as exc:
            raise SoftwareCudaUnavailable(str(exc)) from exc
        self.path = path
        # Globally: kernels find their barriers in it. cuda.bindings finds it by its name, libcuda.so.1.
        self.library = self._library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self.library.swcuda_configure.argtypes = [ctypes.c_char_p, ctypes.c_longlong]
        self.library.swcuda_count.argtypes = [ctypes.c_char_p]
        self.library.swcuda_count.restype = ctypes.c_longlong
        self.library.swcuda_hold.argtypes = [ctypes.c_ulonglong, ctypes.c_int, ctypes.c_int]
        self.library.swcuda_pending.argtypes = [ctypes.c_ulonglong, ctypes.c_int]
        self.library.swcuda_pending.restype = ctypes.c_longlong
        self.library.swcuda_take_report.argtypes = [ctypes.c_char_p, ctypes.c_int]
        self.library.swcuda_add_kernels.argtypes = [ctypes.c_char_p]
        cuda = importlib.import_module("cuda.bindings.driver")
        (code,) = cuda.cuInit(0)
        name = cuda.cuDeviceGetName(64, 0)[1]
        if code != 0 or not bytes(name or b"").startswith(b"Software CUDA"):
            raise SoftwareCudaUnavailable("cuda.bindings had loaded another driver before software CUDA")
        self._added: set[Path] = set()

    # What there is ---------------------------------------------------------------------------------------------------

    def count(self, what: str) -> int:
        """How many there are or have been.

        Args:
            what: Now: ``device_bytes``, ``device_blocks``, ``pinned_bytes``, ``pinned_blocks``, ``streams``,
                ``events``, ``graphs``, ``graph_execs``, ``modules`` (with libraries), ``captures``,
                ``lost_contexts``, ``context_references``. So far: ``allocations``, ``copies``, ``memsets``,
                ``launches``, ``graph_launches``, ``host_functions``, ``streams_created``, ``events_created``,
                ``graphs_instantiated``.
        """
        value = int(self.library.swcuda_count(what.encode()))
        if value < 0:
            raise KeyError(f"software CUDA does not count {what!r}")
        return value

    def live(self) -> dict[str, int]:
        """Everything that somebody has to give back: memory, streams, events, graphs."""
        return {what: self.count(what) for what in LIVE}

    def left_since(self, before: dict[str, int]) -> dict[str, int]:
        """What there is more of than in an earlier `live`; garbage is collected first where there seems to be any."""
        for collect in (lambda: 0, gc.collect):
            collect()
            now = self.live()
            left = {what: now[what] - before[what] for what in LIVE if now[what] > before[what]}
            if not left:
                break
        return left

    def reports(self) -> list[str]:
        """What went wrong where no return code says it, oldest first; they are forgotten then."""
        text = ctypes.create_string_buffer(4096)
        found = []
        while self.library.swcuda_take_report(text, len(text)):
            found.append(text.value.decode())
        return found

    # What can be turned ----------------------------------------------------------------------------------------------

    def configure(self, **values: int) -> None:
        """Change the machine, for all devices and until the test ends.

        Args:
            values: ``devices`` (0 to 8, default 2), ``compute_major`` and ``compute_minor`` (9, 0), ``memory``
                (bytes of each device, 2**30), ``driver_version`` (13000), ``init_error`` (what cuInit returns),
                ``peer_access`` (1), ``multiprocessors`` (132), ``lazy`` (0; 1: work runs only when somebody waits for
                it, as late as CUDA's rules allow), ``patience_s`` (60; a host thread that waits longer gets
                CUDA_ERROR_LAUNCH_TIMEOUT, so that a forgotten hold does not hang the run).
        """
        for key, value in values.items():
            if self.library.swcuda_configure(key.encode(), int(value)):
                raise KeyError(f"software CUDA has nothing called {key!r} to configure")
        _forget_loaded_driver()

    def hold(self, stream: Any, *, device: int = 0) -> None:
        """Let `stream` start nothing more until `release`; what it is at goes on to its end.

        Args:
            stream: A handle, or anything with one (`CudaStream`); 0 is the legacy stream of `device`.
            device: Only for stream 0.
        """
        self._hold(stream, device, True)

    def release(self, stream: Any, *, device: int = 0) -> None:
        """Let `stream` go on."""
        self._hold(stream, device, False)

    @contextmanager
    def held(self, stream: Any, *, device: int = 0) -> Iterator[None]:
        """`hold` for a block of code."""
        self.hold(stream, device=device)
        try:
            yield
        finally:
            self.release(stream, device=device)

    def pending(self, stream: Any, *, device: int = 0) -> int:
        """How many pieces of work on `stream` are not finished."""
        found = int(self.library.swcuda_pending(_handle(stream), device))
        if found < 0:
            raise ValueError(f"there is no stream {stream!r}")
        return found

    def wait_for_work(self, stream: Any, *, limit_s: float = 30.0) -> None:
        """Wait until somebody, perhaps on another thread, has given `stream` work that is not finished.

        Raises:
            TimeoutError: If nobody has within the limit.
        """
        until = time.monotonic() + limit_s
        while not self.pending(stream):
            if time.monotonic() > until:
                raise TimeoutError(f"nobody gave {stream!r} any work")
            os.sched_yield()

    def add_kernels(self, source: Path | str, *, include: tuple[Path, ...] = ()) -> None:
        """Compile kernels for the host, so that cubins with kernels of the same names can be launched.

        Kernels are told apart by their names alone; the last that was added counts.

        Args:
            source: A `.cu` file, or the text of one.
            include: Folders of headers that the text includes; a file's own folder is among them.

        Raises:
            BuildError: If the compiler refuses it.
        """
        if isinstance(source, Path):
            library = build_kernels(source.read_text(), str(source), include=(source.parent, *include))
        else:
            library = build_kernels(source, "source.cu", include=include)
        if library in self._added and isinstance(source, Path):
            return
        if self.library.swcuda_add_kernels(str(library).encode()) < 0:
            raise BuildError("; ".join(self.reports()))
        self._added.add(library)

    def settle(self) -> None:
        """Release every stream, leave lazy mode, and wait for the end of all work.

        Raises:
            RuntimeError: If it does not end within a minute.
        """
        if self.library.swcuda_settle():
            raise RuntimeError("work of software CUDA does not end: does a host function wait for something?")

    def reset(self) -> None:
        """Bring back configuration, held streams and lost contexts, as after each test."""
        self.library.swcuda_reset()
        _forget_loaded_driver()

    def _hold(self, stream: Any, device: int, held: bool) -> None:
        if self.library.swcuda_hold(_handle(stream), device, int(held)):
            raise ValueError(f"there is no stream {stream!r}")


@pytest.fixture(scope="session")
def software_cuda_driver() -> SoftwareCuda:
    """Software CUDA in this process, with the kernels of `kernels/`; for fixtures that outlive a test.

    It is loaded by the first test that asks, and stays: from then on the process has a CUDA driver. A test that needs
    a process without one asks for `no_cuda_driver`.
    """
    try:
        driver = SoftwareCuda()
        for path in sorted(KERNELS.rglob("*.cu")):
            driver.add_kernels(path)
    except SoftwareCudaUnavailable as exc:
        pytest.skip(f"software CUDA: {exc}")
    return driver


@pytest.fixture
def software_cuda(software_cuda_driver: SoftwareCuda, request: pytest.FixtureRequest) -> Iterator[SoftwareCuda]:
    """Software CUDA for one test: what the test turned is turned back, and what it took it must have given back.

    A test marked ``@pytest.mark.leaves_cuda_behind`` may keep memory, streams, events and graphs. A report that the
    test has not taken (`SoftwareCuda.reports`) fails it. Where the test lost a context on purpose, what was on that GPU
    is gone with it and is not asked for.
    """
    driver = software_cuda_driver
    driver.reports()
    before = driver.live()
    yield driver
    # What the test has queued must end before the next one begins; it may be what loses the context.
    driver.settle()
    lost = driver.count("lost_contexts")
    driver.reset()
    keeps = lost or request.node.get_closest_marker("leaves_cuda_behind") is not None
    left = {} if keeps else driver.left_since(before)
    # Only now: memory that has just been collected may have been written past its end.
    reports = driver.reports()
    if reports:
        pytest.fail("software CUDA reports: " + "; ".join(reports))
    if left:
        pytest.fail(f"the test left on the software GPU: {left}")


@pytest.fixture
def no_cuda_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process as on a machine without an NVIDIA driver, whether or not software CUDA is loaded in it.

    `warpcache.kernels.driver` meets what cuda.bindings raises there. Libraries with a CUDA runtime of their own are not
    deceived: they find no usable driver in software CUDA anyway.
    """
    driver = importlib.import_module("warpcache.kernels.driver")
    pathfinder = importlib.import_module("cuda.pathfinder")

    class Bindings:
        @staticmethod
        def cuInit(flags: int) -> tuple[int]:
            raise pathfinder.DynamicLibNotFoundError('Failure finding "libcuda.so": No such file: libcuda.so*')

    # A driver that was started before is forgotten; the failure to start one is never remembered.
    driver._initialised.cache_clear()
    monkeypatch.setattr(driver, "_bindings", lambda: Bindings)


def _forget_loaded_driver() -> None:
    """`warpcache.kernels.driver` remembers that the driver was started and which version it has."""
    module = sys.modules.get("warpcache.kernels.driver")
    if module is not None:
        module._initialised.cache_clear()


def _handle(stream: Any) -> int:
    return int(getattr(stream, "handle", stream))


def _has_real_driver() -> bool:
    # The nodes of the kernel module, of WSL, and of a Jetson: opening the library itself would load it for good.
    return any(os.path.exists(node) for node in ("/dev/nvidiactl", "/dev/dxg", "/dev/nvhost-gpu", "/dev/nvgpu"))

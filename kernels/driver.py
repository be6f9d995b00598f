"""The CUDA driver as Python sees it: loaded on first use, every call checked, its codes turned into sentences.

Nothing here runs at import: machines without a GPU load the whole package. One process has one *primary context* per
GPU, shared with whatever else uses CUDA in it (torch, CuPy), so that their arrays and ours are in one address space.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import threading
import weakref
from collections.abc import Iterator
from typing import Any

from .errors import DeviceError

__all__ = [
    "OLDEST_DRIVER",
    "Context",
    "check",
    "cuda_text",
    "cuda_version",
    "device_count",
    "first_line",
    "load",
    "size_text",
]

OLDEST_DRIVER = 12_000
"""The oldest driver that serves, as `cuDriverGetVersion` counts: CUDA 12.0."""

# What to do about the codes that users meet; the rest are named as they are.
_REMEDIES = {
    "CUDA_ERROR_NO_DEVICE": "the driver sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES",
    "CUDA_ERROR_INVALID_DEVICE": "there is no such GPU; `warpcache doctor` lists those that are there",
    "CUDA_ERROR_OUT_OF_MEMORY": "the GPU's memory is used up; close other programs or take a smaller model",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "the driver's user-mode library and kernel module differ; restart the machine",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "the code was built for other GPUs; build it for this one",
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": "the driver is older than the compiler that made the code; update the driver",
    "CUDA_ERROR_ILLEGAL_ADDRESS": "a kernel left its memory, and the GPU's context is lost; start the process again",
    "CUDA_ERROR_LAUNCH_FAILED": "a kernel crashed, and the GPU's context is lost; start the process again",
}

logger = logging.getLogger(__name__)

_lock = threading.Lock()


@functools.cache
def _bindings() -> Any:
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as exc:
        raise DeviceError(
            f'cuda-python cannot be imported ({first_line(exc)}); install it with pip install "warpcache[cuda]"'
        ) from exc


@functools.cache
def _initialised() -> Any:
    cuda = _bindings()
    try:
        (code,) = cuda.cuInit(0)
    # cuda-bindings raises RuntimeError, cuda-pathfinder its own DynamicLibNotFoundError (also a RuntimeError).
    except RuntimeError as exc:
        # What is said of a library that is simply not there is this sentence once more.
        reason = "" if type(exc).__name__ == "DynamicLibNotFoundError" else f" ({first_line(exc)})"
        raise DeviceError(f"no NVIDIA driver was found{reason}; install the driver of this machine's GPU") from exc
    check((code,), "starting the CUDA driver")
    version = int(check(cuda.cuDriverGetVersion(), "asking the CUDA driver for its version"))
    if version < OLDEST_DRIVER:
        raise DeviceError(
            f"the NVIDIA driver speaks CUDA {cuda_text(version)}, older than {cuda_text(OLDEST_DRIVER)}; "
            "update the driver"
        )
    return cuda


def load() -> Any:
    """The module `cuda.bindings.driver`, with the driver started.

    Raises:
        DeviceError: If cuda-python or the driver is missing, the driver is too old, or there is no GPU.
    """
    # Failures are not cached: a driver may be there the next time, and the sentence is the same until then.
    with _lock:
        return _initialised()


def check(result: tuple[Any, ...], doing: str) -> Any:
    """Take a driver call's result apart.

    Args:
        result: What a function of `cuda.bindings.driver` returned: a code, then its values.
        doing: What the call was for, as the message says it: "allocating 4096 bytes".

    Returns:
        None, the value, or a tuple of the values.

    Raises:
        DeviceError: If the code is not CUDA_SUCCESS.
    """
    code = result[0]
    if code != 0:
        raise DeviceError(_sentence(code, doing))
    if len(result) == 2:
        return result[1]
    return result[1:] or None


def device_count() -> int:
    """How many GPUs the driver shows to this process.

    Raises:
        DeviceError: As `load`.
    """
    cuda = load()
    return int(check(cuda.cuDeviceGetCount(), "counting the GPUs"))


def cuda_version() -> int:
    """The newest CUDA that the driver speaks, as `cuDriverGetVersion` counts: 13000 for 13.0.

    Raises:
        DeviceError: As `load`.
    """
    cuda = load()
    return int(check(cuda.cuDriverGetVersion(), "asking the CUDA driver for its version"))


def cuda_text(version: int) -> str:
    """A version as `cuda_version` counts, for people: ``13.0``."""
    return f"{version // 1000}.{version % 1000 // 10}"


class Context:
    """The primary context of one GPU, kept until it is closed.

    Args:
        ordinal: The GPU's number, as CUDA_VISIBLE_DEVICES counts.

    Raises:
        DeviceError: If there is no driver or no such GPU.
    """

    def __init__(self, ordinal: int) -> None:
        self._cuda = load()
        count = device_count()
        if not 0 <= ordinal < count:
            there = ", ".join(f"cuda:{index}" for index in range(count)) or "none"
            raise DeviceError(f"there is no GPU cuda:{ordinal}; there are: {there}")
        self.ordinal = ordinal
        self._device = check(self._cuda.cuDeviceGet(ordinal), f"opening cuda:{ordinal}")
        self._handle: Any = check(
            self._cuda.cuDevicePrimaryCtxRetain(self._device), f"making a context on cuda:{ordinal}"
        )
        # What was made in the context keeps this object, so it is given back after all of that.
        self._release = weakref.finalize(self, _release_context, self._cuda, self._device, ordinal)
        self._release.atexit = False
        raw_name = check(self._cuda.cuDeviceGetName(256, self._device), f"naming cuda:{ordinal}")
        self.name = bytes(raw_name).split(b"\0", 1)[0].decode("utf-8", "replace")

    def attribute(self, name: str) -> int:
        """A CU_DEVICE_ATTRIBUTE_... of the GPU by the rest of its name, e.g. ``COMPUTE_CAPABILITY_MAJOR``."""
        which = getattr(self._cuda.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(check(self._cuda.cuDeviceGetAttribute(which, self._device), f"reading {name} of {self}"))

    @functools.cached_property
    def compute_capability(self) -> tuple[int, int]:
        """Major and minor number, e.g. (8, 9)."""
        return self.attribute("COMPUTE_CAPABILITY_MAJOR"), self.attribute("COMPUTE_CAPABILITY_MINOR")

    @property
    def architecture(self) -> str:
        """The compute capability as compilers name it, e.g. ``sm_89``."""
        major, minor = self.compute_capability
        return f"sm_{major}{minor}"

    @property
    def handle(self) -> Any:
        """The driver's handle of the context."""
        return self._handle

    def can_access(self, other: Context) -> bool:
        """Whether this GPU can read and write the other's memory directly."""
        return bool(
            check(self._cuda.cuDeviceCanAccessPeer(self._device, other._device), f"comparing {self} and {other}")
        )

    @property
    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the GPU's memory."""
        self.make_current()
        free, total = check(self._cuda.cuMemGetInfo(), f"asking {self} for its free memory")
        return int(free), int(total)

    def make_current(self) -> None:
        """Direct the calling thread's driver calls to this GPU; cheap where they are already.

        Raises:
            DeviceError: If the context is closed.
        """
        handle = self._handle
        if handle is None:
            raise DeviceError(f"the context of cuda:{self.ordinal} is closed; open the device again")
        # Asked, not remembered: other libraries in the process change the current context too.
        if int(check(self._cuda.cuCtxGetCurrent(), "asking for the current context")) != int(handle):
            check(self._cuda.cuCtxSetCurrent(handle), f"switching to cuda:{self.ordinal}")

    @contextlib.contextmanager
    def briefly_current(self) -> Iterator[None]:
        """`make_current` inside the ``with``, and what was current before after it.

        For what gives memory back: Python's collector calls it on any thread between any two calls, where somebody
        (we on another GPU, torch) has just said which GPU the next call is for.

        Raises:
            DeviceError: As `make_current`.
        """
        before = check(self._cuda.cuCtxGetCurrent(), "asking for the current context")
        self.make_current()
        try:
            yield
        finally:
            if int(before) != int(self._handle or 0):
                # One that has ended in the meantime cannot be put back, and nobody can use it.
                self._cuda.cuCtxSetCurrent(before)

    def close(self) -> None:
        """Give the context back; safe to call twice. It ends with its last user in the process."""
        self._handle = None
        self._release()

    def __str__(self) -> str:
        return f"cuda:{self.ordinal}"


def size_text(size_bytes: int) -> str:
    """An amount of memory as messages say it: ``1.5 MiB``."""
    return f"{size_bytes / 2**20:.1f} MiB" if size_bytes >= 2**20 else f"{size_bytes / 2**10:.1f} KiB"


def _release_context(cuda: Any, device: Any, ordinal: int) -> None:
    # Also called when a context is forgotten, where nothing can be raised.
    (code,) = cuda.cuDevicePrimaryCtxRelease(device)
    if code != 0:
        logger.warning("%s", _sentence(code, f"leaving cuda:{ordinal}"))


def _sentence(code: Any, doing: str) -> str:
    name = getattr(code, "name", str(code))
    remedy = _REMEDIES.get(name)
    if remedy is not None:
        return f"{doing} failed: {remedy} ({name})"
    try:
        _, text = _bindings().cuGetErrorString(code)
        meaning = bytes(text).decode("utf-8", "replace") if text else name
    except (DeviceError, RuntimeError, TypeError):
        meaning = name
    return f"{doing} failed: {meaning} ({name}); `warpcache doctor` says what is here"


def first_line(exc: BaseException) -> str:
    """An error's message, its first line where a library wrote several; the error's type where it says nothing."""
    return (str(exc).strip() or type(exc).__name__).splitlines()[0]

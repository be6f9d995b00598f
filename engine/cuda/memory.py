"""Memory on a GPU and pinned on the host, given back when nothing refers to it."""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from ...kernels.driver import Context, check, load, size_text
from ..errors import DeviceError
from ..spec import Array, TensorSpec

__all__ = ["DeviceMemory", "PinnedMemory"]

logger = logging.getLogger(__name__)


class DeviceMemory:
    """A block of a GPU's memory, given back when it is closed or forgotten.

    Attributes:
        pointer: Its address on the device, aligned to 256 bytes at least.
        size_bytes: How much it is.
    """

    def __init__(self, context: Context, size_bytes: int, what: str) -> None:
        cuda = load()
        context.make_current()
        result = cuda.cuMemAlloc(max(1, size_bytes))
        if result[0] == cuda.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            free, total = context.memory
            raise DeviceError(
                f"cuda:{context.ordinal} has no room for {what}: {size_text(size_bytes)} were asked for, "
                f"{size_text(free)} of {size_text(total)} are free; close other programs, lower the number of "
                "producers, or take a smaller model"
            )
        self.pointer = int(check(result, f"allocating {size_text(size_bytes)} for {what}"))
        self.size_bytes = size_bytes
        self._release = weakref.finalize(self, _free_device, context, self.pointer)
        self._release.atexit = False

    def close(self) -> None:
        """Give the memory back; safe to call twice. What still points into it points nowhere then."""
        self._release()


class PinnedMemory:
    """Page-locked host memory, which the GPU copies from and to without the CPU.

    Attributes:
        pointer: Its address.
        size_bytes: How much it is.
    """

    def __init__(self, context: Context, size_bytes: int) -> None:
        cuda = load()
        context.make_current()
        self.pointer = int(
            check(
                # Portable: every context of the process may copy from it, whichever GPU a producer is on.
                cuda.cuMemHostAlloc(max(1, size_bytes), cuda.CU_MEMHOSTALLOC_PORTABLE),
                f"taking {size_text(size_bytes)} of pinned host memory",
            )
        )
        self.size_bytes = size_bytes
        self._release = weakref.finalize(self, _free_pinned, context, self.pointer)
        self._release.atexit = False

    def close(self) -> None:
        """Give the memory back; safe to call twice."""
        self._release()

    def array(self, spec: TensorSpec) -> Array:
        """The memory as a C-contiguous array of `spec`, which keeps the memory alive."""
        raw = (ctypes.c_uint8 * spec.size_bytes).from_address(self.pointer)
        raw._memory = self  # type: ignore[attr-defined]  # ctypes arrays take attributes; NumPy keeps `raw` as the base
        array: Array = np.ctypeslib.as_array(raw).view(spec.dtype).reshape(spec.shape)
        return array


def _free_device(context: Context, pointer: int) -> None:
    _quietly(context, lambda cuda: cuda.cuMemFree(pointer), "device memory")


def _free_pinned(context: Context, pointer: int) -> None:
    _quietly(context, lambda cuda: cuda.cuMemFreeHost(pointer), "pinned memory")


def _quietly(context: Context, release: Callable[[Any], tuple[Any, ...]], what: str) -> None:
    """Give something back where nothing can be raised; what goes wrong there is a warning."""
    cuda = load()
    try:
        with context.briefly_current():
            check(release(cuda), f"giving back {what}")
    except DeviceError as exc:
        # At the end of a process the driver may be gone first, and everything with it.
        if "CUDA_ERROR_DEINITIALIZED" not in str(exc):
            logger.warning("%s", exc)

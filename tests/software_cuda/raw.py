"""What the tests of the software driver itself share: raw bindings, and memory, streams and events given back after."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from warpcache.kernels import driver
from warpcache.kernels.driver import Context, check

from .fixture import SoftwareCuda

__all__ = ["BYTES", "COUNT", "RawGpu", "code", "numbers", "ok", "raw_gpu"]

COUNT = 16
BYTES = 4 * COUNT


def ok(result: tuple[Any, ...]) -> Any:
    """The values of a driver call that must succeed."""
    return check(result, "the test")


def code(result: tuple[Any, ...]) -> str:
    """The name of what a driver call returned."""
    return str(result[0].name)


def numbers(start: int = 0) -> np.ndarray:
    """`COUNT` float32 in a row, which NaN and each other cannot be taken for."""
    return np.arange(start, start + COUNT, dtype=np.float32)


class RawGpu:
    """The bindings with the context of cuda:0 current."""

    def __init__(self, software: SoftwareCuda) -> None:
        self.software = software
        self.cuda = driver.load()
        self.context = Context(0)
        self.context.make_current()
        self._memory: list[int] = []
        self._pinned: list[int] = []
        self._streams: list[Any] = []
        self._events: list[Any] = []

    def alloc(self, size: int = BYTES) -> int:
        """Device memory."""
        self._memory.append(int(ok(self.cuda.cuMemAlloc(size))))
        return self._memory[-1]

    def upload(self, values: np.ndarray) -> int:
        """Device memory with `values`."""
        pointer = self.alloc(values.nbytes)
        ok(self.cuda.cuMemcpyHtoD(pointer, np.ascontiguousarray(values).ctypes.data, values.nbytes))
        ok(self.cuda.cuStreamSynchronize(0))
        return pointer

    def read(self, pointer: int, count: int = COUNT, dtype: Any = np.float32) -> np.ndarray:
        """What is in device memory; streams of the test must have ended."""
        values = np.empty(count, dtype)
        ok(self.cuda.cuMemcpyDtoH(values.ctypes.data, pointer, values.nbytes))
        return values

    def pinned(self, values: np.ndarray) -> np.ndarray:
        """Pinned memory with `values`."""
        self._pinned.append(int(ok(self.cuda.cuMemHostAlloc(values.nbytes, 0))))
        raw = (ctypes.c_uint8 * values.nbytes).from_address(self._pinned[-1])
        array: np.ndarray = np.ctypeslib.as_array(raw).view(values.dtype)
        array[:] = values
        return array

    def stream(self, flags: int = 1) -> int:
        """The handle of a stream, by default one that does not mind the default stream."""
        self._streams.append(ok(self.cuda.cuStreamCreate(flags)))
        return int(self._streams[-1])

    def event(self, flags: int = 2) -> Any:
        """An event, by default without timing."""
        self._events.append(ok(self.cuda.cuEventCreate(flags)))
        return self._events[-1]

    def close(self) -> None:
        """Give everything back; what a lost context held is gone with it."""
        self.software.settle()
        if not self.software.count("lost_contexts"):
            self.context.make_current()
            for stream in self._streams:
                ok(self.cuda.cuStreamDestroy(stream))
            for event in self._events:
                ok(self.cuda.cuEventDestroy(event))
            for pointer in self._memory:
                ok(self.cuda.cuMemFree(pointer))
            for pointer in self._pinned:
                ok(self.cuda.cuMemFreeHost(pointer))
        self.context.close()


@pytest.fixture
def raw_gpu(software_cuda: SoftwareCuda) -> Iterator[RawGpu]:
    """cuda:0 of the software driver through the raw bindings."""
    gpu = RawGpu(software_cuda)
    yield gpu
    gpu.close()

"""A GPU with one stream: arrays of any size, filled quickly, and the time of what is launched there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from warpcache.engine.cuda.device import CudaDevice, CudaStream
from warpcache.engine.spec import TensorSpec
from warpcache.kernels.array import DeviceArray
from warpcache.kernels.driver import check, load

__all__ = ["Gpu"]


class Gpu:
    """A GPU with one stream, and arrays of any size filled quickly."""

    def __init__(self, ordinal: int) -> None:
        self.device = CudaDevice(ordinal)
        self.stream: CudaStream = self.device.stream("benchmark")
        self.context = self.device.context

    def empty(self, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        """Zeroed memory."""
        return self.device.allocate(TensorSpec("benchmark", dtype, shape))

    def filled(self, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        """Values between -1 and 1 (0 to 255 for uint8): a few megabytes of random ones, over and over."""
        array = self.empty(shape, dtype)
        rng = np.random.default_rng(0)
        count = min(math.prod(shape), 1 << 20)
        values = rng.integers(0, 256, count) if dtype == "uint8" else rng.uniform(-1, 1, count)
        seed = self.device.upload(values.astype(dtype))
        for start in range(0, array.size_bytes, seed.size_bytes):
            size = min(seed.size_bytes, array.size_bytes - start)
            code = load().cuMemcpyAsync(array.pointer + start, seed.pointer, size, self.stream.stream)
            check(code, "filling an array")
        self.stream.synchronize()
        return array

    def upload(self, values: NDArray[Any]) -> DeviceArray:
        """A copy of a host array."""
        return self.device.upload(values)

    def download(self, array: DeviceArray) -> NDArray[Any]:
        """A host copy, after everything on the stream."""
        self.stream.synchronize()
        return self.device.download(array)

    def time_ms(self, work: Callable[[], object], launches: int) -> float:
        """Milliseconds of one call of `work`, by CUDA events around `launches` of them."""
        begin, end = self.device.event(timing=True), self.device.event(timing=True)
        with closing(begin), closing(end):
            work()  # the GPU is busy while the next is issued: its first launch is not waited for
            begin.record(self.stream)
            for _ in range(launches):
                work()
            end.record(self.stream)
            end.wait()
            return end.elapsed_ms(begin) / launches

    def times_ms(self, works: Sequence[Callable[[], object]], launches: int, repeats: int) -> list[list[float]]:
        """`time_ms` of several works in turns: `repeats` times each, after one that warms up clocks and code."""
        turns = [[self.time_ms(work, launches) for work in works] for _ in range(1 + repeats)]
        return [list(times) for times in zip(*turns[1:], strict=True)]

    def close(self) -> None:
        self.device.close()

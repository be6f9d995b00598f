"""Fixtures of the kernels' tests: a GPU (real, or in software) and arrays placed in its memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray

from warpcache.engine.cuda.device import CudaDevice, CudaStream
from warpcache.engine.spec import TensorSpec
from warpcache.kernels import change, finite, image, warp
from warpcache.kernels.array import DeviceArray
from warpcache.kernels.driver import Context

Array = NDArray[np.generic]

# Asked of the system and not of the driver: a process has one driver, and asking would settle which.
_DEVICE_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/nvhost-gpu", "/dev/nvgpu")
_CANARY = 0xA5


class Placed:
    """An array inside a larger one in the GPU's memory, so that it is strided, and that writes beside it are seen."""

    def __init__(self, gpu: Gpu, values: Array, pad: tuple[tuple[int, int], ...], order: tuple[int, ...]) -> None:
        """Lay the array's axes out as `order` (slowest first), with `pad` elements before and after, axis by axis."""
        self._gpu = gpu
        shape = [values.shape[axis] + sum(pad[axis]) for axis in order]
        self._base = np.empty(shape, values.dtype)
        self._base.view(np.uint8).fill(_CANARY)
        self._back = tuple(np.argsort(order))
        self._where = tuple(slice(pad[axis][0], pad[axis][0] + values.shape[axis]) for axis in range(values.ndim))
        view = self._inside(self._base)
        view[...] = values
        self._memory = gpu.keep(gpu.device.upload(self._base))
        offset = view.__array_interface__["data"][0] - self._base.__array_interface__["data"][0]
        self.array = DeviceArray(
            self._memory.pointer + offset,
            values.shape,
            values.dtype,
            device=gpu.device.ordinal,
            strides=tuple(stride // values.itemsize for stride in view.strides),
            owner=self._memory,
        )

    def _inside(self, base: Array) -> Array:
        return base.transpose(self._back)[self._where]

    def read(self) -> Array:
        """The array now; fails where anything beside it was written. Waits for the stream."""
        self._gpu.stream.synchronize()
        now = self._gpu.device.download(self._memory)
        values = self._inside(now).copy()
        self._inside(now)[...] = self._inside(self._base)
        assert now.tobytes() == self._base.tobytes(), "memory beside the array was written"
        return values


class Gpu:
    """A device with one stream, and memory with canaries around it."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.device = CudaDevice(context.ordinal)
        self.stream: CudaStream = self.device.stream("kernels")
        self._kept: list[DeviceArray] = []

    def place(
        self, values: Array, *, pad: tuple[tuple[int, int], ...] | None = None, order: tuple[int, ...] | None = None
    ) -> Placed:
        """`values` in the GPU's memory; see `Placed`."""
        axes = values.ndim
        return Placed(self, values, pad or ((0, 0),) * axes, order or tuple(range(axes)))

    def empty(
        self,
        shape: tuple[int, ...],
        dtype: str,
        *,
        pad: tuple[tuple[int, int], ...] | None = None,
        order: tuple[int, ...] | None = None,
    ) -> Placed:
        """An array to be written, full of what no kernel here writes."""
        values = np.empty(shape, dtype)
        values.view(np.uint8).fill(_CANARY)
        return self.place(values, pad=pad, order=order)

    def allocate(self, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        """Zeroed memory, where what is in it does not matter."""
        return self.keep(self.device.allocate(TensorSpec("array", dtype, shape)))

    def keep(self, array: DeviceArray) -> DeviceArray:
        """Have the array's memory given back by `close`: pytest holds what fixtures return for longer than that."""
        self._kept.append(array)
        return array

    def close(self) -> None:
        self.device.close()
        for array in self._kept:
            array.owner.close()


@pytest.fixture(
    params=[pytest.param("hardware", marks=pytest.mark.gpu), pytest.param("software")],
)
def cuda_context(request: pytest.FixtureRequest) -> Iterator[Context]:
    """The GPU's context: with ``-m gpu`` on a machine that has one the real one, otherwise the software driver's."""
    there = any(Path(file).exists() for file in _DEVICE_FILES)
    if request.param == "hardware" and not there:
        pytest.skip("no GPU on this machine")
    if request.param == "software":
        if there:
            pytest.skip("a process has one CUDA driver, and on this machine it is the GPU's")
        request.getfixturevalue("software_cuda")
    context = Context(0)
    yield context
    context.close()


class NoGpu:
    """What launchers ask of a context before they launch anything."""

    ordinal = 0

    def attribute(self, name: str) -> int:
        """As an H200 has it."""
        return {"MULTIPROCESSOR_COUNT": 132}[name]

    def __str__(self) -> str:
        return "cuda:0"


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Context:
    """A context for tests of what is refused: launchers made on it have no kernels to get as far as."""

    class NoLibrary:
        def __init__(self, context: object, source: str) -> None:
            self.source = source

        def function(self, name: str) -> NoLibrary:
            return self

        def prepare(self, *given: object) -> object:
            return given

    for launcher in (image, change, finite, warp):
        monkeypatch.setattr(launcher, "KernelLibrary", NoLibrary)
    return cast(Context, NoGpu())


@pytest.fixture
def gpu(cuda_context: Context) -> Iterator[Gpu]:
    """The GPU of `cuda_context` with a stream and a way to place arrays."""
    gpu = Gpu(cuda_context)
    yield gpu
    gpu.close()

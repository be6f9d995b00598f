"""The look for NaN and infinity: the reference by hand, the kernel against the reference, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from warpcache.engine.cuda.graph import CudaGraph
from warpcache.kernels.array import DeviceArray
from warpcache.kernels.driver import check, load
from warpcache.kernels.errors import InputError
from warpcache.kernels.finite import FiniteKernel
from warpcache.kernels.reference.finite import all_finite

FLOATS = ["float16", "float32", "float64"]


def extremes(dtype: str, count: int) -> np.ndarray:
    """Finite numbers alone, those that lie nearest to what is not: the largest, the smallest, zeros of both signs."""
    info = np.finfo(dtype)
    few = np.array([info.max, -info.max, info.smallest_subnormal, -info.tiny, 0.0, -0.0, 1.0], dtype)
    return np.resize(few, count)


class TestReference:
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_the_largest_numbers_are_finite_and_what_is_beyond_is_not(self, dtype: str) -> None:
        plain = extremes(dtype, 7)
        assert all_finite([plain, np.arange(3)])
        for value in (np.nan, np.inf, -np.inf):
            spoilt = plain.copy()
            spoilt[3] = value
            assert not all_finite([plain, spoilt])


@pytest.fixture
def kernel(cuda_context: Any) -> Iterator[FiniteKernel]:
    made = FiniteKernel(cuda_context)
    yield made
    made.close()


def looked(gpu: Any, kernel: FiniteKernel, *arrays: DeviceArray) -> int:
    found = gpu.empty((1,), "int32")
    kernel.look(arrays, found.array, stream=gpu.stream.handle)
    return int(found.read()[0])


class TestKernel:
    @pytest.mark.parametrize("dtype", FLOATS)
    # One element, less than a group of sixteen bytes, whole groups, and more threads than a block has.
    @pytest.mark.parametrize("shape", [(1,), (1, 3), (2, 4, 4), (1, 3, 11, 67)])
    def test_what_is_not_finite_is_found_wherever_it_is(
        self, gpu: Any, kernel: FiniteKernel, shape: tuple[int, ...], dtype: str
    ) -> None:
        plain = extremes(dtype, int(np.prod(shape))).reshape(shape)
        assert all_finite([plain])
        assert looked(gpu, kernel, gpu.place(plain).array) == 0
        for place, value in zip((0, plain.size // 2, plain.size - 1), (np.inf, np.nan, -np.inf), strict=True):
            spoilt = plain.copy()
            spoilt.flat[place] = value
            assert not all_finite([spoilt])
            assert looked(gpu, kernel, gpu.place(spoilt).array) == 1, (place, value)

    @pytest.mark.parametrize("bits", [0x7F800001, 0xFFC12345, 0x7FFFFFFF])
    def test_every_nan_is_one(self, gpu: Any, kernel: FiniteKernel, bits: int) -> None:
        odd = np.array([0x3F800000, bits], np.uint32).view(np.float32)
        assert looked(gpu, kernel, gpu.place(odd).array) == 1

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_an_array_may_begin_anywhere_and_its_neighbours_are_not_read(
        self, gpu: Any, kernel: FiniteKernel, dtype: str
    ) -> None:
        base = extremes(dtype, 41)
        base[[0, 40]] = np.nan
        memory = gpu.place(base)
        itemsize = np.dtype(dtype).itemsize
        inside = DeviceArray(memory.array.pointer + itemsize, (39,), dtype, device=gpu.device.ordinal, owner=memory)
        assert looked(gpu, kernel, inside) == 0
        beyond = DeviceArray(memory.array.pointer + itemsize, (40,), dtype, device=gpu.device.ordinal, owner=memory)
        assert looked(gpu, kernel, beyond) == 1

    def test_several_arrays_share_an_answer_and_whole_numbers_are_passed_over(
        self, gpu: Any, kernel: FiniteKernel
    ) -> None:
        good = gpu.place(extremes("float32", 9)).array
        bad = gpu.place(np.array([[1, np.nan]], np.float16)).array
        whole = gpu.place(np.full(4, 0x7F800000, np.int32)).array
        empty = gpu.allocate((0, 3), "float32")
        assert looked(gpu, kernel, good, whole, empty) == 0
        assert looked(gpu, kernel, bad, good, whole) == 1
        # What the last look found is forgotten.
        assert looked(gpu, kernel, good) == 0
        assert looked(gpu, kernel) == 0

    def test_a_graph_of_it_is_replayed_on_other_numbers(self, gpu: Any, kernel: FiniteKernel) -> None:
        values, found = gpu.place(extremes("float32", 50)), gpu.empty((1,), "int32")
        graph = CudaGraph.capture(
            gpu.stream,
            lambda: kernel.look([values.array], found.array, stream=gpu.stream.handle),
            name="look",
        )
        graph.launch(gpu.stream)
        assert found.read()[0] == 0
        spoilt = gpu.place(np.full(50, np.inf, np.float32))
        _copy(gpu, spoilt.array, values.array)
        graph.launch(gpu.stream)
        assert found.read()[0] == 1
        graph.close()


def array(shape: tuple[int, ...], dtype: str = "float32", *, pointer: int = 4096, **options: Any) -> DeviceArray:
    """An array that is looked at and never touched."""
    return DeviceArray(pointer, shape, dtype, device=options.pop("device", 0), **options)


@pytest.mark.parametrize(
    ("dtype", "pointer", "count", "grouped", "blocks"),
    [
        ("float32", 4096, 1024, 1, 1),
        ("float32", 4096, 1025, 1, 2),
        ("float32", 4104, 1024, 0, 4),  # no group begins there: every element is a thread's
        ("float16", 4096, 2048, 1, 1),
        ("float64", 4096, 512, 1, 1),
        ("float32", 4096, 2**24, 1, 1024),
    ],
)
def test_sixteen_bytes_at_once_where_the_array_begins_at_them(
    no_gpu: Any, dtype: str, pointer: int, count: int, grouped: int, blocks: int
) -> None:
    # A GPU faults on a misaligned group; the host that stands for it does not.
    launch: Any = FiniteKernel(no_gpu).prepare(array((count,), dtype, pointer=pointer), array((1,), "int32"))
    grid, threads, arguments = launch
    assert (grid, threads) == ((blocks, 1, 1), (256, 1, 1))
    given, (elements, _), at_once, found = arguments
    assert (given.pointer, elements, at_once, found.pointer) == (pointer, count, grouped, 4096)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"array": array((3,), device=1)}, "array is on cuda:1, expected cuda:0"),
        ({"array": array((2, 3), strides=(1, 2))}, "array has strides [1, 2], expected those of C order"),
        ({"array": array((3,), "complex64")}, "array is complex64, expected float16 or float32 or float64"),
        ({"array": array((3,), pointer=4097)}, "array starts at address 0x1001"),
        ({"found": array((1,))}, "found is float32, expected int32"),
        ({"found": array((2,), "int32")}, "found has shape [2], expected [1]"),
    ],
)
def test_arguments_that_do_not_fit(no_gpu: Any, replaced: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"array": array((3,)), "found": array((1,), "int32")}
    with pytest.raises(InputError) as caught:
        FiniteKernel(no_gpu).prepare(**given | replaced)
    assert str(caught.value).startswith(message)


def _copy(gpu: Any, source: DeviceArray, target: DeviceArray) -> None:
    check(load().cuMemcpyDtoDAsync(target.pointer, source.pointer, source.size_bytes, gpu.stream.stream), "copying")

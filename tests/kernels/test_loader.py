"""Loading and launching: arguments, order, threads, closing, and what drivers of different ages can do."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numpy as np
import pytest

from warpcache.kernels import loader
from warpcache.kernels.driver import Context
from warpcache.kernels.errors import BackendError, DeviceError
from warpcache.kernels.loader import KernelLibrary, LaunchSequence

# change_summary(blocks, summary, height, width, block_log2, threshold) is a kernel of plain arguments.
ONE = (1, 1, 1)
THREADS = (256, 1, 1)


def summary_arguments(blocks: int, summary: int, *, threshold: float = 0.5) -> list[Any]:
    return [
        (blocks, ctypes.c_void_p),
        (summary, ctypes.c_void_p),
        (8, ctypes.c_int),
        (8, ctypes.c_int),
        (2, ctypes.c_int),
        (threshold, ctypes.c_float),
    ]


@pytest.fixture
def library(cuda_context: Any) -> Any:
    library = KernelLibrary(cuda_context, "change.cu")
    yield library
    library.close()


@pytest.fixture
def blocks(gpu: Any) -> Any:
    """Four blocks of 4 x 4 pixels: means 0, 0.25, 0.5 and 1; maxima 1 to 4."""
    return gpu.place(np.array([[[0, 0.25], [0.5, 1]], [[1, 2], [3, 4]]], np.float32))


class TestLaunch:
    def test_arguments_arrive(self, gpu: Any, library: KernelLibrary, blocks: Any) -> None:
        summary = gpu.empty((3,), "float32")
        library.function("change_summary").launch(
            ONE, THREADS, summary_arguments(blocks.array.pointer, summary.array.pointer), stream=gpu.stream.handle
        )
        assert summary.read().tolist() == [0.4375, 4, 0.25]

    def test_ctypes_instances_serve_as_well_as_pairs(self, gpu: Any, library: KernelLibrary, blocks: Any) -> None:
        summary = gpu.empty((3,), "float32")
        pairs = summary_arguments(blocks.array.pointer, summary.array.pointer, threshold=0.1)
        library.function("change_summary").launch(
            ONE, THREADS, [kind(value) for value, kind in pairs], stream=gpu.stream.handle
        )
        assert summary.read()[2] == 0.75

    def test_a_prepared_launch_keeps_its_arguments(self, gpu: Any, library: KernelLibrary, blocks: Any) -> None:
        summaries = [gpu.empty((3,), "float32") for _ in range(2)]
        kernel = library.function("change_summary")
        low, high = (
            kernel.prepare(
                ONE, THREADS, summary_arguments(blocks.array.pointer, item.array.pointer, threshold=threshold)
            )
            for item, threshold in zip(summaries, (0.1, 0.9), strict=True)
        )
        for _ in range(3):
            LaunchSequence(high, low).launch(gpu.stream.handle)
        assert [item.read()[2] for item in summaries] == [0.75, 0.25]

    def test_threads_do_not_mix_their_arguments(self, gpu: Any, library: KernelLibrary, blocks: Any) -> None:
        summaries = [gpu.empty((3,), "float32") for _ in range(4)]
        kernel = library.function("change_summary")
        start = threading.Barrier(4)

        def work(index: int) -> None:
            stream = gpu.device.stream(f"thread {index}")
            arguments = summary_arguments(
                blocks.array.pointer, summaries[index].array.pointer, threshold=(0.9, 0.6, 0.3, 0.1)[index]
            )
            start.wait()
            for _ in range(10):
                kernel.launch(ONE, THREADS, arguments, stream=stream.handle)
            stream.synchronize()

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [item.read()[2] for item in summaries] == [0.25, 0.25, 0.5, 0.75]

    @pytest.mark.parametrize("change", [lambda a: a[:-1], lambda a: [*a, (1, ctypes.c_int)]])
    def test_a_wrong_number_of_arguments(self, library: KernelLibrary, change: Any) -> None:
        kernel = checked(library)
        with pytest.raises(BackendError, match=r"^kernel change_summary takes arguments of \[8, 8, 4, 4, 4, 4\] bytes"):
            kernel.prepare(ONE, THREADS, change(summary_arguments(1, 2)))

    def test_an_argument_of_another_size(self, library: KernelLibrary) -> None:
        kernel = checked(library)
        arguments = summary_arguments(1, 2)
        arguments[5] = (0.5, ctypes.c_double)
        with pytest.raises(BackendError, match=r"given were \[8, 8, 4, 4, 4, 8\]"):
            kernel.prepare(ONE, THREADS, arguments)

    def test_a_launch_that_the_driver_refuses(self, gpu: Any, library: KernelLibrary) -> None:
        launch = library.function("change_summary").prepare(ONE, (2048, 1, 1), summary_arguments(1, 2))
        with pytest.raises(DeviceError, match=r"^launching kernel change_summary failed: .*CUDA_ERROR_INVALID_VALUE"):
            launch.launch(gpu.stream.handle)


def checked(library: KernelLibrary) -> Any:
    """The kernel, where the driver says the sizes of its parameters (from CUDA 12.4 on)."""
    kernel = library.function("change_summary")
    if kernel._sizes is None:
        pytest.skip("this driver does not say the sizes of a kernel's parameters")
    return kernel


class TestLibrary:
    def test_a_kernel_is_found_once(self, library: KernelLibrary) -> None:
        assert library.function("change_summary") is library.function("change_summary")

    def test_a_kernel_that_is_not_there(self, library: KernelLibrary) -> None:
        with pytest.raises(DeviceError, match=r"^change\.cu has no kernel 'nothing'; it has change_blocks_f16, "):
            library.function("nothing")

    def test_closed_twice_and_then_refused(self, gpu: Any, library: KernelLibrary) -> None:
        launch = library.function("change_summary").prepare(ONE, THREADS, summary_arguments(1, 2))
        library.close()
        library.close()
        for use in (lambda: library.function("change_summary"), lambda: launch.launch(gpu.stream.handle)):
            with pytest.raises(DeviceError, match=r"^the kernels of change\.cu on cuda:0 are closed; load them again"):
                use()

    def test_macros_are_part_of_what_is_loaded(self, cuda_context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[Any] = []
        monkeypatch.setattr(loader, "cached_cubin", lambda *given, **options: asked.append((given, options)) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            KernelLibrary(cuda_context, "image.cu", {"WIDE": 1})
        ((source, arch), options) = asked[0]
        assert "image_load_f32" in source
        assert arch == cuda_context.architecture
        assert options == {"name": "image.cu", "defines": {"WIDE": 1}}


class TestOldDrivers:
    """Drivers before CUDA 12.4: a double of two functions, for none is at hand."""

    def test_the_kernel_is_loaded_by_asking_for_an_attribute(
        self, gpu: Any, library: KernelLibrary, blocks: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = loader.load()
        asked: list[Any] = []

        class Old:
            def __getattr__(self, name: str) -> Any:
                return getattr(real, name)

            def cuFuncLoad(self, function: Any) -> Any:
                raise RuntimeError('Function "cuFuncLoad" not found')

            def cuFuncGetAttribute(self, attribute: Any, function: Any) -> Any:
                asked.append(attribute)
                return real.CUresult.CUDA_SUCCESS, 8

        monkeypatch.setattr(loader, "load", Old)
        kernel = library.function("change_summary")
        assert asked == [real.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NUM_REGS]
        summary = gpu.empty((3,), "float32")
        kernel.launch(
            ONE, THREADS, summary_arguments(blocks.array.pointer, summary.array.pointer), stream=gpu.stream.handle
        )
        assert summary.read()[1] == 4


def test_a_driver_older_than_the_compiler_is_said(software_cuda: Any) -> None:
    software_cuda.configure(driver_version=12080)
    context = Context(0)
    with pytest.raises(DeviceError, match=r"^the NVIDIA driver speaks CUDA 12\.8, and the kernels of image\.cu are"):
        KernelLibrary(context, "image.cu")
    context.close()

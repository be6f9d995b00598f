"""Kernels on the software driver: NVRTC makes the cubin, the host's compiler what runs, and the name ties the two."""

from __future__ import annotations

import ctypes
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from software_cuda.build import BuildError, host_source
from software_cuda.raw import BYTES, COUNT, RawGpu, code, numbers, ok, raw_gpu

gpu = raw_gpu

SOURCE = Path(__file__).parent / "software_cuda" / "selftest.cu"
ARGUMENTS = {int: ctypes.c_int, float: ctypes.c_float}


@pytest.fixture(scope="session")
def cubin() -> bytes:
    """selftest.cu as NVRTC compiles it for sm_90, which takes no driver."""
    from cuda.core import Program, ProgramOptions

    packages = metadata.distribution("nvidia-cuda-runtime").locate_file("")
    options = ProgramOptions(std="c++17", arch="sm_90", include_path=f"{packages}/nvidia/cu13/include")
    return bytes(Program(SOURCE.read_text(), "c++", options).compile("cubin").code)


class Launcher:
    """The kernels of selftest.cu on one stream of a GPU."""

    def __init__(self, gpu: RawGpu, image: bytes) -> None:
        self.gpu = gpu
        gpu.software.add_kernels(SOURCE)
        self.module = ok(gpu.cuda.cuModuleLoadData(image))
        self.stream = gpu.stream()

    def function(self, name: str) -> Any:
        return ok(self.gpu.cuda.cuModuleGetFunction(self.module, f"selftest_{name}".encode()))

    def launch(self, name: str, grid: int, block: int, *args: Any, shared: int = 0, types: Any = None) -> str:
        """Pointers are given as `np.uint64`."""
        kinds = types or tuple(ARGUMENTS.get(type(arg), ctypes.c_void_p) for arg in args)
        values = tuple(int(arg) if isinstance(arg, np.uint64) else arg for arg in args)
        packed = (values, kinds)
        return code(
            self.gpu.cuda.cuLaunchKernel(self.function(name), grid, 1, 1, block, 1, 1, shared, self.stream, packed, 0)
        )

    def run(self, *args: Any, **options: Any) -> None:
        assert self.launch(*args, **options) == "CUDA_SUCCESS"
        ok(self.gpu.cuda.cuStreamSynchronize(self.stream))

    def close(self) -> None:
        if not self.gpu.software.count("lost_contexts"):
            ok(self.gpu.cuda.cuModuleUnload(self.module))


@pytest.fixture
def kernels(gpu: RawGpu, cubin: bytes) -> Any:
    launcher = Launcher(gpu, cubin)
    yield launcher
    launcher.close()


def at(pointer: int) -> np.uint64:
    return np.uint64(pointer)


class TestArithmetic:
    @pytest.mark.parametrize("n", [1, 31, 1000])
    def test_sum(self, kernels: Launcher, gpu: RawGpu, n: int) -> None:
        x = np.random.default_rng(n).integers(-100, 100, n).astype(np.float32)
        source, target = gpu.upload(x), gpu.alloc()
        kernels.run("sum", 3, 256, at(source), at(target), n)
        # Whole numbers: no order of adding them rounds.
        assert np.array_equal(gpu.read(target, 3), np.full(3, x.sum()))

    def test_dynamic_shared_memory(self, kernels: Launcher, gpu: RawGpu) -> None:
        x = np.arange(6 * 96, dtype=np.float32).reshape(6, 96)
        pointer = gpu.upload(x)
        kernels.run("reverse", 6, 96, at(pointer), shared=96 * 4)
        assert np.array_equal(gpu.read(pointer, x.size).reshape(x.shape), x[:, ::-1])

    @pytest.mark.parametrize(("lanes", "width"), [(32, 32), (32, 8), (32, 16)])
    def test_shuffles(self, kernels: Launcher, gpu: RawGpu, lanes: int, width: int) -> None:
        x = np.random.default_rng(0).permutation(100)[:lanes].astype(np.int32)
        target = gpu.alloc(8 * lanes * 4)
        kernels.run("shuffles", 1, lanes, at(gpu.upload(x)), at(target), width)
        got = gpu.read(target, 8 * lanes, np.int32).reshape(8, lanes)
        lane = np.arange(lanes)
        first = lane // width * width
        assert np.array_equal(got[0], x[first + 3])
        assert np.array_equal(got[1], np.where(lane - 2 < first, x, x[np.maximum(lane - 2, 0)]))
        assert np.array_equal(got[2], np.where(lane + 2 >= first + width, x, x[np.minimum(lane + 2, lanes - 1)]))
        assert np.array_equal(got[3], x[lane ^ 1])
        ballot = np.array(sum(1 << int(i) for i in lane if x[i] % 3 == 0), np.uint32).view(np.int32)
        assert (got[4] == ballot).all()
        assert (got[5] == int(5 in x) + 2).all()
        assert (got[6] == np.count_nonzero(x % 2)).all()
        assert np.array_equal(got[7], np.where(lane < 16, x[lane ^ 15], x[lane ^ 8]))

    def test_atomics(self, kernels: Launcher, gpu: RawGpu) -> None:
        n = 300
        x = np.random.default_rng(1).integers(1, 1000, n).astype(np.uint32)
        bins, total = gpu.upload(np.zeros(4, np.uint32)), gpu.upload(np.zeros(1, np.float32))
        least, most = gpu.upload(np.array([2**30], np.int32)), gpu.upload(np.zeros(1, np.uint64))
        first = gpu.upload(np.zeros(1, np.uint32))
        pointers = [at(pointer) for pointer in (bins, total, least, most, first)]
        kernels.run("atomics", 3, 128, at(gpu.upload(x)), n, *pointers)
        assert np.array_equal(gpu.read(bins, 4, np.uint32), np.bincount(x % 4, minlength=4))
        assert gpu.read(total, 1)[0] == n / 2
        assert gpu.read(least, 1, np.int32)[0] == x.min()
        assert gpu.read(most, 1, np.uint64)[0] == int(x.max()) << 32
        assert gpu.read(first, 1, np.uint32)[0] in x

    def test_halves_round_as_numpy_rounds_them(self, kernels: Launcher, gpu: RawGpu) -> None:
        n = 512
        rng = np.random.default_rng(2)
        a, b = (rng.normal(0, 30, n).astype(np.float16) for _ in range(2))
        target, pairs = gpu.alloc(2 * n), gpu.alloc(2 * n)
        kernels.run("half", 4, 128, at(gpu.upload(a)), at(gpu.upload(b)), at(target), at(pairs), n)
        assert np.array_equal(gpu.read(target, n, np.float16), a * b + a)
        assert np.array_equal(gpu.read(pairs, n, np.float16), np.abs(a))

    def test_a_structure_is_passed_by_value(self, kernels: Launcher, gpu: RawGpu) -> None:
        class Plane(ctypes.Structure):
            _fields_ = (("data", ctypes.c_void_p), ("pitch", ctypes.c_int))

        pointer = gpu.upload(np.zeros(16, np.float32))
        plane, value = Plane(pointer, 8), ctypes.c_float(2.5)
        addresses = (ctypes.c_void_p * 2)(ctypes.addressof(plane), ctypes.addressof(value))
        function = kernels.function("plane")
        with gpu.software.held(kernels.stream):
            launched = gpu.cuda.cuLaunchKernel(
                function, 2, 1, 1, 3, 1, 1, 0, kernels.stream, ctypes.addressof(addresses), 0
            )
            ok(launched)
            # The launch took copies of the arguments.
            plane.pitch, value.value = 0, 0.0
        ok(gpu.cuda.cuStreamSynchronize(kernels.stream))
        assert np.array_equal(gpu.read(pointer).reshape(2, 8), [[2.5] * 3 + [0] * 5] * 2)


class TestLaunches:
    def test_capture_and_replay(self, kernels: Launcher, gpu: RawGpu) -> None:
        pointer = gpu.upload(numbers())
        mode = gpu.cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        ok(gpu.cuda.cuStreamBeginCapture(kernels.stream, mode))
        assert kernels.launch("scale", 1, 32, at(pointer), 2.0, COUNT) == "CUDA_SUCCESS"
        assert kernels.launch("scale", 1, 32, at(pointer), 5.0, COUNT - 8) == "CUDA_SUCCESS"
        graph = ok(gpu.cuda.cuStreamEndCapture(kernels.stream))
        executable = ok(gpu.cuda.cuGraphInstantiate(graph, 0))
        ok(gpu.cuda.cuGraphDestroy(graph))
        for _ in range(2):
            ok(gpu.cuda.cuGraphLaunch(executable, kernels.stream))
        ok(gpu.cuda.cuStreamSynchronize(kernels.stream))
        ok(gpu.cuda.cuGraphExecDestroy(executable))
        assert np.array_equal(gpu.read(pointer), numbers() * np.where(np.arange(COUNT) < 8, 100, 4))

    def test_a_library_of_kernels(self, gpu: RawGpu, cubin: bytes) -> None:
        gpu.software.add_kernels(SOURCE)
        library = ok(gpu.cuda.cuLibraryLoadData(cubin, None, None, 0, None, None, 0))
        kernel = ok(gpu.cuda.cuLibraryGetKernel(library, b"selftest_scale"))
        stream, pointer = gpu.stream(), gpu.upload(numbers())
        arguments = ((pointer, 3.0, COUNT), (ctypes.c_void_p, ctypes.c_float, ctypes.c_int))
        ok(gpu.cuda.cuLaunchKernel(gpu.cuda.CUfunction(int(kernel)), 1, 1, 1, 16, 1, 1, 0, stream, arguments, 0))
        ok(gpu.cuda.cuStreamSynchronize(stream))
        assert np.array_equal(gpu.read(pointer), numbers() * 3)
        assert ok(gpu.cuda.cuKernelGetParamInfo(kernel, 2)) == (12, 4)
        ok(gpu.cuda.cuLibraryUnload(library))

    @pytest.mark.parametrize(
        ("grid", "block", "shared"),
        [(0, 1, 0), (1, 0, 0), (1, 2000, 0), (1, 32, 48 * 1024 + 1), (1, 257, 0)],
    )
    def test_refuses_what_a_gpu_refuses(
        self, kernels: Launcher, gpu: RawGpu, grid: int, block: int, shared: int
    ) -> None:
        # Of these the last is above the kernel's own __launch_bounds__(256).
        pointer = at(gpu.alloc())
        assert kernels.launch("sum", grid, block, pointer, pointer, 4, shared=shared) == "CUDA_ERROR_INVALID_VALUE"

    def test_much_shared_memory_is_asked_for(self, kernels: Launcher, gpu: RawGpu) -> None:
        pointer = gpu.upload(numbers())
        which = gpu.cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        function = kernels.function("reverse")
        assert code(gpu.cuda.cuFuncSetAttribute(function, which, 2**20)) == "CUDA_ERROR_INVALID_VALUE"
        ok(gpu.cuda.cuFuncSetAttribute(function, which, 100_000))
        kernels.run("reverse", 1, 16, at(pointer), shared=100_000)
        assert np.array_equal(gpu.read(pointer), numbers()[::-1])

    def test_another_device_s_function(self, kernels: Launcher, gpu: RawGpu) -> None:
        from warpcache.kernels.driver import Context

        there = Context(1)
        there.make_current()
        stream = ok(gpu.cuda.cuStreamCreate(1))
        arguments = ((0, 1.0, 0), (ctypes.c_void_p, ctypes.c_float, ctypes.c_int))
        function = kernels.function("scale")
        said = gpu.cuda.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, stream, arguments, 0)
        assert code(said) == "CUDA_ERROR_INVALID_HANDLE"
        ok(gpu.cuda.cuStreamDestroy(stream))
        gpu.context.make_current()
        there.close()


class TestMistakes:
    @pytest.mark.parametrize(
        ("which", "error", "report"),
        [
            (0, "LAUNCH_FAILED", r"7 of 32 threads wait at __syncthreads in line \d+, which the others never reach"),
            (1, "LAUNCH_FAILED", r"threads of one block wait at __syncthreads in line \d+ and in line \d+"),
            (2, "LAUNCH_FAILED", "a warp's operation waits for lanes that its mask names and that never come"),
            (3, "LAUNCH_FAILED", r"__trap in line \d+"),
            (4, "LAUNCH_FAILED", "an index left its array"),
            (5, "LAUNCH_FAILED", "an index left its array"),
            (6, "LAUNCH_FAILED", "divided an integer by zero"),
            (7, "ILLEGAL_ADDRESS", r"touched 0x[0-9a-f]+, which is in no block of memory, or in one that was freed"),
        ],
    )  # fmt: skip
    def test_are_found(self, kernels: Launcher, gpu: RawGpu, which: int, error: str, report: str) -> None:
        pointer = gpu.upload(numbers())
        assert kernels.launch("mistake", 1, 32, at(pointer), which, 0, 4) == "CUDA_SUCCESS"
        assert code(gpu.cuda.cuStreamSynchronize(kernels.stream)) == f"CUDA_ERROR_{error}"
        # The context is lost, as on a GPU.
        assert code(gpu.cuda.cuMemAlloc(4)) == f"CUDA_ERROR_{error}"
        (said,) = gpu.software.reports()
        assert said.startswith("kernel selftest_mistake")
        assert re.search(report, said)

    def test_the_same_kernel_without_a_mistake(self, kernels: Launcher, gpu: RawGpu) -> None:
        pointer = gpu.upload(numbers())
        kernels.run("mistake", 1, 1, at(pointer), -1, 1, 3)
        assert gpu.read(pointer, 1)[0] == 0

    @pytest.mark.parametrize("kind", ["host", "other device", "freed"])
    def test_pointers_to_what_the_gpu_cannot_reach(self, kernels: Launcher, gpu: RawGpu, kind: str) -> None:
        held = numbers()
        if kind == "host":
            pointer = held.ctypes.data
        elif kind == "freed":
            pointer = int(ok(gpu.cuda.cuMemAlloc(BYTES)))
            ok(gpu.cuda.cuMemFree(pointer))
        else:
            from warpcache.kernels.driver import Context

            gpu.software.configure(devices=3)
            there = Context(2)
            there.make_current()
            pointer = int(ok(gpu.cuda.cuMemAlloc(BYTES)))
            gpu.context.make_current()
        assert kernels.launch("scale", 1, 16, at(pointer), 2.0, COUNT) == "CUDA_SUCCESS"
        assert code(gpu.cuda.cuStreamSynchronize(kernels.stream)) == "CUDA_ERROR_ILLEGAL_ADDRESS"
        assert gpu.software.reports() == ["kernel selftest_scale: argument 0 points to no memory that cuda:0 can reach"]
        if kind == "other device":
            there.make_current()
            ok(gpu.cuda.cuMemFree(pointer))
            there.close()
            gpu.context.make_current()

    def test_memory_of_another_device_with_peer_access(self, kernels: Launcher, gpu: RawGpu) -> None:
        from warpcache.kernels.driver import Context

        gpu.software.configure(devices=3)
        there, handle = Context(2), ok(gpu.cuda.cuDevicePrimaryCtxRetain(2))
        there.make_current()
        pointer = ok(gpu.cuda.cuMemAlloc(BYTES))
        ok(gpu.cuda.cuMemcpyHtoD(pointer, numbers().ctypes.data, BYTES))
        ok(gpu.cuda.cuStreamSynchronize(0))
        gpu.context.make_current()
        ok(gpu.cuda.cuCtxEnablePeerAccess(handle, 0))
        kernels.run("scale", 1, 16, at(int(pointer)), 2.0, COUNT)
        assert np.array_equal(gpu.read(int(pointer)), numbers() * 2)
        ok(gpu.cuda.cuCtxDisablePeerAccess(handle))
        ok(gpu.cuda.cuMemFree(pointer))
        ok(gpu.cuda.cuDevicePrimaryCtxRelease(2))
        there.close()


class TestImages:
    def test_of_another_architecture(self, gpu: RawGpu, cubin: bytes) -> None:
        for major, minor, fits in ((9, 0, True), (9, 3, True), (8, 9, False), (12, 0, False)):
            gpu.software.configure(compute_major=major, compute_minor=minor)
            result = gpu.cuda.cuModuleLoadData(cubin)
            assert code(result) == ("CUDA_SUCCESS" if fits else "CUDA_ERROR_NO_BINARY_FOR_GPU")
            if fits:
                ok(gpu.cuda.cuModuleUnload(result[1]))

    @pytest.mark.parametrize("image", [b"not a cubin at all" * 8, b"\x7fELF" + bytes(100)])
    def test_that_are_none(self, gpu: RawGpu, image: bytes) -> None:
        assert code(gpu.cuda.cuModuleLoadData(image)) == "CUDA_ERROR_INVALID_IMAGE"

    def test_without_the_kernel(self, kernels: Launcher, gpu: RawGpu) -> None:
        for name in (b"selftest_no_such", b"selftest_commented_out", b"selftest_template", b"selftest_su"):
            assert code(gpu.cuda.cuModuleGetFunction(kernels.module, name)) == "CUDA_ERROR_NOT_FOUND"

    def test_a_kernel_without_code_for_the_host(self, gpu: RawGpu) -> None:
        from cuda.core import Program, ProgramOptions

        source = 'extern "C" __global__ void selftest_never_added(int* x) { *x = 1; }'
        image = bytes(Program(source, "c++", ProgramOptions(arch="sm_90")).compile("cubin").code)
        module = ok(gpu.cuda.cuModuleLoadData(image))
        assert code(gpu.cuda.cuModuleGetFunction(module, b"selftest_never_added")) == "CUDA_ERROR_NOT_FOUND"
        assert gpu.software.reports() == [
            "kernel selftest_never_added has no code for the host: give its source to add_kernels"
        ]
        gpu.software.add_kernels(source)
        ok(gpu.cuda.cuModuleGetFunction(module, b"selftest_never_added"))
        ok(gpu.cuda.cuModuleUnload(module))


class TestHostSource:
    def test_lines_stay_and_kernels_are_found(self) -> None:
        text = host_source(SOURCE.read_text(), "selftest.cu")
        body, _, table = text.partition('extern "C" swk::Table')
        assert body.splitlines()[1] == '#line 1 "selftest.cu"'
        assert len(body.splitlines()) - 2 == len(SOURCE.read_text().splitlines()) + 1
        assert "SWK_KERNEL(selftest_sum, (256))" in table
        assert "SWK_KERNEL(selftest_reverse, (1024))" in table
        assert "template" not in table
        assert "commented" not in table

    def test_a_mistake_names_its_line(self, gpu: RawGpu) -> None:
        with pytest.raises(BuildError, match=r"source\.cu:3"):
            gpu.software.add_kernels('\n\nextern "C" __global__ void selftest_wrong(int* x) { *x = nothing; }\n')

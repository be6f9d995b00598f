"""ONNX Runtime's CUDA module: what it asks for and refuses, through a double of the session; on a GPU, what it gives.

The double runs the same graphs on ONNX Runtime's CPU provider, over addresses that are host memory: at once, or in a
host function on a stream of software CUDA, whose device memory is the host's. It shows what is bound, in which order it
is run and what is said, and nothing of the provider itself.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.cuda.device import CudaDevice
from warpcache.engine.cuda.graph import CudaGraph
from warpcache.engine.device.stream import Event, InlineStream
from warpcache.engine.errors import BackendError, ClosedError, DeviceError, InputError
from warpcache.engine.onnxruntime import cuda as onnxruntime_cuda
from warpcache.engine.onnxruntime.cuda import PROVIDER, OnnxRuntimeCudaModule
from warpcache.engine.spec import TensorSpec
from warpcache.kernels.array import DeviceArray
from warpcache.kernels.driver import check, load

MIB = 2**20


class HostDevice:
    """A device whose memory is the host's."""

    def __init__(self, ordinal: int = 0) -> None:
        self.ordinal = ordinal
        self.name = f"cuda:{ordinal}"
        self.context = types.SimpleNamespace(make_current=lambda: None, memory=(3 * MIB, 8 * MIB))
        self.allocated: list[weakref.ref[np.ndarray]] = []

    def allocate(self, spec: TensorSpec) -> DeviceArray:
        memory = np.zeros(spec.shape, spec.dtype)
        self.allocated.append(weakref.ref(memory))
        return self.lend(memory)

    def lend(self, memory: np.ndarray) -> DeviceArray:
        strides = tuple(stride // memory.itemsize for stride in memory.strides)
        address = memory.__array_interface__["data"][0]
        return DeviceArray(address, memory.shape, memory.dtype, device=self.ordinal, strides=strides, owner=memory)


class HostStream:
    """A stream that runs at once."""

    def __init__(self, device: HostDevice, handle: int = 7, name: str = "consumer") -> None:
        self.device = device
        self.handle = handle
        self.name = name
        self._inline = InlineStream(name)

    def submit(self, work: Callable[[], Any]) -> Event:
        return self._inline.submit(work)

    def synchronize(self) -> None:
        pass


class Double:
    """What a fake onnxruntime with a CUDA provider was asked for, and what it is to answer."""

    def __init__(self) -> None:
        self.sessions: list[dict[str, Any]] = []
        self.granted = [PROVIDER, "CPUExecutionProvider"]
        self.binds: list[tuple[Any, ...]] = []
        self.runs: list[Any] = []
        self.refuse: Callable[[dict[str, str]], None] = lambda options: None
        self.fail: Callable[[], None] = lambda: None
        self.preloads = 0
        # Puts a run on the stream of this handle; None runs at once.
        self.issue: Callable[[int, Callable[[], None]], None] | None = None

    def module(self, folder: Path) -> types.ModuleType:
        double = self

        class Binding:
            def __init__(self) -> None:
                self.bound: dict[tuple[str, str], tuple[Any, ...]] = {}

            def bind_input(self, name: str, device: str, *rest: Any) -> None:
                double.binds.append((name, device, rest[0]))
                self.bound["bind_input", name] = rest[1:]

            def bind_output(self, name: str, device: str, *rest: Any) -> None:
                double.binds.append((name, device, rest[0]))
                self.bound["bind_output", name] = rest[1:]

        class Session:
            def __init__(self, path: str, options: Any, *, providers: list[Any], **rest: Any) -> None:
                ((provider, provider_options),) = providers
                double.sessions.append({"options": options, "provider": provider, "given": provider_options, **rest})
                double.refuse(provider_options)
                self.real = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
                self.get_inputs, self.get_outputs = self.real.get_inputs, self.real.get_outputs
                self.stream = int(provider_options["user_compute_stream"])

            def get_providers(self) -> list[str]:
                return double.granted

            def io_binding(self) -> Binding:
                return Binding()

            def run_with_iobinding(self, binding: Binding, run_options: Any) -> None:
                double.runs.append(run_options)
                double.fail()
                # What is bound now is what the work uses, whatever is bound when it comes to run.
                real = self.real.io_binding()
                for (kind, name), rest in binding.bound.items():
                    getattr(real, kind)(name, "cpu", 0, *rest)
                if double.issue is None:
                    self.real.run_with_iobinding(real)
                else:
                    double.issue(self.stream, lambda: self.real.run_with_iobinding(real))

        def preload() -> None:
            double.preloads += 1
            print("Failed to load libcublas.so.13")

        module = types.ModuleType("onnxruntime")
        module.__dict__.update(
            {
                "__file__": str(folder / "onnxruntime" / "__init__.py"),
                "__version__": onnxruntime.__version__,
                "ExecutionMode": onnxruntime.ExecutionMode,
                "GraphOptimizationLevel": onnxruntime.GraphOptimizationLevel,
                "InferenceSession": Session,
                "RunOptions": onnxruntime.RunOptions,
                "SessionOptions": onnxruntime.SessionOptions,
                "get_available_providers": lambda: ["TensorrtExecutionProvider", PROVIDER, "CPUExecutionProvider"],
                "preload_dlls": preload,
            }
        )
        return module


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Double]:
    made = Double()
    monkeypatch.setitem(sys.modules, "onnxruntime", made.module(tmp_path))
    onnxruntime_cuda._preload_libraries.cache_clear()
    yield made
    onnxruntime_cuda._preload_libraries.cache_clear()


def open_module(bundle: Path, name: str, *, device: Any = None, stream: Any = None, **changes) -> OnnxRuntimeCudaModule:
    opened = Bundle.open(bundle)
    record = opened.manifest.modules[name]
    device = device or HostDevice()
    options = {"inputs": record.inputs, "outputs": record.outputs, "stream": stream or HostStream(device)} | changes
    return OnnxRuntimeCudaModule(opened.file(record.file), name=name, device=device, **options)


def frame(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (1, 3, 16, 16)).astype(np.float32)


def bound(module: OnnxRuntimeCudaModule, **arrays: np.ndarray) -> tuple[dict[str, DeviceArray], dict[str, np.ndarray]]:
    """Bindings of `module` over `arrays`, and fresh outputs filled with NaN: what is not written cannot pass."""
    out = {spec.name: np.full(spec.shape, np.nan, spec.dtype) for spec in module.outputs}
    return {name: HostDevice().lend(array) for name, array in {**arrays, **out}.items()}, out


def test_the_provider_is_asked_for_by_name_and_alone(tiny_bundle, double):
    device = HostDevice(1)
    module = open_module(tiny_bundle, "generator", device=device, stream=HostStream(device, handle=0x7F00))
    (asked,) = double.sessions
    assert asked["provider"] == PROVIDER
    assert asked["enable_fallback"] == 0
    assert asked["options"].get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
    assert asked["options"].enable_mem_pattern is False
    assert asked["given"] == {
        "device_id": "1",
        "user_compute_stream": str(0x7F00),
        "do_copy_in_default_stream": "1",
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": "0",
        "enable_cuda_graph": "1",
    }
    assert module.capturable
    assert {device for _, device, _ in double.binds} == {"cuda"}
    assert {ordinal for _, _, ordinal in double.binds} == {1}


def test_no_run_waits_for_the_gpu_or_captures_a_graph_of_its_own(tiny_bundle, double):
    module = open_module(tiny_bundle, "generator")
    module.launch(bound(module, x=frame(0))[0], module._stream)
    assert double.runs
    for options in double.runs:
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        assert options.get_run_config_entry("gpu_graph_id") == "-1"


@pytest.mark.parametrize("name", ["generator", "producer", "warp"])
def test_what_is_bound_is_what_is_computed(tiny_bundle, double, name):
    module = open_module(tiny_bundle, name)
    inputs = {spec.name: frame(seed) for seed, spec in enumerate(module.inputs)}
    bindings, out = bound(module, **inputs)
    assert module.enqueue(bindings, module._stream).wait()
    opened = Bundle.open(tiny_bundle)
    file = opened.file(opened.manifest.modules[name].file)
    # The same executor underneath, so the same bits.
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for spec, expected in zip(module.outputs, session.run([spec.name for spec in module.outputs], inputs), strict=True):
        assert np.array_equal(out[spec.name], expected)


def test_it_is_warm_when_it_is_loaded_and_keeps_no_scratch_memory(tiny_bundle, double):
    device = HostDevice()
    module = open_module(tiny_bundle, "generator", device=device)
    assert len(double.runs) == 2
    assert len(device.allocated) == 2
    gc.collect()
    assert [memory() for memory in device.allocated] == [None, None]
    # Freed memory must never be taken for bound: the next call binds all, even at the same address.
    count = len(double.binds)
    module.launch(bound(module, x=frame(0))[0], module._stream)
    assert len(double.binds) == count + 2


def test_only_what_changed_is_bound_again(tiny_bundle, double):
    module = open_module(tiny_bundle, "warp")
    first, out = bound(module, x=frame(0), **{"cache.y_s": frame(1)})
    module.launch(first, module._stream)
    double.binds.clear()
    module.launch(first, module._stream)
    # Another object over the same memory is the same buffer.
    module.launch({name: HostDevice().lend(array.owner) for name, array in first.items()}, module._stream)
    assert double.binds == []
    other = frame(2)
    module.launch({**first, "cache.y_s": HostDevice().lend(other)}, module._stream)
    assert double.binds == [("cache.y_s", "cuda", 0)]
    # One product and one sum, or both fused: one rounding apart at most, of numbers below 2.
    np.testing.assert_allclose(
        out["image"], other + np.float32(0.1) * frame(0), rtol=0, atol=2 * np.finfo(np.float32).eps
    )


def strided() -> DeviceArray:
    return HostDevice().lend(np.zeros((1, 3, 16, 32), np.float32)[..., ::2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": None}, "^module 'warp' needs one array for every input and output; missing: 'x'; unknown: none"),
        ({"y": HostDevice().lend(frame(0))}, "^module 'warp' needs one array .* missing: none; unknown: 'y'"),
        ({"x": frame(0)}, "^module 'warp': input 'x' is of type ndarray, expected an array on cuda:0"),
        ({"x": HostDevice(1).lend(frame(0))}, "^module 'warp': input 'x' is on cuda:1, expected cuda:0; move it"),
        (
            {"x": HostDevice().lend(frame(0).astype(np.float16))},
            "^module 'warp': input 'x' has dtype float16, expected",
        ),
        (
            {"x": HostDevice().lend(frame(0)[:, :, :8])},
            r"^module 'warp': input 'x' has shape \(1, 3, 8, 16\), expected \(1, 3, 16, 16\)",
        ),
        ({"x": strided()}, "^module 'warp': input 'x' is not C-contiguous; pass a copy"),
        ({"image": HostDevice().lend(np.zeros((3, 16, 16), np.float32))}, r"^module 'warp': output 'image' has shape"),
    ],
)
def test_wrong_bindings_are_refused_and_nothing_runs(tiny_bundle, double, changes, message):
    module = open_module(tiny_bundle, "warp")
    bindings, _ = bound(module, x=frame(0), **{"cache.y_s": frame(1)})
    bindings = {name: array for name, array in {**bindings, **changes}.items() if array is not None}
    runs = len(double.runs)
    for call in (module.launch, module.enqueue):
        with pytest.raises(InputError, match=message):
            call(bindings, module._stream)
    assert len(double.runs) == runs


def test_an_output_that_shares_memory_is_refused_and_the_module_goes_on(tiny_bundle, double):
    module = open_module(tiny_bundle, "warp")
    cache = frame(1)
    bindings, out = bound(module, x=frame(0), **{"cache.y_s": cache})
    for _ in range(2):
        with pytest.raises(InputError, match=r"^module 'warp': .* share memory; give every output an array of its own"):
            module.launch({**bindings, "image": bindings["cache.y_s"]}, module._stream)
    assert np.array_equal(cache, frame(1))
    module.launch(bindings, module._stream)
    assert np.isfinite(out["image"]).all()


def test_another_stream_is_refused(tiny_bundle, double):
    module = open_module(tiny_bundle, "generator")
    with pytest.raises(InputError, match=r"^module 'generator' was loaded for stream 'consumer' and cannot run on 'p'"):
        module.launch(bound(module, x=frame(0))[0], HostStream(HostDevice(), handle=8, name="p"))
    with pytest.raises(
        InputError, match=r"^module 'generator' was given stream 'consumer' of cuda:1, but runs on cuda:0"
    ):
        open_module(tiny_bundle, "generator", device=HostDevice(0), stream=HostStream(HostDevice(1)))


def test_close_is_safe_twice_and_ends_the_module(tiny_bundle, double):
    module = open_module(tiny_bundle, "generator")
    bindings, _ = bound(module, x=frame(0))
    module.close()
    module.close()
    for call in (module.launch, module.enqueue):
        with pytest.raises(ClosedError, match=r"^module 'generator' is closed; load it again"):
            call(bindings, module._stream)


def test_calls_of_two_threads_take_turns(tiny_bundle, double):
    """A second call arrives between the first one's binding and running; its buffers must not be taken for those."""
    module = open_module(tiny_bundle, "generator")
    (first, one), (second, two) = (bound(module, x=frame(seed)) for seed in (0, 1))
    arrived = threading.Event()

    class Watched:
        def __init__(self) -> None:
            self.lock = threading.Lock()

        def __enter__(self) -> None:
            if not self.lock.acquire(blocking=False):
                arrived.set()
                self.lock.acquire()

        def __exit__(self, *_: object) -> None:
            self.lock.release()

    other = threading.Thread(target=lambda: module.launch(second, module._stream))

    def meet() -> None:
        if other.ident is None:
            other.start()
            assert arrived.wait(30), "the second call did not wait for its turn"

    module._lock = Watched()  # type: ignore[assignment]
    double.fail = meet
    module.launch(first, module._stream)
    other.join(30)
    for seed, out in enumerate((one, two)):
        session = onnxruntime.InferenceSession(str(tiny_bundle / "generator.onnx"), providers=["CPUExecutionProvider"])
        (expected,) = session.run(["image"], {"x": frame(seed)})
        assert np.array_equal(out["image"], expected)


# -- what fails


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: Any) -> None:
        raise error

    return fail


def test_a_failed_run_names_the_module(tiny_bundle, double):
    module = open_module(tiny_bundle, "generator")
    bindings, _ = bound(module, x=frame(0))
    double.fail = raising(RuntimeError("[ONNXRuntimeError] : 1 : FAIL : CUDNN_STATUS_EXECUTION_FAILED\nand more"))
    message = r"^module 'generator' failed in ONNX Runtime: \[ONNXRuntimeError\] : 1 : FAIL : CUDNN_STATUS_EXEC\w+$"
    with pytest.raises(BackendError, match=message) as caught:
        module.launch(bindings, module._stream)
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(BackendError, match=message):
        module.enqueue(bindings, module._stream).wait()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            "bfc_arena.cc:378 AllocateRawInternal Failed to allocate memory for requested buffer of size 33554432",
            r"^cuda:0 has no room for module 'generator'; 32\.0 MiB more were asked for; 3\.0 MiB of 8\.0 MiB",
        ),
        (
            "CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc",
            r"^cuda:0 has no room for module 'generator'; 3\.0 MiB of 8\.0 MiB are free; close other programs",
        ),
    ],
)
@pytest.mark.parametrize("when", ["load", "first run", "later"])
def test_a_full_gpu_is_said_with_what_is_free(tiny_bundle, double, said, message, when):
    error = raising(RuntimeError(said))
    if when == "load":
        double.refuse = error
    elif when == "first run":
        double.fail = error
    if when != "later":
        with pytest.raises(DeviceError, match=message):
            open_module(tiny_bundle, "generator")
        return
    module = open_module(tiny_bundle, "generator")
    bindings, _ = bound(module, x=frame(0))
    double.fail = error
    with pytest.raises(DeviceError, match=message):
        module.launch(bindings, module._stream)


def test_a_graph_that_cannot_be_captured_is_loaded_without(tiny_bundle, double, caplog):
    def refuse(options: dict[str, str]) -> None:
        if options["enable_cuda_graph"] == "1":
            raise RuntimeError("This session cannot use the graph capture feature: the model has control flow nodes")

    double.refuse = refuse
    with caplog.at_level("INFO", "warpcache"):
        module = open_module(tiny_bundle, "generator")
    assert not module.capturable
    assert [asked["given"]["enable_cuda_graph"] for asked in double.sessions] == ["1", "0"]
    assert "module 'generator' cannot be captured into a CUDA graph" in caplog.text


def test_a_graph_that_is_refused_either_way_is_refused_with_the_first_reason(tiny_bundle, double):
    double.refuse = lambda options: raising(RuntimeError(f"reason {options['enable_cuda_graph']}\nmore"))()
    with pytest.raises(
        BackendError, match=r"^module 'generator' \(generator\.onnx\) was refused by ONNX Runtime: reason 1$"
    ):
        open_module(tiny_bundle, "generator")


@pytest.mark.parametrize(
    "granted",
    [["CPUExecutionProvider"], ["CPUExecutionProvider", PROVIDER], [PROVIDER, "TensorrtExecutionProvider"], []],
)
def test_another_provider_than_asked_for_is_refused(tiny_bundle, double, granted):
    double.granted = granted
    with pytest.raises(BackendError, match=r"^module 'generator' was asked to run on \['CUDAExecutionProvider'\], but"):
        open_module(tiny_bundle, "generator")
    assert double.runs == []


def test_a_graph_with_other_inputs_is_refused(tiny_bundle, double):
    with pytest.raises(BackendError, match=r"^module 'generator': the graph's inputs are 'x' \(float32, \[1, 3, 16"):
        open_module(tiny_bundle, "generator", inputs=(TensorSpec("x", "float16", (1, 3, 16, 16)),))


@pytest.mark.skipif(sys.platform != "linux", reason="the library's name and what the loader says are Linux's")
def test_a_provider_that_does_not_open_is_said_with_its_reason_and_remedy(tiny_bundle, double, tmp_path):
    capi = tmp_path / "onnxruntime" / "capi"
    capi.mkdir(parents=True)
    (capi / "libonnxruntime_providers_cuda.so").write_bytes(b"\x7fELF, but torn")
    double.refuse = raising(RuntimeError("This session contains graph nodes that are assigned to the default CPU EP"))
    with pytest.raises(
        BackendError,
        match=r"^module 'generator': ONNX Runtime's CUDA provider cannot be loaded \(.*providers_cuda\.so.*\); "
        r"install what it needs with pip install \"onnxruntime-gpu\[cuda,cudnn\]\"$",
    ):
        open_module(tiny_bundle, "generator")


def test_cudas_libraries_are_opened_once_and_quietly(tiny_bundle, double, capsys):
    open_module(tiny_bundle, "generator")
    open_module(tiny_bundle, "warp")
    assert double.preloads == 1
    assert capsys.readouterr().out == ""


def test_the_cpu_build_of_onnx_runtime_is_refused_by_name(tiny_bundle):
    """For real: the build that these tests run with."""
    if PROVIDER in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has the CUDA provider")
    with pytest.raises(
        BackendError,
        match=r"^module 'generator' was asked to run on a GPU, but the installed ONNX Runtime \d[\d.]* is a build "
        r'without CUDA; uninstall onnxruntime, then install onnxruntime-gpu with pip install "warpcache\[gpu\]"',
    ):
        open_module(tiny_bundle, "generator")


# -- on the driver in software


@pytest.fixture
def on_streams(double: Double, software_cuda: Any) -> Iterator[Double]:
    """The double whose runs are work on a stream."""
    launch = software_cuda._library.cuLaunchHostFunc
    launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    kept: list[Any] = []

    def issue(stream: int, work: Callable[[], None]) -> None:
        kept.append(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: work()))
        assert launch(stream, ctypes.cast(kept[-1], ctypes.c_void_p), None) == 0

    double.issue = issue
    yield double
    # A graph may call its functions until it is destroyed.
    kept.clear()


def cpu_result(bundle: Path, name: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(bundle / f"{name}.onnx"), providers=["CPUExecutionProvider"])
    return session.run(["image"], inputs)[0]


def test_a_run_is_issued_and_not_waited_for(tiny_bundle, on_streams, software_cuda):
    with CudaDevice(0) as device:
        stream = device.stream("consumer")
        module = open_module(tiny_bundle, "generator", device=device, stream=stream)
        bindings = {"x": device.upload(frame(3)), "image": device.allocate(module.outputs[0])}
        with software_cuda.held(stream):
            event = module.enqueue(bindings, stream)
            assert not event.done
            assert not device.download(bindings["image"]).any()
        event.wait()
        assert np.array_equal(device.download(bindings["image"]), cpu_result(tiny_bundle, "generator", {"x": frame(3)}))
        module.close()


def test_two_runs_on_one_stream_keep_the_buffers_that_each_was_given(tiny_bundle, on_streams, software_cuda):
    """Both are bound and issued before the first begins to run."""
    with CudaDevice(0) as device:
        stream = device.stream("consumer")
        module = open_module(tiny_bundle, "generator", device=device, stream=stream)
        frames = [{"x": device.upload(frame(seed)), "image": device.allocate(module.outputs[0])} for seed in range(2)]
        with software_cuda.held(stream):
            for bindings in frames:
                module.launch(bindings, stream)
        stream.synchronize()
        for seed, bindings in enumerate(frames):
            expected = cpu_result(tiny_bundle, "generator", {"x": frame(seed)})
            assert np.array_equal(device.download(bindings["image"]), expected)
        module.close()


def test_memory_is_taken_when_it_is_loaded_and_none_after(tiny_bundle, on_streams, software_cuda):
    with CudaDevice(0) as device:
        stream = device.stream("consumer")
        module = open_module(tiny_bundle, "generator", device=device, stream=stream)
        bindings = {"x": device.upload(frame(0)), "image": device.allocate(module.outputs[0])}
        taken = software_cuda.count("allocations"), software_cuda.count("events_created")
        for _ in range(5):
            module.enqueue(bindings, stream).wait()
        assert (software_cuda.count("allocations"), software_cuda.count("events_created")) == taken
        module.close()


def test_a_captured_run_is_replayed_on_new_content(tiny_bundle, on_streams, software_cuda):
    with CudaDevice(0) as device:
        stream = device.stream("consumer")
        module = open_module(tiny_bundle, "generator", device=device, stream=stream)
        assert_replay_is_the_plain_run(module, device, stream)


def assert_replay_is_the_plain_run(module: OnnxRuntimeCudaModule, device: CudaDevice, stream: Any) -> None:
    specs = (*module.inputs, *module.outputs)
    bindings = {spec.name: device.allocate(spec) for spec in specs}
    module.launch(bindings, stream)
    stream.synchronize()
    graph = CudaGraph.capture(stream, lambda: module.launch(bindings, stream), name="generator")
    for seed in range(3):
        plain = {"x": device.upload(frame(seed)), "image": device.allocate(module.outputs[0])}
        module.enqueue(plain, stream).wait()
        # In order on the stream: a copy on the default stream is not waited for by ours.
        size = plain["x"].size_bytes
        check(load().cuMemcpyDtoDAsync(bindings["x"].pointer, plain["x"].pointer, size, stream.stream), "copying")
        graph.launch(stream)
        stream.synchronize()
        # The same kernels on the same numbers.
        assert np.array_equal(device.download(bindings["image"]), device.download(plain["image"]))
        assert device.download(plain["image"]).any()
    graph.close()
    module.close()


# -- on hardware


@pytest.fixture
def gpu() -> Iterator[CudaDevice]:
    if PROVIDER not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA provider")
    try:
        device = CudaDevice(0)
    except DeviceError as exc:
        pytest.skip(f"no GPU: {exc}")
    with device:
        yield device


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["generator", "producer", "warp"])
def test_on_a_gpu_it_computes_what_the_cpu_computes(tiny_bundle, gpu, name):
    stream = gpu.stream("test")
    module = open_module(tiny_bundle, name, device=gpu, stream=stream)
    inputs = {spec.name: frame(seed) for seed, spec in enumerate(module.inputs)}
    bindings = {key: gpu.upload(array) for key, array in inputs.items()}
    bindings.update({spec.name: gpu.allocate(spec) for spec in module.outputs})
    module.enqueue(bindings, stream).wait()
    session = onnxruntime.InferenceSession(str(tiny_bundle / f"{name}.onnx"), providers=["CPUExecutionProvider"])
    for spec, expected in zip(module.outputs, session.run([spec.name for spec in module.outputs], inputs), strict=True):
        # Two layers of sums of 27 and 72 products in any order, summands below 4; with TF32 it would be 1e-3.
        np.testing.assert_allclose(
            gpu.download(bindings[spec.name]), expected, rtol=0, atol=2 * 99 * np.finfo(np.float32).eps * 4
        )


@pytest.mark.gpu
def test_on_a_gpu_a_captured_run_is_replayed_on_new_content(tiny_bundle, gpu):
    stream = gpu.stream("test")
    module = open_module(tiny_bundle, "generator", device=gpu, stream=stream)
    assert module.capturable
    assert_replay_is_the_plain_run(module, gpu, stream)

"""Engines as modules: on the driver in software with TensorRT's runtime doubled, and on GPUs that are there."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tests_software_tensorrt import IExecutionContext, failing, failures, software_flavour

from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.cuda.device import CudaDevice, CudaStream
from warpcache.engine.cuda.graph import CudaGraph
from warpcache.engine.device.stream import InlineStream
from warpcache.engine.errors import BackendError, ClosedError, DeviceError, InputError
from warpcache.engine.onnxruntime.cpu import OnnxRuntimeModule
from warpcache.engine.spec import Array, TensorSpec
from warpcache.engine.tensorrt.builder import BuildOptions, ShapeProfile, build_engine, build_engine_isolated
from warpcache.engine.tensorrt.builder import BuildRequest as Request
from warpcache.engine.tensorrt.flavour import CURRENT, Flavour
from warpcache.engine.tensorrt.module import TensorRtModule
from warpcache.kernels.array import DeviceArray

X = TensorSpec("x", "float32", (1, 3, 16, 16))
LAST = TensorSpec("cache.y_s", "float32", (1, 3, 16, 16))
IMAGE = TensorSpec("image", "float32", (1, 3, 16, 16))


@pytest.fixture
def device(software_cuda: Any) -> Iterator[CudaDevice]:
    with CudaDevice(0) as opened:
        yield opened


@pytest.fixture(autouse=True)
def nothing_failed_on_the_way() -> Iterator[None]:
    failures.clear()
    yield
    assert failures == []


Load = Callable[..., TensorRtModule]


@pytest.fixture(params=["tensorrt-rtx", "tensorrt"])
def flavour(request: pytest.FixtureRequest) -> Flavour:
    return software_flavour(request.param)


@pytest.fixture
def rtx() -> Flavour:
    return software_flavour()


def engine_of(bundle: Path, name: str, flavour: Flavour) -> tuple[bytes, Any]:
    opened = Bundle.open(bundle)
    record = opened.manifest.modules[name]
    request = Request(opened.file(record.file), name, record.inputs, record.outputs, (CURRENT,))
    return build_engine(request, flavour=flavour), record


@pytest.fixture
def load(device: CudaDevice, tiny_bundle: Path) -> Iterator[Load]:
    """Loads a module of the tiny bundle; what the test forgets to close is closed."""
    made: list[TensorRtModule] = []

    def loaded(name: str, flavour: Flavour, **changes: Any) -> TensorRtModule:
        engine, record = engine_of(tiny_bundle, name, flavour)
        options = {
            "engine": engine,
            "name": name,
            "inputs": record.inputs,
            "outputs": record.outputs,
            "flavour": flavour,
            "device": device,
            **changes,
        }
        made.append(TensorRtModule(options.pop("engine"), **options))
        return made[-1]

    yield loaded
    for module in made:
        module.close()


def noise(specs: tuple[TensorSpec, ...], seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {spec.name: rng.standard_normal(spec.shape).astype(spec.dtype) for spec in specs}


def buffers(device: CudaDevice, module: Any, inputs: dict[str, Array]) -> dict[str, DeviceArray]:
    return {name: device.upload(array) for name, array in inputs.items()} | {
        spec.name: device.allocate(spec) for spec in module.outputs
    }


def expected(bundle: Path, name: str, inputs: dict[str, Array]) -> dict[str, Array]:
    """What ONNX Runtime makes of them on the CPU."""
    opened = Bundle.open(bundle)
    record = opened.manifest.modules[name]
    module = OnnxRuntimeModule(
        opened.file(record.file), name=name, inputs=record.inputs, outputs=record.outputs, threads=1, spinning=False
    )
    outputs = {spec.name: np.empty(spec.shape, spec.dtype) for spec in record.outputs}
    module.enqueue({**inputs, **outputs}, InlineStream()).wait()
    return outputs


@pytest.mark.parametrize("name", ["generator", "producer", "plain", "warp"])
def test_an_engine_gives_what_its_graph_gives(tiny_bundle, device, load, flavour, name):
    module = load(name, flavour)
    inputs = noise(module.inputs)
    bindings = buffers(device, module, inputs)
    module.enqueue(bindings, device.stream("s")).wait()
    for output, array in expected(tiny_bundle, name, inputs).items():
        # The double runs the same executor with the same options, so nothing may differ.
        np.testing.assert_array_equal(device.download(bindings[output]), array)


def test_work_is_issued_and_not_waited_for(software_cuda, device, load, rtx):
    module, stream = load("warp", rtx), device.stream("s")
    bindings = buffers(device, module, noise(module.inputs))
    with software_cuda.held(stream):
        event = module.enqueue(bindings, stream)
        assert not event.done
    event.wait()
    assert device.download(bindings["image"]).any()


def test_a_run_takes_nothing_from_the_device(software_cuda, device, load, rtx):
    module, stream = load("warp", rtx), device.stream("s")
    several = [buffers(device, module, noise(module.inputs, seed)) for seed in range(2)]
    module.enqueue(several[0], stream).wait()
    taken = ("allocations", "streams_created", "events_created", "copies")
    before = {what: software_cuda.count(what) for what in taken}
    for run in range(20):
        module.enqueue(several[run % 2], stream).wait()
    assert {what: software_cuda.count(what) for what in taken} == before


def test_a_captured_run_is_replayed_on_the_buffers_it_was_captured_with(tiny_bundle, device, load, flavour):
    module, stream = load("warp", flavour), device.stream("s")
    first, other = (buffers(device, module, noise(module.inputs, seed)) for seed in range(2))
    module.enqueue(first, stream).wait()
    assert module.capturable
    graph = CudaGraph.capture(stream, lambda: module.launch(first, stream), name="warp")
    # Bound elsewhere in the meantime, as by another slot's graph.
    module.enqueue(other, stream).wait()
    again = noise(module.inputs, seed=7)
    for name, array in again.items():
        fresh = device.upload(array)
        stream.call(lambda source=fresh, to=first[name]: copy(source, to))
    graph.launch(stream)
    stream.synchronize()
    np.testing.assert_array_equal(device.download(first["image"]), expected(tiny_bundle, "warp", again)["image"])
    graph.close()


def copy(source: DeviceArray, target: DeviceArray) -> None:
    from warpcache.kernels.driver import check, load

    check(load().cuMemcpyDtoD(target.pointer, source.pointer, source.size_bytes), "copying")
    check(load().cuStreamSynchronize(0), "copying")  # on the default stream, which ours do not wait for


@pytest.mark.parametrize("ran", [False, True])
def test_the_library_is_asked_whether_it_can_be_captured(device, load, rtx, ran):
    module, stream = load("warp", rtx), device.stream("s")
    if ran:
        bindings = buffers(device, module, noise(module.inputs))
        module.enqueue(bindings, stream).wait()
    assert module.capturable
    with failing(uncapturable=True):
        assert not module.capturable


def test_addresses_are_set_only_where_they_changed(device, load, rtx, monkeypatch):
    module, stream = load("warp", rtx), device.stream("s")
    calls: list[str] = []
    real = IExecutionContext.set_tensor_address
    monkeypatch.setattr(
        IExecutionContext,
        "set_tensor_address",
        lambda self, name, memory: calls.append(name) or real(self, name, memory),
    )
    bindings = buffers(device, module, noise(module.inputs))
    module.enqueue(bindings, stream).wait()
    assert sorted(calls) == ["cache.y_s", "image", "x"]
    calls.clear()
    module.enqueue(bindings, stream).wait()
    assert calls == []
    changed = {**bindings, "x": device.allocate(X)}
    module.enqueue(changed, stream).wait()
    assert calls == ["x"]


def test_runs_on_two_streams_take_turns_on_the_gpu(tiny_bundle, software_cuda, device, load, rtx):
    """They share activation memory, and the double notices when two runs are in it at once."""
    module = load("warp", rtx)
    one, two = device.stream("one"), device.stream("two")
    first, second = (buffers(device, module, noise(module.inputs, seed)) for seed in range(2))
    with software_cuda.held(one):
        module.enqueue(first, one)
        event = module.enqueue(second, two)
        assert not event.done
    event.wait()
    # In order: the first run had ended when the second did.
    assert software_cuda.pending(one) == 0
    want = expected(tiny_bundle, "warp", noise(module.inputs, 1))["image"]
    np.testing.assert_array_equal(device.download(second["image"]), want)


def test_a_stream_that_was_closed_is_followed_by_another(tiny_bundle, device, load, rtx):
    module, closed = load("warp", rtx), device.stream("closed")
    bindings = buffers(device, module, noise(module.inputs))
    module.enqueue(bindings, closed).wait()
    closed.close()
    module.enqueue(bindings, device.stream("next")).wait()
    # And one that nobody refers to any more.
    del closed
    module.enqueue(bindings, device.stream("last")).wait()
    want = expected(tiny_bundle, "warp", noise(module.inputs))["image"]
    np.testing.assert_array_equal(device.download(bindings["image"]), want)


def test_threads_share_a_module(tiny_bundle, device, load, rtx):
    module = load("producer", rtx)
    wanted = [expected(tiny_bundle, "producer", noise(module.inputs, seed)) for seed in range(3)]
    wrong: list[str] = []

    def run(seed: int) -> None:
        stream = device.stream(f"s{seed}")
        device.context.make_current()
        bindings = buffers(device, module, noise(module.inputs, seed))
        for _ in range(5):
            module.enqueue(bindings, stream)
            stream.synchronize()
            for name, array in wanted[seed].items():
                if not np.array_equal(device.download(bindings[name]), array):
                    wrong.append(f"{name} of thread {seed}")

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# Bindings


def strided(device: CudaDevice) -> DeviceArray:
    wide = device.allocate(TensorSpec("wide", "float32", (1, 3, 16, 32)))
    return DeviceArray(wide.pointer, X.shape, X.dtype, device=0, strides=(1536, 512, 32, 2), owner=wide)


def shifted(device: CudaDevice) -> DeviceArray:
    wide = device.allocate(TensorSpec("wide", "float32", (1, 3, 16, 17)))
    return DeviceArray(wide.pointer + 4, X.shape, X.dtype, device=0, owner=wide)


WRONG: dict[str, tuple[Callable[[CudaDevice], Any], str]] = {
    "host array": (
        lambda device: np.zeros(X.shape, X.dtype),
        r"input 'x' is of type ndarray, expected an array on cuda:0",
    ),
    "dtype": (
        lambda device: device.allocate(TensorSpec("x", "float16", X.shape)),
        r"input 'x' has dtype float16, expected float32; convert it first",
    ),
    "shape": (
        lambda device: device.allocate(TensorSpec("x", "float32", (1, 3, 8, 16))),
        r"input 'x' has shape \(1, 3, 8, 16\), expected \(1, 3, 16, 16\)",
    ),
    "device": (
        lambda device: DeviceArray(256, X.shape, X.dtype, device=1),
        r"input 'x' is on cuda:1, expected cuda:0; move it there first",
    ),
    "layout": (strided, r"input 'x' is not C-contiguous; pass a copy of it"),
    "alignment": (shifted, r"input 'x' does not begin at a multiple of 256 bytes; pass a copy of it"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_binding_that_does_not_fit_is_refused_and_nothing_runs(software_cuda, device, load, rtx, what):
    make, message = WRONG[what]
    module, stream = load("warp", rtx), device.stream("s")
    bindings = buffers(device, module, noise(module.inputs))
    before = software_cuda.count("host_functions")
    for call in (module.enqueue, module.launch):
        with pytest.raises(InputError, match=rf"^module 'warp': {message}"):
            call({**bindings, "x": make(device)}, stream)
    stream.synchronize()
    assert software_cuda.count("host_functions") == before


def test_missing_and_unknown_bindings_are_named(device, load, rtx):
    module, stream = load("warp", rtx), device.stream("s")
    bindings = buffers(device, module, noise(module.inputs))
    without = {name: array for name, array in bindings.items() if name != "x"}
    for wrong in (without | {"z": bindings["x"]}, without | {"x": None, "z": bindings["x"]}):
        with pytest.raises(
            InputError, match=r"^module 'warp' needs one array for every .*; missing: 'x'; unknown: 'z'$"
        ):
            module.enqueue(wrong, stream)
    with pytest.raises(InputError, match=r"missing: 'x'; unknown: none$"):
        module.enqueue(without, stream)


def test_an_output_must_have_memory_of_its_own(device, load, rtx):
    module, stream = load("warp", rtx), device.stream("s")
    bindings = buffers(device, module, noise(module.inputs))
    shared = DeviceArray(bindings["x"].pointer + 256, IMAGE.shape, IMAGE.dtype, device=0)
    with pytest.raises(InputError, match=r"^module 'warp': input 'x' and output 'image' share memory; give every outp"):
        module.launch({**bindings, "image": shared}, stream)
    # Two inputs may be the same array.
    module.enqueue({**bindings, "cache.y_s": bindings["x"]}, stream).wait()


def test_a_refused_address_leaves_nothing_half_bound(tiny_bundle, device, load, rtx):
    module, stream = load("warp", rtx), device.stream("s")
    old = buffers(device, module, noise(module.inputs))
    module.enqueue(old, stream).wait()
    new = buffers(device, module, noise(module.inputs, 1))
    with (
        failing(refuses_address="image"),
        pytest.raises(BackendError, match=r"^module 'warp': TensorRT-RTX refused the buffer of 'image'; build"),
    ):
        module.launch(new, stream)
    module.enqueue(old, stream).wait()
    want = expected(tiny_bundle, "warp", noise(module.inputs))["image"]
    np.testing.assert_array_equal(device.download(old["image"]), want)


def test_a_run_that_is_refused_says_what_the_library_said(device, load, flavour):
    module, stream = load("warp", flavour), device.stream("s")
    bindings = buffers(device, module, noise(module.inputs))
    with failing(refuses_run="an illegal thing"):
        message = rf"^module 'warp' failed in {flavour.title}: IExecutionContext::enqueueV3: an illegal thing"
        with pytest.raises(BackendError, match=message):
            module.launch(bindings, stream)
        error = module.enqueue(bindings, stream).error
        assert isinstance(error, BackendError)
    module.enqueue(bindings, stream).wait()


# Engines that do not serve


def test_an_engine_of_the_other_flavour_is_refused(tiny_bundle, load, flavour, software_cuda):
    other = software_flavour("tensorrt" if flavour.name == "tensorrt-rtx" else "tensorrt-rtx")
    engine, _ = engine_of(tiny_bundle, "warp", other)
    with pytest.raises(
        BackendError,
        match=rf"^the engine of module 'warp' is none of {flavour.title}, perhaps one of {other.title}; build it for",
    ):
        load("warp", flavour, engine=engine)


def test_a_damaged_engine_is_refused(tiny_bundle, load, flavour, software_cuda):
    engine, _ = engine_of(tiny_bundle, "warp", flavour)
    damaged = engine[:-1] + bytes([engine[-1] ^ 1])
    with pytest.raises(BackendError, match=r"^the engine of module 'warp' .*(damaged, or no engine|Serialization)"):
        load("warp", flavour, engine=damaged)
    with pytest.raises(BackendError, match=r"^the engine of module 'warp'"):
        load("warp", flavour, engine=b"")


def test_an_engine_of_another_version_is_refused(tiny_bundle, load, flavour, monkeypatch, software_cuda):
    monkeypatch.setattr(flavour.module.Builder, "_version", "1.6.0.0")
    with pytest.raises(BackendError, match=r"^the engine of module 'warp' .*(it is of another version|not compatible)"):
        load("warp", flavour)


def test_an_engine_for_another_gpu_is_refused(tiny_bundle, load, rtx, software_cuda):
    engine, _ = engine_of(tiny_bundle, "warp", rtx)
    software_cuda.configure(compute_major=8, compute_minor=9)
    with (
        CudaDevice(1) as other,
        pytest.raises(
            BackendError,
            match=r"^the engine of module 'warp' does not serve: it was not built for cuda:1 \(sm_89\); build it with "
            r"the target sm_89$",
        ),
    ):
        load("warp", rtx, engine=engine, device=other)


@pytest.mark.parametrize(
    ("bit", "message"),
    [
        ("VERSION_MISMATCH", r"it is of another version than TensorRT-RTX 1.7.0.0, which is here; build it again$"),
        ("UNSUPPORTED_CC", r"it was not built for cuda:0 \(sm_90\); build it with the target sm_90$"),
        ("OLD_CUDA_DRIVER", r"the NVIDIA driver is too old for it; update the driver$"),
        ("OLD_CUDA_RUNTIME", r"the CUDA runtime is too old for it; install TensorRT-RTX again$"),
        ("INSUFFICIENT_GPU_MEMORY", r"cuda:0 has too little memory for it, \d+ of \d+ MiB are free; close other prog"),
        ("MALFORMED_ENGINE", r"it is damaged, or no engine; build it again$"),
        ("CUDA_ERROR", r"CUDA does not work here; `warpcache doctor` says what is wrong$"),
    ],
)
def test_every_reason_against_an_engine_is_a_sentence(load, rtx, bit, message):
    with (
        failing(diagnostics=int(getattr(rtx.module.EngineInvalidityDiagnostics, bit))),
        pytest.raises(BackendError, match=rf"^the engine of module 'warp' does not serve: {message}"),
    ):
        load("warp", rtx)


def test_several_reasons_against_an_engine_are_all_said(load, rtx):
    with failing(diagnostics=1 | 4), pytest.raises(BackendError, match=r"build it again and the NVIDIA driver is too "):
        load("warp", rtx)


def test_an_engine_that_serves_less_than_well_is_a_warning(load, rtx, caplog):
    with failing(suboptimal=True):
        load("warp", rtx)
    assert "the engine of module 'warp' serves cuda:0, but not at its best" in caplog.text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"refuses_engine": "out of\n memory"},
            r"^the engine of module 'warp' \(0.0 MiB\) is refused by TensorRT.* on cuda:0, which has \d+ of \d+ MiB "
            r"free: IRuntime::deserializeCudaEngine: out of memory; build it again on this machine$",
        ),
        ({"refuses_context": "no"}, r"^module 'warp': TensorRT.* makes no execution context: createExecutionContext: "),
        ({"no_runtime": True}, r"^TensorRT.* gives no runtime \(pybind11::init\(\): .*\); `warpcache doctor` says wha"),
    ],
)
def test_what_the_library_refuses_is_said(load, flavour, wrong, message):
    with failing(**wrong), pytest.raises(BackendError, match=message):
        load("warp", flavour)


def test_no_room_for_activations_says_how_much_was_asked(load, flavour):
    with (
        failing(activation_bytes=1 << 40),
        pytest.raises(
            DeviceError, match=r"^cuda:0 has no room for the activations of module 'warp': 1048576.0 MiB were asked for"
        ),
    ):
        load("warp", flavour)


def test_an_engine_of_another_module_is_refused(tiny_bundle, load, flavour, software_cuda):
    engine, _ = engine_of(tiny_bundle, "plain", flavour)
    with pytest.raises(
        BackendError,
        match=r"^the engine of module 'warp': the graph's inputs are 'cache.h', but 'cache.y_s', 'x' were announced; i",
    ):
        load("warp", flavour, engine=engine)


# Shapes


@pytest.fixture
def dynamic(tmp_path: Path, device: CudaDevice) -> Callable[..., TensorRtModule]:
    """Loads y = relu(x), built for 1 to 4 rows."""
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "relu",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
    )
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)

    def loaded(flavour: Flavour, rows: int, out_rows: int | None = None) -> TensorRtModule:
        options = BuildOptions(profiles=(ShapeProfile("x", (1, 3), (2, 3), (4, 3)),))
        x, y = TensorSpec("x", "float32", (2, 3)), TensorSpec("y", "float32", (2, 3))
        engine = build_engine(Request(path, "m", (x,), (y,), (CURRENT,), options), flavour=flavour)
        return TensorRtModule(
            engine,
            name="m",
            inputs=(TensorSpec("x", "float32", (rows, 3)),),
            outputs=(TensorSpec("y", "float32", (rows if out_rows is None else out_rows, 3)),),
            flavour=flavour,
            device=device,
        )

    return loaded


@pytest.mark.parametrize("rows", [1, 4])
def test_an_engine_with_open_extents_runs_at_those_of_the_specs(dynamic, device, flavour, rows):
    module = dynamic(flavour, rows)
    inputs = noise(module.inputs)
    bindings = buffers(device, module, inputs)
    module.enqueue(bindings, device.stream("s")).wait()
    np.testing.assert_array_equal(device.download(bindings["y"]), np.maximum(inputs["x"], 0))
    module.close()


def test_extents_beyond_the_profile_are_refused(dynamic, flavour):
    with pytest.raises(
        BackendError, match=r"^module 'm': the engine does not serve input 'x' of shape \[5, 3\]: setInputShape: .*; bu"
    ):
        dynamic(flavour, 5)


def test_an_output_of_another_extent_is_refused(dynamic, flavour):
    with pytest.raises(
        BackendError, match=r"^module 'm': for these inputs the engine's output 'y' is \[2, 3\], but \[3, 3\] was annou"
    ):
        dynamic(flavour, 2, 3)


# The runtime cache


def test_compiled_kernels_are_kept_between_runs(device, load, rtx, tmp_path, caplog):
    path = tmp_path / "engines" / "warp.runtime"
    module, stream = load("warp", rtx, runtime_cache=path), device.stream("s")
    bindings = buffers(device, module, noise(module.inputs))
    module.enqueue(bindings, stream).wait()
    module.save_runtime_cache()
    saved = path.read_bytes()
    assert b'"kernels": ["warp"]' in saved
    path.unlink()
    module.close()
    # Unchanged since it was saved, so it is not written again.
    assert not path.exists()
    path.write_bytes(saved)
    # Nothing ran: what comes out is what was read.
    again = load("warp", rtx, runtime_cache=path)
    path.unlink()
    again._cache_file._held = None
    again.close()
    assert path.read_bytes() == saved
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_runtime_cache_of_another_version_is_removed(device, load, rtx, tmp_path, caplog, monkeypatch):
    path = tmp_path / "warp.runtime"
    load("warp", rtx, runtime_cache=path).close()
    monkeypatch.setattr(rtx.module.IRuntimeCache, "deserialize", lambda self, blob: False)
    module = load("warp", rtx, runtime_cache=path)
    assert not path.exists()
    assert f"the runtime cache {path} is of another GPU, driver or version; it is removed" in caplog.text
    bindings = buffers(device, module, noise(module.inputs))
    module.enqueue(bindings, device.stream("s")).wait()
    module.close()
    assert path.exists()


def test_full_tensorrt_keeps_no_runtime_cache(load, tmp_path, software_cuda):
    path = tmp_path / "warp.runtime"
    load("warp", software_flavour("tensorrt"), runtime_cache=path).close()
    assert not path.exists()


# The end


def test_a_closed_module_refuses_and_gives_its_memory_back(software_cuda, device, load, flavour):
    before = software_cuda.live()
    module, stream = load("warp", flavour), device.stream("s")
    assert software_cuda.live()["device_bytes"] > before["device_bytes"]
    bindings = buffers(device, module, noise(module.inputs))
    module.enqueue(bindings, stream).wait()
    module.close()
    module.close()
    with pytest.raises(ClosedError, match=r"^module 'warp' is closed; load it again"):
        module.launch(bindings, stream)
    with pytest.raises(ClosedError, match=r"^module 'warp' is closed"):
        _ = module.capturable
    assert isinstance(module.enqueue(bindings, stream).error, ClosedError)
    del bindings
    assert "device_bytes" not in software_cuda.left_since(before)


def test_a_load_that_fails_gives_its_memory_back(software_cuda, load, flavour, monkeypatch):
    before = software_cuda.live()
    monkeypatch.setattr(IExecutionContext, "set_device_memory", lambda *_: (_ for _ in ()).throw(RuntimeError("no")))
    with pytest.raises(RuntimeError, match=r"^no$"):
        load("warp", flavour)
    assert not software_cuda.left_since(before)


# On hardware


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["tensorrt-rtx", "tensorrt"])
def test_the_real_library_runs_every_module_and_its_graph(tiny_bundle, name, tmp_path):
    try:
        device = CudaDevice(0)
    except DeviceError as exc:
        pytest.skip(f"no GPU: {exc}")
    if device.context.name.startswith("Software"):
        pytest.skip("the driver in software runs no engine of the real library")
    try:
        flavour = Flavour.load(name)
        targets = flavour.resolve((CURRENT,))
    except BackendError as exc:
        pytest.skip(str(exc))
    bundle = Bundle.open(tiny_bundle)
    with device:
        stream = device.stream("s")
        for module_name, record in bundle.manifest.modules.items():
            request = Request(bundle.file(record.file), module_name, record.inputs, record.outputs, targets)
            module = TensorRtModule(
                build_engine_isolated(request, flavour=flavour),
                name=module_name,
                inputs=record.inputs,
                outputs=record.outputs,
                flavour=flavour,
                device=device,
                runtime_cache=tmp_path / f"{module_name}.runtime",
            )
            inputs = noise(record.inputs)
            bindings = buffers(device, module, inputs)
            module.enqueue(bindings, stream).wait()
            wanted = expected(tiny_bundle, module_name, inputs)
            check_close(device, bindings, wanted)
            if module.capturable:
                run_graph(device, stream, module, bindings, wanted)
            module.close()


def check_close(device: CudaDevice, bindings: dict[str, DeviceArray], wanted: dict[str, Array]) -> None:
    for name, array in wanted.items():
        # Sums of at most 72 products of order 1 in float32, in another order: 72 * 2**-24 * 10 is 4e-5.
        np.testing.assert_allclose(device.download(bindings[name]), array, rtol=0, atol=5e-5)


def run_graph(
    device: CudaDevice,
    stream: CudaStream,
    module: TensorRtModule,
    bindings: dict[str, DeviceArray],
    wanted: dict[str, Array],
) -> None:
    graph = CudaGraph.capture(stream, lambda: module.launch(bindings, stream), name=module.name)
    for name in wanted:
        copy(device.allocate(next(spec for spec in module.outputs if spec.name == name)), bindings[name])
    graph.launch(stream)
    stream.synchronize()
    check_close(device, bindings, wanted)
    graph.close()

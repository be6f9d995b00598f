"""ONNX Runtime modules against a plain NumPy reference, and what they refuse."""

from __future__ import annotations

import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import load_file

from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.device.module import Module
from warpcache.engine.device.stream import CpuStream, InlineStream
from warpcache.engine.errors import BackendError, ClosedError, InputError
from warpcache.engine.onnxruntime.cpu import OnnxRuntimeModule
from warpcache.engine.spec import TensorSpec

INLINE = InlineStream()


def load(bundle: Path, name: str, *, threads: int = 1) -> OnnxRuntimeModule:
    opened = Bundle.open(bundle)
    record = opened.manifest.modules[name]
    return OnnxRuntimeModule(
        opened.file(record.file),
        name=name,
        inputs=record.inputs,
        outputs=record.outputs,
        threads=threads,
        spinning=False,
    )


def empty(module: Module) -> dict[str, np.ndarray]:
    # Filled with NaN: a value that the graph did not write cannot pass for a result.
    return {spec.name: np.full(spec.shape, np.nan, spec.dtype) for spec in module.outputs}


def frame(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (1, 3, 16, 16)).astype(np.float32)


def convolve(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """3x3, zero padding 1, in float64: [1, C, H, W] -> [1, K, H, W]."""
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.einsum("nchwij,kcij->nkhw", windows, weight.astype(np.float64)) + bias[None, :, None, None]


def reference(bundle: Path, x: np.ndarray) -> np.ndarray:
    weights = load_file(bundle / "weights.safetensors")
    hidden = np.maximum(convolve(x, weights["conv1.weight"], weights["conv1.bias"]), 0)
    return np.tanh(convolve(hidden, weights["conv2.weight"], weights["conv2.bias"]))


@pytest.mark.parametrize("threads", [1, 2])
def test_the_generator_computes_what_numpy_computes(tiny_bundle, threads):
    module = load(tiny_bundle, "generator", threads=threads)
    out = empty(module)
    x = frame(0)
    assert module.enqueue({"x": x, **out}, INLINE).wait()
    # Two layers of sums of 27 and 72 products, each rounded to float32: at most (27 + 72) * eps times the size of the
    # summands, which is below 4 here; tanh does not enlarge it.
    np.testing.assert_allclose(out["image"], reference(tiny_bundle, x), rtol=0, atol=99 * np.finfo(np.float32).eps * 4)


def test_the_reference_can_tell_a_wrong_generator(tiny_bundle):
    x = frame(0)
    assert np.abs(reference(tiny_bundle, x) - reference(tiny_bundle, np.roll(x, 1, axis=-1))).max() > 0.1


def test_producer_then_plain_is_the_generator_bit_for_bit(tiny_bundle):
    generator, producer, plain = (load(tiny_bundle, name) for name in ("generator", "producer", "plain"))
    x, whole, cache, image = frame(1), empty(generator), empty(producer), empty(plain)
    generator.enqueue({"x": x, **whole}, INLINE).wait()
    producer.enqueue({"x": x, **cache}, INLINE).wait()
    plain.enqueue({"cache.h": cache["cache.h"], **image}, INLINE).wait()
    assert np.array_equal(image["image"], whole["image"])
    assert np.array_equal(cache["cache.y_s"], whole["image"])


def test_a_module_satisfies_the_contract(tiny_bundle):
    module: Module = load(tiny_bundle, "warp")
    assert isinstance(module, Module)
    assert (module.name, [spec.name for spec in module.inputs]) == ("warp", ["x", "cache.y_s"])


def test_results_are_written_into_the_callers_buffers_whichever_they_are(tiny_bundle):
    """Alternate between buffers: a stale binding would read or write the previous call's."""
    module = load(tiny_bundle, "warp")
    rng = np.random.default_rng(2)
    slots = [rng.uniform(-1, 1, (1, 3, 16, 16)).astype(np.float32) for _ in range(3)]
    kept = []
    for index in range(12):
        x, out = frame(index), empty(module)
        slot = slots[index // 2 % 3]
        module.enqueue({"x": x, "cache.y_s": slot, **out}, INLINE).wait()
        kept.append((out["image"], slot + np.float32(0.1) * x))
    for image, expected in kept:
        # One product and one sum, or both fused: one rounding apart at most, of numbers below 2.
        np.testing.assert_allclose(image, expected, rtol=0, atol=2 * np.finfo(np.float32).eps)


def test_the_content_of_a_bound_buffer_may_change(tiny_bundle):
    module = load(tiny_bundle, "warp")
    x, cache, out = frame(0), np.zeros((1, 3, 16, 16), np.float32), empty(module)
    bindings = {"x": x, "cache.y_s": cache, **out}
    for value in (0.0, 0.25, -0.5):
        cache[:] = value
        module.enqueue(bindings, INLINE).wait()
        np.testing.assert_allclose(out["image"], value + 0.1 * x, rtol=0, atol=2 * np.finfo(np.float32).eps)


def test_work_is_ordered_on_a_stream(tiny_bundle):
    with CpuStream("modules") as stream:
        producer = stream.call(lambda: load(tiny_bundle, "producer"))
        plain = stream.call(lambda: load(tiny_bundle, "plain"))
        x, cache, image = frame(3), empty(producer), empty(plain)
        producer.enqueue({"x": x, **cache}, stream)
        # Enqueued before the producer is known to be done: the order of the stream is what makes this right.
        plain.enqueue({"cache.h": cache["cache.h"], **image}, stream).wait()
        assert np.array_equal(image["image"], cache["cache.y_s"])


class WatchedLock:
    """A lock that tells when somebody else comes for it while it is held."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.contended = threading.Event()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self.contended.set()
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_two_threads_take_turns_on_one_module(tiny_bundle):
    """While the first call is between binding and running, a second one arrives with other buffers and has to wait."""
    module = load(tiny_bundle, "generator")
    lock = WatchedLock()
    module._lock = lock
    session = module._session
    first, second = ({"x": frame(seed), **empty(module)} for seed in (0, 1))
    second_call = threading.Thread(target=lambda: module.enqueue(second, InlineStream()).wait())

    class Meeting:
        def run_with_iobinding(self, binding: object) -> None:
            if second_call.ident is None:
                second_call.start()
                assert lock.contended.wait(10), "the second call did not wait for its turn"
            session.run_with_iobinding(binding)

    module._session = Meeting()
    module.enqueue(first, INLINE).wait()
    second_call.join()
    for bindings in (first, second):
        expected = reference(tiny_bundle, bindings["x"])
        np.testing.assert_allclose(bindings["image"], expected, rtol=0, atol=99 * np.finfo(np.float32).eps * 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": None}, "^module 'warp' needs one array for every input and output; missing: 'x'; unknown: none"),
        ({"y": frame(0)}, "^module 'warp' needs one array for every input and output; missing: none; unknown: 'y'"),
        ({"x": frame(0).astype(np.float64)}, "^module 'warp': input 'x' has dtype float64, expected float32"),
        ({"x": frame(0).astype(">f4")}, "^module 'warp': input 'x' has dtype >f4, expected float32"),
        ({"x": frame(0)[:, :, :8]}, r"^module 'warp': input 'x' has shape \(1, 3, 8, 16\), expected \(1, 3, 16, 16\)"),
        ({"x": frame(0)[..., ::-1]}, "^module 'warp': input 'x' is not C-contiguous and aligned"),
        ({"x": frame(0).tolist()}, "^module 'warp': input 'x' is of type list, expected a NumPy array"),
        ({"image": np.zeros((1, 3, 16, 16), np.float16)}, "^module 'warp': output 'image' has dtype float16"),
    ],
)
def test_wrong_bindings_are_refused_before_anything_is_queued(tiny_bundle, changes, message):
    module = load(tiny_bundle, "warp")
    bindings = {"x": frame(0), "cache.y_s": frame(1), **empty(module)} | changes
    bindings = {name: array for name, array in bindings.items() if array is not None}
    with pytest.raises(InputError, match=message):
        module.enqueue(bindings, INLINE)


def test_a_name_swapped_for_another_is_named(tiny_bundle):
    module = load(tiny_bundle, "warp")
    with pytest.raises(InputError, match=r"missing: 'cache\.y_s'; unknown: 'cache\.y'"):
        module.enqueue({"x": frame(0), "cache.y": frame(1), **empty(module)}, INLINE)


def test_a_read_only_output_is_refused(tiny_bundle):
    module = load(tiny_bundle, "warp")
    image = np.zeros((1, 3, 16, 16), np.float32)
    image.flags.writeable = False
    with pytest.raises(InputError, match=r"^module 'warp': output 'image' is read-only"):
        module.enqueue({"x": frame(0), "cache.y_s": frame(1), "image": image}, INLINE)


def test_a_misaligned_input_is_refused(tiny_bundle):
    module = load(tiny_bundle, "warp")
    raw = np.zeros(3 * 16 * 16 * 4 + 1, np.uint8)
    x = raw[1:].view(np.float32).reshape(1, 3, 16, 16)
    with pytest.raises(InputError, match=r"^module 'warp': input 'x' is not C-contiguous and aligned"):
        module.enqueue({"x": x, "cache.y_s": frame(1), **empty(module)}, INLINE)


def test_an_output_that_shares_memory_is_refused_and_the_module_goes_on(tiny_bundle):
    module = load(tiny_bundle, "warp")
    x, cache, out = frame(0), frame(1), empty(module)
    before = cache.copy()
    for _ in range(2):
        with pytest.raises(InputError, match=r"^module 'warp': .*'cache.y_s' and .*'image' share memory|'image' and"):
            module.enqueue({"x": x, "cache.y_s": cache, "image": cache}, INLINE).wait()
    assert np.array_equal(cache, before)
    module.enqueue({"x": x, "cache.y_s": cache, **out}, INLINE).wait()
    assert np.isfinite(out["image"]).all()


def test_two_inputs_may_share_memory(tiny_bundle):
    module = load(tiny_bundle, "warp")
    x, out = frame(0), empty(module)
    module.enqueue({"x": x, "cache.y_s": x, **out}, INLINE).wait()
    np.testing.assert_allclose(out["image"], 1.1 * x, rtol=0, atol=2 * np.finfo(np.float32).eps)


def test_close_is_safe_twice_and_ends_the_module(tiny_bundle):
    module = load(tiny_bundle, "warp")
    x, out = frame(0), empty(module)
    module.close()
    module.close()
    with pytest.raises(ClosedError, match=r"^module 'warp' is closed"):
        module.enqueue({"x": x, "cache.y_s": x, **out}, INLINE)


def test_work_that_was_queued_before_close_says_so(tiny_bundle):
    module = load(tiny_bundle, "warp")
    latch = threading.Event()
    with CpuStream("late") as stream:
        stream.submit(latch.wait)
        event = module.enqueue({"x": frame(0), "cache.y_s": frame(1), **empty(module)}, stream)
        module.close()
        latch.set()
        with pytest.raises(ClosedError, match=r"^module 'warp' is closed"):
            event.wait()


def test_a_closed_module_keeps_no_buffer(tiny_bundle):
    module = load(tiny_bundle, "warp")
    x, out = frame(0), empty(module)
    module.enqueue({"x": x, "cache.y_s": x, **out}, INLINE).wait()
    held = sys.getrefcount(x)
    module.close()
    assert sys.getrefcount(x) < held


def save_model(path: Path, nodes, inputs, outputs) -> Path:
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("dtype", ["bool", "int8", "int32", "int64", "uint8", "float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(), (1, 3)])
def test_dtypes_and_ranks_pass_through(tmp_path, dtype, shape):
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    path = save_model(
        tmp_path / "m.onnx",
        [helper.make_node("Identity", ["a"], ["b"])],
        [helper.make_tensor_value_info("a", kind, shape)],
        [helper.make_tensor_value_info("b", kind, shape)],
    )
    specs = [(TensorSpec(name, dtype, shape),) for name in "ab"]
    module = OnnxRuntimeModule(path, name="pass", inputs=specs[0], outputs=specs[1], threads=1, spinning=False)
    a, b = np.ones(shape, dtype), np.zeros(shape, dtype)
    module.enqueue({"a": a, "b": b}, INLINE).wait()
    assert np.array_equal(a, b)


def test_a_failure_inside_the_graph_names_the_module(tmp_path):
    table = helper.make_tensor("table", TensorProto.FLOAT, [2], [1.0, 2.0])
    path = save_model(
        tmp_path / "m.onnx",
        [helper.make_node("Constant", [], ["t"], value=table), helper.make_node("Gather", ["t", "i"], ["y"])],
        [helper.make_tensor_value_info("i", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    module = OnnxRuntimeModule(
        path,
        name="lookup",
        inputs=(TensorSpec("i", "int64", (1,)),),
        outputs=(TensorSpec("y", "float32", (1,)),),
        threads=1,
        spinning=False,
    )
    y = np.zeros(1, np.float32)
    event = module.enqueue({"i": np.array([5]), "y": y}, INLINE)
    with pytest.raises(BackendError, match=r"^module 'lookup' failed in ONNX Runtime: ") as caught:
        event.wait()
    assert caught.value.__cause__ is not None
    module.enqueue({"i": np.array([1]), "y": y}, INLINE).wait()
    assert y[0] == 2


def open_generator(bundle: Path, **changes) -> OnnxRuntimeModule:
    x, image = TensorSpec("x", "float32", (1, 3, 16, 16)), TensorSpec("image", "float32", (1, 3, 16, 16))
    options = {"name": "generator", "inputs": (x,), "outputs": (image,), "threads": 1, "spinning": False} | changes
    return OnnxRuntimeModule(bundle / "generator.onnx", **options)


@pytest.mark.parametrize(
    "changes",
    [
        {"inputs": (TensorSpec("z", "float32", (1, 3, 16, 16)),)},
        {"inputs": (TensorSpec("x", "float64", (1, 3, 16, 16)),)},
        {"inputs": (TensorSpec("x", "float32", (1, 3, 16, 32)),)},
        {"inputs": ()},
    ],
)
def test_a_graph_that_takes_something_else_is_refused(tiny_bundle, changes):
    with pytest.raises(
        BackendError, match=r"^module 'generator': the graph's inputs are 'x' \(float32, \[1, 3, 16, 16"
    ):
        open_generator(tiny_bundle, **changes)


def test_a_graph_that_gives_something_else_is_refused(tiny_bundle):
    with pytest.raises(BackendError, match=r"^module 'generator': the graph's outputs are 'image'"):
        open_generator(tiny_bundle, outputs=(TensorSpec("mask", "float32", (1, 3, 16, 16)),))


def test_no_threads_are_refused(tiny_bundle):
    with pytest.raises(InputError, match=r"^module 'generator' was given 0 threads"):
        open_generator(tiny_bundle, threads=0)


def test_what_is_no_model_is_refused_in_one_line(tmp_path):
    path = tmp_path / "generator.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(
        BackendError, match=r"^module 'generator' \(generator.onnx\) was refused by ONNX Runtime"
    ) as caught:
        open_generator(tmp_path)
    assert "\n" not in str(caught.value)


def test_without_onnx_runtime_the_first_use_says_which_to_install(tiny_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError) as caught:
        open_generator(tiny_bundle)
    assert str(caught.value) == (
        'no ONNX Runtime is installed; install one of "warpcache[cpu]" or "warpcache[gpu]" (they exclude each other)'
    )


def test_half_an_onnx_runtime_is_recognised(tiny_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    with pytest.raises(BackendError, match=r"^the installed ONNX Runtime is incomplete; uninstall both"):
        open_generator(tiny_bundle)


def test_another_provider_than_asked_for_is_refused(tiny_bundle, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", lambda self: ["AzureExecutionProvider"])
    with pytest.raises(BackendError, match=r"^module 'generator' was asked to run on \['CPUExecutionProvider'\]"):
        open_generator(tiny_bundle)

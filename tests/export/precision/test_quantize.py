"""Quantisation: the same numbers as ONNX Runtime's own tool for int8, ranges from histograms, what is left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from warpcache.engine.errors import ExportError
from warpcache.export.graph.index import SCOPES_KEY, GraphIndex
from warpcache.export.graph.run import run_model
from warpcache.export.graph.surgery import normalise
from warpcache.export.precision.casting import cast_model, elem_types, emulated
from warpcache.export.precision.quantize import METHODS, Histogram, RangeCollector, quantisable, quantise, scales

RNG = np.random.default_rng(11)


def network() -> ModelProto:
    """Two convolutions that read one value, a transposed one, and products by a weight and by a computed value."""

    def weight(name: str, *shape: int) -> TensorProto:
        # Channels of very different sizes: one scale for all would show.
        array = RNG.normal(0, 0.2, shape) * np.exp(RNG.normal(0, 1, shape[0])).reshape(-1, *[1] * (len(shape) - 1))
        return numpy_helper.from_array(array.astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], name="conv1", pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["h"], name="relu"),
        helper.make_node("Conv", ["h", "w2"], ["c2"], name="conv2", pads=[1] * 4),
        helper.make_node("Conv", ["h", "w3"], ["c3"], name="conv3"),
        helper.make_node("Add", ["c2", "c3"], ["s"], name="add"),
        helper.make_node("ConvTranspose", ["s", "w4"], ["u"], name="up", strides=[2, 2]),
        helper.make_node("MatMul", ["u", "w5"], ["m"], name="matmul"),
        helper.make_node("Transpose", ["m"], ["t"], name="transpose", perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["m", "t"], ["y"], name="product"),
    ]
    weights = [weight("w1", 8, 3, 3, 3), weight("b1", 8), weight("w2", 8, 8, 3, 3), weight("w3", 8, 8, 1, 1)]
    weights += [weight("w4", 8, 4, 2, 2), weight("w5", 16, 6)]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 3, 8, 8))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 4, 16, 16))],
        weights,
    )
    model = normalise(
        onnx.shape_inference.infer_shapes(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        )
    )
    model.graph.node[0].metadata_props.add(key=SCOPES_KEY, value="['', 'first', 'conv2d']")
    return model


def frames(count: int = 4) -> list[dict[str, np.ndarray]]:
    return [{"x": RNG.normal(0, 1 + k, (1, 3, 8, 8)).astype(np.float32)} for k in range(count)]


def collected(model: ModelProto, feeds: list[dict[str, np.ndarray]]) -> dict[str, Histogram]:
    collector = RangeCollector(model)
    for frame in feeds:
        collector.add(frame)
    return collector.histograms


def constants(model: ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_int8_is_what_onnx_runtimes_own_quantiser_gives(tmp_path: Path) -> None:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(feeds)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    model, feeds = network(), frames()
    onnx.save(model, tmp_path / "in.onnx")
    quantize_static(
        tmp_path / "in.onnx",
        tmp_path / "out.onnx",
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
        op_types_to_quantize=["Conv"],
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
    )
    theirs = onnx.load(tmp_path / "out.onnx")
    ours = quantise(model, "int8", scales(collected(model, feeds), "int8", "minmax"), ("conv1", "conv2", "conv3"))
    a, b = constants(ours), constants(theirs)
    for weight in ("w1", "w2", "w3"):
        np.testing.assert_array_equal(a[f"{weight}.int8"], b[f"{weight}_quantized"])
        np.testing.assert_allclose(a[f"{weight}.scale"], b[f"{weight}_scale"], rtol=1e-6)
    for value in ("x", "h"):
        # Theirs spreads the range over 255 steps, from -127.5 to 127.5: 2/255 against our 1/127.
        np.testing.assert_allclose(a[f"{value}.scale"], b[f"{value}_scale"], rtol=1 / 127)
    x = feeds[1]
    exact = run_model(model, x)["y"]
    given, reference = run_model(ours, x)["y"], run_model(theirs, x)["y"]
    assert np.abs(given - exact).mean() <= 1.1 * np.abs(reference - exact).mean()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_every_node_with_a_weight_is_quantised_per_output_channel(kind: str) -> None:
    model, feeds = network(), frames()
    names = quantisable(model)
    assert names == ("conv1", "conv2", "conv3", "up", "matmul")
    result = quantise(model, kind, scales(collected(model, feeds), kind, "minmax"), names)
    onnx.checker.check_model(result, full_check=True)
    index = GraphIndex(result)
    # h is read twice and quantised once.
    assert sum(node.op_type == "QuantizeLinear" for node in index.nodes) == 4
    assert index.scopes(index.producer["w1.restored"]) == ("", "first")
    tensors = constants(result)
    assert not {"w1", "w2", "w3", "w4", "w5"} & tensors.keys()
    assert "b1" in tensors
    for weight, axis in (("w1", 0), ("w2", 0), ("w3", 0), ("w4", 1), ("w5", 1)):
        original = constants(model)[weight]
        others = tuple(k for k in range(original.ndim) if k != axis)
        steps = tensors[f"{weight}.{kind}"].astype(np.float32)
        assert np.abs(steps).max(axis=others) == pytest.approx({"int8": 127, "fp8": 448}[kind])
        shape = [-1 if k == axis else 1 for k in range(original.ndim)]
        scale = tensors[f"{weight}.scale"].reshape(shape)
        # Half a step of int8; of E4M3 half a unit in the last of 3 places, or half its smallest step.
        bound = 0.5 * scale if kind == "int8" else np.maximum(np.abs(original) * 2**-4, 2**-10 * scale)
        assert (np.abs(steps * scale - original) <= bound * (1 + 1e-5)).all()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_it_answers_like_the_original_and_tensorrt_takes_it(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    from warpcache.engine.spec import TensorSpec
    from warpcache.engine.tensorrt.flavour import Flavour
    from warpcache.engine.tensorrt.network import BuildRequest, build_engine
    from warpcache.export.graph.run import run_session
    from warpcache.export.precision.parity import open_answering

    model, feeds = network(), frames()
    result = quantise(model, kind, scales(collected(model, feeds), kind, "minmax"), quantisable(model))
    half = cast_model(result, "float16").model
    assert elem_types(half)["w1.restored"] == elem_types(half)["y.float16"] == TensorProto.FLOAT16
    exact = run_model(model, feeds[2])["y"]
    given = run_session(open_answering(half), feeds[2])["y"]
    error = float(np.sqrt(np.mean((given - exact) ** 2) / np.mean(exact**2)))
    # Eight bits of the range, of which typical values use a few: a few percent. None at all would mean no quantisation.
    assert 1e-3 < error < 0.15
    onnx.save(half, tmp_path / "m.onnx")
    request = BuildRequest(
        tmp_path / "m.onnx",
        name="m",
        inputs=(TensorSpec("x", "float32", (1, 3, 8, 8)),),
        outputs=(TensorSpec("y", "float32", (1, 4, 16, 16)),),
        targets=("sm_86", "sm_89", "sm_120") if kind == "int8" else ("sm_89", "sm_120"),
    )
    assert len(build_engine(request, flavour=Flavour.load("tensorrt-rtx"))) > 0


def test_what_is_not_named_stays_as_it_is() -> None:
    model, feeds = network(), frames()
    value_scales = scales(collected(model, feeds), "int8", "minmax")
    assert quantise(model, "int8", value_scales, ()).SerializeToString() == model.SerializeToString()
    one = quantise(model, "int8", value_scales, ("conv2",))
    assert {"w1", "w3"} <= constants(one).keys()
    readers = {node.name: node.input[0] for node in one.graph.node}
    assert (readers["conv2"], readers["conv3"], readers["conv1"]) == ("h.restored", "h", "x")


def test_a_shared_weight_is_kept_for_its_other_reader() -> None:
    model = network()
    model.graph.node[3].input[1] = "w2"
    model.graph.node[3].attribute.append(helper.make_attribute("pads", [1] * 4))
    del model.graph.initializer[3]
    value_scales = scales(collected(model, frames()), "int8", "minmax")
    one = quantise(model, "int8", value_scales, ("conv2",))
    assert {"w2", "w2.int8"} <= constants(one).keys()
    both = quantise(model, "int8", value_scales, ("conv2", "conv3"))
    assert "w2" not in constants(both)
    assert sum(node.output[0] == "w2.restored" for node in both.graph.node) == 1


def test_a_histogram_counts_every_value_whatever_order_they_come_in() -> None:
    values = [RNG.normal(0, scale, 5000).astype(np.float32) for scale in (0.01, 3.0, 0.5)]
    magnitudes = np.abs(np.concatenate(values))
    for order in ((0, 1, 2), (1, 2, 0)):
        histogram = Histogram()
        histogram.add(np.zeros(10, np.float32))
        for k in order:
            histogram.add(values[k])
        assert histogram.counts.sum() == 10 + magnitudes.size
        assert histogram.largest == magnitudes.max()
        # A bin holds what is in it, to the width of a bin: the cumulative count against the values themselves.
        edges = (np.arange(2048) + 1) * histogram.width
        for k in (0, 10, 500, 1500):
            below = 10 + int((magnitudes < edges[k]).sum())
            nearby = int((np.abs(magnitudes - edges[k]) < histogram.width).sum())
            assert abs(int(histogram.counts[: k + 1].sum()) - below) <= nearby
    noisy = Histogram()
    noisy.add(np.array([np.nan, np.inf, 2.0], np.float32))
    assert (noisy.largest, noisy.counts.sum()) == (2.0, 1)


def test_ranges() -> None:
    histogram = Histogram()
    values = RNG.standard_t(3, 200_000).astype(np.float32)  # heavy tails
    histogram.add(values)
    largest = float(np.abs(values).max())
    assert histogram.range("minmax", "int8") == largest
    quantile = float(np.quantile(np.abs(values), 0.9999))
    assert quantile <= histogram.range("percentile", "int8") <= quantile + 2 * histogram.width

    def error(limit: float) -> float:
        steps = np.clip(np.rint(values / (limit / 127)), -127, 127)
        return float(np.mean((steps * (limit / 127) - values) ** 2))

    chosen = histogram.range("mse", "int8")
    # Candidates are 1 % of the largest apart.
    assert error(chosen) <= min(error(share * largest) for share in np.linspace(0.1, 1, 40)) * 1.02
    assert error(chosen) < 0.9 * error(largest)
    empty = Histogram()
    empty.add(np.zeros((2, 3), np.float16))
    assert {empty.range(method, "int8") for method in METHODS["int8"]} == {1.0}
    with pytest.raises(ExportError, match=r"^fp8 has no range 'mse'; it has minmax, percentile"):
        histogram.range("mse", "fp8")


def test_a_weight_of_zeros_stays_zero() -> None:
    model = network()
    for tensor in model.graph.initializer:
        if tensor.name == "w3":
            tensor.CopyFrom(numpy_helper.from_array(np.zeros((8, 8, 1, 1), np.float32), "w3"))
    result = quantise(model, "int8", scales(collected(model, frames()), "int8", "minmax"), ("conv3",))
    tensors = constants(result)
    assert not tensors["w3.int8"].any()
    assert np.isfinite(tensors["w3.scale"]).all()
    assert np.isfinite(run_model(emulated(cast_model(result, "float16").model), frames(1)[0])["y"]).all()

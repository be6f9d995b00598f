"""Splitting: every cut of every architecture is exact with a fresh cache, and a wrong split is caught."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from warpcache.engine.errors import ExportError, InputError
from warpcache.export.cut.enumerate import enumerate_cuts
from warpcache.export.cut.split import SplitModels, check_exact, split
from warpcache.export.graph.index import GraphIndex
from warpcache.export.graph.run import open_session, run_model, run_session
from warpcache.export.graph.surgery import normalise, rename_values

Trace = Callable[[str], Any]


def _parse(text: str) -> onnx.ModelProto:
    return normalise(onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 20]>\n' + text))


def _inputs(model: onnx.ModelProto) -> list[str]:
    return [value.name for value in model.graph.input]


def _outputs(model: onnx.ModelProto) -> list[str]:
    return [value.name for value in model.graph.output]


def test_every_cut_is_bit_identical_with_a_fresh_cache(traced: Any) -> None:
    cuts = enumerate_cuts(traced.model, traced.costs, max_cost_ratio=0.6, max_tensors=3)
    assert len(cuts) >= 4
    whole = open_session(traced.model)
    for cut in cuts:
        parts = split(traced.model, cut.names, anchors=cut.anchors)
        producer, plain = open_session(parts.producer), open_session(parts.plain)
        for t in (0, 4):
            # Compared here and not by check_exact, which is itself under test.
            want = run_session(whole, traced.frame(t))
            got = run_session(plain, {**traced.frame(t), **run_session(producer, traced.frame(t))})
            assert list(got) == list(want)
            for name in want:
                assert got[name].dtype == want[name].dtype, (cut.names, name)
                assert got[name].tobytes() == want[name].tobytes(), (cut.names, name)


def test_the_halves_are_valid_and_check_exact_agrees(traced: Any) -> None:
    cuts = enumerate_cuts(traced.model, traced.costs)
    for cut in cuts[:: max(1, len(cuts) // 4)]:
        parts = split(traced.model, cut.names, anchors=cut.anchors)
        for half in (parts.producer, parts.plain):
            onnx.checker.check_model(half, full_check=True)
        check_exact(traced.model, parts, traced.frame(2))


def test_a_cut_through_a_residual_trunk_is_anchored(trace: Trace) -> None:
    """Without the anchor the executor adds after the convolution instead of inside it, and rounds differently."""
    residual = trace("residual")
    cuts = [c for c in enumerate_cuts(residual.model, residual.costs, max_cost_ratio=0.7) if c.anchors]
    if not cuts:
        pytest.skip("this processor's ONNX Runtime has no blocked layout, so no cut needs an anchor")
    trunk = cuts[0]
    assert set(trunk.anchors) <= set(trunk.names)
    check_exact(residual.model, split(residual.model, trunk.names, anchors=trunk.anchors), residual.frame(0))
    with pytest.raises(ExportError, match="output 'image_out' of the cut model differs from the whole"):
        check_exact(residual.model, split(residual.model, trunk.names), residual.frame(0))


def test_an_old_cache_shows_in_the_result(trace: Trace) -> None:
    """Else bit identity would prove nothing: the cache must matter, and so must the new input."""
    unet = trace("unet")
    cut = next(c for c in enumerate_cuts(unet.model, unet.costs) if c.reads_input)
    parts = split(unet.model, cut.names, anchors=cut.anchors)
    fresh = run_model(unet.model, unet.frame(4))["image"]
    old = run_model(unet.model, unet.frame(0))["image"]
    cache = run_model(parts.producer, unet.frame(0))
    mixed = run_model(parts.plain, {**unet.frame(4), **cache})["image"]
    assert not np.array_equal(mixed, fresh)
    assert not np.array_equal(mixed, old)


def test_names_and_origins(trace: Trace) -> None:
    unet = trace("unet")
    cut = max(enumerate_cuts(unet.model, unet.costs), key=lambda c: len(c.tensors))
    assert len(cut.tensors) >= 2
    parts = split(unet.model, cut.names, anchors=cut.anchors)
    assert tuple(parts.origins.values()) == cut.names
    assert [spec.name for spec in parts.cache] == [f"cache.{name}" for name in cut.names]
    assert [(spec.dtype, spec.shape) for spec in parts.cache] == [(s.dtype, s.shape) for s in cut.tensors]
    assert _outputs(parts.producer) == [spec.name for spec in parts.cache]
    assert _inputs(parts.plain)[: len(parts.cache)] == [spec.name for spec in parts.cache]
    assert _outputs(parts.plain) == ["image"]
    for half in (parts.producer, parts.plain):
        assert {p.value for p in half.metadata_props} == set(cut.names)


def test_each_half_asks_only_for_the_inputs_it_needs(trace: Trace) -> None:
    many = trace("many")
    parts = split(many.model, [*_module_output(many.model, "deep"), *_module_output(many.model, "pose")])
    assert _inputs(parts.producer) == ["image", "pose", "person"]
    # `person` ends in the cache, `inverted` is needed at the end only, `unused` by nobody.
    assert _inputs(parts.plain)[2:] == ["image", "pose", "inverted"]
    check_exact(many.model, parts, many.frame(1))


def _module_output(model: onnx.ModelProto, path: str) -> list[str]:
    return GraphIndex(model).module_outputs(path)


EDGES = """
edges (float[1,4] x, int64[1] k, float[1,4] late) =>
(float[1,4] deep_out, float[1,4] y, float[1,4] same, int64[1] next, float[4] fixed)
<float[4,4] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}, float[4] bias = {1,2,3,4}, int64[1] one = {1}>
{
  a = MatMul(x, w)
  b = Add(a, bias)
  deep_out = Sin(b)
  c = MatMul(deep_out, w)
  next = Add(k, one)
  d = Cast<to = 1>(next)
  e = Mul(c, d)
  f = Add(e, bias)
  y = Add(f, late)
  same = Identity(late)
  fixed = Cos(bias)
}
"""


def _edge_feeds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x": rng.standard_normal((1, 4)).astype(np.float32),
        "k": np.array([2], np.int64),
        "late": rng.standard_normal((1, 4)).astype(np.float32),
    }


@pytest.mark.parametrize(
    ("cut", "producer_inputs", "plain_inputs"),
    [
        # A cut tensor that is an output too, and an output that the producer makes by itself.
        (["deep_out"], ["x"], ["k", "late"]),
        # An integer tensor, an output as well, beside the deep one; the constant `bias` is on both sides.
        (["deep_out", "next"], ["x", "k"], ["late"]),
        (["deep_out", "e"], ["x", "k"], ["k", "late"]),
        # Everything but the passed-through input is cached.
        (["deep_out", "y", "next"], ["x", "k", "late"], ["late"]),
    ],
)
def test_edge_cases(cut: list[str], producer_inputs: list[str], plain_inputs: list[str]) -> None:
    model = _parse(EDGES)
    parts = split(model, cut)
    assert _inputs(parts.producer) == producer_inputs
    assert _inputs(parts.plain) == [f"cache.{name}" for name in cut] + plain_inputs
    assert _outputs(parts.plain) == ["deep_out", "y", "same", "next", "fixed"]
    for half in (parts.producer, parts.plain):
        onnx.checker.check_model(half, full_check=True)
    check_exact(model, parts, _edge_feeds())


def test_cache_names_stay_apart_and_plain_of_odd_characters() -> None:
    model = _parse(
        "g (float[2] x) => (float[2] y) { v = Sin(x)\n w = Cos(x)\n u = Add(v, w)\n y = Exp(u) }",
    )
    model = rename_values(model, {"v": "block/a", "w": "block:a"})
    parts = split(model, ["block/a", "block:a"])
    assert [spec.name for spec in parts.cache] == ["cache.block_a", "cache.block_a.2"]
    check_exact(model, parts, {"x": np.ones(2, np.float32)})


def test_a_wrongly_wired_split_is_caught(trace: Trace) -> None:
    """Seeded defect: two cached tensors of one shape change places in the consumer."""
    model = _parse(
        "g (float[2] x) => (float[2] y) { v = Sin(x)\n w = Cos(x)\n u = Sub(v, w)\n y = Exp(u) }",
    )
    parts = split(model, ["v", "w"])
    check_exact(model, parts, {"x": np.ones(2, np.float32)})
    crossed = rename_values(parts.plain, {"cache.v": "cache.w", "cache.w": "cache.v"})
    with pytest.raises(ExportError, match="output 'y' of the cut model differs from the whole by up to"):
        check_exact(model, dataclasses.replace(parts, plain=crossed), {"x": np.ones(2, np.float32)})


def test_one_wrong_bit_is_caught() -> None:
    """Seeded defect of the smallest size: a weight of the consumer is one ulp off."""
    model = _parse(EDGES)
    parts = split(model, ["deep_out"])
    plain = onnx.ModelProto()
    plain.CopyFrom(parts.plain)
    for tensor in plain.graph.initializer:
        if tensor.name == "bias":
            value = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.nextafter(value, np.float32(9)), "bias"))
    with pytest.raises(ExportError, match="output '"):
        check_exact(model, SplitModels(parts.producer, plain, parts.cache, parts.origins), _edge_feeds())


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ([], "the cut names no tensor"),
        (["x"], "the model computes no value 'x'"),
        (["bias"], "the model computes no value 'bias'"),
        (["fixed"], "the model computes no value 'fixed'"),
        (["nothing"], "the model computes no value 'nothing'"),
    ],
)
def test_bad_cuts_are_refused(cut: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        split(_parse(EDGES), cut)

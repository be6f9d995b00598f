"""Enumerating, ranking and choosing cuts, against ONNX's own extractor and PyTorch's results."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx.utils
import pytest

from warpcache.engine.errors import ExportError, InputError
from warpcache.export.cut import rank as cut_module
from warpcache.export.cut.candidate import CutCandidate
from warpcache.export.cut.enumerate import enumerate_cuts
from warpcache.export.cut.rank import Trial, choose_cut, rank_cuts
from warpcache.export.cut.split import check_exact, split
from warpcache.export.graph.index import GraphIndex
from warpcache.export.graph.profile import profile_nodes
from warpcache.export.graph.surgery import normalise

Trace = Callable[[str], Any]
SHORT = Trial(ages=(1,))


def _label_sets(cuts: list[CutCandidate]) -> set[frozenset[str]]:
    return {frozenset(cut.labels) for cut in cuts}


def test_consumer_and_costs_agree_with_onnx_own_extractor(traced: Any) -> None:
    extractor = onnx.utils.Extractor(traced.model)
    index = GraphIndex(traced.model)
    constant = {index.names[i] for i in index.constant}
    live = sum(cost for name, cost in traced.costs.items() if name not in constant)
    for cut in enumerate_cuts(traced.model, traced.costs)[::5]:
        rest = extractor.extract_model([*index.inputs, *cut.names], list(index.outputs))
        assert {node.name for node in rest.graph.node} == cut.consumer_nodes
        made = extractor.extract_model(list(index.inputs), list(cut.names))
        assert cut.consumer_ms == pytest.approx(sum(traced.costs[node.name] for node in rest.graph.node))
        assert cut.producer_ms == pytest.approx(sum(traced.costs[node.name] for node in made.graph.node))
        assert cut.whole_ms == pytest.approx(live)
        both = {node.name for node in rest.graph.node} & {node.name for node in made.graph.node}
        assert cut.recomputed_ms == pytest.approx(sum(traced.costs[name] for name in both))


def test_candidates_keep_to_the_limits(traced: Any) -> None:
    index = GraphIndex(traced.model)
    cuts = enumerate_cuts(traced.model, traced.costs, max_tensors=2, max_cost_ratio=0.4, min_cost_ratio=0.05)
    assert cuts
    assert len({cut.names for cut in cuts}) == len(cuts)
    for cut in cuts:
        assert 1 <= len(cut.tensors) <= 2
        assert 0.05 <= cut.cost_ratio <= 0.4
        assert cut.cache_bytes == sum(math.prod(s.shape) * np.dtype(s.dtype).itemsize for s in cut.tensors)
        for spec in cut.tensors:
            assert not index.is_constant(spec.name)
            assert spec.name not in index.inputs
            assert spec.dtype == "float32"
        json.dumps(cut.to_record())


def test_a_unet_skip_is_cached_or_recomputed(trace: Trace) -> None:
    unet = trace("unet")
    cuts = enumerate_cuts(unet.model, unet.costs, max_cost_ratio=0.7)
    labels = _label_sets(cuts)
    # Before the last decoder block: with the first skip in the cache, and without.
    assert frozenset({"dec.0", "enc.0"}) in labels
    assert frozenset({"dec.0"}) in labels
    recomputing = [cut for cut in cuts if cut.labels == ("dec.0",)]
    caching = [cut for cut in cuts if set(cut.labels) == {"dec.0", "enc.0"}]
    assert all(cut.recomputed_ms > 0 and cut.reads_input for cut in recomputing)
    assert all(cut.recomputed_ms == 0 and not cut.reads_input for cut in caching)


def test_parallel_heads_are_cut_at_equal_depth(trace: Trace) -> None:
    many = trace("many")
    labels = _label_sets(enumerate_cuts(many.model, many.costs))
    assert any({"image_head.0", "mask_head.0"} <= found for found in labels)


def test_shape_arithmetic_ties_no_side_to_the_other() -> None:
    """The reshape at the end takes its shape from a deep value; only the shape is needed, and it is a constant."""
    model = normalise(
        onnx.parser.parse_model(
            """<ir_version: 10, opset_import: ["" : 20]>
            g (float[1,4] x) => (float[1,4,1] y)
            <float[4,4] w = {1,0,0,1,0,1,0,0,2,0,1,0,0,0,3,1}, int64[1] one = {1}> {
              a = MatMul(x, w)
              b = Sin(a)
              shape = Shape(b)
              c = MatMul(b, w)
              d = Cos(c)
              more = Concat<axis = 0>(shape, one)
              y = Reshape(d, more)
            }"""
        )
    )
    assert "Shape" not in {node.op_type for node in model.graph.node}
    costs = {node.name: 10.0 if node.op_type == "MatMul" else 0.5 for node in model.graph.node}
    cuts = {cut.names: cut for cut in enumerate_cuts(model, costs, max_cost_ratio=0.6)}
    assert ("b",) in cuts
    assert all("shape" not in names and "more" not in names for names in cuts)
    found = cuts["b",]
    check_exact(model, split(model, found.names, anchors=found.anchors), {"x": np.ones((1, 4), np.float32)})


def test_costs_of_another_model_are_refused(trace: Trace) -> None:
    with pytest.raises(InputError, match="the costs lack node"):
        enumerate_cuts(trace("unet").model, trace("latent").costs)


def test_ranked_cuts_are_measured_and_ordered(trace: Trace) -> None:
    unet = trace("unet")
    cuts = enumerate_cuts(unet.model, unet.costs)
    ranked = rank_cuts(cuts, unet.model, unet.stream, "image", keep=5, trial=Trial(ages=(1, 2, 9)))
    assert 1 <= len(ranked) <= 5
    keys = [(not cut.reads_input, -cut.score) for cut in ranked]
    assert keys == sorted(keys)
    for cut in ranked:
        assert set(cut.reuse_psnr_db) == {1, 2}  # the stream is too short for 9
        assert min(cut.consumer_ms, cut.producer_ms, cut.whole_ms) > 0
        size = 0.25 * math.log2(1 + cut.cache_bytes / (3 * 32 * 32 * 4))
        assert cut.score == pytest.approx(np.mean([*cut.reuse_psnr_db.values()]) - 20 * cut.cost_ratio - size)
        check_exact(unet.model, split(unet.model, cut.names, anchors=cut.anchors), unet.frame(0))


def test_reuse_psnr_of_a_blind_consumer_is_that_of_the_old_frame(trace: Trace) -> None:
    """A consumer that reads no input shows frame t - age; PyTorch's own frames say how far that is from frame t."""
    latent = trace("latent")
    cuts = enumerate_cuts(latent.model, latent.costs)
    assert all(not cut.reads_input for cut in cuts)
    ranked = rank_cuts(cuts, latent.model, latent.stream, "image", trial=Trial(ages=(1, 2), targets=3))
    frames = [latent.torch_outputs(t)["image"].astype(np.float64) for t in range(6)]
    for age in (1, 2):
        errors = [np.mean((frames[t] - frames[t - age]) ** 2) for t in (2, 4, 5)]
        want = np.mean([10 * math.log10(4 / error) for error in errors])
        for cut in ranked:
            # ONNX Runtime and PyTorch differ by some 1e-6 of values that differ by 0.1: 1e-4 dB, with room to spare.
            assert cut.reuse_psnr_db[age] == pytest.approx(want, abs=1e-2)


def test_reuse_on_a_still_stream_is_perfect(trace: Trace) -> None:
    unet = trace("unet")
    still = {"condition": np.repeat(unet.stream["condition"][:1], 3, axis=0)}
    cuts = [cut for cut in enumerate_cuts(unet.model, unet.costs) if cut.reads_input][:2]
    for cut in rank_cuts(cuts, unet.model, still, "image", trial=SHORT):
        assert cut.reuse_psnr_db == {1: 60.0}


def test_inexact_cuts_are_left_out_of_the_ranking(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = trace("unet")
    cuts = [cut for cut in enumerate_cuts(unet.model, unet.costs) if cut.reads_input]
    assert len(cuts) >= 2
    spoiled = rank_cuts(cuts, unet.model, unet.stream, keep=4, trial=SHORT)[0].names

    def check(model: onnx.ModelProto, parts: Any, feeds: Any) -> None:
        if tuple(parts.origins.values()) == spoiled:
            raise ExportError("output 'image' of the cut model differs")
        check_exact(model, parts, feeds)

    monkeypatch.setattr(cut_module, "check_exact", check)
    assert spoiled not in [cut.names for cut in rank_cuts(cuts, unet.model, unet.stream, keep=4, trial=SHORT)]


def test_choose_auto_takes_the_best_ranked(trace: Trace) -> None:
    unet = trace("unet")
    feeds = unet.frame(0)
    costs = profile_nodes(unet.model, feeds, repeats=1)
    ranked = rank_cuts(enumerate_cuts(unet.model, unet.costs), unet.model, unet.stream, keep=2, trial=SHORT)
    assert choose_cut(unet.model, "auto", unet.stream, ranked=ranked) is ranked[0]
    # Without a ranking it makes one of its own, from measured costs.
    found = choose_cut(unet.model, "auto", unet.stream, costs=costs, trial=SHORT)
    check_exact(unet.model, split(unet.model, found.names, anchors=found.anchors), feeds)


def test_choose_by_value_and_by_module_path(trace: Trace) -> None:
    unet = trace("unet")
    by_path = choose_cut(unet.model, "dec.0", unet.stream, costs=unet.costs, trial=SHORT)
    by_name = choose_cut(unet.model, by_path.names[0], unet.stream, costs=unet.costs, trial=SHORT)
    assert by_path.names == by_name.names
    assert by_path.labels == ("dec.0",)
    assert set(by_path.reuse_psnr_db) == {1}
    many = trace("many")
    # "pose" is an input and a module: an input cannot be cut at, so the module is meant.
    assert "pose" in choose_cut(many.model, "deep,pose", many.stream, costs=many.costs, trial=SHORT).labels
    both = choose_cut(unet.model, "dec.0, enc.0", unet.stream, costs=unet.costs, trial=SHORT)
    assert set(both.labels) == {"dec.0", "enc.0"}
    assert both.cache_bytes > by_path.cache_bytes


def test_an_output_off_the_cut_is_cached_or_recomputed_by_its_cost(trace: Trace) -> None:
    many = trace("many")
    # Every head hangs on `deep`, but the cut at the image head leaves the whole mask head beside it.
    found = choose_cut(many.model, "image_head.0", many.stream, "image_out", costs=many.costs, trial=SHORT)
    assert {"mask", "feature"} <= set(found.names)
    assert "pose_out" not in found.names
    check_exact(many.model, split(many.model, found.names, anchors=found.anchors), many.frame(3))


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("dec.7", InputError, r"there is no value or module 'dec.7' in the generator; the nearest are .*dec\.[01]"),
        ("silu_22", InputError, "there is no value or module 'silu_22' in the generator; the nearest are silu_2"),
        ("dec.0,,enc.0", InputError, "the cut 'dec.0,,enc.0' holds an empty name"),
        ("condition", InputError, "'condition' is an input of the generator"),
        ("out.weight", InputError, "'out.weight' is a constant of the generator"),
        ("image", ExportError, "the cut 'image' does not separate the generator: nothing is left"),
    ],
)
def test_bad_names(trace: Trace, spec: str, error: type[Exception], message: str) -> None:
    unet = trace("unet")
    with pytest.raises(error, match=message):
        choose_cut(unet.model, spec, unet.stream, costs=unet.costs, trial=SHORT)


def test_a_cut_that_leaves_nearly_everything_is_refused(trace: Trace) -> None:
    many = trace("many")
    with pytest.raises(
        ExportError, match="the cut 'identity' does not separate the generator: the consumer would still"
    ):
        choose_cut(many.model, "identity", many.stream, "image_out", costs=many.costs, trial=SHORT)


def test_bad_streams(trace: Trace) -> None:
    unet, many = trace("unet"), trace("many")
    cuts = enumerate_cuts(unet.model, unet.costs)[:1]
    with pytest.raises(InputError, match="the sample stream has 1 frames, but reuse at age 2 needs 3"):
        rank_cuts(cuts, unet.model, unet.frame(0), trial=Trial(ages=(2, 4)))
    with pytest.raises(InputError, match="the sample stream lacks input 'condition'"):
        rank_cuts(cuts, unet.model, {}, trial=SHORT)
    with pytest.raises(InputError, match="the generator has no output 'picture'; its outputs are image"):
        rank_cuts(cuts, unet.model, unet.stream, "picture")
    with pytest.raises(InputError, match="input 'pose' has 4 frames, but the stream has 6"):
        rank_cuts(cuts, many.model, {**many.stream, "pose": many.stream["pose"][:4]})
    with pytest.raises(ExportError, match="no set of tensors separates"):
        rank_cuts([], unet.model, unet.stream)

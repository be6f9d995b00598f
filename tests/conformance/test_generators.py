"""Generators of the four kinds that are in use: traced, run, cut, cast to float16, and built for TensorRT-RTX."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import every_cut
import generators
import numpy as np
import operator_table
import pytest
import rtx_builds
import torch
from onnx import ModelProto
from torch import nn

from warpcache.export.cut.split import SplitModels, split
from warpcache.export.graph.run import open_session, run_model, run_session
from warpcache.export.graph.trace import OPSET, trace_generator
from warpcache.export.precision.casting import cast_model, emulated

KINDS = tuple(generators.examples())


@dataclass(frozen=True)
class Traced:
    """One generator.

    Attributes:
        module: The PyTorch module.
        model: Its trace.
        feeds: One frame's inputs.
        parts: The halves of one cut near the middle.
    """

    module: nn.Module
    model: ModelProto
    feeds: dict[str, np.ndarray]
    parts: SplitModels


@pytest.fixture(scope="module")
def traced() -> dict[str, Traced]:
    found = {}
    for kind, (make, example) in generators.examples().items():
        torch.manual_seed(5)
        module = make().eval()
        feeds = {name: tensor.numpy() for name, tensor in example.items()}
        model = trace_generator(module, feeds)
        cuts, _ = every_cut.legal_cuts(model)
        middle = min(cuts, key=lambda cut: abs(cut.cost_ratio - 0.5))
        found[kind] = Traced(module, model, feeds, split(model, middle.names, anchors=middle.anchors))
    return found


@pytest.fixture(scope="module")
def graphs(traced: dict[str, Traced]) -> dict[str, ModelProto]:
    """Every graph that a bundle of these generators would hold: "kind/module/dtype" -> graph."""
    found = {}
    for kind, one in traced.items():
        modules = {"generator": one.model, "producer": one.parts.producer, "plain": one.parts.plain}
        for name, model in modules.items():
            found[f"{kind}/{name}/float32"] = model
            found[f"{kind}/{name}/float16"] = cast_model(model, "float16").model
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_trace_computes_what_pytorch_computes(traced: dict[str, Traced], kind: str) -> None:
    one = traced[kind]
    assert [entry.version for entry in one.model.opset_import if entry.domain == ""] == [OPSET]
    rng = np.random.default_rng(8)
    # Another frame than the traced one: what the trace took for a constant would show.
    feeds = {
        name: array + rng.uniform(0, 0.3, array.shape).astype(np.float32)
        if array.dtype == np.float32
        else array[:, ::-1].copy()
        for name, array in one.feeds.items()
    }
    with torch.no_grad():
        want = one.module(**{name: torch.from_numpy(array) for name, array in feeds.items()}).numpy()
    got = run_model(one.model, feeds, threads=1)["image"]
    # Two implementations of some dozen layers, sums of up to 400 products each: measured 2.4e-6 of the range at most.
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())
    assert np.abs(want).max() > 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_every_legal_cut_is_exact(traced: dict[str, Traced], kind: str) -> None:
    one = traced[kind]
    want = run_session(open_session(one.model, threads=1), one.feeds)
    cuts, _ = every_cut.legal_cuts(one.model)
    assert len(cuts) >= 10
    # Neighbours differ by a node: a dozen of them, spread over the generator.
    for cut in cuts[:: max(1, len(cuts) // 12)]:
        assert every_cut.inexact(one.model, cut, one.feeds, want) == [], cut.names


@pytest.mark.parametrize("kind", KINDS)
def test_float16_stays_near_float32(traced: dict[str, Traced], graphs: dict[str, ModelProto], kind: str) -> None:
    """Rounded after every node, as a GPU does it; ONNX Runtime on the CPU leaves that out."""
    one = traced[kind]
    want = run_model(one.model, one.feeds, threads=1)["image"]
    got = run_model(emulated(graphs[f"{kind}/generator/float16"]), one.feeds, threads=1)["image"]
    error = float(np.abs(got - want).max() / np.abs(want).max())
    # In roundings of the range, one after the other: measured at most 8. Nothing rounded would be as suspicious.
    assert 0 < error < 24 * 2.0**-11


def test_tensorrt_rtx_builds_them_whole_and_cut(graphs: dict[str, ModelProto], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed, so nothing can be built with it")
    files = {}
    for number, (name, model) in enumerate(graphs.items()):
        files[name] = tmp_path / f"{number}.onnx"
        files[name].write_bytes(model.SerializeToString())
    assert len(files) == 4 * 3 * 2
    problems = {name: problem for name, problem in rtx_builds.build_all(files).items() if problem is not None}
    assert problems == {}


def test_the_page_marks_every_operator_they_need_as_building(graphs: dict[str, ModelProto]) -> None:
    needed = {kind: set() for kind in KINDS}
    for name, model in graphs.items():
        needed[name.split("/")[0]] |= {node.op_type for node in model.graph.node}
    building = operator_table.building(operator_table.PATH.read_text())
    assert {kind: sorted(names - building) for kind, names in needed.items() if names - building} == {}
    # What makes each kind what it is, so that the line above is about generators.
    assert needed["U-Net"] >= {"Conv", "InstanceNormalization", "Sigmoid", "Resize", "Concat", "Sin"}
    assert needed["residual"] >= {"Pad", "InstanceNormalization", "ConvTranspose", "DepthToSpace", "PRelu"}
    assert needed["GAN decoder"] >= {"Conv", "Gemm", "ReduceSum", "Sqrt", "AveragePool", "Resize", "ReduceMean"}
    assert needed["attention"] >= {"MatMul", "Softmax", "LayerNormalization", "Gather", "GridSample", "Gelu"}
    assert all("Cast" in names for names in needed.values())

"""Profiling: every node is there, fused time goes to a node of its group, and models take turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from warpcache.engine.errors import ExportError, InputError
from warpcache.export.graph import profile as profile_module
from warpcache.export.graph.fusion import find_fusions
from warpcache.export.graph.index import GraphIndex
from warpcache.export.graph.profile import Timing, profile_nodes, time_model
from warpcache.export.graph.trace import trace_generator

Trace = Callable[[str], Any]


class Fused(nn.Module):
    """A convolution large enough to take more than a profiler's microsecond, with what is fused into it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cos(torch.relu(self.conv(x)))


@pytest.fixture(scope="module")
def fused() -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 16, 48, 48)).astype(np.float32)}
    return trace_generator(Fused(), feeds), feeds


def test_every_node_has_a_cost(traced: Any) -> None:
    costs = profile_nodes(traced.model, traced.frame(0), repeats=2)
    assert list(costs) == [node.name for node in traced.model.graph.node]
    assert all(cost >= 0 for cost in costs.values())
    # What makes up these networks is not folded away; a convolution of this size takes more than a microsecond.
    heavy = [node.name for node in traced.model.graph.node if node.op_type in ("Conv", "ConvTranspose")]
    assert all(costs[name] > 0 for name in heavy)


def test_the_time_of_a_fused_kernel_goes_to_its_heaviest_node(fused: Any) -> None:
    model, feeds = fused
    index = GraphIndex(model)
    by_type = {node.op_type: position for position, node in enumerate(index.nodes)}
    assert frozenset({by_type["Conv"], by_type["Relu"]}) in find_fusions(model).groups
    costs = profile_nodes(model, feeds, repeats=2)
    assert costs[index.names[by_type["Conv"]]] > 0
    assert costs[index.names[by_type["Relu"]]] == 0
    assert costs[index.names[by_type["Cos"]]] > 0


def test_equal_and_empty_names_are_told_apart(fused: Any) -> None:
    model, feeds = fused
    nameless = onnx.ModelProto()
    nameless.CopyFrom(model)
    for node in nameless.graph.node:
        node.name = "same" if node.op_type != "Cos" else ""
    costs = profile_nodes(nameless, feeds, repeats=1)
    assert list(costs) == GraphIndex(nameless).names
    assert len(costs) == len(nameless.graph.node)
    assert sum(cost > 0 for cost in costs.values()) == 2


def test_models_take_turns_in_changing_order(fused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, feeds = fused
    ran: list[int] = []
    original = profile_module.run_session

    def record(session: Any, *args: Any) -> Any:
        ran.append(id(session))
        return original(session, *args)

    monkeypatch.setattr(profile_module, "run_session", record)
    times = time_model({"a": model, "b": model.SerializeToString(), "c": model}, feeds, repeats=4, warmup=1)
    assert {name: len(timing.samples_ms) for name, timing in times.items()} == {"a": 4, "b": 4, "c": 4}
    a, b, c = (ran[k] for k in range(3))
    assert ran[3:] == [a, b, c, b, c, a, c, a, b, a, b, c]


def test_timing_statistics() -> None:
    timing = Timing((4.0, 1.0, 2.0, 10.0))
    assert timing.min_ms == 1.0


def test_bad_arguments(fused: Any) -> None:
    model, feeds = fused
    with pytest.raises(InputError, match="repeats is 0; at least 1 run must be measured"):
        profile_nodes(model, feeds, repeats=0)
    with pytest.raises(InputError, match="repeats is 0; at least 1 run must be measured"):
        time_model({"a": model}, feeds, repeats=0)
    with pytest.raises(InputError, match="the model needs input 'x', but only y was given"):
        time_model({"a": model}, {"y": feeds["x"]})
    with pytest.raises(ExportError, match="ONNX Runtime cannot load the model"):
        time_model({"a": b"no model"}, feeds)
    with pytest.raises(ExportError, match="ONNX Runtime cannot run the model"):
        time_model({"a": model}, {"x": feeds["x"][:, :3]})

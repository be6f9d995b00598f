"""A branch as one graph: first layers, guide bank, slim remainder, and answers kept within the images' range."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from onnx import ModelProto, helper, numpy_helper

from ..graph.index import GraphIndex
from ..graph.surgery import extract, merge, rename_values
from ..graph.trace import export_module
from .guide_bank import GuideLookup

__all__ = ["branch_graph", "lookup_graph", "prefix_graph"]

_GUIDED = "bank.guided"


def prefix_graph(model: ModelProto, depth: Sequence[str]) -> ModelProto | None:
    """The first layers as they are: generator inputs -> the depth's values; None where the depth is the inputs."""
    if not depth:
        return None
    index = GraphIndex(model)
    made = index.closure(depth)
    inputs = [name for name in index.inputs if any(reader in made for reader in index.consumers.get(name, ()))]
    return extract(model, inputs, list(depth))


def lookup_graph(lookup: GuideLookup, guided: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> ModelProto:
    """The look-up: the values `guided` (by their names) -> the one at `lookup.target` with the guide added."""
    example = tuple(torch.zeros(shape) for shape in shapes)
    return export_module(lookup.eval(), example, list(guided), [_GUIDED])


def branch_graph(
    prefix: ModelProto | None,
    rest: ModelProto,
    lookup: ModelProto | None,
    target: str | None,
    outputs: Sequence[str],
    limits: tuple[float, float],
) -> ModelProto:
    """Join a branch.

    Args:
        prefix: Generator inputs -> depth values; None where the rest reads the inputs. Its names are kept, so that a
            bundle stores frozen weights under the name that they have in the whole.
        rest: Depth values and generator inputs -> the generator's outputs.
        lookup: From `lookup_graph`, or None.
        target: The value that takes the guide, where there is a look-up.
        outputs: The generator's outputs, in order.
        limits: Least and greatest value that the generator's images were seen to take; answers are kept within.

    Returns:
        Generator inputs (those that are read) -> the generator's outputs.
    """
    depth = () if prefix is None else GraphIndex(prefix).outputs
    before, links = prefix, {name: name for name in depth}
    if lookup is not None and target is not None:
        read = {name: name for name in GraphIndex(lookup).inputs}
        before = lookup if prefix is None else merge(prefix, lookup, read, [*depth, _GUIDED])
        links[target] = _GUIDED
    if before is not None:
        needed = GraphIndex(rest).inputs
        links = {name: source for name, source in links.items() if name in needed}
        rest = merge(before, rest, links, list(outputs))
    return _clipped(rest, outputs, limits)


def _clipped(model: ModelProto, outputs: Sequence[str], limits: tuple[float, float]) -> ModelProto:
    """The same model with its outputs kept within limits."""
    free = {name: f"{name}.free" for name in outputs}
    model = rename_values(model, free)
    graph = model.graph
    ends = {value.name: value for value in graph.output}
    del graph.output[:]
    for name, limit in zip(("limit.low", "limit.high"), limits, strict=True):
        graph.initializer.append(numpy_helper.from_array(np.array(limit, np.float32), name))
    for name in outputs:
        graph.node.append(
            helper.make_node("Clip", [free[name], "limit.low", "limit.high"], [name], name=f"node_clip_{name}")
        )
        graph.value_info.append(ends[free[name]])
        graph.output.add().CopyFrom(ends[free[name]])
        graph.output[-1].name = name
    return model

"""Chains of nodes that PyTorch has one faster function for, found in a graph before it runs.

GroupNorm is exported as Reshape, InstanceNormalization, Reshape, Mul, Add, and SiLU as Sigmoid, Mul. Node by node each
of them costs a copy or a stored activation, and the Reshapes undo the channels-last layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ...engine.spec import Array
from ..graph.index import GraphIndex
from .calls import Call, Run

__all__ = ["Fused", "find_chains"]


@dataclass(frozen=True)
class Fused:
    """One function for several nodes.

    Attributes:
        nodes: The nodes that it stands for, in order; it runs in the place of the last.
        reads: Values that it reads.
        makes: The value that it makes, that of the last node.
        run: The function.
    """

    nodes: tuple[int, ...]
    reads: tuple[str, ...]
    makes: str
    run: Run


def find_chains(index: GraphIndex, calls: Mapping[int, Call], fixed: Mapping[str, Array]) -> Iterator[Fused]:
    """Chains whose inner values nothing else reads.

    Args:
        index: The graph.
        calls: Its nodes that depend on inputs or trained initializers.
        fixed: Values of the constants that are not trained.
    """
    for i, call in calls.items():
        found = None
        if call.operator == "InstanceNormalization":
            found = _group_norm(index, calls, fixed, i)
        elif call.operator == "Sigmoid":
            found = _silu(index, calls, i)
        if found is not None:
            yield found


def _only_reader(index: GraphIndex, node: int) -> int | None:
    """The one node that reads what `node` makes."""
    value = index.nodes[node].output[0]
    readers = index.consumers.get(value, [])
    return readers[0] if len(readers) == 1 and value not in index.outputs else None


def _silu(index: GraphIndex, calls: Mapping[int, Call], i: int) -> Fused | None:
    product = _only_reader(index, i)
    if product is None or calls[product].operator != "Mul":
        return None
    x, gate = index.nodes[i].input[0], index.nodes[i].output[0]
    if sorted(index.nodes[product].input) != sorted([x, gate]):
        return None
    return Fused((i, product), (x,), index.nodes[product].output[0], functional.silu)


def _group_norm(index: GraphIndex, calls: Mapping[int, Call], fixed: Mapping[str, Array], i: int) -> Fused | None:
    _, scale, bias = index.nodes[i].input
    first, last = index.producer.get(index.nodes[i].input[0], -1), _only_reader(index, i)
    if first not in calls or last is None or _only_reader(index, first) != i:
        return None
    if calls[first].operator != "Reshape" or calls[last].operator != "Reshape":
        return None
    shape, folded = calls[first].shape(0), calls[i].shape(0)
    plain = scale in fixed and bias in fixed and bool(np.all(fixed[scale] == 1)) and not np.any(fixed[bias])
    if not plain or calls[last].results[0] != shape or len(shape) < 3 or shape[0] != folded[0]:
        return None
    nodes, reads = [first, i, last], [index.nodes[first].input[0]]
    groups, epsilon = folded[1], calls[i].attributes.get("epsilon", 1e-5)
    if shape[1] % groups:
        return None
    for operator in ("Mul", "Add"):
        following = _only_reader(index, nodes[-1])
        if following is None or calls[following].operator != operator:
            break
        inputs = list(index.nodes[following].input)
        inputs.remove(index.nodes[nodes[-1]].output[0])
        position = list(index.nodes[following].input).index(inputs[0])
        # [C, 1, 1] or [1, C, 1, 1]: one number a channel.
        if index.is_constant(inputs[0]) and _per_channel(calls[following].shape(position), shape):
            nodes.append(following)
            reads.append(inputs[0])
        else:
            break

    def run(x: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        weight = None if scale is None else scale.reshape(-1)
        return torch.group_norm(x, groups, weight, None if bias is None else bias.reshape(-1), epsilon)

    return Fused(tuple(nodes), tuple(reads), index.nodes[nodes[-1]].output[0], run)


def _per_channel(shape: tuple[int, ...], image: tuple[int, ...]) -> bool:
    spatial = (1,) * (len(image) - 2)
    return shape in ((image[1], *spatial), (1, image[1], *spatial))

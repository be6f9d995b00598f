"""How much a model computes: multiply-accumulates of its convolutions and matrix products.

The usual currency for networks' costs, the same on every machine: what two exits cost relative to each other is
read off without a clock. Time is measured beside it, because memory traffic and small operators are not in this count.
"""

from __future__ import annotations

import math

import onnx
from onnx import ModelProto, NodeProto, helper

from ...engine.errors import ExportError
from .index import GraphIndex

__all__ = ["count_macs"]

_COUNTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


def count_macs(model: ModelProto) -> int:
    """Multiply-accumulates of one run: Conv, ConvTranspose, Gemm and MatMul; biases and all other operators are free.

    Nodes that depend on no input count nothing: an executor folds them away when it loads the model.

    Args:
        model: A model of fixed shapes; values without a recorded shape are inferred.

    Returns:
        Their number. A multiplication by a padding's zero counts like any other.

    Raises:
        ExportError: If the shape of a value that is needed is not known.
    """
    index = GraphIndex(model)
    shapes = _shapes(index)
    if any(name not in shapes for i in _counted(index) for name in _needed(index.nodes[i])):
        index = GraphIndex(onnx.shape_inference.infer_shapes(model, data_prop=True))
        shapes = _shapes(index)
    total = 0
    for i in _counted(index):
        node = index.nodes[i]
        unknown = [name for name in _needed(node) if name not in shapes]
        if unknown:
            raise ExportError(
                f"value {unknown[0]!r} at node {index.names[i]!r} has no known shape, so its multiply-accumulates "
                "cannot be counted; export the model with fixed shapes"
            )
        total += _macs(node, shapes)
    return total


def _counted(index: GraphIndex) -> list[int]:
    return [
        i
        for i, node in enumerate(index.nodes)
        if node.op_type in _COUNTED and node.domain in ("", "ai.onnx") and i not in index.constant
    ]


def _needed(node: NodeProto) -> tuple[str, str, str]:
    return node.input[0], node.input[1], node.output[0]


def _shapes(index: GraphIndex) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {name: spec.shape for name, spec in index.specs.items()}
    return shapes | {name: tuple(tensor.dims) for name, tensor in index.initializers.items()}


def _macs(node: NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    first, second, made = (shapes[name] for name in _needed(node))
    if node.op_type == "Conv":  # weight [out, in / group, *kernel]: every result sums over one group's channels
        return math.prod(made) * math.prod(second[1:])
    if node.op_type == "ConvTranspose":  # weight [in, out / group, *kernel]: every input value is spread over a kernel
        return math.prod(first) * math.prod(second[1:])
    if node.op_type == "Gemm":
        transposed = next((helper.get_attribute_value(a) for a in node.attribute if a.name == "transA"), 0)
        return math.prod(made) * first[0 if transposed else 1]
    return math.prod(made) * first[-1]

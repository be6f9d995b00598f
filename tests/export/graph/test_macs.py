"""Multiply-accumulates against numbers worked out by hand, and against sums over PyTorch's own modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from warpcache.engine.errors import ExportError
from warpcache.export.graph.macs import count_macs
from warpcache.export.graph.trace import trace_generator


def one_node(
    op: str, *shapes: tuple[int, ...], out: tuple[Any, ...] | None = None, variable: bool = True, **attributes: Any
) -> onnx.ModelProto:
    """A model of one node: its first operand is an input (not `variable`: an initializer), the others are weights."""
    names = [f"v{k}" for k in range(len(shapes))]
    fixed = names[1:] if variable else names
    weights = [
        numpy_helper.from_array(np.zeros(shape, np.float32), name)
        for name, shape in zip(names, shapes, strict=True)
        if name in fixed
    ]
    inputs = [helper.make_tensor_value_info("v0", TensorProto.FLOAT, shapes[0])] if variable else []
    graph = helper.make_graph(
        [helper.make_node(op, names, ["y"], **attributes)],
        "g",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, out)],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


@pytest.mark.parametrize(
    ("model", "macs"),
    [
        # 5 x 6 places, 4 channels out, each over 3 channels of 3 x 3.
        (one_node("Conv", (1, 3, 5, 6), (4, 3, 3, 3), (4,), pads=[1, 1, 1, 1]), 5 * 6 * 4 * 3 * 9),
        # Stride 2 without padding: 2 x 2 places.
        (one_node("Conv", (1, 3, 5, 6), (4, 3, 3, 3), strides=[2, 2]), 2 * 2 * 4 * 3 * 9),
        # Two groups: each result sees 2 of 4 channels.
        (one_node("Conv", (1, 4, 5, 5), (6, 2, 1, 1), group=2), 25 * 6 * 2),
        # One dimension, and a batch of 2.
        (one_node("Conv", (2, 3, 10), (8, 3, 5)), 2 * 6 * 8 * 3 * 5),
        # Each of 4 x 4 places of 3 channels goes to 2 channels of 4 x 4.
        (one_node("ConvTranspose", (1, 3, 4, 4), (3, 2, 4, 4), strides=[2, 2], pads=[1, 1, 1, 1]), 16 * 3 * 2 * 16),
        (one_node("ConvTranspose", (1, 4, 4, 4), (4, 3, 2, 2), strides=[2, 2], group=2), 16 * 4 * 3 * 4),
        (one_node("Gemm", (2, 5), (5, 7), (7,)), 2 * 5 * 7),
        (one_node("Gemm", (5, 2), (7, 5), transA=1, transB=1), 2 * 5 * 7),
        (one_node("MatMul", (4, 5), (5, 7)), 4 * 5 * 7),
        # Batches that broadcast: 3 x 2 products.
        (one_node("MatMul", (3, 1, 4, 5), (2, 5, 7)), 3 * 2 * 4 * 5 * 7),
        (one_node("MatMul", (5,), (5, 7)), 5 * 7),
        # Folded away when it is loaded.
        (one_node("MatMul", (4, 5), (5, 7), variable=False), 0),
        (one_node("Relu", (4, 5)), 0),
    ],
)
def test_by_hand(model: onnx.ModelProto, macs: int) -> None:
    assert count_macs(model) == macs


def test_unknown_shapes_are_refused() -> None:
    with pytest.raises(ExportError, match=r"^value 'v0' at node 'node_Conv__0' has no known shape"):
        count_macs(one_node("Conv", (1, 3, "h", "w"), (4, 3, 3, 3)))  # type: ignore[arg-type]


def by_hooks(module: nn.Module, example: dict[str, np.ndarray]) -> int:
    """Sum over the PyTorch modules that ran, each by its own attributes: what fvcore and ptflops count."""
    total = 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            rows, columns = layer.kernel_size
            total += output.numel() * layer.in_channels // layer.groups * rows * columns
        elif isinstance(layer, nn.ConvTranspose2d):
            rows, columns = layer.kernel_size
            total += inputs[0].numel() * layer.out_channels // layer.groups * rows * columns
        elif isinstance(layer, nn.Linear):
            total += output.numel() * layer.in_features

    hooks = [layer.register_forward_hook(count) for layer in module.modules()]
    with torch.no_grad():
        module(**{name: torch.from_numpy(array[:1]) for name, array in example.items()})
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize(
    ("name", "products"), [("unet", 0), ("residual", 0), ("latent", 0), ("attention", 2 * 2 * 64 * 64 * 8)]
)
def test_traced_generators(trace: Callable[[str], Any], name: str, products: int) -> None:
    traced = trace(name)
    # Beside its layers, attention multiplies queries by keys and weights by values: 2 heads of 64 x 64 x 8 each.
    assert count_macs(traced.model) == by_hooks(traced.module, traced.stream) + products


def test_shapes_that_were_not_recorded_are_inferred(trace: Callable[[str], Any]) -> None:
    model = trace_generator(nn.Conv2d(3, 8, 3), {"input": np.zeros((1, 3, 8, 8), np.float32)})
    bare = onnx.ModelProto()
    bare.CopyFrom(trace("unet").model)
    del bare.graph.value_info[:]
    assert count_macs(bare) == count_macs(trace("unet").model)
    assert count_macs(model) == 36 * 8 * 27

"""ONNX operators as differentiable PyTorch functions, for `graph_module`.

An operator's *maker* reads a node's attributes and settings once and returns the function that runs it, so that what
PyTorch cannot do is refused before the first run. The functions take tensors of more than one frame, stacked along
the leading axis, wherever `graph_batch` says that the operator keeps frames apart.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from onnx import TensorProto
from torch import Tensor
from torch.nn import functional

from .calls import Call, Maker, Run, as_many_frames
from .image_operators import IMAGE_OPERATORS

__all__ = ["OPERATORS", "SETTINGS"]

SETTINGS: dict[str, frozenset[int]] = {
    "BatchNormalization": frozenset({3, 4}),
    "Clip": frozenset({1, 2}),
    "Expand": frozenset({1}),
    "Pad": frozenset({1, 2, 3}),
    "Pow": frozenset({1}),
    "Resize": frozenset({1, 2, 3}),
    "Tile": frozenset({1}),
}
"""Operator -> inputs that say how it works. What they read is not trained, even where it is floating-point."""

_DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.INT64: torch.int64,
    TensorProto.INT32: torch.int32,
    TensorProto.INT16: torch.int16,
    TensorProto.INT8: torch.int8,
    TensorProto.UINT8: torch.uint8,
    TensorProto.BOOL: torch.bool,
}


def _plain(function: Callable[..., Tensor]) -> Maker:
    """Operators that are one function of their inputs, whatever else the node says."""
    return lambda call: function


def _pairwise(function: Callable[[Tensor, Tensor], Tensor]) -> Maker:
    """Operators of any number of inputs, taken two by two."""
    return lambda call: lambda *inputs: functools.reduce(function, inputs)


def _divide(call: Call) -> Run:
    def run(a: Tensor, b: Tensor) -> Tensor:
        # ONNX divides integers towards zero; torch would give a fraction.
        whole = not (a.is_floating_point() or b.is_floating_point())
        return torch.div(a, b, rounding_mode="trunc") if whole else a / b

    return run


def _modulo(call: Call) -> Run:
    return torch.fmod if call.attributes.get("fmod", 0) else torch.remainder


def _leaky_relu(call: Call) -> Run:
    return lambda x: functional.leaky_relu(x, call.attributes.get("alpha", 0.01))


def _elu(call: Call) -> Run:
    return lambda x: functional.elu(x, call.attributes.get("alpha", 1.0))


def _selu(call: Call) -> Run:
    alpha, gamma = call.attributes.get("alpha", 1.67326319), call.attributes.get("gamma", 1.05070102)
    return lambda x: gamma * functional.elu(x, alpha)


def _gelu(call: Call) -> Run:
    return lambda x: functional.gelu(x, approximate=call.attributes.get("approximate", "none"))


def _hard_sigmoid(call: Call) -> Run:
    alpha, beta = call.attributes.get("alpha", 0.2), call.attributes.get("beta", 0.5)
    return lambda x: torch.clamp(alpha * x + beta, 0.0, 1.0)


def _clip(call: Call) -> Run:
    def run(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
        if low is not None:
            x = torch.maximum(x, low)
        return x if high is None else torch.minimum(x, high)

    return run


def _cast(call: Call) -> Run:
    dtype = _DTYPES.get(call.attributes["to"])
    if dtype is None:
        raise call.refuse(f"it casts to {TensorProto.DataType.Name(call.attributes['to'])}")
    return lambda x, *_: x.to(dtype)


def _reshape(call: Call) -> Run:
    before, after = call.shape(0), call.results[0]
    if before and after and before[0] == after[0] == 1:
        # The frames stay where they are, however many there are.
        return lambda x, *_: x.reshape(x.shape[0], *after[1:])
    return lambda x, *_: x.reshape(after)


def _expand(call: Call) -> Run:
    before, after = call.shape(0), call.results[0]
    if before and len(before) == len(after) and before[0] == after[0]:
        return lambda x, *_: x.expand(x.shape[0], *after[1:])
    return lambda x, *_: x.expand(after)


def _tile(call: Call) -> Run:
    repeats = call.integers(1)
    return lambda x, *_: x.repeat(repeats)


def _transpose(call: Call) -> Run:
    order = call.attributes.get("perm", tuple(reversed(range(len(call.shape(0))))))
    return lambda x: x.permute(order)


def _concat(call: Call) -> Run:
    axis = call.attributes["axis"] % len(call.results[0])

    def run(*parts: Tensor) -> Tensor:
        return torch.cat(as_many_frames(parts) if axis else parts, axis)

    return run


def _split(call: Call) -> Run:
    axis = call.attributes.get("axis", 0)
    sizes = [shape[axis] for shape in call.results]
    return lambda x, *_: torch.split(x, sizes, axis)


def _slice(call: Call) -> Run:
    shape = call.shape(0)
    starts, ends = call.integers(1), call.integers(2)
    axes = call.integers(3) if call.has(3) else list(range(len(starts)))
    steps = call.integers(4) if call.has(4) else [1] * len(starts)
    picks: list[tuple[int, range]] = []
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        pick = range(*slice(start, end, step).indices(shape[axis]))
        if pick != range(shape[axis]):
            picks.append((axis % len(shape), pick))

    def run(x: Tensor, *_: Tensor) -> Tensor:
        for axis, pick in picks:
            if pick.step > 0:
                # range.stop may lie behind the last one by more than a step, which slicing does not mind.
                x = x[(slice(None),) * axis + (slice(pick.start, pick.stop, pick.step),)]
            else:
                x = x.index_select(axis, torch.tensor(list(pick), device=x.device))
        return x

    return run


def _gather(call: Call) -> Run:
    shape = call.shape(0)
    axis = call.attributes.get("axis", 0) % len(shape)
    fixed = call.read_constant(1)
    if fixed is not None and fixed.ndim == 0:
        return lambda x, _: x.select(axis, int(fixed))

    def run(x: Tensor, indices: Tensor) -> Tensor:
        places = torch.where(indices < 0, indices + x.shape[axis], indices)
        picked = x.index_select(axis, places.reshape(-1))
        return picked.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])

    return run


def _gather_elements(call: Call) -> Run:
    axis = call.attributes.get("axis", 0)

    def run(x: Tensor, indices: Tensor) -> Tensor:
        x, indices = as_many_frames((x, indices)) if axis else (x, indices)
        return torch.gather(x, axis, torch.where(indices < 0, indices + x.shape[axis], indices))

    return run


def _top_k(call: Call) -> Run:
    (k,) = call.integers(1)
    axis, largest = call.attributes.get("axis", -1), bool(call.attributes.get("largest", 1))

    def run(x: Tensor, _: Tensor) -> Sequence[Tensor]:
        # Of equal values the first comes first, which torch.topk does not promise.
        values, indices = torch.sort(x, dim=axis, descending=largest, stable=True)
        return values.narrow(axis, 0, k), indices.narrow(axis, 0, k)

    return run


def _gemm(call: Call) -> Run:
    alpha, beta = call.attributes.get("alpha", 1.0), call.attributes.get("beta", 1.0)
    flip_a, flip_b = call.attributes.get("transA", 0), call.attributes.get("transB", 0)

    def run(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        result = torch.matmul(a.mT if flip_a else a, b.mT if flip_b else b)
        result = result if alpha == 1.0 else alpha * result
        return result if c is None else result + (c if beta == 1.0 else beta * c)

    return run


def _einsum(call: Call) -> Run:
    return lambda *inputs: torch.einsum(call.attributes["equation"], *inputs)


def _reduce(function: Callable[..., Tensor]) -> Maker:
    def make(call: Call) -> Run:
        axes, keep = tuple(call.axes()), bool(call.attributes.get("keepdims", 1))
        if not axes:  # noop_with_empty_axes
            return lambda x, *_: x
        return lambda x, *_: function(x, axes, keepdim=keep)

    return make


def _softmax(call: Call) -> Run:
    axis = call.attributes.get("axis", -1)
    function = functional.log_softmax if call.operator == "LogSoftmax" else functional.softmax
    return lambda x: function(x, axis)


OPERATORS: dict[str, Maker] = {
    **IMAGE_OPERATORS,
    "Abs": _plain(torch.abs),
    "Add": _pairwise(torch.add),
    "And": _pairwise(torch.logical_and),
    "Cast": _cast,
    "Ceil": _plain(torch.ceil),
    "Clip": _clip,
    "Concat": _concat,
    "Cos": _plain(torch.cos),
    "Div": _divide,
    "Dropout": _plain(lambda x, *_: x),
    "Einsum": _einsum,
    "Elu": _elu,
    "Equal": _pairwise(torch.eq),
    "Erf": _plain(torch.erf),
    "Exp": _plain(torch.exp),
    "Expand": _expand,
    "Flatten": _reshape,
    "Floor": _plain(torch.floor),
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "Greater": _pairwise(torch.gt),
    "GreaterOrEqual": _pairwise(torch.ge),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _plain(functional.hardswish),
    "Identity": _plain(lambda x: x),
    "LeakyRelu": _leaky_relu,
    "Less": _pairwise(torch.lt),
    "LessOrEqual": _pairwise(torch.le),
    "Log": _plain(torch.log),
    "LogSoftmax": _softmax,
    "MatMul": _pairwise(torch.matmul),
    "Max": _pairwise(torch.maximum),
    "Mean": _plain(lambda *inputs: functools.reduce(torch.add, inputs) / len(inputs)),
    "Min": _pairwise(torch.minimum),
    "Mish": _plain(functional.mish),
    "Mod": _modulo,
    "Mul": _pairwise(torch.mul),
    "Neg": _plain(torch.neg),
    "Not": _plain(torch.logical_not),
    "Or": _pairwise(torch.logical_or),
    "PRelu": _plain(lambda x, slope: torch.where(x < 0, x * slope, x)),
    # ONNX gives the base's type, torch the wider one.
    "Pow": _plain(lambda x, exponent: torch.pow(x, exponent).to(x.dtype)),
    "Reciprocal": _plain(torch.reciprocal),
    "ReduceL1": _reduce(lambda x, axes, keepdim: x.abs().sum(axes, keepdim)),
    "ReduceL2": _reduce(lambda x, axes, keepdim: torch.linalg.vector_norm(x, 2, axes, keepdim)),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMin": _reduce(torch.amin),
    "ReduceSum": _reduce(torch.sum),
    "ReduceSumSquare": _reduce(lambda x, axes, keepdim: x.square().sum(axes, keepdim)),
    "Relu": _plain(torch.relu),
    "Reshape": _reshape,
    "Round": _plain(torch.round),
    "Selu": _selu,
    "Sigmoid": _plain(torch.sigmoid),
    "Sign": _plain(torch.sign),
    "Sin": _plain(torch.sin),
    "Slice": _slice,
    "Softmax": _softmax,
    "Softplus": _plain(functional.softplus),
    "Softsign": _plain(functional.softsign),
    "Split": _split,
    "Sqrt": _plain(torch.sqrt),
    "Squeeze": _reshape,
    "Sub": _pairwise(torch.sub),
    "Sum": _pairwise(torch.add),
    "Tan": _plain(torch.tan),
    "Tanh": _plain(torch.tanh),
    "Tile": _tile,
    "TopK": _top_k,
    "Transpose": _transpose,
    "Unsqueeze": _reshape,
    "Where": _plain(torch.where),
    "Xor": _pairwise(torch.logical_xor),
}
"""ONNX operator -> maker of the function that runs one node."""

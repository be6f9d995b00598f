"""ONNX operators as differentiable PyTorch functions, for `graph_module`.

An operator's *maker* reads a node's attributes and settings once and returns the function that runs it, so that what
PyTorch cannot do is refused before the first run. The functions take tensors of more than one frame, stacked along
the leading axis, wherever `graph_batch` says that the operator keeps frames apart.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor
from torch.nn import functional

from ..engine.errors import ExportError
from ..engine.spec import Array

__all__ = ["OPERATORS", "SETTINGS", "Call", "Run"]

Shape = tuple[int, ...]
Run = Callable[..., Tensor | Sequence[Tensor]]
"""Takes the node's inputs in order (None for those left out), gives its output, or all of them."""

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
_LINEAR = {3: "linear", 4: "bilinear", 5: "trilinear"}
# torch's bicubic interpolation has this coefficient built in.
_CUBIC_COEFFICIENT = -0.75


@dataclass(frozen=True)
class Call:
    """One node with what is known about it before anything runs.

    Attributes:
        operator: Its operator.
        name: Its name.
        attributes: Attribute name -> value; strings as `str`.
        read_constant: Position of an input -> its value, None where that is computed from graph inputs.
        shapes: Traced shapes of the inputs; None for those left out.
        results: Traced shapes of the outputs.
    """

    operator: str
    name: str
    attributes: Mapping[str, Any]
    read_constant: Callable[[int], Array | None]
    shapes: tuple[Shape | None, ...]
    results: tuple[Shape, ...]

    def has(self, position: int) -> bool:
        """Whether the optional input is given."""
        return position < len(self.shapes) and self.shapes[position] is not None

    def shape(self, position: int) -> Shape:
        """Traced shape of an input that is given."""
        shape = self.shapes[position]
        assert shape is not None
        return shape

    def setting(self, position: int) -> Array:
        """Value of an input that has to be a constant.

        Raises:
            ExportError: If it depends on the graph's inputs.
        """
        value = self.read_constant(position)
        if value is None:
            raise self.refuse(f"input {position} depends on the graph's inputs")
        return value

    def integers(self, position: int) -> list[int]:
        """A constant input as a list of integers."""
        return [int(value) for value in self.setting(position).reshape(-1)]

    def axes(self, position: int = 1) -> list[int]:
        """Non-negative axes of input 0 that a constant input, or the attribute ``axes``, names; all where none does."""
        rank = len(self.shape(0))
        named = self.integers(position) if self.has(position) else list(self.attributes.get("axes", ()))
        if not named:
            return [] if self.attributes.get("noop_with_empty_axes", 0) else list(range(rank))
        return [axis % rank for axis in named]

    def refuse(self, why: str) -> ExportError:
        """The error for what PyTorch cannot do, to be raised."""
        return ExportError(f"node {self.name!r} ({self.operator}) cannot run in PyTorch: {why}; train another part")


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[[Call], Run]:
    return lambda call: function


def _pairwise(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Call], Run]:
    """Operators of any number of inputs, taken two by two."""
    return lambda call: lambda *inputs: functools.reduce(function, inputs)


def _mean(call: Call) -> Run:
    return lambda *inputs: functools.reduce(torch.add, inputs) / len(inputs)


def _divide(call: Call) -> Run:
    def run(a: Tensor, b: Tensor) -> Tensor:
        # ONNX divides integers towards zero; torch would give a fraction.
        whole = not (a.is_floating_point() or b.is_floating_point())
        return torch.div(a, b, rounding_mode="trunc") if whole else a / b

    return run


def _modulo(call: Call) -> Run:
    return torch.fmod if call.attributes.get("fmod", 0) else torch.remainder


def _where(call: Call) -> Run:
    return lambda condition, a, b: torch.where(condition, a, b)


def _pow(call: Call) -> Run:
    # ONNX gives the base's type, torch the wider one.
    return lambda x, exponent: torch.pow(x, exponent).to(x.dtype)


def _leaky_relu(call: Call) -> Run:
    return lambda x: functional.leaky_relu(x, call.attributes.get("alpha", 0.01))


def _prelu(call: Call) -> Run:
    return lambda x, slope: torch.where(x < 0, x * slope, x)


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
        return torch.cat(_as_many_frames(parts) if axis else parts, axis)

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
        x, indices = _as_many_frames((x, indices)) if axis else (x, indices)
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


def _spatial_pads(call: Call, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> list[int]:
    """Explicit pads, beginnings first, whatever ``auto_pad`` says."""
    n = len(kernel)
    mode = call.attributes.get("auto_pad", "NOTSET")
    if mode == "NOTSET":
        return list(call.attributes.get("pads", [0] * 2 * n))
    if mode == "VALID":
        return [0] * 2 * n
    totals = [
        max((-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        for size, k, stride, dilation in zip(call.shape(0)[2:], kernel, strides, dilations, strict=True)
    ]
    small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return small + large if mode == "SAME_UPPER" else large + small


def _per_axis(call: Call, name: str, n: int) -> list[int]:
    return list(call.attributes.get(name, [1] * n))


def _padded(x: Tensor, pads: Sequence[int], value: float = 0.0) -> Tensor:
    """`x` with ONNX's spatial pads (all beginnings, then all ends)."""
    n = len(pads) // 2
    return functional.pad(x, [p for axis in reversed(range(n)) for p in (pads[axis], pads[n + axis])], value=value)


def _conv(call: Call) -> Run:
    kernel = call.shape(1)[2:]
    n = len(kernel)
    strides, dilations = _per_axis(call, "strides", n), _per_axis(call, "dilations", n)
    pads = _spatial_pads(call, kernel, strides, dilations)
    groups = call.attributes.get("group", 1)
    if n not in (1, 2, 3):
        raise call.refuse(f"it has {n} spatial axes")
    function = (functional.conv1d, functional.conv2d, functional.conv3d)[n - 1]
    even = pads[:n] == pads[n:]

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        inner = pads[:n] if even else [0] * n
        return function(x if even else _padded(x, pads), weight, bias, strides, inner, dilations, groups)

    return run


def _conv_transpose(call: Call) -> Run:
    kernel = call.shape(1)[2:]
    n = len(kernel)
    if call.attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or "output_shape" in call.attributes:
        raise call.refuse("its padding follows from its output's shape")
    if n not in (1, 2, 3):
        raise call.refuse(f"it has {n} spatial axes")
    function = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[n - 1]
    strides, dilations = _per_axis(call, "strides", n), _per_axis(call, "dilations", n)
    extra = list(call.attributes.get("output_padding", [0] * n))
    pads = _spatial_pads(call, kernel, strides, dilations)
    groups = call.attributes.get("group", 1)
    even = pads[:n] == pads[n:]

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        inner = pads[:n] if even else [0] * n
        result = function(x, weight, bias, strides, inner, extra, groups, dilations)
        return result if even else _padded(result, [-pad for pad in pads])

    return run


def _pool(call: Call) -> Run:
    kernel = list(call.attributes["kernel_shape"])
    n = len(kernel)
    strides, dilations = _per_axis(call, "strides", n), _per_axis(call, "dilations", n)
    pads = _spatial_pads(call, kernel, strides, dilations)
    reach = [(k - 1) * dilation + 1 for k, dilation in zip(kernel, dilations, strict=True)]
    fitting = tuple(
        (size + pads[axis] + pads[n + axis] - reach[axis]) // strides[axis] + 1
        for axis, size in enumerate(call.shape(0)[2:])
    )
    if fitting != call.results[0][2:]:
        raise call.refuse("its last windows reach over the border (ceil_mode)")
    if n not in (1, 2, 3):
        raise call.refuse(f"it has {n} spatial axes")
    padded = any(pads)
    if call.operator == "MaxPool":
        if len(call.results) > 1:
            raise call.refuse("its indices are read")
        largest: Callable[..., Tensor] = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[n - 1]

        def run_max(x: Tensor) -> Tensor:
            return largest(_padded(x, pads, -math.inf) if padded else x, kernel, strides, 0, dilations)

        return run_max
    if any(dilation != 1 for dilation in dilations):
        raise call.refuse("it is dilated")
    average = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[n - 1]
    counted = bool(call.attributes.get("count_include_pad", 0))

    def run_average(x: Tensor) -> Tensor:
        if not padded:
            return average(x, kernel, strides)
        result = average(_padded(x, pads), kernel, strides)
        if counted:
            return result
        # Share of each window that lies inside the image.
        inside = average(_padded(torch.ones_like(x[:1, :1]), pads), kernel, strides)
        return result / inside

    return run_average


def _global_pool(call: Call) -> Run:
    axes = tuple(range(2, len(call.shape(0))))
    if call.operator == "GlobalMaxPool":
        return lambda x: torch.amax(x, axes, keepdim=True)
    return lambda x: torch.mean(x, axes, keepdim=True)


def _reduce(function: Callable[..., Tensor]) -> Callable[[Call], Run]:
    def make(call: Call) -> Run:
        axes, keep = tuple(call.axes()), bool(call.attributes.get("keepdims", 1))
        if not axes:  # noop_with_empty_axes
            return lambda x, *_: x
        return lambda x, *_: function(x, axes, keepdim=keep)

    return make


def _norm_l2(x: Tensor, axes: tuple[int, ...], keepdim: bool) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, 2, axes, keepdim)
    return norm


def _norm_l1(x: Tensor, axes: tuple[int, ...], keepdim: bool) -> Tensor:
    return x.abs().sum(axes, keepdim)


def _sum_square(x: Tensor, axes: tuple[int, ...], keepdim: bool) -> Tensor:
    return x.square().sum(axes, keepdim)


def _softmax(call: Call) -> Run:
    axis = call.attributes.get("axis", -1)
    function = functional.log_softmax if call.operator == "LogSoftmax" else functional.softmax
    return lambda x: function(x, axis)


def _batch_norm(call: Call) -> Run:
    epsilon = call.attributes.get("epsilon", 1e-5)
    if call.attributes.get("training_mode", 0):
        raise call.refuse("it is in training mode")

    def run(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return functional.batch_norm(x, mean, variance, scale, bias, False, 0.0, epsilon)

    return run


def _instance_norm(call: Call) -> Run:
    epsilon = call.attributes.get("epsilon", 1e-5)

    def run(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        # As many groups as channels. functional.instance_norm refuses images of one pixel, where ONNX gives the bias.
        return torch.group_norm(x, x.shape[1], scale, bias, epsilon)

    return run


def _group_norm(call: Call) -> Run:
    epsilon, groups = call.attributes.get("epsilon", 1e-5), call.attributes["num_groups"]
    channels = call.shape(0)[1]

    def run(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        # Before operator set 21 there was one scale a group.
        each = channels // scale.shape[0]
        return torch.group_norm(x, groups, scale.repeat_interleave(each), bias.repeat_interleave(each), epsilon)

    return run


def _layer_norm(call: Call) -> Run:
    shape = call.shape(0)
    epsilon, axis = call.attributes.get("epsilon", 1e-5), call.attributes.get("axis", -1) % len(shape)
    normalised = list(shape[axis:])
    if len(call.results) > 1:
        raise call.refuse("its mean or deviation is read")

    def run(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        if list(scale.shape) == normalised and (bias is None or list(bias.shape) == normalised):
            return functional.layer_norm(x, normalised, scale, bias, epsilon)
        result = functional.layer_norm(x, normalised, eps=epsilon) * scale
        return result if bias is None else result + bias

    return run


def _grid_sample(call: Call) -> Run:
    mode = call.attributes.get("mode", "linear")
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    padding, aligned = call.attributes.get("padding_mode", "zeros"), bool(call.attributes.get("align_corners", 0))
    if len(call.shape(0)) == 5 and mode == "bicubic":
        raise call.refuse("it interpolates volumes cubically")

    def run(x: Tensor, grid: Tensor) -> Tensor:
        x, grid = _as_many_frames((x, grid))
        # Under autocast one of the two may be half precision; coordinates must not be, see `casting`.
        dtype = torch.promote_types(x.dtype, grid.dtype)
        return functional.grid_sample(x.to(dtype), grid.to(dtype), mode, padding, aligned)

    return run


def _pad(call: Call) -> Run:
    rank, mode = len(call.shape(0)), call.attributes.get("mode", "constant")
    given = call.integers(1)
    axes = [axis % rank for axis in call.integers(3)] if call.has(3) else list(range(rank))
    value = call.setting(2).item() if call.has(2) else 0
    pads = [0] * (2 * rank)  # torch's order: last axis first, beginning and end together
    for k, axis in enumerate(axes):
        pads[2 * (rank - 1 - axis)], pads[2 * (rank - 1 - axis) + 1] = given[k], given[len(axes) + k]
    if mode == "constant":
        return lambda x, *_: functional.pad(x, pads, value=value)
    spatial = 2 * (rank - 2)
    if any(pads[spatial:]):
        raise call.refuse(f"it pads batch or channels in mode {mode!r}")
    torch_mode = {"edge": "replicate", "wrap": "circular"}.get(mode, mode)
    return lambda x, *_: functional.pad(x, pads[:spatial], torch_mode)


def _depth_to_space(call: Call) -> Run:
    size, mode = call.attributes["blocksize"], call.attributes.get("mode", "DCR")
    if mode == "CRD":
        return lambda x: functional.pixel_shuffle(x, size)

    def run(x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        inner = channels // size**2
        parts = x.reshape(n, size, size, inner, height, width).permute(0, 3, 4, 1, 5, 2)
        return parts.reshape(n, inner, height * size, width * size)

    return run


def _space_to_depth(call: Call) -> Run:
    size = call.attributes["blocksize"]
    if call.attributes.get("mode", "DCR") == "CRD":
        return lambda x: functional.pixel_unshuffle(x, size)

    def run(x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        parts = x.reshape(n, channels, height // size, size, width // size, size).permute(0, 3, 5, 1, 2, 4)
        return parts.reshape(n, channels * size**2, height // size, width // size)

    return run


def _resize(call: Call) -> Run:
    before, after = call.shape(0), call.results[0]
    rank = len(before)
    attributes = call.attributes
    mode = attributes.get("mode", "nearest")
    coordinates = attributes.get("coordinate_transformation_mode", "half_pixel")
    scales = [new / old for old, new in zip(before, after, strict=True)]
    if call.has(2) and call.shape(2) != (0,):
        axes = attributes.get("axes", range(rank))
        for axis, scale in zip(axes, call.setting(2).reshape(-1).tolist(), strict=True):
            scales[axis] = scale
    elif attributes.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise call.refuse("it keeps the aspect ratio")
    if coordinates == "tf_crop_and_resize":
        raise call.refuse("it crops as well (tf_crop_and_resize)")
    if mode == "nearest":
        return _resize_nearest(call, scales, coordinates)
    if rank not in _LINEAR or before[:2] != after[:2] or scales[:2] != [1.0, 1.0]:
        raise call.refuse("it resizes the batch or the channels")
    aligned = coordinates == "align_corners"
    # The two differ at outputs of one pixel, where only pytorch_half_pixel takes the first one.
    alike = coordinates == "pytorch_half_pixel" and 1 not in after[2:]
    if not (aligned or coordinates == "half_pixel" or alike):
        raise call.refuse(f"coordinate mode {coordinates!r} is not among torch's")
    if attributes.get("exclude_outside", 0):
        raise call.refuse("it leaves out what lies outside (exclude_outside)")
    if attributes.get("antialias", 0):
        raise call.refuse("it smooths (antialias), where torch weighs the border in another way")
    if mode == "cubic":
        if attributes.get("cubic_coeff_a", _CUBIC_COEFFICIENT) != _CUBIC_COEFFICIENT or rank != 4:
            raise call.refuse("its cubic coefficient or rank is not torch's")
        name = "bicubic"
    else:
        name = _LINEAR[rank]
    exact = all(old * scale == new for old, new, scale in zip(before, after, scales, strict=True))
    if aligned and not exact:
        raise call.refuse("it aligns corners that its scales do not reach")

    def run(x: Tensor, *_: Tensor) -> Tensor:
        if exact:
            return functional.interpolate(x, size=after[2:], mode=name, align_corners=aligned)
        # The extent is rounded down, but positions follow the scale that was asked for.
        return functional.interpolate(x, scale_factor=scales[2:], mode=name, align_corners=False)

    return run


def _resize_nearest(call: Call, scales: Sequence[float], coordinates: str) -> Run:
    before, after = call.shape(0), call.results[0]
    rounding = call.attributes.get("nearest_mode", "round_prefer_floor")
    picks: list[tuple[int, Array]] = []
    plain = len(before) == 4 and before[:2] == after[:2]
    for axis, (old, new, scale) in enumerate(zip(before, after, scales, strict=True)):
        x = np.arange(new, dtype=np.float64)
        if coordinates == "asymmetric":
            x = x / scale
        elif coordinates == "align_corners":
            x = x * (old - 1) / (new - 1) if new > 1 else x * 0
        elif coordinates == "pytorch_half_pixel" and new == 1:
            x = x * 0
        elif coordinates in ("half_pixel", "pytorch_half_pixel", "half_pixel_symmetric"):
            shift = 0.0
            if coordinates == "half_pixel_symmetric":
                shift = old / 2 * (1 - new / (scale * old))
            x = shift + (x + 0.5) / scale - 0.5
        else:
            raise call.refuse(f"coordinate mode {coordinates!r} is not known")
        rounded = {
            "floor": np.floor(x),
            "ceil": np.ceil(x),
            "round_prefer_floor": np.ceil(x - 0.5),
            "round_prefer_ceil": np.floor(x + 0.5),
        }[rounding]
        source = np.clip(rounded, 0, old - 1).astype(np.int64)
        plain = plain and np.array_equal(source, np.arange(new) * old // new)
        if not np.array_equal(source, np.arange(old)):
            picks.append((axis, source))
    if plain:
        return lambda x, *_: functional.interpolate(x, size=after[2:], mode="nearest")

    def run(x: Tensor, *_: Tensor) -> Tensor:
        for axis, source in picks:
            x = x.index_select(axis, torch.from_numpy(source).to(x.device))
        return x

    return run


def _as_many_frames(parts: Sequence[Tensor]) -> list[Tensor]:
    """The tensors with those of one frame repeated for as many as the others have."""
    frames = max(part.shape[0] for part in parts)
    return [part if part.shape[0] == frames else part.expand(frames, *part.shape[1:]) for part in parts]


OPERATORS: dict[str, Callable[[Call], Run]] = {
    "Abs": _unary(torch.abs),
    "Add": _pairwise(torch.add),
    "And": _pairwise(torch.logical_and),
    "AveragePool": _pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Ceil": _unary(torch.ceil),
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Cos": _unary(torch.cos),
    "DepthToSpace": _depth_to_space,
    "Div": _divide,
    "Dropout": _unary(lambda x, *_: x),
    "Einsum": _einsum,
    "Elu": _elu,
    "Equal": _pairwise(torch.eq),
    "Erf": _unary(torch.erf),
    "Exp": _unary(torch.exp),
    "Expand": _expand,
    "Flatten": _reshape,
    "Floor": _unary(torch.floor),
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool,
    "Greater": _pairwise(torch.gt),
    "GreaterOrEqual": _pairwise(torch.ge),
    "GridSample": _grid_sample,
    "GroupNormalization": _group_norm,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _unary(functional.hardswish),
    "Identity": _unary(lambda x: x),
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "LeakyRelu": _leaky_relu,
    "Less": _pairwise(torch.lt),
    "LessOrEqual": _pairwise(torch.le),
    "Log": _unary(torch.log),
    "LogSoftmax": _softmax,
    "MatMul": _pairwise(torch.matmul),
    "Max": _pairwise(torch.maximum),
    "MaxPool": _pool,
    "Mean": _mean,
    "Min": _pairwise(torch.minimum),
    "Mish": _unary(functional.mish),
    "Mod": _modulo,
    "Mul": _pairwise(torch.mul),
    "Neg": _unary(torch.neg),
    "Not": _unary(torch.logical_not),
    "Or": _pairwise(torch.logical_or),
    "PRelu": _prelu,
    "Pad": _pad,
    "Pow": _pow,
    "Reciprocal": _unary(torch.reciprocal),
    "ReduceL1": _reduce(_norm_l1),
    "ReduceL2": _reduce(_norm_l2),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMin": _reduce(torch.amin),
    "ReduceSum": _reduce(torch.sum),
    "ReduceSumSquare": _reduce(_sum_square),
    "Relu": _unary(torch.relu),
    "Reshape": _reshape,
    "Resize": _resize,
    "Round": _unary(torch.round),
    "Selu": _selu,
    "Sigmoid": _unary(torch.sigmoid),
    "Sign": _unary(torch.sign),
    "Sin": _unary(torch.sin),
    "Slice": _slice,
    "Softmax": _softmax,
    "Softplus": _unary(functional.softplus),
    "Softsign": _unary(functional.softsign),
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Sqrt": _unary(torch.sqrt),
    "Squeeze": _reshape,
    "Sub": _pairwise(torch.sub),
    "Sum": _pairwise(torch.add),
    "Tan": _unary(torch.tan),
    "Tanh": _unary(torch.tanh),
    "Tile": _tile,
    "TopK": _top_k,
    "Transpose": _transpose,
    "Unsqueeze": _reshape,
    "Where": _where,
    "Xor": _pairwise(torch.logical_xor),
}
"""ONNX operator -> maker of the function that runs one node."""

"""ONNX operators on images as PyTorch functions: convolutions, pools, norms, borders and sampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ...engine.spec import Array
from .calls import Call, Maker, Run, as_many_frames

__all__ = ["IMAGE_OPERATORS"]

_LINEAR = {3: "linear", 4: "bilinear", 5: "trilinear"}
# torch's bicubic interpolation has this coefficient built in.
_CUBIC_COEFFICIENT = -0.75


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


def _of_rank(call: Call, name: str, n: int) -> Callable[..., Tensor]:
    """The function of torch for images of `n` spatial axes."""
    if n not in (1, 2, 3):
        raise call.refuse(f"it has {n} spatial axes")
    function: Callable[..., Tensor] = getattr(functional, f"{name}{n}d")
    return function


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
    function = _of_rank(call, "conv", n)
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
    function = _of_rank(call, "conv_transpose", n)
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
    function = _of_rank(call, "max_pool" if call.operator == "MaxPool" else "avg_pool", n)
    padded = any(pads)
    if call.operator == "MaxPool":
        if len(call.results) > 1:
            raise call.refuse("its indices are read")
        return lambda x: function(_padded(x, pads, -math.inf) if padded else x, kernel, strides, 0, dilations)
    if any(dilation != 1 for dilation in dilations):
        raise call.refuse("it is dilated")
    counted = bool(call.attributes.get("count_include_pad", 0))

    def run_average(x: Tensor) -> Tensor:
        if not padded:
            return function(x, kernel, strides)
        result = function(_padded(x, pads), kernel, strides)
        if counted:
            return result
        # Share of each window that lies inside the image.
        inside = function(_padded(torch.ones_like(x[:1, :1]), pads), kernel, strides)
        return result / inside

    return run_average


def _global_pool(call: Call) -> Run:
    axes = tuple(range(2, len(call.shape(0))))
    if call.operator == "GlobalMaxPool":
        return lambda x: torch.amax(x, axes, keepdim=True)
    return lambda x: torch.mean(x, axes, keepdim=True)


def _batch_norm(call: Call) -> Run:
    epsilon = call.attributes.get("epsilon", 1e-5)
    if call.attributes.get("training_mode", 0):
        raise call.refuse("it is in training mode")
    return lambda x, scale, bias, mean, variance: functional.batch_norm(
        x, mean, variance, scale, bias, False, 0.0, epsilon
    )


def _instance_norm(call: Call) -> Run:
    epsilon = call.attributes.get("epsilon", 1e-5)
    # As many groups as channels. functional.instance_norm refuses images of one pixel, where ONNX gives the bias.
    return lambda x, scale, bias: torch.group_norm(x, x.shape[1], scale, bias, epsilon)


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
        x, grid = as_many_frames((x, grid))
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


IMAGE_OPERATORS: dict[str, Maker] = {
    "AveragePool": _pool,
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "DepthToSpace": _depth_to_space,
    "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool,
    "GridSample": _grid_sample,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "MaxPool": _pool,
    "Pad": _pad,
    "Resize": _resize,
    "SpaceToDepth": _space_to_depth,
}

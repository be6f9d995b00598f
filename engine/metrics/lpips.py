"""LPIPS v0.1 with the SqueezeNet 1.1 backbone, in NumPy alone.

The weights are not part of this project: a ``.safetensors`` file is named by an option or by the environment variable
WARPCACHE_LPIPS. It holds torchvision's ``squeezenet1_1().features`` as ``features.N.*`` and the linear heads of the
package lpips 0.1.4 as ``linK.weight`` [1, C, 1, 1], K = 0..6, all float32.

Source: Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric", CVPR 2018.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .products import product

__all__ = ["FIRE_CHANNELS", "LPIPS_VARIABLE", "POOLS", "SMALLEST_SIDE", "TAPS", "TAP_CHANNELS", "Lpips"]

Float32 = NDArray[np.float32]
Features = Sequence[Float32]

LPIPS_VARIABLE = "WARPCACHE_LPIPS"
"""Environment variable that names the weights file, or a folder that holds `LPIPS_FILE`."""

LPIPS_FILE = "squeeze_v0.1.safetensors"

SMALLEST_SIDE = 17
"""Least height and width: below it the third pooling has nothing left to pool."""

_MEAN = np.array([-0.030, -0.088, -0.188], np.float32)[:, None, None]
_DEVIATION = np.array([0.458, 0.448, 0.450], np.float32)[:, None, None]
FIRE_CHANNELS = {  # index in features -> (in, squeeze, expand)
    3: (64, 16, 64),
    4: (128, 16, 64),
    6: (128, 32, 128),
    7: (256, 32, 128),
    9: (256, 48, 192),
    10: (384, 48, 192),
    11: (384, 64, 256),
    12: (512, 64, 256),
}
POOLS = (2, 5, 8)
TAPS = (1, 4, 7, 9, 10, 11, 12)
TAP_CHANNELS = (64, 128, 256, 384, 384, 512, 512)
_EPSILON = np.float32(1e-10)


def _expected_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"features.0.weight": (64, 3, 3, 3), "features.0.bias": (64,)}
    for index, (channels, squeeze, expand) in FIRE_CHANNELS.items():
        for part, shape in (
            ("squeeze", (squeeze, channels, 1, 1)),
            ("expand1x1", (expand, squeeze, 1, 1)),
            ("expand3x3", (expand, squeeze, 3, 3)),
        ):
            shapes[f"features.{index}.{part}.weight"] = shape
            shapes[f"features.{index}.{part}.bias"] = shape[:1]
    for tap, channels in enumerate(TAP_CHANNELS):
        shapes[f"lin{tap}.weight"] = (1, channels, 1, 1)
    return shapes


class Lpips:
    """Perceptual distance between images; 0 for identical ones.

    The features of an image can be kept and compared with several others:

        lpips = Lpips.load("squeeze_v0.1.safetensors")
        truth = lpips.features(y)
        lpips.distance(truth, lpips.features(x1)), lpips.distance(truth, lpips.features(x2))
    """

    def __init__(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """Take the weights.

        Args:
            weights: Name -> float32 array, named and shaped as the module's docstring says; further names are ignored.

        Raises:
            InputError: If an array is missing or has another shape or dtype.
        """
        self._weights: dict[str, Float32] = {}
        for name, shape in _expected_shapes().items():
            if name not in weights:
                raise InputError(f"LPIPS weights lack {name!r}; give the weights of LPIPS v0.1 with SqueezeNet")
            array = weights[name]
            if array.shape != shape or array.dtype != np.float32:
                raise InputError(
                    f"LPIPS weight {name!r} is {array.dtype} {tuple(array.shape)}, expected float32 {shape}; "
                    "give the weights of LPIPS v0.1 with SqueezeNet"
                )
            # Convolutions run as matrix products: [out, in, k, k] -> [out, in * k * k].
            self._weights[name] = np.ascontiguousarray(array.reshape(shape[0], -1) if len(shape) == 4 else array)

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None = None) -> Lpips:
        """Read the weights.

        Args:
            path: The ``.safetensors`` file, or the folder that holds ``squeeze_v0.1.safetensors``; without it, the
                environment variable WARPCACHE_LPIPS says where.

        Raises:
            InputError: If there is no path, no file, or the file does not hold these weights.
        """
        where = path if path is not None else os.environ.get(LPIPS_VARIABLE)
        if not where:
            raise InputError(
                f"LPIPS needs its weights: give the path of {LPIPS_FILE} by --lpips or by the environment variable "
                f"{LPIPS_VARIABLE}"
            )
        file = Path(where)
        if file.is_dir():
            file = file / LPIPS_FILE
        if not file.is_file():
            raise InputError(
                f"LPIPS weights {str(file)!r} do not exist; give the path of {LPIPS_FILE} by --lpips or by the "
                f"environment variable {LPIPS_VARIABLE}"
            )
        # At first use: most who import the engine measure nothing.
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            weights = load_file(file)
        except (SafetensorError, OSError) as error:
            raise InputError(f"LPIPS weights {str(file)!r} cannot be read ({error}); copy the file again") from error
        return cls(weights)

    def arrays(self) -> dict[str, Float32]:
        """The weights by name, in the shapes that the file has."""
        return {name: self._weights[name].reshape(shape) for name, shape in _expected_shapes().items()}

    def __call__(self, a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
        """Distance of each pair.

        Args:
            a: RGB images in [-1, 1], float32 [3, H, W] or [N, 3, H, W], at least 17 pixels high and wide.
            b: Images of the same shape.

        Returns:
            float64 [N]; [1] for [3, H, W].

        Raises:
            InputError: If the shapes differ or do not fit.
        """
        if a.shape != b.shape:
            raise InputError(f"images to compare have shapes {a.shape} and {b.shape}; they must be the same")
        return self.distance(self.features(a), self.features(b))

    def features(self, images: NDArray[Any]) -> list[Float32]:
        """Features of images, ready to be compared by `distance`.

        Args:
            images: RGB in [-1, 1], float32 [3, H, W] or [N, 3, H, W].

        Returns:
            Seven arrays float32 [N, C, h * w], of unit length over C, owned by the caller.

        Raises:
            InputError: If the shape is not that of RGB images or too small.
        """
        if images.ndim not in (3, 4) or images.shape[-3] != 3:
            raise InputError(f"images for LPIPS have shape {images.shape}; expected [3, H, W] or [N, 3, H, W]")
        if min(images.shape[-2:]) < SMALLEST_SIDE:
            raise InputError(
                f"images for LPIPS are {images.shape[-1]} x {images.shape[-2]} pixels; it needs at least "
                f"{SMALLEST_SIDE} x {SMALLEST_SIDE}"
            )
        if images.ndim == 3:
            images = images[None]
        # One image after the other: the columns of the 3 x 3 convolutions are the largest arrays, 15 MB at 512 x 512.
        each = [self._features_of(image.astype(np.float32, copy=False)) for image in images]
        return [np.stack(maps) for maps in zip(*each, strict=True)]

    def distance(self, a: Features, b: Features) -> NDArray[np.float64]:
        """Distance of each pair of feature sets.

        Args:
            a: What `features` returned, for N images, or for one image.
            b: The same for other images of the same size; one image on either side is compared with all of the other.

        Returns:
            float64 [N].

        Raises:
            InputError: If the images had different sizes or their numbers do not fit.
        """
        if len(a) != len(TAPS) or len(b) != len(TAPS):
            raise InputError(f"LPIPS compares {len(TAPS)} feature arrays, got {len(a)} and {len(b)}")
        total: NDArray[np.float64] | None = None
        for tap, (x, y) in enumerate(zip(a, b, strict=True)):
            fits = x.ndim == y.ndim == 3 and x.shape[1:] == y.shape[1:]
            if not fits or (x.shape[0] != y.shape[0] and 1 not in (x.shape[0], y.shape[0])):
                raise InputError(f"LPIPS features have shapes {x.shape} and {y.shape}; compare images of one size")
            squared = np.square(x - y)  # [N, C, h * w]
            # The 1 x 1 convolution and the mean over pixels are linear: the mean first is the smaller product.
            pixel_mean = squared.mean(axis=2, dtype=np.float64)  # [N, C]
            term = pixel_mean @ self._weights[f"lin{tap}.weight"][0].astype(np.float64)
            total = term if total is None else total + term
        assert total is not None
        return total

    def _features_of(self, image: Float32) -> list[Float32]:
        """Seven normalised feature maps [C, h * w] of one image [3, H, W]."""
        x = (image - _MEAN) / _DEVIATION
        maps: list[Float32] = []
        x = self._convolve(x, "features.0", stride=2)
        for index in range(1, TAPS[-1] + 1):
            if index in POOLS:
                x = _max_pool(x)
            elif index in FIRE_CHANNELS:
                squeezed = self._convolve(x, f"features.{index}.squeeze")
                # [2 * expand, h, w]
                x = np.concatenate(
                    [
                        self._convolve(squeezed, f"features.{index}.expand1x1"),
                        self._convolve(squeezed, f"features.{index}.expand3x3", padding=1),
                    ]
                )
            if index in TAPS:  # index 1 is the first ReLU, which _convolve has done
                flat = x.reshape(x.shape[0], -1)
                length = np.sqrt(np.einsum("cp,cp->p", flat, flat))
                maps.append(flat / (length + _EPSILON))
        return maps

    def _convolve(self, x: Float32, name: str, *, stride: int = 1, padding: int = 0) -> Float32:
        """Convolution and ReLU: [C, H, W] -> [out, h, w]."""
        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        channels, height, width = x.shape
        side = 1 if weight.shape[1] == channels else 3
        if side == 1:
            columns = x.reshape(channels, -1)
        else:
            if padding:
                x = np.pad(x, [(0, 0), (padding, padding), (padding, padding)])
            windows = np.lib.stride_tricks.sliding_window_view(x, (side, side), axis=(1, 2))[:, ::stride, ::stride]
            _, height, width, _, _ = windows.shape
            # [C, h, w, k, k] -> [C * k * k, h * w], the order of the weights' columns
            columns = windows.transpose(0, 3, 4, 1, 2).reshape(channels * side * side, height * width)
        out = product(weight, columns)
        out += bias[:, None]
        np.maximum(out, np.float32(0), out=out)
        return out.reshape(-1, height, width)


def _max_pool(x: Float32) -> Float32:
    """Maximum over 3 x 3 windows in steps of 2, the last window of each axis cut off at the border (ceil mode)."""
    for axis in (1, 2):
        extent = x.shape[axis]
        outputs = -((3 - extent) // 2) + 1  # ceil((extent - 3) / 2) + 1
        missing = 2 * (outputs - 1) + 3 - extent
        if missing > 0:
            padding = [(0, 0)] * 3
            padding[axis] = (0, missing)
            # Repeating the border's own values cannot change a maximum that includes them.
            x = np.pad(x, padding, mode="edge")
        end = 2 * outputs - 1
        first, second, third = (x[(slice(None),) * axis + (slice(start, start + end, 2),)] for start in range(3))
        x = np.maximum(np.maximum(first, second), third)
    return x

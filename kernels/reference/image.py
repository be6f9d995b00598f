"""Image conversion in NumPy: what `image.cu` computes, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["load_image", "store_image"]


def load_image(
    pixels: NDArray[np.uint8],
    dtype: str = "float32",
    *,
    scale: float | Sequence[float] = 1 / 127.5,
    offset: float | Sequence[float] = -1.0,
    swap_red_blue: bool = False,
) -> NDArray[Any]:
    """``byte * scale + offset`` in float32, every operation rounded, then rounded to `dtype`.

    Args:
        pixels: uint8 [H, W, C].
        dtype: Of the result, float32 or float16.
        scale: One number, or one a channel of the result.
        offset: One number, or one a channel of the result.
        swap_red_blue: Whether the first and the third channel change places.

    Returns:
        [C, H, W].
    """
    if swap_red_blue:
        pixels = _swapped(pixels)
    factor, shift = np.asarray(scale, np.float32), np.asarray(offset, np.float32)
    values: NDArray[np.float32] = pixels.astype(np.float32) * factor + shift
    return np.ascontiguousarray(values.transpose(2, 0, 1).astype(dtype))


def store_image(
    image: NDArray[Any],
    *,
    scale: float | Sequence[float] = 1 / 127.5,
    offset: float | Sequence[float] = -1.0,
    swap_red_blue: bool = False,
) -> NDArray[np.uint8]:
    """``(value - offset) * (1 / scale)`` in float32, clamped to [0, 255], rounded half to even; NaN becomes 0.

    Args:
        image: float32 or float16 [C, H, W].
        scale: As in `load_image`: one number, or one a channel of `image`.
        offset: As in `load_image`.
        swap_red_blue: Whether the first and the third channel change places.

    Returns:
        uint8 [H, W, C].
    """
    # The reciprocal is taken in float64 and rounded once, so that 1 / (1 / 127.5) is 127.5.
    factor = (1 / np.asarray(scale, np.float64)).astype(np.float32)
    shift = np.asarray(offset, np.float32)
    scaled = (image.astype(np.float32).transpose(1, 2, 0) - shift) * factor
    scaled = np.where(np.isnan(scaled), np.float32(0), scaled)
    pixels = np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)
    return np.ascontiguousarray(_swapped(pixels) if swap_red_blue else pixels)


def _swapped(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return pixels[..., [2, 1, 0, 3][: pixels.shape[-1]]]

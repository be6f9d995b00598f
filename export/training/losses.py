"""What training compares: losses and crops that every trained network here shares."""

from __future__ import annotations

import numpy as np
from torch import Tensor

__all__ = ["detail_loss", "same_crops"]

# Side of the square that the perceptual loss looks at, in pixels: larger ones cost more than they teach.
_CROP = 128


def detail_loss(a: Tensor, b: Tensor) -> Tensor:
    """L1 between the differences of neighbouring pixels: a blurred answer pays for the edges it lost.

    Args:
        a: [N, C, H, W].
        b: The same shape.

    Returns:
        Scalar.
    """
    difference = a - b
    return (
        (difference[..., 1:] - difference[..., :-1]).abs().mean()
        + (difference[..., 1:, :] - difference[..., :-1, :]).abs().mean()
    ) / 2


def same_crops(images: list[Tensor], random: np.random.Generator) -> list[Tensor]:
    """The same random square of every batch [N, C, H, W], at most 128 pixels a side."""
    rows, columns = images[0].shape[2:]
    height, width = min(_CROP, rows), min(_CROP, columns)
    top = int(random.integers(0, rows - height + 1))
    left = int(random.integers(0, columns - width + 1))
    return [image[..., top : top + height, left : left + width] for image in images]

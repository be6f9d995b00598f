"""The change metric in NumPy: what `change.cu` computes, with sums in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["measure_change"]


def measure_change(
    first: NDArray[Any], second: NDArray[Any], *, block: int, threshold: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Statistics of the absolute difference, by blocks of `block` x `block` pixels and of the whole.

    Args:
        first: float32, float16 or uint8 [C, H, W].
        second: Of the same shape and dtype.
        block: Extent of a block; those at the right and lower border may be smaller.
        threshold: What a block's mean must exceed to count as changed; a mean that is NaN counts too.

    Returns:
        Per block mean and maximum over its pixels and channels, float32 [2, blocks down, blocks across]; and float32
        [3]: mean and maximum of the whole, share of changed blocks. NaN reaches every figure that it is part of.
    """
    with np.errstate(invalid="ignore"):  # infinity less infinity is NaN, and shall be
        difference = np.abs(first.astype(np.float32) - second.astype(np.float32))
    _, height, width = difference.shape
    rows, columns = range(0, height, block), range(0, width, block)
    blocks = np.empty((2, len(rows), len(columns)), np.float32)
    for i, top in enumerate(rows):
        for j, left in enumerate(columns):
            inside = difference[:, top : top + block, left : left + block]
            blocks[0, i, j] = inside.mean(dtype=np.float64)
            blocks[1, i, j] = inside.max()  # NumPy's max is NaN where an element is
    changed = ~(blocks[0] <= np.float32(threshold))
    summary = np.array([difference.mean(dtype=np.float64), difference.max(), changed.mean()], np.float32)
    return blocks, summary

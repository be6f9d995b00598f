"""Backward warp in NumPy: what `warp.cu` computes, to the bit."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["warp_map"]


def warp_map(
    source: NDArray[Any], grid: NDArray[np.float32], *, padding: Literal["zeros", "border"] = "zeros"
) -> NDArray[Any]:
    """Bilinear samples of one map, in float32 and in the order of torch's `grid_sample` (align_corners=False).

    Args:
        source: float32 or float16 [C, H, W].
        grid: float32 [2, h, w]: x and y of where every output pixel reads, -1 and 1 being the map's outer edges. NaN
            gives NaN; what is infinite is outside.
        padding: What is outside the map: 0, or its nearest pixel.

    Returns:
        [C, h, w], of the map's dtype.
    """
    _, height, width = source.shape
    one, half = np.float32(1), np.float32(0.5)
    x = ((grid[0] + one) * np.float32(width) - one) * half
    y = ((grid[1] + one) * np.float32(height) - one) * half
    unknown = np.isnan(grid[0]) | np.isnan(grid[1])
    if padding == "border":
        x, y = np.clip(x, 0, np.float32(width - 1)), np.clip(y, 0, np.float32(height - 1))
    touches = (x > -1) & (x < width) & (y > -1) & (y < height)
    x, y = np.where(touches, x, np.float32(-5)), np.where(touches, y, np.float32(-5))
    left, top = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    across = (((left + 1).astype(np.float32) - x), x - left.astype(np.float32))
    down = (((top + 1).astype(np.float32) - y), y - top.astype(np.float32))
    values = np.zeros((source.shape[0], *grid.shape[1:]), np.float32)
    for i in range(4):  # upper left, upper right, lower left, lower right
        column, row = left + i % 2, top + i // 2
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        found = source[:, np.where(inside, row, 0), np.where(inside, column, 0)].astype(np.float32)
        weight = across[i % 2] * down[i // 2]
        # A pixel outside is not read: it adds nothing, whatever stands in for it here.
        values += np.where(inside, found * weight, np.float32(0))
    values[:, unknown] = np.nan
    return values.astype(source.dtype)

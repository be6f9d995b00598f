"""Matrix products that stay on one thread.

OpenBLAS, which NumPy comes with, hands a product of more than 2^18 multiply-adds to all cores, and its threads wait for
each other by spinning. Where another process has a core, 0.6 ms of work takes 24 ms (measured: [64, 144] times
[144, 3969], two cores, both busy), and a metric that takes 7 ms takes 800. So large products are made of smaller ones:
slower than one whole product on a core of its own by a quarter to a half, and the same on every machine.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["SINGLE_THREAD_LIMIT", "product"]

SINGLE_THREAD_LIMIT = 1 << 18
"""Multiply-adds up to which OpenBLAS uses the calling thread alone (SMP_THRESHOLD_MIN * GEMM_MULTITHREAD_THRESHOLD)."""

# Fewer rows read `b` more often, more rows leave too few columns under the limit: of 8, 16, 32 and 64 the best for all
# of LPIPS's layers together.
_ROWS = 32


def product(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """Multiply two matrices in tiles of at most `SINGLE_THREAD_LIMIT` multiply-adds (one row by one column at least).

    Args:
        a: float32 [M, K].
        b: float32 [K, N], C-contiguous: its tiles are views.

    Returns:
        float32 [M, N], C-contiguous, owned by the caller.
    """
    (height, depth), width = a.shape, b.shape[1]
    out = np.empty((height, width), np.float32)
    rows = min(height, _ROWS)
    columns = max(1, min(width, SINGLE_THREAD_LIMIT // (rows * depth)))
    whole = width // columns * columns
    # One call per band of rows, which walks over the tiles in C: [K, n * columns] -> [n, K, columns].
    tiles = b[:, :whole].reshape(depth, -1, columns).transpose(1, 0, 2)
    for top in range(0, height, rows):
        band, into = a[top : top + rows], out[top : top + rows]
        np.matmul(band, tiles, out=into[:, :whole].reshape(len(band), -1, columns).transpose(1, 0, 2))
        if whole < width:
            np.matmul(band, b[:, whole:], out=into[:, whole:])
    return out

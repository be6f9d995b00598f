"""A few points that lie near all others: greedy k-centre clustering."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...engine.errors import ExportError

__all__ = ["k_centres"]


def k_centres(points: NDArray[np.floating[Any]], count: int) -> tuple[NDArray[np.int64], float]:
    """Choose points so that no other is far from all of them.

    Greedy: the point nearest the mean first, then always the farthest from those chosen. The largest distance that is
    left is at most twice the least possible with as many points, whatever the points' order (Gonzalez 1985).

    Args:
        points: [T, D].
        count: How many; fewer are chosen where fewer are different.

    Returns:
        Indices int64 [K], in the order chosen in, and the largest distance of any point from its nearest chosen one.

    Raises:
        ExportError: If there is no point, or `count` is below 1.
    """
    if len(points) < 1 or count < 1:
        raise ExportError(f"{count} centres cannot be chosen among {len(points)} points; give at least one of each")
    points = points.astype(np.float64)
    first = int(np.argmin(((points - points.mean(0)) ** 2).sum(1)))
    chosen = [first]
    squared = ((points - points[first]) ** 2).sum(1)
    while len(chosen) < count:
        farthest = int(np.argmax(squared))
        if squared[farthest] <= 0.0:
            break
        chosen.append(farthest)
        squared = np.minimum(squared, ((points - points[farthest]) ** 2).sum(1))
    return np.array(chosen, np.int64), float(np.sqrt(squared.max()))

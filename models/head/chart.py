"""Charts: pieces of one mesh, each with its rectangle of the UV square."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Chart", "Part", "fit", "grid_chart", "grid_triangles", "smoothstep"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]


class Part:
    """What a surface point belongs to; the painter and the shader treat each differently."""

    FACE = 0
    MOUTH = 1
    LASHES = 2
    EYE = 3
    TEETH = 4
    EAR = 5
    HAIR = 6
    NECK = 7
    SHIRT = 8
    COUNT = 9


@dataclass(frozen=True)
class Chart:
    """One piece of the mesh.

    Attributes:
        part: One of `Part`.
        uv: float64 [N, 2], in the piece's rectangle of the UV square.
        triangles: int32 [M, 3] into the piece's own vertices, counter-clockwise seen from outside.
        local: float64 [N, 3], coordinates on the piece that the painter reads; their meaning is the part's.
    """

    part: int
    uv: Floats
    triangles: Ints
    local: Floats


def grid_triangles(index: NDArray[np.int64]) -> Ints:
    """Triangles of a grid of vertices whose columns run right and rows run down, seen from outside.

    Args:
        index: int64 [R, C], vertex index at every grid point.

    Returns:
        int32 [M, 3], counter-clockwise; triangles that repeat a vertex (at a pole, at a slit's end) are left out.
    """
    tl, bl = index[:-1, :-1].ravel(), index[1:, :-1].ravel()
    br, tr = index[1:, 1:].ravel(), index[:-1, 1:].ravel()
    triangles = np.concatenate([np.stack([tl, bl, br], 1), np.stack([tl, br, tr], 1)])
    a, b, c = triangles.T
    return np.asarray(triangles[(a != b) & (b != c) & (a != c)], np.int32)


def fit(coordinates: Floats, rectangle: tuple[float, float, float, float]) -> Floats:
    """Map [N, 2] coordinates in [0, 1] into a rectangle (u0, v0, u1, v1) of the UV square."""
    u0, v0, u1, v1 = rectangle
    return coordinates * (u1 - u0, v1 - v0) + (u0, v0)


def grid_chart(
    part: int,
    rows: int,
    columns: int,
    rectangle: tuple[float, float, float, float],
    local: Floats,
    *,
    flip: bool = False,
) -> Chart:
    """Chart of a full grid, laid out evenly in its rectangle.

    Args:
        part: One of `Part`.
        rows: Grid rows, running down as seen from outside.
        columns: Grid columns, running right as seen from outside (left where `flip`).
        rectangle: (u0, v0, u1, v1).
        local: float64 [rows * columns, 3].
        flip: Turn the triangles round.

    Returns:
        The chart, its vertices in row order.
    """
    v, u = np.meshgrid(np.linspace(0, 1, rows), np.linspace(0, 1, columns), indexing="ij")
    triangles = grid_triangles(np.arange(rows * columns).reshape(rows, columns))
    if flip:
        triangles = np.ascontiguousarray(triangles[:, ::-1])
    return Chart(part, fit(np.stack([u.ravel(), v.ravel()], 1), rectangle), triangles, local)


def smoothstep(low: float, high: float, x: Floats) -> Floats:
    """Hermite step from 0 at `low` to 1 at `high` (either may be the larger)."""
    t = np.clip((x - low) / (high - low), 0.0, 1.0)
    return np.asarray(t * t * (3.0 - 2.0 * t))

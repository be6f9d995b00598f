"""Mesh conditions in NumPy: what a deferred renderer sees of a mesh, and how its surface moved between two frames.

This is what `rasterizer.cu` computes, in the same order of operations, and what makes the conditions where there is no
GPU.

Conventions: vertices are in pixels of the image, x right, y down, pixel centres at +0.5 (so the image spans [0, W] by
[0, H]), z is depth on the same scale, smaller is nearer. Triangles that face the camera are counter-clockwise as seen
in the picture, so their signed area in (x, y-down) is negative and their normal points to -z. UV is in [0, 1], u right,
v down: the texel row is v * height. A triangle with a corner that is not finite is not drawn and bends no normal; a
point that is not finite is nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Fragments",
    "Mesh",
    "SurfaceAtlas",
    "condition_raster",
    "interpolate",
    "rasterize",
    "surface_motion",
    "vertex_normals",
]

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

# A pixel centre on an edge that two triangles share must not fall between them by rounding.
_EDGE_TOLERANCE = 1e-5
# How much deeper than the frontmost surface a point may be and still count as visible, in pixels of depth: the depth
# buffer is sampled at pixel centres, so a slanted surface differs from the buffer by its slope within a pixel.
_VISIBILITY_BIAS_PX = 1.0


@dataclass(frozen=True)
class Mesh:
    """Topology that stays while vertices move.

    Attributes:
        triangles: int32 [M, 3], indices into the vertices.
        uv: float32 [V, 2] in [0, 1], one UV a vertex (vertices on a seam are duplicated).
    """

    triangles: Ints
    uv: Floats


@dataclass(frozen=True)
class Fragments:
    """What one rasterisation leaves at every pixel.

    Attributes:
        triangle: int32 [H, W], the frontmost triangle, -1 where there is none.
        barycentric: float32 [H, W, 3], weights of its corners, 0 outside.
        depth: float32 [H, W], +inf outside.
    """

    triangle: Ints
    barycentric: Floats
    depth: Floats

    @property
    def mask(self) -> NDArray[np.bool_]:
        """bool [H, W]: True where a triangle covers the pixel centre."""
        return self.triangle >= 0


def rasterize(vertices_px: Floats, triangles: Ints, height: int, width: int, *, cull_back: bool = False) -> Fragments:
    """Find the frontmost triangle at every pixel centre; of several at one depth, the last.

    All candidate pixels of all triangles (their bounding boxes) are tested in one vectorised pass, then written back
    to front, so that the nearest is written last.

    Args:
        vertices_px: float32 [V, 3] or [V, 2] (then every depth is 0), see the module's conventions.
        triangles: int32 [M, 3].
        height: Rows of the result.
        width: Columns of the result.
        cull_back: Leave out triangles that face away from the camera.

    Returns:
        Fragments of the frame.
    """
    corners = np.asarray(vertices_px, np.float32)[triangles]
    # All corners in one point: flat, so not drawn.
    corners = np.where(np.isfinite(corners).all((1, 2), keepdims=True), corners, np.float32(0))
    # Edges in float64: in float32 the two sides of a sliver's edge disagree by more than the tolerance.
    x, y = corners[..., 0].astype(np.float64), corners[..., 1].astype(np.float64)
    z = corners[..., 2] if corners.shape[-1] > 2 else np.zeros_like(corners[..., 0])
    area = (x[:, 1] - x[:, 0]) * (y[:, 2] - y[:, 0]) - (x[:, 2] - x[:, 0]) * (y[:, 1] - y[:, 0])
    skipped = np.abs(area) < 1e-9
    inverse = 1.0 / np.where(skipped, 1.0, area)
    if cull_back:
        skipped |= area > 0

    left = np.clip(np.ceil(x.min(1) - 0.5), 0, width).astype(np.int64)
    right = np.clip(np.floor(x.max(1) - 0.5) + 1, 0, width).astype(np.int64)
    top = np.clip(np.ceil(y.min(1) - 0.5), 0, height).astype(np.int64)
    bottom = np.clip(np.floor(y.max(1) - 0.5) + 1, 0, height).astype(np.int64)
    columns, rows = np.maximum(right - left, 0), np.maximum(bottom - top, 0)
    count = np.where(skipped, 0, columns * rows)

    owner = np.repeat(np.arange(len(triangles)), count)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
    row_in_box, column_in_box = np.divmod(within, columns[owner])
    px, py = left[owner] + column_in_box, top[owner] + row_in_box
    dx, dy = px + 0.5 - x[owner, 0], py + 0.5 - y[owner, 0]
    b1 = (dx * (y[:, 2] - y[:, 0])[owner] - dy * (x[:, 2] - x[:, 0])[owner]) * inverse[owner]
    b2 = (dy * (x[:, 1] - x[:, 0])[owner] - dx * (y[:, 1] - y[:, 0])[owner]) * inverse[owner]
    b0 = 1.0 - b1 - b2
    inside = (b0 >= -_EDGE_TOLERANCE) & (b1 >= -_EDGE_TOLERANCE) & (b2 >= -_EDGE_TOLERANCE)

    owner, pixel = owner[inside], (py * width + px)[inside]
    weights = np.stack([b0[inside], b1[inside], b2[inside]], -1).astype(np.float32)
    depth = (weights * z[owner]).sum(-1)
    # Of repeated indices in an assignment NumPy keeps the last: far first, near last.
    order = np.argsort(-depth, kind="stable")
    triangle = np.full(height * width, -1, np.int32)
    barycentric = np.zeros((height * width, 3), np.float32)
    buffer = np.full(height * width, np.inf, np.float32)
    triangle[pixel[order]] = owner[order]
    barycentric[pixel[order]] = weights[order]
    buffer[pixel[order]] = depth[order]
    return Fragments(
        triangle.reshape(height, width), barycentric.reshape(height, width, 3), buffer.reshape(height, width)
    )


def interpolate(fragments: Fragments, triangles: Ints, attributes: Floats) -> Floats:
    """Interpolate vertex attributes at every pixel.

    Args:
        fragments: A rasterisation.
        triangles: int32 [M, 3], the triangles it was made from.
        attributes: float32 [V, C].

    Returns:
        float32 [H, W, C], 0 where no triangle is.
    """
    mask = fragments.mask
    out = np.zeros((*mask.shape, attributes.shape[1]), np.float32)
    corners = triangles[fragments.triangle[mask]]
    weights = fragments.barycentric[mask]
    values = attributes[corners[:, 0]] * weights[:, :1]
    values += attributes[corners[:, 1]] * weights[:, 1:2]
    values += attributes[corners[:, 2]] * weights[:, 2:]
    out[mask] = values
    return out


def vertex_normals(vertices_px: Floats, triangles: Ints) -> Floats:
    """Area-weighted unit normals of the vertices.

    Args:
        vertices_px: float32 [V, 3].
        triangles: int32 [M, 3], oriented as the module's conventions say.

    Returns:
        float32 [V, 3]; a surface that faces the camera has z < 0. 0 for a vertex of no triangle.
    """
    corners = vertices_px[triangles].astype(np.float64)
    # In float64: of a sliver, float32 leaves no digit.
    with np.errstate(invalid="ignore"):
        faces = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    faces[~np.isfinite(faces).all(1)] = 0.0
    normals = np.zeros((len(vertices_px), 3), np.float64)
    for axis in range(3):
        for corner in range(3):
            normals[:, axis] += np.bincount(triangles[:, corner], faces[:, axis], len(vertices_px))
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    unit: Floats = normals / np.maximum(length, 1e-12)
    return unit.astype(np.float32)


def condition_raster(
    vertices_px: Floats, mesh: Mesh, height: int, width: int, fragments: Fragments | None = None
) -> Floats:
    """Make the deferred renderer's condition of one frame.

    Args:
        vertices_px: float32 [V, 3].
        mesh: Topology and UV.
        height: Rows.
        width: Columns.
        fragments: The frame's rasterisation, where the caller has it already.

    Returns:
        float32 [6, H, W]: u, v in [0, 1], the unit normal's x, y, z, and the mask; all 0 where the mesh is not.
    """
    if fragments is None:
        fragments = rasterize(vertices_px, mesh.triangles, height, width)
    attributes = np.concatenate([mesh.uv, vertex_normals(vertices_px, mesh.triangles)], 1).astype(np.float32)
    planes = interpolate(fragments, mesh.triangles, attributes)
    length = np.linalg.norm(planes[..., 2:], axis=-1, keepdims=True)
    planes[..., 2:] /= np.maximum(length, 1e-6)
    planes = np.concatenate([planes, fragments.mask[..., None].astype(np.float32)], -1)
    return np.ascontiguousarray(planes.transpose(2, 0, 1))


def surface_motion(
    fragments_t: Fragments, fragments_s: Fragments, vertices_s_px: Floats, triangles: Ints
) -> tuple[Floats, NDArray[np.bool_]]:
    """Say for every pixel of frame t where its surface point was in frame s, and whether it was visible there.

    Args:
        fragments_t: Rasterisation of frame t.
        fragments_s: Rasterisation of frame s.
        vertices_s_px: float32 [V, 3], the vertices in frame s.
        triangles: int32 [M, 3].

    Returns:
        float32 [2, H, W], (dx, dy) in pixels from the pixel of frame t to where it reads in frame s (a backward flow,
        0 outside the mesh), and bool [H, W], True where that surface point was visible in frame s.
    """
    height, width = fragments_t.triangle.shape
    position = interpolate(fragments_t, triangles, np.asarray(vertices_s_px, np.float32))
    mask = fragments_t.mask
    centre = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), -1).astype(np.float32)
    known = mask & np.isfinite(position[..., :2]).all(-1)
    motion = np.where(known[..., None], position[..., :2] - centre, 0.0).astype(np.float32)
    visible = np.zeros((height, width), np.bool_)
    visible[mask] = _visible(position[mask], fragments_s)
    return np.ascontiguousarray(motion.transpose(2, 0, 1)), visible


class SurfaceAtlas:
    """Where every texel of the surface's UV square is in a frame.

    Reading the atlas of frame s at the UV raster of frame t gives, for every pixel of frame t, where its surface point
    was in frame s: the motion between any two frames from per-frame data alone. The topology is fixed, so each texel's
    triangle and weights are found once.

    Args:
        mesh: Topology and UV.
        size: Rows and columns of the atlas.

    Attributes:
        mask: bool [size, size], True for texels of the surface.
        corners: int32 [N, 3], of the N texels of the surface in row-major order, the vertices of their triangles.
        weights: float32 [N, 3], the weights of these.
    """

    def __init__(self, mesh: Mesh, size: int = 64) -> None:
        self.size = size
        fragments = rasterize((mesh.uv * size).astype(np.float32), mesh.triangles, size, size)
        owner = _grow(fragments.triangle, steps=3)
        self.mask: NDArray[np.bool_] = owner >= 0
        row, column = np.nonzero(self.mask)
        owned = mesh.triangles[owner[self.mask]]
        texel = np.stack([column + 0.5, row + 0.5], -1) / size
        # Not clamped: texels just outside a chart continue its triangle linearly, so that bilinear reads at the
        # chart's border are right.
        self.weights: Floats = _barycentric(texel, mesh.uv[owned]).astype(np.float32)
        self.corners: Ints = owned

    def positions(self, vertices_px: Floats, fragments: Fragments) -> Floats:
        """Place the atlas in one frame.

        Args:
            vertices_px: float32 [V, 3], the frame's vertices.
            fragments: The frame's rasterisation; its size gives the image's.

        Returns:
            float32 [3, size, size]: x and y in grid_sample coordinates ([-1, 1], align_corners=False) and 1 where the
            texel's surface point is visible in the frame, else 0. Texels of no chart hold 0.
        """
        height, width = fragments.triangle.shape
        points = np.einsum("nk,nkc->nc", self.weights, np.asarray(vertices_px, np.float32)[self.corners])
        known = np.isfinite(points[:, :2]).all(1)
        out = np.zeros((3, self.size, self.size), np.float32)
        out[0, self.mask] = np.where(known, points[:, 0] * (2.0 / width) - 1.0, 0.0)
        out[1, self.mask] = np.where(known, points[:, 1] * (2.0 / height) - 1.0, 0.0)
        out[2, self.mask] = _visible(points, fragments)
        return out


def _visible(points: Floats, fragments: Fragments) -> NDArray[np.bool_]:
    """bool [N]: whether points [N, 3] (pixels) are at or before the frontmost surface of a frame, and inside it."""
    height, width = fragments.triangle.shape
    x, y = points[:, 0], points[:, 1]
    # Compared before they are made integers, which NaN and what is far outside have none of.
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    column = np.where(inside, x, 0).astype(np.int64)
    row = np.where(inside, y, 0).astype(np.int64)
    # The deepest of the 3x3 neighbourhood, the background aside: a slanted surface lies between its neighbours.
    surface = np.where(fragments.mask, fragments.depth, -np.inf)
    padded = np.pad(surface, 1, constant_values=-np.inf)
    deepest = np.max([padded[i : i + height, j : j + width] for i in range(3) for j in range(3)], axis=0)
    limit = deepest[row, column] + _VISIBILITY_BIAS_PX
    return np.asarray(inside & (points[:, 2] <= limit))


def _grow(owner: Ints, steps: int) -> Ints:
    """Give empty texels next to owned ones their neighbour's triangle, `steps` texels far."""
    grown = owner.copy()
    for _ in range(steps):
        padded = np.pad(grown, 1, constant_values=-1)
        height, width = grown.shape
        for i, j in ((0, 1), (2, 1), (1, 0), (1, 2), (0, 0), (0, 2), (2, 0), (2, 2)):
            neighbour = padded[i : i + height, j : j + width]
            grown = np.where(grown < 0, neighbour, grown)
    return grown


def _barycentric(points: NDArray[np.float64], corners: Floats) -> NDArray[np.float64]:
    """Weights [N, 3] of 2-D points [N, 2] in triangles [N, 3, 2], not clamped."""
    origin = corners[:, 0].astype(np.float64)
    e1, e2, d = corners[:, 1] - origin, corners[:, 2] - origin, points - origin
    area = e1[:, 0] * e2[:, 1] - e2[:, 0] * e1[:, 1]
    area = np.where(np.abs(area) < 1e-12, 1e-12, area)
    b1 = (d[:, 0] * e2[:, 1] - d[:, 1] * e2[:, 0]) / area
    b2 = (d[:, 1] * e1[:, 0] - d[:, 0] * e1[:, 1]) / area
    return np.stack([1.0 - b1 - b2, b1, b2], -1)

"""The rasteriser against loops over pixels, analytic motion, and the atlas read as the warp adapter reads it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from warpcache.models.rasterizer import (
    Fragments,
    Mesh,
    SurfaceAtlas,
    condition_raster,
    interpolate,
    rasterize,
    surface_motion,
    vertex_normals,
)

SIZE = 24

Floats = NDArray[np.float32]


def reference(vertices: Floats, triangles: NDArray[np.int32], height: int, width: int) -> tuple[Floats, Floats, Floats]:
    """One pixel and one triangle at a time, in float64: triangle, barycentric weights, depth.

    The third result is the least distance of each pixel centre from a decision: an edge (in barycentric units), or a
    tie of two depths (in pixels). Where it is tiny the answer may be either.
    """
    index = np.full((height, width), -1)
    weights = np.zeros((height, width, 3))
    margin = np.full((height, width), math.inf)
    for row in range(height):
        for column in range(width):
            x, y = column + 0.5, row + 0.5
            nearest = math.inf
            for number, corners in enumerate(triangles):
                (ax, ay, az), (bx, by, bz), (cx, cy, cz) = (vertices[corner].astype(np.float64) for corner in corners)
                area = (bx - ax) * (cy - ay) - (cx - ax) * (by - ay)
                if area == 0:
                    continue
                # Twice the signed area on each edge's other side, over the whole's: the corner's weight.
                wa = ((cx - bx) * (y - by) - (cy - by) * (x - bx)) / area
                wb = ((ax - cx) * (y - cy) - (ay - cy) * (x - cx)) / area
                wc = ((bx - ax) * (y - ay) - (by - ay) * (x - ax)) / area
                least = min(wa, wb, wc)
                margin[row, column] = min(margin[row, column], abs(least))
                if least < 0:
                    continue
                depth = wa * az + wb * bz + wc * cz
                if math.isfinite(nearest):
                    margin[row, column] = min(margin[row, column], abs(depth - nearest))
                if depth < nearest:
                    nearest = depth
                    index[row, column], weights[row, column] = number, (wa, wb, wc)
    return index, weights, margin


def random_mesh(seed: int) -> tuple[Floats, NDArray[np.int32]]:
    """Triangles of all sizes and orientations that cross each other and the picture's borders."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(-4, SIZE + 4, (12, 1, 2))
    corners = centres + rng.normal(0, rng.uniform(1, 10, (12, 1, 1)), (12, 3, 2))
    vertices = np.concatenate([corners, rng.uniform(0, 20, (12, 3, 1))], -1).reshape(-1, 3).astype(np.float32)
    return vertices, np.arange(36, dtype=np.int32).reshape(12, 3)


def grid_mesh(n: int, low: float, high: float) -> tuple[Floats, Mesh]:
    """A flat square of (n - 1)^2 quads from `low` to `high` pixels, facing the camera; UV from 0.1 to 0.9."""
    y, x = np.meshgrid(np.linspace(0, 1, n), np.linspace(0, 1, n), indexing="ij")
    points = np.stack([low + (high - low) * x, low + (high - low) * y, np.zeros_like(x)], -1).reshape(-1, 3)
    number = np.arange(n * n).reshape(n, n)
    first = np.stack([number[:-1, :-1], number[1:, :-1], number[:-1, 1:]], -1).reshape(-1, 3)
    second = np.stack([number[:-1, 1:], number[1:, :-1], number[1:, 1:]], -1).reshape(-1, 3)
    uv = 0.1 + 0.8 * np.stack([x, y], -1).reshape(-1, 2)
    return points.astype(np.float32), Mesh(np.concatenate([first, second]).astype(np.int32), uv.astype(np.float32))


def read_atlas(atlas: Floats, condition: Floats) -> Floats:
    """What the adapter reads, in pixels [2, H, W]: where the surface point of every pixel of frame t was in frame s."""
    _, height, width = condition.shape
    grid = torch.from_numpy(condition[None, :2]).permute(0, 2, 3, 1) * 2 - 1
    read = functional.grid_sample(
        torch.from_numpy(atlas[None]), grid, mode="bilinear", padding_mode="border", align_corners=False
    )[0].numpy()
    return np.stack([(read[0] + 1) * width / 2, (read[1] + 1) * height / 2])


def centres(height: int, width: int) -> Floats:
    """[2, H, W]: x and y of pixel centres in pixels."""
    y, x = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    return np.stack([x, y]).astype(np.float32)


@pytest.mark.parametrize("seed", range(4))
def test_rasterize_is_the_loop_over_pixels(seed: int) -> None:
    vertices, triangles = random_mesh(seed)
    fragments = rasterize(vertices, triangles, SIZE, SIZE)
    index, weights, margin = reference(vertices, triangles, SIZE, SIZE)
    # The rasteriser counts what lies 1e-5 beyond an edge as inside; depths are sums in float32, 20 * 2^-23 = 2e-6.
    sure = margin > 2e-5
    assert sure.mean() > 0.99
    np.testing.assert_array_equal(fragments.triangle[sure], index[sure])
    covered = sure & (index >= 0)
    assert 0.2 < covered.mean() < 1
    # Weights are computed in float64 and rounded once.
    np.testing.assert_allclose(fragments.barycentric[sure], weights[sure], atol=1e-6)
    depth = np.einsum("nk,nk->n", weights[covered], vertices[triangles[index[covered]], 2])
    np.testing.assert_allclose(fragments.depth[covered], depth, atol=1e-5)
    assert np.isinf(fragments.depth[sure & (index < 0)]).all()


def test_the_nearest_of_two_wins_whatever_their_order() -> None:
    vertices = np.array([[0, 0, 5], [0, 8, 5], [8, 0, 5], [0, 0, 3], [0, 8, 3], [8, 0, 3]], np.float32)
    near_last = np.array([[0, 1, 2], [3, 4, 5]], np.int32)
    for triangles, nearest in ((near_last, 1), (near_last[::-1].copy(), 0)):
        fragments = rasterize(vertices, triangles, 8, 8)
        assert set(fragments.triangle[fragments.mask]) == {nearest}
        assert set(fragments.depth[fragments.mask]) == {3.0}


def test_shared_edges_leave_no_hole() -> None:
    rng = np.random.default_rng(0)
    vertices, mesh = grid_mesh(9, 0, SIZE)
    inner = ((vertices[:, :2] > 0) & (vertices[:, :2] < SIZE)).all(1)
    # Half a pixel more or less: many vertices and edges then go through pixel centres exactly.
    vertices[inner, :2] += rng.integers(-2, 3, (int(inner.sum()), 2)) * 0.5
    assert rasterize(vertices, mesh.triangles, SIZE, SIZE).mask.all()
    vertices[inner, :2] += rng.normal(0, 0.3, (int(inner.sum()), 2)).astype(np.float32)
    assert rasterize(vertices, mesh.triangles, SIZE, SIZE).mask.all()


def test_no_pixel_falls_between_slivers() -> None:
    # Two triangles a tenth of a pixel wide on both sides of an edge that goes through a pixel centre.
    rng = np.random.default_rng(1)
    for _ in range(300):
        a, b = rng.uniform(0, 128, (2, 2))
        across = np.array([a[1] - b[1], b[0] - a[0]]) / np.linalg.norm(b - a) * 0.05
        points = np.stack([a, b, (a + b) / 2 + across, (a + b) / 2 - across])
        points += np.floor(points[0]) + 0.5 - (a + (b - a) * rng.uniform(0.3, 0.7))
        column, row = (int(n) for n in np.floor(a))
        triangles = [np.roll([0, 1, 2], rng.integers(3)), np.roll([0, 3, 1], rng.integers(3))]
        fragments = rasterize(points.astype(np.float32), np.array(triangles, np.int32), 128, 128)
        assert fragments.mask[row, column]


def test_two_coordinates_a_flat_triangle_and_no_triangle() -> None:
    vertices = np.array([[1, 1], [1, 7], [7, 1], [2, 2], [4, 4], [6, 6]], np.float32)
    fragments = rasterize(vertices, np.array([[0, 1, 2], [3, 4, 5]], np.int32), 8, 8)
    assert set(fragments.triangle[fragments.mask]) == {0}
    assert set(fragments.depth[fragments.mask]) == {0.0}
    assert not rasterize(vertices, np.zeros((0, 3), np.int32), 8, 8).mask.any()
    assert not rasterize(vertices + 100, np.array([[0, 1, 2]], np.int32), 8, 8).mask.any()


def test_interpolation_is_linear_in_the_picture() -> None:
    vertices, triangles = random_mesh(5)
    vertices[:, 2] = 0.3 * vertices[:, 0] - 0.7 * vertices[:, 1] + 5  # all in one plane
    fragments = rasterize(vertices, triangles, SIZE, SIZE)
    got = interpolate(fragments, triangles, vertices)
    mask = fragments.mask
    # An attribute that is linear in x and y comes back as just that; coordinates of 30 in float32: 30 * 2^-22 = 7e-6.
    np.testing.assert_allclose(got[mask][:, :2], centres(SIZE, SIZE).transpose(1, 2, 0)[mask], atol=5e-5)
    x, y = got[mask][:, 0], got[mask][:, 1]
    np.testing.assert_allclose(got[mask][:, 2], 0.3 * x - 0.7 * y + 5, atol=5e-5)
    assert not got[~mask].any()


def test_normals_are_the_area_weighted_mean_of_the_faces() -> None:
    vertices, mesh = grid_mesh(4, 2, 20)
    vertices[:, 2] = np.random.default_rng(2).uniform(0, 8, len(vertices))
    expected = np.zeros((len(vertices), 3))
    for a, b, c in mesh.triangles:
        # The cross product's length is twice the face's area.
        face = np.cross(vertices[b] - vertices[a], vertices[c] - vertices[a])
        for corner in (a, b, c):
            expected[corner] += face
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(vertex_normals(vertices, mesh.triangles), expected, atol=1e-6)
    assert (expected[:, 2] < 0).all()  # the conventions: what faces the camera points to -z
    lonely = np.concatenate([vertices, [[0, 0, 0]]]).astype(np.float32)
    np.testing.assert_array_equal(vertex_normals(lonely, mesh.triangles)[-1], 0)


def test_normals_of_a_sphere() -> None:
    # A hemisphere seen from the front: the exact normal of a point is its direction from the centre.
    vertices, mesh = grid_mesh(25, -1, 1)
    radius, x, y = 10.0, vertices[:, 0] * 0.4, vertices[:, 1] * 0.4
    direction = np.stack([x, y, -np.sqrt(1 - x**2 - y**2)], -1)
    inner = (np.abs(vertices[:, :2]) < 0.99).all(1)
    got = vertex_normals((12 + radius * direction).astype(np.float32), mesh.triangles)
    # Faces are at most 0.033 / cos(0.6) = 0.04 rad apart, the error is of second order: 0.04^2 = 0.0016.
    np.testing.assert_allclose(got[inner], direction[inner], atol=0.0016)


def test_condition_of_a_tilted_plane() -> None:
    vertices, mesh = grid_mesh(3, 4, 20)
    vertices[:, 2] = 10 + 0.5 * vertices[:, 0]
    condition = condition_raster(vertices, mesh, SIZE, SIZE)
    assert condition.shape == (6, SIZE, SIZE)
    assert condition.dtype == np.float32
    inside = np.zeros((SIZE, SIZE), bool)
    inside[4:20, 4:20] = True
    np.testing.assert_array_equal(condition[5], inside)
    # u and v grow linearly from 0.1 at pixel 4 to 0.9 at pixel 20; float32 of numbers below 1, some operations.
    uv = 0.1 + 0.8 * (centres(SIZE, SIZE) - 4) / 16
    np.testing.assert_allclose(condition[:2, inside], uv[:, inside], atol=1e-6)
    normal = np.array([0.5, 0, -1]) / math.sqrt(1.25)
    np.testing.assert_allclose(condition[2:5, inside], np.repeat(normal[:, None], inside.sum(), 1), atol=1e-6)
    assert not condition[:, ~inside].any()


def turned(vertices: Floats, angle: float, shift: tuple[float, float]) -> Floats:
    """The vertices turned about the picture's centre, then shifted."""
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    moved = vertices.astype(np.float64).copy()
    moved[:, :2] = (moved[:, :2] - SIZE / 2) @ turn.T + SIZE / 2 + shift
    return moved.astype(np.float32)


def test_motion_of_a_rigid_plane_is_its_inverse_transform() -> None:
    start, mesh = grid_mesh(4, 7, 17)
    angle, shift = 0.4, (1.5, -2.25)
    moved = turned(start, angle, shift)
    before, after = (rasterize(v, mesh.triangles, SIZE, SIZE) for v in (start, moved))
    motion, visible = surface_motion(after, before, start, mesh.triangles)
    inverse = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    there = centres(SIZE, SIZE)
    # Back through the shift, then through the turn: where this pixel's surface point was.
    source = np.einsum("ij,jhw->ihw", inverse, there - SIZE / 2 - np.array(shift)[:, None, None]) + SIZE / 2
    expected = np.where(after.mask, source - there, 0)
    assert after.mask.sum() > 80
    # Coordinates below 24 in float32 through some ten operations: 24 * 2^-23 * 10 = 3e-5.
    np.testing.assert_allclose(motion, expected, atol=3e-5)
    np.testing.assert_array_equal(visible, after.mask)  # nothing stood before it


def test_motion_between_a_frame_and_itself_is_zero() -> None:
    vertices, triangles = random_mesh(3)
    fragments = rasterize(vertices, triangles, SIZE, SIZE)
    motion, visible = surface_motion(fragments, fragments, vertices, triangles)
    # 34 * 2^-23 for coordinates and as many operations as above; long slivers have no larger weights than 1.
    np.testing.assert_allclose(motion, 0, atol=5e-5)
    np.testing.assert_array_equal(visible, fragments.mask)


def test_what_a_nearer_triangle_hid_is_not_visible() -> None:
    plane, mesh = grid_mesh(3, 4, 20)
    plane[:, 2] = 10
    # A square a few pixels nearer covers columns and rows 8 to 13; in frame t it is gone to the far corner's outside.
    square = np.array([[8, 8, 4], [8, 14, 4], [14, 8, 4], [14, 14, 4]], np.float32)
    triangles = np.concatenate([mesh.triangles, [[9, 10, 11], [11, 10, 12]]]).astype(np.int32)
    in_s = np.concatenate([plane, square])
    in_t = np.concatenate([plane, square + np.float32(100)])
    before, after = (rasterize(v, triangles, SIZE, SIZE) for v in (in_s, in_t))
    motion, visible = surface_motion(after, before, in_s, triangles)
    np.testing.assert_allclose(motion, 0, atol=5e-5)  # the plane stood still
    hidden = np.zeros((SIZE, SIZE), bool)
    hidden[8:14, 8:14] = True
    # The depth test looks at the 3x3 neighbourhood, so that the outermost ring of what is hidden may count as visible.
    certain = np.zeros((SIZE, SIZE), bool)
    certain[9:13, 9:13] = True
    assert not visible[certain].any()
    np.testing.assert_array_equal(visible[~hidden], after.mask[~hidden])


def test_a_point_outside_the_earlier_frame_was_not_visible() -> None:
    start, mesh = grid_mesh(3, 4, 20)
    moved = start + np.float32([10, 0, 0])
    before, after = (rasterize(v, mesh.triangles, SIZE, SIZE) for v in (moved, start))
    _, visible = surface_motion(after, before, moved, mesh.triangles)
    columns = np.arange(SIZE)[None] + np.zeros((SIZE, 1))
    np.testing.assert_array_equal(visible, after.mask & (columns + 10 < SIZE))


def test_atlas_of_a_plane_is_exact() -> None:
    start, mesh = grid_mesh(4, 7, 17)
    atlas = SurfaceAtlas(mesh, 16)
    moved = turned(start, -0.3, (0.75, 2.0))
    before = rasterize(start, mesh.triangles, SIZE, SIZE)
    after = rasterize(moved, mesh.triangles, SIZE, SIZE)
    placed = atlas.positions(start, before)
    assert placed.shape == (3, 16, 16)
    assert placed.dtype == np.float32
    motion, _ = surface_motion(after, before, start, mesh.triangles)
    read = read_atlas(placed, condition_raster(moved, mesh, SIZE, SIZE, after)) - centres(SIZE, SIZE)
    # Position is linear in UV and bilinear reads are exact on linear functions; the rest is float32: UV to 1e-7 is
    # 10 px / 0.8 * 1e-7 px, grid coordinates to 1e-7 are 24 px / 2 * 1e-7, some operations each.
    np.testing.assert_allclose(read[:, after.mask], motion[:, after.mask], atol=5e-5)
    # Texels of the chart, 0.1 to 0.9 of the square, are visible; those well outside hold nothing.
    assert (placed[2, 2:14, 2:14] == 1).all()
    far = SurfaceAtlas(mesh, 64).positions(start, before)
    assert not far[:, 0].any()


@pytest.mark.parametrize("size", [32, 64])
def test_atlas_of_a_bent_surface_follows_the_exact_motion(size: int) -> None:
    start, mesh = grid_mesh(9, 4, 20)

    def bent(phase: float) -> Floats:
        moved = start.copy()
        moved[:, 0] += 1.2 * np.sin(start[:, 1] / 4 + phase)
        moved[:, 1] += 1.2 * np.cos(start[:, 0] / 5 + phase)
        return moved

    atlas = SurfaceAtlas(mesh, size)
    in_s, in_t = bent(0.0), bent(0.8)
    before, after = (rasterize(v, mesh.triangles, SIZE, SIZE) for v in (in_s, in_t))
    motion, _ = surface_motion(after, before, in_s, mesh.triangles)
    read = read_atlas(atlas.positions(in_s, before), condition_raster(in_t, mesh, SIZE, SIZE, after))
    error = np.abs(read - centres(SIZE, SIZE) - motion)[:, after.mask]
    # Exact but for texels on both sides of an edge: there the slope jumps by at most what the surface bends within two
    # quads, 1.2 px / (4 px)^2 * 4 px = 0.3 px a px, over half a texel, 20 px / size / 2.
    assert error.max() < 0.3 * 10 / size
    assert error.mean() < error.max() / 4


def test_atlas_moved_by_whole_pixels_shifts_the_picture_by_them() -> None:
    start, mesh = grid_mesh(5, 6, 16)
    start[:, 2] = np.random.default_rng(4).uniform(0, 3, len(start))
    moved = start + np.float32([3, -2, 0])
    before, after = (rasterize(v, mesh.triangles, SIZE, SIZE) for v in (start, moved))
    placed = SurfaceAtlas(mesh, 32).positions(start, before)
    where = read_atlas(placed, condition_raster(moved, mesh, SIZE, SIZE, after))
    image = np.random.default_rng(5).uniform(-1, 1, (1, 3, SIZE, SIZE)).astype(np.float32)
    grid = torch.from_numpy(where / SIZE * 2 - 1)[None].permute(0, 2, 3, 1)
    warped = functional.grid_sample(torch.from_numpy(image), grid, align_corners=False)[0].numpy()
    shifted = np.roll(image[0], (-2, 3), (1, 2))
    # Reads a millionth of a pixel off the centre mix in as much of the neighbour, which differs by at most 2.
    np.testing.assert_allclose(warped[:, after.mask], shifted[:, after.mask], atol=1e-4)


def test_atlas_says_what_is_hidden() -> None:
    plane, mesh = grid_mesh(5, 4, 20)
    plane[:, 2] = 10
    atlas = SurfaceAtlas(mesh, 16)
    covered = Fragments(
        np.zeros((SIZE, SIZE), np.int32), np.zeros((SIZE, SIZE, 3), np.float32), np.full((SIZE, SIZE), 4, np.float32)
    )
    assert not atlas.positions(plane, covered)[2].any()
    assert atlas.positions(plane, rasterize(plane, mesh.triangles, SIZE, SIZE))[2, 2:14, 2:14].all()

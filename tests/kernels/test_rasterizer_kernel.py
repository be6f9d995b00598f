"""The rasteriser's kernels against their NumPy reference, and what the reference promises beyond its own tests.

Both do the same IEEE operations in the same order, edges in float64 and without fused multiply-adds, so what is seen at
a pixel (triangle, depth) must be equal everywhere, edges and ties included: there is no band to leave out.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from warpcache.engine.cuda.device import CudaDevice, CudaStream
from warpcache.engine.spec import TensorSpec
from warpcache.kernels.array import DeviceArray
from warpcache.kernels.compiler import ARCHITECTURES, compile_cubin
from warpcache.kernels.driver import check, load
from warpcache.kernels.errors import DeviceError, InputError
from warpcache.kernels.rasterizer import MeshRasterizer, unpack_keys
from warpcache.kernels.reference.rasterizer import (
    Fragments,
    Mesh,
    SurfaceAtlas,
    condition_raster,
    rasterize,
    surface_motion,
    vertex_normals,
)
from warpcache.models.head import SyntheticHead

Floats = NDArray[np.float32]

# Values up to 1 out of three products, a root and a division, each rounded once to 2^-24 of its value; in float16 the
# result is rounded once more, to 2^-11.
TOLERANCE = {"float32": 6 * 2.0**-24, "float16": 2.0**-11}
KERNELS = ("prepare", "draw", "resolve_f32", "resolve_f16", "motion_f32", "motion_f16", "atlas_f32", "atlas_f16")


@pytest.fixture
def device(gpu: Any) -> CudaDevice:
    opened: CudaDevice = gpu.device
    return opened


@pytest.fixture
def stream(gpu: Any) -> CudaStream:
    opened: CudaStream = gpu.stream
    return opened


def soup(seed: int, count: int, height: int, width: int) -> tuple[Floats, Mesh]:
    """Triangles of all sizes and orientations that cross each other and the picture's borders, no vertex shared."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(-4, [width + 4, height + 4], (count, 1, 2))
    corners = centres + rng.normal(0, rng.uniform(1, 25, (count, 1, 1)), (count, 3, 2))
    points = np.concatenate([corners, rng.uniform(-9, 20, (count, 3, 1))], -1).reshape(-1, 3).astype(np.float32)
    uv = rng.uniform(0, 1, (3 * count, 2)).astype(np.float32)
    return points, Mesh(np.arange(3 * count, dtype=np.int32).reshape(count, 3), uv)


def sheet(n: int, low: float, high: float) -> tuple[Floats, Mesh]:
    """A flat square of (n - 1)^2 quads from `low` to `high` pixels, facing the camera; UV from 0.1 to 0.9."""
    y, x = np.meshgrid(np.linspace(0, 1, n), np.linspace(0, 1, n), indexing="ij")
    points = np.stack([low + (high - low) * x, low + (high - low) * y, np.zeros_like(x)], -1).reshape(-1, 3)
    number = np.arange(n * n).reshape(n, n)
    first = np.stack([number[:-1, :-1], number[1:, :-1], number[:-1, 1:]], -1).reshape(-1, 3)
    second = np.stack([number[:-1, 1:], number[1:, :-1], number[1:, 1:]], -1).reshape(-1, 3)
    uv = 0.1 + 0.8 * np.stack([x, y], -1).reshape(-1, 2)
    return points.astype(np.float32), Mesh(np.concatenate([first, second]).astype(np.int32), uv.astype(np.float32))


def empty(device: CudaDevice, channels: int, height: int, width: int, dtype: str = "float32") -> DeviceArray:
    array = device.allocate(TensorSpec("result", dtype, (1, channels, height, width)))
    settle()
    return array


def upload(device: CudaDevice, values: NDArray[Any]) -> DeviceArray:
    array = device.upload(values)
    settle()
    return array


def settle() -> None:
    """Wait for the default stream, on which memory is zeroed and copied to: the tests' own stream does not."""
    check(load().cuStreamSynchronize(0), "waiting for the default stream")


def draw(
    device: CudaDevice,
    stream: CudaStream,
    rasterizer: MeshRasterizer,
    vertices: Floats,
    dtype: str = "float32",
    frame: int = 0,
) -> tuple[Fragments, NDArray[Any]]:
    """One frame: what is seen at its pixels (without weights), and its condition [6, H, W]."""
    condition = empty(device, 6, rasterizer.height, rasterizer.width, dtype)
    points = upload(device, vertices)
    rasterizer.render(points, condition, stream=stream.handle, frame=frame)
    stream.synchronize()
    triangle, depth = unpack_keys(device.download(rasterizer.keys(frame)))
    return Fragments(triangle, np.zeros((*depth.shape, 3), np.float32), depth), device.download(condition)[0]


def assert_as_reference(
    device: CudaDevice,
    stream: CudaStream,
    vertices: Floats,
    mesh: Mesh,
    height: int,
    width: int,
    *,
    dtype: str = "float32",
    cull_back: bool = False,
) -> Fragments:
    rasterizer = MeshRasterizer(device.context, mesh, height, width, cull_back=cull_back)
    seen, condition = draw(device, stream, rasterizer, vertices, dtype)
    expected = rasterize(vertices, mesh.triangles, height, width, cull_back=cull_back)
    np.testing.assert_array_equal(seen.triangle, expected.triangle)
    np.testing.assert_array_equal(seen.depth, expected.depth)
    assert condition.dtype == np.dtype(dtype)
    wanted = condition_raster(vertices, mesh, height, width, expected)
    np.testing.assert_allclose(condition.astype(np.float32), wanted, rtol=0, atol=TOLERANCE[dtype])
    np.testing.assert_array_equal(condition[5], expected.mask)
    return expected


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_for_every_architecture(arch: str) -> None:
    from importlib.resources import files

    source = (files("warpcache.kernels") / "rasterizer.cu").read_text("utf-8")
    code = compile_cubin(source, arch, name="rasterizer.cu")
    for name in KERNELS:
        assert b"rasterizer_" + name.encode() in code


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("height", "width", "count"), [(24, 24, 12), (37, 53, 40), (1, 7, 3), (9, 1, 9), (66, 97, 30), (16, 40, 150)]
)
def test_a_frame_is_the_reference(
    device: CudaDevice, stream: CudaStream, height: int, width: int, count: int, dtype: str
) -> None:
    # In 66x97 pixels triangles are large: more 8x4 blocks than one warp draws.
    vertices, mesh = soup(height, count, height, width)
    seen = assert_as_reference(device, stream, vertices, mesh, height, width, dtype=dtype)
    assert seen.mask.any()


def test_back_faces_are_left_out_where_asked(device: CudaDevice, stream: CudaStream) -> None:
    vertices, mesh = soup(2, 40, 37, 53)
    culled = assert_as_reference(device, stream, vertices, mesh, 37, 53, cull_back=True)
    a, b, c = (vertices[mesh.triangles[:, corner], :2].astype(np.float64) for corner in range(3))
    area = (b - a)[:, 0] * (c - a)[:, 1] - (c - a)[:, 0] * (b - a)[:, 1]
    seen = np.unique(culled.triangle[culled.mask])
    assert len(seen) > 5
    assert (area[seen] < 0).all()  # counter-clockwise in the picture: facing the camera
    assert (area[np.unique(rasterize(vertices, mesh.triangles, 37, 53).triangle)[1:]] > 0).any()


@pytest.fixture(scope="module")
def head() -> SyntheticHead:
    return SyntheticHead(0, 64)


def test_conditions_of_the_head_are_made_on_the_gpu(
    device: CudaDevice, stream: CudaStream, head: SyntheticHead
) -> None:
    motion = head.motion(40)
    atlas = SurfaceAtlas(head.mesh, 64)
    rasterizer = MeshRasterizer(device.context, head.mesh, 64, 64, cull_back=True, atlas=atlas)
    placed = empty(device, 3, 64, 64)
    for parameters in list(motion)[::20]:
        vertices = head.vertices(parameters)
        _, condition = draw(device, stream, rasterizer, vertices)
        rasterizer.place_atlas(placed, stream=stream.handle)
        stream.synchronize()
        wanted = next(iter(head.frames([parameters])))[0]
        np.testing.assert_allclose(condition, wanted["condition"][0], rtol=0, atol=TOLERANCE["float32"])
        assert 0.2 < condition[5].mean() < 0.8
        # Coordinates below 1 after a sum of three products of weights up to 4 outside a chart, and one more product.
        np.testing.assert_allclose(device.download(placed)[0, :2], wanted["atlas"][0, :2], rtol=0, atol=16 * 2.0**-24)


def test_edges_through_pixel_centres_leave_no_hole(device: CudaDevice, stream: CudaStream) -> None:
    vertices, mesh = sheet(9, 0, 24)
    inner = ((vertices[:, :2] > 0) & (vertices[:, :2] < 24)).all(1)
    vertices[inner, :2] += np.random.default_rng(0).integers(-2, 3, (int(inner.sum()), 2)) * 0.5
    assert assert_as_reference(device, stream, vertices, mesh, 24, 24).mask.all()


def test_slivers_are_the_reference(device: CudaDevice, stream: CudaStream) -> None:
    # Pairs a tenth of a pixel wide on both sides of an edge that goes through a pixel centre.
    rng = np.random.default_rng(1)
    points, centres = [], []
    for _ in range(60):
        a, b = rng.uniform(4, 60, (2, 2))
        across = np.array([a[1] - b[1], b[0] - a[0]]) / np.linalg.norm(b - a) * 0.05
        pair = np.stack([a, b, (a + b) / 2 + across, (a + b) / 2 - across])
        centre = np.floor(pair[0]) + 0.5
        points.append(pair + centre - (a + (b - a) * rng.uniform(0.3, 0.7)))
        centres.append(centre)
    vertices = np.concatenate([np.concatenate(points), rng.uniform(0, 5, (240, 1))], -1).astype(np.float32)
    pairs = 4 * np.arange(60)[:, None, None] + np.array([[0, 1, 2], [0, 3, 1]])
    mesh = Mesh(pairs.reshape(-1, 3).astype(np.int32), rng.uniform(0, 1, (240, 2)).astype(np.float32))
    seen = assert_as_reference(device, stream, vertices, mesh, 64, 64)
    column, row = np.floor(np.array(centres)).astype(int).T
    assert seen.mask[row, column].all()


def test_of_several_at_one_depth_the_last_is_seen(device: CudaDevice, stream: CudaStream) -> None:
    corners = [[2, 2], [2, 14], [14, 2]]
    # The first three are one triangle at depths 0, -0 and 0; the fourth lies behind them.
    vertices = np.array([[*xy, z] for z in (0.0, -0.0, 0.0, 1.0) for xy in corners], np.float32)
    uv = np.random.default_rng(0).uniform(0, 1, (12, 2)).astype(np.float32)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]):
        triangles = np.arange(12, dtype=np.int32).reshape(4, 3)[order]
        seen = assert_as_reference(device, stream, vertices, Mesh(triangles, uv), 16, 16)
        assert set(seen.triangle[seen.mask]) == {max(place for place, which in enumerate(order) if which != 3)}


def test_negative_depths_are_in_order(device: CudaDevice, stream: CudaStream) -> None:
    vertices = np.array([[*xy, z] for z in (-2.0, -7.5, 3.0) for xy in ([0, 0], [0, 16], [16, 0])], np.float32)
    mesh = Mesh(np.arange(9, dtype=np.int32).reshape(3, 3), np.zeros((9, 2), np.float32))
    seen = assert_as_reference(device, stream, vertices, mesh, 8, 8)
    assert set(seen.triangle[seen.mask]) == {1}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_what_is_not_finite_is_not_drawn(device: CudaDevice, stream: CudaStream, value: float, axis: int) -> None:
    vertices, mesh = sheet(4, 2, 30)
    vertices[:, 2] = np.random.default_rng(0).uniform(0, 3, len(vertices))
    rest = mesh.triangles[(mesh.triangles != 5).all(1)]
    without = rasterize(vertices, rest, 32, 32).mask
    vertices[5, axis] = value
    seen = assert_as_reference(device, stream, vertices, mesh, 32, 32)
    np.testing.assert_array_equal(seen.mask, without)
    # Nor do the faces at it bend the normals of its neighbours.
    others = np.unique(rest)
    np.testing.assert_array_equal(
        vertex_normals(vertices, mesh.triangles)[others], vertex_normals(vertices, rest)[others]
    )


def test_huge_flat_and_far_triangles(device: CudaDevice, stream: CudaStream) -> None:
    most = np.finfo(np.float32).max
    vertices = np.array(
        [
            *([[-most, -most, 9], [most, -most, 9], [0, most, 9]]),  # covers everything
            *([[-1e9, -1e9, 8], [-1e9, 1e9, 8], [1e9, 0, 8]]),
            *([[3, 3, 0], [9, 9, 0], [6, 6, 0]]),  # flat
            *([[5, 5, 0], [5, 5, 0], [5, 5, 0]]),
            *([[-9, 2, 0], [-3, 9, 0], [-1, 4, 0]]),  # left of the picture, then below it
            *([[2, 40, 0], [9, 50, 0], [5, 90, 0]]),
            *([[10, 10, 1], [10, 13, 1], [13, 10, most]]),
        ],
        np.float32,
    )
    count = len(vertices)
    uv = np.random.default_rng(0).uniform(0, 1, (count, 2)).astype(np.float32)
    mesh = Mesh(np.arange(count, dtype=np.int32).reshape(-1, 3), uv)
    seen = assert_as_reference(device, stream, vertices, mesh, 33, 65)
    assert seen.mask.all()
    assert set(np.unique(seen.triangle)) <= {0, 1, 6}


def test_a_mesh_without_triangles_is_empty(device: CudaDevice, stream: CudaStream) -> None:
    mesh = Mesh(np.zeros((0, 3), np.int32), np.zeros((4, 2), np.float32))
    seen = assert_as_reference(device, stream, np.ones((4, 3), np.float32), mesh, 5, 7)
    assert not seen.mask.any()


def test_nothing_is_written_beside_the_condition(device: CudaDevice, stream: CudaStream) -> None:
    vertices, mesh = soup(3, 5, 13, 11)
    rasterizer = MeshRasterizer(device.context, mesh, 13, 11)
    points = upload(device, vertices)
    for dtype in ("float32", "float16"):
        size = 6 * 13 * 11
        held = upload(device, np.full(size + 128, 7, dtype))
        inside = DeviceArray(
            held.pointer + 64 * held.dtype.itemsize, (1, 6, 13, 11), dtype, device=device.ordinal, owner=held
        )
        rasterizer.render(points, inside, stream=stream.handle)
        stream.synchronize()
        back = device.download(held)
        assert (back[:64] == 7).all()
        assert (back[64 + size :] == 7).all()
        assert set(np.unique(back[64 + 5 * 143 : 64 + size])) == {0.0, 1.0}


def test_frames_do_not_depend_on_what_was_drawn_before(device: CudaDevice, stream: CudaStream) -> None:
    first, mesh = soup(4, 30, 66, 97)
    second = soup(5, 30, 66, 97)[0]
    rasterizer = MeshRasterizer(device.context, mesh, 66, 97, frames=2)
    one = draw(device, stream, rasterizer, first)
    other = draw(device, stream, rasterizer, second, frame=1)
    again = draw(device, stream, rasterizer, first, frame=1)
    assert one[1].tobytes() == again[1].tobytes()
    assert one[0].depth.tobytes() == again[0].depth.tobytes()
    assert one[1].tobytes() != other[1].tobytes()
    # And the other held frame is still what it was.
    np.testing.assert_array_equal(unpack_keys(device.download(rasterizer.keys(0)))[0], one[0].triangle)


def test_another_triangle_may_be_large_in_every_frame(device: CudaDevice, stream: CudaStream) -> None:
    wide = np.float32([[0, 0, 1], [0, 66, 1], [97, 30, 1]])
    small = np.float32([[40, 20, 0], [40, 30, 0], [52, 20, 0]])
    mesh = Mesh(np.arange(6, dtype=np.int32).reshape(2, 3), np.zeros((6, 2), np.float32))
    rasterizer = MeshRasterizer(device.context, mesh, 66, 97)
    for first, second in ((wide, small), (wide, small), (small, wide), (small, small), (small, wide)):
        vertices = np.concatenate([first, second])
        seen, _ = draw(device, stream, rasterizer, vertices)
        np.testing.assert_array_equal(seen.triangle, rasterize(vertices, mesh.triangles, 66, 97).triangle)


def wavy(phase: float, size: float) -> tuple[Floats, Mesh]:
    """A bent sheet with a nearer square before it that moves with the phase."""
    points, mesh = sheet(7, 3, size - 3)
    start = points.copy()
    points[:, 0] += 1.5 * np.sin(start[:, 1] / 6 + phase)
    points[:, 1] += 1.5 * np.cos(start[:, 0] / 5 + phase)
    points[:, 2] = 10 + 2 * np.sin(start[:, 0] / 4 + phase)
    side = np.float32([[0, 0, 2], [0, 9, 2], [9, 0, 2], [9, 9, 2]]) + np.float32([8 + 6 * phase, 9 - 4 * phase, 0])
    count = len(points)
    triangles = np.concatenate([mesh.triangles, [[count, count + 1, count + 2], [count + 2, count + 1, count + 3]]])
    uv = np.concatenate([mesh.uv * 0.8, [[0.85, 0.85], [0.85, 0.97], [0.97, 0.85], [0.97, 0.97]]])
    return np.concatenate([points, side]).astype(np.float32), Mesh(triangles.astype(np.int32), uv.astype(np.float32))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_motion_and_visibility_are_the_reference(device: CudaDevice, stream: CudaStream, dtype: str) -> None:
    (before, mesh), (after, _) = wavy(0.0, 41), wavy(1.0, 41)
    before[3] = np.nan  # a point of frame t that is nowhere in frame s
    rasterizer = MeshRasterizer(device.context, mesh, 37, 36, frames=2)
    draw(device, stream, rasterizer, before, frame=0)
    draw(device, stream, rasterizer, after, frame=1)
    motion = empty(device, 3, 37, 36, dtype)
    rasterizer.motion(motion, stream=stream.handle, frame=1, source=0)
    stream.synchronize()
    got = device.download(motion)[0].astype(np.float32)
    fragments = [rasterize(vertices, mesh.triangles, 37, 36) for vertices in (before, after)]
    flow, visible = surface_motion(fragments[1], fragments[0], before, mesh.triangles)
    # Coordinates up to 41 in float32 through three products and sums: 41 * 2^-24 * 6; float16 of flows up to 16: 2^-8.
    np.testing.assert_allclose(got[:2], flow, rtol=0, atol=1.5e-5 if dtype == "float32" else 2.0**-8)
    np.testing.assert_array_equal(got[2], visible)
    mask = fragments[1].mask
    assert 0.5 < visible[mask].mean() < 0.98  # something was hidden by the square, or right of the picture
    assert np.abs(flow).max() > 2
    assert not got[:, ~mask].any()


def test_motion_of_a_frame_to_itself_is_none(device: CudaDevice, stream: CudaStream) -> None:
    vertices, mesh = wavy(0.3, 41)
    rasterizer = MeshRasterizer(device.context, mesh, 41, 41)
    seen, _ = draw(device, stream, rasterizer, vertices)
    motion = empty(device, 3, 41, 41)
    rasterizer.motion(motion, stream=stream.handle, frame=0, source=0)
    stream.synchronize()
    got = device.download(motion)[0]
    # The point's place from rounded weights: 41 * 2^-24 * 6.
    np.testing.assert_allclose(got[:2], 0, atol=1.5e-5)
    np.testing.assert_array_equal(got[2], seen.mask)


@pytest.mark.parametrize(("dtype", "far"), [("float32", 1e6), ("float16", 65504.0)])
def test_motion_to_far_outside_stays_finite(device: CudaDevice, stream: CudaStream, dtype: str, far: float) -> None:
    vertices, mesh = wavy(0.3, 20)
    rasterizer = MeshRasterizer(device.context, mesh, 20, 20, frames=2)
    seen, _ = draw(device, stream, rasterizer, vertices)
    draw(device, stream, rasterizer, vertices + np.float32([1e6, -1e6, 0]), frame=1)
    motion = empty(device, 3, 20, 20, dtype)
    rasterizer.motion(motion, stream=stream.handle, frame=0, source=1)
    stream.synchronize()
    got = device.download(motion)[0].astype(np.float32)
    wanted = np.where(seen.mask, np.float32([far, -far, 0])[:, None, None], 0)
    # A million in float32 through three products and sums: 1e6 * 2^-24 * 6.
    np.testing.assert_allclose(got, wanted, rtol=0, atol=0.4)


def test_a_frame_that_was_not_drawn_is_empty(device: CudaDevice, stream: CudaStream) -> None:
    vertices, mesh = wavy(0.0, 20)
    rasterizer = MeshRasterizer(device.context, mesh, 20, 20, frames=2)
    assert (unpack_keys(device.download(rasterizer.keys(1)))[0] == -1).all()
    draw(device, stream, rasterizer, vertices)
    motion = upload(device, np.full((1, 3, 20, 20), 5, np.float32))
    rasterizer.motion(motion, stream=stream.handle, frame=1, source=0)
    stream.synchronize()
    assert not device.download(motion).any()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_atlas_is_the_reference(device: CudaDevice, stream: CudaStream, dtype: str) -> None:
    vertices, mesh = wavy(0.6, 41)
    atlas = SurfaceAtlas(mesh, 19)
    rasterizer = MeshRasterizer(device.context, mesh, 29, 41, atlas=atlas)
    draw(device, stream, rasterizer, vertices)
    placed = empty(device, 3, 19, 19, dtype)
    rasterizer.place_atlas(placed, stream=stream.handle)
    stream.synchronize()
    got = device.download(placed)[0].astype(np.float32)
    fragments = rasterize(vertices, mesh.triangles, 29, 41)
    wanted = atlas.positions(vertices, fragments)
    # Up to 1.5 after products with weights up to 3 outside a chart; NumPy's einsum may fuse products and sums.
    np.testing.assert_allclose(got[:2], wanted[:2], rtol=0, atol=16 * 2.0**-24 if dtype == "float32" else 2.0**-10)
    # A point at a pixel's border or just as deep as the surface may fall on either side of it.
    nudges = [np.float32(nudge) for axis in np.eye(3) for nudge in (1e-4 * axis, -1e-4 * axis)]
    sure = np.all([atlas.positions(vertices + nudge, fragments)[2] == wanted[2] for nudge in nudges], axis=0)
    assert sure.mean() > 0.98
    np.testing.assert_array_equal(got[2][sure], wanted[2][sure])
    assert {0.0, 1.0} == set(np.unique(got[2]))
    assert (wanted[2] == 0)[atlas.mask].mean() > 0.05  # below the picture, and behind the square


def test_a_frame_is_captured_once_and_replayed_with_new_vertices(device: CudaDevice, stream: CudaStream) -> None:
    first, mesh = soup(6, 30, 40, 72)
    second = soup(7, 30, 40, 72)[0]
    rasterizer = MeshRasterizer(device.context, mesh, 40, 72)
    vertices, condition = upload(device, first), empty(device, 6, 40, 72)
    launches = rasterizer.prepare_render(vertices, condition)
    cuda = load()
    mode = cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    check(cuda.cuStreamBeginCapture(stream.stream, mode), "capturing")
    launches.launch(stream.handle)
    graph = check(cuda.cuStreamEndCapture(stream.stream), "capturing")
    replay = check(cuda.cuGraphInstantiate(graph, 0), "instantiating")
    for points in (first, second, first):
        staged = np.ascontiguousarray(points)
        check(cuda.cuMemcpyHtoD(vertices.pointer, staged.ctypes.data, staged.nbytes), "copying")
        settle()
        check(cuda.cuGraphLaunch(replay, stream.stream), "replaying")
        stream.synchronize()
        wanted = condition_raster(points, mesh, 40, 72)
        np.testing.assert_allclose(device.download(condition)[0], wanted, rtol=0, atol=TOLERANCE["float32"])
    check(cuda.cuGraphExecDestroy(replay), "closing")
    check(cuda.cuGraphDestroy(graph), "closing")


def test_wrong_arrays_are_refused(device: CudaDevice, stream: CudaStream) -> None:
    vertices, mesh = sheet(3, 1, 7)
    rasterizer = MeshRasterizer(device.context, mesh, 8, 10)
    good, condition = upload(device, vertices), empty(device, 6, 8, 10)

    def array(shape: tuple[int, ...], dtype: str = "float32", **options: Any) -> DeviceArray:
        return DeviceArray(good.pointer, shape, dtype, **{"device": device.ordinal, **options})

    for points, target, message in (
        (array((8, 3)), condition, r"vertices_px has shape \[8, 3\], expected \[1, 9, 3\]"),
        (array((9, 3), "float64"), condition, "vertices_px is float64, expected float32"),
        (array((9, 3), strides=(4, 1)), condition, r"vertices_px has strides \[4, 1\]"),
        (array((9, 3), device=1), condition, "vertices_px is on cuda:1, expected cuda:0"),
        (vertices, condition, "vertices_px is of type ndarray"),
        (good, array((1, 6, 10, 8)), r"condition has shape \[1, 6, 10, 8\], expected \[1, 6, 8, 10\]"),
        (good, array((1, 6, 8, 10), "uint8"), "condition is uint8, expected float32 or float16"),
        (good, array((1, 6, 8, 10), strides=(1, 1, 60, 6)), "condition has strides"),
    ):
        with pytest.raises(InputError, match=f"^{message}"):
            rasterizer.render(points, target, stream=stream.handle)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^there is no frame 1: the rasteriser holds 1"):
        rasterizer.render(good, condition, stream=stream.handle, frame=1)
    with pytest.raises(InputError, match=r"^there is no frame -1"):
        rasterizer.motion(empty(device, 3, 8, 10), stream=stream.handle, frame=0, source=-1)
    with pytest.raises(InputError, match=r"^motion has shape \[1, 2, 8, 10\]"):
        rasterizer.motion(empty(device, 2, 8, 10), stream=stream.handle, frame=0, source=0)
    with pytest.raises(InputError, match=r"^the rasteriser was made without an atlas"):
        rasterizer.place_atlas(empty(device, 3, 8, 8), stream=stream.handle)


def test_wrong_meshes_are_refused(device: CudaDevice) -> None:
    _, mesh = sheet(3, 1, 7)
    replace = dataclasses.replace
    for wrong, message in (
        (replace(mesh, triangles=mesh.triangles + np.int32(1)), "triangles names vertex 9, and uv has 9"),
        (replace(mesh, triangles=mesh.triangles - np.int32(1)), "triangles names vertex -1"),
        (replace(mesh, triangles=mesh.triangles.astype(np.int64)), "triangles is int64"),
        (replace(mesh, triangles=mesh.triangles[:, :2]), r"triangles is int32 \[8, 2\], expected int32 \[N, 3\]"),
        (replace(mesh, uv=mesh.uv[:, :1]), r"uv is float32 \[9, 1\], expected float32 \[N, 2\]"),
        (replace(mesh, uv=np.full_like(mesh.uv, np.nan)), "uv holds NaN or Inf"),
        (Mesh(np.zeros((0, 3), np.int32), np.zeros((0, 2), np.float32)), "the mesh has no vertex"),
    ):
        with pytest.raises(InputError, match=f"^{message}"):
            MeshRasterizer(device.context, wrong, 8, 8)
    for height, width, message in ((0, 8, "height is 0"), (8, 1 << 16, "width is 65536, expected 1 to 32768")):
        with pytest.raises(InputError, match=f"^{message}"):
            MeshRasterizer(device.context, mesh, height, width)
    with pytest.raises(InputError, match=r"^frames is 0"):
        MeshRasterizer(device.context, mesh, 8, 8, frames=0)
    with pytest.raises(InputError, match=r"^the atlas was made from another mesh"):
        MeshRasterizer(device.context, mesh, 8, 8, atlas=SurfaceAtlas(sheet(5, 1, 7)[1], 8))


def test_closing_twice_and_drawing_after_it(device: CudaDevice, stream: CudaStream) -> None:
    vertices, mesh = sheet(3, 1, 7)
    rasterizer = MeshRasterizer(device.context, mesh, 8, 8)
    points, condition = upload(device, vertices), empty(device, 6, 8, 8)
    launches = rasterizer.prepare_render(points, condition)
    rasterizer.close()
    rasterizer.close()
    with pytest.raises(DeviceError, match=r"^the kernels of rasterizer\.cu on cuda:0 are closed"):
        launches.launch(stream.handle)

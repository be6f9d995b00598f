"""The synthetic head: what its parameters do in the picture, its mesh, its motion and its ground truth."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from warpcache.engine.errors import InputError
from warpcache.models.head import HeadMotion, HeadParameters, SyntheticHead
from warpcache.models.head.chart import Part
from warpcache.models.head.face import MOUTH_Y
from warpcache.models.rasterizer import rasterize

SIZE = 128
REST = HeadParameters()


@pytest.fixture(scope="module")
def head() -> SyntheticHead:
    return SyntheticHead(seed=0, size=SIZE)


def visible(head: SyntheticHead, parameters: HeadParameters) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Part [H, W] (-1 outside), local coordinates [H, W, 3] and mask, from a plain rasterisation of every triangle."""
    vertices = head.vertices(parameters)
    fragments = rasterize(vertices, head.mesh.triangles, SIZE, SIZE)
    corners = head.mesh.triangles[np.maximum(fragments.triangle, 0)]
    part = np.where(fragments.mask, head.shape.part[corners[..., 0]], -1)
    local = (head.shape.local[corners] * fragments.barycentric[..., None]).sum(2)
    return part, local, fragments.mask


def count(head: SyntheticHead, parameters: HeadParameters, part: int) -> int:
    return int((visible(head, parameters)[0] == part).sum())


def inner_mouth(head: SyntheticHead, parameters: HeadParameters) -> int:
    part, local, _ = visible(head, parameters)
    # The mouth's inside is the part of the face's chart with a positive third coordinate.
    return int(((part == Part.TEETH) | ((part == Part.FACE) & (local[..., 2] > 0.05))).sum())


def test_same_seed_gives_the_same_head_and_another_seed_another(head: SyntheticHead) -> None:
    parameters = HeadParameters(yaw=0.2, jaw=0.4, smile=0.5)
    again, other = SyntheticHead(seed=0, size=SIZE), SyntheticHead(seed=3, size=SIZE)
    np.testing.assert_array_equal(head.render(parameters), again.render(parameters))
    np.testing.assert_array_equal(head.vertices(parameters), again.vertices(parameters))
    # Another character: other colours on most of the head, not a few pixels.
    assert np.abs(head.render(parameters) - other.render(parameters)).mean() > 0.05
    assert np.abs(head.vertices(parameters) - other.vertices(parameters)).max() > 0.2


def test_picture_is_finite_in_range_and_leaves_the_backdrop_alone(head: SyntheticHead) -> None:
    poses = (REST, HeadParameters(yaw=-0.5, pitch=0.2, jaw=1.0), HeadParameters(blink=1.0, smile=1.0, roll=0.2))
    pictures = [head.render(pose) for pose in poses]
    covered = np.zeros((SIZE, SIZE), np.bool_)
    for pose, picture in zip(poses, pictures, strict=True):
        assert picture.shape == (3, SIZE, SIZE)
        assert picture.dtype == np.float32
        assert np.isfinite(picture).all()
        assert picture.min() >= -1.0
        assert picture.max() <= 1.0
        covered |= visible(head, pose)[2]
    # Softened edges reach one pixel beyond the mask.
    near = np.pad(covered, 1)
    near = np.any([near[i : i + SIZE, j : j + SIZE] for i in range(3) for j in range(3)], axis=0)
    assert (~near).mean() > 0.2
    for picture in pictures[1:]:
        np.testing.assert_array_equal(picture[:, ~near], pictures[0][:, ~near])


def test_blink_covers_the_eyeballs(head: SyntheticHead) -> None:
    opened, half, closed = (count(head, replace(REST, blink=b), Part.EYE) for b in (0.0, 0.5, 1.0))
    assert opened > 100
    assert 0.2 * opened < half < 0.8 * opened
    # Closed lids may leave single pixels where both margins fall between pixel centres.
    assert closed <= 0.02 * opened


def test_jaw_opens_the_mouth(head: SyntheticHead) -> None:
    closed, half, wide = (inner_mouth(head, replace(REST, jaw=j)) for j in (0.0, 0.5, 1.0))
    assert closed <= 8
    assert half > closed + 20
    assert wide > 1.4 * half


def test_yaw_and_pitch_move_the_nose(head: SyntheticHead) -> None:
    neutral = head.vertices(REST)
    # The nose's tip is the nearest point of the face.
    face = np.flatnonzero(head.shape.part == Part.FACE)
    tip = face[np.argmin(neutral[face, 2])]
    assert abs(neutral[tip, 0] - SIZE / 2) < 0.05 * SIZE
    assert head.vertices(replace(REST, yaw=0.3))[tip, 0] > neutral[tip, 0] + 0.04 * SIZE
    assert head.vertices(replace(REST, yaw=-0.3))[tip, 0] < neutral[tip, 0] - 0.04 * SIZE
    assert head.vertices(replace(REST, pitch=0.3))[tip, 1] < neutral[tip, 1] - 0.02 * SIZE
    # Roll tips the crown, which lies above the pivot, to the right.
    crown = np.argmin(neutral[:, 1])
    assert head.vertices(replace(REST, roll=0.2))[crown, 0] > neutral[crown, 0] + 0.04 * SIZE
    # Shifts are in head heights; the head itself moves, whatever the body does.
    assert head.vertices(replace(REST, tx=0.05))[tip, 0] > neutral[tip, 0] + 0.02 * SIZE


def test_gaze_moves_the_pupils_and_leaves_the_head(head: SyntheticHead) -> None:
    def pupils(parameters: HeadParameters) -> np.ndarray:
        part, local, _ = visible(head, parameters)
        rows, columns = np.nonzero((part == Part.EYE) & (np.hypot(local[..., 0], local[..., 1]) < 0.3))
        return np.array([columns.mean(), rows.mean()])

    assert pupils(replace(REST, gaze_x=0.3))[0] > pupils(REST)[0] + 1.0
    assert pupils(replace(REST, gaze_x=-0.3))[0] < pupils(REST)[0] - 1.0
    assert pupils(replace(REST, gaze_y=0.2))[1] < pupils(REST)[1] - 0.5
    still = ~np.isin(head.shape.part, (Part.EYE, Part.FACE, Part.LASHES))
    np.testing.assert_array_equal(
        head.vertices(replace(REST, gaze_x=0.3, gaze_y=0.2))[still], head.vertices(REST)[still]
    )


def test_smile_widens_the_mouth_and_lifts_its_corners(head: SyntheticHead) -> None:
    face = np.flatnonzero((head.shape.part == Part.FACE) & (head.shape.local[:, 2] == 0))
    on_line = face[np.abs(head.shape.local[face, 1] - MOUTH_Y) < 1e-3]
    lips = on_line[np.abs(head.shape.local[on_line, 0]) < 0.23]
    corner = lips[np.argmax(head.shape.local[lips, 0])]
    neutral, smiling = head.vertices(REST)[corner], head.vertices(replace(REST, smile=1.0))[corner]
    assert smiling[0] > neutral[0] + 0.01 * SIZE
    assert smiling[1] < neutral[1] - 0.01 * SIZE


def test_brow_moves_the_skin_above_the_eyes_only(head: SyntheticHead) -> None:
    step = head.vertices(replace(REST, brow=1.0)) - head.vertices(REST)
    local, face = head.shape.local, head.shape.part == Part.FACE
    brow = face & (np.abs(local[:, 1] - 0.31) < 0.03) & (np.abs(np.abs(local[:, 0]) - 0.3) < 0.1)
    chin = face & (local[:, 1] < -0.7) & (local[:, 2] == 0)
    assert step[brow, 1].max() < -0.01 * SIZE
    assert np.abs(step[chin]).max() < 1e-3


def test_charts_do_not_overlap_in_uv(head: SyntheticHead) -> None:
    uv, triangles = head.mesh.uv.astype(np.float64), head.mesh.triangles
    assert uv.min() > 0.0
    assert uv.max() < 1.0
    a, b, c = (uv[triangles[:, k]] for k in range(3))
    area = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (c[:, 0] - a[:, 0]) * (b[:, 1] - a[:, 1])
    # Independent of the rasteriser: count the triangles that strictly hold each point of a lattice which no
    # vertex's coordinates fall on; where charts or triangles overlapped, their areas would count twice.
    size = 192
    covered = np.zeros((size, size), np.int32)
    grid = (np.arange(size) + 0.4142) / size
    for i in np.flatnonzero(np.abs(area) > 1e-12):
        p = uv[triangles[i]]
        u0, v0 = np.searchsorted(grid, p.min(0))
        u1, v1 = np.searchsorted(grid, p.max(0))
        x, y = np.meshgrid(grid[u0:u1], grid[v0:v1])
        inside = np.ones(x.shape, np.bool_)
        for k in range(3):
            q, r = p[k], p[(k + 1) % 3]
            inside &= ((r[0] - q[0]) * (y - q[1]) - (r[1] - q[1]) * (x - q[0])) * np.sign(area[i]) > 1e-9
        covered[v0:v1, u0:u1] += inside
    assert covered.max() == 1
    assert 0.6 < covered.mean() < 1.0


def test_charts_keep_apart_by_texels_of_the_atlas(head: SyntheticHead) -> None:
    # Charts of different parts, apart from the lids' strips that lie in the face's own slits.
    triangles, uv, part = head.mesh.triangles, head.mesh.uv, head.shape.part
    fragments = rasterize(uv * 512, triangles, 512, 512)
    owner = np.where(fragments.mask, part[triangles[np.maximum(fragments.triangle, 0), 0]], -1)
    owner[owner == Part.LASHES] = Part.FACE
    for kind in range(Part.COUNT):
        here = owner == kind
        grown = np.pad(here, 6)
        # 6 of 512 texels: three quarters of a texel of the 64-texel atlas.
        grown = np.any([grown[i : i + 512, 6:-6] for i in range(0, 13, 2)], axis=0)
        grown = np.pad(grown, 6)
        grown = np.any([grown[6:-6, i : i + 512] for i in range(0, 13, 2)], axis=0)
        assert not (grown & (owner >= 0) & ~here).any()


def test_triangles_at_rest_face_outwards(head: SyntheticHead) -> None:
    # What is seen from the front must face the camera: signed area in (x, y down) is negative.
    vertices = head.vertices(REST)
    fragments = rasterize(vertices, head.mesh.triangles, SIZE, SIZE)
    a, b, c = (vertices[head.mesh.triangles[:, k], :2] for k in range(3))
    area = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (c[:, 0] - a[:, 0]) * (b[:, 1] - a[:, 1])
    seen = fragments.triangle[fragments.mask]
    # A few pixels look at the inner side of thin rims (lids, collar).
    assert (area[seen] < 0).mean() > 0.99


def test_motion_is_smooth_and_natural(head: SyntheticHead) -> None:
    motion = head.motion(300)
    assert len(motion) == 300
    vertices = np.stack([head.vertices(p) for p in motion])
    step = np.abs(np.diff(vertices[..., :2], axis=0)).max((1, 2)) / SIZE
    # The fastest thing is a lid: an eye's height (about 8 % of the picture) in 3 frames, fastest in the middle.
    assert step.max() < 0.05
    # And the head does not stand still.
    assert np.median(step) > 0.0015
    assert 3 <= (np.diff((motion.blink > 0.5).astype(int)) == 1).sum() <= 8
    assert (motion.blink > 0.5).mean() < 0.15
    assert motion.yaw.max() - motion.yaw.min() > 0.3
    assert 0.0 <= motion.jaw.min() <= motion.jaw.max() <= 1.0
    assert motion.jaw.max() > 0.3


def test_motion_repeats_by_seed_and_a_longer_clip_begins_as_a_shorter_one(head: SyntheticHead) -> None:
    short, again, long, other = head.motion(40), head.motion(40), head.motion(160), head.motion(40, seed=9)
    for field in fields(HeadParameters):
        np.testing.assert_array_equal(getattr(short, field.name), getattr(again, field.name))
        np.testing.assert_array_equal(getattr(short, field.name), getattr(long, field.name)[:40])
        assert np.abs(getattr(short, field.name) - getattr(other, field.name)).max() > 1e-3


def test_inputs_and_frames_agree_with_render(head: SyntheticHead) -> None:
    motion = head.motion(3, fps=10.0, seed=4)
    inputs = head.inputs(motion)
    assert {name: (array.shape, str(array.dtype)) for name, array in inputs.items()} == {
        "condition": ((3, 6, SIZE, SIZE), "float32"),
        "atlas": ((3, 3, 64, 64), "float32"),
    }
    for t, (frame, truth) in enumerate(head.frames(motion)):
        np.testing.assert_array_equal(frame["condition"], inputs["condition"][t : t + 1])
        np.testing.assert_array_equal(frame["atlas"], inputs["atlas"][t : t + 1])
        np.testing.assert_array_equal(truth, head.render(motion[t]))


def test_atlas_finds_the_surface_where_the_condition_shows_it(head: SyntheticHead) -> None:
    """Reading a frame's atlas at its own UV raster must give back each pixel's own place."""
    inputs = head.inputs(head.motion(1))
    uv, mask = inputs["condition"][0, :2], inputs["condition"][0, 5] > 0.5
    at = np.clip(uv * 64 - 0.5, 0, 62.999)
    low = np.floor(at).astype(int)
    fu, fv = at[0] - low[0], at[1] - low[1]
    read = np.zeros((2, SIZE, SIZE))
    for j, i in ((0, 0), (0, 1), (1, 0), (1, 1)):
        weight = (fu if i else 1 - fu) * (fv if j else 1 - fv)
        read += weight * inputs["atlas"][0, :2, low[1] + j, low[0] + i].transpose(2, 0, 1)
    rows, columns = np.nonzero(mask)
    x, y = (read[0][mask] + 1) * SIZE / 2 - 0.5, (read[1][mask] + 1) * SIZE / 2 - 0.5
    error = np.hypot(x - columns, y - rows)
    # The 64-texel atlas is linear between texels 2 pixels apart on a curved surface: under a pixel almost everywhere,
    # except across slits and seams.
    assert np.median(error) < 0.35
    assert np.percentile(error, 90) < 1.5


def test_softened_edges_are_between_their_neighbours(head: SyntheticHead) -> None:
    """Without anti-aliasing the silhouette steps from head to backdrop; with it, pixels in between must appear."""
    picture = head.render(REST)
    mask = visible(head, REST)[2]
    row = int(0.33 * SIZE)
    left = int(np.flatnonzero(mask[row])[0])
    outside, inside = picture[:, row, left - 3], picture[:, row, left + 3]
    line = picture[:, row, left - 2 : left + 3]
    share = ((line - outside[:, None]) * (inside - outside)[:, None]).sum(0) / ((inside - outside) ** 2).sum()
    assert ((share > 0.1) & (share < 0.9)).any()


def test_refusals_name_the_value() -> None:
    with pytest.raises(InputError, match=r"^a head of 8 pixels is too small"):
        SyntheticHead(size=8)
    line = np.zeros(3)
    names = [field.name for field in fields(HeadParameters)]
    with pytest.raises(InputError, match=r"^motion has parameters of lengths \[2, 3\]"):
        HeadMotion(**{name: line[:2] if name == "jaw" else line for name in names})


def test_motion_refuses_an_empty_clip(head: SyntheticHead) -> None:
    with pytest.raises(InputError, match=r"^motion needs at least 1 frame and a positive rate, got 0 frames"):
        head.motion(0)

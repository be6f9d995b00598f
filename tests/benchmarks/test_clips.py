"""The loader of clips with tracked meshes, on a clip that is made here."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from benchmarks.clips import load_talking_head
from warpcache.models.rasterizer import Mesh, SurfaceAtlas, condition_raster, rasterize

FRAMES, SIZE = 13, 32
REPEATS = (3, 11)


def brightness(frame: int) -> int:
    """The frames are flat and grey, each brighter than the one before."""
    return 20 + 15 * frame


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A clip of 64x64 with a square of 16 points that slides a pixel a frame, as the tracker's files have it."""
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 64, "yuv420p", 4_000_000
        for t in range(FRAMES):
            pixels = np.full((64, 64, 3), brightness(t), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    y, x = np.meshgrid(np.arange(4) / 3, np.arange(4) / 3, indexing="ij")
    landmarks = np.full((FRAMES, 478, 3), 5.0, np.float32)  # points that no triangle uses lie far outside
    for t in range(FRAMES):
        landmarks[t, :16] = np.stack([0.2 + 0.4 * x + t / 64, 0.3 + 0.4 * y, 0.1 * x], -1).reshape(-1, 3)
    number = np.arange(16).reshape(4, 4)
    first = np.stack([number[:-1, :-1], number[1:, :-1], number[:-1, 1:]], -1).reshape(-1, 3)
    second = np.stack([number[:-1, 1:], number[1:, :-1], number[1:, 1:]], -1).reshape(-1, 3)
    uv = np.zeros((468, 2), np.float32)
    uv[:16] = np.stack([0.1 + 0.8 * x, 0.9 - 0.8 * y], -1).reshape(-1, 2)  # v points up
    np.savez(tmp_path / "topology.npz", triangles=np.concatenate([first, second]).astype(np.int32), uv=uv)
    repeat = np.zeros(FRAMES, bool)
    repeat[list(REPEATS)] = True
    np.savez(tmp_path / "clip.landmarks.npz", landmarks=landmarks, repeat=repeat, fps=25.0)
    return tmp_path


def test_frames_are_kept_in_order_split_in_time_and_never_repeated(folder: Path) -> None:
    clip = load_talking_head(folder, "clip", SIZE, atlas_size=16)
    assert (clip.name, clip.size, clip.fps) == ("clip", SIZE, 25.0)
    # The first int(0.75 * 13) = 9 frames train; the repeats of each part are dropped.
    for part, kept in ((clip.train, [0, 1, 2, 4, 5, 6, 7, 8]), (clip.test, [9, 10, 12])):
        assert {name: array.shape for name, array in part.items()} == {
            "condition": (len(kept), 6, SIZE, SIZE),
            "atlas": (len(kept), 3, 16, 16),
            "truth": (len(kept), 3, SIZE, SIZE),
        }
        assert {array.dtype for array in part.values()} == {np.dtype(np.float32)}
        # Compression and two conversions of colour cost some of 255 levels; frames are 15 apart.
        grey = (part["truth"].mean((1, 2, 3)) + 1) * 127.5
        np.testing.assert_allclose(grey, [brightness(t) for t in kept], atol=5)


def test_conditions_and_atlases_are_the_meshes(folder: Path) -> None:
    clip = load_talking_head(folder, "clip", SIZE, atlas_size=16)
    topology, tracked = np.load(folder / "topology.npz"), np.load(folder / "clip.landmarks.npz")
    uv = np.stack([topology["uv"][:, 0], 1 - topology["uv"][:, 1]], -1)
    mesh = Mesh(topology["triangles"], uv)
    for index, t in enumerate((0, 1, 2, 4)):
        vertices = tracked["landmarks"][t, :468] * SIZE
        condition = condition_raster(vertices, mesh, SIZE, SIZE)
        np.testing.assert_allclose(clip.train["condition"][index], condition, atol=1e-6)
        atlas = SurfaceAtlas(mesh, 16).positions(vertices, rasterize(vertices, mesh.triangles, SIZE, SIZE))
        np.testing.assert_allclose(clip.train["atlas"][index], atlas, atol=1e-6)
    inside = clip.train["condition"][0, 5] > 0
    assert 0.1 < inside.mean() < 0.2  # 0.4 * 0.4 of the picture
    # v grows downwards and the surface faces the camera, as the rasteriser's conventions have it.
    v = clip.train["condition"][0, 1][inside.any(1)][:, inside.any(0)]
    assert (np.diff(v, axis=0) > 0).all()
    assert (clip.train["condition"][0, 4][inside] < 0).all()


def test_a_clip_without_its_landmarks_is_refused(folder: Path) -> None:
    tracked = dict(np.load(folder / "clip.landmarks.npz"))
    np.savez(
        folder / "clip.landmarks.npz",
        **{**tracked, "landmarks": tracked["landmarks"][:-1], "repeat": tracked["repeat"][:-1]},
    )
    with pytest.raises(ValueError, match=r"^clip\.mp4 has 13 frames, its landmarks 12"):
        load_talking_head(folder, "clip", SIZE)

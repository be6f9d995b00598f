"""Real clips with tracked face meshes, as conditions, atlases and ground-truth images.

The clips are real people's faces: they are used for training and measuring only, and nothing made from them is shipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from warpcache.models.rasterizer import Mesh, SurfaceAtlas, condition_raster, rasterize

__all__ = ["TalkingHead", "load_talking_head"]

TRAIN_SHARE = 0.75
# The topology's v points up; the loader turns it.


@dataclass(frozen=True)
class TalkingHead:
    """One clip, cut in time into a training and a test part.

    Attributes:
        name: The clip's name.
        size: Rows and columns of every image.
        fps: Frames a second.
        train: Arrays `condition` float32 [T, 6, H, W], `atlas` float32 [T, 3, h, w], `truth` float32 [T, 3, H, W].
        test: The same of the later part.
    """

    name: str
    size: int
    fps: float
    train: dict[str, NDArray[np.float32]]
    test: dict[str, NDArray[np.float32]]


def load_talking_head(folder: Path, name: str, size: int = 128, atlas_size: int = 64) -> TalkingHead:
    """Decode a clip, rasterise its tracked mesh, drop repeated frames and split it in time.

    Args:
        folder: Holds `NAME.mp4`, `NAME.landmarks.npz` and `topology.npz`.
        name: The clip, e.g. "d6".
        size: Rows and columns to make; the clip is square and is area-averaged down.
        atlas_size: Rows and columns of the surface atlas.
    """
    topology = np.load(folder / "topology.npz")
    uv = topology["uv"].astype(np.float32).copy()
    uv[:, 1] = 1.0 - uv[:, 1]
    mesh = Mesh(topology["triangles"].astype(np.int32), uv)
    tracked = np.load(folder / f"{name}.landmarks.npz")
    landmarks = tracked["landmarks"][:, :468].astype(np.float32)
    keep = ~tracked["repeat"]
    images = _decode(folder / f"{name}.mp4", size)
    if len(images) != len(landmarks):
        raise ValueError(f"{name}.mp4 has {len(images)} frames, its landmarks {len(landmarks)}")
    scale = np.array([size, size, size], np.float32)
    atlas = SurfaceAtlas(mesh, atlas_size)
    conditions, atlases = [], []
    for points in landmarks:
        vertices = points * scale
        fragments = rasterize(vertices, mesh.triangles, size, size)
        conditions.append(condition_raster(vertices, mesh, size, size, fragments))
        atlases.append(atlas.positions(vertices, fragments))
    arrays = {
        "condition": np.stack(conditions),
        "atlas": np.stack(atlases),
        "truth": images.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1.0,
    }
    cut = int(TRAIN_SHARE * len(landmarks))
    index = np.arange(len(landmarks))
    train = {k: np.ascontiguousarray(a[keep & (index < cut)]) for k, a in arrays.items()}
    test = {k: np.ascontiguousarray(a[keep & (index >= cut)]) for k, a in arrays.items()}
    return TalkingHead(name, size, float(tracked["fps"]), train, test)


def _decode(path: Path, size: int) -> NDArray[np.uint8]:
    with av.open(str(path)) as container:
        frames = [
            frame.reformat(width=size, height=size, format="rgb24", interpolation="AREA").to_ndarray()
            for frame in container.decode(video=0)
        ]
    return np.stack(frames)

"""The guide bank: what the whole backbone found for a few hundred frames, looked up by a branch (FIANCEE, CVPR 2023).

A key is a frame's pooled features at the branch's depth; a value is what the whole generator's deepest layers made of
the same frame, reduced. A branch looks up the nearest keys and adds their values, weighted by distance, to what it
reads: it gets back a part of what its slim layers cannot compute. Entries are chosen by k-centre (Gonzalez, "Clustering
to minimize the maximum intercluster distance", 1985): the farthest point next, so that no frame is far from an entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor, nn
from torch.nn import functional

from ...engine.errors import ExportError
from ..graph.index import GraphIndex

__all__ = [
    "NEAREST",
    "GuideBank",
    "GuideLookup",
    "cover_radius",
    "fit_keys",
    "guide_value",
    "make_bank",
    "pool_features",
]

# Entries that a look-up reads.
NEAREST = 3
# Numbers of a key, channels of a value, and a value's most rows and columns.
KEY_SIZE = 64
_CHANNELS = 32
_SIDE = 16
# Closeness of an entry that is not to be found; finite, as the softmax of infinities alone is no number.
_FAR = -1e30
# Squared distance, in units of that between neighbours, where a guide counts by half: a frame unlike all that the bank
# was made from is better off with none. On a clip's later part, half the frames are nearer and one in ten far beyond.
_FADE = 4.0
# Cells a side that features are pooled to for a key: where something is tells more of a pose than how much of it.
_CELLS = 4

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class GuideBank:
    """Entries of one branch's bank.

    Attributes:
        frames: Which frames of the stream the entries were made from, int64 [K], in the order they were chosen in.
        radius: Largest distance of any frame from its nearest entry, in the keys' units.
        projection: Pooled features @ projection + offset = key, float32 [F, D].
        offset: float32 [D].
        keys: float32 [K, D].
        values: float32 [K, C, h, w].
    """

    frames: NDArray[np.int64]
    radius: float
    projection: Floats
    offset: Floats
    keys: Floats
    values: Floats

    def to_record(self) -> dict[str, Any]:
        """JSON-ready form for the manifest."""
        return {
            "entries": len(self.frames),
            "key": self.keys.shape[1],
            "value": list(self.values.shape[1:]),
            "radius": round(self.radius, 4),
        }


def pool_features(values: Sequence[Tensor]) -> Tensor:
    """The values at a depth as one vector a frame.

    Args:
        values: Of floating point, each [N, C, H, W] (pooled to a few cells), [N, L, C] (averaged over L) or flattened.

    Returns:
        [N, F].
    """
    pooled = []
    for value in values:
        if value.ndim == 4:
            # The kernel as numbers: an adaptive pooling cannot be exported where it does not divide.
            kernel = (max(value.shape[2] // _CELLS, 1), max(value.shape[3] // _CELLS, 1))
            value = functional.avg_pool2d(value, kernel, kernel)
        elif value.ndim == 3:
            value = value.mean(1)
        pooled.append(value.flatten(1))
    return torch.cat(pooled, 1)


def fit_keys(features: Floats, *, near: int = 0) -> tuple[Floats, Floats]:
    """The affine map from pooled features to keys: standardise, keep the main directions, scale.

    The scale makes the median squared distance of a frame from its nearest neighbour 1, so that the softmax of
    distances weighs neighbours softly where frames lie close and picks one where they do not.

    Args:
        features: float32 [T, F].
        near: Frames less than this many from a frame are not counted as its neighbours, as they are nearly it.

    Returns:
        Projection float32 [F, D] with D <= 64, and offset float32 [D].
    """
    wide = features.astype(np.float64)
    mean, spread = wide.mean(0), wide.std(0)
    # What never changes in the clip says nothing of where a frame lies, and would be infinitely far where it does.
    scale = np.where(spread > 1e-6 * max(float(spread.max()), 1e-30), 1.0 / np.maximum(spread, 1e-30), 0.0)
    standard = (wide - mean) * scale
    # Of the smaller side's products: T frames and F features can both be thousands.
    if standard.shape[0] < standard.shape[1]:
        _, left = np.linalg.eigh(standard @ standard.T)
        directions = standard.T @ left[:, ::-1][:, : min(KEY_SIZE, len(standard))]
        directions /= np.maximum(np.linalg.norm(directions, axis=0), 1e-30)
    else:
        directions = np.linalg.eigh(standard.T @ standard)[1][:, ::-1][:, :KEY_SIZE]
    directions = directions * np.sign(directions[np.abs(directions).argmax(0), np.arange(directions.shape[1])])
    projection = directions * scale[:, None] / _neighbour_distance(standard @ directions, near)
    return projection.astype(np.float32), (-mean @ projection).astype(np.float32)


def guide_value(model: ModelProto) -> str:
    """Which value of the generator guides: the last of low resolution, as everything before it has gone into it.

    Raises:
        ExportError: If the generator has no inner feature map.
    """
    index = GraphIndex(model)
    maps: list[tuple[int, str]] = []
    needed = index.closure(index.outputs)
    for node in sorted(needed - index.constant):
        for name in index.nodes[node].output:
            spec = index.specs.get(name)
            if spec is not None and name not in index.outputs and spec.dtype == "float32" and len(spec.shape) == 4:
                rows, columns = spec.shape[2:]
                if min(rows, columns) > 1 and spec.shape[1] > 1:
                    maps.append((max(rows, columns), name))
    if not maps:
        raise ExportError("the generator has no feature map to guide branches with; set bank_size to 0")
    limit = max(min(side for side, _ in maps), _SIDE)
    return next(name for side, name in reversed(maps) if side <= limit)


def make_bank(
    features: Floats, projection: Floats, offset: Floats, frames: NDArray[np.int64], guides: Floats
) -> GuideBank:
    """Put a bank together.

    Args:
        features: Pooled features of every frame, float32 [T, F].
        projection: From `fit_keys`, as is `offset`.
        offset: See there.
        frames: The entries' frames, int64 [K].
        guides: `guide_value` of these frames, float32 [K, C, h, w].
    """
    keys = features @ projection + offset
    return GuideBank(
        frames=frames,
        radius=cover_radius(keys, keys[frames]),
        projection=projection,
        offset=offset,
        keys=np.ascontiguousarray(keys[frames]),
        values=_reduced(guides),
    )


def cover_radius(points: Floats, centres: Floats) -> float:
    """Largest distance of any point [T, D] from its nearest centre [K, D]."""
    return max(float(np.sqrt(((centres - point) ** 2).sum(1).min())) for point in points.astype(np.float64))


class GuideLookup(nn.Module):
    """Look up a bank and add what is found to the values that a branch reads.

    Args:
        bank: Its entries; keys and values stay as they are, the convolution is trained.
        shapes: Shape of one frame of every value of floating point at the depth, batch axis included.
    """

    projection: Tensor
    offset: Tensor
    keys: Tensor
    lengths: Tensor
    values: Tensor

    def __init__(self, bank: GuideBank, shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.shape = bank.values.shape[1:]
        self.nearest = min(NEAREST, len(bank.frames))
        self.target = _target(shapes)
        # Copies: two look-ups of one bank that shared memory could not be saved together.
        self.register_buffer("projection", torch.tensor(bank.projection))
        self.register_buffer("offset", torch.tensor(bank.offset))
        # Twice the keys, transposed: a squared distance is |q|^2 - 2 q.k + |k|^2.
        self.register_buffer("keys", torch.tensor(2.0 * bank.keys.T))
        self.register_buffer("lengths", torch.tensor((bank.keys.astype(np.float64) ** 2).sum(1), dtype=torch.float32))
        self.register_buffer("values", torch.tensor(bank.values.reshape(len(bank.frames), -1)))
        shape = shapes[self.target]
        self.channels = shape[1] if len(shape) == 4 else shape[-1]
        self.spread = nn.Conv2d(self.shape[0], self.channels, 1)
        # A branch begins as the one without a bank.
        for parameter in self.spread.parameters():
            nn.init.zeros_(parameter)

    def forward(self, *values: Tensor) -> Tensor:
        """The value at `target`, with the guide added; shape and dtype as it came."""
        return self.add(values[self.target], self.find(values))

    def find(self, values: Sequence[Tensor], excluded: Tensor | None = None) -> Tensor:
        """Look up.

        Args:
            values: The values at the depth, as `pool_features` takes them.
            excluded: Entries that are not to be found, bool [N, K]: in training those made from the frame
                itself and its neighbours, which frames to come will not have.

        Returns:
            [N, C, h, w].
        """
        # bfloat16 would not tell near keys apart.
        with torch.autocast("cpu", enabled=False):
            keys = pool_features([value.float() for value in values]) @ self.projection + self.offset
            closeness = keys @ self.keys - self.lengths - keys.square().sum(1, keepdim=True)
            if excluded is not None:
                closeness = closeness.masked_fill(excluded, _FAR)
            best, entries = closeness.topk(self.nearest)
            weights = best.softmax(1) * torch.sigmoid(best[:, :1] + _FADE)
            # By index_select, which becomes a Gather; indexing becomes a GatherND.
            picked = self.values.index_select(0, entries.flatten()).view(-1, self.nearest, self.values.shape[1])
            found = weights[:, None] @ picked
        return found.view(-1, *self.shape)

    def add(self, value: Tensor, guide: Tensor) -> Tensor:
        """Add what was found, [N, C, h, w], to the target's `value`."""
        guide = self.spread(guide)
        if value.ndim == 4:
            size = (value.shape[2], value.shape[3])
            return value + functional.interpolate(guide, size=size, mode="bilinear", align_corners=False)
        flat = guide.mean((2, 3))
        return value + (flat[:, None] if value.ndim == 3 else flat)

    def rekey(self, keys: Tensor) -> None:
        """Give the entries new keys, float32 [K, D]: where the layers that make them were trained further."""
        self.keys.copy_(2.0 * keys.T)
        self.lengths.copy_(keys.square().sum(1))


def _target(shapes: Sequence[tuple[int, ...]]) -> int:
    """Which value takes the guide: the map of lowest resolution, where it is cheapest; without maps the first.

    Raises:
        ExportError: If none can.
    """
    usable = [k for k, shape in enumerate(shapes) if 2 <= len(shape) <= 4]
    if not usable:
        raise ExportError("no value at the branch's depth can take a guide; set bank_size to 0")
    maps = [k for k in usable if len(shapes[k]) == 4]
    return min(maps, key=lambda k: shapes[k][2] * shapes[k][3]) if maps else usable[0]


def _neighbour_distance(keys: NDArray[np.float64], near: int) -> float:
    """Median distance of a key [T, D] from its nearest neighbour; 1 where there is none or all are one."""
    count = len(keys)
    distances = []
    for t in np.unique(np.linspace(0, count - 1, min(count, 256)).astype(int)):
        squared = ((keys - keys[t]) ** 2).sum(1)
        squared[max(t - near, 0) : t + near + 1] = np.inf
        if np.isfinite(squared).any():
            distances.append(float(np.sqrt(squared.min())))
    median = float(np.median(distances)) if distances else 0.0
    return median if median > 0.0 else 1.0


def _reduced(guides: Floats) -> Floats:
    """[K, C, h, w] at 16x16 cells or fewer and in at most 32 channels of unit spread, by PCA over channels."""
    tensor = torch.from_numpy(np.ascontiguousarray(guides))
    rows, columns = (-(-side // _SIDE) for side in guides.shape[2:])
    if rows > 1 or columns > 1:
        tensor = functional.avg_pool2d(tensor, (rows, columns), ceil_mode=True, count_include_pad=False)
    pooled = tensor.numpy().astype(np.float64)
    flat = pooled.transpose(1, 0, 2, 3).reshape(pooled.shape[1], -1)
    flat -= flat.mean(1, keepdims=True)
    directions = np.linalg.eigh(flat @ flat.T)[1][:, ::-1][:, :_CHANNELS]
    reduced = directions.T @ flat
    reduced /= max(float(reduced.std()), 1e-30)
    count, _, height, width = pooled.shape
    return np.ascontiguousarray(reduced.reshape(-1, count, height, width).transpose(1, 0, 2, 3).astype(np.float32))

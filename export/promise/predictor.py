"""The predictor: from what is cheap to have, how far every exit's answer will be from the whole generator's.

It runs before each frame, so it is small: a thumbnail of the inputs of frame t, the cached one of frame s, how the
surface moved between them on a coarse grid, the age, and a few small matrices. An executor spends a microsecond or two
on any node, however little it computes: what can be a matrix product over the whole thumbnail is one, and the surface
is read from the pixels that the thumbnail has already picked.

What branches will be like depends on x_t alone, and is computed from x_t alone: with a cache and without it a branch
gets the same prediction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor, nn
from torch.nn import functional

from ...engine.spec import AGE_INPUT
from ..adapter.layout import CACHE_ATLAS, AdapterLayout
from ..adapter.network import _pixel_centres, _sample
from ..frames.surface import Surface
from ..graph.trace import export_call

__all__ = [
    "BRANCH_DRIFT",
    "CACHE_THUMBNAIL",
    "LEAST_SPREAD",
    "Features",
    "Head",
    "Predictor",
    "Thumbnail",
    "ThumbnailScale",
    "cold_graph",
    "thumbnail_graph",
    "warm_graph",
]

CACHE_THUMBNAIL = "cache.thumbnail"
"""The cache tensor that holds the thumbnail of frame s, float32 [1, F]."""

# Rows and columns that are picked from an image, and those of a thumbnail that they are averaged to. Picking first
# makes the cost the same at every resolution.
_PICKED, _SIDE = 32, 8
# Rows and columns on which the surface's motion is looked at.
_MOTION_SIDE = 16
_LONGEST_VECTOR = 512
# Channels of one image that its change is told apart by; more are taken together.
_CHANNEL_GROUPS = 8
# Standardised values are kept within: one absurd input must not become one absurd prediction.
_LIMIT = 6.0
# Spreads differ from frame to frame by a factor e at most either way.
_SPREAD_RANGE = 1.0

LEAST_SPREAD = 0.02
"""Below all spreads, in scores: 2 % of a distance. A spread of 0 would make any margin void."""

BRANCH_DRIFT = 0.3
"""Added to the spreads of branches, in scores: a factor 1.35 of a distance.

A consumer's quality follows what has moved since its cache, which is seen anew in every frame. A branch's follows where
in the space of its inputs a frame lies, and drifts as a whole from one stretch of a clip to the next: held-back frames
are a few stretches, within which its errors look small. The size was chosen on two clips (docs/results.md).
"""


class Thumbnail(nn.Module):
    """What a frame's inputs come to at 8x8: every image picked and averaged, every vector as it is, in one vector.

    Images of up to 8 rows and columns stay as they are; vectors of more than 512 elements are averaged to fewer.

    Args:
        layout: Says which inputs there are.
    """

    def __init__(self, layout: AdapterLayout) -> None:
        super().__init__()
        self.layout = layout

    def pick(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of every image input, the pixels that stand for it: float32 [N, C, h, w], h and w at most 32."""
        picked = {}
        for image in self.layout.images:
            picked[image.name] = _picked(inputs[image.name], _PICKED).float()
        return picked

    def forward(self, inputs: Mapping[str, Tensor], picked: Mapping[str, Tensor] | None = None) -> Tensor:
        """The thumbnail [N, F] of inputs, with what `pick` gave for them where that is at hand."""
        picked = self.pick(inputs) if picked is None else picked
        parts = []
        for image in self.layout.images:
            x = picked[image.name]
            kernel = _steps(x.shape[2], _SIDE), _steps(x.shape[3], _SIDE)
            if kernel != (1, 1):
                x = functional.avg_pool2d(x, kernel, kernel, ceil_mode=True, count_include_pad=False)
            parts.append(x.flatten(1))
        for vector in self.layout.vectors:
            # Not flatten(1): an input of one number a frame, e.g. an id, has no further axis.
            flat = inputs[vector.name].float().reshape(-1, vector.elements)
            if vector.elements > _LONGEST_VECTOR:
                kernel_size = math.ceil(vector.elements / _LONGEST_VECTOR)
                flat = functional.avg_pool1d(
                    flat[:, None], kernel_size, kernel_size, ceil_mode=True, count_include_pad=False
                )[:, 0]
            parts.append(flat)
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def groups(self) -> NDArray[np.int64]:
        """For every number of the thumbnail, int64 [F]: which group it is counted in when a change is summed up.

        Channels of an image are groups of their own, up to 8 an image; each vector is one.
        """
        numbers, first = {}, 0
        for image in self.layout.images:
            channel_groups = min(image.channels, _CHANNEL_GROUPS)
            of_channel = first + torch.arange(image.channels) * channel_groups // image.channels
            numbers[image.name] = of_channel[None, :, None, None].expand(1, -1, image.height, image.width)
            first += channel_groups
        for group, vector in enumerate(self.layout.vectors, first):
            numbers[vector.name] = torch.full((vector.elements,), group)
        # The thumbnail of the groups' numbers: what is averaged is of one group.
        groups: NDArray[np.int64] = self(numbers)[0].round().long().numpy()
        return groups


@dataclass(frozen=True)
class ThumbnailScale:
    """What thumbnails of the training frames are like.

    Attributes:
        mean: float32 [F].
        deviation: float32 [F], above 0.
        basis: Main directions of the standardised thumbnails, float32 [F, P].
        centres: Standardised training frames in those directions, float32 [K, P].
        pose: How many of the directions the heads read.
        novelty: Distance from the nearest centre that counts as 1.
        change: Mean difference of standardised thumbnails that counts as 1.
    """

    mean: NDArray[np.float32]
    deviation: NDArray[np.float32]
    basis: NDArray[np.float32]
    centres: NDArray[np.float32]
    pose: int
    novelty: float = 1.0
    change: float = 1.0


class Features(nn.Module):
    """What the heads read, and how unlike all known inputs and how far from the cached ones a frame is.

    Args:
        layout: Says which inputs there are, and where the surface's motion is.
        scale: From the training frames.
    """

    mean: Tensor
    factor: Tensor
    basis: Tensor
    centres: Tensor
    centre_squares: Tensor
    sums: Tensor
    pixel_centres: Tensor

    def __init__(self, layout: AdapterLayout, scale: ThumbnailScale) -> None:
        super().__init__()
        self.layout = layout
        self.thumbnail = Thumbnail(layout)
        self.pose, self.novelty_unit, self.change_unit = scale.pose, scale.novelty, scale.change
        self.register_buffer("mean", torch.from_numpy(scale.mean))
        self.register_buffer("factor", torch.from_numpy(1.0 / scale.deviation))
        self.register_buffer("basis", torch.from_numpy(scale.basis))
        self.register_buffer("centres", torch.from_numpy(np.ascontiguousarray(-2.0 * scale.centres.T)))
        self.register_buffer("centre_squares", torch.from_numpy(np.square(scale.centres).sum(1)))
        groups = self.thumbnail.groups()
        # [F, G]: a product with it is the mean over every group, in units of the group's own deviation.
        sums = np.zeros((len(groups), int(groups.max()) + 1), np.float32)
        for group in range(sums.shape[1]):
            members = groups == group
            unit = float(np.sqrt(np.square(scale.deviation[members]).mean()))
            sums[members, group] = 1.0 / (members.sum() * unit)
        self.register_buffer("sums", torch.from_numpy(sums))
        self.groups = sums.shape[1]
        if layout.surface is not None:
            centres = _picked(_picked(_pixel_centres(layout.height, layout.width), _PICKED), _MOTION_SIDE)
            self.register_buffer("pixel_centres", centres.clone(), persistent=False)

    def standardise(self, thumbnail: Tensor) -> Tensor:
        """Thumbnails [N, F] in units of the training frames' deviation."""
        return ((thumbnail - self.mean) * self.factor).clamp(-_LIMIT, _LIMIT)

    def cold(self, thumbnail: Tensor) -> tuple[Tensor, Tensor]:
        """Of frame t alone: what branches' heads read [N, P], and the novelty [N, 1]."""
        standard = self.standardise(thumbnail)
        position = standard @ self.basis
        # |z - c|^2 with c in the span of the basis: what lies off that span, as nothing in training did, counts too.
        nearest = torch.amin(position @ self.centres + self.centre_squares, dim=1, keepdim=True)
        squared = nearest + (standard * standard).sum(1, keepdim=True)
        # Clamped above 0: rounding leaves a frame that is a centre just below, and a root has no slope at 0.
        novelty = squared.clamp(min=1e-8).sqrt() * (1.0 / self.novelty_unit)
        return position[:, : self.pose], novelty

    def warm(
        self,
        thumbnail: Tensor,
        cached: Tensor,
        picked: Mapping[str, Tensor],
        atlas: Tensor | None,
        age: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Of a pair of frames: what consumers' heads read beside `cold`'s [N, M], and the change [N, 1].

        Args:
            thumbnail: Of frame t, [N, F].
            cached: Of frame s, [N, F].
            picked: `Thumbnail.pick` of frame t.
            atlas: Surface atlas of frame s, [N, 3, h, w], where the layout has a surface.
            age: t - s in frames, [N, 1].
        """
        difference = (thumbnail - cached).abs()
        mean = difference @ self.sums
        square = (difference * difference) @ self.sums
        change = (difference * self.factor).clamp(max=_LIMIT).mean(1, keepdim=True) * (1.0 / self.change_unit)
        parts = [age.clamp(min=1.0), mean + 1e-3, square + 1e-5]
        if self.layout.surface is not None and atlas is not None:
            parts.append(self._motion(picked, atlas, self.layout.surface))
        # Errors grow by factors with motion and change, so both go in as logarithms, as the scores are.
        return torch.cat(parts, 1).log(), change

    def _motion(self, picked: Mapping[str, Tensor], atlas: Tensor, surface: Surface) -> Tensor:
        """Numbers above 0 that sum up the surface's backward flow on a coarse grid, [N, 5], in grid_sample units."""
        name, first, last = surface.uv
        mask_name, channel = surface.mask
        uv = _picked(picked[name][:, first:last], _MOTION_SIDE)
        mask = _picked(picked[mask_name][:, channel : channel + 1], _MOTION_SIDE)
        there = _sample(atlas, uv.permute(0, 2, 3, 1) * 2.0 - 1.0) * mask
        # [N, 2, h, w]: from each point's place in frame t to its place in frame s.
        flow = there[:, :2] - self.pixel_centres * mask
        square = (flow * flow).sum(1, keepdim=True)
        planes = torch.cat([mask, there[:, 2:], flow, square, square.sqrt()], 1)
        area, seen, across, down, squares, lengths = torch.split(planes.mean((2, 3)), 1, dim=1)
        area = area + 1e-3
        moved = squares / area
        # What is left of the motion when the surface's mean motion is taken off: turning, bending, speaking.
        within = (moved - (across * across + down * down) / (area * area)).clamp(min=0.0)
        hidden = (area - seen).clamp(min=0.0) / area
        return torch.cat(
            [lengths / area + 1e-3, square.amax((2, 3)) + 1e-6, moved + 1e-6, within + 1e-6, hidden + 1e-3], 1
        )


class Head(nn.Module):
    """Features to scores: a linear part, what a small network adds to it, and how far off the sum may be.

    Args:
        mean: Of the features, float32 [M].
        deviation: Of the features, float32 [M], above 0.
        outputs: Exits.
        width: Of the network's two hidden layers.
        least_spread: Below all its spreads, in scores.
    """

    mean: Tensor
    factor: Tensor

    def __init__(
        self,
        mean: NDArray[np.float32],
        deviation: NDArray[np.float32],
        outputs: int,
        *,
        width: int = 64,
        least_spread: float = LEAST_SPREAD,
    ) -> None:
        super().__init__()
        self.least_spread = least_spread
        features = len(mean)
        self.register_buffer("mean", torch.from_numpy(mean))
        self.register_buffer("factor", torch.from_numpy(1.0 / deviation))
        self.linear = nn.Linear(features, outputs)
        self.first = nn.Linear(features, width)
        self.second = nn.Linear(width, width)
        self.last = nn.Linear(width, outputs)
        self.spread = nn.Linear(features, outputs)
        # A network that was found to add nothing is left out of the graph.
        self.deep = True
        nn.init.zeros_(self.spread.weight)
        nn.init.zeros_(self.spread.bias)

    def standardise(self, features: Tensor) -> Tensor:
        """Features [N, M] in units of their deviation."""
        return ((features - self.mean) * self.factor).clamp(-_LIMIT, _LIMIT)

    def nonlinear(self, standard: Tensor) -> Tensor:
        """What the network adds, [N, E]."""
        added: Tensor = self.last(functional.silu(self.second(functional.silu(self.first(standard)))))
        return added

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted scores and their spreads, [N, E] each."""
        standard = self.standardise(features)
        predicted = self.linear(standard)
        if self.deep:
            predicted = predicted + self.nonlinear(standard)
        return predicted, self.spread_of(standard)

    def spread_of(self, standard: Tensor) -> Tensor:
        """Spreads [N, E] of standardised features."""
        # Bounded in its features' part, so that no spread vanishes where nothing was ever measured.
        tilt = functional.linear(standard, self.spread.weight).clamp(-_SPREAD_RANGE, _SPREAD_RANGE)
        return (tilt + self.spread.bias).exp() + self.least_spread


class Predictor(nn.Module):
    """The whole of it.

    Args:
        features: What both heads read.
        consumers: Head of the exits that read the cache, or None where there are none.
        branches: Head of those that do not, or None.
    """

    def __init__(self, features: Features, consumers: Head | None, branches: Head | None) -> None:
        super().__init__()
        self.features, self.consumers, self.branches = features, consumers, branches

    def cold(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Without a cache: predicted, spread and novelty; columns of the branches alone."""
        assert self.branches is not None
        pose, novelty = self.features.cold(self.features.thumbnail(inputs))
        return (*self.branches(pose), novelty)

    def warm(
        self, inputs: Mapping[str, Tensor], cached: Tensor, atlas: Tensor | None, age: Tensor
    ) -> tuple[Tensor, ...]:
        """With a cache: predicted, spread, novelty and change; columns of the consumers, then of the branches."""
        assert self.consumers is not None
        picked = self.features.thumbnail.pick(inputs)
        thumbnail = self.features.thumbnail(inputs, picked)
        pose, novelty = self.features.cold(thumbnail)
        pair, change = self.features.warm(thumbnail, cached, picked, atlas, age)
        predicted, spread = self.consumers(torch.cat([pair, pose], 1))
        if self.branches is not None:
            also_predicted, also_spread = self.branches(pose)
            predicted = torch.cat([predicted, also_predicted], 1)
            spread = torch.cat([spread, also_spread], 1)
        return predicted, spread, novelty, change


def thumbnail_graph(layout: AdapterLayout) -> ModelProto:
    """The graph of a frame's thumbnail: generator inputs -> ``cache.thumbnail``, float32 [1, F].

    Every image input comes to at most 8x8 (pixels are picked, 32x32 at most, then averaged), vectors stay as they are
    up to 512 elements and are averaged to fewer beyond.
    """
    inputs, thumbnail = layout.input_examples(), Thumbnail(layout)
    return export_call(lambda given: thumbnail(given), inputs, [CACHE_THUMBNAIL], thumbnail=thumbnail)


def warm_graph(predictor: Predictor) -> ModelProto:
    """The module ``predictor``: inputs of frame t, the cached thumbnail and atlas, and the age -> what `warm` gives."""
    layout = predictor.features.layout
    cached = {CACHE_THUMBNAIL: torch.zeros(1, len(predictor.features.mean))}
    if layout.surface is not None:
        cached[CACHE_ATLAS] = torch.zeros(1, 3, *layout.atlas_size)
    example = {AGE_INPUT: torch.ones(1, 1), **cached, **layout.input_examples()}

    def call(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return predictor.warm(given, given[CACHE_THUMBNAIL], given.get(CACHE_ATLAS), given[AGE_INPUT])

    return export_call(call, example, ["predicted", "spread", "novelty", "change"], predictor=predictor)


def cold_graph(predictor: Predictor) -> ModelProto:
    """The module ``predictor_cold``: inputs of frame t -> what `cold` gives."""
    inputs = predictor.features.layout.input_examples()
    return export_call(predictor.cold, inputs, ["predicted", "spread", "novelty"], predictor=predictor)


def _steps(side: int, most: int) -> int:
    """Steps in which a side is gone along so that `most` are the most."""
    return math.ceil(side / most)


def _picked(images: Tensor, most: int) -> Tensor:
    """Pixels of [N, C, h, w] in even steps, at most `most` rows and columns."""
    down, across = (_steps(side, most) for side in images.shape[2:])
    return images[:, :, down // 2 :: down, across // 2 :: across]

"""Fit the predictor: first to many pairs of training frames, then a little to frames that the exits have not seen.

Exits answer the frames that they were trained on better than others, by a factor of two where clips are short. So what
makes a frame hard is learnt from the training frames, of which there are many, and how much harder unseen ones are is
learnt from the few held-back frames that may be spent on it: a ridge regression, its strength found by leaving out one
block of frames after the other.

Everything linear is solved in closed form; the only thing that is trained by steps is the small network, and what it
adds is scaled by how much it helped on blocks that it was not trained on (stacking: Wolpert, "Stacked generalization",
1992). With a few hundred frames that is often nothing, and then it is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...engine.errors import ExportError
from ...engine.spec import Array
from ..adapter.layout import AdapterLayout
from ..training.k_centres import k_centres
from .exit_quality import Measured
from .predictor import BRANCH_DRIFT, LEAST_SPREAD, Features, Head, Predictor, Thumbnail, ThumbnailScale

__all__ = ["PromiseFrames", "fit_predictor"]

Floats = NDArray[np.float64]

# Main directions of thumbnails that the novelty is measured in, those that the heads read, and stored frames.
_DIRECTIONS, _POSE, _CENTRES = 32, 16, 256
# Novelty and change are 1 at this many times the largest value that was seen on held-back frames.
_BEYOND = 1.5
# Strengths of the ridge, in units of the number of rows; the last leaves hardly more than the mean.
_STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 1000.0)
# A handful of blocks is a poor judge of strength: weaker ones than these won there by chance, and lost on new frames
# (on a clip of 89 held-back frames the explained variance fell from 0.74 to 0.36).
_FEW_BLOCKS_STRENGTHS = (3.0, 10.0, 30.0, 1000.0)
_FOLDS = 4
_BATCH = 128
_RATE = 3e-3
_DECAY = 1e-2
# Standard deviation of the noise on standardised features: neighbouring frames are nearly the same frame.
_NOISE = 0.1
# Share of the linear part's squared error that the network must take away to be worth its nodes.
_LEAST_GAIN = 0.02
# Frames that are looked at in one go.
_FRAMES = 16


@dataclass(frozen=True)
class PromiseFrames:
    """The streams that a promise is made from, name -> [T, ...], with the atlas where there is a surface.

    Attributes:
        train: What the exits were trained on.
        held: What was held back from them.
    """

    train: Mapping[str, Array]
    held: Mapping[str, Array]


def fit_predictor(
    layout: AdapterLayout,
    frames: PromiseFrames,
    trained: Measured,
    unseen: Measured,
    *,
    blocks: int,
    seed: int = 0,
    steps: int = 300,
) -> Predictor:
    """Fit a predictor.

    Args:
        layout: Says which inputs there are, and where the surface's motion is.
        frames: Both streams; novelty and change are measured against all of the held-back one.
        trained: Exits on training frames.
        unseen: The same exits on those held-back frames that may be fitted to.
        blocks: How many blocks those frames are.
        seed: Of the network's first weights and of the rows drawn.
        steps: Of the network's training; 0 leaves the network out.

    Returns:
        The predictor, in evaluation mode; columns in the exits' order, consumers first.

    Raises:
        ExportError: If there is nothing to fit to, or the measurements do not fit each other.
    """
    if trained.exits != unseen.exits or not trained.exits:
        raise ExportError(
            f"exits {', '.join(trained.exits) or 'none'} were measured on training frames and "
            f"{', '.join(unseen.exits) or 'none'} on held-back ones; measure the same ones on both, one at least"
        )
    ages = sorted(set(trained.age[trained.age > 0].tolist()) | set(unseen.age[unseen.age > 0].tolist()))
    scale = _scale(layout, frames, ages)
    features = Features(layout, scale).eval()
    # An exit that reads the cache has no score without one.
    reads = np.isnan(trained.scores[trained.age == 0]).all(0) if (trained.age == 0).any() else None
    consumers = np.flatnonzero(np.ones(len(trained.exits), bool) if reads is None else reads)
    branches = np.setdiff1d(np.arange(len(trained.exits)), consumers)
    if len(consumers) and len(branches) and consumers.max() > branches.min():
        raise ExportError(f"exits {', '.join(trained.exits)} must be ordered: those that read the cache first")
    heads: list[Head | None] = []
    for columns, with_cache in ((consumers, True), (branches, False)):
        if not len(columns):
            heads.append(None)
            continue
        known = _rows(features, frames.train, trained, columns, with_cache)
        new = _rows(features, frames.held, unseen, columns, with_cache)
        heads.append(_fit_head(known, new, blocks, seed, steps, LEAST_SPREAD if with_cache else BRANCH_DRIFT))
    return Predictor(features, heads[0], heads[1]).eval()


@dataclass(frozen=True)
class _Rows:
    """What a head is to learn: features [N, M], scores [N, E], and the frame of each row."""

    features: Tensor
    scores: Floats
    frame: NDArray[np.int64]


def _rows(
    features: Features,
    arrays: Mapping[str, Array],
    measured: Measured,
    columns: NDArray[np.intp],
    with_cache: bool,
) -> _Rows:
    chosen = np.flatnonzero((measured.age > 0) == with_cache)
    frame, age = measured.frame[chosen], measured.age[chosen]
    if not len(frame):
        raise ExportError("no exit was measured on some frames that the predictor is to be fitted to; give more frames")
    thumbnails = _thumbnails(features.thumbnail, arrays)
    surface = features.layout.surface
    made = []
    with torch.no_grad():
        for first in range(0, len(frame), _FRAMES):
            t, a = frame[first : first + _FRAMES], age[first : first + _FRAMES]
            now = thumbnails[t]
            read, _ = features.cold(now)
            if with_cache:
                picked = features.thumbnail.pick(_at(arrays, t, features.layout))
                atlas = None if surface is None else torch.from_numpy(_take(arrays[surface.atlas], t - a))
                ages = torch.from_numpy(a.astype(np.float32))[:, None]
                pair, _ = features.warm(now, thumbnails[t - a], picked, atlas, ages)
                read = torch.cat([pair, read], 1)
            made.append(read)
    return _Rows(torch.cat(made), measured.scores[np.ix_(chosen, columns)], frame)


def _scale(layout: AdapterLayout, frames: PromiseFrames, ages: list[int]) -> ThumbnailScale:
    """What thumbnails of the training frames are like, and how far those of the held-back ones lie from them."""
    thumbnail = Thumbnail(layout)
    known = _thumbnails(thumbnail, frames.train).numpy().astype(np.float64)
    groups = thumbnail.groups()
    variance = known.var(0)
    # What hardly varies in the clip must not be infinitely far where it does: a fiftieth of its group's deviation at
    # least, and where the whole group never changes, a thousandth of its size.
    least = np.zeros_like(variance)
    for group in range(int(groups.max()) + 1):
        members = groups == group
        size = float(np.square(known[:, members]).mean())
        least[members] = max(4e-4 * float(variance[members].mean()), 1e-6 * size, 1e-12)
    mean, deviation = known.mean(0), np.sqrt(variance + least)
    standard = np.clip((known - mean) / deviation, -6.0, 6.0)
    directions = np.linalg.svd(standard, full_matrices=False)[2][: min(_DIRECTIONS, max(1, len(known) - 1))]
    # Their signs are the solver's whim; with one fixed the same frames give the same bundle.
    directions *= np.sign(directions[np.arange(len(directions)), np.abs(directions).argmax(1)])[:, None]
    positions = standard @ directions.T
    centres = positions[k_centres(positions, _CENTRES)[0]]
    scale = ThumbnailScale(
        mean.astype(np.float32),
        deviation.astype(np.float32),
        np.ascontiguousarray(directions.T, np.float32),
        centres.astype(np.float32),
        min(_POSE, len(directions)),
    )
    features = Features(layout, scale)
    unseen = _thumbnails(thumbnail, frames.held)
    novelty = float(features.cold(unseen)[1].max())
    # The change as the graph computes it; of a stream that does not move it is 0, and any change is then another scene.
    changes = [
        float(((unseen[age:] - unseen[:-age]).abs() * features.factor).clamp(max=6.0).mean(1).max())
        for age in ages
        if age < len(unseen)
    ]
    return replace(
        scale,
        novelty=max(_BEYOND * novelty, 1e-3),
        change=max(_BEYOND * max(changes, default=0.0), 1e-3),
    )


def _fit_head(train: _Rows, unseen: _Rows, blocks: int, seed: int, steps: int, least_spread: float) -> Head:
    raw = train.features.double().numpy()
    mean, deviation = raw.mean(0), raw.std(0)
    # A feature that is constant in training says nothing; it must not say much where it is not.
    deviation = np.maximum(deviation, 1e-2)
    outputs = train.scores.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = Head(mean.astype(np.float32), deviation.astype(np.float32), outputs, least_spread=least_spread).eval()
        known, new = head.standardise(train.features), head.standardise(unseen.features)
        weights, bias, foreseen = _ridge(
            known.double().numpy(), train.scores, _fold_of(train.frame, 2 * _FOLDS), _STRENGTHS
        )
        added = _train_network(head, known, train.scores - foreseen, _fold_of(train.frame, _FOLDS), seed, steps)
    # Then on unseen frames: a slope, an offset and a little of every feature for each exit.
    with torch.no_grad():
        network = head.nonlinear(new).double().numpy() * added if head.deep else np.zeros((len(new), outputs))
    base = new.double().numpy() @ weights + bias + network
    fold = _fold_of(unseen.frame, max(blocks, 1))
    residuals = np.empty_like(unseen.scores)
    for e in range(outputs):
        middle, width = float(train.scores[:, e].mean()), max(float(train.scores[:, e].std()), 1e-3)
        seen = np.column_stack([(base[:, e] - middle) / width, new.double().numpy()])
        wrong = unseen.scores[:, e : e + 1] - base[:, e : e + 1]
        correction, offset, foreseen = _ridge(seen, wrong, fold, _FEW_BLOCKS_STRENGTHS)
        residuals[:, e] = (wrong - foreseen)[:, 0]
        slope = float(correction[0, 0]) / width
        weights[:, e] = (1.0 + slope) * weights[:, e] + correction[1:, 0]
        bias[e] = (1.0 + slope) * bias[e] - slope * middle + float(offset[0])
        added[e] *= 1.0 + slope
    tilt, scale = _fit_spread(new.double().numpy(), residuals, fold)
    with torch.no_grad():
        _set(head.linear, weights, bias)
        head.last.weight.mul_(torch.from_numpy(added.astype(np.float32))[:, None])
        head.last.bias.mul_(torch.from_numpy(added.astype(np.float32)))
        _set(head.spread, tilt, np.log(np.maximum(scale - LEAST_SPREAD, LEAST_SPREAD)))
    return head


def _fit_spread(features: Floats, residuals: Floats, fold: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """How the errors' size depends on the features [M, E], as a logarithm, and its scale [E].

    The scale is the maximum-likelihood one of a Laplace distribution whose width is the scale times what the features
    say: the mean of the errors in that unit.
    """
    sizes = np.abs(residuals)
    tilt = _ridge(features, np.log(sizes + LEAST_SPREAD), fold, _FEW_BLOCKS_STRENGTHS)[0]
    unit = np.exp(np.clip(features @ tilt, -1.0, 1.0))
    return tilt, (sizes / unit).mean(0)


def _ridge(
    features: Floats, targets: Floats, fold: NDArray[np.int64], strengths: Sequence[float]
) -> tuple[Floats, Floats, Floats]:
    """Ridge regression, its strength chosen for each target by leaving out one fold after the other.

    Args:
        features: [N, M].
        targets: [N, E].
        fold: Fold of each row; with one fold alone the strongest ridge is taken.
        strengths: To choose from, rising, in units of the number of rows.

    Returns:
        Weights [M, E], offsets [E], and what was foreseen for every row without its fold [N, E].
    """
    count, outputs = len(features), targets.shape[1]
    folds = np.unique(fold)
    foreseen = np.empty((len(strengths), count, outputs))
    if len(folds) == 1:
        foreseen[:] = targets.mean(0)
    else:
        for out in folds:
            inside, outside = fold != out, fold == out
            for k, (weights, offset) in enumerate(_solve(features[inside], targets[inside], strengths)):
                foreseen[k, outside] = features[outside] @ weights + offset
    errors = np.square(foreseen - targets).mean(1)
    errors[:-1] += np.inf if len(folds) == 1 else 0.0
    best = errors.argmin(0)
    solved = _solve(features, targets, strengths)
    columns = np.arange(outputs)
    weights = np.stack([solved[best[e]][0][:, e] for e in columns], 1)
    offsets = np.array([solved[best[e]][1][e] for e in columns])
    return weights, offsets, np.asarray(foreseen[best, :, columns].T)


def _solve(features: Floats, targets: Floats, strengths: Sequence[float]) -> list[tuple[Floats, Floats]]:
    """Weights and offsets for every strength; the offset is not held back."""
    middle, level = features.mean(0), targets.mean(0)
    centred = features - middle
    values, vectors = np.linalg.eigh(centred.T @ centred)
    projected = vectors.T @ (centred.T @ (targets - level))
    solutions = []
    for strength in strengths:
        weights = vectors @ (projected / (np.maximum(values, 0.0) + strength * len(features))[:, None])
        solutions.append((weights, level - middle @ weights))
    return solutions


def _train_network(
    head: Head, features: Tensor, residuals: Floats, fold: NDArray[np.int64], seed: int, steps: int
) -> Floats:
    """Train the head's network on what the linear part leaves; how much of it is to be added, [E] in 0..1."""
    nothing = np.zeros(residuals.shape[1])
    folds = np.unique(fold)
    head.deep = False
    if not steps or len(folds) < 2:
        return nothing
    target = torch.from_numpy(residuals.astype(np.float32))
    first = {name: value.clone() for name, value in head.state_dict().items()}
    helped = np.zeros_like(residuals)
    for out in folds:
        inside, outside = torch.from_numpy(fold != out), torch.from_numpy(fold == out)
        head.load_state_dict(first)
        _descend(head, features[inside], target[inside], seed, steps)
        with torch.no_grad():
            helped[outside.numpy()] = head.nonlinear(features[outside]).double().numpy()
    share: Floats = np.clip((helped * residuals).sum(0) / np.maximum(np.square(helped).sum(0), 1e-12), 0.0, 1.0)
    gain = 1.0 - np.square(residuals - share * helped).sum() / max(float(np.square(residuals).sum()), 1e-12)
    head.load_state_dict(first)
    if gain < _LEAST_GAIN:
        return nothing
    _descend(head, features, target, seed, steps)
    head.deep = True
    return share


def _descend(head: Head, features: Tensor, target: Tensor, seed: int, steps: int) -> None:
    parameters = [p for layer in (head.first, head.second, head.last) for p in layer.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_RATE, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=max(steps, 20))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(0, len(features), (min(_BATCH, len(features)),), generator=generator)
        x = features[rows]
        x = x + _NOISE * torch.randn(x.shape, generator=generator)
        # Huber: a frame that is off by a factor e says no more than that.
        loss = nn.functional.smooth_l1_loss(head.nonlinear(x), target[rows], beta=0.3)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()


def _fold_of(frame: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Fold of every row: its frames in order, in `count` parts of one length."""
    frames, rank = np.unique(frame, return_inverse=True)
    fold: NDArray[np.int64] = rank * min(count, len(frames)) // len(frames)
    return fold


def _set(layer: nn.Linear, weights: Floats, bias: Floats) -> None:
    layer.weight.copy_(torch.from_numpy(np.ascontiguousarray(weights.T, np.float32)))
    layer.bias.copy_(torch.from_numpy(bias.astype(np.float32)))


def _thumbnails(thumbnail: Thumbnail, arrays: Mapping[str, Array]) -> Tensor:
    """Of every frame of a stream, [T, F]."""
    frames = max(len(array) for array in arrays.values())
    with torch.no_grad():
        return torch.cat(
            [
                thumbnail(_at(arrays, np.arange(first, min(first + _FRAMES, frames)), thumbnail.layout))
                for first in range(0, frames, _FRAMES)
            ]
        )


def _at(arrays: Mapping[str, Array], frames: NDArray[np.int64], layout: AdapterLayout) -> dict[str, Tensor]:
    """The generator's inputs at several frames."""
    names = [image.name for image in layout.images] + [vector.name for vector in layout.vectors]
    return {name: torch.from_numpy(_take(arrays[name], frames)) for name in names}


def _take(array: Array, frames: NDArray[np.int64]) -> Array:
    """Several frames of an array; one of leading extent 1 serves them all."""
    taken: Array = array[np.zeros_like(frames)] if len(array) == 1 else array[frames]
    return taken

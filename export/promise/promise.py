"""Make a bundle's quality promise: measure its exits, fit the predictor, calibrate it on frames that are left.

Of the held-back frames, cut into blocks, one block in three is fitted to; the others calibrate. The predictions that
are calibrated are those of the exported graphs, as an executor computes them: what will run is what the promise is
about.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from ...engine.errors import ExportError, InputError
from ...engine.promise.calibration import Calibration, PromiseRecord, Quality, canonical_metric, evaluate
from ...engine.spec import AGE_INPUT, Array
from ..adapter.layout import CACHE_ATLAS, AdapterLayout
from ..frames.streams import Progress, frame_at
from ..graph.macs import count_macs
from ..graph.run import open_session, run_session
from .exit_quality import ExitModels, Measured, PromiseTerms, measure_exits, reads_cache
from .predictor import cold_graph, thumbnail_graph, warm_graph
from .predictor_fit import PromiseFrames, fit_predictor

__all__ = [
    "CALIBRATION_FILE",
    "CONFIDENCE",
    "Promise",
    "PromiseOptions",
    "cross_validated",
    "make_promise",
    "predict_rows",
    "split_blocks",
]

CALIBRATION_FILE = "calibration.npz"
"""Where a bundle keeps the rows of its calibration."""

# The thresholds that a manifest tells of: people's marks, not limits.
_THRESHOLDS: Mapping[str, tuple[float, ...]] = {
    "lpips": (0.01, 0.02, 0.05, 0.1),
    "flip": (0.02, 0.05, 0.1, 0.2),
    "psnr_db": (25.0, 30.0, 35.0, 40.0),
    "ms_ssim": (0.9, 0.95, 0.98, 0.99),
}
CONFIDENCE = 0.95
"""What callers name by default."""

# Neighbouring frames are alike, so they are fitted to or calibrated on together, in blocks of so many at most; short
# streams have shorter ones, so that there are enough of them.
_LONGEST_BLOCK, _WISHED_BLOCKS = 12, 9
_LEAST_FRAMES = 6


@dataclass(frozen=True)
class PromiseOptions:
    """How much is measured.

    Attributes:
        train_frames: Training frames that exits are measured on, at most.
        held_frames: Held-back frames, at most; more make a finer promise and take longer.
        seed: Of the predictor's training.
        steps: Of the predictor's network; 0 keeps to its linear part.
    """

    train_frames: int = 200
    held_frames: int = 480
    seed: int = 0
    steps: int = 300

    def __post_init__(self) -> None:
        for name, least in (("train_frames", 2), ("held_frames", _LEAST_FRAMES), ("steps", 0)):
            value = getattr(self, name)
            if value < least:
                raise InputError(f"{name} is {value}; it must be {least} or more")


@dataclass(frozen=True)
class Promise:
    """What a bundle needs to promise quality.

    Attributes:
        predictor: The module ``predictor``; None where no exit reads the cache.
        predictor_cold: The module ``predictor_cold``; None where every exit reads the cache.
        record: The manifest's ``calibration.promise``, JSON-ready.
        calibration: Content of `CALIBRATION_FILE`.
    """

    predictor: ModelProto | None
    predictor_cold: ModelProto | None
    record: dict[str, Any]
    calibration: bytes


def make_promise(
    models: ExitModels,
    layout: AdapterLayout,
    frames: PromiseFrames,
    terms: PromiseTerms,
    *,
    options: PromiseOptions | None = None,
    at: datetime | None = None,
    progress: Progress,
) -> Promise:
    """Measure, fit and calibrate.

    Args:
        models: The exits, what they are compared with, and what they cost.
        layout: What the adapter reads: inputs and surface.
        frames: Training and held-back stream.
        terms: Metric and ages 1..A of caches that are promised.
        options: How much is measured.
        at: When it is made; now, by default.
        progress: Told how far it is.

    Returns:
        The promise. The record's exits are in the predictor's order: consumers first, then branches, each as given.

    Raises:
        InputError: If there are too few held-back frames, or the metric is unknown or cannot be measured.
        ExportError: If there are no exits, or one fails.
    """
    options = options or PromiseOptions()
    metric = canonical_metric(terms.metric)
    if not models.exits:
        raise ExportError("no exit but the exact ones was given, so there is nothing to promise; train some")
    consumers = [name for name, model in models.exits.items() if reads_cache(model)]
    branches = [name for name in models.exits if name not in consumers]
    ordered = {name: models.exits[name] for name in (*consumers, *branches)}
    ages = sorted(set(terms.ages)) if consumers else []
    train, held, oldest = frames.train, frames.held, max(ages, default=0)
    fitted, calibrated = split_blocks(_frames(held), oldest, options.held_frames)
    measured = functools.partial(
        measure_exits,
        dataclasses.replace(models, exits=ordered),
        terms=dataclasses.replace(terms, ages=ages),
        progress=progress,
    )

    pretrained = _evenly(min(oldest, max(0, _frames(train) - 2)), _frames(train), options.train_frames)
    on_train = measured(train, pretrained, stage="measuring the exits on training frames")
    spent = np.concatenate(fitted)
    wanted = np.concatenate([spent, *calibrated]).tolist()
    on_held = measured(held, wanted, stage="measuring the exits on held-back frames")
    progress("fitting the predictor", 0, 1)
    on_spent, blocks = _only(on_held, spent), len(fitted)
    predictor = fit_predictor(layout, frames, on_train, on_spent, blocks=blocks, seed=options.seed, steps=options.steps)
    graphs = {
        "predictor": warm_graph(predictor) if consumers else None,
        "predictor_cold": cold_graph(predictor) if branches else None,
    }
    progress("fitting the predictor", 1, 1)
    rows = _only(on_held, np.concatenate(calibrated))
    predicted, spread = predict_rows(graphs["predictor"], graphs["predictor_cold"], layout, held, rows, len(branches))
    calibration = Calibration(
        metric=metric,
        exits=tuple(ordered),
        cold_exits=tuple(branches),
        ages=tuple(ages),
        predicted=predicted,
        spread=spread,
        measured=rows.scores.astype(np.float32),
        age=rows.age.astype(np.int32),
        frame=rows.frame.astype(np.int32),
    )
    modules = {"whole": models.generator, "plain": models.plain, **ordered, **graphs}
    record = PromiseRecord(
        metric=metric,
        exits=calibration.exits,
        cold_exits=calibration.cold_exits,
        ages=calibration.ages,
        samples=len(rows.frame),
        frames=len(np.unique(rows.frame)),
        at=(at or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%SZ"),
        file=CALIBRATION_FILE,
        macs={name: count_macs(model) for name, model in modules.items() if model is not None},
        errors=_median_errors(calibration),
        thresholds=tuple(cross_validated(calibration, models.costs)),
    )
    return Promise(graphs["predictor"], graphs["predictor_cold"], record.to_record(), calibration.to_npz())


def split_blocks(frames: int, oldest: int, limit: int) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """Cut a held-back stream into blocks: one in three to fit to, two to calibrate on.

    Args:
        frames: Of the stream.
        oldest: The oldest cache, in frames; the stream's first frames serve as caches alone.
        limit: Most frames to use; of a longer stream, blocks spread evenly over it.

    Returns:
        Frames of the blocks to fit to, and of those to calibrate on.

    Raises:
        InputError: If the stream is too short.
    """
    left = frames - oldest
    if left < _LEAST_FRAMES:
        raise InputError(
            f"a quality promise at ages up to {oldest} needs {oldest + _LEAST_FRAMES} held-back frames at least, there "
            f"are {frames}; give a longer clip or --holdout"
        )
    length = max(1, min(_LONGEST_BLOCK, left // _WISHED_BLOCKS))
    # The last block takes what is left over.
    starts = np.arange(oldest, frames - length + 1, length)
    ends = [*starts[1:].tolist(), frames]
    blocks = [np.arange(start, end) for start, end in zip(starts.tolist(), ends, strict=True)]
    most = max(3, limit // length)
    blocks = [blocks[k] for k in _evenly(0, len(blocks), most)]
    # The middle one of three, so that frames to fit to have frames to calibrate on at both sides.
    return blocks[1::3], [block for k, block in enumerate(blocks) if k % 3 != 1]


def predict_rows(
    predictor: ModelProto | None,
    predictor_cold: ModelProto | None,
    layout: AdapterLayout,
    arrays: Mapping[str, Array],
    rows: Measured,
    branches: int,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Run the predictors' graphs for every row: predicted scores and spreads, float32 [N, E] each.

    Rows of age 0 are the cold one's, NaN in the columns of exits that read the cache.

    Args:
        predictor: As in `Promise`.
        predictor_cold: As in `Promise`.
        layout: As for `make_promise`.
        arrays: The stream that `rows` are of.
        rows: Which frames and ages.
        branches: How many of the last columns are exits that read no cache.
    """
    thumbnails = open_session(thumbnail_graph(layout))
    warm = None if predictor is None else open_session(predictor)
    cold = None if predictor_cold is None else open_session(predictor_cold)
    count = rows.scores.shape[1]
    predicted = np.full((len(rows.frame), count), np.nan, np.float32)
    spread = np.full((len(rows.frame), count), np.nan, np.float32)
    for row, (t, age) in enumerate(zip(rows.frame.tolist(), rows.age.tolist(), strict=True)):
        inputs = frame_at(arrays, t)
        if age == 0 and cold is not None:
            given, columns = run_session(cold, inputs), slice(count - branches, count)
        else:
            assert warm is not None
            then = frame_at(arrays, t - age)
            feeds = {**inputs, **run_session(thumbnails, then), AGE_INPUT: np.full((1, 1), age, np.float32)}
            if layout.surface is not None:
                feeds[CACHE_ATLAS] = then[layout.surface.atlas]
            given, columns = run_session(warm, feeds), slice(0, count)
        predicted[row, columns], spread[row, columns] = given["predicted"][0], given["spread"][0]
    return predicted, spread


def cross_validated(calibration: Calibration, costs: Mapping[str, float]) -> list[dict[str, Any]]:
    """What some thresholds give: margins from one half of the blocks, coverage and savings from the other, both ways.

    Args:
        calibration: All its rows.
        costs: As for `evaluate`.

    Returns:
        For every age of every threshold that can be promised: `threshold`, `confidence`, `age`, `coverage`, `saved`
        and `shares`. A threshold that half the frames cannot promise is left out.
    """
    frames = np.unique(calibration.frame)
    # Halves are runs of frames, as blocks are: a margin must not be tried on the frame next to those it was made from.
    run = np.cumsum(np.diff(frames, prepend=frames[0]) > 1)
    half = dict(zip(frames.tolist(), (run % 2).tolist(), strict=True))
    side = np.array([half[frame] for frame in calibration.frame.tolist()])
    if len(set(side.tolist())) < 2:
        return []
    found: list[dict[str, Any]] = []
    for threshold in _THRESHOLDS[calibration.metric]:
        quality = Quality(calibration.metric, threshold, CONFIDENCE)
        ways = []
        try:
            for tried in (0, 1):
                rule = _part(calibration, side != tried).rule(quality)
                ways.append(evaluate(_part(calibration, side == tried), rule, costs))
        except InputError:
            # Half of the frames is too few for this confidence, or no exit is eligible at this threshold.
            continue
        for pair in zip(*ways, strict=True):
            shares = {name: 0.5 * sum(way.shares.get(name, 0.0) for way in pair) for way in pair for name in way.shares}
            found.append(
                {
                    "threshold": threshold,
                    "confidence": CONFIDENCE,
                    "age": pair[0].age,
                    "coverage": round(0.5 * sum(way.coverage for way in pair), 4),
                    "saved": round(0.5 * sum(way.saved for way in pair), 4),
                    "shares": {name: round(share, 4) for name, share in shares.items()},
                }
            )
    return found


def _part(calibration: Calibration, rows: NDArray[np.bool_]) -> Calibration:
    """Some rows of a calibration."""
    arrays = {name: getattr(calibration, name)[rows] for name in ("predicted", "spread", "measured", "age", "frame")}
    return dataclasses.replace(calibration, **arrays)


def _median_errors(calibration: Calibration) -> dict[str, float]:
    """Median absolute error of the predicted score, by exit."""
    errors = np.abs(calibration.predicted - calibration.measured)
    return {name: round(float(np.nanmedian(errors[:, e])), 4) for e, name in enumerate(calibration.exits)}


def _only(measured: Measured, frames: NDArray[np.int64]) -> Measured:
    """Rows of some frames."""
    rows = np.isin(measured.frame, frames)
    return Measured(measured.exits, measured.frame[rows], measured.age[rows], measured.scores[rows])


def _frames(arrays: Mapping[str, Array]) -> int:
    return max(len(array) for array in arrays.values())


def _evenly(first: int, end: int, count: int) -> list[int]:
    """At most `count` numbers, evenly from `first` to `end` - 1."""
    return sorted({round(k) for k in np.linspace(first, end - 1, min(count, end - first))})

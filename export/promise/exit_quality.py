"""Measure what every exit's answer to every frame is worth, from caches of every age: what a predictor learns from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from ...engine.bundle.manifest import CACHE_PREFIX
from ...engine.errors import ExportError, InputError
from ...engine.metrics.images import available_metrics, measure_frames
from ...engine.metrics.lpips import Lpips
from ...engine.promise.calibration import canonical_metric, to_score
from ...engine.spec import Array
from ..frames.streams import Progress, frame_at
from ..graph.index import GraphIndex
from ..graph.run import open_session, run_session

__all__ = ["ExitModels", "Measured", "PromiseTerms", "measure_exits", "reads_cache"]


@dataclass(frozen=True)
class ExitModels:
    """Exits, and the models that they are compared with and fed from.

    Attributes:
        exits: Those that are not exact, name -> module: consumers read cache tensors, branches do not.
        generator: The whole.
        producer: Frame inputs -> cache tensors; it need not give the thumbnail yet.
        image_output: The output that quality is measured on.
        plain: The plain consumer, where its work is to be counted too.
        costs: Cost of every exit as a fraction of the whole's, where savings are to be told of; those of ``predictor``
            and ``predictor_cold`` count where they are there.
    """

    exits: Mapping[str, ModelProto]
    generator: ModelProto
    producer: ModelProto
    image_output: str
    plain: ModelProto | None = None
    costs: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PromiseTerms:
    """What is promised.

    Attributes:
        metric: As `canonical_metric` takes it.
        ages: Ages of consumers' caches in frames, 1 or more.
        lpips: LPIPS to use; without it, its weights are found by WARPCACHE_LPIPS.
    """

    metric: str
    ages: Sequence[int]
    lpips: Lpips | None = None


@dataclass(frozen=True)
class Measured:
    """Quality of exits on pairs of a frame and a cache's age, as scores; one row a pair.

    Attributes:
        exits: Their names, one a column.
        frame: Which frame of the stream was answered, int64 [N].
        age: How many frames older the cache was, int64 [N]; 0 is without a cache.
        scores: float64 [N, E]; NaN for an exit that reads the cache where there is none.
    """

    exits: tuple[str, ...]
    frame: NDArray[np.int64]
    age: NDArray[np.int64]
    scores: NDArray[np.float64]


def reads_cache(model: ModelProto) -> bool:
    """Whether an exit's module takes cache tensors: a consumer does, a branch does not."""
    return any(name.startswith(CACHE_PREFIX) for name in GraphIndex(model).inputs)


def measure_exits(
    models: ExitModels,
    arrays: Mapping[str, Array],
    frames: Sequence[int],
    terms: PromiseTerms,
    *,
    progress: Progress,
    stage: str = "measuring the exits",
) -> Measured:
    """Run every exit on frames of a stream, and compare its answers with the whole generator's.

    Consumers answer frame t from the producer's cache of frame t - age; branches from the inputs alone, once, and count
    the same at every age.

    Args:
        models: The exits, at least one, and what they are measured with.
        arrays: The stream, name -> [T, ...]; an array of leading extent 1 serves every frame.
        frames: Frames to answer, each at the ages that the stream's beginning leaves it.
        terms: Metric and ages.
        progress: Told how far it is, by frames.
        stage: What it is told.

    Returns:
        Rows by frame, then by age; those of age 0 where there are branches, the others where there are consumers.

    Raises:
        InputError: If the metric is unknown or cannot be measured on these images.
        ExportError: If an exit gives NaN or Inf, or a model fails.
    """
    exits, ages, image_output = models.exits, sorted(set(terms.ages)), models.image_output
    consumers = {name: open_session(model) for name, model in exits.items() if reads_cache(model)}
    branches = {name: open_session(model) for name, model in exits.items() if name not in consumers}
    shape = GraphIndex(models.generator).specs[image_output].shape
    distance = _distance(canonical_metric(terms.metric), shape, terms.lpips)
    whole, source = open_session(models.generator), open_session(models.producer)
    caches: dict[int, dict[str, Array]] = {}
    columns = {name: column for column, name in enumerate(exits)}
    rows: list[tuple[int, int, NDArray[np.float64]]] = []
    ordered = sorted(set(frames))
    for done, t in enumerate(ordered):
        inputs = frame_at(arrays, t)
        compare = distance(run_session(whole, inputs, [image_output])[image_output])
        alone = np.full(len(columns), np.nan)
        for name, session in branches.items():
            alone[columns[name]] = compare(name, t, run_session(session, inputs, [image_output])[image_output])
        if branches:
            rows.append((t, 0, alone))
        if consumers:
            # Frames rise, so a cache older than the oldest that this frame reads is read no more.
            for s in [s for s in caches if s < t - max(ages, default=0)]:
                del caches[s]
            for age in [age for age in ages if age <= t]:
                if t - age not in caches:
                    caches[t - age] = run_session(source, frame_at(arrays, t - age))
                feeds = {**inputs, **caches[t - age]}
                scores = alone.copy()
                for name, session in consumers.items():
                    scores[columns[name]] = compare(name, t, run_session(session, feeds, [image_output])[image_output])
                rows.append((t, age, scores))
        progress(stage, done + 1, len(ordered))
    return Measured(
        exits=tuple(exits),
        frame=np.array([t for t, _, _ in rows], np.int64),
        age=np.array([age for _, age, _ in rows], np.int64),
        scores=np.array([scores for _, _, scores in rows], np.float64).reshape(len(rows), len(columns)),
    )


def _distance(
    metric: str, shape: tuple[int, ...], lpips: Lpips | None
) -> Callable[[Array], Callable[[str, int, Array], float]]:
    """For the whole generator's image: the score of an answer, the image's own part of the work done once."""
    if metric == "lpips" and lpips is None:
        lpips = Lpips.load()
    known = available_metrics(shape, lpips=lpips)
    if metric not in known:
        raise InputError(
            f"{metric} cannot be measured on images of {shape[2]}x{shape[3]} and {shape[1]} channels; "
            f"choose one of: {', '.join(known)}"
        )

    def of(reference: Array) -> Callable[[str, int, Array], float]:
        features = lpips.features(np.clip(reference, -1.0, 1.0)) if metric == "lpips" and lpips is not None else None

        def score(name: str, t: int, answer: Array) -> float:
            if not np.isfinite(answer).all():
                raise ExportError(f"exit {name!r} gives NaN or Inf for frame {t}; leave it out, or train it anew")
            if features is not None and lpips is not None:
                value = lpips.distance(features, lpips.features(np.clip(answer, -1.0, 1.0)))[0]
            else:
                value = measure_frames(answer, reference, [metric])[metric][0]
            return float(to_score(metric, value))

        return score

    return of

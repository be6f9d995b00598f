"""Measure what each exit's answers are worth at each age, on frames that training did not see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto

from ...engine.metrics.images import available_metrics, measure_frames
from ...engine.metrics.lpips import Lpips
from ...engine.spec import Array
from ..frames.streams import Progress, frame_at, frames_of
from ..graph.index import GraphIndex
from ..graph.run import open_session, run_session

__all__ = ["FROZEN", "CalibrationTerms", "calibrate"]

FROZEN = "frozen"
"""The answer that costs nothing: the last image shown again. Every exit has to beat it."""

# Metrics take longer than the exits themselves; this many frames an age give the mean to some hundredths of a dB.
MAX_FRAMES = 64


@dataclass(frozen=True)
class CalibrationTerms:
    """What is measured.

    Attributes:
        image_output: The output that quality is measured on.
        max_age: Ages 1..max_age are measured, as far as the stream is long enough.
        truth: Ground truth of that output, float32 [T, C, H, W].
        lpips: LPIPS, where its weights are at hand.
        carried: The stream as the producer carries its state over it, where that is not the generator's to the bit.
    """

    image_output: str
    max_age: int
    truth: Array | None = None
    lpips: Lpips | None = None
    carried: Mapping[str, Array] | None = None


def calibrate(
    generator: ModelProto,
    producer: ModelProto,
    exits: Mapping[str, ModelProto],
    arrays: Mapping[str, Array],
    terms: CalibrationTerms,
    *,
    progress: Progress,
) -> dict[str, Any] | None:
    """Measure every exit at every age against the whole generator, and against the truth where there is one.

    Args:
        generator: The whole.
        producer: Frame inputs -> cache tensors.
        exits: Exit name -> its module, fed with the inputs of the newest frame and, where it reads one, the cache of an
            older frame.
        arrays: Held-back stream, name -> [T, ...], what every frame's state is among them.
        terms: What is measured.
        progress: Told how far it is.

    Returns:
        The manifest's `calibration` record: `frames` (measured an age), `against`, `metrics`, `exits` (exit -> age ->
        metric -> mean, p05, p50, p95) with the last image shown again as ``frozen``, and `truth` (the same against the
        truth, with the whole generator at age 0) or None. An exit that reads no cache is measured once, under age 0.
        None if the stream has fewer than 2 frames.
    """
    image_output, truth, lpips = terms.image_output, terms.truth, terms.lpips
    stream = list(frames_of(arrays, list(arrays)))
    ages = [age for age in range(1, terms.max_age + 1) if age < len(stream)]
    if not ages:
        return None
    index = GraphIndex(generator)
    metrics = available_metrics(index.specs[image_output].shape[1:], lpips=lpips)
    targets = _spread(ages[-1], len(stream) - 1, MAX_FRAMES)
    whole = open_session(generator)
    images = [run_session(whole, frame, [image_output])[image_output] for frame in stream]
    source = open_session(producer)
    sources = sorted({t - age for t in targets for age in ages})
    made_of = arrays if terms.carried is None else terms.carried
    caches = {s: run_session(source, frame_at(made_of, s)) for s in sources}
    sessions = {name: open_session(model) for name, model in exits.items()}
    cached = {value.name for value in source.get_outputs()}
    ages_of = {
        name: ages if cached.intersection(value.name for value in session.get_inputs()) else [0]
        for name, session in sessions.items()
    } | {FROZEN: ages}
    against: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in (*exits, FROZEN)}
    of_truth: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in (*exits, FROZEN)}
    use_truth = truth is not None and truth.shape[1:] == images[0].shape[1:]
    rendered = np.concatenate([images[t] for t in targets])
    filmed = truth[targets] if truth is not None and use_truth else None
    done, total = 0, sum(map(len, ages_of.values()))
    for age in (0, *ages):
        for name in against:
            if age not in ages_of[name]:
                continue
            if name == FROZEN:
                answers = np.concatenate([images[t - age] for t in targets])
            else:
                answers = np.concatenate(
                    [
                        run_session(sessions[name], {**stream[t], **caches.get(t - age, {})}, [image_output])[
                            image_output
                        ]
                        for t in targets
                    ]
                )
            against[name][str(age)] = _summary(measure_frames(answers, rendered, metrics, lpips=lpips))
            if filmed is not None:
                of_truth[name][str(age)] = _summary(measure_frames(answers, filmed, metrics, lpips=lpips))
            done += 1
            progress("calibrating", done, total)
    truth_record: dict[str, Any] | None = None
    if filmed is not None:
        whole_quality = _summary(measure_frames(rendered, filmed, metrics, lpips=lpips))
        truth_record = {"exits": {"whole": {"0": whole_quality}, **of_truth}}
    return {
        "frames": len(targets),
        "against": "whole generator",
        "metrics": list(metrics),
        "exits": against,
        "truth": truth_record,
    }


def _spread(first: int, last: int, count: int) -> list[int]:
    """At most `count` frames, evenly from `first` to `last`."""
    return sorted({round(k) for k in np.linspace(first, last, min(count, last - first + 1))})


def _summary(values: Mapping[str, Sequence[float] | Array]) -> dict[str, dict[str, float]]:
    """Metric -> mean and quantiles, rounded to what means something."""
    record: dict[str, dict[str, float]] = {}
    for name, frames in values.items():
        array = np.asarray(frames, np.float64)
        quantiles = np.quantile(array, [0.05, 0.5, 0.95])
        record[name] = {
            "mean": round(float(array.mean()), 5),
            **{key: round(float(q), 5) for key, q in zip(("p05", "p50", "p95"), quantiles, strict=True)},
        }
    return record

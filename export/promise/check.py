"""What a promise of quality needs, refused before anything is trained."""

from __future__ import annotations

import itertools

import numpy as np

from ...engine.errors import InputError
from ...engine.metrics.images import METRICS, measure
from ...engine.metrics.lpips import Lpips
from ...engine.promise.calibration import metric_option
from ...engine.promise.conformal import allowed_losses
from ...engine.spec import AGE_INPUT
from ..frames.subject import Subject
from ..graph.index import GraphIndex
from .promise import CONFIDENCE, split_blocks

__all__ = ["check_promise", "least_held_frames"]


def check_promise(subject: Subject, promised: str, max_age: int, lpips: Lpips | None) -> None:
    """Refuse what no promise can be made of, before anything is trained.

    Args:
        subject: The generator and its frames.
        promised: Metric, by its name in `quality.METRICS`.
        max_age: Oldest cache that is promised for, in frames.
        lpips: LPIPS where its weights are at hand.

    Raises:
        InputError: If no output is an image, the metric is not defined for it, too few frames are held back, or an
            input has the name by which a predictor is told the age.
        BackendError: If the metric needs a package that is missing.
    """
    if subject.image_output is None:
        raise InputError(
            "quality is promised for an image, but no output is a float32 image of 1 or 3 channels; leave out --exits"
        )
    if AGE_INPUT in subject.train.arrays:
        raise InputError(
            f"an input is called {AGE_INPUT!r}, which is what a predictor is told the cache's age by; rename it, or "
            "leave out --exits"
        )
    shape = GraphIndex(subject.model).specs[subject.image_output].shape[1:]
    metric = METRICS[promised]
    option = metric_option(metric.name)
    others = "; choose another --metric"
    if metric.channels is not None and shape[0] != metric.channels:
        raise InputError(
            f"metric {option} is for images of {metric.channels} channels, but output {subject.image_output!r} has "
            f"{shape[0]}{others}"
        )
    if min(shape[1:]) < metric.smallest_side:
        raise InputError(
            f"metric {option} needs images of {metric.smallest_side} pixels a side or more, but output "
            f"{subject.image_output!r} is {shape[1]}x{shape[2]}{others}"
        )
    needed = least_held_frames(max_age)
    if subject.held.frames < needed:
        raise InputError(
            f"a promise at ages up to {max_age} and confidence {CONFIDENCE:g} needs {needed} held-back frames "
            f"at least, but there are {subject.held.frames}; give a longer clip, --holdout or a smaller --max-age"
        )
    # Once on nothing, so that a package that is missing is found now.
    nothing = np.zeros(shape, np.float32)
    measure(nothing, nothing, [metric.name], lpips=lpips)


def least_held_frames(max_age: int) -> int:
    """How many held-back frames leave enough to calibrate on at every age for a promise at confidence 0.95.

    Conformal risk control allows no frame to be lost below (n + 1) (1 - confidence) >= 1; see `engine.conformal`.
    """
    return next(frames for frames in itertools.count(max_age + 1) if _enough(frames, max_age))


def _enough(frames: int, max_age: int) -> bool:
    try:
        _, calibrated = split_blocks(frames, max_age, frames)
    except InputError:
        return False
    return allowed_losses(sum(map(len, calibrated)), 1.0 - CONFIDENCE) >= 0

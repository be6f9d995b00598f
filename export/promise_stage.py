"""A compile's promise of quality: what it needs, refused before anything is trained, and what it adds to the bundle."""

from __future__ import annotations

import numpy as np

from ..engine.errors import InputError
from ..engine.lpips import Lpips
from ..engine.promise import metric_option
from ..engine.quality import METRICS, measure
from .compile_options import CompileOptions
from .graph import GraphIndex
from .subject import Subject

__all__ = ["check_promise"]


def check_promise(subject: Subject, options: CompileOptions, lpips: Lpips | None) -> None:
    """Refuse what no promise can be made of, before anything is trained.

    Args:
        subject: The generator and its frames.
        options: With exits.
        lpips: LPIPS where its weights are at hand.

    Raises:
        InputError: If no output is an image, the metric is not defined for it, or too few frames are held back.
        BackendError: If the metric needs a package that is missing.
    """
    if subject.image_output is None:
        raise InputError(
            "quality is promised for an image, but no output is a float32 image of 1 or 3 channels; leave out --exits"
        )
    shape = GraphIndex(subject.model).specs[subject.image_output].shape[1:]
    metric = METRICS[options.promised_metric]
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
    # Once on nothing, so that a package that is missing is found now.
    nothing = np.zeros(shape, np.float32)
    measure(nothing, nothing, [metric.name], lpips=lpips)

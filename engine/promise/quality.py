"""What a caller asks for: a metric, a threshold and a confidence; and the scores that metrics are predicted in.

A *score* is a quality in the form in which it is predicted: natural logarithm, larger is worse, finite for identical
images too.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InputError
from ..metrics.images import PSNR_CAP_DB

__all__ = [
    "PROMISABLE",
    "Quality",
    "canonical_metric",
    "from_score",
    "in_range",
    "metric_option",
    "score_value",
    "to_score",
]

PROMISABLE: Final = ("lpips", "flip", "psnr_db", "ms_ssim")
"""The metrics that a threshold can be promised in, by their names in `quality.METRICS`."""

_ALIASES = {"psnr": "psnr_db", "ms-ssim": "ms_ssim"}
_OPTIONS = {"psnr_db": "psnr", "ms_ssim": "ms-ssim"}
_RANGES = {
    "lpips": "a finite number above 0",
    "flip": "a number above 0 and at most 1",
    "psnr_db": f"a number of decibels above 0 and at most {PSNR_CAP_DB:g}",
    "ms_ssim": "a number between 0 and 1, both excluded",
}
# What identical images count as: far below what is visible, and far above what float32 arithmetic leaves of nothing.
_LEAST_DISTANCE = 1e-6
_NATS_PER_DB = math.log(10.0) / 10.0


def canonical_metric(name: str) -> str:
    """The name of a metric as `quality.METRICS` has it; ``psnr`` and ``ms-ssim`` are understood too.

    Raises:
        InputError: If nothing can be promised in such a metric; the message lists those in which it can.
    """
    if isinstance(name, str):
        lowered = name.strip().lower()
        lowered = _ALIASES.get(lowered, lowered)
        if lowered in PROMISABLE:
            return lowered
    known = ", ".join(metric_option(metric) for metric in PROMISABLE)
    raise InputError(f"no quality can be promised in metric {name!r}; choose one of: {known}")


def metric_option(metric: str) -> str:
    """How the command line's options spell a metric: ``lpips``, ``flip``, ``psnr``, ``ms-ssim``."""
    return _OPTIONS.get(metric, metric)


def to_score(metric: str, values: ArrayLike) -> NDArray[np.float64]:
    """Turn a metric's values into scores: larger is worse, one unit is a factor e of distance.

    LPIPS and FLIP: the logarithm of the value; MS-SSIM: of 1 - value; each distance counts 1e-6 at least. PSNR: of
    the mean squared error on [0, 1], the decibels capped at 100 as everywhere. NaN stays NaN.

    Args:
        metric: A name or alias of a promisable metric.
        values: Any shape.

    Returns:
        float64, the shape of `values`.
    """
    metric = canonical_metric(metric)
    given = np.asarray(values, np.float64)
    if metric == "psnr_db":
        return np.asarray(-_NATS_PER_DB * np.minimum(given, PSNR_CAP_DB))
    distance = 1.0 - given if metric == "ms_ssim" else given
    return np.asarray(np.log(np.maximum(distance, _LEAST_DISTANCE)))


def from_score(metric: str, scores: ArrayLike) -> NDArray[np.float64]:
    """Turn scores back into the metric's values; the inverse of `to_score` where nothing was cut off."""
    metric = canonical_metric(metric)
    given = np.asarray(scores, np.float64)
    if metric == "psnr_db":
        return np.asarray(-given / _NATS_PER_DB)
    distance = np.exp(given)
    return np.asarray(1.0 - distance if metric == "ms_ssim" else distance)


def score_value(metric: str, score: float) -> float:
    """`from_score` of one score and a canonical metric name, without arrays: for the path of a frame."""
    if metric == "psnr_db":
        return -score / _NATS_PER_DB
    # Beyond, exp overflows; a score that far out says "of no use" either way.
    distance = math.exp(min(score, 700.0))
    return 1.0 - distance if metric == "ms_ssim" else distance


@dataclass(frozen=True)
class Quality:
    """A quality that a caller asks for: a metric, how far an answer may be from the whole generator's, how surely.

    Attributes:
        metric: ``lpips``, ``flip``, ``psnr_db`` or ``ms_ssim``; ``psnr`` and ``ms-ssim`` are understood and stored so.
        threshold: The worst value allowed, in the metric's unit.
        confidence: At least this share of the frames keeps it; in (0, 1).

    Raises:
        InputError: If the metric is unknown, the threshold outside its range, or the confidence outside (0, 1).
    """

    metric: str
    threshold: float
    confidence: float = 0.95

    def __post_init__(self) -> None:
        object.__setattr__(self, "metric", canonical_metric(self.metric))
        threshold = _number(self.threshold)
        if threshold is None or not in_range(self.metric, threshold):
            raise InputError(
                f"a threshold of {metric_option(self.metric)} is {_RANGES[self.metric]}, but {self.threshold!r} was "
                "given; choose one in that range"
            )
        object.__setattr__(self, "threshold", threshold)
        confidence = _number(self.confidence)
        if confidence is None or not 0.0 < confidence < 1.0:
            raise InputError(
                f"confidence {self.confidence!r} is not a number between 0 and 1, both excluded; give for example 0.95"
            )
        object.__setattr__(self, "confidence", confidence)

    @classmethod
    def parse(cls, text: str, *, confidence: float = 0.95) -> Quality:
        """Read a quality from its text form.

        Args:
            text: ``"METRIC=THRESHOLD"``, for example ``"lpips=0.1"``.
            confidence: As the attribute.

        Raises:
            InputError: If the text has another form, or what it says is out of range.
        """
        metric, equals, value = text.partition("=")
        try:
            threshold = float(value)
        except ValueError:
            equals = ""
            threshold = math.nan
        if not equals:
            raise InputError(f"quality {text!r} is not of the form METRIC=THRESHOLD; write it as in 'lpips=0.1'")
        return cls(metric, threshold, confidence)

    @property
    def score(self) -> float:
        """The threshold's score: what is above it is worse than asked for."""
        return float(to_score(self.metric, self.threshold))

    def __str__(self) -> str:
        return f"{metric_option(self.metric)}={self.threshold:g}"


def in_range(metric: str, threshold: float) -> bool:
    """Whether a number can be a threshold of a metric, given by its canonical name."""
    # NaN fails every comparison.
    if metric == "lpips":
        return 0.0 < threshold < math.inf
    if metric == "flip":
        return 0.0 < threshold <= 1.0
    return 0.0 < threshold <= PSNR_CAP_DB if metric == "psnr_db" else 0.0 < threshold < 1.0


def _number(value: object) -> float | None:
    """A real number as float; None for anything else, bool and str among it."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        return None
    return float(value)

"""Which exits are worth having: what each costs against how near it comes to the whole generator, at every age.

An exit is *dominated* at an age when another one there is no costlier and no worse, and better in one of the two. Those
that are left are the Pareto front.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..engine.metrics.images import METRICS

if TYPE_CHECKING:
    from ..engine.bundle.manifest import Manifest
    from ..engine.promise.calibration import Calibration

__all__ = ["Point", "age_words", "by_age", "front_sentences", "mark_dominated", "points_of"]


@dataclass(frozen=True)
class Point:
    """One exit at one age.

    Attributes:
        exit: The exit's name.
        age: Age of the cache in frames; 0 where there is none, and branches alone answer beside the whole generator.
        cost: Its measured time as a fraction of the whole generator's.
        value: The metric against the whole generator's answer, the median over the calibration's frames; None for
            the whole generator in a metric that has no value for identical images.
        worst: The metric that all but 5 % of the frames reach.
        frames: Calibration frames of that age.
        dominated: Whether another exit is as cheap and as good, and better in one.
        exact: Whether it is the whole generator.
    """

    exit: str
    age: int
    cost: float
    value: float | None
    worst: float | None
    frames: int
    dominated: bool = False
    exact: bool = False


def points_of(calibration: Calibration, manifest: Manifest) -> list[Point]:
    """Every exit at every age that it was calibrated at, and the whole generator; by age, then by cost.

    Args:
        calibration: What was measured when the promise was made.
        manifest: Its bundle's.
    """
    from ..engine.promise.calibration import from_score

    costs = {record.name: record.cost_ratio for record in manifest.exits}
    # Identical images are PSNR's infinity: the whole generator has no place on its scale.
    perfect = {"psnr_db": None, "ms_ssim": 1.0}.get(calibration.metric, 0.0)
    measured, age_of = np.asarray(calibration.measured, np.float64), np.asarray(calibration.age)
    found: list[Point] = []
    for age in sorted({int(age) for age in age_of}):
        rows = measured[age_of == age]
        whole = manifest.exact_exit
        here = []
        if whole is not None:
            here.append(Point(whole, age, costs[whole], perfect, perfect, len(rows), exact=True))
        for name, column in zip(calibration.exits, rows.T, strict=True):
            scores = column[np.isfinite(column)]
            if scores.size and name in costs:
                # A score is larger where an answer is worse, whatever the metric's direction.
                middle, worst = from_score(calibration.metric, np.quantile(scores, (0.5, 0.95)))
                here.append(Point(name, age, costs[name], float(middle), float(worst), int(scores.size)))
        found += sorted(mark_dominated(here, calibration.metric), key=lambda point: point.cost)
    return found


def mark_dominated(points: Sequence[Point], metric: str) -> list[Point]:
    """The same points of one age, each with its `dominated` set.

    Args:
        points: Exits of one age; one without a value is exact, and better than all others.
        metric: Name in `METRICS`.
    """
    sign = -1.0 if METRICS[metric].higher_is_better else 1.0

    def badness(point: Point) -> float:
        return -math.inf if point.value is None else sign * point.value

    def dominates(a: Point, b: Point) -> bool:
        no_worse = a.cost <= b.cost and badness(a) <= badness(b)
        return no_worse and (a.cost < b.cost or badness(a) < badness(b))

    return [replace(point, dominated=any(dominates(other, point) for other in points)) for point in points]


def age_words(age: int) -> str:
    """What people read for an age: ``cache 2 frames old``, ``no cache``."""
    return "no cache" if age == 0 else f"cache {age} frame{'s' if age != 1 else ''} old"


def by_age(points: Iterable[Point]) -> Mapping[int, list[Point]]:
    """The points apart by age, youngest first."""
    found: dict[int, list[Point]] = {}
    for point in points:
        found.setdefault(point.age, []).append(point)
    return dict(sorted(found.items()))


def front_sentences(points: Iterable[Point], metric: str) -> list[str]:
    """Which exits are on the Pareto front, a sentence for each age at which there is more than one exit.

    Args:
        points: Exits, with `dominated` set.
        metric: Name in `METRICS`.
    """
    record = METRICS[metric]
    better = f"{'higher' if record.higher_is_better else 'lower'} is better"
    return [
        f"Pareto front, {age_words(age)}: {', '.join(p.exit for p in group if not p.dominated)} "
        f"(by cost; {record.title}: {better})"
        for age, group in by_age(points).items()
        if len(group) > 1
    ]

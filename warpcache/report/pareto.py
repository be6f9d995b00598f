"""Which exits are worth having: what each costs against how near it comes to the whole generator, at every age.

An exit is *dominated* at an age when another one there is no dearer and no worse, and better in one of the two. Those
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

__all__ = ["Point", "age_words", "by_age", "cost_ticks", "mark_dominated", "points_of", "text_plot"]

WHOLE = "whole"


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
    """

    exit: str
    age: int
    cost: float
    value: float | None
    worst: float | None
    frames: int
    dominated: bool = False


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
        here = [Point(WHOLE, age, costs.get(WHOLE, 1.0), perfect, perfect, len(rows))]
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


def cost_ticks(costs: Iterable[float]) -> list[float]:
    """Round fractions 1, 2, 5, 10, ... % from just below the least of `costs` to just above the greatest."""
    steps = [step * 10.0**power for power in range(-5, 3) for step in (1, 2, 5)]
    known = list(costs)
    low = max((step for step in steps if step <= min(known) * (1 + 1e-9)), default=steps[0])
    high = min((step for step in steps if step >= max(known) * (1 - 1e-9)), default=steps[-1])
    return [step for step in steps if low <= step <= high]


def by_age(points: Iterable[Point]) -> Mapping[int, list[Point]]:
    """The points apart by age, youngest first."""
    found: dict[int, list[Point]] = {}
    for point in points:
        found.setdefault(point.age, []).append(point)
    return dict(sorted(found.items()))


def text_plot(points: Sequence[Point], metric: str, *, width: int = 66, height: int = 12) -> str:
    """Draw exits of one age by cost (logarithmic, to the right) and quality (upwards) in letters.

    Capitals are on the Pareto front, small letters are dominated; a letter whose place is taken stands beside it.

    Args:
        points: Exits of one age, with `dominated` set.
        metric: Name in `METRICS`.
        width: Columns of the field.
        height: Lines of the field, at least 2.

    Returns:
        Lines joined by line feeds: axes with what they are, and which letter is which exit.
    """
    record = METRICS[metric]
    drawn = sorted((point for point in points if point.value is not None), key=lambda point: point.cost)
    if not drawn:
        return ""
    values = [point.value for point in drawn if point.value is not None]
    low, high = min(values), max(values)
    if high <= low:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    ticks = cost_ticks(point.cost for point in drawn)
    field = [[" "] * width for _ in range(height)]
    legend = []
    for number, point in enumerate(drawn):
        assert point.value is not None
        letter = chr(ord("A") + number % 26)
        letter = letter.lower() if point.dominated else letter
        up = round((point.value - low) / (high - low) * (height - 1))
        _put(field[height - 1 - up], _column(point.cost, ticks, width), letter)
        legend.append(f"{letter} {point.exit}")

    step = (high - low) / (height - 1)
    texts = {line: f"{high - line * step:.{record.digits}f}" for line in (0, (height - 1) // 2, height - 1)}
    margin = max(map(len, texts.values()))
    bottom, words = _cost_axis(ticks, width)
    better = "upper" if record.higher_is_better else "lower"
    below = [
        f"└{bottom}",
        f" {words}",
        f" cost: time in % of the whole generator's, as measured (logarithmic); {better} left is better",
        f" {', '.join(legend)}",
    ]
    if any(point.dominated for point in drawn):
        below.append(" capitals: the Pareto front; small: dominated, another exit is as cheap and better")
    if len(drawn) < len(points):
        below.append(" the whole generator is exact, at 100% of its cost")
    rows = [
        f"{texts.get(number, ''):>{margin}} {'┤' if number in texts else '│'}{''.join(cells)}"
        for number, cells in enumerate(field)
    ]
    title = f"{record.title}{f', {record.unit}' if record.unit else ''} (median)"
    return "\n".join(line.rstrip() for line in (title, *rows, *(f"{'':>{margin}} {line}" for line in below)))


def _column(cost: float, ticks: Sequence[float], width: int) -> int:
    """Where a cost stands between the first and the last tick."""
    left, right = math.log(ticks[0]), math.log(max(ticks[-1], ticks[0] * 1.01))
    return round((math.log(cost) - left) / (right - left) * (width - 1))


def _put(line: list[str], wanted: int, letter: str) -> None:
    """Write a letter where it belongs, or at the nearest free place of its line."""
    nearest = sorted(range(len(line)), key=lambda place: abs(place - wanted))
    line[next((place for place in nearest if line[place] == " "), wanted)] = letter


def _cost_axis(ticks: Sequence[float], width: int) -> tuple[str, str]:
    """The axis with its ticks, and their words below it where there is room for them."""
    line, words = ["─"] * width, [" "] * (width + 8)
    for tick in ticks:
        at, text = _column(tick, ticks, width), f"{tick * 100:g}%"
        line[at] = "┴"
        if all(cell == " " for cell in words[max(0, at - 1) : at + len(text) + 1]):
            words[at : at + len(text)] = text
    return "".join(line), "".join(words)

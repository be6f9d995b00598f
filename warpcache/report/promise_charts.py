"""The charts of a bundle's promise: its exits by cost and quality, and what each threshold saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..engine.metrics.images import METRICS
from .drawing import DOTS, PAPER, SERIES, TEXT, Chart, drawing, logarithmic, round_steps
from .pareto import Point, by_age, mark_dominated
from .words import with_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..engine.promise.calibration import PromiseRecord

__all__ = ["promise_charts", "shown_ages"]


def shown_ages(points: Sequence[Point]) -> dict[int, int]:
    """The ages that have a colour in the charts, and its number: grey for no cache, the youngest caches in turn."""
    ages = list(by_age(points))
    colours = range(1, len(SERIES))
    return {**{age: 0 for age in ages if age == 0}, **dict(zip((age for age in ages if age), colours, strict=False))}


def promise_charts(record: PromiseRecord, points: Sequence[Point]) -> list[Chart]:
    """Draw the Pareto front by time and by multiply-accumulates, and the saving over the threshold.

    Args:
        record: What is promised.
        points: From `points_of`.
    """
    charts = [_front(points, record.metric, "pareto", "Pareto front", "measured time", wide=True)]
    by_macs = _by_macs(points, record)
    if by_macs:
        charts.append(
            _front(by_macs, record.metric, "pareto-macs", "Pareto front by computation", "multiply-accumulates")
        )
    if record.thresholds:
        charts.append(_saved(record, shown_ages(points)))
    return charts


def _by_macs(points: Sequence[Point], record: PromiseRecord) -> list[Point]:
    """The same points with their cost in multiply-accumulates; empty where these were not counted."""
    whole = record.macs.get("whole")
    if not whole or any(point.exit not in record.macs for point in points):
        return []
    costed = [replace(point, cost=record.macs[point.exit] / whole) for point in points]
    return [point for group in by_age(costed).values() for point in mark_dominated(group, record.metric)]


def _front(points: Sequence[Point], metric: str, name: str, title: str, cost: str, *, wide: bool = False) -> Chart:
    """Exits by cost and quality: one colour an age, filled on the front, hollow where dominated."""
    shown, colours = by_age(points), shown_ages(points)
    record = METRICS[metric]
    with drawing(name, wide=wide) as (axes, svg):
        for age, number in colours.items():
            group = sorted((p for p in shown[age] if p.value is not None), key=lambda point: point.cost)
            front = [point for point in group if not point.dominated]
            # A step: between two exits nothing better is to be had than the cheaper one's quality.
            costs, values = [point.cost for point in front], [point.value or 0.0 for point in front]
            axes.step(costs, values, where="post", color=SERIES[number], linewidth=1.3)
            for point in group:
                inside, edge = (PAPER, SERIES[number]) if point.dominated else (SERIES[number], PAPER)
                dot = {**DOTS, "markersize": 7, "markerfacecolor": inside, "markeredgecolor": edge}
                axes.plot(point.cost, point.value or 0.0, color=SERIES[number], clip_on=False, **dot)
        costs = [point.cost for point in points]
        logarithmic(axes.xaxis, round_steps(costs), (min(costs) * 0.85, max(costs) * 1.1), scale=100)
        axes.set_xlabel(f"{cost}, % of the whole generator's")
        axes.set_ylabel(f"{with_unit(record.title, record, ', ')}, median")
        axes.margins(y=0.08)
        _name_exits(axes, points)
    better = "upper" if record.higher_is_better else "lower"
    note = (
        f"Every exit at every age; {better} left is better. Filled: on the front; hollow: dominated. Logarithmic cost."
    )
    if any(point.value is None for point in points):
        note += " The whole generator is exact and not shown."
    return Chart(title, note, svg(), wide=wide)


def _name_exits(axes: Axes, points: Sequence[Point]) -> None:
    """Each exit's name above its column of points; an exit has one cost whatever the age."""
    from matplotlib.transforms import blended_transform_factory

    above = blended_transform_factory(axes.transData, axes.transAxes)
    for name, cost in {point.exit: point.cost for point in points if point.value is not None}.items():
        axes.axvline(cost, color=TEXT, linewidth=0.6, alpha=0.35, zorder=0)
        axes.text(
            cost, 1.02, name, transform=above, rotation=35, ha="left", va="bottom", rotation_mode="anchor", color=TEXT
        )


def _saved(record: PromiseRecord, colours: dict[int, int]) -> Chart:
    """How much of the whole generator's cost each threshold saves, one line an age."""
    metric = METRICS[record.metric]
    # Of several confidences the one that people ask for unless they say otherwise, or the nearest to it.
    confidence = min({entry["confidence"] for entry in record.thresholds}, key=lambda value: abs(value - 0.95))
    with drawing("saved") as (axes, svg):
        for age, number in colours.items():
            entries = sorted(
                (entry["threshold"], entry["saved"])
                for entry in record.thresholds
                if entry["age"] == age and entry["confidence"] == confidence
            )
            thresholds, saved = [threshold for threshold, _ in entries], [saved * 100 for _, saved in entries]
            axes.plot(thresholds, saved, color=SERIES[number], clip_on=False, **DOTS)
        axes.set_ylim(0, 100)
        axes.set_xlabel(f"threshold, {with_unit(metric.title, metric, ' in ')}")
        axes.set_ylabel("saved, %")
    note = (
        f"Share of the whole generator's cost that a frame is spared where {confidence * 100:.4g} % of the frames are "
        "promised the threshold, on calibration frames that the margins were not made from."
    )
    return Chart("Saved by threshold", note, svg())

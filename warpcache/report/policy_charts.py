"""The charts of what was measured under several policies: latency, ages, quality over age."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..engine.metrics.images import METRICS, PSNR_CAP_DB
from .drawing import DOTS, SERIES, Chart, drawing, logarithmic, round_steps, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axis import XAxis, YAxis

    from .results import PolicyResult

__all__ = ["charts", "series"]


def series(results: Sequence[PolicyResult]) -> list[int]:
    """Number of each result's colour: 0 (grey) for the whole generator, the others in turn."""
    numbers, following = [], 1
    for result in results:
        if result.is_whole:
            numbers.append(0)
        else:
            numbers.append(following)
            following = following % (len(SERIES) - 1) + 1
    return numbers


def charts(results: Sequence[PolicyResult]) -> list[Chart]:
    """Draw what there is to draw: latency over time, its distribution, ages, and each metric over age.

    Args:
        results: What each policy gave, the baseline first.
    """
    found = [_latency_over_time(results), _latency_distribution(results)]
    if any(max(result.ages, default=0) > 0 for result in results):
        found.append(_ages(results))
    for name in METRICS:
        chart = _quality_over_age(results, name)
        if chart is not None:
            found.append(chart)
    return found


def _latency_over_time(results: Sequence[PolicyResult]) -> Chart:
    with drawing("time") as (axes, svg):
        for number, result in zip(series(results), results, strict=True):
            axes.plot(np.arange(len(result.latency_ms)), result.latency_ms, color=SERIES[number], linewidth=1.2)
        note = _latency_axis(axes.yaxis, results)
        axes.set_xlabel("frame")
        axes.set_ylabel("ms")
        axes.margins(x=0.01)
    return Chart("Latency over time", f"Every frame, from its arrival to its answer{note}.", svg())


def _latency_distribution(results: Sequence[PolicyResult]) -> Chart:
    with drawing("distribution") as (axes, svg):
        for number, result in zip(series(results), results, strict=True):
            latency = np.sort(np.asarray(result.latency_ms, np.float64))
            share = np.arange(1, len(latency) + 1) / len(latency) * 100
            axes.step(latency, share, where="post", color=SERIES[number])
            for quantile in (50, 99):
                axes.plot(np.percentile(latency, quantile), quantile, color=SERIES[number], clip_on=False, **DOTS)
        note = _latency_axis(axes.xaxis, results)
        axes.set_xlabel("ms")
        axes.set_ylabel("% of frames answered")
        axes.set_ylim(0, 102)
    return Chart("Latency distribution", f"Share of frames answered within a time; dots: p50 and p99{note}.", svg())


def _ages(results: Sequence[PolicyResult]) -> Chart:
    drawn = [(n, r) for n, r in zip(series(results), results, strict=True) if max(r.ages, default=0) > 0]
    with drawing("ages") as (axes, svg):
        width = 0.8 / len(drawn)
        for position, (number, result) in enumerate(drawn):
            ages, counts = np.unique(np.asarray(result.ages), return_counts=True)
            offset = (position - (len(drawn) - 1) / 2) * width
            axes.bar(ages + offset, counts / len(result.ages) * 100, width=width * 0.94, color=SERIES[number])
        whole_numbers(axes.xaxis)
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("age of the cache in frames")
        axes.set_ylabel("% of frames")
    return Chart("Age of the cache", "How many frames old the cache was that each frame was answered from.", svg())


def _quality_over_age(results: Sequence[PolicyResult], name: str) -> Chart | None:
    """One metric by age: solid against the first reference, dashed against the second; None where nothing is known."""
    metric = METRICS[name]
    lines: list[tuple[int, int, list[int], list[float]]] = []
    exact = False
    references = [reference for result in results for reference in result.quality_by_age]
    order = list(dict.fromkeys(references))[:2]
    for number, result in zip(series(results), results, strict=True):
        if result.is_whole:
            continue
        for style, reference in enumerate(order):
            ages, values = [], []
            for age, quality in sorted(result.quality_by_age.get(reference, {}).items()):
                if name not in quality or not np.isfinite(quality[name]):
                    continue
                if quality.get("psnr_db", 0) >= PSNR_CAP_DB - 0.1:
                    exact = True  # no point of the line: perfection would squeeze all other ages together
                    continue
                ages.append(age)
                values.append(quality[name])
            if ages:
                lines.append((number, style, ages, values))
    if not lines:
        return None
    ceiling = [  # what the whole generator itself reaches against the second reference: nothing can ask for more
        result.quality_against[order[1]][name]
        for result in results
        if result.is_whole and len(order) > 1 and name in result.quality_against.get(order[1], {})
    ]
    with drawing(name) as (axes, svg):
        from matplotlib.ticker import MaxNLocator

        dashes = (0, (3, 2.2))
        for number, style, ages, values in lines:
            axes.plot(ages, values, color=SERIES[number], linestyle=("-", dashes)[style], **DOTS)
        for value in ceiling:
            axes.axhline(value, color=SERIES[0], linestyle=dashes, linewidth=1.4)
        whole_numbers(axes.xaxis)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.margins(x=0.06, y=0.16)
        axes.set_xlabel("age of the cache in frames")
        axes.set_ylabel(metric.unit or metric.title)
    direction = "higher" if metric.higher_is_better else "lower"
    note = f"{direction.capitalize()} is better. Solid: against the {order[0]}"
    if any(style == 1 for _, style, _, _ in lines):
        note += f"; dashed: against the {order[1]}"
        if ceiling:
            note += ", grey the whole generator"
    note += ". Ages where every frame is identical are left out." if exact else "."
    return Chart(f"{metric.title} over age", note.replace("the the ", "the "), svg())


def _latency_axis(axis: XAxis | YAxis, results: Sequence[PolicyResult]) -> str:
    """Logarithmic where latencies lie far apart; what to add to the note."""
    latency = np.concatenate([np.asarray(result.latency_ms, np.float64) for result in results])
    medians = [float(np.median(result.latency_ms)) for result in results]
    if latency.min() <= 0 or max(max(medians), latency.max() / 2) / min(medians) < 4:
        axis.axes.set(**{f"{axis.axis_name}lim": (0, None)})
        return ""
    # From one labelled line to the next, so that the fastest and the slowest frame can be read off.
    lines = round_steps(latency)
    logarithmic(axis, lines, (lines[0], lines[-1]))
    return "; logarithmic"

"""What was measured, for people and for programs: a page, a table, JSON.

One `PolicyResult` holds what a policy gave on a stream; `row` turns it into the JSON record that everything else is
made from, so that the page, the table and the file cannot disagree.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.errors import InputError
from ..engine.metrics.images import METRICS
from .page import Tile, write_page
from .records import SCHEMA, environment, write_json
from .results import PolicyResult, ReportData
from .routed import routed_lines
from .tables import Cell, Column, LegendEntry, Sheet, print_sheet, terminal
from .words import with_unit

if TYPE_CHECKING:
    from rich.console import Console


__all__ = [
    "SCHEMA",
    "Figure",
    "environment",
    "figures_of",
    "policy_title",
    "print_table",
    "row",
    "write_json",
    "write_report",
]


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes:
        group: Heading it stands under, e.g. ``against the whole generator``.
        label: What it is, with its unit.
        values: One per policy, worded; ``–`` where there is none.
        change: How the last policy stands to the first, worded; only where there are two policies.
        better: Whether that change is for the better; None where it is neither.
    """

    group: str
    label: str
    values: tuple[str, ...]
    change: str = ""
    better: bool | None = None


def policy_title(policy: str) -> str:
    """What people read for a policy: ``async`` -> ``Cut and cached``."""
    name, _, argument = policy.partition(":")
    titles = {
        "full": "Whole generator",
        "async": "Cut and cached",
        "every": f"Cache every {argument} frames",
        "lockstep": f"Cache {argument} frames old",
    }
    return titles.get(name, policy)


def row(result: PolicyResult) -> dict[str, Any]:
    """The JSON record of one policy.

    Returns:
        ``{"policy", "device", "backend", "graphs", "frames", "latency_ms": {"p50", "p95", "p99", "max"}, "fps", "age":
        {"mean", "max"}, "routes": {exit: frames}, "quality": {"against", metric: mean, ...} or None,
        "quality_against": [the same for every reference]}``; device and backend are None where nobody said.
        Percentiles interpolate linearly between frames. Where a quality was asked for, also ``"within"`` (how many
        frames kept it) and, of a routed policy, ``"promise"``; see `Within.to_record` and `Routed.to_record`.

    Raises:
        InputError: If no frame was answered, or the lists differ in length.
    """
    frames = len(result.latency_ms)
    if not frames:
        raise InputError(f"policy {result.policy!r} answered no frame, so there is nothing to report; give more inputs")
    if len(result.ages) != frames or len(result.routes) != frames:
        raise InputError(
            f"policy {result.policy!r} has {frames} latencies, {len(result.ages)} ages and {len(result.routes)} "
            "routes; give one of each per answered frame"
        )
    latency = np.asarray(result.latency_ms, np.float64)
    p50, p95, p99 = (float(value) for value in np.percentile(latency, (50, 95, 99)))
    ages = np.asarray(result.ages, np.float64)
    quality = [{"against": name, **metrics} for name, metrics in result.quality_against.items()]
    device, _, backend = result.placement.partition("/")
    return {
        "policy": result.policy,
        "device": device or None,
        "backend": backend or None,
        "graphs": result.graphs,
        "frames": frames,
        "latency_ms": {"p50": p50, "p95": p95, "p99": p99, "max": float(latency.max())},
        "fps": float(result.fps),
        "age": {"mean": float(ages.mean()), "max": int(ages.max())},
        "routes": {name: list(result.routes).count(name) for name in dict.fromkeys(result.routes)},
        "quality": quality[0] if quality else None,
        "quality_against": quality,
        **({} if result.within is None else {"within": result.within.to_record()}),
        **({} if result.routed is None else {"promise": result.routed.to_record()}),
    }


def figures_of(rows: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """The lines of the table that shows `rows` side by side.

    Args:
        rows: Records from `row`, the baseline first.
    """
    found = [
        _latency_figure(f"{name} ms", [r["latency_ms"][name] for r in rows]) for name in ("p50", "p95", "p99", "max")
    ]

    def add(group: str, label: str, word: Callable[[Mapping[str, Any]], Any]) -> None:
        found.append(Figure(group, label, tuple(str(word(r)) for r in rows)))

    # No factor here: under a paced policy it is the app that says how many frames come.
    add("throughput", "frames per second", lambda r: f"{r['fps']:.1f}")
    add("throughput", "frames answered", lambda r: r["frames"])
    add("age of the cache in frames", "mean", lambda r: f"{r['age']['mean']:.2f}")
    add("age of the cache in frames", "max", lambda r: r["age"]["max"])
    if any(r.get("device") for r in rows):
        add("where it ran", "device", lambda r: r.get("device") or "–")
        add("where it ran", "backend", lambda r: r.get("backend") or "–")
    if any(r.get("device") not in (None, "cpu") for r in rows):
        add("where it ran", "CUDA graphs", lambda r: r.get("graphs", "–"))
    found.extend(Figure(group, label, values) for group, label, values in routed_lines(rows))
    references = dict.fromkeys(quality["against"] for r in rows for quality in r.get("quality_against", ()))
    for reference in references:
        found.extend(_quality_figures(rows, reference))
    return found


def print_table(
    rows: Sequence[Mapping[str, Any]], *, title: str = "", caption: str = "", console: Console | None = None
) -> None:
    """Print the policies side by side.

    Args:
        rows: Records from `row`, the baseline first.
        title: Heading.
        caption: How it was measured.
        console: Where to; default: stdout.
    """
    print_sheet(_side_by_side(figures_of(rows), rows, title, caption), terminal(console))


def write_report(path: str | os.PathLike[str], data: ReportData) -> None:
    """Write a page that stands alone: video, charts and style are inside, nothing is loaded from anywhere.

    Args:
        path: The ``.html`` file.
        data: What to show.

    Raises:
        InputError: If there is nothing to show, the video is missing, or the file cannot be written.
    """
    from .policy_charts import charts, series

    if not data.results:
        raise InputError("a report needs at least one policy's result")
    rows = [row(result) for result in data.results]
    legend = [
        LegendEntry(number, policy_title(result.policy) + (", routed" if result.routed is not None else ""))
        for number, result in zip(series(data.results), data.results, strict=True)
    ]
    write_page(
        path,
        "report.html",
        title=data.title,
        caption=data.caption,
        legend=legend,
        headline=_headline(rows),
        policies=_side_by_side(figures_of(rows), rows, legend=legend),
        charts=charts(data.results),
        video=_embedded(data.video),
        environment=_environment_lines(data.environment),
        sections=data.sections,
    )


def _side_by_side(
    figures: Sequence[Figure],
    rows: Sequence[Mapping[str, Any]],
    title: str = "",
    note: str = "",
    legend: Sequence[LegendEntry] | None = None,
) -> Sheet:
    """The figures as a table: a column for each policy, and one for the change where there is any."""
    headings = [f"{record['policy']} routed" if record.get("promise") else str(record["policy"]) for record in rows]
    columns = [Column.number(heading) for heading in headings]
    if legend is not None:
        columns = [replace(column, legend=entry) for column, entry in zip(columns, legend, strict=True)]
    with_change = any(figure.change for figure in figures)
    lines: list[Sequence[Any]] = []
    for group in dict.fromkeys(figure.group for figure in figures):
        lines.append((group,))
        for figure in figures:
            if figure.group == group:
                tone = {True: "good", False: "bad", None: "even"}[figure.better]
                change = [Cell(figure.change, tone)] if with_change else []
                lines.append((figure.label, *figure.values[:-1], Cell(figure.values[-1], "last"), *change))
    return Sheet(title, [Column(""), *columns, *([Column.number("change")] if with_change else [])], lines, note)


def _quality_figures(rows: Sequence[Mapping[str, Any]], reference: str) -> Iterator[Figure]:
    """One line per metric against one reference."""
    by_policy: list[Mapping[str, Any]] = [
        next((q for q in r.get("quality_against", ()) if q["against"] == reference), {}) for r in rows
    ]
    # Nobody is surprised that the whole generator equals itself: its values are no standard to be compared with.
    itself = reference == "whole generator"
    for name, metric in METRICS.items():
        values = [quality.get(name) for quality in by_policy]
        if all(value is None for value in values):
            continue
        label = with_unit(metric.title, metric)
        arrow = "↑" if metric.higher_is_better else "↓"
        worded = tuple(
            "–" if value is None else "itself" if itself and _is_whole(r) else f"{value:.{metric.digits}f}"
            for r, value in zip(rows, values, strict=True)
        )
        change, better = "", None
        if len(values) == 2 and not itself and values[0] is not None and values[1] is not None:
            difference = values[1] - values[0]
            change = f"{difference:+.{metric.digits}f}"
            better = None if float(change) == 0 else (difference > 0) == metric.higher_is_better
        yield Figure(f"against the {reference}", f"{label} {arrow}", worded, change, better)


def _is_whole(record: Mapping[str, Any]) -> bool:
    """Whether a policy's answers are the whole generator's own."""
    return record["policy"] == "full" and not record.get("promise")


def _latency_figure(label: str, values: Sequence[float]) -> Figure:
    """A line whose change is a factor, above 1 where the last policy is quicker."""
    worded = tuple(f"{value:.2f}" for value in values)
    if len(values) != 2 or min(values) <= 0:
        return Figure("latency", label, worded)
    factor = values[0] / values[1]
    better = None if f"{factor:.2f}" == "1.00" else factor > 1
    return Figure("latency", label, worded, _factor(factor), better)


def _factor(value: float) -> str:
    return f"{value:.{2 if value < 2 else 1}f}×"


def _headline(rows: Sequence[Mapping[str, Any]]) -> list[Tile]:
    """The few figures to see first: of the last policy, beside the first."""
    first, last = rows[0], rows[-1]
    latency, base = last["latency_ms"], first["latency_ms"]
    beside = f"{base['p50']:.2f} ms for the {policy_title(first['policy']).lower()}" if len(rows) > 1 else ""
    tiles = [Tile("Latency, p50", f"{latency['p50']:.2f}", "ms", beside)]
    if len(rows) > 1 and latency["p50"] > 0:
        factor = _factor(base["p50"] / latency["p50"])
        tiles.append(Tile("Quicker by", factor.removesuffix("×"), "×", "at the median"))
    tail = f"p99 ÷ p50 = {latency['p99'] / latency['p50']:.2f}" if latency["p50"] > 0 else ""
    tiles.append(Tile("Latency, p99", f"{latency['p99']:.2f}", "ms", tail))
    tiles.append(Tile("Age of the cache", f"{last['age']['mean']:.2f}", "frames", f"at most {last['age']['max']}"))
    quality = last["quality"] or {}
    for metric in (METRICS[name] for name in ("psnr_db", "ssim", "flip") if name in quality):
        value = f"{quality[metric.name]:.{metric.digits}f}"
        tiles.append(Tile(metric.title, value, metric.unit, f"against the {quality['against']}"))
    return tiles


def _embedded(video: Path | None) -> str | None:
    """The video as base64."""
    if video is None:
        return None
    try:
        return base64.b64encode(Path(video).read_bytes()).decode("ascii")
    except OSError as error:
        raise InputError(
            f"the report's video {str(video)!r} cannot be read ({error.strerror}); write it first"
        ) from error


def _environment_lines(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for key, value in values.items():
        if key == "gpus":
            lines.extend((name, f"{gpu['name']} ({gpu['architecture']})") for name, gpu in value.items())
        elif key in ("driver", "cuda"):
            lines.append(({"driver": "NVIDIA driver", "cuda": "CUDA"}[key], str(value or "unknown")))
        elif isinstance(value, Mapping):
            lines.extend((str(name), str(version)) for name, version in value.items())
        elif key == "usable_cores":
            continue
        elif key == "cores" and values.get("usable_cores") not in (None, value):
            lines.append(("cores", f"{values['usable_cores']} of {value}"))
        else:
            lines.append((key if key not in ("cpu", "os") else key.upper(), str(value)))
    return lines

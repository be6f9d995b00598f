"""What was measured, for people and for programs: a page, a table, JSON.

One `PolicyResult` holds what a policy gave on a stream; `row` turns it into the JSON record that everything else is
made from, so that the page, the table and the file cannot disagree.
"""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.errors import InputError
from ..engine.metrics.images import METRICS
from .records import SCHEMA, environment, write_json
from .results import PolicyResult, ReportData
from .routed import routed_lines

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

# On a pipe there is no terminal to ask for its width; a table broken at 80 columns is hard to read and to search.
_PIPE_WIDTH = 120


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
    # No factor here: under a paced policy it is the app that says how many frames come.
    found.append(Figure("throughput", "frames per second", tuple(f"{r['fps']:.1f}" for r in rows)))
    found.append(Figure("throughput", "frames answered", tuple(str(r["frames"]) for r in rows)))
    found.append(Figure("age of the cache in frames", "mean", tuple(f"{r['age']['mean']:.2f}" for r in rows)))
    found.append(Figure("age of the cache in frames", "max", tuple(str(r["age"]["max"]) for r in rows)))
    if any(r.get("device") for r in rows):
        found.append(Figure("where it ran", "device", tuple(r.get("device") or "–" for r in rows)))
        found.append(Figure("where it ran", "backend", tuple(r.get("backend") or "–" for r in rows)))
    if any(r.get("device") not in (None, "cpu") for r in rows):
        found.append(Figure("where it ran", "CUDA graphs", tuple(str(r.get("graphs", "–")) for r in rows)))
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
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    out = console or Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)
    table = Table(
        title=escape(title) or None, caption=escape(caption) or None, box=box.SIMPLE_HEAD, title_justify="left"
    )
    table.title_style, table.caption_style, table.caption_justify = "bold", "dim", "left"
    table.add_column("")
    for r in rows:
        table.add_column(escape(_column_title(r)), justify="right")
    figures = figures_of(rows)
    with_change = any(figure.change for figure in figures)
    if with_change:
        table.add_column("change", justify="right")
    for group, members in _grouped(figures):
        table.add_row(f"[bold]{escape(group)}[/bold]")
        for figure in members:
            style = {True: "green", False: "yellow", None: ""}[figure.better]
            change = [f"[{style}]{figure.change}[/{style}]" if style else figure.change] if with_change else []
            table.add_row(f"  {figure.label}", *figure.values, *change)
    out.print(table)


def write_report(path: str | os.PathLike[str], data: ReportData) -> None:
    """Write a page that stands alone: video, charts and style are inside, nothing is loaded from anywhere.

    Args:
        path: The ``.html`` file.
        data: What to show.

    Raises:
        InputError: If there is nothing to show, the video is missing, or the file cannot be written.
    """
    from .page import write_page
    from .policy_charts import charts, series

    if not data.results:
        raise InputError("a report needs at least one policy's result")
    rows = [row(result) for result in data.results]
    figures = figures_of(rows)
    write_page(
        path,
        "report.html",
        title=data.title,
        caption=data.caption,
        policies=[
            {
                "code": _column_title(record),
                "title": policy_title(result.policy) + (", routed" if result.routed is not None else ""),
                "series": number,
            }
            for number, result, record in zip(series(data.results), data.results, rows, strict=True)
        ],
        headline=_headline(rows),
        groups=list(_grouped(figures)),
        with_change=any(figure.change for figure in figures),
        charts=charts(data.results),
        video=_embedded(data.video),
        environment=_environment_lines(data.environment),
        sections=data.sections,
    )


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
        label = f"{metric.title}{' ' + metric.unit if metric.unit else ''}"
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


def _column_title(record: Mapping[str, Any]) -> str:
    """A policy's heading: as people write it, and whether it was routed."""
    return f"{record['policy']} routed" if record.get("promise") else str(record["policy"])


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


def _grouped(figures: Sequence[Figure]) -> Iterator[tuple[str, list[Figure]]]:
    for group in dict.fromkeys(figure.group for figure in figures):
        yield group, [figure for figure in figures if figure.group == group]


def _headline(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The few figures to see first: of the last policy, beside the first."""
    first, last = rows[0], rows[-1]
    latency, base = last["latency_ms"], first["latency_ms"]
    tiles = [
        {
            "label": "Latency, p50",
            "value": f"{latency['p50']:.2f}",
            "unit": "ms",
            "note": f"{base['p50']:.2f} ms for the {policy_title(first['policy']).lower()}" if len(rows) > 1 else "",
        }
    ]
    if len(rows) > 1 and latency["p50"] > 0:
        factor = _factor(base["p50"] / latency["p50"])
        tiles.append(
            {
                "label": "Quicker by",
                "value": factor.removesuffix("×"),
                "unit": "×",
                "note": "at the median",
            }
        )
    tail = f"p99 ÷ p50 = {latency['p99'] / latency['p50']:.2f}" if latency["p50"] > 0 else ""
    tiles.append({"label": "Latency, p99", "value": f"{latency['p99']:.2f}", "unit": "ms", "note": tail})
    tiles.append(
        {
            "label": "Age of the cache",
            "value": f"{last['age']['mean']:.2f}",
            "unit": "frames",
            "note": f"at most {last['age']['max']}",
        }
    )
    quality = last["quality"]
    for name in ("psnr_db", "ssim", "flip"):
        if quality is not None and name in quality:
            metric = METRICS[name]
            tiles.append(
                {
                    "label": metric.title,
                    "value": f"{quality[name]:.{metric.digits}f}",
                    "unit": metric.unit,
                    "note": f"against the {quality['against']}",
                }
            )
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

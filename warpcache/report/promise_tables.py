"""What a bundle promises, as tables and sentences: its rule, its exits, and what each threshold saves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..engine.errors import InputError
from ..engine.metrics.images import METRICS
from .pareto import Point, by_age
from .tables import Sheet

if TYPE_CHECKING:
    from ..engine.bundle.manifest import Manifest
    from ..engine.promise.calibration import Calibration, PromiseRecord

__all__ = ["count_text", "quality_sheet", "rule_sentences", "thresholds_sheet"]


def count_text(count: float) -> str:
    """A count of operations, short: ``1.24 G``."""
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f}"


CONFIDENCE = 0.95
"""The confidence that a bundle's page speaks of: what is asked for unless one says otherwise."""


def rule_sentences(record: PromiseRecord, calibration: Calibration) -> list[str]:
    """How the promise was made, on what and when, what the best is that it reaches, and how far the predictor is off.

    Args:
        record: What is promised.
        calibration: What it is promised from.
    """
    title = METRICS[record.metric].title
    ages = ", ".join(map(str, record.ages))
    sentences = [
        f"Quality promise in {title} by {record.method}: {record.samples} samples of {record.frames} frames that "
        f"training did not see, caches {ages} frames old{' and none' if record.cold_exits else ''}, made {record.at}."
    ]
    try:
        unit = f" {METRICS[record.metric].unit}".rstrip()
        best = f"{calibration.best(CONFIDENCE):.4g}{unit}"
        sentences.append(
            f"The strictest threshold that can be promised for {CONFIDENCE:.0%} of the frames is {title} {best}."
        )
    except InputError as exc:
        sentences.append(f"At confidence {CONFIDENCE:g}: {exc}.")
    if record.errors:
        # One unit of a score is a factor e of the distance (of the mean squared error, for PSNR).
        factors = ", ".join(f"{name} {math.exp(error):.2f}" for name, error in record.errors.items())
        distance = {"psnr_db": "the mean squared error", "ms_ssim": "1 - MS-SSIM"}.get(record.metric, title)
        sentences.append(f"The predictor misses {distance} by a factor of (median): {factors}.")
    return sentences


def quality_sheet(record: PromiseRecord, manifest: Manifest, points: Sequence[Point]) -> Sheet:
    """Every exit's cost and its quality by age; dominated exits are marked.

    Args:
        record: What is promised.
        manifest: The bundle's.
        points: From `points_of`.
    """
    metric = METRICS[record.metric]
    ages = by_age(points)
    known = {(point.exit, point.age): point for point in points}
    columns = ["no cache" if age == 0 else f"age {age}" for age in ages]

    def quality(name: str, age: int) -> str:
        point = known.get((name, age))
        if point is None:
            return "-"
        if point.value is None or name == "whole":
            return "exact  "
        mark = " d" if point.dominated else "  "
        return f"{point.value:.{metric.digits}f} ({point.worst:.{metric.digits}f}){mark}"

    rows = [
        (exit_record.name, f"{exit_record.cost_ratio:.1%}", *(quality(exit_record.name, age) for age in ages))
        for exit_record in sorted(manifest.exits, key=lambda exit_record: exit_record.cost_ratio)
        if exit_record.name != "plain"
    ]
    unit = f", {metric.unit}" if metric.unit else ""
    return Sheet(
        f"Exits by cost and by {metric.title}{unit} against the whole generator",
        ("exit", "time", *columns),
        rows,
        frozenset(["time", *columns]),
        "Time is of the whole generator's. Quality: the median over the frames (what all but 5 % of them keep), by age "
        "of the cache; d: dominated, another exit is as cheap and better. Beside these, plain answers from a cache of "
        "the frame itself, exactly.",
    )


def thresholds_sheet(record: PromiseRecord) -> Sheet | None:
    """What every threshold of the promise came to on the calibration's frames, by age; None where none was tried."""
    if not record.thresholds:
        return None
    metric = METRICS[record.metric]
    answering = {name for entry in record.thresholds for name in entry["shares"]}
    exits = [name for name in (*record.exits, "plain", "whole") if name in answering]
    rows = []
    last = None
    for entry in sorted(record.thresholds, key=lambda e: (e["threshold"], e["confidence"], e["age"])):
        asked = (entry["threshold"], entry["confidence"])
        bound = ">=" if metric.higher_is_better else "<="
        unit = f" {metric.unit}" if metric.unit else ""
        rows.append(
            (
                f"{bound} {entry['threshold']:g}{unit}" if asked != last else "",
                f"{entry['confidence']:.4g}" if asked != last else "",
                "none" if entry["age"] == 0 else str(entry["age"]),
                f"{entry['coverage']:.1%}",
                f"{entry['saved']:.1%}",
                *(f"{entry['shares'][name]:.1%}" if name in entry["shares"] else "-" for name in exits),
            )
        )
        last = asked
    numeric = ["cache's age", "within", "saved", *exits]
    return Sheet(
        "What each threshold gives",
        (metric.title, "confidence", *numeric),
        rows,
        frozenset(numeric),
        "On each half of the calibration's frames, with margins from the other. Within: frames that kept the "
        "threshold. Saved: of the whole generator's time, the exits' own alone; the predictor's comes to it. Then the "
        "share of the frames that each exit answered.",
    )

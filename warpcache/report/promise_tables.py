"""What a bundle promises, as tables and sentences: its rule, its exits, and what each threshold saves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..engine.bundle.roles import Role
from ..engine.errors import InputError
from ..engine.metrics.images import METRICS
from .pareto import Point, by_age, points_of
from .tables import Column, Sheet
from .words import with_unit

if TYPE_CHECKING:
    from ..engine.bundle.bundle import Bundle
    from ..engine.bundle.manifest import Manifest
    from ..engine.promise.calibration import Calibration, PromiseRecord

__all__ = ["Promise", "quality_sheet", "rule_sentences", "thresholds_sheet"]


CONFIDENCE = 0.95
"""The confidence that a bundle's page speaks of: what is asked for unless one says otherwise."""


@dataclass(frozen=True)
class Promise:
    """What a bundle promises, to be printed or put on a page.

    Attributes:
        record: The promise.
        sentences: Its rule.
        points: Its exits by cost and quality.
        sheets: The exits, and what the thresholds give where some were tried.
    """

    record: PromiseRecord
    sentences: Sequence[str]
    points: Sequence[Point]
    sheets: Sequence[Sheet]

    @classmethod
    def of(cls, bundle: Bundle) -> Promise | None:
        """What `bundle` promises; None where it promises nothing.

        Raises:
            BundleError: If the promise's record or its calibration is malformed.
        """
        from ..engine.promise.calibration import Calibration, PromiseRecord

        record = PromiseRecord.of(bundle.manifest)
        if record is None:
            return None
        calibration = Calibration.read(bundle)
        points = points_of(calibration, bundle.manifest)
        sheets, thresholds = [quality_sheet(record, bundle.manifest, points)], thresholds_sheet(record)
        if thresholds is not None:
            sheets.append(thresholds)
        return cls(record, rule_sentences(record, calibration), points, sheets)


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
        best = with_unit(f"{calibration.best(CONFIDENCE):.4g}", METRICS[record.metric])
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
    known = {(point.exit, point.age): point for point in points}

    def quality(point: Point) -> str:
        if point.value is None or point.exact:
            return "exact  "
        mark = " d" if point.dominated else "  "
        return f"{point.value:.{metric.digits}f} ({point.worst:.{metric.digits}f}){mark}"

    ages = by_age(points)
    return Sheet(
        f"Exits by cost and by {with_unit(metric.title, metric, ', ')} against the whole generator",
        [
            Column("exit"),
            Column.number("time", ".1%"),
            *(Column.number("no cache" if age == 0 else f"age {age}", quality) for age in ages),
        ],
        [
            (exit_record.name, exit_record.cost_ratio, *(known.get((exit_record.name, age)) for age in ages))
            for exit_record in sorted(manifest.exits, key=lambda exit_record: exit_record.cost_ratio)
            if manifest.role_of(exit_record.name) is not Role.PLAIN
        ],
        "Time is of the whole generator's. Quality: the median over the frames (what all but 5 % of them keep), by age "
        "of the cache; d: dominated, another exit is as cheap and better. Beside these, plain answers from a cache of "
        "the frame itself, exactly.",
    )


def thresholds_sheet(record: PromiseRecord) -> Sheet | None:
    """What every threshold of the promise came to on the calibration's frames, by age; None where none was tried."""
    if not record.thresholds:
        return None
    metric = METRICS[record.metric]
    bound = ">=" if metric.higher_is_better else "<="
    answering = {name for entry in record.thresholds for name in entry["shares"]}
    exits = [*(name for name in record.exits if name in answering), *sorted(answering - set(record.exits))]
    rows = []
    last = None
    for entry in sorted(record.thresholds, key=lambda e: (e["threshold"], e["confidence"], e["age"])):
        asked = (with_unit(f"{bound} {entry['threshold']:g}", metric), f"{entry['confidence']:.4g}")
        known = (entry["age"] or "none", entry["coverage"], entry["saved"])
        rows.append((*(asked if asked != last else ("", "")), *known, *(entry["shares"].get(name) for name in exits)))
        last = asked
    shares = [Column.number(name, ".1%") for name in ("within", "saved", *exits)]
    return Sheet(
        "What each threshold gives",
        [Column(metric.title), Column("confidence"), Column.number("cache's age"), *shares],
        rows,
        "On each half of the calibration's frames, with margins from the other. Within: frames that kept the "
        "threshold. Saved: of the whole generator's time, the exits' own alone; the predictor's comes to it. Then the "
        "share of the frames that each exit answered.",
    )

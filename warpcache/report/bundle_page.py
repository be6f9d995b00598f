"""A page about a bundle: what it promises, its Pareto front, and what is in it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..engine.metrics.images import METRICS
from .page import Section, Tile, write_page
from .pareto import age_words
from .promise_tables import Promise
from .tables import LegendEntry, Sheet
from .words import NO_PROMISE, created_text, size_text, with_unit

if TYPE_CHECKING:
    from ..engine.bundle.bundle import Bundle
    from ..engine.promise.calibration import PromiseRecord

__all__ = ["promise_section", "write_bundle_report"]


def promise_section(bundle: Bundle) -> Section | None:
    """What a bundle promises, for a page; None where it promises nothing.

    Raises:
        BundleError: If the promise's record or its calibration is malformed.
    """
    from .promise_charts import promise_charts, shown_ages

    promise = Promise.of(bundle)
    if promise is None:
        return None
    return Section(
        "What it promises",
        promise.sentences,
        [LegendEntry(number, age_words(age)) for age, number in shown_ages(promise.points).items()],
        promise_charts(promise.record, promise.points),
        promise.sheets,
    )


def write_bundle_report(path: str | os.PathLike[str], bundle: Bundle, sheets: Sequence[Sheet]) -> None:
    """Write a page about a bundle that stands alone, as that of the demo does.

    Args:
        path: The ``.html`` file.
        bundle: An opened bundle.
        sheets: What is in it, from `sheets_of`.

    Raises:
        BundleError: If the promise's record or its calibration is malformed.
        InputError: If the file cannot be written.
    """
    from ..engine.promise.calibration import PromiseRecord

    section = promise_section(bundle)
    if section is None:
        section = Section("What it promises", [f"This bundle makes {NO_PROMISE}."])
    write_page(
        Path(path),
        "bundle.html",
        title=bundle.manifest.name,
        caption=created_text(bundle.manifest),
        headline=_headline(bundle, PromiseRecord.of(bundle.manifest)),
        sections=[section],
        sheets=sheets,
    )


def _headline(bundle: Bundle, record: PromiseRecord | None) -> list[Tile]:
    """The few figures to see first."""
    manifest = bundle.manifest
    size, _, unit = size_text(sum(file.size_bytes for file in manifest.files.values())).partition(" ")
    cheapest = min(manifest.exits, key=lambda exit_record: exit_record.cost_ratio)
    cost, note = f"{cheapest.cost_ratio * 100:.1f}", f"of the whole generator's time: {cheapest.name}"
    tiles = [
        Tile("Exits", str(len(manifest.exits)), note="ways to answer a frame"),
        Tile("Cheapest exit", cost, "%", note),
    ]
    if record is not None:
        metric = METRICS[record.metric]
        bound = "at least" if metric.higher_is_better else "at most"
        asked = [entry for entry in record.thresholds if entry["age"] == min(record.ages, default=0)]
        # The strictest threshold at which anything is saved, and the loosest: the range that is on offer.
        saving = sorted((entry for entry in asked if entry["saved"] > 0), key=lambda entry: float(entry["threshold"]))
        for entry in (saving[:1] + saving[1:][-1:])[:: -1 if metric.higher_is_better else 1]:
            label = with_unit(f"Saved at {metric.title} {bound} {entry['threshold']:g}", metric)
            note = f"{age_words(entry['age'])}, promised for {entry['confidence'] * 100:.4g} % of the frames"
            tiles.append(Tile(label, f"{entry['saved'] * 100:.0f}", "%", note))
        tiles.append(Tile("Calibrated on", str(record.frames), "frames", "held back"))
    return [*tiles, Tile("Size", size, unit, "on disk")]

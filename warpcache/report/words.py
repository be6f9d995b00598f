"""Words and widths that tables and pages share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..engine.bundle.manifest import Manifest
    from ..engine.metrics.images import Metric

__all__ = ["NO_PROMISE", "PIPE_WIDTH", "count_text", "created_text", "size_text", "with_unit"]

NO_PROMISE = "no quality promise; compile with --exits"

# On a pipe there is no terminal to ask for its width; a table broken at 80 columns is hard to read and to search.
PIPE_WIDTH = 120


def created_text(manifest: Manifest) -> str:
    """A bundle's size and frame rate, and by what and when it was made."""
    created = ", ".join(str(manifest.created[key]) for key in ("by", "at") if key in manifest.created)
    fps = f", {manifest.fps:g} frames per second" if manifest.fps is not None else ""
    total = sum(record.size_bytes for record in manifest.files.values())
    return f"{size_text(total)}{fps} ({created})"


def size_text(size_bytes: float) -> str:
    """A size in bytes, short: 1 MB is 1,000,000 bytes."""
    return _scaled(size_bytes, {"GB": 1e9, "MB": 1e6, "kB": 1e3}) or f"{size_bytes:.0f} B"


def count_text(count: float) -> str:
    """A count of operations, short: ``1.24 G``."""
    return _scaled(count, {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}) or f"{count:.0f}"


def _scaled(value: float, units: dict[str, float]) -> str:
    """The value in the first unit that is not greater; empty where it is below all."""
    return next((f"{value / scale:.3g} {unit}" for unit, scale in units.items() if value >= scale), "")


def with_unit(text: str, metric: Metric, before: str = " ") -> str:
    """A text and a metric's unit, with `before` between the two; the text alone where the metric has none."""
    return f"{text}{before}{metric.unit}" if metric.unit else text

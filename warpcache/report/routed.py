"""What a routed policy did: which exits answered, what was predicted, and whether the quality asked for was kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.metrics.images import METRICS
from .words import with_unit

if TYPE_CHECKING:
    from ..engine.promise.calibration import Quality
    from ..engine.session.frame import Frame
    from ..engine.telemetry import LatencySummary, SessionStatistics

__all__ = ["Routed", "Within", "routed_lines", "within_of"]

DROPPED = "dropped"
COUNTED = (
    "late",
    "non_finite",
    "audits",
    "audit_misses",
    "audit_failures",
    "drifts",
    "scene_cuts",
    "tightening",
    "predictor_failures",
)
"""What of a session's statistics is told as it is."""


@dataclass(frozen=True)
class Within:
    """How many frames kept a threshold, measured against the whole generator's answer.

    Attributes:
        quality: The threshold.
        kept: Frames that kept it.
        frames: Frames that were measured.
    """

    quality: Quality
    kept: int
    frames: int

    def to_record(self) -> dict[str, Any]:
        """JSON-ready: ``{"metric", "threshold", "kept", "frames", "share"}``."""
        return {
            "metric": self.quality.metric,
            "threshold": self.quality.threshold,
            "kept": self.kept,
            "frames": self.frames,
            "share": self.kept / self.frames,
        }


@dataclass(frozen=True)
class Routed:
    """What a session with a quality to keep did.

    Attributes:
        quality: The quality that was asked for.
        deadline_ms: Milliseconds that an answer was given; None sets no limit.
        audit_every: Every how many frames the whole generator answered too; 0 never.
        predicted: What the predictor expected of the answers that are not exact, in the metric's unit.
        degraded: Frames that a deadline cost their quality, by how.
        statistics: The session's.
    """

    quality: Quality
    deadline_ms: float | None
    audit_every: int
    predicted: tuple[float, ...]
    degraded: Mapping[str, int]
    statistics: SessionStatistics

    @classmethod
    def of(
        cls,
        quality: Quality,
        frames: Sequence[Frame],
        statistics: SessionStatistics,
        *,
        deadline_ms: float | None,
        audit_every: int,
    ) -> Routed:
        """Sum up a session.

        Args:
            quality: What it was asked for.
            frames: What it answered.
            statistics: What it counted, once its audits have ended.
            deadline_ms: Milliseconds that an answer was given.
            audit_every: Every how many frames was audited.
        """
        degraded: Counter[str] = Counter(frame.degraded for frame in frames if frame.degraded is not None)
        # A dropped frame is no answer; only the session knows of it.
        dropped = statistics.degraded - degraded.total()
        if dropped > 0:
            degraded[DROPPED] += dropped
        predicted = tuple(frame.predicted for frame in frames if frame.predicted is not None)
        return cls(quality, deadline_ms, audit_every, predicted, dict(degraded), statistics)

    def to_record(self) -> dict[str, Any]:
        """JSON-ready; times in ms, the router's in microseconds, the tightening in spreads of the predictor."""
        quality, seen = self.quality, self.statistics
        return {
            "metric": quality.metric,
            "threshold": quality.threshold,
            "confidence": quality.confidence,
            "deadline_ms": self.deadline_ms,
            "audit_every": self.audit_every,
            "predicted_mean": float(np.mean(self.predicted)) if self.predicted else None,
            "degraded": dict(self.degraded),
            **{name: getattr(seen, name) for name in COUNTED},
            "predictor_ms": _summary(seen.predictor, 1.0),
            "router_us": _summary(seen.router, 1e3),
        }


def within_of(quality: Quality, values: Sequence[float]) -> Within:
    """Count the frames whose metric keeps the threshold.

    Args:
        quality: The threshold.
        values: The metric of every measured frame, at least one.
    """
    measured = np.asarray(values, np.float64)
    higher = METRICS[quality.metric].higher_is_better
    kept = measured >= quality.threshold if higher else measured <= quality.threshold
    return Within(quality, int(kept.sum()), measured.size)


def routed_lines(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, tuple[str, ...]]]:
    """The lines of a table that say what routing did: group, label, one text a row; empty where nothing was routed.

    Args:
        rows: Records of policies side by side, some of them with a key ``promise``.
    """
    promises = [row.get("promise") for row in rows]
    asked = next((promise for promise in promises if promise is not None), None)
    if asked is None:
        return []
    metric = METRICS[asked["metric"]]
    sign = ">=" if metric.higher_is_better else "<="
    threshold = with_unit(f"{metric.title} {sign} {asked['threshold']:g}", metric)
    group = "quality promise"

    def line(label: str, worded: Any) -> tuple[str, str, tuple[str, ...]]:
        return group, label, tuple("–" if promise is None else worded(promise) for promise in promises)

    lines = [_answered_by(name, rows) for name in dict.fromkeys(name for row in rows for name in row["routes"])]
    lines.append(line(f"{threshold}, promised", lambda p: f"{p['confidence'] * 100:.4g}%"))
    if any(row.get("within") for row in rows):
        shares = tuple(f"{row['within']['share']:.1%}" if row.get("within") else "–" for row in rows)
        lines.append((group, f"{threshold}, measured", shares))
    lines += [
        line(f"predicted {metric.title}, mean", lambda p: _optional(p["predicted_mean"], metric.digits)),
        line("deadline, ms", lambda p: "none" if p["deadline_ms"] is None else f"{p['deadline_ms']:g}"),
        line("degraded frames", lambda p: _counts(p["degraded"])),
        line("late frames", lambda p: str(p["late"])),
        line("NaN replaced", lambda p: str(p["non_finite"])),
        line("audits, misses", lambda p: f"{p['audits']}, {p['audit_misses']}"),
        line("drifts noticed", lambda p: str(p["drifts"])),
        line("margin tightened by, spreads", lambda p: f"{p['tightening']:.2f}"),
        line("scene cuts", lambda p: str(p["scene_cuts"])),
        line("predictor p50, ms", lambda p: f"{p['predictor_ms']['p50']:.2f}"),
        line("router p50, µs", lambda p: f"{p['router_us']['p50']:.0f}"),
    ]
    # What does not happen in a good run is told only when it did.
    for key, label in (("predictor_failures", "predictions that failed"), ("audit_failures", "audits that failed")):
        if any(promise is not None and promise[key] for promise in promises):
            lines.append((group, label, tuple("–" if p is None else str(p[key]) for p in promises)))
    return lines


def _answered_by(name: str, rows: Sequence[Mapping[str, Any]]) -> tuple[str, str, tuple[str, ...]]:
    shares = tuple(f"{row['routes'][name] / row['frames']:.1%}" if name in row["routes"] else "–" for row in rows)
    return "answered by", name, shares


def _optional(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _counts(degraded: Mapping[str, int]) -> str:
    if not degraded:
        return "0"
    return ", ".join(f"{count} {how}" for how, count in sorted(degraded.items()))


def _summary(summary: LatencySummary, scale: float) -> dict[str, float]:
    return {"p50": summary.p50 * scale, "p99": summary.p99 * scale, "max": summary.max * scale}

"""What a user asked of every frame's quality, as the command line takes it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..engine.errors import InputError
from .options import RATE, one_line, option

if TYPE_CHECKING:
    from ..engine.bundle.bundle import Bundle
    from ..engine.promise.calibration import Quality

__all__ = ["QualityChoice", "QualityOptions"]


@dataclass(frozen=True)
class QualityChoice:
    """A quality to keep, by when, and how often to look; the engine checks it against the bundle.

    Attributes:
        quality: Metric, threshold and confidence.
        deadline_ms: Milliseconds from a frame's arrival that its answer may take; None sets no limit.
        audit_every: The whole generator answers every M-th frame in the background too, to compare; 0 never does.
    """

    quality: Quality
    deadline_ms: float | None = None
    audit_every: int = 30

    def __str__(self) -> str:
        """As people read it: ``LPIPS at most 0.1 on 95 % of the frames``."""
        from ..engine.metrics.images import METRICS

        metric = METRICS[self.quality.metric]
        bound = "at least" if metric.higher_is_better else "at most"
        unit = f" {metric.unit}" if metric.unit else ""
        share = self.quality.confidence * 100
        return f"{metric.title} {bound} {self.quality.threshold:g}{unit} on {share:.4g} % of the frames"

    def for_engine(self, lpips: Path | None) -> dict[str, Any]:
        """The keywords of `Engine` that say the same.

        Args:
            lpips: Weights of LPIPS, which audits compare with where that is the metric.
        """
        return {
            "quality": self.quality,
            "deadline_ms": self.deadline_ms,
            "audit_every": self.audit_every,
            "lpips": lpips,
        }

    def check(self, bundle: Bundle) -> None:
        """Refuse what the bundle cannot promise, before its inputs are read.

        Raises:
            InputError: If it promises nothing, not in this metric, or not so much.
            BundleError: If its calibration is malformed.
        """
        from ..engine.promise.calibration import Calibration

        Calibration.read(bundle).rule(self.quality)

    def require_lpips(self, lpips: Path | None, *, measuring: bool) -> None:
        """Refuse a quality that nobody here could look at, before any work is done.

        Args:
            lpips: Weights of LPIPS, or None.
            measuring: Whether the command measures the quality itself, besides the audits.

        Raises:
            InputError: If the metric is LPIPS and its weights are needed and not given.
        """
        if self.quality.metric != "lpips" or lpips is not None or (self.audit_every == 0 and not measuring):
            return
        way_out = "" if measuring else ", or leave audits out with --audit-every 0"
        raise InputError(
            "the quality is to be kept in LPIPS, whose weights were not given; "
            f"name them by --lpips PATH or WARPCACHE_LPIPS{way_out}"
        )


@dataclass(frozen=True)
class QualityOptions:
    """The options that ask for a quality; together they are a `QualityChoice`, or None."""

    quality: str | None = option(
        "--quality",
        "Answer every frame with the cheapest exit that keeps this quality, e.g. lpips=0.1; the metric is "
        "the one that the bundle was compiled with --exits for: lpips, flip, psnr or ms-ssim.",
        default=None,
        metavar="METRIC=VALUE",
    )
    confidence: float | None = option(
        "--confidence",
        "With --quality: share of the frames that keep it; default: 0.95.",
        default=None,
        metavar="SHARE",
    )
    deadline_ms: float | None = option(
        "--deadline-ms",
        "With --quality: milliseconds that an answer may take; where no exit that keeps the quality is "
        "quick enough, the frame is answered worse, or dropped, and counted.",
        default=None,
        type=RATE,
        metavar="MS",
    )
    audit_every: int | None = option(
        "--audit-every",
        "With --quality: the whole generator answers every M-th frame in the background too, to compare; 0 "
        "never; default: 30.",
        default=None,
        type=click.IntRange(min=0),
        metavar="M",
    )

    def settled(self) -> QualityChoice | None:
        """The quality that was asked for.

        Raises:
            click.UsageError: If options of a quality are given without one, its metric is unknown, or its threshold or
                confidence is out of its range.
        """
        from ..engine.promise.calibration import Quality

        given = {name: value for name, value in vars(self).items() if value is not None}
        if self.quality is None:
            for name in given:
                flag = f"--{name.replace('_', '-')}"
                raise click.UsageError(f"{flag} goes with a quality to keep; name one by --quality, e.g. lpips=0.1")
            return None
        del given["quality"]
        hint = "--quality"
        try:
            asked = Quality.parse(self.quality)
            if self.confidence is not None:
                hint = "--confidence"
                asked = replace(asked, confidence=given.pop("confidence"))
        except InputError as exc:
            raise click.BadParameter(one_line(str(exc)), param_hint=hint) from exc
        return QualityChoice(asked, **given)

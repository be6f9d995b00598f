"""What was measured under one policy, and what a page about a run says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .records import environment

if TYPE_CHECKING:
    from .page import Section
    from .routed import Routed, Within

__all__ = ["PolicyResult", "ReportData"]


@dataclass(frozen=True)
class PolicyResult:
    """What one policy gave on one stream.

    Attributes:
        policy: As people write it: ``full``, ``every:4``, ``async``, ``lockstep:2``.
        latency_ms: From arrival to answer, one per answered frame.
        ages: Age of the cache of each answered frame, in frames.
        routes: The exit that answered each frame.
        fps: Frames answered per second.
        quality_against: Reference -> metric -> mean over frames; the first reference is the one that counts.
        quality_by_age: Reference -> age -> metric -> mean over the frames of that age.
        placement: Where it ran and by what, e.g. ``cuda:0/tensorrt-rtx``; empty where nobody said.
        graphs: CUDA graphs that were replayed.
        routed: What routing did; None where no quality was asked for.
        within: How many of the measured frames kept the quality that was asked for.
    """

    policy: str
    latency_ms: Sequence[float]
    ages: Sequence[int]
    routes: Sequence[str]
    fps: float
    quality_against: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    quality_by_age: Mapping[str, Mapping[int, Mapping[str, float]]] = field(default_factory=dict)
    placement: str = ""
    graphs: int = 0
    routed: Routed | None = None
    within: Within | None = None

    @property
    def is_whole(self) -> bool:
        """Whether its answers are the whole generator's own."""
        return self.policy == "full" and self.routed is None


@dataclass(frozen=True)
class ReportData:
    """What a report shows.

    Attributes:
        title: What was measured.
        caption: How it was measured.
        results: One per policy, the baseline first and the one to look at last.
        video: An ``.mp4`` to embed, both answers side by side.
        environment: Machine and versions; default: this process's.
        sections: What is shown besides, e.g. of the bundle's promise.
    """

    title: str
    caption: str
    results: Sequence[PolicyResult]
    video: Path | None = None
    environment: Mapping[str, Any] = field(default_factory=lambda: environment())
    sections: Sequence[Section] = ()

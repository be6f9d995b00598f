"""What a session counts and times: latency histogram, cache age, drops, routes, time by stage.

Recording is a few hundred nanoseconds and its memory is bounded, so that it is always on.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

__all__ = ["STAGES", "AnsweredFrame", "LatencyHistogram", "LatencySummary", "SessionStatistics", "Telemetry"]

STAGES = ("queue_wait", "consumer", "producer", "copy")
"""Stages that are timed: from a frame's arrival to the start of its exit; the exit itself; a producer, from its start
to its cache being ready; and the checking and copying of a frame's inputs."""

_COUNTERS = (
    *("dropped", "failed", "rejected", "refreshes", "late", "producer_runs", "producer_failures", "degraded"),
    *("non_finite", "audits", "audit_misses", "drifts", "scene_cuts", "predictor_failures", "audit_failures"),
)

_LOWEST_MS = 1e-3
_HIGHEST_MS = 1e6
# A value is off by half a bin at most, sqrt(1.015) - 1 = 0.75 %, below the 1 % that is promised.
_LOG_STEP = math.log(1.015)
_BINS = math.ceil(math.log(_HIGHEST_MS / _LOWEST_MS) / _LOG_STEP)


@dataclass(frozen=True)
class LatencySummary:
    """Times in milliseconds: how many, their mean, percentiles and the largest; all 0 where there are none."""

    count: int = 0
    mean: float = 0.0
    p50: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    max: float = 0.0


class LatencyHistogram:
    """Times in log-spaced bins from 1 microsecond to 1000 seconds; quantiles are off by at most 1 %.

    Args:
        keep_samples: Also keep every value, in order; that grows without bound, 8 bytes and a Python float a value.
    """

    def __init__(self, *, keep_samples: bool = False) -> None:
        self._bins = [0] * _BINS
        self._count = 0
        self._sum = 0.0
        self._min = math.inf
        self._max = 0.0
        self._samples: list[float] | None = [] if keep_samples else None

    def __len__(self) -> int:
        return self._count

    @property
    def samples(self) -> tuple[float, ...] | None:
        """Every value in milliseconds in the order recorded; None where they are not kept."""
        return None if self._samples is None else tuple(self._samples)

    def record(self, ms: float) -> None:
        """Count one time in milliseconds; times outside the range fall into the first or the last bin."""
        index = int(math.log(ms / _LOWEST_MS) / _LOG_STEP) if ms > _LOWEST_MS else 0
        self._bins[index if index < _BINS else _BINS - 1] += 1
        self._count += 1
        self._sum += ms
        if ms > self._max:
            self._max = ms
        if ms < self._min:
            self._min = ms
        if self._samples is not None:
            self._samples.append(ms)

    def quantile(self, q: float) -> float:
        """The `q`-quantile in milliseconds, interpolated between neighbours as `numpy.quantile` does; 0 if empty."""
        return self.quantiles((q,))[0]

    def quantiles(self, qs: tuple[float, ...]) -> tuple[float, ...]:
        """Several quantiles in one pass over the bins."""
        if self._count == 0:
            return (0.0,) * len(qs)
        cumulative = np.cumsum(self._bins)
        values = []
        for q in qs:
            rank = q * (self._count - 1)
            below = self._order_statistic(cumulative, math.floor(rank))
            above = self._order_statistic(cumulative, math.ceil(rank))
            values.append(below + (above - below) * (rank - math.floor(rank)))
        return tuple(values)

    def summary(self) -> LatencySummary:
        """Count, mean, percentiles and maximum; count, mean and maximum are exact."""
        if self._count == 0:
            return LatencySummary()
        p50, p95, p99 = self.quantiles((0.50, 0.95, 0.99))
        return LatencySummary(self._count, self._sum / self._count, p50, p95, p99, self._max)

    def _order_statistic(self, cumulative: np.ndarray[tuple[int, ...], np.dtype[np.int64]], rank: int) -> float:
        """The value of the given rank (0 is the smallest): the middle of its bin, kept inside what was seen."""
        if rank <= 0:
            return self._min
        if rank >= self._count - 1:
            return self._max
        index = int(np.searchsorted(cumulative, rank, side="right"))
        middle = _LOWEST_MS * math.exp((index + 0.5) * _LOG_STEP)
        return min(max(middle, self._min), self._max)


@dataclass(frozen=True)
class SessionStatistics:
    """What a session has done so far; a snapshot that does not change.

    Attributes:
        frames: Frames answered.
        dropped: Frames that a newer one replaced before they were answered.
        failed: Frames that ended in an error: their exit failed, or no cache was young enough.
        rejected: Frames refused for their inputs; they never ran.
        refreshes: Frames that waited for a new cache or for the whole generator.
        late: Frames answered after their deadline, or after the next one was due; 0 where neither is set.
        producer_runs: Caches made.
        producer_failures: Producers that failed.
        last_producer_error: The message of the last failure; None before one.
        routes: Frames answered by exit.
        age_mean: Mean cache age in frames; frames that the whole generator answered count as 0.
        age_max: Highest cache age in frames.
        latency_ms: From a frame's arrival to its answer.
        stages_ms: Time by stage, see `STAGES`.
        graphs: CUDA graphs that are replayed instead of issuing call by call; 0 on the CPU.
        degraded: Frames that a deadline cost their quality: `Frame.degraded` says how, and dropped ones count too.
        non_finite: Answers that held NaN or infinity and were replaced by another exit's.
        audits: Answers that were compared with the whole generator's; exact ones need no comparison and count too.
        audit_misses: Audited answers that were worse than the threshold.
        drifts: Times that the audits' misses became too many to be chance.
        scene_cuts: Times that a frame was of another scene, or of another subject, than those before it.
        tightening: What audits have added to the margins, in spreads: the most at any age.
        predictor_failures: Predictions that failed or were not finite; an exact exit answered.
        audit_failures: Audits that failed.
        predictor: Time from the start of a predictor to its values being on the host.
        router: Time of the router's own decision.
        behind: Frames with whose arrival the session was as far behind as it may be, because the module that carries
            the state could not keep up; the next one had to wait.
    """

    frames: int = 0
    dropped: int = 0
    failed: int = 0
    rejected: int = 0
    refreshes: int = 0
    late: int = 0
    producer_runs: int = 0
    producer_failures: int = 0
    last_producer_error: str | None = None
    routes: Mapping[str, int] = field(default_factory=dict)
    age_mean: float = 0.0
    age_max: int = 0
    latency_ms: LatencySummary = field(default_factory=LatencySummary)
    stages_ms: Mapping[str, LatencySummary] = field(default_factory=dict)
    graphs: int = 0
    degraded: int = 0
    non_finite: int = 0
    audits: int = 0
    audit_misses: int = 0
    drifts: int = 0
    scene_cuts: int = 0
    tightening: float = 0.0
    predictor_failures: int = 0
    audit_failures: int = 0
    predictor: LatencySummary = field(default_factory=LatencySummary)
    router: LatencySummary = field(default_factory=LatencySummary)
    behind: int = 0


class AnsweredFrame(NamedTuple):
    """What is counted of one answered frame; times are in milliseconds.

    Attributes:
        route: The exit that answered.
        age: Age of the cache in frames; 0 where the whole generator answered.
        refreshed: Whether it waited for a new cache or for the whole generator.
        late: Whether it came after its deadline, or after the next frame was due.
        latency_ms: From its arrival to its answer.
        wait_ms: From its arrival to the start of its exit.
        consumer_ms: What the exit took.
        degraded: Whether its deadline cost it quality.
    """

    route: str
    age: int
    refreshed: bool
    late: bool
    latency_ms: float
    wait_ms: float
    consumer_ms: float
    degraded: bool = False


class Telemetry:
    """Collects what `SessionStatistics` shows; every method may be called from any thread.

    Args:
        graphs: CUDA graphs of the session, which are there from the start.
    """

    def __init__(self, *, graphs: int = 0) -> None:
        self._graphs = graphs
        self._lock = threading.Lock()
        self._latency = LatencyHistogram()
        self._stages = {stage: LatencyHistogram() for stage in STAGES}
        self._counts: Counter[str] = Counter()
        self._routes: Counter[str] = Counter()
        self._age_sum = 0
        self._age_max = 0
        self._last_producer_error: str | None = None
        self._predictor = LatencyHistogram()
        self._router = LatencyHistogram()
        self._tightening = 0.0

    def answered(self, frame: AnsweredFrame) -> None:
        """One frame was answered."""
        with self._lock:
            self._routes[frame.route] += 1
            self._age_sum += frame.age
            self._age_max = max(self._age_max, frame.age)
            self._counts["refreshes"] += frame.refreshed
            self._counts["late"] += frame.late
            self._counts["degraded"] += frame.degraded
            self._latency.record(frame.latency_ms)
            self._stages["queue_wait"].record(frame.wait_ms)
            self._stages["consumer"].record(frame.consumer_ms)

    def dropped(self) -> None:
        """One frame was replaced by a newer one."""
        self._count("dropped")

    def dropped_for_deadline(self) -> None:
        """One frame was dropped because no exit could answer it in time."""
        with self._lock:
            self._counts["dropped"] += 1
            self._counts["degraded"] += 1

    def predicted(self, ms: float) -> None:
        """One frame's predictor has run, well or not."""
        with self._lock:
            self._predictor.record(ms)

    def routed(self, ms: float) -> None:
        """The router decided on one frame."""
        with self._lock:
            self._router.record(ms)

    def predictor_failed(self) -> int:
        """One prediction failed or was not finite; returns how many have."""
        return self._count("predictor_failures")

    def non_finite(self) -> int:
        """One answer held NaN or infinity; returns how many have."""
        return self._count("non_finite")

    def scene_cut(self) -> None:
        """One frame was of another scene than those before it."""
        self._count("scene_cuts")

    def audited(self, *, missed: bool, drifts: int, tightening: float) -> None:
        """One audit has ended.

        Args:
            missed: Whether the answer was worse than the threshold.
            drifts: How often the audits have found a drift, this one included.
            tightening: What the audits add to the margins by now, the most at any age.
        """
        with self._lock:
            self._counts["audits"] += 1
            self._counts["audit_misses"] += missed
            self._counts["drifts"] = drifts
            self._tightening = tightening

    def audit_failed(self) -> int:
        """One audit failed; returns how many have."""
        return self._count("audit_failures")

    def failed(self) -> None:
        """One frame ended in an error."""
        self._count("failed")

    def rejected(self) -> None:
        """One frame was refused for its inputs."""
        self._count("rejected")

    def copied(self, ms: float) -> None:
        """The inputs of one frame were checked and, where needed, copied."""
        with self._lock:
            self._stages["copy"].record(ms)

    def produced(self, ms: float) -> None:
        """One cache was made."""
        with self._lock:
            self._counts["producer_runs"] += 1
            self._stages["producer"].record(ms)

    def producer_failed(self, error: BaseException) -> int:
        """One producer failed; returns how many have."""
        with self._lock:
            self._counts["producer_failures"] += 1
            self._last_producer_error = f"{type(error).__name__}: {error}"
            return self._counts["producer_failures"]

    def fell_behind(self) -> int:
        """A frame arrived that the state's owner was not ready for; returns how many have."""
        with self._lock:
            self._counts["behind"] += 1
            return self._counts["behind"]

    def snapshot(self) -> SessionStatistics:
        """Everything so far."""
        with self._lock:
            frames = self._routes.total()
            return SessionStatistics(
                **{name: self._counts[name] for name in _COUNTERS},
                frames=frames,
                last_producer_error=self._last_producer_error,
                routes=dict(self._routes),
                age_mean=self._age_sum / frames if frames else 0.0,
                age_max=self._age_max,
                latency_ms=self._latency.summary(),
                stages_ms={stage: histogram.summary() for stage, histogram in self._stages.items()},
                graphs=self._graphs,
                tightening=self._tightening,
                predictor=self._predictor.summary(),
                router=self._router.summary(),
            )

    def _count(self, name: str) -> int:
        with self._lock:
            self._counts[name] += 1
            return self._counts[name]

"""Telemetry: quantiles against NumPy, bounded memory, counters."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from warpcache.engine.telemetry import STAGES, AnsweredFrame, LatencyHistogram, LatencySummary, Telemetry

# What the histogram promises. A bin is 1.5 % wide and its middle is at most sqrt(1.015) - 1 = 0.75 % off.
RELATIVE_ERROR = 0.01

latencies = st.lists(st.floats(2e-3, 9e5), min_size=1, max_size=60)


@settings(max_examples=100, deadline=None)
@given(values=latencies, q=st.floats(0, 1))
def test_quantiles_are_numpys_within_one_percent(values: list[float], q: float) -> None:
    histogram = LatencyHistogram()
    for value in values:
        histogram.record(value)
    assert histogram.quantile(q) == pytest.approx(np.quantile(values, q), rel=RELATIVE_ERROR)


def test_quantiles_of_a_long_tail() -> None:
    values = np.random.default_rng(3).lognormal(1.5, 0.8, 5000)
    histogram = LatencyHistogram()
    for value in values:
        histogram.record(float(value))
    summary = histogram.summary()
    expected = np.quantile(values, (0.5, 0.95, 0.99))
    assert (summary.p50, summary.p95, summary.p99) == pytest.approx(tuple(expected), rel=RELATIVE_ERROR)
    assert summary.count == len(histogram) == 5000
    assert summary.max == values.max()
    # Sums of 5000 doubles in another order: 5000 * 1.1e-16 relative at the very most.
    assert summary.mean == pytest.approx(values.mean(), rel=1e-12)


def test_extremes_are_kept_exactly_even_outside_the_range() -> None:
    histogram = LatencyHistogram()
    for value in (0.0, 1e-7, 5.0, 3e7):
        histogram.record(value)
    assert histogram.quantile(0) == 0.0
    assert histogram.quantile(1) == 3e7


def test_memory_is_bounded_and_samples_are_kept_on_request_only() -> None:
    plain, keeping = LatencyHistogram(), LatencyHistogram(keep_samples=True)
    bins = len(plain._bins)
    for value in range(1, 1001):
        plain.record(value)
        keeping.record(value)
    assert len(plain._bins) == bins < 2000
    assert plain.samples is None
    assert keeping.samples == tuple(range(1, 1001))


def test_empty_is_all_zeros() -> None:
    assert LatencyHistogram().summary() == LatencySummary(0, 0.0, 0.0, 0.0, 0.0, 0.0)


def test_a_snapshot_counts_what_happened_and_does_not_change() -> None:
    telemetry = Telemetry()
    before = telemetry.snapshot()
    for route, age, refreshed, late in (("plain", 0, True, False), ("warp", 1, False, True), ("warp", 5, False, False)):
        telemetry.answered(AnsweredFrame(route, age, refreshed, late, latency_ms=4.0, wait_ms=1.0, consumer_ms=3.0))
    telemetry.dropped()
    telemetry.rejected()
    telemetry.rejected()
    telemetry.failed()
    telemetry.copied(0.5)
    telemetry.produced(20.0)
    assert telemetry.producer_failed(RuntimeError("out of memory")) == 1
    assert telemetry.producer_failed(ValueError("odd")) == 2
    after = telemetry.snapshot()
    assert (before.frames, before.age_mean, before.routes) == (0, 0.0, {})
    assert (after.frames, after.dropped, after.rejected, after.failed) == (3, 1, 2, 1)
    assert (after.refreshes, after.late) == (1, 1)
    assert (after.producer_runs, after.producer_failures) == (1, 2)
    assert after.last_producer_error == "ValueError: odd"
    assert after.routes == {"plain": 1, "warp": 2}
    assert (after.age_mean, after.age_max) == (2.0, 5)
    assert tuple(after.stages_ms) == STAGES
    assert {stage: summary.count for stage, summary in after.stages_ms.items()} == {
        "queue_wait": 3,
        "consumer": 3,
        "producer": 1,
        "copy": 1,
    }
    assert after.stages_ms["producer"].max == 20.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        after.frames = 4  # type: ignore[misc]


def test_what_routing_counts_is_in_the_statistics():
    telemetry = Telemetry()
    telemetry.answered(AnsweredFrame("warp", 1, False, False, 1.0, 0.0, 1.0, degraded=True))
    telemetry.dropped_for_deadline()
    assert [telemetry.non_finite() for _ in range(3)] == [1, 2, 3]
    assert [telemetry.predictor_failed() for _ in range(2)] == [1, 2]
    assert telemetry.audit_failed() == 1
    telemetry.scene_cut()
    telemetry.audited(missed=False, drifts=0, tightening=0.5)
    telemetry.audited(missed=True, drifts=1, tightening=2.5)
    for ms in (1.0, 3.0):
        telemetry.predicted(ms)
    telemetry.routed(0.25)
    statistics = telemetry.snapshot()
    assert (statistics.frames, statistics.dropped, statistics.degraded) == (1, 1, 2)
    assert (statistics.non_finite, statistics.predictor_failures, statistics.audit_failures) == (3, 2, 1)
    assert (statistics.audits, statistics.audit_misses, statistics.drifts) == (2, 1, 1)
    assert (statistics.scene_cuts, statistics.tightening) == (1, 2.5)
    assert (statistics.predictor.count, statistics.predictor.mean, statistics.router.max) == (2, 2.0, 0.25)

"""Conformal margins: against brute force, against the theory by simulation, and the bounds of quantile tracking."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from warpcache.engine.errors import InputError
from warpcache.engine.promise.conformal import (
    AdaptiveMargin,
    DriftTest,
    allowed_losses,
    binomial_tail,
    risk_control_margin,
)

# Few different values, so that ties are common; -inf: never lost, inf: lost at any margin.
LOST_AT = st.lists(
    st.one_of(st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 1.0, math.inf]), st.floats(-4, 4)), min_size=0, max_size=60
)
# Hundredths, so that (lost + 1) / (n + 1) <= alpha can be decided exactly.
HUNDREDTHS = st.integers(1, 99)


def keeps(lost_at: list[float], margin: float, hundredths: int) -> bool:
    """The definition, in exact arithmetic."""
    lost = sum(value >= margin for value in lost_at)
    return Fraction(lost + 1, len(lost_at) + 1) <= Fraction(hundredths, 100)


@given(LOST_AT, HUNDREDTHS)
def test_the_margin_is_the_least_that_keeps_the_definition(lost_at: list[float], hundredths: int) -> None:
    margin = risk_control_margin(lost_at, 1.0 - (100 - hundredths) / 100)
    if math.isfinite(margin):
        assert keeps(lost_at, margin, hundredths)
        assert not keeps(lost_at, math.nextafter(margin, -math.inf), hundredths)
    elif margin < 0:
        assert keeps(lost_at, -1e300, hundredths)
    else:
        assert not keeps(lost_at, 1e300, hundredths)


@given(LOST_AT, HUNDREDTHS, HUNDREDTHS)
def test_the_margin_falls_as_more_may_be_lost(lost_at: list[float], one: int, other: int) -> None:
    strict, loose = sorted((one, other))
    assert risk_control_margin(lost_at, strict / 100) >= risk_control_margin(lost_at, loose / 100)


@given(LOST_AT, HUNDREDTHS, st.integers(0, 59), st.floats(0, 3))
def test_a_frame_lost_for_longer_never_lowers_the_margin(
    lost_at: list[float], hundredths: int, index: int, more: float
) -> None:
    worse = [value + more if i == index else value for i, value in enumerate(lost_at)]
    assert risk_control_margin(worse, hundredths / 100) >= risk_control_margin(lost_at, hundredths / 100)


@pytest.mark.parametrize(("samples", "alpha"), [(30, 0.1), (99, 0.05), (57, 0.2)])
def test_new_frames_are_lost_as_often_as_the_theory_says(samples: int, alpha: float) -> None:
    """For exchangeable continuous losses the chance is floor(alpha (n + 1)) / (n + 1), which is at most alpha."""
    draws = 20_000
    rng = np.random.default_rng(samples)
    # A heavy tail, and half of the frames are never lost.
    values = rng.standard_t(2, (draws, samples + 1))
    values[rng.random(values.shape) < 0.5] = -np.inf
    lost = sum(row[-1] >= risk_control_margin(row[:-1], alpha) for row in values)
    expected = math.floor(alpha * (samples + 1) + 1e-9) / (samples + 1)
    # Four standard deviations of the mean of that many coin flips.
    tolerance = 4 * math.sqrt(expected * (1 - expected) / draws)
    assert expected <= alpha
    assert lost / draws == pytest.approx(expected, abs=tolerance)


def test_a_margin_from_the_mean_loss_alone_would_lose_more() -> None:
    """The + 1 matters: without it the promise is broken, and the simulation above would see it."""
    draws, samples, alpha = 20_000, 30, 0.1
    values = np.random.default_rng(3).normal(size=(draws, samples + 1))
    # The least margin whose mean loss over the calibration frames alone is at most alpha: 3 of 30 may be lost.
    naive = np.nextafter(np.sort(values[:, :-1], axis=1)[:, samples - 4], np.inf)
    lost = (values[:, -1] >= naive).mean()
    assert lost == pytest.approx(4 / 31, abs=4 * math.sqrt(0.13 * 0.87 / draws))
    assert lost > alpha + 4 * math.sqrt(alpha * (1 - alpha) / draws)


def test_too_few_frames_have_no_margin() -> None:
    assert risk_control_margin([-math.inf] * 18, 0.05) == math.inf
    assert risk_control_margin([-math.inf] * 19, 0.05) == -math.inf
    assert risk_control_margin([], 0.5) == math.inf
    # So near to 1 that every frame may be lost, within what rounding leaves to tell.
    assert risk_control_margin([1.0, 2.0], 1.0 - 1e-12) == -math.inf


@pytest.mark.parametrize(
    ("samples", "confidence", "allowed"), [(9, 0.9, 0), (19, 0.95, 0), (99, 0.99, 0), (39, 0.95, 1)]
)
def test_a_share_that_fits_exactly_is_not_lost_to_rounding(samples: int, confidence: float, allowed: int) -> None:
    # 1 - 0.9 is 0.09999999999999998, and ten times that is below 1.
    assert allowed_losses(samples, 1.0 - confidence) == allowed


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, math.nan])
def test_a_share_outside_its_range_is_refused(alpha: float) -> None:
    for make in (lambda: risk_control_margin([0.0], alpha), lambda: AdaptiveMargin(alpha), lambda: DriftTest(alpha)):
        with pytest.raises(InputError, match="alpha is"):
            make()


def test_losses_that_are_no_vector_of_numbers_are_refused() -> None:
    for wrong in ([math.nan, 1.0], [[1.0]]):
        with pytest.raises(InputError, match="lost_at must be a vector without NaN"):
            risk_control_margin(wrong, 0.1)


# Quantile tracking


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.booleans(), st.floats(-2, 6)), max_size=300),
    st.sampled_from([0.01, 0.05, 0.2]),
    st.sampled_from([0.05, 0.25, 1.0]),
)
def test_misses_are_bounded_whatever_happens(audits: list[tuple[bool, float]], alpha: float, step: float) -> None:
    """Each audit raises the tightening by at least step * (missed - alpha): the sum of that bounds the misses."""
    margin = AdaptiveMargin(alpha, step)
    misses = 0
    for count, (missed, excess) in enumerate(audits, 1):
        margin.observe(missed, excess)
        misses += missed
        assert margin.tightening >= 0.0
        # 1e-9: rounding of 300 additions of numbers up to 300.
        assert misses <= alpha * count + margin.tightening / step + 1e-9


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.02, 0.05, 0.2]), st.floats(0.5, 8.0))
def test_the_long_run_share_of_misses_comes_down_to_what_is_promised(seed: int, alpha: float, enough: float) -> None:
    """An adversary misses whenever it can, which is below a tightening of `enough`, in any pattern it likes."""
    margin, audits = AdaptiveMargin(alpha, 0.25), 2000
    eager = np.random.default_rng(seed).random(audits) < 0.9
    misses = 0
    for wants in eager.tolist():
        missed = wants and margin.tightening < enough
        margin.observe(missed, 0.5)
        misses += missed
    assert margin.tightening < enough + margin.step
    # And it is not overly careful: the tightening falls by step * alpha at each hit until the adversary can miss again.
    assert alpha - 0.01 <= misses / audits <= alpha + (enough + margin.step) / (margin.step * audits)


def test_the_tightening_moves_by_the_step_and_never_below_nothing() -> None:
    margin = AdaptiveMargin(0.05, 0.2)
    margin.observe(False)
    assert margin.tightening == 0.0
    margin.observe(True, 0.9)
    assert margin.tightening == pytest.approx(0.19)
    margin.observe(False)
    assert margin.tightening == pytest.approx(0.18)


@pytest.mark.parametrize(("excess", "jump"), [(-1.0, 0.0), (1.0, 0.0), (2.5, 1.5), (50.0, 3.0), (math.inf, 3.0)])
def test_a_large_miss_jumps(excess: float, jump: float) -> None:
    margin = AdaptiveMargin(0.05, 0.2, largest_jump=4.0)
    margin.observe(True, excess)
    assert margin.tightening == pytest.approx(0.19 + jump)


def test_a_miss_of_unknown_size_jumps_as_far_as_one_may() -> None:
    margin = AdaptiveMargin(0.05, 0.2, largest_jump=2.0)
    margin.observe(True, math.nan)
    assert margin.tightening == pytest.approx(0.19 + 1.0)
    margin.jump(-3.0)
    assert margin.tightening == pytest.approx(1.19)


@pytest.mark.parametrize("options", [{"step": 0.0}, {"step": math.nan}, {"largest_jump": -1.0}])
def test_steps_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"(step|largest_jump) is"):
        AdaptiveMargin(0.05, **options)


# Drift


@given(st.integers(0, 12), st.integers(0, 12), st.integers(1, 9))
def test_the_binomial_tail_equals_exact_arithmetic(count: int, trials: int, tenths: int) -> None:
    p = Fraction(tenths, 10)
    exact = sum(math.comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(count, trials + 1))
    # A dozen products of numbers below 1000, each rounded to 2^-53.
    assert binomial_tail(count, trials, tenths / 10) == pytest.approx(float(exact), rel=1e-12, abs=1e-15)


def alarms(test: DriftTest, missed: list[bool]) -> list[int]:
    found = []
    for index, miss in enumerate(missed):
        if test.observe(miss):
            found.append(index)
            test.reset()
    return found


def test_false_alarms_are_rare_over_thousands_of_audits() -> None:
    """40000 audits that miss exactly as often as promised; an audit a second for eleven hours."""
    missed = (np.random.default_rng(11).random(40_000) < 0.05).tolist()
    # 0.3 in 10000 were measured over 400000 audits: 1.3 are expected, and more than 6 have a probability below 1e-3.
    assert len(alarms(DriftTest(0.05), missed)) <= 6


@pytest.mark.parametrize(("rate", "mean", "most"), [(0.4, 18.0, 60), (0.8, 7.0, 20), (1.0, 5.0, 6)])
def test_drift_is_noticed_within_few_audits(rate: float, mean: float, most: int) -> None:
    rng = np.random.default_rng(5)
    needed = []
    for _ in range(200):
        test = DriftTest(0.05)
        quiet = (rng.random(60) < 0.05).tolist()
        alarms(test, quiet)
        needed.append(alarms(test, (rng.random(400) < rate).tolist())[0] + 1)
    # Measured over 400 runs: 13.8, 5.1 and 3.9 audits.
    assert np.mean(needed) <= mean
    assert max(needed) <= most


@given(st.lists(st.booleans(), max_size=80))
def test_an_alarm_is_an_improbable_count_in_a_window(missed: list[bool]) -> None:
    """Against the definition, computed from the whole history at each audit; only a miss can raise an alarm."""
    test = DriftTest(0.1, windows=(4, 9), level=0.01)
    for index, miss in enumerate(missed):
        seen = missed[: index + 1]
        # Audits before the first are hits: what cannot be told from a full window is judged as one.
        improbable = any(binomial_tail(sum(seen[-length:]), length, 0.1) < 0.01 for length in (4, 9))
        assert test.observe(miss) == (improbable and miss)


def test_after_a_reset_the_past_is_forgotten() -> None:
    test = DriftTest(0.05)
    assert [test.observe(True) for _ in range(4)] == [False, False, False, True]
    test.reset()
    assert [test.observe(True) for _ in range(4)] == [False, False, False, True]


def test_where_misses_are_promised_none_is_an_alarm() -> None:
    # Five misses running have a probability of 0.9^5: no window may call that an alarm.
    assert not alarms(DriftTest(0.9), [True] * 40)


@pytest.mark.parametrize(("options", "message"), [({"windows": ()}, "windows are"), ({"level": 0.0}, "level is")])
def test_a_test_without_windows_or_level_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DriftTest(0.05, **options)  # type: ignore[arg-type]

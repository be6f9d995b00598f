"""Exit costs: how they are measured, and how they follow what is observed."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from warpcache.engine.errors import InputError
from warpcache.engine.routing.exit_costs import ExitCosts, measure_exit_costs

MEASURED = {"whole": 30.0, "plain": 12.0, "warp": 3.0, "warp2": 1.5}


class Machine:
    """A clock that running an exit moves on: seconds by exit and run."""

    def __init__(self, seconds: dict[str, list[float]]) -> None:
        self.now = 100.0
        self.runs: list[str] = []
        self._seconds = {name: iter(values) for name, values in seconds.items()}

    def run(self, name: str) -> None:
        self.runs.append(name)
        self.now += next(self._seconds[name])

    def clock(self) -> float:
        return self.now


def test_the_median_of_the_rounds_is_taken_and_the_first_run_left_out() -> None:
    machine = Machine({"a": [9.0, 0.003, 0.5, 0.001], "b": [9.0, 0.020, 0.021, 0.022]})
    costs = measure_exit_costs(machine.run, ("a", "b"), machine.clock, rounds=3)
    # The clock's numbers are near 120, so differences are off by a few times 1e-14 s.
    assert costs == pytest.approx({"a": 3.0, "b": 21.0}, abs=1e-9)
    assert machine.runs == ["a", "b"] * 4, "rounds go over the exits in turn"


def test_a_coarse_clock_makes_no_exit_free() -> None:
    costs = measure_exit_costs(lambda name: None, ("a",), lambda: 5.0)
    assert ExitCosts(costs).ms("a") > 0


def test_nothing_to_time_is_refused() -> None:
    with pytest.raises(InputError, match="0 exits are to be timed in 5 rounds"):
        measure_exit_costs(lambda name: None, (), lambda: 0.0)
    with pytest.raises(InputError, match="1 exits are to be timed in 0 rounds"):
        measure_exit_costs(lambda name: None, ("a",), lambda: 0.0, rounds=0)


def test_order_and_cheapest_follow_the_costs() -> None:
    costs = ExitCosts(MEASURED)
    assert costs.order() == ("warp2", "warp", "plain", "whole")
    assert costs.cheapest() == "warp2"
    for _ in range(100):
        costs.observe("warp2", 6.0)
    assert costs.order() == ("warp", "warp2", "plain", "whole")
    assert costs.cheapest() == "warp"


def test_equal_costs_keep_the_order_they_were_measured_in() -> None:
    assert ExitCosts({"b": 1.0, "a": 1.0, "c": 1.0}).order() == ("b", "a", "c")


@given(st.floats(0.0, 1e6), st.integers(2, 10))
def test_one_outlier_alone_changes_nothing(outlier: float, around: int) -> None:
    costs = ExitCosts(MEASURED)
    for ms in [3.0] * around + [outlier] + [3.0] * around:
        costs.observe("warp", ms)
        assert costs.ms("warp") == pytest.approx(3.0, rel=1e-12)  # rounding of as many averages
    assert costs.ms("plain") == 12.0


def test_a_slower_device_is_followed_from_the_second_slow_frame_on() -> None:
    costs = ExitCosts(MEASURED, weight=0.1)
    seen = []
    for _ in range(60):
        costs.observe("warp", 5.0)
        seen.append(costs.ms("warp"))
    assert seen[0] == 3.0
    assert seen[1] == pytest.approx(3.2)
    assert seen == sorted(seen)
    # An exponential average: what is left of the step falls by a tenth each time.
    assert seen[-1] == pytest.approx(5.0 - 2.0 * 0.9**59, rel=1e-12)


def test_what_does_not_run_falls_back_to_its_time_at_load_and_no_further() -> None:
    costs = ExitCosts(MEASURED)
    for _ in range(50):
        costs.observe("warp", 9.0)
        costs.observe("warp2", 0.5)
    risen, fallen = costs.ms("warp"), costs.ms("warp2")
    costs.rest(["warp2"])
    assert costs.ms("warp") == pytest.approx(3.0 + 0.99 * (risen - 3.0)), "a hundredth of the excess goes each frame"
    assert costs.ms("warp2") == fallen, "what ran has just been measured"
    for _ in range(200):
        costs.rest([])
    assert dict(zip(MEASURED, map(costs.ms, MEASURED), strict=True)) == MEASURED | {"warp2": fallen}
    assert costs.order() == ("warp2", "warp", "plain", "whole")


def test_an_exit_that_is_as_slow_as_it_was_is_followed_at_once() -> None:
    for again, follows in ((9.0, True), (3.0, False)):
        costs = ExitCosts(MEASURED)
        for _ in range(50):
            costs.observe("warp", 9.0)
        for _ in range(20):
            costs.rest([])
        rested = costs.ms("warp")
        costs.observe("warp", again)
        assert (costs.ms("warp") > rested) == follows


@given(st.lists(st.floats(0.5, 50.0), max_size=50))
def test_a_cost_stays_among_what_was_seen(times: list[float]) -> None:
    costs = ExitCosts(MEASURED)
    for ms in times:
        costs.observe("warp", ms)
    seen = [3.0, *times]
    assert min(seen) * (1 - 1e-12) <= costs.ms("warp") <= max(seen) * (1 + 1e-12)


@pytest.mark.parametrize("ms", [math.nan, math.inf, -1.0])
def test_what_is_no_time_is_refused(ms: float) -> None:
    with pytest.raises(InputError, match="exit 'warp' is said to have taken"):
        ExitCosts(MEASURED).observe("warp", ms)
    with pytest.raises(InputError, match="the cost of exit 'warp' is"):
        ExitCosts({"warp": ms})


def test_unknown_exits_and_options_are_refused() -> None:
    costs = ExitCosts(MEASURED)
    for call in (lambda: costs.ms("branch9"), lambda: costs.observe("branch9", 1.0)):
        with pytest.raises(InputError, match="exit 'branch9' has no cost; there are: whole, plain"):
            call()
    with pytest.raises(InputError, match="no exit's cost is given"):
        ExitCosts({})
    with pytest.raises(InputError, match="weight is 0"):
        ExitCosts(MEASURED, weight=0.0)

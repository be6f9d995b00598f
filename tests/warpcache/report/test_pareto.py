"""Exits by cost and quality: which are dominated, and the plot in letters."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from warpcache.engine.bundle.bundle import ExitRecord
from warpcache.engine.promise.calibration import Calibration
from warpcache.report.drawing import round_steps
from warpcache.report.pareto import Point, age_words, by_age, front_sentences, mark_dominated, points_of

POINTS = st.lists(st.tuples(st.integers(1, 6), st.one_of(st.none(), st.integers(0, 5))), min_size=1, max_size=8)


def point(exit_: str, cost: float, value: float | None, age: int = 1, dominated: bool = False) -> Point:
    return Point(exit_, age, cost, value, value, 40, dominated)


@pytest.mark.parametrize("metric", ["lpips", "psnr_db"])
@given(found=POINTS)
def test_what_is_left_is_the_front(metric: str, found: list[tuple[int, int | None]]) -> None:
    """Every dominated exit has one on the front that beats it, and no exit on the front is beaten by any."""
    points = mark_dominated([point(f"e{n}", cost, value) for n, (cost, value) in enumerate(found)], metric)
    sign = -1 if metric == "psnr_db" else 1

    def coordinates(p: Point) -> tuple[float, float]:
        return p.cost, -math.inf if p.value is None else sign * p.value

    def beats(a: Point, b: Point) -> bool:
        (c, q), (d, r) = coordinates(a), coordinates(b)
        return c <= d and q <= r and (c, q) != (d, r)

    front = [p for p in points if not p.dominated]
    assert front
    assert not any(beats(a, b) for a in points for b in front)
    assert all(any(beats(a, b) for a in front) for b in points if b.dominated)
    assert [p.exit for p in points] == [f"e{n}" for n in range(len(found))]


def test_points_are_medians_of_what_was_measured() -> None:
    exits, rng = ("warp", "branch1"), np.random.default_rng(0)
    age = np.repeat([0, 1], 21).astype(np.int32)
    values = np.exp(rng.normal(-5, 1, (42, 2)))  # LPIPS
    scores = np.log(values).astype(np.float32)
    scores[age == 0, 0] = np.nan
    full = np.zeros_like(scores)
    calibration = Calibration("lpips", exits, ("branch1",), (1,), full, full + 1, scores, age, np.arange(42) % 21)

    class Manifest:
        exact_exit = "whole"
        exits = tuple(
            ExitRecord(name, (name,), cost)
            for name, cost in (("whole", 1.0), ("plain", 0.4), ("warp", 0.1), ("branch1", 0.3))
        )

    groups = by_age(points_of(calibration, Manifest()))  # type: ignore[arg-type]
    assert {a: [p.exit for p in g] for a, g in groups.items()} == {
        0: ["branch1", "whole"],
        1: ["warp", "branch1", "whole"],
    }
    warp, branch, whole = groups[1]
    # Of 21 values the 11th is the median, the 20th of the sorted is the 95 % quantile; float32 scores: 1e-7 of 5.
    ordered = np.sort(values[age == 1], axis=0)
    assert warp.value == pytest.approx(ordered[10, 0], rel=1e-5)
    assert branch.worst == pytest.approx(ordered[19, 1], rel=1e-5)
    assert (whole.value, whole.cost, warp.cost, warp.frames) == (0.0, 1.0, 0.1, 21)


def test_the_front_is_told_in_words() -> None:
    points = mark_dominated(
        [point("warp2", 0.05, 0.008), point("warp", 0.1, 0.006), point("branch1", 0.2, 0.012), point("whole", 1, 0.0)],
        "lpips",
    )
    told = "Pareto front, cache 1 frame old: warp2, warp, whole (by cost; LPIPS: lower is better)"
    assert front_sentences(points, "lpips") == [told]
    exact = mark_dominated([point("warp", 0.1, 30.0, age=0), point("whole", 1, None, age=0)], "psnr_db")
    told_of_exact = "Pareto front, no cache: warp, whole (by cost; PSNR: higher is better)"
    assert front_sentences([*points, *exact], "psnr_db")[0] == told_of_exact
    assert front_sentences([point("whole", 1, None)], "psnr_db") == []


@given(st.lists(st.floats(1e-4, 3.0), min_size=1, max_size=5))
def test_ticks_enclose_the_costs(costs: list[float]) -> None:
    ticks = round_steps(costs)
    assert ticks == sorted(ticks)
    assert ticks[0] <= min(costs) * (1 + 1e-9)
    assert ticks[-1] >= max(costs) * (1 - 1e-9)


def test_ages_in_words() -> None:
    assert [age_words(age) for age in (0, 1, 3)] == ["no cache", "cache 1 frame old", "cache 3 frames old"]

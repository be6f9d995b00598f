"""Audits: which frames, what their results change, and a planted shift through rule, router and log together."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from warpcache.engine.errors import InputError, WarpcacheError
from warpcache.engine.promise.calibration import Calibration, Quality, Rule
from warpcache.engine.routing.audit_log import AuditLog
from warpcache.engine.routing.exit_costs import ExitCosts
from warpcache.engine.routing.router import ExitRoles, Request, Router, Signals

# Which frames


def audited(log: AuditLog, frames: int, *, takes: int = 0, start: int = 0) -> list[int]:
    """The frames that are audited when an audit's result is there `takes` frames after it started."""
    found: list[int] = []
    for frame in range(start, start + frames):
        if log.in_flight is not None and frame >= log.in_flight + takes:
            log.finished(log.in_flight, 1, False)
        if log.due(frame):
            log.started(frame)
            found.append(frame)
            if takes == 0:
                log.finished(frame, 1, False)
    return found


@given(st.integers(1, 40), st.integers(0, 500))
def test_every_block_of_frames_has_one_audit(every: int, start: int) -> None:
    found = audited(AuditLog(every, 0.95), 20 * every, start=start * every)
    assert [frame // every for frame in found] == list(range(start, start + 20))


def test_audits_do_not_keep_step_with_a_period() -> None:
    """A policy's period divides 8 often: at fixed steps, all audits would see the same cache age."""
    ages = [frame % 4 for frame in audited(AuditLog(8, 0.95), 4000)]
    counts = [ages.count(age) for age in range(4)]
    # 125 are expected of each; four standard deviations of a binomial count are 39.
    assert sum(counts) == 500
    assert all(86 <= count <= 164 for count in counts)


def test_the_draw_repeats() -> None:
    assert audited(AuditLog(8, 0.95), 400) == audited(AuditLog(8, 0.95), 400)
    assert audited(AuditLog(8, 0.95), 400) != audited(AuditLog(8, 0.95, seed=1), 400)


def test_there_is_one_audit_at_a_time() -> None:
    found = audited(AuditLog(4, 0.95), 400, takes=10)
    assert min(b - a for a, b in itertools.pairwise(found)) >= 10
    # It takes the next frame that it can: a block is left out only where the audit before fills it.
    assert len(found) >= 400 // 14


def test_asking_changes_nothing() -> None:
    log = AuditLog(3, 0.95)
    assert [log.due(frame) for frame in range(30)] == [log.due(frame) for frame in range(30)]


def test_an_audit_of_nothing_is_off() -> None:
    log = AuditLog(0, 0.95)
    assert not any(log.due(frame) for frame in range(100))


def test_an_audit_without_a_result_makes_room_for_the_next() -> None:
    log = AuditLog(1, 0.95)
    log.started(0)
    assert not log.due(1)
    log.abandoned(0)
    assert log.due(1)
    assert (log.audits, log.in_flight) == (0, None)


def test_events_that_cannot_have_happened_are_bugs() -> None:
    log = AuditLog(1, 0.95)
    for call in (lambda: log.finished(3, 1, False), lambda: log.abandoned(3)):
        with pytest.raises(WarpcacheError, match="an audit of frame 3 ended that was not started"):
            call()
    log.started(3)
    with pytest.raises(WarpcacheError, match="an audit of frame 4 started while that of frame 3 was running"):
        log.started(4)


@pytest.mark.parametrize(
    ("every", "confidence", "options", "message"),
    [
        (-1, 0.95, {}, "every is -1"),
        (8, 0.95, {"recovery": 0}, "every is 8 and recovery 0"),
        (8, 1.0, {}, "confidence 1.0 is not between"),
        (8, math.nan, {}, "confidence nan is not between"),
        (8, 0.95, {"step": 0.0}, "step is 0.0"),
    ],
)
def test_arguments_out_of_range_are_refused(
    every: int, confidence: float, options: dict[str, float], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        AuditLog(every, confidence, **options)  # type: ignore[arg-type]


# What they change


def feed(log: AuditLog, *results: tuple[bool, float, float | None]) -> None:
    """Audit one frame for each (missed, spreads over the threshold, spreads beyond what the prediction leaves open)."""
    for missed, excess, beyond in results:
        frame = log.audits
        log.started(frame)
        log.finished(frame, 1, missed, 0.25 * excess, 0.25, beyond=beyond)


HIT = (False, -3.0, -2.0)
EXACT = (False, -math.inf, None)


def test_counts_by_age() -> None:
    log = AuditLog(1, 0.95)
    for frame, (age, missed) in enumerate([(1, False), (1, True), (None, False), (0, True), (3, False)]):
        log.started(frame)
        log.finished(frame, age, missed, 0.1 if missed else -0.1)
    assert (log.audits, log.misses) == (5, 2)
    assert log.by_age == {0: (2, 1), 1: (2, 1), 3: (1, 0)}


def test_one_miss_tightens_by_the_step_at_every_age() -> None:
    log = AuditLog(1, 0.95, step=0.2)
    feed(log, (True, 0.5, -1.0))
    assert log.tightening(1) == log.tightening(4) == log.tightening(None) == pytest.approx(0.19)
    feed(log, *[HIT] * 20)
    assert log.tightening() == pytest.approx(0.0, abs=1e-12)
    assert (log.drifts, log.drifting, log.take_warning()) == (0, False, None)


@given(st.lists(st.tuples(st.booleans(), st.floats(-3, 8), st.one_of(st.none(), st.floats(-3, 8))), max_size=80))
def test_the_long_run_bound_holds_with_drifts_too(results: list[tuple[bool, float, float | None]]) -> None:
    log = AuditLog(1, 0.9, step=0.25)
    feed(log, *results)
    # As the adaptive margin's: every rise at an alarm only adds to the right side. 1e-9: rounding.
    assert log.misses <= 0.1 * log.audits + log.tightening() / 0.25 + 1e-9


def test_misses_are_noticed_once_a_drift() -> None:
    log = AuditLog(1, 0.95)
    feed(log, *[HIT] * 30, *[(True, 1.5, None)] * 4)
    assert (log.drifts, log.drifting) == (1, True)
    warning = log.take_warning()
    assert warning is not None
    assert warning.startswith("4 of the last 20 audited frames are worse than promised")
    feed(log, *[(True, 0.5, None)] * 10)
    assert (log.drifts, log.take_warning()) == (1, None)


def test_errors_are_noticed_where_nothing_is_missed() -> None:
    """The threshold is far, so that no answer misses it, and still the predictor is wrong by three spreads."""
    log = AuditLog(1, 0.95)
    feed(log, *[HIT] * 10, *[(False, -2.0, 1.2)] * 3, (False, -2.0, 3.0))
    assert (log.misses, log.drifts, log.drifting) == (0, 1, True)
    assert log.tightening() == pytest.approx(3.0), "the rule is tightened before anything was missed"


def test_exact_answers_say_nothing_of_the_predictor() -> None:
    """Between the wrong predictions lie any number of frames that the whole generator answered."""
    log = AuditLog(1, 0.95)
    for _ in range(4):
        feed(log, *[EXACT] * 15, (False, -2.0, 1.0))
    assert log.drifts == 1


def test_the_jump_is_what_the_worst_recent_audit_needed() -> None:
    log = AuditLog(1, 0.95)
    feed(log, (True, 0.4, None), (True, 2.0, None), (True, 0.2, None))
    before = log.tightening()
    feed(log, (True, 0.9, None))
    # The fourth of four misses is the alarm. The second was answered at a tightening of one step, and two spreads more
    # would have kept it out; the fourth asks for 0.9 more than there were.
    assert log.drifting
    assert log.tightening() == pytest.approx(max(0.25 * 0.95 + 2.0, before + 0.9))


def test_a_size_that_is_not_known_moves_the_margin_by_its_limit() -> None:
    log = AuditLog(1, 0.95)
    log.started(0)
    log.finished(0, 1, True, math.nan, 0.25, beyond=math.nan)
    # A step, and the largest jump less the spread that is bad luck.
    assert log.tightening() == pytest.approx(0.25 * 0.95 + 3.0)
    assert math.isfinite(log.tightening())


def test_a_drift_is_over_when_audits_are_as_calibrated_again() -> None:
    log = AuditLog(1, 0.95, recovery=20)
    shifted = (False, -1.0, 0.5)
    feed(log, *[shifted] * 5)
    assert log.drifting
    feed(log, *[HIT, HIT, shifted] * 20)
    assert log.drifting, "a third of the predictions is still wrong"
    feed(log, *[EXACT] * 100)
    assert log.drifting, "exact answers do not say that it is over"
    feed(log, *[HIT] * 20)
    assert not log.drifting
    log.take_warning()
    feed(log, *[shifted] * 5)
    assert log.drifts == 2
    assert log.take_warning() is not None


def test_what_led_to_a_drift_does_not_lead_to_the_next() -> None:
    log = AuditLog(1, 0.95, recovery=20)
    feed(log, *[(False, -1.0, 0.5)] * 4, *[HIT] * 20)
    assert (log.drifts, log.drifting) == (1, False)
    feed(log, (False, -1.0, 0.5))
    assert log.drifts == 1


def test_while_drifting_a_miss_is_followed_at_once() -> None:
    log = AuditLog(1, 0.95, recovery=5)
    feed(log, *[(False, -1.0, 0.5)] * 4)
    assert log.tightening() == pytest.approx(0.5)
    # Among the first audits a wrong prediction is enough, later on a miss is.
    feed(log, (False, -1.0, 0.9))
    assert log.tightening() == pytest.approx(0.9)
    feed(log, *[(False, -1.0, 0.5)] * 5)
    assert log.drifting
    before = log.tightening()
    feed(log, (False, -1.0, 2.0))
    assert log.tightening() < before
    before = log.tightening()
    feed(log, (True, 1.1, 0.5))
    assert log.tightening() == pytest.approx(before + 1.1)


def test_predictions_that_cannot_be_compared_are_wrong_ones() -> None:
    log = AuditLog(1, 0.95)
    feed(log, *[(False, -1.0, math.nan)] * 4)
    assert log.drifting
    assert log.tightening() == pytest.approx(4.0), "the largest jump: nothing else limits it"


# Rule, router and log together

EXITS = ("warp", "warp2", "branch1")
COSTS = {"warp2": 1.5, "warp": 3.0, "branch1": 12.0, "whole": 30.0}
QUALITY = Quality("lpips", 0.06)


def frames(count: int, seed: int, shift: float = 0.0, *, youngest: int = 1) -> dict[str, NDArray[np.float64]]:
    """Frames at ages `youngest` to 4; `shift` spreads is what the predictor is too optimistic by."""
    rng = np.random.default_rng(seed)
    age = rng.integers(youngest, 5, count)
    base = np.log(0.025) + 0.5 * rng.normal(size=count) + 0.1 * age
    predicted = np.stack([base, base + 0.5, base + 0.2], axis=1)
    spread = 0.25 * np.exp(0.2 * rng.normal(size=predicted.shape))
    measured = predicted + spread * (rng.normal(size=predicted.shape) + shift)
    return {"predicted": predicted, "spread": spread, "measured": measured, "age": age}


@pytest.fixture(scope="module")
def rule() -> Rule:
    data: dict[str, Any] = frames(2500, 0, youngest=0)
    return Calibration("lpips", EXITS, ("branch1",), (1, 2, 3, 4), frame=np.arange(2500), **data).rule(QUALITY)


@dataclass
class Run:
    """What a run of frames through router and log gave."""

    log: AuditLog = field(default_factory=lambda: AuditLog(8, QUALITY.confidence))
    missed: list[bool] = field(default_factory=list)
    whole: list[bool] = field(default_factory=list)
    warned: list[int] = field(default_factory=list)


def drive(rule: Rule, *parts: dict[str, NDArray[np.float64]], by_errors: bool = True) -> Run:
    """Route all frames in turn, audit every eighth, each result three frames after its frame."""
    data = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    run = Run()
    router = Router(rule, ExitCosts(COSTS), ExitRoles("whole", None, frozenset({"warp", "warp2"})))
    rows = zip(*(data[name].tolist() for name in ("age", "predicted", "spread", "measured")), strict=True)
    results: dict[int, tuple[bool, float, float, float | None]] = {}
    for frame, (age, predicted, spread, measured) in enumerate(rows):
        signals = Signals(
            dict(zip(EXITS, predicted, strict=True)), dict(zip(EXITS, spread, strict=True)), novelty=0.3, change=0.3
        )
        decision = router.route(Request(frame, age, signals), tightening=run.log.tightening(age))
        result: tuple[bool, float, float, float | None] = (False, -math.inf, 1.0, None)
        if decision.exit != "whole":
            column = EXITS.index(str(decision.exit))
            over = measured[column] - QUALITY.score
            beyond = rule.beyond(measured[column], predicted[column], spread[column]) if by_errors else None
            result = (over > 0, over, spread[column], beyond)
        run.missed.append(result[0])
        run.whole.append(decision.exit == "whole")
        if run.log.due(frame):
            run.log.started(frame)
            results[frame + 3] = result
        if frame in results:
            missed, over, scale, beyond = results.pop(frame)
            run.log.finished(frame - 3, age, missed, over, scale, beyond=beyond)
        if run.log.take_warning() is not None:
            run.warned.append(frame)
    return run


QUIET, SHIFTED = 1000, 1200
SEEDS = range(8)


@pytest.fixture(scope="module")
def runs(rule: Rule) -> list[Run]:
    """1000 frames like the calibration's, then 1200 with a predictor that is too optimistic by three spreads."""
    return [drive(rule, frames(QUIET, 10 + seed), frames(SHIFTED, 50 + seed, shift=3.0)) for seed in SEEDS]


def test_quiet_frames_keep_the_promise_and_raise_no_alarm(runs: list[Run]) -> None:
    missed = np.array([run.missed[:QUIET] for run in runs])
    assert missed.mean() <= 0.05
    assert all(frame >= QUIET for run in runs for frame in run.warned)
    # The rule promises something: most frames are answered by a cheaper exit.
    assert np.mean([run.whole[:QUIET] for run in runs]) < 0.5


def test_a_planted_shift_breaks_the_rule_alone(rule: Rule) -> None:
    """Were the frames within the promise without any audit, the next test would show nothing."""
    unaudited = Run(AuditLog(0, 0.95))
    data = frames(SHIFTED, 50, shift=3.0)
    slack = (QUALITY.score - data["predicted"]) / data["spread"]
    margins = np.array([rule.margin(int(age)) for age in data["age"]])[:, None]
    cheapest = [EXITS.index(name) for name in ("warp2", "warp", "branch1")]
    missed = 0
    for row in range(SHIFTED):
        chosen = next((column for column in cheapest if slack[row, column] >= margins[row, 0]), None)
        missed += chosen is not None and data["measured"][row, chosen] > QUALITY.score
    assert unaudited.log.tightening() == 0.0
    assert missed / SHIFTED > 0.2


def test_a_planted_shift_is_noticed_and_the_coverage_restored(runs: list[Run]) -> None:
    after = []
    for run in runs:
        assert run.warned, "the shift was not noticed"
        assert run.warned[0] - QUIET <= 200
        # Not a new warning at every audit: the drift goes on, and is one.
        assert len(run.warned) == run.log.drifts <= 2
        following = run.missed[run.warned[0] + 1 :]
        after.append(np.mean(following))
        # One run is about 1100 frames, of which 5 % are 55: four standard deviations of that count are 2.7 %.
        assert after[-1] <= 0.05 + 0.027
        # Restored by tightening, not by giving up: some frames are still answered by cheaper exits.
        assert np.mean(run.whole[run.warned[0] + 1 :]) < 0.95
    assert np.mean(after) <= 0.05


def test_misses_alone_restore_the_coverage_too(rule: Rule) -> None:
    """Where nothing is known of the predictor's errors, tracking still does, later."""
    runs_ = [
        drive(rule, frames(200, 10 + seed), frames(SHIFTED, 50 + seed, shift=3.0), by_errors=False) for seed in range(4)
    ]
    # The tightening that is needed is reached within some 40 audits, 320 frames.
    assert np.mean([run.missed[520:] for run in runs_]) <= 0.05 + 0.01


def test_after_the_shift_savings_come_back(rule: Rule) -> None:
    run = drive(rule, frames(200, 10), frames(600, 50, shift=3.0), frames(3000, 90))
    tight, relaxed = run.whole[600:800], run.whole[-500:]
    assert np.mean(relaxed) < np.mean(tight) - 0.2
    assert run.log.tightening() < 0.5
    assert not run.log.drifting

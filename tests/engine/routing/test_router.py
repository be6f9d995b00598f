"""The router: what always holds, by hypothesis, and the degrade order, hysteresis and scene cuts case by case."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from warpcache.engine.errors import InputError
from warpcache.engine.promise.calibration import Quality, Rule
from warpcache.engine.routing.exit_costs import ExitCosts
from warpcache.engine.routing.router import Decision, ExitRoles, Request, Router, RouterOptions, Signals

MS = {"warp2": 1.5, "warp": 3.0, "branch2": 6.0, "plain": 11.0, "branch1": 12.0, "whole": 30.0}
CONSUMERS = frozenset({"warp", "warp2"})
BRANCHES = frozenset({"branch1", "branch2"})
INEXACT = (*CONSUMERS, *BRANCHES)
ROLES = ExitRoles("whole", "plain", CONSUMERS)
WITHOUT_PLAIN = ExitRoles("whole", None, CONSUMERS)
QUALITY = Quality("lpips", 0.05)
SCORE = math.log(0.05)
RULE = Rule(QUALITY, {0: 1.0, 1: 1.0, 2: 1.2, 3: 1.5})
STRICT = Rule(QUALITY, {0: 50.0, 1: 50.0, 2: 50.0, 3: 50.0})


def make(rule: Rule = RULE, *, max_age: int | None = None, has_plain: bool = True) -> Router:
    costs = MS if has_plain else {name: ms for name, ms in MS.items() if name != "plain"}
    return Router(rule, ExitCosts(costs), ROLES if has_plain else WITHOUT_PLAIN, RouterOptions(max_age=max_age))


def signals(
    *eligible: str, slack: float = 1.5, otherwise: float = -2.0, novelty: float = 0.5, change: float = 0.5
) -> Signals:
    """Predictions that lie `slack` spreads below the threshold for some exits, and `otherwise` for the others."""
    beyond = {name: slack if name in eligible else otherwise for name in INEXACT}
    return Signals(
        {name: SCORE - 0.25 * s for name, s in beyond.items()}, dict.fromkeys(INEXACT, 0.25), novelty, change
    )


def exits(router: Router, frames: Iterable[Signals | None], *, age: int = 1) -> list[str | None]:
    return [router.route(Request(index, age, given_)).exit for index, given_ in enumerate(frames)]


# What always holds


@st.composite
def some_signals(draw: st.DrawFn) -> Signals | None:
    if draw(st.integers(0, 9)) == 0:
        return None
    cold = draw(st.booleans())
    names = sorted(BRANCHES if cold else INEXACT)
    number = st.floats(SCORE - 2.0, SCORE + 1.0)
    strange = draw(st.integers(0, 19)) == 0
    if strange:
        number = st.sampled_from([math.nan, math.inf, -math.inf, SCORE])
    return Signals(
        {name: draw(number) for name in names},
        {name: draw(st.sampled_from([0.1, 0.5, 1.0, 0.0 if strange else 0.3])) for name in names},
        novelty=draw(st.sampled_from([0.2, 1.0, 1.0001, math.nan if strange else 0.9])),
        change=0.0 if cold else draw(st.sampled_from([0.0, 1.0, 1.5])),
        cold=cold,
    )


FRAMES = st.lists(
    st.tuples(
        st.one_of(st.none(), st.integers(0, 6)),
        some_signals(),
        st.one_of(st.none(), st.floats(-1.0, 40.0)),
        st.sampled_from([None, STRICT, Rule(QUALITY, {0: 0.0, 1: 0.2, 2: 0.0})]),
        st.sampled_from([0.0, 0.0, 0.7, 3.0]),
    ),
    min_size=1,
    max_size=12,
)


def finite(given_: Signals) -> bool:
    values = [*given_.predicted.values(), *given_.spread.values(), given_.novelty, given_.change]
    return all(map(math.isfinite, values)) and min(given_.spread.values()) > 0


def eligible(name: str, request: Request, rule: Rule, tightening: float, *, max_age: int | None, edge: float) -> bool:
    """Whether an exit is eligible, said once more from the specification; `edge` is added to the predicted score."""
    if name == "whole" or (name == "plain" and request.age == 0):
        return True
    given_, age = request.signals, request.age
    if name == "plain" or given_ is None or not finite(given_) or given_.novelty > 1.0 or name not in given_.predicted:
        return False
    no_cache = age is None or given_.cold
    margins = dict(rule.margins)
    if not no_cache and age not in margins:
        return False
    too_old = age is None or age == 0 or (max_age is not None and age > max_age)
    readable = not (no_cache or too_old or given_.change > 1.0)
    if name in CONSUMERS and not readable:
        return False
    # Where no consumer can read the cache, branches are judged as without one.
    margin = margins[age if readable else 0] + tightening  # type: ignore[index]
    return given_.predicted[name] + margin * given_.spread[name] + edge <= rule.quality.score


def may_answer(name: str, request: Request, rule: Rule, tightening: float, *, max_age: int | None, edge: float) -> bool:
    """Whether an exit may answer: it is eligible, and no branch beside a consumer that is. `edge` as above."""
    given_ = (request, rule, tightening)
    if name in BRANCHES and any(eligible(other, *given_, max_age=max_age, edge=-edge) for other in CONSUMERS):
        return False
    return eligible(name, *given_, max_age=max_age, edge=edge)


@settings(max_examples=150)
@given(FRAMES, st.sampled_from([None, 2]))
def test_no_frame_breaks_the_rules(frames: list[tuple[object, ...]], max_age: int | None) -> None:
    router = make(max_age=max_age)
    for index, (age, given_, remaining, own_rule, tightening) in enumerate(frames):
        request = Request(index, age, given_, remaining)  # type: ignore[arg-type]
        rule: Rule = own_rule or RULE  # type: ignore[assignment]
        decision = router.route(request, own_rule, tightening)  # type: ignore[arg-type]

        # 1e-9: whether an exit on the very edge is eligible is a matter of rounding, and neither is wrong.
        def allowed(
            name: str,
            edge: float,
            request: Request = request,
            rule: Rule = rule,
            tightening: float = tightening,  # type: ignore[assignment]
        ) -> bool:
            return may_answer(name, request, rule, tightening, max_age=max_age, edge=edge)

        in_time = [name for name in MS if request.remaining_ms is None or MS[name] <= request.remaining_ms]
        if decision.degraded is None:
            assert decision.exit is not None
            assert allowed(decision.exit, -1e-9), "an exit that may not answer did, without being flagged"
        else:
            assert request.remaining_ms is not None, "without a deadline nothing is ever given up"
            assert not any(allowed(name, 1e-9) for name in in_time), "an eligible exit would have been done in time"
        if decision.exit is None:
            assert decision.degraded == "dropped"
            assert not BRANCHES.intersection(in_time)
            changed = given_ is not None and finite(given_) and given_.change > 1.0  # type: ignore[arg-type,attr-defined]
            assert age is None or changed or not CONSUMERS.intersection(in_time)
        else:
            assert decision.exit in in_time, "the answer would be over the deadline"
            if decision.exit in CONSUMERS:
                assert age is not None
        check_ranking(decision, [name for name in MS if allowed(name, -1e-9)])
        if decision.exit in ("whole", None) or (decision.exit == "plain" and age == 0):
            assert decision.predicted is None
        elif decision.predicted is not None:
            assert decision.predicted == pytest.approx(math.exp(given_.predicted[decision.exit]))  # type: ignore[attr-defined]


def check_ranking(decision: Decision, eligible: list[str]) -> None:
    if decision.exit in ("whole", None):
        assert decision.ranking == ()
        return
    ranked = [decision.exit, *decision.ranking]
    assert ranked[-1] == "whole"
    assert [MS[name] for name in ranked] == sorted(MS[name] for name in ranked)
    assert len(set(ranked)) == len(ranked)
    assert set(decision.ranking) <= set(eligible)


def answering(given_: Signals | None, age: int, tightening: float) -> frozenset[str | None]:
    # The first frame of a router is answered by the cheapest exit that may, and its ranking is all others.
    decision = make().route(Request(0, age, given_), tightening=tightening)
    return frozenset((decision.exit, *decision.ranking))


@given(some_signals(), st.integers(1, 3), st.floats(0, 4), st.floats(0, 4))
def test_tightening_only_shrinks_what_is_eligible(given_: Signals | None, age: int, one: float, other: float) -> None:
    less, more = (answering(given_, age, tightening) for tightening in sorted((one, other)))
    assert more & CONSUMERS <= less & CONSUMERS
    # Branches stand back for consumers: they may come when the last of these has gone.
    assert more <= less or (less & CONSUMERS and not more & CONSUMERS)
    for names in (less, more):
        assert not (names & CONSUMERS and names & BRANCHES)


def test_the_test_above_sees_sets_that_change() -> None:
    spreads = {"warp2": 1.1, "warp": 2.5, "branch1": 5.0, "branch2": 3.5}
    given_ = Signals({n: SCORE - 0.25 * s for n, s in spreads.items()}, dict.fromkeys(INEXACT, 0.25), 0.5, 0.5)
    # The margin is 1.
    expected = {0.0: {"warp2", "warp"}, 1.0: {"warp"}, 2.0: {"branch1", "branch2"}, 3.0: {"branch1"}, 5.0: set()}
    for tightening, names in expected.items():
        assert answering(given_, 1, tightening) == {*names, "whole"}


@settings(max_examples=50)
@given(st.lists(st.floats(0.0, 0.999), min_size=60, max_size=60), st.integers(0, 2**60 - 1))
def test_exits_do_not_flicker_without_room_to_spare(beyond: list[float], pattern: int) -> None:
    """Whatever pattern of eligibility: between two switches to the cheaper exit lie `hold` frames at least."""
    frames = [
        signals("warp2", "warp", slack=1.0 + slack) if pattern >> index & 1 else signals("warp")
        for index, slack in enumerate(beyond)
    ]
    chosen = exits(make(), frames)
    to_cheaper = [i for i in range(1, 60) if chosen[i] == "warp2" and chosen[i - 1] != "warp2"]
    assert all(later - earlier > 4 for earlier, later in itertools.pairwise(to_cheaper))
    for index, name in enumerate(chosen):
        assert name != "warp2" or pattern >> index & 1, "hysteresis kept an exit that was not eligible"


def test_alternating_signals_settle_on_the_dearer_exit() -> None:
    frames = [signals("warp2", "warp"), signals("warp")] * 30
    assert exits(make(), frames) == ["warp2"] + ["warp"] * 59


# Hysteresis


def test_to_a_dearer_exit_at_once_and_back_after_some_frames() -> None:
    frames = [signals("warp2", "warp")] * 2 + [signals("warp")] + [signals("warp2", "warp")] * 5
    assert exits(make(), frames) == ["warp2", "warp2", "warp", "warp", "warp", "warp", "warp2", "warp2"]


def test_to_a_cheaper_exit_at_once_with_room_to_spare() -> None:
    # The margin is 1: two spreads below the threshold leave one to spare.
    frames = [signals("warp"), signals("warp2", "warp", slack=1.99), signals("warp2", "warp", slack=2.01)]
    assert exits(make(), frames) == ["warp", "warp", "warp2"]


def test_from_a_branch_to_a_consumer_at_once() -> None:
    """The branch may not stay beside it, and the whole generator would be the costlier way round."""
    frames = [signals("branch2"), signals("branch2", "warp"), signals("branch2"), signals("warp", "branch1")]
    assert exits(make(), frames) == ["branch2", "warp", "branch2", "warp"]
    # Of two without room to spare the costlier, from which hysteresis goes on.
    frames = [signals("branch1")] + [signals("warp", "warp2")] * 5
    assert exits(make(), frames) == ["branch1", "warp", "warp", "warp", "warp2", "warp2"]
    # Room to spare counts as ever.
    assert exits(make(), [signals("branch1"), signals("warp", "warp2", slack=2.01)]) == ["branch1", "warp2"]


def test_a_consumer_that_is_dearer_than_the_whole_generator_answers_nothing() -> None:
    costs = ExitCosts({"branch1": 5.0, "whole": 6.0, "warp": 8.0})
    router = Router(RULE, costs, WITHOUT_PLAIN)
    assert exits(router, [signals("branch1"), signals("warp"), signals("warp", "branch1")]) == [
        "branch1",
        "whole",
        "whole",
    ]


def test_equal_costs_that_jitter_cause_no_switch() -> None:
    costs = ExitCosts({"warp": 3.0, "warp2": 3.05, "whole": 30.0}, weight=1.0)
    router = Router(RULE, costs, WITHOUT_PLAIN)
    frames = [signals("warp", "warp2", slack=5.0)] * 20
    chosen = []
    for index, given_ in enumerate(frames):
        for _ in range(3):
            costs.observe("warp2", 2.95 if index % 2 else 3.05)
        chosen.append(router.route(Request(index, 1, given_)).exit)
    assert set(chosen) == {"warp"}
    for _ in range(3):
        costs.observe("warp2", 2.0)
    assert router.route(Request(20, 1, frames[0])).exit == "warp2"


def test_where_nothing_dearer_is_in_time_a_cheaper_eligible_exit_answers() -> None:
    router = make()
    assert router.route(Request(0, 1, signals("branch1"), 20.0)).exit == "branch1"
    decision = router.route(Request(1, 1, signals("warp2"), 20.0))
    assert (decision.exit, decision.degraded) == ("warp2", None)
    # Of several, none with room to spare, the costliest: it is the least of a step down.
    router = make()
    assert router.route(Request(0, 1, signals("branch1"), 20.0)).exit == "branch1"
    assert router.route(Request(1, 1, signals("warp2", "warp"), 11.0)).exit == "warp"


def test_costs_that_were_followed_change_the_choice() -> None:
    costs = ExitCosts(MS)
    router = Router(RULE, costs, ROLES)
    given_ = signals("warp2", "warp", slack=5.0)
    assert router.route(Request(0, 1, given_)).exit == "warp2"
    for _ in range(60):
        costs.observe("warp2", 9.0)
    assert router.route(Request(1, 1, given_)).exit == "warp"


# Eligibility


def test_a_frames_own_rule_serves_that_frame_alone() -> None:
    router = make()
    request = Request(0, 1, signals("warp2", slack=9.0))
    assert router.route(request).exit == "warp2"
    assert router.route(request, STRICT).exit == "whole"
    assert router.route(request).exit == "warp2"
    assert router.rule is RULE


@pytest.mark.parametrize(
    ("age", "expected"), [(None, "branch2"), (0, "branch2"), (1, "warp2"), (3, "warp2"), (4, "whole"), (9, "whole")]
)
def test_the_age_decides_what_may_answer(age: int | None, expected: str) -> None:
    assert make().route(Request(0, age, signals(*INEXACT, slack=9.0))).exit == expected


def test_a_cold_prediction_is_judged_without_a_cache() -> None:
    """At an age that is not calibrated, branches answer under the margin of age 0, and consumers do not."""
    cold = Signals({"branch2": SCORE - 1.0}, {"branch2": 0.25}, 0.5, cold=True)
    router = make(max_age=2)
    assert [router.wants_cold(age) for age in (None, 0, 1, 2, 3, 4)] == [True, True, False, False, True, True]
    assert router.route(Request(0, 4, cold)).exit == "branch2"
    assert router.route(Request(1, 4, cold), tightening=5.0).exit == "whole"


def test_an_age_above_the_callers_limit_is_too_old_for_consumers() -> None:
    assert make(max_age=2).route(Request(0, 3, signals("warp2", "branch1", slack=9.0))).exit == "branch1"


def test_at_age_0_the_exact_consumer_answers_where_there_is_one() -> None:
    assert make().route(Request(0, 0, None)) == Decision("plain", ranking=("whole",))
    assert make(has_plain=False).route(Request(0, 0, None)) == Decision("whole")


@pytest.mark.parametrize(
    "broken",
    [
        None,
        dataclasses.replace(signals(*INEXACT, slack=9.0), novelty=math.nan),
        dataclasses.replace(signals(*INEXACT, slack=9.0), change=math.inf),
        dataclasses.replace(signals(*INEXACT, slack=9.0), spread=dict.fromkeys(INEXACT, 0.0)),
        dataclasses.replace(signals(*INEXACT, slack=9.0), spread={}),
        dataclasses.replace(signals(*INEXACT), predicted=dict.fromkeys(INEXACT, -math.inf)),
        signals(*INEXACT, slack=9.0, novelty=1.01),
    ],
)
def test_without_a_trusted_prediction_only_exact_exits_answer(broken: Signals | None) -> None:
    assert make().route(Request(0, 1, broken)).exit == "whole"


def test_what_is_expected_is_told_in_the_metrics_unit() -> None:
    decision = make().route(Request(0, 1, signals("warp", slack=2.0)))
    assert decision.predicted == pytest.approx(math.exp(SCORE - 0.5))
    in_db = Rule(Quality("psnr", 30.0), {1: 1.0})
    given_ = Signals({"warp": in_db.quality.score - 1.0}, {"warp": 0.25}, 0.5, 0.5)
    # A unit of score is a factor e of the squared error: 10 / ln 10 decibels.
    assert make(in_db).route(Request(0, 1, given_)).predicted == pytest.approx(30.0 + 10 / math.log(10))


def test_the_ranking_is_the_dearer_exits_that_may_answer() -> None:
    def ranking(*names: str) -> tuple[str | None, ...]:
        decision = make().route(Request(0, 1, signals(*names, slack=3.0)))
        return (decision.exit, *decision.ranking)

    assert ranking("branch2", "branch1") == ("branch2", "branch1", "whole")
    assert ranking("warp2", "warp") == ("warp2", "warp", "whole")
    # No branch, though eligible, where a consumer is.
    assert ranking("warp2", "branch2", "branch1") == ("warp2", "whole")


def test_no_branch_answers_where_a_consumer_is_eligible_even_one_that_is_cheaper() -> None:
    costs = ExitCosts({"branch1": 1.0, "warp": 3.0, "whole": 30.0})
    router = Router(RULE, costs, WITHOUT_PLAIN)
    assert exits(router, [signals("warp", "branch1", slack=9.0)] * 6) == ["warp"] * 6
    assert router.route(Request(6, 1, signals("branch1", slack=9.0))).exit == "branch1"


def test_a_branch_in_the_place_of_a_late_consumer_is_degraded() -> None:
    costs = ExitCosts({"branch1": 1.0, "warp": 3.0, "whole": 30.0})
    router = Router(RULE, costs, WITHOUT_PLAIN)
    decision = router.route(Request(0, 1, signals("warp", "branch1", slack=9.0), 2.0))
    assert (decision.exit, decision.degraded) == ("branch1", "cheaper exit")
    # Alone it keeps what was promised.
    decision = router.route(Request(1, 1, signals("branch1", slack=9.0), 2.0))
    assert (decision.exit, decision.degraded) == ("branch1", None)


# Degrade order


@pytest.mark.parametrize(
    ("age", "remaining_ms", "expected", "degraded"),
    [
        (1, 30.0, "whole", None),
        (1, 29.9, "branch1", "cheaper exit"),  # of best predicted quality, and a branch needs no cache
        (1, 11.9, "warp", "cheaper exit"),
        (1, 2.9, "warp2", "cheaper exit"),
        (1, 1.4, None, "dropped"),
        (4, 5.0, "warp", "older cache"),
        (4, 7.0, "branch2", "cheaper exit"),
        (None, 5.0, None, "dropped"),
        (1, -3.0, None, "dropped"),
        (0, 5.0, "warp", "cheaper exit"),
        (0, 11.0, "plain", None),
    ],
)
def test_the_degrade_order(age: int | None, remaining_ms: float, expected: str | None, degraded: str | None) -> None:
    # None is eligible; best predicted first: branch1, warp, branch2, warp2.
    worse = {"branch1": 0.1, "warp": 0.2, "branch2": 0.3, "warp2": 0.4}
    given_ = Signals({name: SCORE + w for name, w in worse.items()}, dict.fromkeys(INEXACT, 0.25), 0.5, 0.5)
    decision = make().route(Request(0, age, given_, remaining_ms))
    assert (decision.exit, decision.degraded) == (expected, degraded)


def test_an_eligible_exit_in_time_is_never_given_up() -> None:
    decision = make().route(Request(0, 1, signals("warp2"), 1.5))
    assert (decision.exit, decision.degraded) == ("warp2", None)


def test_where_nothing_is_predicted_the_dearest_in_time_answers() -> None:
    assert make().route(Request(0, 1, None, 10.0)).exit == "branch2"
    assert make().route(Request(0, 1, None, 5.0)) == Decision("warp", None, "cheaper exit", ranking=("whole",))


def test_a_cache_of_another_scene_is_worse_than_no_answer() -> None:
    decision = make().route(Request(0, 1, signals(change=1.2), 5.0))
    assert (decision.exit, decision.degraded, decision.scene_cut) == (None, "dropped", True)


# Scene cuts and new subjects


def cuts(frames: Iterable[Signals | None]) -> list[bool]:
    router = make()
    return [router.route(Request(index, 1, given_)).scene_cut for index, given_ in enumerate(frames)]


def test_a_scene_cut_keeps_consumers_out() -> None:
    decision = make().route(Request(0, 1, signals(*INEXACT, slack=9.0, change=1.01)))
    assert (decision.exit, decision.scene_cut) == ("branch2", True)
    assert cuts([signals(), signals(change=1.0), signals(change=1.5), signals()]) == [False, False, True, False]


def route_branch(
    age_0: float, age_1: float, given_: Signals, *, age: int = 1, max_age: int | None = None
) -> str | None:
    """What answers where branches lie two spreads below the threshold, under the margins of two ages."""
    rule = Rule(QUALITY, {0: age_0, 1: age_1})
    return make(rule, max_age=max_age).route(Request(0, age, given_)).exit


def test_after_a_cut_branches_are_judged_by_the_margin_of_age_0() -> None:
    """That of an age with a cache is made for consumers, behind which branches hardly ever answer."""
    same, cut = signals("branch2", slack=2.0), signals("branch2", slack=2.0, change=1.2)
    assert route_branch(3.0, 1.0, same) == "branch2"
    assert route_branch(3.0, 1.0, cut) == "whole"
    assert route_branch(1.0, 3.0, same) == "whole"
    assert route_branch(1.0, 3.0, cut) == "branch2"


def test_behind_a_cache_older_than_allowed_branches_are_judged_by_the_margin_of_age_0() -> None:
    given_ = signals("branch2", slack=2.0)
    assert route_branch(3.0, 1.0, given_, max_age=0) == "whole"
    assert route_branch(1.0, 3.0, given_, max_age=0) == "branch2"


def test_after_a_cut_at_an_age_that_was_never_measured_only_exact_exits_answer() -> None:
    assert route_branch(1.0, 1.0, signals(*INEXACT, slack=9.0, change=1.2), age=2) == "whole"


def test_a_new_subject_is_told_once() -> None:
    known, novel = signals(), signals(novelty=1.5)
    assert cuts([known, novel, novel, novel, novel, novel, novel]) == [False] * 3 + [True] + [False] * 3
    assert cuts([novel, novel, known, novel, novel, known]) == [False] * 6
    assert cuts([novel] * 3 + [known] + [novel] * 3) == [False, False, True] + [False] * 3 + [True]


def test_a_cut_to_a_new_subject_is_one_change() -> None:
    assert cuts([signals(novelty=2.0, change=2.0)] + [signals(novelty=2.0)] * 9) == [True] + [False] * 9


def test_frames_without_a_prediction_say_nothing_of_the_scene() -> None:
    novel = signals(novelty=1.5)
    assert cuts([novel, None, novel, None, novel, novel]) == [False] * 4 + [True] + [False]


# Arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_age": -1}, "max_age -1 is negative"),
        ({"room": -0.1}, "room, hold, gain and novel_frames are"),
        ({"room": math.nan}, "room, hold, gain and novel_frames are"),
        ({"hold": 0}, "room, hold, gain and novel_frames are"),
        ({"gain": 1.0}, "room, hold, gain and novel_frames are"),
        ({"novel_frames": 0}, "room, hold, gain and novel_frames are"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RouterOptions(**options)  # type: ignore[arg-type]


def test_the_whole_generator_must_have_a_cost() -> None:
    with pytest.raises(InputError, match="exit 'whole' has no cost; there are: warp"):
        Router(RULE, ExitCosts({"warp": 1.0}), WITHOUT_PLAIN)

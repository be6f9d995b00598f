"""Routing with lanes in Python: which exit runs when, what it may cost, and what follows where one fails.

Time passes only inside lanes, by what the test says each costs. The bundle is real (its promise makes the rule), the
device is not.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.bundle.roles import Role
from warpcache.engine.device.stream import Event
from warpcache.engine.errors import BackendError, ClosedError
from warpcache.engine.promise.calibration import Quality
from warpcache.engine.routing.plan import RoutingPlan
from warpcache.engine.routing.runner import RoutedAnswer, Routing
from warpcache.engine.schedule.events import Invalidated, SchedulerEvent, StartConsumer
from warpcache.engine.schedule.policy import Policy
from warpcache.engine.telemetry import Telemetry

COSTS = {"warp2": 0.5, "warp": 1.0, "branch1": 3.0, "plain": 5.0, "whole": 10.0}
# 30 dB is a mean squared error of 1e-3, a score of ln 1e-3 = -6.9: these lie 4 spreads below and 8 above it.
GOOD, BAD = -9.0, -3.0


class World:
    """A device in Python: a workspace whose lanes take the time and give the answers that a test asks for."""

    def __init__(self) -> None:
        self.time = 100.0
        self.costs = dict(COSTS)
        self.predictor_ms = 0.25
        self.scores = {"warp2": GOOD, "warp": GOOD, "branch1": GOOD}
        self.novelty = 0.0
        self.change = 0.0
        self.fails: dict[str, BaseException] = {}
        self.gives: dict[str, float] = {}
        self.ran: list[tuple[str, int | None]] = []
        self.posted: list[SchedulerEvent] = []
        self.ages: list[Any] = []
        self.taken = 0

    # What `Routing` asks of a workspace

    def take_input(self, spec: Any, array: np.ndarray, *, finite: bool, keep: bool) -> np.ndarray:
        spec.check(array)
        self.taken += 1
        return array

    def take_answer(self) -> dict[str, np.ndarray]:
        return {"image": np.zeros((1, 3, 4, 4), np.float32)}

    def take_prediction(self, cold: bool) -> dict[str, np.ndarray]:
        exits = ["branch1"] if cold else ["warp2", "warp", "branch1"]
        return {
            "predicted": np.array([[self.scores[name] for name in exits]], np.float32),
            "spread": np.full((1, len(exits)), 0.5, np.float32),
            "novelty": np.array([[self.novelty]], np.float32),
            "change": np.array([[self.change]], np.float32),
        }

    def finite(self, outputs: Mapping[str, np.ndarray]) -> bool:
        return all(bool(np.isfinite(array).all()) for array in outputs.values())

    def exit(self, name: str) -> Lane:
        return Lane(lambda inputs, slot, outputs: self.run(name, slot, outputs), self.take_answer)

    def lane(self, role: Role, index: int = 0) -> Lane:
        cold = role is Role.PREDICTOR_COLD
        return Lane(lambda inputs, slot, outputs: self.predict(cold, inputs, slot), lambda: self.take_prediction(cold))

    def run(self, name: str, slot: int | None, outputs: Mapping[str, np.ndarray]) -> None:
        self.ran.append((name, slot))
        self.time += self.costs[name] / 1e3
        if name in self.fails:
            raise self.fails[name]
        outputs["image"].fill(self.gives.get(name, 0.5))

    def predict(self, cold: bool, inputs: Mapping[str, Any], slot: int | None) -> None:
        name = "predictor_cold" if cold else "predictor"
        self.ran.append((name, slot))
        self.ages.append(inputs.get("age"))
        self.time += self.predictor_ms / 1e3
        if name in self.fails:
            raise self.fails[name]


class Lane:
    """Runs a function, as an exit's lane on the calling thread does."""

    def __init__(
        self, run: Callable[[Mapping[str, Any], int | None, Mapping[str, Any]], None], take: Callable[[], Any]
    ) -> None:
        self._run = run
        self.take_outputs = take

    def enqueue(self, inputs: Mapping[str, Any], slot: int | None, outputs: Mapping[str, Any]) -> Event:
        event = Event()
        try:
            self._run(inputs, slot, outputs)
        except Exception as exc:
            event.set(exc)
        event.set()
        return event


def plan_of(bundle: Path, *, policy: str = "async", max_age: int | None = None) -> RoutingPlan:
    """What an engine that keeps 30 dB comes to, at the test's costs."""
    plan = RoutingPlan(
        Bundle.open(bundle),
        Quality("psnr", 30.0),
        deadline_ms=None,
        audit_every=0,
        lpips=None,
        policy=Policy.parse(policy),
        max_age=max_age,
    )
    plan.costs = {name: COSTS[name] for name in plan.exits}
    return plan


class Client:
    """One session's routing in a world."""

    def __init__(self, plan: RoutingPlan, world: World) -> None:
        self.plan = plan
        self.world = world
        self.telemetry = Telemetry()
        self.routing = Routing(
            self.plan,
            world,  # type: ignore[arg-type]
            telemetry=self.telemetry,
            now=lambda: world.time,
            turn=threading.Lock(),
            post=world.posted.append,
            lock=threading.Condition(threading.RLock()),
        )

    def ask(
        self, frame: int, *, age: int | None = 1, within_ms: float | None = None, quality: Quality | None = None
    ) -> RoutedAnswer | None:
        """Answer a frame; it has `within_ms` from now."""
        slot = None if age is None else 1
        return self.routing.answer(
            StartConsumer(frame, slot, None, age or 0, False),
            {"x": np.zeros((1, 3, 4, 4), np.float32)},
            rule=None if quality is None else self.plan.rule_for(quality),
            deadline=None if within_ms is None else self.world.time + within_ms / 1e3,
        )

    def answer(self, frame: int, **options: Any) -> RoutedAnswer:
        answer = self.ask(frame, **options)
        assert answer is not None, "the frame was dropped"
        return answer


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def client(routed_bundle: Path, world: World) -> Client:
    return Client(plan_of(routed_bundle), world)


# Which exit


def test_the_cheapest_exit_that_keeps_the_quality_runs_alone(client: Client, world: World) -> None:
    answer = client.answer(0)
    assert world.ran == [("predictor", 1), ("warp2", 1)]
    assert (answer.exit, answer.age, answer.degraded) == ("warp2", 1, None)
    assert answer.exit_ms == pytest.approx(0.5)
    # 9 nats below one are 9 * 10 / ln 10 dB; the predictor gives float32, of 24 bits.
    assert answer.predicted == pytest.approx(90.0 / np.log(10.0), rel=2.0**-23)


@pytest.mark.parametrize(
    ("bad", "exit_", "age"),
    [(["warp2"], "warp", 1), (["warp2", "warp"], "branch1", 0), (list(World().scores), "whole", 0)],
)
def test_exits_that_would_be_worse_are_passed_over(
    client: Client, world: World, bad: list[str], exit_: str, age: int
) -> None:
    world.scores |= dict.fromkeys(bad, BAD)
    answer = client.answer(0)
    # An exit that reads no cache has no age.
    assert (answer.exit, answer.age) == (exit_, age)
    assert (answer.predicted is None) == (exit_ == "whole")


def test_a_cache_over_max_age_is_read_by_no_consumer(routed_bundle: Path, world: World) -> None:
    client = Client(plan_of(routed_bundle, max_age=2), world)
    assert [client.answer(frame, age=age).exit for frame, age in enumerate([2, 3])] == ["warp2", "branch1"]


@pytest.mark.parametrize("age", [None, 4, 50])
def test_without_a_cache_of_a_calibrated_age_the_cold_predictor_speaks(
    client: Client, world: World, age: int | None
) -> None:
    assert client.answer(0, age=age).exit == "branch1"
    assert world.ran[0] == ("predictor_cold", None)
    assert world.ages == [None]


def test_at_age_0_the_plain_exit_is_exact(client: Client, world: World) -> None:
    world.scores["branch1"] = BAD
    answer = client.answer(0, age=0)
    assert (answer.exit, answer.age, answer.predicted) == ("plain", 0, None)


def test_the_predictor_is_told_the_age(client: Client, world: World) -> None:
    for frame, age in enumerate([1, 3, 1, 2, 3]):
        client.answer(frame, age=age)
    assert [float(given[0, 0]) for given in world.ages] == [1.0, 3.0, 1.0, 2.0, 3.0]
    assert world.ages[0].dtype == np.float32
    # Taken to the device once each, not once a frame.
    assert world.taken == 3


def test_a_novel_input_gets_an_exact_exit(client: Client, world: World) -> None:
    world.novelty = 1.5
    assert client.answer(0).exit == "whole"


def test_a_frame_may_have_a_quality_of_its_own(client: Client, world: World) -> None:
    world.scores = {"warp2": -7.2, "warp": -8.0, "branch1": -12.0}
    # 45 dB is a score of -10.4; only the branch lies below it.
    assert client.answer(0, quality=Quality("psnr", 45.0)).exit == "branch1"
    assert client.answer(1).exit != "branch1"
    assert client.answer(2, quality=Quality("psnr", 45.0)).exit == "branch1"


def test_full_has_branches_and_the_whole_generator(routed_bundle: Path, world: World) -> None:
    client = Client(plan_of(routed_bundle, policy="full"), world)
    assert client.plan.exits == ("branch1", "whole")
    assert client.plan.predictors == ("predictor_cold",)
    assert client.answer(0, age=None).exit == "branch1"
    world.scores["branch1"] = BAD
    assert client.answer(1, age=None).exit == "whole"


def test_costs_are_followed(client: Client, world: World) -> None:
    assert client.answer(0).exit == "warp2"
    world.costs["warp2"] = 50.0
    exits = [client.answer(frame).exit for frame in range(1, 20)]
    # Slow frames come through a median of three and an average: the first one alone changes nothing.
    assert exits[:2] == ["warp2", "warp2"]
    assert exits[-1] == "warp"


# Deadlines: what is degraded, in this order


def test_within_the_deadline_nothing_is_degraded(client: Client, world: World) -> None:
    world.scores |= {"warp2": BAD, "warp": BAD}
    assert client.answer(0, within_ms=4.0).degraded is None


def test_the_predictors_own_time_counts(client: Client, world: World) -> None:
    world.scores |= {"warp2": BAD, "warp": BAD + 0.5}
    world.predictor_ms = 1.5
    # Of 4 ms the predictor leaves 2.5, and the branch takes 3: the best of the cheaper exits answers.
    answer = client.answer(0, within_ms=4.0)
    assert (answer.exit, answer.degraded) == ("warp2", "cheaper exit")
    assert answer.predicted is not None


def test_a_cache_older_than_calibrated_is_the_next_resort(client: Client, world: World) -> None:
    answer = client.answer(0, age=9, within_ms=2.0)
    assert answer.exit in ("warp", "warp2")
    assert (answer.age, answer.degraded) == (9, "older cache")


def test_a_frame_that_nothing_can_answer_in_time_is_dropped(client: Client, world: World) -> None:
    assert client.ask(0, within_ms=0.5) is None
    assert world.ran == [("predictor", 1)]
    statistics = client.telemetry.snapshot()
    assert (statistics.dropped, statistics.degraded, statistics.frames) == (1, 1, 0)


def test_without_a_cache_in_time_a_frame_is_dropped_rather_than_late(client: Client) -> None:
    assert client.ask(0, age=None, within_ms=2.0) is None


def test_a_slow_spell_does_not_drop_frames_for_good(client: Client, world: World) -> None:
    fast = dict(world.costs)
    world.costs = {name: 40.0 * ms for name, ms in fast.items()}
    assert None in [client.ask(frame, within_ms=4.0) for frame in range(60)], "every exit is over the deadline"
    world.costs = fast
    # Nothing that is dropped is measured: only by trying can it be found that the spell is over.
    answers = [client.ask(frame, within_ms=4.0) for frame in range(60, 160)]
    assert None not in answers[-20:]
    assert client.routing._costs.ms("warp2") < 4.0


# Failures


def test_an_answer_that_is_not_finite_is_replaced_by_the_next_exit(
    client: Client, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.gives = {"warp2": np.nan}
    with caplog.at_level(logging.WARNING, "warpcache.engine.routing.runner"):
        answers = [client.answer(frame) for frame in range(2)]
    assert [name for name, _ in world.ran[:3]] == ["predictor", "warp2", "warp"]
    for answer in answers:
        assert (answer.exit, answer.age) == ("warp", 1)
        assert answer.predicted == pytest.approx(90.0 / np.log(10.0), rel=2.0**-23)
        assert np.isfinite(answer.outputs["image"]).all()
    assert client.telemetry.snapshot().non_finite == 2
    (record,) = caplog.records
    assert record.getMessage().startswith("exit 'warp2' gave NaN or infinity on frame 0, and the next exit answers it")


def test_no_branch_replaces_an_eligible_consumer(client: Client, world: World) -> None:
    """Nothing is promised of branches where a consumer is eligible."""
    world.gives = {"warp2": np.nan, "warp": np.inf}
    answer = client.answer(0)
    assert [name for name, _ in world.ran] == ["predictor", "warp2", "warp", "whole"]
    assert (answer.exit, answer.age, answer.predicted) == ("whole", 0, None)


def test_what_replaces_a_degraded_answer_is_not_degraded(client: Client, world: World) -> None:
    world.scores |= {"warp2": BAD, "warp": BAD - 0.5}
    world.gives = {"warp": np.nan}
    # Of 3 ms the predictor leaves too little for the branch. Then it answers all the same: late, but as promised.
    answer = client.answer(0, within_ms=3.0)
    assert [name for name, _ in world.ran] == ["predictor", "warp", "branch1"]
    assert (answer.exit, answer.degraded) == ("branch1", None)


def test_at_last_the_whole_generator_answers(client: Client, world: World) -> None:
    world.gives = dict.fromkeys(("warp2", "warp", "branch1"), np.nan)
    answer = client.answer(0)
    assert (answer.exit, answer.predicted) == ("whole", None)


def test_where_every_answer_is_not_finite_the_frame_fails(client: Client, world: World) -> None:
    world.gives = dict.fromkeys(COSTS, np.nan)
    with pytest.raises(
        BackendError, match=r"^frame 7 cannot be answered: every exit, the whole generator too, gave NaN"
    ):
        client.ask(7)


@pytest.mark.parametrize("how", ["raises", "nan", "no spread"])
def test_without_the_predictor_exact_exits_answer(
    client: Client, world: World, caplog: pytest.LogCaptureFixture, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "raises":
        world.fails["predictor"] = BackendError("no memory left")
    elif how == "nan":
        world.scores["warp"] = np.nan
    else:
        given = world.take_prediction
        monkeypatch.setattr(world, "take_prediction", lambda cold: given(cold) | {"spread": np.zeros((1, 3))})
    with caplog.at_level(logging.WARNING, "warpcache.engine.routing.runner"):
        assert [client.answer(frame).exit for frame in range(3)] == ["whole"] * 3
    statistics = client.telemetry.snapshot()
    assert (statistics.predictor_failures, statistics.predictor.count, statistics.router.count) == (3, 3, 3)
    (record,) = caplog.records
    said = "failed" if how == "raises" else "gave values that are not finite"
    assert record.getMessage().startswith(f"the predictor {said} on frame 0; exact exits answer such frames")


def test_the_predictor_may_come_back(client: Client, world: World) -> None:
    world.fails["predictor"] = BackendError("no memory left")
    assert client.answer(0).exit == "whole"
    world.fails.clear()
    # Hysteresis: with room to spare the cheaper exit is taken at once.
    assert client.answer(1).exit == "warp2"


@pytest.mark.parametrize("where", ["predictor", "warp2"])
def test_a_closed_engine_says_so(client: Client, world: World, where: str) -> None:
    world.fails[where] = ClosedError("module is closed; load it again")
    with pytest.raises(ClosedError, match=r"^module is closed"):
        client.ask(0)
    assert client.telemetry.snapshot().predictor_failures == 0


def test_an_exit_that_fails_fails_its_frame(client: Client, world: World) -> None:
    world.fails["warp2"] = BackendError("no memory left")
    with pytest.raises(BackendError, match=r"^no memory left"):
        client.ask(0)
    world.fails.clear()
    assert client.answer(1).exit == "warp2"


# Scenes


def test_a_cut_is_posted_before_anything_answers(client: Client, world: World) -> None:
    world.change = 1.5
    answer = client.answer(3)
    assert [type(event) for event in world.posted] == [Invalidated]
    assert world.posted[0].frame == 3  # type: ignore[union-attr]
    # No consumer reads a cache of another scene; a branch reads none.
    assert answer.exit == "branch1"
    assert client.telemetry.snapshot().scene_cuts == 1


def test_a_new_subject_is_posted_once(client: Client, world: World) -> None:
    client.answer(0)
    world.novelty = 1.5
    for frame in range(1, 9):
        assert client.answer(frame).exit == "whole"
    assert len(world.posted) == 1
    assert client.telemetry.snapshot().scene_cuts == 1


# Sessions


def test_two_sessions_share_no_state(routed_bundle: Path) -> None:
    """The exits of one are the same whether or not another, which is slowed and cut, is asked in between."""
    rng = np.random.default_rng(5)
    scores = [dict(zip(COSTS, rng.uniform(-9, -6, 3), strict=False)) for _ in range(60)]

    def exits_of(world: World, client: Client, between: Callable[[], object]) -> list[str]:
        exits = []
        for frame, given in enumerate(scores):
            world.scores = given
            exits.append(client.answer(frame, age=1 + frame % 3).exit)
            between()
        return exits

    plan = plan_of(routed_bundle)
    world = World()
    alone = exits_of(world, Client(plan, world), lambda: None)
    assert len(set(alone)) > 2, "the frames are too alike to tell"
    world, other = World(), World()
    shared, busy = Client(plan, world), Client(plan, other)
    other.costs["warp2"], other.change = 40.0, 1.5
    frames = iter(range(1000))
    assert exits_of(world, shared, lambda: busy.ask(next(frames))) == alone

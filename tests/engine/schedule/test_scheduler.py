"""The scheduler under adversarial event orders, and in a simulation with a virtual clock.

`Driver` keeps its own, independent account of the world (what is in each slot, who reads and writes it, which frames
are unanswered) and checks every action against the rules; it knows nothing of the scheduler's insides.
"""

from __future__ import annotations

import heapq
import itertools
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from warpcache.engine.errors import InputError, WarpcacheError
from warpcache.engine.schedule.events import (
    Action,
    Answering,
    ConsumerDone,
    ConsumerFailed,
    DropFrame,
    FailFrame,
    FrameArrived,
    Invalidated,
    ProducerDone,
    ProducerFailed,
    SchedulerEvent,
    StartConsumer,
    StartProducer,
)
from warpcache.engine.schedule.policy import Policy
from warpcache.engine.schedule.scheduler import Scheduler

QUEUE_LIMIT = 3


class Driver:
    """Feeds events to a scheduler and checks what comes out."""

    def __init__(self, policy: Policy, *, devices: int = 1, streams: int = 1, **options: Any) -> None:
        self.policy = policy
        self.max_age: int | None = options.get("max_age")
        self.on_stale = options.get("on_stale", "whole")
        self.aged_exit = options.get("aged_exit", "warp")
        self.routed = options.get("routed", False)
        self.scene_start = 0
        self.lanes = 1 if policy.foreground else devices * streams
        answering = Answering(**{"aged" if key == "aged_exit" else key: value for key, value in options.items()})
        self.scheduler = Scheduler(policy, answering, devices=devices, streams=streams, queue_limit=QUEUE_LIMIT)
        self.arrived: list[int] = []
        self.open: list[int] = []
        self.answers: list[StartConsumer] = []
        self.failed: list[int] = []
        self.dropped: list[int] = []
        self.in_flight: list[StartProducer] = []
        self.ready: dict[int, int] = {}  # slot -> frame of its finished cache
        self.running: StartConsumer | None = None
        self.failures = 0

    def post(self, event: SchedulerEvent) -> list[Action]:
        inputs = self.scheduler.needed_inputs | ({event.frame} if isinstance(event, FrameArrived) else set())
        actions = self.scheduler.step(event)
        for action in actions:
            if not isinstance(action, DropFrame):
                assert action.frame in inputs, "an action names a frame whose inputs were let go"
            self.check(action)
        self.check_state()
        return actions

    def arrive(self, frame: int) -> list[Action]:
        self.arrived.append(frame)
        self.open.append(frame)
        return self.post(FrameArrived(frame, float(frame)))

    def producer_done(self, index: int = 0) -> list[Action]:
        done = self.in_flight.pop(index)
        self.ready[done.slot] = done.frame
        return self.post(ProducerDone(done.device, done.slot, done.frame, 0.0))

    def producer_failed(self, index: int = 0) -> list[Action]:
        done = self.in_flight.pop(index)
        self.failures += 1
        return self.post(ProducerFailed(done.device, done.slot, done.frame, 0.0))

    def consumer_done(self, *, failed: bool = False) -> list[Action]:
        assert self.running is not None
        frame, self.running = self.running.frame, None
        return self.post(ConsumerFailed(frame, 0.0) if failed else ConsumerDone(frame, 0.0))

    def invalidate(self) -> list[Action]:
        """The frame that is being answered turns out to be of another scene than those before it."""
        assert self.running is not None
        self.scene_start = self.running.frame
        return self.post(Invalidated(self.running.frame, 0.0))

    @property
    def newest(self) -> int | None:
        """The frame of the newest finished cache, of whatever scene."""
        return max(self.ready.values(), default=None)

    @property
    def usable(self) -> int | None:
        """The frame of the newest finished cache of this scene."""
        return max((frame for frame in self.ready.values() if frame >= self.scene_start), default=None)

    def check(self, action: Action) -> None:
        match action:
            case StartProducer():
                assert action.frame in self.arrived
                assert 0 <= action.slot < self.scheduler.slots
                assert all(action.slot != other.slot for other in self.in_flight), "two writers"
                assert self.running is None or self.running.slot != action.slot, "written while read"
                if self.ready.pop(action.slot, None) is not None:
                    assert self.newest is not None, "the last cache was thrown away"
                self.in_flight.append(action)
                assert len(self.in_flight) <= self.lanes
                if self.policy.kind == "async":
                    assert action.frame == self.arrived[-1], "a producer was put on a frame that is not the newest"
            case StartConsumer():
                assert self.running is None, "two consumers at once"
                self.close_frame(action.frame)
                self.running = action
                self.answers.append(action)
                self.check_answer(action)
            case DropFrame():
                assert self.policy.live
                assert action.frame < self.arrived[-1], "dropped without a newer frame"
                self.open.remove(action.frame)
                self.dropped.append(action.frame)
            case FailFrame():
                assert self.on_stale == "raise"
                assert not self.routed
                assert self.newest is None or self.too_old(action.frame - self.newest)
                self.close_frame(action.frame)
                self.failed.append(action.frame)

    def check_answer(self, action: StartConsumer) -> None:
        if self.routed:
            self.check_routed(action)
            return
        if action.route == "whole":
            assert action.slot is None
            assert action.age == 0
            assert action.refreshed
            if self.policy.kind != "full":
                assert self.newest is None or self.too_old(action.frame - self.newest), "needlessly whole"
                assert self.newest is not None or self.failures > 0
            return
        assert action.slot is not None
        assert all(action.slot != other.slot for other in self.in_flight), "read while written"
        assert self.ready[action.slot] == action.frame - action.age
        assert self.ready[action.slot] == self.newest
        assert action.age >= 0
        assert not self.too_old(action.age)
        assert action.route == ("plain" if action.age == 0 else self.aged_exit)
        self.check_age(action)

    def check_routed(self, action: StartConsumer) -> None:
        """The exit is open; the cache is the newest of this scene, however old, and only that."""
        assert action.route is None
        if action.slot is None:
            assert self.usable is None, "a cache of this scene was passed over"
            assert action.age == 0
            # Where a producer is planned for the frame it is waited for, so that only its failure leaves none.
            assert self.policy.kind in ("full", "async") or self.failures > 0
            return
        assert all(action.slot != other.slot for other in self.in_flight), "read while written"
        assert self.ready[action.slot] == action.frame - action.age == self.usable
        assert 0 <= action.age <= action.frame - self.scene_start, "a cache from before the cut"
        self.check_age(action)

    def check_age(self, action: StartConsumer) -> None:
        """What the policy plans holds where no producer has failed."""
        if self.failures == 0 and self.policy.kind == "every":
            assert action.age < self.policy.period
        if self.failures == 0 and self.policy.kind == "lockstep":
            scene = [frame for frame in self.arrived if frame >= self.scene_start]
            wanted = max((frame for frame in scene if frame <= action.frame - self.policy.age), default=scene[0])
            assert action.frame - action.age == wanted

    def check_state(self) -> None:
        waiting = [frame for frame in self.open if self.running is None or frame != self.running.frame]
        # In the foreground one more frame may be in hand, waiting for its producer.
        limit = (1 if self.policy.live else QUEUE_LIMIT) + self.policy.foreground
        assert len(waiting) <= limit, "the queue grows"
        if self.running is None and waiting:
            assert self.in_flight, "a frame waits and nothing is under way"
            if self.policy.kind == "async":
                assert not self.routed, "a routed frame waits for the first cache"
                assert self.newest is None, "a frame waits although there is a cache"
        assert self.scheduler.idle == (not waiting and self.running is None)
        assert self.scheduler.needed_inputs <= set(self.arrived)
        held = 2 if self.policy.live else QUEUE_LIMIT + self.policy.age + 2
        assert len(self.scheduler.needed_inputs) <= held, "inputs pile up"

    def too_old(self, age: int) -> bool:
        return self.max_age is not None and age > self.max_age

    def close_frame(self, frame: int) -> None:
        assert frame == self.open[0], "out of order, twice, or never arrived"
        self.open.remove(frame)


class Adversary(RuleBasedStateMachine):
    """Any order of arrivals, ends and failures."""

    policies = (
        Policy("full"),
        Policy("async"),
        *(Policy("every", period=period) for period in (1, 3)),
        *(Policy.lockstep(age) for age in (0, 1, 2, 4)),
    )

    @initialize(
        policy=st.sampled_from(policies),
        devices=st.integers(1, 3),
        streams=st.integers(1, 2),
        max_age=st.none() | st.integers(0, 4),
        on_stale=st.sampled_from(["whole", "raise"]),
        aged_exit=st.sampled_from(["plain", "warp", "warp2"]),
        routed=st.booleans(),
    )
    def start(self, **options: Any) -> None:
        self.driver = Driver(options.pop("policy"), **options)
        self.frame = -1

    @precondition(lambda self: self.driver.scheduler.has_room)
    @rule(gap=st.sampled_from([1, 1, 1, 2, 5]))
    def arrive(self, gap: int) -> None:
        self.frame += gap
        self.driver.arrive(self.frame)

    @precondition(lambda self: self.driver.in_flight)
    @rule(choice=st.integers(0, 5))
    def producer_done(self, choice: int) -> None:
        self.driver.producer_done(choice % len(self.driver.in_flight))

    @precondition(lambda self: self.driver.in_flight)
    @rule(choice=st.integers(0, 5))
    def producer_failed(self, choice: int) -> None:
        self.driver.producer_failed(choice % len(self.driver.in_flight))

    @precondition(lambda self: self.driver.running is not None)
    @rule(failed=st.sampled_from([False, False, False, True]))
    def consumer_done(self, failed: bool) -> None:
        self.driver.consumer_done(failed=failed)

    @precondition(lambda self: self.driver.routed and self.driver.running is not None)
    @rule()
    def invalidate(self) -> None:
        self.driver.invalidate()

    def teardown(self) -> None:
        """However it went, everything ends once what is under way has ended, and every frame has had its fate."""
        if not hasattr(self, "driver"):
            return
        driver = self.driver
        for _ in range(200):
            if driver.running is not None:
                driver.consumer_done()
            elif driver.in_flight:
                driver.producer_done()
            else:
                break
        assert not driver.open
        assert driver.scheduler.idle
        fates = [answer.frame for answer in driver.answers] + driver.dropped + driver.failed
        assert sorted(fates) == driver.arrived


Adversary.TestCase.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
test_every_rule_holds_in_any_order_of_events = Adversary.TestCase


def run_in_order(driver: Driver, frames: int) -> list[StartConsumer]:
    """Frames one after the other, every producer ending before the next frame arrives."""
    for frame in range(frames):
        driver.arrive(frame)
        while driver.in_flight or driver.running:
            if driver.in_flight:
                driver.producer_done()
            else:
                driver.consumer_done()
    return driver.answers


@pytest.mark.parametrize("age", [0, 1, 3])
def test_lockstep_ages_are_exact(age: int) -> None:
    answers = run_in_order(Driver(Policy.lockstep(age)), 8)
    assert [answer.age for answer in answers] == [min(frame, age) for frame in range(8)]
    assert [answer.route for answer in answers] == ["plain" if min(frame, age) == 0 else "warp" for frame in range(8)]
    # At age 0 every frame waits for its own cache; else only the first, since the next one's is made in between.
    assert [answer.refreshed for answer in answers] == [age == 0 or frame == 0 for frame in range(8)]


def test_every_n_refreshes_in_the_foreground() -> None:
    answers = run_in_order(Driver(Policy("every", period=3)), 8)
    assert [answer.age for answer in answers] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert [answer.refreshed for answer in answers] == [True, False, False, True, False, False, True, False]


def test_full_uses_no_producer() -> None:
    driver = Driver(Policy("full"))
    answers = run_in_order(driver, 3)
    assert {(answer.route, answer.age, answer.refreshed) for answer in answers} == {("whole", 0, True)}
    assert not driver.ready


def test_async_answers_in_the_same_step_once_there_is_a_cache() -> None:
    driver = Driver(Policy("async"))
    assert driver.arrive(0) == [StartProducer(0, 0, 0)]
    assert driver.producer_done() == [StartConsumer(0, 0, "plain", 0, True)]
    assert driver.consumer_done() == []
    assert driver.arrive(1) == [StartProducer(0, 1, 1), StartConsumer(1, 0, "warp", 1, False)]
    # While the consumer works: frame 2 waits, and frame 3 replaces it.
    assert driver.arrive(2) == []
    assert driver.arrive(3) == [DropFrame(2)]
    # The producer goes on with the newest input; frame 3 is answered from the newest cache, the one of frame 1.
    assert driver.producer_done() == [StartProducer(0, 2, 3)]
    assert driver.consumer_done() == [StartConsumer(3, 1, "warp", 2, False)]


def test_while_the_first_cache_is_made_the_newest_input_wins() -> None:
    driver = Driver(Policy("async"))
    driver.arrive(0)
    assert driver.arrive(1) == [DropFrame(0)]
    assert driver.producer_done() == [StartProducer(0, 1, 1), StartConsumer(1, 0, "warp", 1, True)]


def test_a_cache_that_was_overtaken_is_not_used() -> None:
    driver = Driver(Policy("async"), devices=2)
    driver.arrive(0)
    driver.arrive(1)
    driver.producer_done(1)
    driver.consumer_done()
    driver.producer_done(0)  # of frame 0, later than that of frame 1
    actions = driver.arrive(3)
    assert actions[-1] == StartConsumer(3, 1, "warp", 2, False)


def test_past_max_age_the_whole_generator_answers_or_the_frame_fails() -> None:
    for on_stale in ("whole", "raise"):
        driver = Driver(Policy("async"), max_age=1, on_stale=on_stale)
        driver.arrive(0)
        driver.producer_done()
        driver.consumer_done()
        assert driver.arrive(1)[-1] == StartConsumer(1, 0, "warp", 1, False)
        driver.consumer_done()
        last = driver.arrive(2)[-1]
        if on_stale == "whole":
            assert last == StartConsumer(2, None, "whole", 0, True)
        else:
            assert last == FailFrame(2, "the newest cache is 2 frames old and max_age is 1")


def test_a_producer_that_fails_before_the_first_cache_holds_nothing_up() -> None:
    driver = Driver(Policy("async"))
    driver.arrive(0)
    assert driver.producer_failed() == [StartConsumer(0, None, "whole", 0, True)]
    driver.consumer_done()
    # The next frame does not wait for the producer's next try ...
    assert driver.arrive(1) == [StartProducer(0, 0, 1), StartConsumer(1, None, "whole", 0, True)]
    # ... and once that succeeds, the cache is used.
    driver.producer_done()
    driver.consumer_done()
    assert driver.arrive(2)[-1] == StartConsumer(2, 0, "warp", 1, False)


def test_a_foreground_producer_that_fails_leaves_the_last_cache() -> None:
    driver = Driver(Policy("every", period=2))
    driver.arrive(0)
    driver.producer_done()
    driver.consumer_done()
    driver.arrive(2)
    assert driver.producer_failed() == [StartConsumer(2, 0, "warp", 2, True)]


def test_lockstep_does_not_try_a_failed_cache_again() -> None:
    driver = Driver(Policy.lockstep(1))
    run_in_order(driver, 1)
    driver.arrive(1)
    assert driver.consumer_done() == [StartProducer(0, 1, 1)]
    driver.producer_failed()
    assert driver.arrive(2) == [StartConsumer(2, 0, "warp", 2, False)]


# Routed: the exit is somebody else's choice


def test_a_routed_frame_never_waits_for_the_first_cache() -> None:
    driver = Driver(Policy("async"), routed=True)
    assert driver.arrive(0) == [StartProducer(0, 0, 0), StartConsumer(0, None, None, 0, False)]
    assert driver.consumer_done() == []
    driver.producer_done()
    assert driver.arrive(1) == [StartProducer(0, 1, 1), StartConsumer(1, 0, None, 1, False)]


def test_a_routed_frame_has_the_newest_cache_however_old() -> None:
    driver = Driver(Policy("async"), routed=True, max_age=1, on_stale="raise")
    driver.arrive(0)
    driver.producer_done()
    driver.consumer_done()
    assert driver.arrive(50)[-1] == StartConsumer(50, 0, None, 50, False)


def test_full_routed_uses_no_producer_and_leaves_the_exit_open() -> None:
    driver = Driver(Policy("full"), routed=True)
    answers = run_in_order(driver, 3)
    assert [(answer.route, answer.slot, answer.refreshed) for answer in answers] == [(None, None, False)] * 3
    assert not driver.ready


def test_after_a_cut_caches_from_before_it_are_never_named() -> None:
    driver = Driver(Policy("async"), routed=True)
    driver.arrive(0)
    driver.producer_done()
    driver.consumer_done()
    assert driver.arrive(1)[-1] == StartConsumer(1, 0, None, 1, False)  # and the producer starts on frame 1
    driver.consumer_done()
    # Frame 2 begins a scene; the producer of frame 1 ends after that and leaves a cache of the old one.
    assert driver.arrive(2) == [StartConsumer(2, 0, None, 2, False)]
    assert driver.invalidate() == []
    driver.consumer_done()
    assert driver.producer_done() == [StartProducer(0, 0, 2)]
    assert driver.arrive(3)[-1] == StartConsumer(3, None, None, 0, False)
    driver.consumer_done()
    driver.producer_done()
    assert driver.arrive(4)[-1] == StartConsumer(4, 0, None, 2, False)


def test_after_a_cut_every_n_refreshes_at_once() -> None:
    driver = Driver(Policy("every", period=10), routed=True)
    run_in_order(driver, 2)
    driver.arrive(2)
    driver.invalidate()
    driver.consumer_done()
    assert driver.arrive(3) == [StartProducer(0, 1, 3)]
    assert driver.producer_done() == [StartConsumer(3, 1, None, 0, True)]


def test_after_a_cut_lockstep_begins_again_with_the_scenes_first_frame() -> None:
    driver = Driver(Policy.lockstep(3), routed=True)
    run_in_order(driver, 5)
    driver.arrive(5)
    driver.invalidate()
    assert driver.consumer_done() == [StartProducer(0, 1, 5)]
    driver.producer_done()
    ages = []
    for frame in (6, 7, 8, 9):
        driver.arrive(frame)
        assert driver.running is not None
        ages.append(driver.running.age)
        for action in driver.consumer_done():
            assert isinstance(action, StartProducer)
            driver.producer_done()
    assert ages == [1, 2, 3, 3]


@pytest.mark.parametrize(
    ("options", "opening"),
    [
        ({"devices": 0}, "devices, streams and queue_limit are 0, 1, 3; give 1 or more"),
        ({"max_age": -1}, "max_age -1 is negative"),
        ({"on_stale": "wait"}, "unknown on_stale 'wait'"),
        ({"aged_exit": "whole"}, "exit 'whole' reads no cache; choose another"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], opening: str) -> None:
    with pytest.raises(InputError) as caught:
        Driver(Policy("async"), **options)
    assert str(caught.value).startswith(opening)


@pytest.mark.parametrize(
    ("events", "opening"),
    [
        ([FrameArrived(3, 0.0), FrameArrived(3, 0.0)], "frame 3 arrived after frame 3"),
        ([ProducerDone(0, 0, 0, 0.0)], "a producer ended that was not started"),
        ([FrameArrived(0, 0.0), ProducerFailed(0, 0, 7, 0.0)], "a producer ended that was not started"),
        ([ConsumerDone(0, 0.0)], "frame 0 was answered without being asked for"),
        ([FrameArrived(0, 0.0), Invalidated(0, 0.0)], "frame 0 began a scene without being routed"),
    ],
)
def test_events_that_cannot_have_happened_are_refused(events: list[SchedulerEvent], opening: str) -> None:
    scheduler = Scheduler(Policy("async"))
    for event in events[:-1]:
        scheduler.step(event)
    with pytest.raises(WarpcacheError) as caught:
        scheduler.step(events[-1])
    assert str(caught.value).startswith(opening)


def test_a_full_lockstep_queue_refuses_one_more() -> None:
    driver = Driver(Policy.lockstep(0))
    for frame in range(QUEUE_LIMIT + 1):  # one of them is being answered
        assert driver.scheduler.has_room
        driver.arrive(frame)
    assert not driver.scheduler.has_room
    with pytest.raises(WarpcacheError, match=rf"^frame 4 arrived while {QUEUE_LIMIT} frames wait"):
        driver.scheduler.step(FrameArrived(4, 0.0))


def simulate(devices: int, *, frames: int, producer_ms: float, consumer_ms: float, period_ms: float) -> Driver:
    """Drive a scheduler with a virtual clock and fixed costs."""
    driver = Driver(Policy("async"), devices=devices)
    order = itertools.count()
    # (time, tie-breaker, kind, producer)
    events: list[tuple[float, int, str, StartProducer | None]] = [
        (frame * period_ms, next(order), "arrival", None) for frame in range(frames)
    ]
    arrivals = iter(range(frames))
    while events:
        now, _, kind, producer = heapq.heappop(events)
        if kind == "arrival":
            actions = driver.arrive(next(arrivals))
        elif producer is not None:
            actions = driver.producer_done(driver.in_flight.index(producer))
        else:
            actions = driver.consumer_done()
        for action in actions:
            if isinstance(action, StartProducer):
                heapq.heappush(events, (now + producer_ms, next(order), "producer", action))
            elif isinstance(action, StartConsumer):
                heapq.heappush(events, (now + consumer_ms, next(order), "consumer", None))
    return driver


def test_more_devices_mean_younger_caches() -> None:
    """Producers take 3.5 frame periods and consumers a quarter of one: what comes out can be worked out by hand.

    A cache is first used by the fourth frame after its own, at age 4. One device takes a new frame up every time it is
    done, between two arrivals, so it starts on the newest frame, half a period old; it then delivers after 3.5
    periods, again and again: its caches are used at ages 4, 5, 6 and 7 at the most. Four devices take up every frame.
    """
    ages = {
        devices: [
            answer.age
            for answer in simulate(devices, frames=400, producer_ms=3.5, consumer_ms=0.25, period_ms=1.0).answers
        ][50:]
        for devices in (1, 2, 3, 4)
    }
    means = {devices: sum(values) / len(values) for devices, values in ages.items()}
    assert set(ages[4]) == {4}
    assert means[1] > means[2] > means[3] > means[4] == 4
    assert max(ages[1]) <= 7
    assert min(ages[1]) == 4


def test_the_simulation_drops_what_the_consumer_cannot_answer() -> None:
    driver = simulate(1, frames=100, producer_ms=5.0, consumer_ms=2.5, period_ms=1.0)
    assert len(driver.answers) + len(driver.dropped) == 100
    # A consumer that takes 2.5 periods answers 40 frames of 100, give or take the start.
    assert 35 <= len(driver.answers) <= 42

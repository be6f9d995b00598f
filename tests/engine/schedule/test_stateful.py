"""Schedulers of generators that carry state, in any order of events: the state's owner sees every frame, in order."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from warpcache.engine.errors import InputError
from warpcache.engine.schedule.events import (
    Action,
    AdvanceState,
    Answering,
    ConsumerDone,
    ConsumerFailed,
    DropFrame,
    FailFrame,
    FrameArrived,
    ProducerDone,
    ProducerFailed,
    SchedulerEvent,
    SequenceBegan,
    StartConsumer,
    StartProducer,
    StateAdvanced,
)
from warpcache.engine.schedule.policy import Policy
from warpcache.engine.schedule.scheduler import Scheduler

QUEUE_LIMIT = 3


class Owner(RuleBasedStateMachine):
    """Arrivals, ends, failures and new sequences in any order; every action is held against the rules."""

    @initialize(
        policy=st.sampled_from(
            [Policy("full"), Policy("async"), Policy("every", 1), Policy("every", 3)]
            + [Policy.lockstep(age) for age in (0, 1, 3)]
        ),
        max_age=st.none() | st.integers(3, 5),
        on_stale=st.sampled_from(["whole", "raise"]),
    )
    def start(self, policy: Policy, max_age: int | None, on_stale: Any) -> None:
        self.policy = policy
        self.max_age = max_age
        answering = Answering(aged="plain", max_age=max_age, on_stale=on_stale, stateful=True)
        self.scheduler = Scheduler(policy, answering, queue_limit=QUEUE_LIMIT)
        self.frame = -1
        self.sequence: list[int] = []  # what arrived since the last beginning
        self.owned = 0  # how many of these the owner was started on
        self.fates: list[int] = []
        self.arrived: list[int] = []
        self.in_flight: StartProducer | None = None
        self.advancing: AdvanceState | None = None
        self.running: StartConsumer | None = None

    def post(self, event: SchedulerEvent) -> None:
        for action in self.scheduler.step(event):
            self.check(action)
        assert self.scheduler.needed_inputs <= set(self.arrived)
        assert len(self.scheduler.needed_inputs) <= 3 * QUEUE_LIMIT + self.policy.age + 3, "inputs pile up"

    def own(self, frame: int, fresh: bool) -> None:
        assert frame == self.sequence[self.owned], "the owner skipped a frame, or went back"
        assert fresh == (self.owned == 0), "a state that is not the last frame's"
        self.owned += 1

    def check(self, action: Action) -> None:
        match action:
            case StartProducer():
                assert self.in_flight is None, "two producers of one state"
                self.own(action.frame, action.fresh)
                self.in_flight = action
            case AdvanceState():
                assert self.policy.kind == "full"
                assert self.advancing is None
                assert self.running is None
                self.own(action.frame, action.fresh)
                self.advancing = action
            case StartConsumer():
                assert self.running is None
                self.running = action
                self.fates.append(action.frame)
                if self.policy.kind == "full":
                    self.own(action.frame, action.fresh)
                else:
                    assert action.route == "plain", "the whole generator cannot begin in the middle"
                    assert self.max_age is None or action.age <= self.max_age
                    if self.policy.kind == "every":
                        assert action.age < self.policy.period or self.failures
            case DropFrame() | FailFrame():
                self.fates.append(action.frame)

    failures = 0

    @precondition(lambda self: self.scheduler.has_room)
    @rule(gap=st.sampled_from([1, 1, 2]))
    def arrive(self, gap: int) -> None:
        self.frame += gap
        self.arrived.append(self.frame)
        self.sequence.append(self.frame)
        self.post(FrameArrived(self.frame, 0.0))

    @precondition(lambda self: self.in_flight is not None)
    @rule(failed=st.sampled_from([False, False, False, True]))
    def producer_ends(self, failed: bool) -> None:
        ended, self.in_flight = self.in_flight, None
        assert ended is not None
        self.failures += failed
        kind = ProducerFailed if failed else ProducerDone
        self.post(kind(ended.device, ended.slot, ended.frame, 0.0))

    @precondition(lambda self: self.advancing is not None)
    @rule()
    def state_advanced(self) -> None:
        ended, self.advancing = self.advancing, None
        assert ended is not None
        self.post(StateAdvanced(ended.frame, 0.0))

    @precondition(lambda self: self.running is not None)
    @rule(failed=st.booleans())
    def consumer_ends(self, failed: bool) -> None:
        ended, self.running = self.running, None
        assert ended is not None
        self.post((ConsumerFailed if failed else ConsumerDone)(ended.frame, 0.0))

    @rule()
    def begin_again(self) -> None:
        self.frame += 1
        self.sequence, self.owned = [], 0
        self.post(SequenceBegan(self.frame, 0.0))
        self.frame -= 1

    def teardown(self) -> None:
        """Once what is under way has ended, every frame has had its fate, and nothing is owed under ``async``."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(100):
            if self.running is not None:
                self.consumer_ends(False)
            elif self.in_flight is not None:
                self.producer_ends(False)
            elif self.advancing is not None:
                self.state_advanced()
        assert self.scheduler.idle
        assert sorted(self.fates) == self.arrived
        if self.policy.kind in ("async", "every"):
            assert self.owned == len(self.sequence)


Owner.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
test_the_owner_sees_every_frame_in_order = Owner.TestCase


def test_who_cannot_keep_up_takes_no_more() -> None:
    scheduler = Scheduler(Policy("async"), Answering(aged="plain", max_age=2, stateful=True))
    scheduler.step(FrameArrived(0, 0.0))
    scheduler.step(FrameArrived(1, 0.0))
    assert scheduler.has_room
    scheduler.step(FrameArrived(2, 0.0))
    assert not scheduler.has_room
    assert scheduler.behind
    actions = scheduler.step(ProducerDone(0, 0, 0, 0.0))
    assert actions == [StartProducer(0, 1, 1), StartConsumer(2, 0, "plain", 2, True)]
    assert scheduler.has_room


def test_several_producers_are_refused() -> None:
    with pytest.raises(InputError, match=r"^2 producers were asked for, but the generator carries state"):
        Scheduler(Policy("async"), Answering(stateful=True), devices=2)

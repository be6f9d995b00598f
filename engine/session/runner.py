"""Carries out what the scheduler decides for one session, on the threads that meet there.

Notes to developers. Decisions are the scheduler's. Three kinds of threads meet here: the *reader*, which iterates over
`Session.render` or `Session.frames` and on which every exit runs (the answer then needs no change of threads); a thread
that submits; and producer streams, which report the end of their work. Each of them posts events, and
`FrameRunner.post` turns one event at a time into actions under the session's lock: producers are started right there,
work for the reader is queued. The reader posts the end of an exit only when it comes back for the next frame, so that a
frame is chosen when it can run, and a slow caller gets the newest one.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..bundle.roles import Role
from ..device.stream import Event
from ..errors import ClosedError, DeadlineError, InputError
from ..promise.calibration import Rule
from ..routing.runner import RoutedAnswer, Routing
from ..schedule.events import (
    AdvanceState,
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
from ..spec import Array
from ..telemetry import AnsweredFrame, Telemetry
from .clock import Clock
from .frame import Frame
from .parts import SessionParts
from .source import FrameSource

__all__ = ["FrameRunner"]

logger = logging.getLogger(__name__)

_Work = StartProducer | StartConsumer | AdvanceState | FailFrame


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A frame's inputs and when they arrived; with a quality, the frame's own rule and deadline where it has them."""

    inputs: dict[str, Array]
    time: float
    rule: Rule | None = None
    deadline_ms: float | None = None


class FrameRunner:
    """Runs one session's frames.

    Args:
        parts: What the engine gave the session.
        clock: Where time comes from.
        telemetry: The session's counters.
    """

    def __init__(self, parts: SessionParts, clock: Clock, telemetry: Telemetry) -> None:
        self._parts = parts
        self._clock = clock
        self._scheduler = parts.scheduler
        self._workspace = parts.workspace
        self._telemetry = telemetry
        self._condition = threading.Condition(threading.RLock())
        self._reading = threading.Lock()
        # Everything below is guarded by the condition.
        self._inbox: deque[SchedulerEvent] = deque()
        self._draining = False
        self._work: deque[tuple[_Work, _Arrival]] = deque()
        self._arrivals: dict[int, _Arrival] = {}
        self._next_index = 0
        self._ended: ConsumerDone | ConsumerFailed | None = None  # the reader's alone
        self._finished = False
        self._closed = False
        self._fault: BaseException | None = None
        self._routing: Routing | None = None
        if parts.plan is not None:
            self._routing = Routing(
                parts.plan,
                parts.workspace,
                telemetry=telemetry,
                now=clock.now,
                turn=parts.turn,
                post=self.post,
                lock=self._condition,
            )

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def ended(self) -> bool:
        """Whether no more input comes."""
        return self._finished or self._closed

    @property
    def quiet(self) -> bool:
        """Whether every frame that arrived has its answer."""
        with self._condition:
            return self._scheduler.idle and not self._work

    @property
    def has_room(self) -> bool:
        """Whether one more frame may arrive."""
        with self._condition:
            return self._scheduler.has_room

    def require_open(self) -> None:
        """Raise ClosedError where no more input is taken."""
        if self._closed:
            raise ClosedError("the session is closed; open a new one with engine.session()")
        if self._finished:
            raise ClosedError("the session is finished and takes no more input; open a new one with engine.session()")

    def finish(self) -> None:
        """Declare that no more input comes; safe to call twice."""
        with self._condition:
            self._finished = True
            self._condition.notify_all()

    def reset(self) -> None:
        """Begin another sequence with the next frame: what waits is dropped, caches and state are left behind."""
        with self._condition:
            self.require_open()
            self.post(SequenceBegan(self._next_index, self._clock.now()))

    def close(self) -> None:
        """Stop: what waits is forgotten, producers that run end unheard. Safe to call twice."""
        with self._condition:
            self._closed = True
            self._work.clear()
            self._arrivals.clear()
            self._condition.notify_all()
        # Not under the condition: a producer that is waited for posts its end there.
        if self._routing is not None:
            self._routing.close()
        self._workspace.close()

    def now(self) -> float:
        """Seconds on the session's clock."""
        return self._clock.now()

    def prepared(self, ms: float) -> None:
        """Count the time that checking a frame's inputs took."""
        self._telemetry.copied(ms)

    def reject(self) -> None:
        """Count a frame that was refused for its inputs, and pass over its index."""
        self._telemetry.rejected()
        with self._condition:
            self._next_index += 1

    def submit(
        self,
        inputs: dict[str, Array],
        arrived: float,
        *,
        timeout: float | None,
        rule: Rule | None,
        deadline_ms: float | None,
    ) -> int:
        """Wait for room, then let the frame arrive; returns its index.

        Raises:
            DeadlineError: If there was no room in time.
            ClosedError: If the session is closed or finished.
        """
        until = None if timeout is None else arrived + timeout
        with self._condition:
            while not self._scheduler.has_room and not self.ended:
                left = None if until is None else until - self._clock.now()
                if left is not None and left <= 0:
                    raise DeadlineError(
                        f"the session's queue stayed full for {timeout} s; read frames() from another thread"
                    )
                self._clock.wait(self._condition, left)
            self.require_open()
            return self.arrive(inputs, arrived, rule=rule, deadline_ms=deadline_ms)

    def arrive(
        self,
        inputs: dict[str, Array],
        arrived: float,
        *,
        rule: Rule | None = None,
        deadline_ms: float | None = None,
    ) -> int:
        """Give the next frame its index and hand it to the scheduler."""
        with self._condition:
            index = self._next_index
            self._next_index += 1
            self._arrivals[index] = _Arrival(inputs, arrived, rule, deadline_ms)
            self.post(FrameArrived(index, arrived))
            return index

    def next_frame(self, source: FrameSource) -> Frame:
        """Run what is due on the calling thread until a frame is answered."""
        if not self._reading.acquire(blocking=False):
            raise InputError("two threads read from one session; read from one, or open a session for each")
        try:
            if source.period_ms is not None:
                # What became due while the caller was away arrives before the consumer is free: the newest is chosen.
                source.feed()
            if self._ended is not None:
                ended, self._ended = self._ended, None
                self.post(ended)
                if self._routing is not None:
                    self._routing.between_frames()
            while True:
                if not self._work:
                    # Nothing waits yet, so this is off every frame's latency.
                    self._workspace.reserve()
                    source.prepare_ahead()
                due = source.feed()
                work = self._take(due, source)
                if work is not None and (frame := self._perform(*work, period_ms=source.period_ms)) is not None:
                    return frame
        finally:
            self._reading.release()

    # Carrying out decisions

    def _take(self, due: float | None, source: FrameSource) -> tuple[_Work, _Arrival] | None:
        """Wait for work; None when the next frame is due.

        Raises:
            StopIteration: If no work will come any more.
            ClosedError: If the session was closed under a reader that had more to do.
        """
        with self._condition:
            while not self._work:
                if self._fault is not None:
                    raise self._fault
                if self._closed:
                    source.closed()
                if due is None and source.exhausted and self._scheduler.idle:
                    raise StopIteration
                left = None if due is None else due - self._clock.now()
                if left is not None and left <= 0:
                    return None
                self._clock.wait(self._condition, left)
            return self._work.popleft()

    def post(self, event: SchedulerEvent) -> None:
        """Let the scheduler decide, and start what it decides; any thread."""
        with self._condition:
            if self._closed:
                return
            self._inbox.append(event)
            # Re-entered by an action below, on this thread: a producer that could not even start has failed. The loop
            # that is running takes the event, since the scheduler sees them one after the other.
            if self._draining:
                return
            self._draining = True
            try:
                while self._inbox and self._fault is None:
                    event = self._inbox.popleft()
                    for action in self._scheduler.step(event):
                        if isinstance(action, DropFrame):
                            self._telemetry.dropped()
                        elif isinstance(action, StartProducer) and not self._scheduler.policy.foreground:
                            self._start_producer(action, self._arrivals[action.frame])
                        else:
                            self._work.append((action, self._arrivals[action.frame]))
                    arrived = isinstance(event, FrameArrived)
                    if arrived and self._scheduler.behind and self._telemetry.fell_behind() == 1:
                        logger.warning(
                            "the module that carries the state cannot keep up with the frames, which now wait for it "
                            "(how often is counted in the session's statistics); lower the frame rate"
                        )
                    needed = self._scheduler.needed_inputs
                    for index in [index for index in self._arrivals if index not in needed]:
                        del self._arrivals[index]
            except BaseException as exc:
                # A bug of ours, perhaps on a producer's thread, where nobody would see it: the reader is to raise it.
                self._fault = exc
            finally:
                self._draining = False
                self._condition.notify_all()

    def _perform(self, action: _Work, arrival: _Arrival, *, period_ms: float | None) -> Frame | None:
        if isinstance(action, StartConsumer):
            return self._answer(action, arrival, period_ms)
        if isinstance(action, StartProducer):
            self._produce(action, arrival)
            return None
        if isinstance(action, AdvanceState):
            self._advance(action, arrival)
            return None
        self._telemetry.failed()
        raise DeadlineError(
            f"frame {action.frame} cannot be answered: {action.reason}; "
            "raise max_age, or let the whole generator answer with on_stale='whole'"
        )

    def _answer(self, action: StartConsumer, arrival: _Arrival, period_ms: float | None) -> Frame | None:
        """Run a frame's exit here and now; None where it was dropped because none could answer it in time."""
        started = self._clock.now()
        deadline_ms = arrival.deadline_ms
        if deadline_ms is None and self._parts.plan is not None:
            deadline_ms = self._parts.plan.deadline_ms
        try:
            if self._routing is not None:
                answer = self._routing.answer(
                    action,
                    arrival.inputs,
                    rule=arrival.rule,
                    deadline=None if deadline_ms is None else arrival.time + deadline_ms / 1e3,
                )
            else:
                answer = self._run(action, arrival.inputs)
        except BaseException:
            self._telemetry.failed()
            self._ended = ConsumerFailed(action.frame, self._clock.now())
            raise
        ended = self._clock.now()
        if answer is None:
            # Nobody gets this frame, so that nobody comes back for the next one.
            self.post(ConsumerDone(action.frame, ended))
            return None
        self._ended = ConsumerDone(action.frame, ended)
        latency_ms = (ended - arrival.time) * 1e3
        refreshed = action.refreshed or answer.exit == self._scheduler.whole
        self._telemetry.answered(
            AnsweredFrame(
                answer.exit,
                answer.age,
                refreshed=refreshed,
                late=(period_ms is not None and latency_ms > period_ms)
                or (deadline_ms is not None and latency_ms > deadline_ms),
                latency_ms=latency_ms,
                wait_ms=(started - arrival.time) * 1e3,
                consumer_ms=answer.exit_ms,
                degraded=answer.degraded is not None,
            )
        )
        return Frame(
            action.frame,
            answer.outputs,
            answer.age,
            answer.exit,
            latency_ms,
            refreshed,
            answer.predicted,
            answer.degraded,
        )

    def _run(self, action: StartConsumer, inputs: Mapping[str, Any]) -> RoutedAnswer:
        """Run the exit that the scheduler chose."""
        assert action.route is not None, "a frame was left to a router, and there is none"
        started = self._clock.now()
        lane = self._workspace.exit(action.route)
        outputs = lane.take_outputs()
        with self._parts.turn:
            lane.enqueue(inputs, action.slot, outputs, fresh=action.fresh).wait()
        return RoutedAnswer(action.route, outputs, action.age, None, None, (self._clock.now() - started) * 1e3)

    def _produce(self, action: StartProducer, arrival: _Arrival) -> None:
        """Run a producer in the foreground."""
        started = self._clock.now()
        try:
            with self._parts.turn:
                self._issue(action, arrival).wait()
        except Exception as exc:
            self._producer_ended(action, started, exc)
        except BaseException as exc:
            # An interrupt goes on to the caller, but the scheduler must not wait for this producer for ever.
            self._producer_ended(action, started, exc)
            raise
        else:
            self._producer_ended(action, started, None)

    def _start_producer(self, action: StartProducer, arrival: _Arrival) -> None:
        """Queue a producer on its stream; never blocks."""
        started = self._clock.now()

        def ended(event: Event) -> None:
            self._producer_ended(action, started, event.error)

        try:
            event = self._issue(action, arrival)
        except Exception as exc:
            self._producer_ended(action, started, exc)
        else:
            event.add_done_callback(ended)

    def _issue(self, action: StartProducer, arrival: _Arrival) -> Event:
        lane = self._workspace.lane(Role.PRODUCER, action.device)
        return lane.enqueue(arrival.inputs, action.slot, {}, fresh=action.fresh)

    def _advance(self, action: AdvanceState, arrival: _Arrival) -> None:
        """Run the whole generator on a frame whose answer nobody waits for, because it owns the state."""
        whole = self._scheduler.whole
        assert whole is not None, "a state was to be advanced without the whole generator"
        lane = self._workspace.exit(whole)
        try:
            with self._parts.turn:
                lane.enqueue(arrival.inputs, None, lane.take_outputs(), fresh=action.fresh).wait()
        except Exception as exc:
            self._state_missed(action.frame, exc)
        finally:
            self.post(StateAdvanced(action.frame, self._clock.now()))

    def _state_missed(self, frame: int, error: BaseException) -> None:
        """Count a frame that the state knows nothing of, because its owner failed there."""
        if self._telemetry.producer_failed(error) == 1:
            logger.warning(
                "the state was not advanced by frame %d and stays what it was before (further failures are counted in "
                "the session's statistics)",
                frame,
                exc_info=error,
            )

    def _producer_ended(self, action: StartProducer, started: float, error: BaseException | None) -> None:
        """Count a producer's end and tell the scheduler; any thread."""
        now = self._clock.now()
        if error is None:
            self._telemetry.produced((now - started) * 1e3)
            self.post(ProducerDone(action.device, action.slot, action.frame, now))
            return
        if self._closed:
            return
        if self._telemetry.producer_failed(error) == 1:
            logger.warning(
                "a producer failed on frame %d; the session goes on with what it has (further failures are "
                "counted in its statistics)",
                action.frame,
                exc_info=error,
            )
        self.post(ProducerFailed(action.device, action.slot, action.frame, now))

"""One client's sequence of frames through an engine: its inputs, caches, scheduler and statistics.

Notes to developers. Decisions are the scheduler's; this file carries them out. Three kinds of threads meet here: the
*reader*, which iterates over `Session.render` or `Session.frames` and on which every exit runs (the answer then needs
no change of threads); a thread that submits; and producer streams, which report the end of their work. Each
of them posts events, and `Session._post` turns one event at a time into actions under the session's lock: producers
are started right there, work for the reader is queued. The reader posts the end of an exit only when it comes back
for the next frame, so that a frame is chosen when it can run, and a slow caller gets the newest one.
"""

from __future__ import annotations

import difflib
import logging
import math
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..device.stream import Event
from ..errors import ClosedError, DeadlineError, InputError
from ..promise.calibration import Quality, Rule
from ..routing.runner import RoutedAnswer
from ..schedule.events import (
    ConsumerDone,
    ConsumerFailed,
    DropFrame,
    FailFrame,
    FrameArrived,
    ProducerDone,
    ProducerFailed,
    SchedulerEvent,
    StartConsumer,
    StartProducer,
)
from ..spec import Array, TensorSpec
from ..telemetry import SessionStatistics, Telemetry
from .clock import Clock, MonotonicClock
from .frame import Frame
from .reader import Reader, Rendering, Submitted

if TYPE_CHECKING:
    from ..engine import Engine

__all__ = ["Session"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A frame's inputs and when they arrived; with a quality, the frame's own rule and deadline where it has them."""

    inputs: dict[str, Array]
    time: float
    rule: Rule | None = None
    deadline_ms: float | None = None


class Session:
    """One client's frames. Made by `Engine.session`; owns the caches, the engine owns none.

    Either `render` a stream of inputs, or `submit` frames from one thread and iterate over `frames` in another. An
    iterator that has raised an error goes on with the next frame when it is asked again.

    Args:
        engine: What answers; it must outlive the session.
        clock: Where time comes from; tests give their own.
    """

    def __init__(self, engine: Engine, *, clock: Clock | None = None) -> None:
        self._engine = engine
        self._clock: Clock = MonotonicClock() if clock is None else clock
        self._scheduler = engine.new_scheduler()
        self._workspace = engine.workspace(self._scheduler.slots)
        self._specs: dict[str, TensorSpec] = {record.spec.name: record.spec for record in engine.manifest.inputs}
        self._telemetry = Telemetry(graphs=self._workspace.graphs)
        self._condition = threading.Condition(threading.RLock())
        self._reading = threading.Lock()
        # Everything below is guarded by the condition.
        self._inbox: deque[SchedulerEvent] = deque()
        self._draining = False
        self._work: deque[tuple[StartProducer | StartConsumer | FailFrame, _Arrival]] = deque()
        self._arrivals: dict[int, _Arrival] = {}
        self._next_index = 0
        self._ended: ConsumerDone | ConsumerFailed | None = None  # the reader's alone
        self._finished = False
        self._closed = False
        self._fault: BaseException | None = None
        self._routing = engine.new_routing(
            self._workspace,
            telemetry=self._telemetry,
            now=self._clock.now,
            post=self._post,
            lock=self._condition,
        )

    @property
    def statistics(self) -> SessionStatistics:
        """What the session has done so far."""
        return self._telemetry.snapshot()

    def render(self, inputs: Mapping[str, Any], *, fps: float | None = None) -> Iterator[Frame]:
        """Answer a stream of inputs.

        Args:
            inputs: One array per input of the bundle, its leading axis time instead of the batch axis of 1; an array of
                leading extent 1 never changes. They are not copied where they are C-contiguous: leave them as they are
                until the last frame is answered. On a GPU also arrays there (DLPack, `__cuda_array_interface__`).
            fps: Frames arrive at this rate, in real time, from the first time the iterator is asked, and under a live
                policy the newest input wins. None: a frame arrives when the one before it was answered.

        Returns:
            An iterator over the answered frames, in order.

        Raises:
            InputError: At once if names, dtypes, shapes or lengths are wrong; from the iterator, before the frame
                runs, if a frame's inputs hold NaN or Inf.
            DeadlineError: From the iterator, if no young enough cache is there and the engine was told to raise.
            BackendError: From the iterator, if the frame's exit failed.
            ClosedError: If the session is closed or finished.
        """
        if fps is not None and not (math.isfinite(fps) and fps > 0):
            raise InputError(f"fps is {fps}; give a positive number of frames per second, or None for no pacing")
        self._require_open()
        return Rendering(self, inputs, fps)

    def submit(
        self,
        inputs: Mapping[str, Any],
        *,
        timeout: float | None = None,
        quality: Quality | None = None,
        deadline_ms: float | None = None,
    ) -> int:
        """Hand in the inputs of one frame; `frames` gives the answer. Safe from any thread.

        The arrays are copied, so the caller may use them again at once. Under a live policy a frame that still waits
        is dropped for this one; under lockstep nothing is dropped, and the call waits while the queue is full.

        On a GPU, arrays that are there already are borrowed instead, by DLPack or `__cuda_array_interface__`, in order
        on their owner's stream: leave them as they are until the frame, and a producer that took it, have ended
        (`Engine.synchronize`). Their values are not looked at, whatever `validate` says.

        Args:
            inputs: One array per input of the bundle, leading axis 1.
            timeout: Seconds to wait for room under lockstep; None waits for as long as it takes.
            quality: What this frame is to keep; None is the engine's quality. One that was not asked for before costs
                this call some time, and no other.
            deadline_ms: Milliseconds from this call that the frame's answer may take; None is the engine's deadline.

        Returns:
            The frame's index.

        Raises:
            InputError: If names, dtype or shape are wrong, a value is NaN or Inf, or the quality cannot be promised; no
                index is used up.
            DeadlineError: If there was no room in time.
            ClosedError: If the session is closed or finished.
        """
        arrived = self._clock.now()
        self._require_open()
        try:
            rule = None if quality is None else self._engine.rule_for(quality)
            if deadline_ms is not None:
                deadline_ms = self._engine.frame_deadline(deadline_ms)
            adopted = self.adopt(inputs)
            taken = {name: self.take_input(name, array, keep=True) for name, array in adopted.items()}
        except InputError:
            self._telemetry.rejected()
            raise
        self._telemetry.copied((self._clock.now() - arrived) * 1e3)
        until = None if timeout is None else arrived + timeout
        with self._condition:
            while not self._scheduler.has_room and not self._closed and not self._finished:
                left = None if until is None else until - self._clock.now()
                if left is not None and left <= 0:
                    raise DeadlineError(
                        f"the session's queue stayed full for {timeout} s; read frames() from another thread"
                    )
                self._clock.wait(self._condition, left)
            self._require_open()
            return self.arrive(taken, arrived, rule=rule, deadline_ms=deadline_ms)

    def frames(self) -> Iterator[Frame]:
        """The answers to submitted frames, in order, as they come; ends after `finish` or `close`.

        Raises:
            DeadlineError: From the iterator, if no young enough cache is there and the engine was told to raise.
            BackendError: From the iterator, if the frame's exit failed.
            ClosedError: If the session is closed.
        """
        if self._closed:
            raise ClosedError("the session is closed; open a new one with engine.session()")
        return Submitted(self)

    def finish(self) -> None:
        """Declare that no more input comes: `frames` ends after what was submitted. Safe to call twice."""
        with self._condition:
            self._finished = True
            self._condition.notify_all()

    def close(self) -> None:
        """Stop: what waits is forgotten, `frames` ends, producers that run end unheard. Safe to call twice."""
        with self._condition:
            self._closed = True
            self._work.clear()
            self._arrivals.clear()
            self._condition.notify_all()
        # Not under the condition: a producer that is waited for posts its end there.
        if self._routing is not None:
            self._routing.close()
        self._workspace.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # What the readers below need of the session.

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

    def adopt(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """See the caller's inputs as arrays that the device can take, without a copy.

        Raises:
            InputError: If `inputs` has not exactly the inputs that the engine's modules take, or one is no array.
        """
        known = list(self._specs)
        for name in inputs:
            if name not in self._specs:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"the bundle takes {_listed(known)}"
                raise InputError(f"unexpected input {name!r}; {hint}")
        missing = [name for name in known if name in self._engine.required_inputs and name not in inputs]
        if missing:
            given = _listed(list(inputs)) if inputs else "none"
            raise InputError(f"input {_listed(missing)} is missing; the inputs given are {given}")
        return {name: self._workspace.adopt(self._specs[name], array) for name, array in inputs.items()}

    def take_input(self, name: str, array: Any, *, keep: bool) -> Any:
        """Check one input of one frame, and make of it what the device takes; `keep` copies it."""
        return self._workspace.take_input(self._specs[name], array, finite=self._engine.validate, keep=keep)

    def spec(self, name: str) -> TensorSpec:
        """The spec of one input."""
        return self._specs[name]

    def reject(self) -> None:
        """Count a frame that was refused for its inputs, and pass over its index."""
        self._telemetry.rejected()
        with self._condition:
            self._next_index += 1

    def prepared(self, ms: float) -> None:
        """Count the time that checking a frame's inputs took."""
        self._telemetry.copied(ms)

    def now(self) -> float:
        """Seconds on the session's clock."""
        return self._clock.now()

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
            self._post(FrameArrived(index, arrived))
            return index

    def next_frame(self, reader: Reader) -> Frame:
        """Run what is due on the calling thread until a frame is answered."""
        if not self._reading.acquire(blocking=False):
            raise InputError("two threads read from one session; read from one, or open a session for each")
        try:
            if reader.period_ms is not None:
                # What became due while the caller was away arrives before the consumer is free: the newest is chosen.
                reader.feed()
            if self._ended is not None:
                ended, self._ended = self._ended, None
                self._post(ended)
                if self._routing is not None:
                    self._routing.between_frames()
            while True:
                if not self._work:
                    # Nothing waits yet, so this is off every frame's latency.
                    self._workspace.reserve()
                    reader.prepare_ahead()
                due = reader.feed()
                work = self._take(due, reader)
                if work is not None and (frame := self._perform(*work, period_ms=reader.period_ms)) is not None:
                    return frame
        finally:
            self._reading.release()

    # Carrying out decisions

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError("the session is closed; open a new one with engine.session()")
        if self._finished:
            raise ClosedError("the session is finished and takes no more input; open a new one with engine.session()")

    def _take(
        self, due: float | None, reader: Reader
    ) -> tuple[StartProducer | StartConsumer | FailFrame, _Arrival] | None:
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
                    reader.closed()
                if due is None and reader.exhausted and self._scheduler.idle:
                    raise StopIteration
                left = None if due is None else due - self._clock.now()
                if left is not None and left <= 0:
                    return None
                self._clock.wait(self._condition, left)
            return self._work.popleft()

    def _post(self, event: SchedulerEvent) -> None:
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
                    for action in self._scheduler.step(self._inbox.popleft()):
                        if isinstance(action, DropFrame):
                            self._telemetry.dropped()
                        elif isinstance(action, StartProducer) and not self._engine.policy.foreground:
                            self._start_producer(action, self._arrivals[action.frame])
                        else:
                            self._work.append((action, self._arrivals[action.frame]))
                    needed = self._scheduler.needed_inputs
                    for index in [index for index in self._arrivals if index not in needed]:
                        del self._arrivals[index]
            except BaseException as exc:
                # A bug of ours, perhaps on a producer's thread, where nobody would see it: the reader is to raise it.
                self._fault = exc
            finally:
                self._draining = False
                self._condition.notify_all()

    def _perform(
        self, action: StartProducer | StartConsumer | FailFrame, arrival: _Arrival, *, period_ms: float | None
    ) -> Frame | None:
        if isinstance(action, StartConsumer):
            return self._answer(action, arrival, period_ms)
        if isinstance(action, StartProducer):
            self._produce(action, arrival)
            return None
        self._telemetry.failed()
        raise DeadlineError(
            f"frame {action.frame} cannot be answered: {action.reason}; "
            "raise max_age, or let the whole generator answer with on_stale='whole'"
        )

    def _answer(self, action: StartConsumer, arrival: _Arrival, period_ms: float | None) -> Frame | None:
        """Run a frame's exit here and now; None where it was dropped because none could answer it in time."""
        started = self._clock.now()
        deadline_ms = self._engine.deadline_ms if arrival.deadline_ms is None else arrival.deadline_ms
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
            self._post(ConsumerDone(action.frame, ended))
            return None
        self._ended = ConsumerDone(action.frame, ended)
        latency_ms = (ended - arrival.time) * 1e3
        refreshed = action.refreshed or answer.exit == "whole"
        self._telemetry.answered(
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
        outputs = self._workspace.take_outputs()
        with self._engine.turn:
            lane.enqueue(inputs, action.slot, outputs).wait()
        return RoutedAnswer(action.route, outputs, action.age, None, None, (self._clock.now() - started) * 1e3)

    def _produce(self, action: StartProducer, arrival: _Arrival) -> None:
        """Run a producer in the foreground."""
        started = self._clock.now()
        try:
            with self._engine.turn:
                self._workspace.producer(action.device).enqueue(arrival.inputs, action.slot, {}).wait()
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
            event = self._workspace.producer(action.device).enqueue(arrival.inputs, action.slot, {})
        except Exception as exc:
            self._producer_ended(action, started, exc)
        else:
            event.add_done_callback(ended)

    def _producer_ended(self, action: StartProducer, started: float, error: BaseException | None) -> None:
        """Count a producer's end and tell the scheduler; any thread."""
        now = self._clock.now()
        if error is None:
            self._telemetry.produced((now - started) * 1e3)
            self._post(ProducerDone(action.device, action.slot, action.frame, now))
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
        self._post(ProducerFailed(action.device, action.slot, action.frame, now))


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names))

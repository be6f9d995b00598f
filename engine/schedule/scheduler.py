"""Decisions without I/O: which frame is answered when, by which exit, from which cache, and what producers work on.

The scheduler is a pure state machine: events in, actions out. It holds no thread, clock, memory or device. A session
drives it with real events; a simulation drives the same object with a virtual clock; property tests drive it
with adversarial orders. It names frames by their index, devices and slots by number, and so it can be driven from
another process or machine as well.

Rules that hold under every policy:

- Frames are answered in the order they arrived, one at a time.
- Every frame that arrived is answered, dropped or failed, exactly once.
- Once there is a cache, no frame waits for a producer under ``async``.
- A slot has one writer or any number of readers (`SlotRing` raises otherwise).
- A failing producer never stops answers: the last cache serves on, within `max_age`.

In a *routed* session somebody else chooses the exit, when it knows more: `StartConsumer.route` is None, and the slot is
the newest cache's, however old. No frame waits for the first cache under ``async``, none fails for want of a young one,
and `Invalidated` says that a frame began another scene: no cache of an earlier frame is named from then on.
"""

from __future__ import annotations

from collections import deque

from ..bundle.roles import Route
from ..errors import InputError, WarpcacheError
from .events import (
    Action,
    ConsumerDone,
    ConsumerFailed,
    DropFrame,
    FailFrame,
    FrameArrived,
    Invalidated,
    OnStale,
    ProducerDone,
    ProducerFailed,
    SchedulerEvent,
    StartConsumer,
    StartProducer,
)
from .policy import Policy
from .slots import CachedFrame, SlotRing

__all__ = ["Scheduler"]


class Scheduler:
    """Decides what runs next for one session.

    Args:
        policy: When producers run.
        devices: Number of devices that producers run on; actions name them 0 to ``devices - 1``.
        streams: Producers in flight at once on each device.
        aged_exit: Which exit answers at an age above 0; at age 0 it is always ``plain``, which is exact there.
        max_age: The oldest cache that a frame may be answered from, in frames; None is no limit.
        on_stale: What happens to a frame without a young enough cache: ``whole`` lets the whole generator answer it,
            ``raise`` fails it.
        queue_limit: Frames that may wait where none is dropped (lockstep).
        routed: Leave the exit of every frame open; `aged_exit`, `max_age` and `on_stale` then decide nothing.

    Raises:
        InputError: If an argument is out of range.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        devices: int = 1,
        streams: int = 1,
        aged_exit: Route = "warp",
        max_age: int | None = None,
        on_stale: OnStale = "whole",
        queue_limit: int = 8,
        routed: bool = False,
    ) -> None:
        if devices < 1 or streams < 1 or queue_limit < 1:
            raise InputError(
                f"devices, streams and queue_limit are {devices}, {streams}, {queue_limit}; give 1 or more"
            )
        if max_age is not None and max_age < 0:
            raise InputError(f"max_age {max_age} is negative; give 0 or more frames, or None for no limit")
        if on_stale not in ("whole", "raise"):
            raise InputError(f"unknown on_stale {on_stale!r}; choose 'whole' or 'raise'")
        if aged_exit == "whole":
            raise InputError("exit 'whole' reads no cache; choose another, or policy='full' for the whole generator")
        self.policy = policy
        self._routed = routed
        self._aged_exit = aged_exit
        self._max_age = max_age
        self._on_stale = on_stale
        self._queue_limit = 1 if policy.live else queue_limit
        # In the foreground one producer runs at a time, and the last cache is kept in case it fails.
        self._ring = SlotRing(2 if policy.foreground else devices * streams + 2)
        self._idle_streams = [1 if policy.foreground else streams for _ in range(devices)]
        self._in_flight: dict[int, StartProducer] = {}  # by slot
        self._pending: deque[int] = deque()
        self._history: deque[int] = deque()  # lockstep: arrived frames that a producer may still be asked for
        self._newest_frame = -1
        self._newest_produced = -1
        self._scene_start = 0  # caches of frames before it are of another scene
        self._current: StartConsumer | None = None
        self._refreshing: int | None = None  # the frame that waits for a producer in the foreground
        self._failed_cache: int | None = None  # lockstep: the frame whose cache could not be made
        self._waited_for_first = False
        self._failed_before_first = False

    @property
    def slots(self) -> int:
        """Number of cache slots that the actions name."""
        return self._ring.capacity

    @property
    def has_room(self) -> bool:
        """Whether one more frame may arrive now; under a live policy always, since an older one makes room."""
        return self.policy.live or len(self._pending) < self._queue_limit

    @property
    def idle(self) -> bool:
        """Whether no arrived frame is without its answer."""
        return not self._pending and self._current is None and self._refreshing is None

    @property
    def needed_inputs(self) -> set[int]:
        """The frames whose inputs a later action may name; those of all others can be let go.

        Actions already given out count as having taken their inputs.
        """
        needed = {*self._pending, *self._history}
        if self._refreshing is not None:
            needed.add(self._refreshing)
        if not self.policy.foreground and self._newest_produced < self._newest_frame:
            needed.add(self._newest_frame)
        return needed

    def step(self, event: SchedulerEvent) -> list[Action]:
        """Take in one event and decide.

        Args:
            event: What happened. Every started producer and consumer is answered by exactly one event.

        Returns:
            What to do now, in this order; often nothing.

        Raises:
            WarpcacheError: If the event cannot have happened, for example the end of a producer never started.
        """
        actions: list[Action] = []
        match event:
            case FrameArrived():
                self._arrive(event.frame, actions)
            case ProducerDone():
                self._end_producer(event)
                self._ring.finish_write(event.slot)
                self._failed_before_first = False
                self._end_refresh(actions)
            case ProducerFailed():
                self._end_producer(event)
                self._ring.abandon_write(event.slot)
                self._failed_before_first = self._ring.newest is None
                self._failed_cache = event.frame
                self._end_refresh(actions)
            case ConsumerDone() | ConsumerFailed():
                self._end_consumer(event.frame)
            case Invalidated():
                self._begin_scene(event.frame)
        if not self.policy.foreground:
            self._start_producers(actions)
        self._answer_pending(actions)
        if self.policy.kind == "lockstep":
            self._prepare_next(actions)
        return actions

    # Events

    def _arrive(self, frame: int, actions: list[Action]) -> None:
        if frame <= self._newest_frame:
            raise _impossible(f"frame {frame} arrived after frame {self._newest_frame}")
        if self.policy.live:
            actions.extend(DropFrame(stale) for stale in self._pending)
            self._pending.clear()
        elif len(self._pending) >= self._queue_limit:
            raise _impossible(f"frame {frame} arrived while {len(self._pending)} frames wait")
        self._newest_frame = frame
        self._pending.append(frame)
        if self.policy.kind == "lockstep":
            self._history.append(frame)

    def _end_producer(self, event: ProducerDone | ProducerFailed) -> None:
        started = StartProducer(event.device, event.slot, event.frame)
        if self._in_flight.get(event.slot) != started:
            raise _impossible(f"a producer ended that was not started ({started})")
        del self._in_flight[event.slot]
        self._idle_streams[event.device] += 1

    def _end_refresh(self, actions: list[Action]) -> None:
        """A producer in the foreground has ended, well or not: the frame that waited for it is answered."""
        if self._refreshing is not None:
            frame, self._refreshing = self._refreshing, None
            self._answer(frame, actions, refreshed=True)

    def _end_consumer(self, frame: int) -> None:
        if self._current is None or self._current.frame != frame:
            raise _impossible(f"frame {frame} was answered without being asked for")
        if self._current.slot is not None:
            self._ring.release(self._current.slot)
        self._current = None

    def _begin_scene(self, frame: int) -> None:
        if not self._routed or self._current is None or self._current.frame != frame:
            raise _impossible(f"frame {frame} began a scene without being routed")
        self._scene_start = frame
        # Lockstep: until the scene is old enough its first frame stands in, as the very first frame does at the start.
        while self._history and self._history[0] < frame:
            self._history.popleft()

    # Decisions

    @property
    def _newest(self) -> CachedFrame | None:
        """The newest cache of this scene."""
        newest = self._ring.newest
        return None if newest is None or newest.frame < self._scene_start else newest

    def _start_producers(self, actions: list[Action]) -> None:
        """Put an idle stream to work on the newest frame; older frames are never worth a producer any more."""
        device = max(range(len(self._idle_streams)), key=self._idle_streams.__getitem__)
        if self._idle_streams[device] > 0 and self._newest_produced < self._newest_frame:
            self._start_producer(device, self._newest_frame, actions)

    def _start_producer(self, device: int, frame: int, actions: list[Action]) -> None:
        action = StartProducer(device, self._ring.begin_write(frame), frame)
        self._in_flight[action.slot] = action
        self._idle_streams[device] -= 1
        self._newest_produced = frame
        actions.append(action)

    def _answer_pending(self, actions: list[Action]) -> None:
        while self._pending and self._current is None and not (self.policy.foreground and self._in_flight):
            if self.policy.kind == "full":
                if self._routed:
                    self._answer(self._pending.popleft(), actions, refreshed=False)
                else:
                    self._answer_whole(self._pending.popleft(), actions)
            elif self.policy.kind == "async":
                if not self._routed and self._ring.newest is None and not self._failed_before_first:
                    self._waited_for_first = True
                    return
                waited, self._waited_for_first = self._waited_for_first, False
                self._answer(self._pending.popleft(), actions, refreshed=waited)
            else:
                frame = self._pending.popleft()
                wanted = self._wanted_cache(frame)
                if wanted is None:
                    self._answer(frame, actions, refreshed=False)
                else:
                    self._refreshing = frame
                    self._start_producer(0, wanted, actions)

    def _wanted_cache(self, frame: int) -> int | None:
        """The frame whose cache must be made before `frame` is answered; None where the one at hand serves."""
        newest = self._newest
        if self.policy.kind == "every":
            return frame if newest is None or frame - newest.frame >= self.policy.period else None
        # Lockstep. The very first frame stands in for frames before it; the frame before a gap, for those in the gap.
        while len(self._history) > 1 and self._history[1] <= frame - self.policy.age:
            self._history.popleft()
        wanted = self._history[0]
        at_hand = newest is not None and newest.frame == wanted
        return None if at_hand or wanted == self._failed_cache else wanted

    def _prepare_next(self, actions: list[Action]) -> None:
        """Between two lockstep frames, make the cache of the next one, so that its latency is the consumer's.

        At age 0 there is nothing to prepare. If a gap makes the guess wrong, the right cache is made when the frame
        is there.
        """
        if self.policy.age == 0 or self._newest_frame < 0 or self._pending or self._current or self._in_flight:
            return
        wanted = self._wanted_cache(self._newest_frame + 1)
        if wanted is not None:
            self._start_producer(0, wanted, actions)

    def _answer(self, frame: int, actions: list[Action], *, refreshed: bool) -> None:
        """Answer from the newest cache, or where that is too old as the user chose."""
        newest = self._newest
        if newest is None and self._routed:
            self._current = StartConsumer(frame, None, None, 0, refreshed)
            actions.append(self._current)
        elif newest is not None and (self._routed or self._max_age is None or frame - newest.frame <= self._max_age):
            age = frame - newest.frame
            self._ring.acquire(newest.slot)
            route = None if self._routed else "plain" if age == 0 else self._aged_exit
            self._current = StartConsumer(frame, newest.slot, route, age, refreshed)
            actions.append(self._current)
        elif self._on_stale == "whole":
            self._answer_whole(frame, actions)
        elif newest is None:
            actions.append(FailFrame(frame, "there is no cache yet and the producer failed"))
        else:
            age = frame - newest.frame
            actions.append(FailFrame(frame, f"the newest cache is {age} frames old and max_age is {self._max_age}"))

    def _answer_whole(self, frame: int, actions: list[Action]) -> None:
        self._current = StartConsumer(frame, None, "whole", 0, refreshed=True)
        actions.append(self._current)


def _impossible(what: str) -> WarpcacheError:
    return WarpcacheError(f"{what}; this is a bug in what drives the scheduler, please report it")

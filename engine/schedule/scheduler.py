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

In a *stateful* session the module that owns the state runs on every frame that arrived, in order. Frames whose turn has
not come yet are *owed*; where too many are, the session takes no more (`has_room`), so that ages stay bounded, and says
that it is `behind`. `SequenceBegan` forgets what is owed and starts the state afresh.
"""

from __future__ import annotations

from collections import deque

from ..bundle.roles import Route
from ..errors import InputError, WarpcacheError
from .events import (
    Action,
    AdvanceState,
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
    SequenceBegan,
    StartConsumer,
    StartProducer,
    StateAdvanced,
)
from .policy import Policy
from .slots import CachedFrame, SlotRing

__all__ = ["Scheduler"]


class Scheduler:
    """Decides what runs next for one session.

    Args:
        policy: When producers run.
        answering: What may answer; None for a bundle's usual exits.
        devices: Number of devices that producers run on; actions name them 0 to ``devices - 1``.
        streams: Producers in flight at once on each device; 1 where there is state.
        queue_limit: Frames that may wait where none is dropped (lockstep), or be owed to the state.

    Raises:
        InputError: If an argument is out of range.
    """

    def __init__(
        self,
        policy: Policy,
        answering: Answering | None = None,
        *,
        devices: int = 1,
        streams: int = 1,
        queue_limit: int = 8,
    ) -> None:
        if devices < 1 or streams < 1 or queue_limit < 1:
            raise InputError(
                f"devices, streams and queue_limit are {devices}, {streams}, {queue_limit}; give 1 or more"
            )
        self._answering = answering = Answering() if answering is None else answering
        if answering.stateful and devices * streams > 1:
            raise InputError(
                f"{devices * streams} producers were asked for, but the generator carries state, so that its frames "
                "come one after the other; take one"
            )
        self.policy = policy
        # Asked of the policy once, not at every event.
        self._foreground, self._uses_cache = policy.foreground, policy.uses_cache
        self._live, self._deterministic = policy.live, policy.deterministic
        self._queue_limit = queue_limit if answering.stateful or not policy.live else 1
        if answering.stateful and answering.max_age:
            self._queue_limit = min(self._queue_limit, answering.max_age)
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
        self._owed: deque[int] = deque()  # stateful: arrived frames that the state's owner has not run on
        self._fresh = True  # the next frame that the state's owner runs on is the first of its sequence
        self._advancing: int | None = None  # the frame that the whole generator runs on for the state's sake

    @property
    def whole(self) -> Route | None:
        """The exit that is the whole generator."""
        return self._answering.whole

    @property
    def slots(self) -> int:
        """Number of cache slots that the actions name."""
        return self._ring.capacity

    @property
    def has_room(self) -> bool:
        """Whether one more frame may arrive now; under a live policy always, since an older one makes room."""
        if self.behind:
            return False
        return self._live or len(self._pending) < self._queue_limit

    @property
    def behind(self) -> bool:
        """Whether no frame may arrive because the state's owner cannot keep up."""
        return self._answering.stateful and len(self._owed) >= self._queue_limit

    @property
    def idle(self) -> bool:
        """Whether no arrived frame is without its answer."""
        waits = self._current is not None or self._refreshing is not None or self._advancing is not None
        return not self._pending and not waits

    @property
    def needed_inputs(self) -> set[int]:
        """The frames whose inputs a later action may name; those of all others can be let go.

        Actions already given out count as having taken their inputs.
        """
        needed = {*self._pending, *self._history, *self._owed}
        if self._refreshing is not None:
            needed.add(self._refreshing)
        if not self._foreground and self._newest_produced < self._newest_frame:
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
            case SequenceBegan():
                self._begin_sequence(event.frame, actions)
            case StateAdvanced():
                if self._advancing != event.frame:
                    raise _impossible(f"the state was advanced by frame {event.frame}, which was not asked for")
                self._advancing = None
        if not self._foreground:
            self._start_producers(actions)
        self._answer_pending(actions)
        if self._foreground and self._uses_cache:
            self._prepare_next(actions)
        return actions

    # Events

    def _arrive(self, frame: int, actions: list[Action]) -> None:
        if frame <= self._newest_frame:
            raise _impossible(f"frame {frame} arrived after frame {self._newest_frame}")
        if self._live:
            actions.extend(DropFrame(stale) for stale in self._pending)
            if self._answering.stateful and not self._uses_cache:
                self._owed.extend(self._pending)
            self._pending.clear()
        elif len(self._pending) >= self._queue_limit:
            raise _impossible(f"frame {frame} arrived while {len(self._pending)} frames wait")
        self._newest_frame = frame
        self._pending.append(frame)
        if self._deterministic:
            self._history.append(frame)
        if self._answering.stateful and self._uses_cache:
            self._owed.append(frame)

    def _end_producer(self, event: ProducerDone | ProducerFailed) -> None:
        started = self._in_flight.get(event.slot)
        if started is None or (started.device, started.frame) != (event.device, event.frame):
            raise _impossible(f"a producer ended that was not started ({event})")
        del self._in_flight[event.slot]
        self._idle_streams[event.device] += 1

    def _end_refresh(self, actions: list[Action]) -> None:
        """A producer in the foreground has ended, well or not: the frame that waited for it is answered."""
        if self._refreshing is None:
            return
        frame, self._refreshing = self._refreshing, None
        if self._owed and self._owed[0] <= frame and self._wanted_cache(frame) is not None:
            # The state comes to this frame through those before it.
            self._refresh(frame, self._owed[0], actions)
        else:
            self._answer(frame, actions, refreshed=True)

    def _end_consumer(self, frame: int) -> None:
        if self._current is None or self._current.frame != frame:
            raise _impossible(f"frame {frame} was answered without being asked for")
        if self._current.slot is not None:
            self._ring.release(self._current.slot)
        self._current = None

    def _begin_scene(self, frame: int) -> None:
        if not self._answering.routed or self._current is None or self._current.frame != frame:
            raise _impossible(f"frame {frame} began a scene without being routed")
        self._scene_start = frame
        # Lockstep: until the scene is old enough its first frame stands in, as the very first frame does at the start.
        while self._history and self._history[0] < frame:
            self._history.popleft()

    def _begin_sequence(self, frame: int, actions: list[Action]) -> None:
        if frame <= self._newest_frame:
            raise _impossible(f"a sequence began with frame {frame}, which had arrived already")
        refreshing = () if self._refreshing is None else (self._refreshing,)
        actions.extend(DropFrame(waiting) for waiting in (*refreshing, *self._pending))
        self._refreshing = None
        for frames in (self._pending, self._owed, self._history):
            frames.clear()
        self._scene_start = frame
        self._newest_produced = max(self._newest_produced, self._newest_frame)
        self._fresh = True
        self._failed_cache = None
        self._failed_before_first = False

    # Decisions

    def _newest_for(self, frame: int) -> CachedFrame | None:
        """The newest cache of the frame's own scene."""
        newest = self._ring.newest
        return None if newest is None or newest.frame < self._scene_start <= frame else newest

    @property
    def _coming(self) -> bool:
        """Stateful: whether another cache of this sequence will be made without another frame arriving."""
        return bool(self._owed) or any(action.frame >= self._scene_start for action in self._in_flight.values())

    def _start_producers(self, actions: list[Action]) -> None:
        """Put an idle stream to work on the newest frame; older frames are never worth a producer any more."""
        device = max(range(len(self._idle_streams)), key=self._idle_streams.__getitem__)
        if self._idle_streams[device] == 0:
            return
        if self._answering.stateful:
            if self._owed:
                self._start_producer(device, self._owed[0], actions)
        elif self._newest_produced < self._newest_frame:
            self._start_producer(device, self._newest_frame, actions)

    def _start_producer(self, device: int, frame: int, actions: list[Action]) -> None:
        if self._owed and self._owed[0] == frame:
            self._owed.popleft()
        action = StartProducer(device, self._ring.begin_write(frame), frame, self._take_fresh())
        self._in_flight[action.slot] = action
        self._idle_streams[device] -= 1
        self._newest_produced = frame
        actions.append(action)

    def _answer_pending(self, actions: list[Action]) -> None:
        while self._pending and self._current is None and not (self._foreground and self._in_flight):
            if not self._uses_cache:
                if self._advancing is not None or self._advance(actions):
                    return
                frame = self._pending.popleft()
                if self._answering.routed:
                    self._answer(frame, actions, refreshed=False)
                else:
                    self._answer_whole(frame, actions)
            elif not self._foreground:
                if self._waits_for_cache(self._pending[0]):
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
                    self._refresh(frame, self._owed[0] if self._owed else wanted, actions)

    def _advance(self, actions: list[Action]) -> bool:
        """Stateful, without a producer: let the whole generator catch up with the frames whose answers were dropped."""
        if not self._owed:
            return False
        self._advancing = self._owed.popleft()
        actions.append(AdvanceState(self._advancing, self._take_fresh()))
        return True

    def _waits_for_cache(self, frame: int) -> bool:
        """Whether a frame waits for a producer in the background: for the first cache, or where the state is owed."""
        answering = self._answering
        if answering.routed:
            return False
        newest = self._newest_for(frame)
        if answering.stateful:
            stale = newest is not None and answering.max_age is not None and frame - newest.frame > answering.max_age
            waits = newest is None or (stale and answering.on_stale != "raise")
            return waits and self._coming
        return newest is None and not self._failed_before_first

    def _refresh(self, frame: int, made_first: int, actions: list[Action]) -> None:
        self._refreshing = frame
        self._start_producer(0, made_first, actions)

    def _wanted_cache(self, frame: int) -> int | None:
        """The frame whose cache must be made before `frame` is answered; None where the one at hand serves."""
        newest = self._newest_for(frame)
        wanted = self.policy.wanted_cache(frame, None if newest is None else newest.frame, self._history)
        return None if self._deterministic and wanted == self._failed_cache else wanted

    def _prepare_next(self, actions: list[Action]) -> None:
        """Between two frames in the foreground: make the cache of the next one, and what is owed to the state.

        If a gap makes the guess wrong, the right cache is made when the frame is there.
        """
        if self._newest_frame < 0 or self._pending or self._current or self._in_flight:
            return
        limit = self.policy.prepared_up_to(self._newest_frame)
        if self._owed:
            if self._deterministic and (limit is None or self._owed[0] > limit):
                return
            self._start_producer(0, self._owed[0], actions)
        elif limit is not None and self._history and not self._answering.stateful:
            wanted = self._wanted_cache(self._newest_frame + 1)
            if wanted is not None:
                self._start_producer(0, wanted, actions)

    def _answer(self, frame: int, actions: list[Action], *, refreshed: bool) -> None:
        """Answer from the newest cache, or where that is too old as the user chose."""
        answering = self._answering
        newest = self._newest_for(frame)
        young = newest is not None and (answering.max_age is None or frame - newest.frame <= answering.max_age)
        if newest is None and answering.routed:
            self._current = StartConsumer(frame, None, None, 0, refreshed)
            actions.append(self._current)
        elif newest is not None and (answering.routed or young):
            age = frame - newest.frame
            self._ring.acquire(newest.slot)
            at_hand = answering.plain if age == 0 and answering.plain is not None else answering.aged
            self._current = StartConsumer(frame, newest.slot, None if answering.routed else at_hand, age, refreshed)
            actions.append(self._current)
        elif answering.on_stale != "raise" and answering.whole is not None and not answering.stateful:
            self._answer_whole(frame, actions)
        elif newest is None:
            actions.append(FailFrame(frame, "there is no cache yet and the producer failed"))
        else:
            age = frame - newest.frame
            actions.append(FailFrame(frame, f"the newest cache is {age} frames old and max_age is {answering.max_age}"))

    def _answer_whole(self, frame: int, actions: list[Action]) -> None:
        self._current = StartConsumer(frame, None, self._answering.whole, 0, refreshed=True, fresh=self._take_fresh())
        actions.append(self._current)

    def _take_fresh(self) -> bool:
        """Whether the state's owner now runs on the first frame of its sequence."""
        fresh, self._fresh = self._fresh and self._answering.stateful, False
        return fresh


def _impossible(what: str) -> WarpcacheError:
    return WarpcacheError(f"{what}; this is a bug in what drives the scheduler, please report it")

"""What a scheduler is told and what it decides: its events and its actions, as plain records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ..bundle.roles import Route
from ..errors import InputError

__all__ = [
    "Action",
    "AdvanceState",
    "Answering",
    "ConsumerDone",
    "ConsumerFailed",
    "DropFrame",
    "FailFrame",
    "FrameArrived",
    "Invalidated",
    "OnStale",
    "ProducerDone",
    "ProducerFailed",
    "SchedulerEvent",
    "SequenceBegan",
    "StartConsumer",
    "StartProducer",
    "StateAdvanced",
]

OnStale = Literal["whole", "raise"]


@dataclass(frozen=True)
class FrameArrived:
    """Event: the inputs of `frame` are there. Indices rise; gaps are allowed. `time` in seconds, as all times here."""

    frame: int
    time: float


@dataclass(frozen=True)
class ProducerDone:
    """Event: the producer that was started on `device` has filled `slot` with the cache of `frame`."""

    device: int
    slot: int
    frame: int
    time: float


@dataclass(frozen=True)
class ProducerFailed:
    """Event: the producer that was started on `device` failed; `slot` holds nothing."""

    device: int
    slot: int
    frame: int
    time: float


@dataclass(frozen=True)
class ConsumerDone:
    """Event: `frame` is answered and the consumer is ready for the next one."""

    frame: int
    time: float


@dataclass(frozen=True)
class ConsumerFailed:
    """Event: the exit that was to answer `frame` failed; the consumer is ready for the next one."""

    frame: int
    time: float


@dataclass(frozen=True)
class Invalidated:
    """Event, of a routed session: `frame`, which is being answered, is of another scene than all frames before it."""

    frame: int
    time: float


@dataclass(frozen=True)
class SequenceBegan:
    """Event: frames from `frame` on, which has not arrived yet, have nothing to do with those before it."""

    frame: int
    time: float


@dataclass(frozen=True)
class StateAdvanced:
    """Event: the whole generator has run on `frame` for the state's sake, well or badly."""

    frame: int
    time: float


@dataclass(frozen=True)
class StartProducer:
    """Action: make the cache of `frame` on `device` and write it to `slot`.

    `fresh` says that the frame is the first of its sequence: the state starts with its first value.
    """

    device: int
    slot: int
    frame: int
    fresh: bool = False


@dataclass(frozen=True)
class AdvanceState:
    """Action: run the whole generator on `frame`, whose answer nobody waits for any more, because it owns the state."""

    frame: int
    fresh: bool = False


@dataclass(frozen=True)
class StartConsumer:
    """Action: answer `frame` by `route`, from the cache in `slot`, which is `age` frames old.

    `slot` is None and `age` 0 on route ``whole``. `refreshed` says that the frame had to wait for a new cache or for
    the whole generator. In a routed session `route` is None, and so is `slot` where there is no cache of this scene.
    `fresh` as of `StartProducer`, where the exit owns the state.
    """

    frame: int
    slot: int | None
    route: Route | None
    age: int
    refreshed: bool
    fresh: bool = False


@dataclass(frozen=True)
class DropFrame:
    """Action: forget `frame`, a newer one has arrived before it could be answered."""

    frame: int


@dataclass(frozen=True)
class FailFrame:
    """Action: tell the caller that `frame` cannot be answered, because of `reason`."""

    frame: int
    reason: str


SchedulerEvent = (
    FrameArrived
    | ProducerDone
    | ProducerFailed
    | ConsumerDone
    | ConsumerFailed
    | Invalidated
    | SequenceBegan
    | StateAdvanced
)
Action = StartProducer | StartConsumer | AdvanceState | DropFrame | FailFrame


@dataclass(frozen=True)
class Answering:
    """What may answer the frames of a session.

    Attributes:
        whole: The exit that is the whole generator; None where the bundle has none.
        plain: The exit that answers at age 0, where it is exact; None: `aged` answers at every age.
        aged: The exit that answers at an age above 0.
        max_age: The oldest cache that a frame may be answered from, in frames; None is no limit.
        on_stale: What happens to a frame without a young enough cache: ``whole`` lets the whole generator answer it,
            ``raise`` fails it.
        routed: The exit of every frame is left open; `aged`, `max_age` and `on_stale` then decide nothing.
        stateful: The generator carries state: its owner (the producer, or the whole generator where there is none)
            runs on every frame in order. Only answers are dropped, and no exit but the owner can begin in the middle:
            a frame that would be the whole generator's waits for its own cache instead, which gives the same.
    """

    whole: Route | None = "whole"
    plain: Route | None = "plain"
    aged: Route = "warp"
    max_age: int | None = None
    on_stale: OnStale = "whole"
    routed: bool = False
    stateful: bool = False

    def __post_init__(self) -> None:
        if self.max_age is not None and self.max_age < 0:
            raise InputError(f"max_age {self.max_age} is negative; give 0 or more frames, or None for no limit")
        if self.on_stale not in get_args(OnStale):
            raise InputError(f"unknown on_stale {self.on_stale!r}; choose 'whole' or 'raise'")
        if self.aged == self.whole:
            raise InputError(
                f"exit {self.aged!r} reads no cache; choose another, or policy='full' for the whole generator"
            )

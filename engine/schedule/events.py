"""What a scheduler is told and what it decides: its events and its actions, as plain records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..bundle.roles import Route

__all__ = [
    "Action",
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
    "StartConsumer",
    "StartProducer",
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
class StartProducer:
    """Action: make the cache of `frame` on `device` and write it to `slot`."""

    device: int
    slot: int
    frame: int


@dataclass(frozen=True)
class StartConsumer:
    """Action: answer `frame` by `route`, from the cache in `slot`, which is `age` frames old.

    `slot` is None and `age` 0 on route ``whole``. `refreshed` says that the frame had to wait for a new cache or for
    the whole generator. In a routed session `route` is None, and so is `slot` where there is no cache of this scene.
    """

    frame: int
    slot: int | None
    route: Route | None
    age: int
    refreshed: bool


@dataclass(frozen=True)
class DropFrame:
    """Action: forget `frame`, a newer one has arrived before it could be answered."""

    frame: int


@dataclass(frozen=True)
class FailFrame:
    """Action: tell the caller that `frame` cannot be answered, because of `reason`."""

    frame: int
    reason: str


SchedulerEvent = FrameArrived | ProducerDone | ProducerFailed | ConsumerDone | ConsumerFailed | Invalidated


Action = StartProducer | StartConsumer | DropFrame | FailFrame

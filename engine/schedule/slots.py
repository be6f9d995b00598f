"""Cache slots: which slot holds the cache of which frame, who writes and who reads it, and the memory behind it.

`SlotRing` is bookkeeping alone and touches no memory, so that the scheduler stays pure; `SlotBuffers` is the memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ..errors import WarpcacheError

__all__ = ["CachedFrame", "SlotRing", "SlotState"]


class SlotState(Enum):
    """What a slot is doing."""

    FREE = "free"
    WRITING = "writing"
    READY = "ready"


@dataclass(frozen=True)
class CachedFrame:
    """A finished cache: the slot it is in and the frame it was made from."""

    slot: int
    frame: int


class SlotRing:
    """A few cache slots with one writer or any number of readers each.

    A slot is written by one producer, read by any number of consumers, and freed once a younger cache is ready and no
    reader is left. The newest ready cache therefore always stays. With P producers and one consumer, P + 2 slots
    are enough for a free one to be there whenever a producer is idle: P are written, one is the newest, and one older
    may still be read.

    Args:
        capacity: Number of slots, at least 2: a cache is kept while the next one is written.

    Raises:
        WarpcacheError: From any method that is called against the rules above; it means a bug, not a user's mistake.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 2:
            raise _broken(f"{capacity} cache slots are too few (2 are the least)")
        self._states = [SlotState.FREE] * capacity
        self._frames = [-1] * capacity
        self._readers = [0] * capacity
        self._newest: CachedFrame | None = None

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return len(self._states)

    @property
    def newest(self) -> CachedFrame | None:
        """The finished cache of the youngest frame; None before the first."""
        return self._newest

    def state(self, slot: int) -> SlotState:
        """What `slot` is doing."""
        return self._states[slot]

    def readers(self, slot: int) -> int:
        """How many consumers read `slot`."""
        return self._readers[slot]

    def begin_write(self, frame: int) -> int:
        """Take a free slot for the cache of `frame` and return its number."""
        for slot, state in enumerate(self._states):
            if state is SlotState.FREE:
                self._states[slot] = SlotState.WRITING
                self._frames[slot] = frame
                return slot
        raise _broken(f"no cache slot is free for frame {frame}")

    def finish_write(self, slot: int) -> None:
        """The producer of `slot` is done: its cache is ready, and older ones without a reader are freed.

        A cache that a younger one has overtaken is freed at once.
        """
        self._require(slot, SlotState.WRITING, "finished")
        self._states[slot] = SlotState.READY
        if self._newest is None or self._frames[slot] >= self._newest.frame:
            self._newest = CachedFrame(slot, self._frames[slot])
        self._free_unused()

    def abandon_write(self, slot: int) -> None:
        """The producer of `slot` failed: what is in it is garbage and the slot is free again."""
        self._require(slot, SlotState.WRITING, "abandoned")
        self._states[slot] = SlotState.FREE

    def acquire(self, slot: int) -> None:
        """Count one more reader of `slot`."""
        self._require(slot, SlotState.READY, "read")
        self._readers[slot] += 1

    def release(self, slot: int) -> None:
        """Count one reader of `slot` less, and free it where a younger cache is ready."""
        if self._readers[slot] < 1:
            raise _broken(f"cache slot {slot} was released without a reader")
        self._readers[slot] -= 1
        self._free_unused()

    def _free_unused(self) -> None:
        assert self._newest is not None
        for slot, state in enumerate(self._states):
            if state is SlotState.READY and slot != self._newest.slot and self._readers[slot] == 0:
                self._states[slot] = SlotState.FREE

    def _require(self, slot: int, state: SlotState, verb: str) -> None:
        if self._states[slot] is not state:
            raise _broken(f"cache slot {slot} was {verb} while it was {self._states[slot].value}")


def _broken(what: str) -> WarpcacheError:
    return WarpcacheError(f"{what}; this is a bug in warpcache, please report it")

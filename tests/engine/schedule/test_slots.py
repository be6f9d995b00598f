"""Cache slots: the life of a slot, and every breach of its rules."""

from __future__ import annotations

import numpy as np
import pytest

from warpcache.engine.cpu.slots import SlotBuffers
from warpcache.engine.errors import WarpcacheError
from warpcache.engine.schedule.slots import CachedFrame, SlotRing, SlotState
from warpcache.engine.spec import TensorSpec


def written(ring: SlotRing, frame: int) -> int:
    slot = ring.begin_write(frame)
    ring.finish_write(slot)
    return slot


def test_a_cache_is_freed_once_a_younger_one_is_ready_and_nobody_reads_it() -> None:
    ring = SlotRing(3)
    old = written(ring, 0)
    ring.acquire(old)
    ring.acquire(old)
    young = written(ring, 4)
    assert ring.newest == CachedFrame(young, 4)
    assert ring.state(old) is SlotState.READY
    ring.release(old)
    assert ring.state(old) is SlotState.READY
    assert ring.readers(old) == 1
    ring.release(old)
    assert ring.state(old) is SlotState.FREE
    # The newest stays, read or not.
    ring.acquire(young)
    ring.release(young)
    assert ring.state(young) is SlotState.READY


def test_a_cache_that_was_overtaken_is_freed_at_once() -> None:
    ring = SlotRing(3)
    slow, fast = ring.begin_write(1), ring.begin_write(2)
    ring.finish_write(fast)
    ring.finish_write(slow)
    assert ring.newest == CachedFrame(fast, 2)
    assert ring.state(slow) is SlotState.FREE


def test_a_failed_writer_gives_its_slot_back_and_leaves_the_newest_cache() -> None:
    ring = SlotRing(2)
    first = written(ring, 0)
    for frame in range(1, 4):
        ring.abandon_write(ring.begin_write(frame))
    assert ring.newest == CachedFrame(first, 0)


def test_every_breach_of_the_rules_raises() -> None:
    ring = SlotRing(2)
    with pytest.raises(WarpcacheError, match=r"^cache slot 0 was read while it was free"):
        ring.acquire(0)
    slot = ring.begin_write(0)
    with pytest.raises(WarpcacheError, match=r"^cache slot 0 was read while it was writing"):
        ring.acquire(slot)
    ring.finish_write(slot)
    with pytest.raises(WarpcacheError, match=r"^cache slot 0 was finished while it was ready"):
        ring.finish_write(slot)
    with pytest.raises(WarpcacheError, match=r"^cache slot 0 was abandoned while it was ready"):
        ring.abandon_write(slot)
    with pytest.raises(WarpcacheError, match=r"^cache slot 0 was released without a reader"):
        ring.release(slot)
    ring.begin_write(1)
    with pytest.raises(WarpcacheError, match=r"^no cache slot is free for frame 2"):
        ring.begin_write(2)
    with pytest.raises(WarpcacheError, match=r"^1 cache slots are too few"):
        SlotRing(1)


def test_buffers_are_allocated_once_and_slots_share_no_memory() -> None:
    specs = (TensorSpec("cache.a", "float32", (1, 4, 8, 8)), TensorSpec("cache.b", "int64", (3,)))
    buffers = SlotBuffers(specs, 3)
    assert len(buffers) == 3
    assert buffers.size_bytes == 3 * (4 * 8 * 8 * 4 + 3 * 8)
    assert buffers[1]["cache.a"] is buffers[1]["cache.a"]
    for slot in range(3):
        assert [(name, array.dtype.name, array.shape) for name, array in buffers[slot].items()] == [
            (spec.name, spec.dtype, spec.shape) for spec in specs
        ]
        assert all(array.flags.c_contiguous and array.flags.owndata for array in buffers[slot].values())
    assert not np.shares_memory(buffers[0]["cache.a"], buffers[1]["cache.a"])

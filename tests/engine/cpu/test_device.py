"""The CPU as a device: order, errors and ends of streams; who gets which cores."""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from warpcache.engine.cpu import device as device_module
from warpcache.engine.cpu.device import CoreShare, CpuDevice
from warpcache.engine.device import affinity
from warpcache.engine.device.stream import CpuStream, Event, InlineStream
from warpcache.engine.errors import ClosedError, InputError

LINUX = sys.platform.startswith("linux")
# Only for waits that must not hang a run whose test fails; no test waits that long when all is well.
PATIENCE_S = 10


def test_work_runs_in_order_and_its_events_finish_in_order():
    done: list[int] = []
    with CpuStream("order") as stream:
        events = [stream.submit(lambda index=index: done.append(index)) for index in range(200)]
        events[-1].wait(PATIENCE_S)
        assert all(event.done for event in events)
    assert done == list(range(200))


def test_work_runs_on_the_streams_own_thread():
    with CpuStream("elsewhere") as stream:
        name, ident = stream.call(lambda: (threading.current_thread().name, threading.get_ident()))
    assert name == "elsewhere"
    assert ident != threading.get_ident()


def test_an_event_is_not_done_before_its_work():
    latch = threading.Event()
    with CpuStream("latched") as stream:
        event = stream.submit(latch.wait)
        assert not event.done
        assert event.wait(timeout=0) is False
        latch.set()
        assert event.wait(PATIENCE_S) is True
        assert event.done


@pytest.mark.parametrize("make", [lambda: CpuStream("failing"), lambda: InlineStream("failing")])
def test_an_error_is_raised_by_wait_and_the_stream_goes_on(make):
    stream = make()
    event = stream.submit(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        event.wait(PATIENCE_S)
    with pytest.raises(ZeroDivisionError):
        event.wait(PATIENCE_S)
    assert isinstance(event.error, ZeroDivisionError)
    assert stream.submit(lambda: None).wait(PATIENCE_S)
    with pytest.raises(ZeroDivisionError):
        stream.call(lambda: 1 / 0)
    stream.close()


def test_even_an_exit_in_the_work_reaches_the_waiter_and_not_the_thread():
    with CpuStream("exit") as stream:
        event = stream.submit(lambda: sys.exit(3))
        with pytest.raises(SystemExit):
            event.wait(PATIENCE_S)
        assert stream.call(lambda: "alive") == "alive"


def test_a_callback_runs_once_after_the_work_on_its_thread():
    latch = threading.Event()
    seen: list[tuple[Event, int]] = []
    with CpuStream("callback") as stream:
        ident = stream.call(threading.get_ident)
        event = stream.submit(latch.wait)
        event.add_done_callback(lambda finished: seen.append((finished, threading.get_ident())))
        assert seen == []
        latch.set()
        stream.synchronize()
    assert seen == [(event, ident)]
    event.add_done_callback(lambda finished: seen.append((finished, threading.get_ident())))
    assert seen[1:] == [(event, threading.get_ident())]


def test_a_failing_callback_is_logged_and_stops_nothing(caplog):
    event = Event()
    seen: list[Event] = []
    event.add_done_callback(lambda _: 1 / 0)
    event.add_done_callback(seen.append)
    event.set()
    assert seen == [event]
    assert "a callback of a finished event raised" in caplog.text


def test_only_the_first_end_of_an_event_counts():
    event = Event()
    event.set(ValueError("first"))
    event.set()
    with pytest.raises(ValueError, match="first"):
        event.wait()


def test_close_lets_queued_work_end_and_refuses_more():
    latch = threading.Event()
    done: list[int] = []
    stream = CpuStream("closing")
    stream.submit(latch.wait)
    for index in range(5):
        stream.submit(lambda index=index: done.append(index))
    closer = threading.Thread(target=stream.close)
    closer.start()
    latch.set()
    closer.join(PATIENCE_S)
    assert done == [0, 1, 2, 3, 4]
    stream.close()
    stream.synchronize()
    with pytest.raises(ClosedError, match=r"^stream 'closing' is closed"):
        stream.submit(lambda: None)


def test_a_stream_may_be_closed_by_its_own_work():
    stream = CpuStream("self-closing")
    stream.submit(stream.close).wait(PATIENCE_S)
    stream.close()
    assert not stream._thread.is_alive()


def test_synchronize_from_inside_is_refused_rather_than_waiting_for_itself():
    with CpuStream("inside") as stream, pytest.raises(RuntimeError, match=r"^work on stream 'inside' cannot wait"):
        stream.call(stream.synchronize)


def test_synchronize_leaves_errors_to_their_events():
    with CpuStream("quiet") as stream:
        event = stream.submit(lambda: 1 / 0)
        stream.synchronize()
        assert isinstance(event.error, ZeroDivisionError)


def test_a_forgotten_stream_ends_its_thread():
    stream = CpuStream("forgotten")
    thread = stream._thread
    del stream
    gc.collect()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def test_the_thread_keeps_no_finished_work_alive():
    class Frame:
        pass

    frame = Frame()
    gone = threading.Event()
    weakref.finalize(frame, gone.set)
    with CpuStream("lean") as stream:
        stream.submit(lambda frame=frame: None)
        del frame
        assert gone.wait(PATIENCE_S)


def test_an_inline_stream_runs_at_once_on_the_calling_thread():
    stream = InlineStream("here")
    seen: list[int] = []
    event = stream.submit(lambda: seen.append(threading.get_ident()))
    assert event.done
    assert seen == [threading.get_ident()]
    stream.synchronize()
    stream.close()
    stream.close()
    with pytest.raises(ClosedError, match=r"^stream 'here' is closed"):
        stream.submit(lambda: None)
    with pytest.raises(ClosedError, match=r"^stream 'here' is closed"):
        stream.call(lambda: None)


def test_an_inline_stream_lets_an_interrupt_through():
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        InlineStream().submit(interrupt)


@pytest.mark.skipif(not LINUX, reason="only Linux pins threads")
def test_threads_run_where_they_are_put_and_the_caller_is_left_alone():
    before = os.sched_getaffinity(0)
    core = min(before)
    with CpuDevice() as device:
        assert device.stream("pinned", cores=(core,)).call(lambda: os.sched_getaffinity(0)) == {core}
        assert device.inline(cores=(core,)).call(lambda: os.sched_getaffinity(0)) == {core}
    assert os.sched_getaffinity(0) == before


@pytest.mark.skipif(not LINUX, reason="only Linux has a niceness per thread")
def test_a_background_stream_is_nicer_and_nobody_else_is():
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = niceness()
    with CpuStream("nice", background=True) as stream:
        # 19 is the end of the scale, where a run that is itself at low priority may already be.
        assert stream.call(niceness) >= min(before, 5)
        assert stream.call(niceness) != before or before >= 5
    assert niceness() == before


def test_a_system_that_cannot_pin_is_told_of_once(monkeypatch, caplog):
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    monkeypatch.setattr(affinity, "_said", set())
    with caplog.at_level(logging.INFO, logger="warpcache.engine.device.affinity"):
        for index in range(2):
            with CpuStream(f"unpinned {index}", cores=(0,)) as stream:
                assert stream.call(lambda: 5) == 5
    assert caplog.text.count("cannot pin a thread") == 1


def test_cores_that_are_gone_do_not_stop_the_work(monkeypatch, caplog):
    monkeypatch.setattr(affinity, "_said", set())
    with (
        caplog.at_level(logging.INFO, logger="warpcache.engine.device.affinity"),
        CpuStream("gone", cores=(100_000,)) as stream,
    ):
        assert stream.call(lambda: 5) == 5
    if LINUX:
        assert "could not be pinned" in caplog.text


def device_with(monkeypatch: pytest.MonkeyPatch, cores: tuple[int, ...]) -> CpuDevice:
    monkeypatch.setattr(device_module, "available_cores", lambda: cores)
    monkeypatch.setattr(device_module, "physical_core", lambda core: (core, core))
    return CpuDevice()


@pytest.mark.parametrize(
    ("cores", "producers", "expected"),
    [
        (1, 1, CoreShare(1, (1,), (0,), ((0,),), shared=True)),
        (1, 2, CoreShare(1, (1, 1), (0,), ((0,), (0,)), shared=True)),
        (2, 1, CoreShare(1, (1,), (0,), ((1,),), shared=False)),
        (2, 0, CoreShare(2, (), (0, 1), (), shared=False)),
        (3, 1, CoreShare(1, (2,), (0,), ((1, 2),), shared=False)),
        (4, 2, CoreShare(2, (1, 1), (0, 1), ((2,), (3,)), shared=False)),
        (2, 3, CoreShare(1, (1, 1, 1), (0,), ((1,), (1,), (1,)), shared=False)),
        (16, 1, CoreShare(4, (12,), (0, 1, 2, 3), (tuple(range(4, 16)),), shared=False)),
    ],
)
def test_cores_are_shared_out(monkeypatch, cores, producers, expected):
    assert device_with(monkeypatch, tuple(range(cores))).share(producers) == expected


@given(cores=st.sets(st.integers(0, 300), min_size=2, max_size=40), producers=st.integers(1, 12))
def test_a_producer_never_gets_the_consumers_cores(cores, producers):
    with pytest.MonkeyPatch.context() as monkeypatch:
        device = device_with(monkeypatch, tuple(sorted(cores)))
    share = device.share(producers)
    assert not share.shared
    assert share.consumer_cores is not None
    taken = set(share.consumer_cores)
    assert len(taken) == share.consumer_threads >= 1
    assert len(share.producer_threads) == len(share.producer_cores) == producers
    for threads, part in zip(share.producer_threads, share.producer_cores, strict=True):
        assert part is not None
        assert len(part) == threads >= 1
        assert taken.isdisjoint(part)
        assert set(part) <= cores
    # Producers get in each other's way only where there are more of them than cores.
    if producers <= len(cores) - len(taken):
        assert sum(share.producer_threads) == len(cores) - len(taken)
        assert len({core for part in share.producer_cores for core in part or ()}) == sum(share.producer_threads)


def test_a_share_falls_between_physical_cores(monkeypatch):
    # Four hardware threads of two cores, numbered as most PCs do it: 0 and 2 are one core, 1 and 3 the other.
    monkeypatch.setattr(device_module, "available_cores", lambda: (0, 1, 2, 3))
    monkeypatch.setattr(device_module, "physical_core", lambda core: (core % 2, core))
    share = CpuDevice().share(1)
    assert share.consumer_cores == (0, 2)
    assert share.producer_cores == ((1, 3),)


def test_one_core_for_all_is_said(monkeypatch, caplog):
    with caplog.at_level(logging.INFO, logger="warpcache.engine.cpu.device"):
        device_with(monkeypatch, (7,)).share(1)
    assert "one core only" in caplog.text


def test_wrong_arguments_are_refused(monkeypatch):
    device = device_with(monkeypatch, (0, 1))
    with pytest.raises(InputError, match=r"^cores is 3, but this process may use 1 to 2"):
        CpuDevice(3)
    with pytest.raises(InputError, match=r"^cores is 0"):
        CpuDevice(0)
    with pytest.raises(InputError, match=r"^the number of producers is -1"):
        device.share(-1)
    with pytest.raises(InputError, match=r"^stream 'far' asks for cores"):
        device.stream("far", cores=(9,))
    assert CpuDevice(1).cores == (0,)


def test_a_device_closes_its_streams():
    device = CpuDevice()
    stream = device.stream("owned")
    device.close()
    device.close()
    with pytest.raises(ClosedError, match=r"^stream 'owned' is closed"):
        stream.submit(lambda: None)
    with pytest.raises(ClosedError, match=r"^the device is closed"):
        device.stream("late")
    with pytest.raises(ClosedError, match=r"^the device is closed"):
        device.inline()

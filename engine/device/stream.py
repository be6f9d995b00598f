"""Streams and events: in-order queues of work, CUDA's words; here the calling thread, or a thread of their own."""

from __future__ import annotations

import logging
import queue
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, TypeVar

from ..errors import ClosedError
from .affinity import lower_priority, pin, pinned

__all__ = ["CpuStream", "Event", "InlineStream", "Stream"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Event:
    """A point in a stream's work: done when everything up to it has run.

    Thread-safe. Made by `Stream.submit`; whoever makes one by hand (a fake device in a test) finishes it with `set`.
    """

    __slots__ = ("_callbacks", "_condition", "_done", "_error")

    def __init__(self) -> None:
        self._condition = threading.Condition(threading.Lock())
        self._done = False
        self._error: BaseException | None = None
        self._callbacks: list[Callable[[Event], None]] = []

    @property
    def done(self) -> bool:
        """Whether the work has ended, well or badly."""
        return self._done

    @property
    def error(self) -> BaseException | None:
        """What the work raised; None while it runs and where it went well."""
        return self._error

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the work has ended.

        Args:
            timeout: Seconds to wait at most; None waits for as long as it takes.

        Returns:
            True if the work has ended, False if the time was up first.

        Raises:
            BaseException: Whatever the work raised.
        """
        if not self._done:
            with self._condition:
                if not self._condition.wait_for(lambda: self._done, timeout):
                    return False
        if self._error is not None:
            raise self._error
        return True

    def add_done_callback(self, callback: Callable[[Event], None]) -> None:
        """Call `callback(event)` once the work has ended, on the thread that ran it; at once if it has ended already.

        What a callback raises is logged and goes no further: nobody waits there.
        """
        with self._condition:
            if not self._done:
                self._callbacks.append(callback)
                return
        self._call(callback)

    def set(self, error: BaseException | None = None) -> None:
        """Mark the work as ended, and by what error; only the first call counts."""
        with self._condition:
            if self._done:
                return
            self._error = error
            self._done = True
            callbacks, self._callbacks = self._callbacks, []
            self._condition.notify_all()
        for callback in callbacks:
            self._call(callback)

    def _call(self, callback: Callable[[Event], None]) -> None:
        try:
            callback(self)
        except Exception:
            logger.exception("a callback of a finished event raised")


class Stream(Protocol):
    """An in-order queue of work."""

    @property
    def name(self) -> str: ...

    def submit(self, work: Callable[[], Any]) -> Event:
        """Queue `work`; the event carries what it raises.

        Raises:
            ClosedError: If the stream is closed.
        """
        ...

    def call(self, work: Callable[[], T]) -> T:
        """Run `work` in the stream's turn and place, and return its result.

        This is how a module is loaded for a stream: an executor's threads inherit cores and priority from the thread
        that makes them.
        """
        ...

    def synchronize(self) -> None:
        """Block until everything submitted so far has ended; what it raised stays with its events."""
        ...

    def close(self) -> None:
        """Refuse new work and wait for the work that is queued; safe to call twice."""
        ...


class InlineStream:
    """The calling thread as a stream: work runs at once, inside `submit`.

    Args:
        name: What messages call it.
        cores: Cores for the threads of modules that are loaded through `call`. The calling thread itself is only
            borrowed: its own affinity is put back afterwards.
    """

    def __init__(self, name: str = "inline", *, cores: tuple[int, ...] | None = None) -> None:
        self.name = name
        self.cores = cores
        self._closed = False

    def submit(self, work: Callable[[], Any]) -> Event:
        """Run `work` now; the event returned is done. KeyboardInterrupt and its like pass through at once."""
        if self._closed:
            raise ClosedError(f"stream {self.name!r} is closed; open a new one")
        try:
            work()
        except Exception as exc:
            event = Event()
            event.set(exc)
            return event
        return _FINISHED

    def call(self, work: Callable[[], T]) -> T:
        """Run `work` now, pinned to the stream's cores, and return its result."""
        if self._closed:
            raise ClosedError(f"stream {self.name!r} is closed; open a new one")
        with pinned(self.cores):
            return work()

    def synchronize(self) -> None:
        """Nothing is ever outstanding."""

    def close(self) -> None:
        """Refuse new work; safe to call twice."""
        self._closed = True


class CpuStream:
    """A worker thread that runs what it is given, in order.

    Args:
        name: Name of the stream and its thread.
        cores: Cores to run on; None leaves the choice to the operating system. Only Linux can pin a thread; elsewhere
            it is done without, which is logged once.
        background: Run at a lower priority (niceness 5 on Linux): where cores are shared the consumer goes first.
    """

    def __init__(self, name: str, *, cores: tuple[int, ...] | None = None, background: bool = False) -> None:
        self.name = name
        self.cores = cores
        self._queue: queue.SimpleQueue[tuple[Callable[[], Any], Event] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        # The thread holds the queue, not the stream, so that a stream that was forgotten can be collected and ends it.
        self._thread = threading.Thread(
            target=_work_through, args=(self._queue, cores, background), name=name, daemon=True
        )
        self._thread.start()
        self._finalizer = weakref.finalize(self, self._queue.put, None)

    def submit(self, work: Callable[[], Any]) -> Event:
        """Queue `work` and return at once; the event carries what it raises."""
        event = Event()
        # Under the lock, so that nothing gets in behind the end mark that close() puts.
        with self._lock:
            if self._closed:
                raise ClosedError(f"stream {self.name!r} is closed; open a new one")
            self._queue.put((work, event))
        return event

    def call(self, work: Callable[[], T]) -> T:
        """Run `work` on the stream's thread after what is queued, and return its result or raise what it raises."""
        if threading.current_thread() is self._thread:
            return work()
        results: list[T] = []
        self.submit(lambda: results.append(work())).wait()
        return results[0]

    def synchronize(self) -> None:
        """Block until everything submitted so far has ended.

        Raises:
            RuntimeError: If called by work on this stream, which would wait for itself.
        """
        if threading.current_thread() is self._thread:
            raise RuntimeError(f"work on stream {self.name!r} cannot wait for its own stream")
        with self._lock:
            if not self._closed:
                event = Event()
                self._queue.put((_nothing, event))
        if self._closed:
            self._thread.join()
        else:
            event.wait()

    def close(self) -> None:
        """Refuse new work, let what is queued end, and end the thread; safe to call twice and from several threads."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._finalizer()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> CpuStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _work_through(
    work_queue: queue.SimpleQueue[tuple[Callable[[], Any], Event] | None],
    cores: tuple[int, ...] | None,
    background: bool,
) -> None:
    if cores is not None:
        pin(cores)
    if background:
        lower_priority()
    while (item := work_queue.get()) is not None:
        work, event = item
        error: BaseException | None = None
        try:
            work()
        except BaseException as exc:
            error = exc
        event.set(error)
        # Nothing may be kept alive while waiting for the next item, least of all the frames in a closure.
        del item, work, event, error


def _nothing() -> None:
    """The work of a mark in the queue."""


_FINISHED = Event()

"""The CPU as a device: cores shared out between consumer and producers, and streams that run work in order.

A *stream* is an in-order queue of work, CUDA's word. Here it is a worker thread (`CpuStream`), or the calling thread
itself (`InlineStream`): the frame that somebody waits for is answered without a change of threads.
"""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import TypeVar

from ..device.affinity import available_cores, physical_core
from ..device.stream import _FINISHED, CpuStream, InlineStream
from ..errors import ClosedError, InputError

__all__ = ["CoreShare", "CpuDevice"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A shallow consumer gains little beyond this many threads; the rest serves producers better.
_MOST_CONSUMER_THREADS = 4


@dataclass(frozen=True)
class CoreShare:
    """Who runs on which cores.

    Attributes:
        consumer_threads: Threads of the modules that answer frames.
        producer_threads: Threads of each producer stream's module.
        consumer_cores: Cores of the consumer; None where nothing is to be pinned.
        producer_cores: Cores of each producer stream.
        shared: Whether producers run on the consumer's cores, because there are too few to keep them apart.
    """

    consumer_threads: int
    producer_threads: tuple[int, ...]
    consumer_cores: tuple[int, ...] | None
    producer_cores: tuple[tuple[int, ...] | None, ...]
    shared: bool


class CpuDevice:
    """The cores this process may use, and the streams on them.

    Args:
        cores: Use at most so many cores; None uses all that the process's affinity allows.

    Raises:
        InputError: If `cores` is less than 1 or more than the process may use.
    """

    def __init__(self, cores: int | None = None) -> None:
        available = available_cores()
        if cores is not None and not 1 <= cores <= len(available):
            raise InputError(f"cores is {cores}, but this process may use 1 to {len(available)}")
        # Cores that are two threads of one physical core stand side by side, so that a share falls between real cores.
        self.cores: tuple[int, ...] = tuple(sorted(available, key=physical_core)[:cores])
        self._streams: weakref.WeakSet[CpuStream] = weakref.WeakSet()
        self._closed = False

    def share(self, producers: int = 1) -> CoreShare:
        """Share the cores out between one consumer and `producers` producer streams.

        With two cores or more the consumer has its own, at most half of them and at most four; the producers divide the
        rest, and share cores among themselves where there are fewer than producers. With a single core everybody has
        one thread on it, and the producers should run in the background (`stream(..., background=True)`).

        Raises:
            InputError: If `producers` is negative.
        """
        if producers < 0:
            raise InputError(f"the number of producers is {producers}, it must be 0 or more")
        if producers == 0:
            return CoreShare(len(self.cores), (), self.cores, (), shared=False)
        if len(self.cores) == 1:
            logger.info("one core only: the consumer and %d producer(s) take turns on it", producers)
            return CoreShare(1, (1,) * producers, self.cores, (self.cores,) * producers, shared=True)
        consumer = min(len(self.cores) // 2, _MOST_CONSUMER_THREADS)
        rest = self.cores[consumer:]
        parts: list[tuple[int, ...]]
        if producers >= len(rest):
            parts = [(rest[index % len(rest)],) for index in range(producers)]
        else:
            ends = [round(len(rest) * index / producers) for index in range(producers + 1)]
            parts = [rest[start:end] for start, end in pairwise(ends)]
        return CoreShare(consumer, tuple(map(len, parts)), self.cores[:consumer], tuple(parts), shared=False)

    def stream(self, name: str, *, cores: tuple[int, ...] | None = None, background: bool = False) -> CpuStream:
        """A new worker thread on `cores` (see `CpuStream`); the device closes it at the latest with itself.

        Raises:
            ClosedError: If the device is closed.
            InputError: If one of `cores` is not the device's.
        """
        if self._closed:
            raise ClosedError("the device is closed; make a new CpuDevice")
        if cores is not None and not (cores and set(cores) <= set(self.cores)):
            raise InputError(f"stream {name!r} asks for cores {cores}, the device has {self.cores}")
        stream = CpuStream(name, cores=cores, background=background)
        self._streams.add(stream)
        return stream

    def inline(self, name: str = "inline", *, cores: tuple[int, ...] | None = None) -> InlineStream:
        """The calling thread as a stream (see `InlineStream`).

        Raises:
            ClosedError: If the device is closed.
        """
        if self._closed:
            raise ClosedError("the device is closed; make a new CpuDevice")
        return InlineStream(name, cores=cores)

    def close(self) -> None:
        """Close every stream after its queued work; safe to call twice."""
        self._closed = True
        for stream in list(self._streams):
            stream.close()

    def __enter__(self) -> CpuDevice:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


_FINISHED.set()

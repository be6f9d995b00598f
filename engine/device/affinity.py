"""Where a thread runs and how eagerly: cores and priority, as far as the operating system lets a thread be told.

Linux does all of it. Elsewhere the calls do nothing, and say so once at INFO: it costs latency, never correctness.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

__all__ = ["available_cores", "lower_priority", "physical_core", "pin", "pinned"]

logger = logging.getLogger(__name__)

_BACKGROUND_NICENESS = 5


def available_cores() -> tuple[int, ...]:
    """The cores this process may run on, in ascending order."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def physical_core(core: int) -> tuple[int, int]:
    """A sort key that puts the hardware threads of one physical core side by side."""
    path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    try:
        # "0,8" or "0-1": the first number names the physical core.
        first = int(path.read_text().replace("-", ",").split(",")[0])
    except (OSError, ValueError):
        first = core
    return first, core


_said: set[str] = set()


def _say_once(message: str, *args: object) -> None:
    if message not in _said:
        _said.add(message)
        logger.info(message, *args)


def pin(cores: tuple[int, ...]) -> None:
    """Keep the calling thread, and the threads it starts from now on, on `cores`."""
    if not hasattr(os, "sched_setaffinity"):
        _say_once("this system cannot pin a thread to cores; streams run where it puts them")
        return
    try:
        os.sched_setaffinity(0, cores)
    except OSError as exc:
        # The cores may have been taken away since they were counted (cpuset of a container); slower, never wrong.
        _say_once("a thread could not be pinned to its cores (%s); it runs where the system puts it", exc)


@contextlib.contextmanager
def pinned(cores: tuple[int, ...] | None) -> Iterator[None]:
    """Pin the calling thread for the duration of a block; None leaves it alone."""
    if cores is None or not hasattr(os, "sched_getaffinity"):
        yield
        return
    before = tuple(os.sched_getaffinity(0))
    pin(cores)
    try:
        yield
    finally:
        pin(before)


def lower_priority() -> None:
    """Let the calling thread, and the threads it starts from now on, give way to others."""
    # Niceness belongs to a thread on Linux and to the whole process elsewhere, where it must not be touched.
    if not (hasattr(os, "sched_setaffinity") and hasattr(os, "setpriority")):
        _say_once("this system knows no priority of a single thread; background streams run at the normal one")
        return
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _BACKGROUND_NICENESS)
    except OSError as exc:
        _say_once("a thread's priority could not be lowered (%s); it runs at the normal one", exc)

"""Where a session takes its time from."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    pass

__all__ = ["Clock", "MonotonicClock"]


class Clock(Protocol):
    """Where a session takes its time from."""

    def now(self) -> float:
        """Seconds on a clock that never goes back."""
        ...

    def wait(self, condition: threading.Condition, seconds: float | None) -> None:
        """Wait on `condition`, which is held, until it is notified or the time is up; None sets no limit."""
        ...


class MonotonicClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        """Seconds since an arbitrary start."""
        return time.perf_counter()

    def wait(self, condition: threading.Condition, seconds: float | None) -> None:
        """Wait on `condition`, which is held, until it is notified or the time is up."""
        condition.wait(seconds)

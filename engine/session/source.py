"""Where a session's frames come from, as what runs them sees it."""

from __future__ import annotations

from typing import Protocol

__all__ = ["FrameSource"]


class FrameSource(Protocol):
    """Feeds frames to a runner, and knows when there are no more."""

    @property
    def period_ms(self) -> float | None:
        """Milliseconds from frame to frame; None where no rate is set."""
        ...

    @property
    def exhausted(self) -> bool:
        """Whether no more frame will arrive."""
        ...

    def feed(self) -> float | None:
        """Hand in the frames that are due; returns when the next one is, None where no time is set for it."""
        ...

    def prepare_ahead(self) -> None:
        """Nothing else is to do before the next frame is due: check its inputs now, off its latency."""
        ...

    def closed(self) -> None:
        """The session is closed; raises what the caller is to see."""
        ...

"""How far a long piece of work is, shown on stderr and never mixed into a command's output."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["ProgressBar", "Report", "silent"]

Report = Callable[[str, int, int], None]
"""What long work calls to say how far it is: ``report(stage, done, total)``, `done` from 0 to `total`."""


def silent(stage: str, done: int, total: int) -> None:
    """Report to nobody."""


class ProgressBar:
    """A bar a stage on a terminal; on a pipe or a log file one line when a stage begins.

    Use it as a context manager and hand it on as a `Report`::

        with ProgressBar() as progress:
            progress("whole generator", 12, 300)
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        """Args:
        stream: Where to draw; default ``sys.stderr``.
        """
        self._stream = sys.stderr if stream is None else stream
        self._bars: Progress | None = None
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> ProgressBar:
        if self._stream.isatty():
            # Imported here: a command that shows nothing should not pay a tenth of a second for it.
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            console = Console(file=self._stream)
            if console.is_terminal and not console.is_dumb_terminal:
                columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
                self._bars = Progress(*columns, console=console)
                self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` steps of `stage` are done; a new stage opens a new bar."""
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total) if self._bars is not None else None
            if self._bars is None:
                print(f"{stage} ...", file=self._stream, flush=True)
        if self._bars is not None:
            self._bars.update(self._tasks[stage], completed=done, total=total)

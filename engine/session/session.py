"""One client's sequence of frames through an engine: inputs in, answers out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

from ..errors import ClosedError, InputError
from ..promise.calibration import Quality
from ..telemetry import SessionStatistics, Telemetry
from .clock import Clock, MonotonicClock
from .frame import Frame
from .intake import Intake
from .parts import SessionParts
from .reader import Rendering, Submitted
from .runner import FrameRunner

__all__ = ["Session"]


class Session:
    """One client's frames. Made by `Engine.session`; owns the caches, the engine owns none.

    Either `render` a stream of inputs, or `submit` frames from one thread and iterate over `frames` in another. An
    iterator that has raised an error goes on with the next frame when it is asked again.

    Args:
        parts: What the engine gives it; the engine must outlive the session.
        clock: Where time comes from; tests give their own.
    """

    def __init__(self, parts: SessionParts, *, clock: Clock | None = None) -> None:
        self._parts = parts
        self._clock: Clock = MonotonicClock() if clock is None else clock
        self._telemetry = Telemetry(graphs=parts.workspace.graphs)
        self._intake = Intake(parts)
        self._runner = FrameRunner(parts, self._clock, self._telemetry)

    @property
    def statistics(self) -> SessionStatistics:
        """What the session has done so far."""
        return self._telemetry.snapshot()

    def render(self, inputs: Mapping[str, Any], *, fps: float | None = None) -> Iterator[Frame]:
        """Answer a stream of inputs.

        Args:
            inputs: One array per input of the bundle, its leading axis time instead of the batch axis of 1; an array of
                leading extent 1 never changes. They are not copied where they are C-contiguous: leave them as they are
                until the last frame is answered. On a GPU also arrays there (DLPack, `__cuda_array_interface__`).
            fps: Frames arrive at this rate, in real time, from the first time the iterator is asked, and under a live
                policy the newest input wins. None: a frame arrives when the one before it was answered.

        Returns:
            An iterator over the answered frames, in order.

        Raises:
            InputError: At once if names, dtypes, shapes or lengths are wrong; from the iterator, before the frame
                runs, if a frame's inputs hold NaN or Inf.
            DeadlineError: From the iterator, if no young enough cache is there and the engine was told to raise.
            BackendError: From the iterator, if the frame's exit failed.
            ClosedError: If the session is closed or finished.
        """
        if fps is not None and not (math.isfinite(fps) and fps > 0):
            raise InputError(f"fps is {fps}; give a positive number of frames per second, or None for no pacing")
        self._runner.require_open()
        return Rendering(self._intake, self._runner, inputs, fps)

    def submit(
        self,
        inputs: Mapping[str, Any],
        *,
        timeout: float | None = None,
        quality: Quality | None = None,
        deadline_ms: float | None = None,
    ) -> int:
        """Hand in the inputs of one frame; `frames` gives the answer. Safe from any thread.

        The arrays are copied, so the caller may use them again at once. Under a live policy a frame that still waits
        is dropped for this one; under lockstep nothing is dropped, and the call waits while the queue is full. Of a
        generator that carries state only answers are dropped: the call waits too where the state cannot keep up.

        On a GPU, arrays that are there already are borrowed instead, by DLPack or `__cuda_array_interface__`, in order
        on their owner's stream: leave them as they are until the frame, and a producer that took it, have ended
        (`Engine.synchronize`). Their values are not looked at, whatever `validate` says.

        Args:
            inputs: One array per input of the bundle, leading axis 1.
            timeout: Seconds to wait for room; None waits for as long as it takes.
            quality: What this frame is to keep; None is the engine's quality. One that was not asked for before costs
                this call some time, and no other.
            deadline_ms: Milliseconds from this call that the frame's answer may take; None is the engine's deadline.

        Returns:
            The frame's index.

        Raises:
            InputError: If names, dtype or shape are wrong, a value is NaN or Inf, or the quality cannot be promised; no
                index is used up.
            DeadlineError: If there was no room in time.
            ClosedError: If the session is closed or finished.
        """
        arrived = self._clock.now()
        self._runner.require_open()
        try:
            rule = None if quality is None else self._parts.rule_for(quality)
            if deadline_ms is not None:
                deadline_ms = self._parts.frame_deadline(deadline_ms)
            adopted = self._intake.adopt(inputs)
            taken = {name: self._intake.take(name, array, keep=True) for name, array in adopted.items()}
        except InputError:
            self._telemetry.rejected()
            raise
        self._telemetry.copied((self._clock.now() - arrived) * 1e3)
        return self._runner.submit(taken, arrived, timeout=timeout, rule=rule, deadline_ms=deadline_ms)

    def frames(self) -> Iterator[Frame]:
        """The answers to submitted frames, in order, as they come; ends after `finish` or `close`.

        Raises:
            DeadlineError: From the iterator, if no young enough cache is there and the engine was told to raise.
            BackendError: From the iterator, if the frame's exit failed.
            ClosedError: If the session is closed.
        """
        if self._runner.closed:
            raise ClosedError("the session is closed; open a new one with engine.session()")
        return Submitted(self._runner)

    def finish(self) -> None:
        """Declare that no more input comes: `frames` ends after what was submitted. Safe to call twice."""
        self._runner.finish()

    def reset(self) -> None:
        """Begin another sequence with the next frame, as in a new session; the statistics go on.

        The state starts with its first value again, no cache of an earlier frame is used, and frames that wait for
        their answer are dropped. The answer that is being made is still given.

        Raises:
            ClosedError: If the session is closed or finished.
        """
        self._runner.reset()

    def close(self) -> None:
        """Stop: what waits is forgotten, `frames` ends, producers that run end unheard. Safe to call twice."""
        self._runner.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

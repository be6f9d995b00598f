"""What iterates over a session: where its frames come from, when they are due, and when there are no more."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Self

import numpy as np

from ..errors import ClosedError, InputError
from ..spec import Array
from .frame import Frame
from .intake import Intake
from .runner import FrameRunner

__all__ = ["Reader", "Rendering", "Submitted"]


class Reader(ABC):
    """An iterator over a session's answers that feeds it too (a `FrameSource`)."""

    def __init__(self, runner: FrameRunner) -> None:
        self._runner = runner
        self.period_ms: float | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Frame:
        return self._runner.next_frame(self)

    @property
    @abstractmethod
    def exhausted(self) -> bool:
        """Whether no more frame will arrive."""

    def feed(self) -> float | None:
        """Nothing is handed in from here."""
        return None

    def prepare_ahead(self) -> None:
        """Nothing is prepared here."""
        return

    def closed(self) -> None:
        """The session is closed: the iterator ends."""
        raise StopIteration


class Submitted(Reader):
    """Frames that another thread submits."""

    @property
    def exhausted(self) -> bool:
        return self._runner.ended


class Rendering(Reader):
    """Frames of a stream of inputs that is there as a whole."""

    def __init__(self, intake: Intake, runner: FrameRunner, inputs: Mapping[str, Array], fps: float | None) -> None:
        super().__init__(runner)
        self._intake = intake
        inputs = intake.adopt(inputs)
        self._length = _check_lengths(intake, inputs)
        # What never changes is checked once, here; what does, frame by frame.
        self._constant = {
            name: intake.take(name, array, keep=False) for name, array in inputs.items() if array.shape[0] == 1
        }
        self._moving = {name: array for name, array in inputs.items() if array.shape[0] != 1}
        self._position = 0
        self._period = None if fps is None else 1.0 / fps
        self.period_ms = None if fps is None else 1e3 / fps
        self._start: float | None = None
        self._prepared: dict[str, Array] | None = None
        self._refused: InputError | None = None

    @property
    def exhausted(self) -> bool:
        return self._position >= self._length

    def closed(self) -> None:
        raise ClosedError("the session was closed while it rendered; open a new one with engine.session()")

    def feed(self) -> float | None:
        if self._runner.closed:
            self.closed()
        if self._period is None:
            if self._position < self._length and self._runner.quiet:
                self.prepare_ahead()
                self._hand_in(self._runner.now())
            return None
        if self._start is None:
            self._start = self._runner.now()
        while self._position < self._length and self._runner.has_room:
            due = self._start + self._position * self._period
            if due > self._runner.now():
                return due
            self._hand_in(due)
        return None

    def prepare_ahead(self) -> None:
        if self._runner.closed:
            return
        if self._prepared is None and self._refused is None and self._position < self._length:
            try:
                self._prepared = self._prepare()
            except InputError as exc:
                self._refused = exc  # raised when the frame is due, not while frames before it are unanswered

    def _prepare(self) -> dict[str, Array]:
        position, runner = self._position, self._runner
        started = runner.now()
        inputs = dict(self._constant)
        try:
            for name, array in self._moving.items():
                inputs[name] = self._intake.take(name, array[position : position + 1], keep=False)
        except InputError as exc:
            raise InputError(f"frame {position}: {exc}") from exc
        runner.prepared((runner.now() - started) * 1e3)
        return inputs

    def _hand_in(self, arrived: float) -> None:
        self.prepare_ahead()
        inputs, refused, self._prepared, self._refused = self._prepared, self._refused, None, None
        self._position += 1
        if refused is not None:
            self._runner.reject()
            raise refused
        assert inputs is not None
        self._runner.arrive(inputs, arrived)


def _check_lengths(intake: Intake, inputs: Mapping[str, Array]) -> int:
    """The number of frames, after checking dtypes, shapes and that the lengths agree."""
    longest, length = "", 1
    for name, array in inputs.items():
        spec = intake.spec(name)
        wanted = spec.shape[1:]
        if array.dtype != np.dtype(spec.dtype):
            raise InputError(f"input {name!r} has dtype {array.dtype}, expected {spec.dtype}; convert it first")
        if array.ndim != len(spec.shape) or array.shape[1:] != wanted:
            expected = ", ".join(["time", *map(str, wanted)])
            raise InputError(f"input {name!r} has shape {array.shape}, expected ({expected})")
        if array.shape[0] == 0:
            raise InputError(f"input {name!r} is empty; give at least one frame")
        if array.shape[0] != 1:
            if longest and array.shape[0] != length:
                raise InputError(
                    f"input {name!r} has {array.shape[0]} frames and {longest!r} has {length}; "
                    "give equally many, or one frame of what never changes"
                )
            longest, length = name, array.shape[0]
    return length

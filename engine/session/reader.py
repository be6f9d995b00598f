"""What iterates over a session: where its frames come from, when they are due, and when there are no more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Self

import numpy as np

from ..errors import ClosedError, InputError
from ..spec import Array

if TYPE_CHECKING:
    from .frame import Frame
    from .session import Session

__all__ = ["Reader", "Rendering", "Submitted"]


class Reader:
    """What iterates over a session: where its frames come from, and when it ends."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.period_ms: float | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Frame:
        return self._session.next_frame(self)

    @property
    def exhausted(self) -> bool:
        """Whether no more frame will arrive."""
        raise NotImplementedError  # each kind of reader says it; none of its own is ever made

    def feed(self) -> float | None:
        """Hand in the frames that are due; returns when the next one is, None where no time is set for it."""
        return None

    def prepare_ahead(self) -> None:
        """Nothing else is to do before the next frame is due: check its inputs now, off its latency."""

    def closed(self) -> None:
        """The session is closed; raises what the caller is to see."""
        raise StopIteration


class Submitted(Reader):
    """Frames that another thread submits."""

    @property
    def exhausted(self) -> bool:
        return self._session.ended


class Rendering(Reader):
    """Frames of a stream of inputs that is there as a whole."""

    def __init__(self, session: Session, inputs: Mapping[str, Array], fps: float | None) -> None:
        super().__init__(session)
        inputs = session.adopt(inputs)
        self._length = _check_lengths(session, inputs)
        # What never changes is checked once, here; what does, frame by frame.
        self._constant = {
            name: session.take_input(name, array, keep=False) for name, array in inputs.items() if array.shape[0] == 1
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
        if self._session.closed:
            self.closed()
        if self._period is None:
            if self._position < self._length and self._session.quiet:
                self.prepare_ahead()
                self._hand_in(self._session.now())
            return None
        if self._start is None:
            self._start = self._session.now()
        while self._position < self._length and self._session.has_room:
            due = self._start + self._position * self._period
            if due > self._session.now():
                return due
            self._hand_in(due)
        return None

    def prepare_ahead(self) -> None:
        if self._session.closed:
            return
        if self._prepared is None and self._refused is None and self._position < self._length:
            try:
                self._prepared = self._prepare()
            except InputError as exc:
                self._refused = exc  # raised when the frame is due, not while frames before it are unanswered

    def _prepare(self) -> dict[str, Array]:
        position, session = self._position, self._session
        started = session.now()
        inputs = dict(self._constant)
        try:
            for name, array in self._moving.items():
                inputs[name] = session.take_input(name, array[position : position + 1], keep=False)
        except InputError as exc:
            raise InputError(f"frame {position}: {exc}") from exc
        session.prepared((session.now() - started) * 1e3)
        return inputs

    def _hand_in(self, arrived: float) -> None:
        self.prepare_ahead()
        inputs, refused, self._prepared, self._refused = self._prepared, self._refused, None, None
        self._position += 1
        if refused is not None:
            self._session.reject()
            raise refused
        assert inputs is not None
        self._session.arrive(inputs, arrived)


def _check_lengths(session: Session, inputs: Mapping[str, Array]) -> int:
    """The number of frames, after checking dtypes, shapes and that the lengths agree."""
    longest, length = "", 1
    for name, array in inputs.items():
        spec = session.spec(name)
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

"""Clips of inputs, and which of their frames training sees and which are kept back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ...engine.errors import InputError
from ...engine.spec import Array

__all__ = ["HOLDOUT_SHARE", "Clip", "Stream", "training_and_held"]

HOLDOUT_SHARE = 0.25
"""Of the inputs, where no holdout is given: the part at the end that training does not see."""


class Stream(Protocol):
    """A clip of inputs in memory: arrays by name [T, ...], and ground-truth images where there are some."""

    @property
    def arrays(self) -> dict[str, Array]:
        """Inputs and motion."""

    @property
    def frames(self) -> int:
        """Their number."""

    @property
    def fps(self) -> float | None:
        """Frames a second, where known."""

    @property
    def truth(self) -> Array | None:
        """Images that the outputs should show, float32 [T, C, H, W]."""


@dataclass(frozen=True)
class Clip:
    """A stream, or a part of one in time; see `Stream`."""

    arrays: dict[str, Array]
    frames: int
    fps: float | None
    truth: Array | None

    @classmethod
    def of(cls, stream: Stream, *, without: str | None = None) -> Clip:
        """The stream, all its arrays but `without`."""
        arrays = {name: array for name, array in stream.arrays.items() if name != without}
        return cls(arrays, stream.frames, stream.fps, stream.truth)

    def part(self, first: int, last: int) -> Clip:
        """Frames `first` to `last` - 1; arrays of leading extent 1 serve them all."""
        arrays = {name: array if len(array) == 1 else array[first:last] for name, array in self.arrays.items()}
        return Clip(arrays, last - first, self.fps, None if self.truth is None else self.truth[first:last])


def training_and_held(stream: Clip, holdout: Stream | None, *, training: bool) -> tuple[Clip, Clip]:
    """Training frames and held-back frames.

    Args:
        stream: Frames to train on, and to keep some back of where there is no holdout.
        holdout: Frames that training is not to see, with `stream`'s arrays at least, or None.
        training: Whether anything is trained: else nothing needs to be kept back.

    Raises:
        InputError: If the holdout does not fit the stream, or there are too few frames.
    """
    if holdout is not None:
        lacking = sorted(set(stream.arrays) - set(holdout.arrays))
        if lacking:
            raise InputError(f"the holdout lacks {lacking[0]!r}, which the training inputs have; add it")
        for name, array in stream.arrays.items():
            other = holdout.arrays[name]
            if other.shape[1:] != array.shape[1:] or other.dtype != array.dtype:
                raise InputError(
                    f"holdout array {name!r} is {other.dtype} {other.shape[1:]} a frame, the training inputs' is "
                    f"{array.dtype} {array.shape[1:]}; make them alike"
                )
        if training and stream.frames < 2:
            raise InputError(f"training needs at least 2 frames, the inputs hold {stream.frames}; give a longer clip")
        held = Clip({n: holdout.arrays[n] for n in stream.arrays}, holdout.frames, holdout.fps, holdout.truth)
        return stream, held
    cut = stream.frames - max(2, int(stream.frames * HOLDOUT_SHARE))
    if cut < 2:
        if not training:  # nothing needs to be kept back, and choosing a cut takes 2 frames
            return stream, stream
        raise InputError(
            f"the inputs hold {stream.frames} frames; training and calibration need at least 4, or give --holdout"
        )
    return stream.part(0, cut), stream.part(cut, stream.frames)

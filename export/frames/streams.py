"""Streams of inputs, frame by frame, and how long work says how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from ...engine.spec import Array, TensorSpec

__all__ = ["Progress", "frame_at", "frames_of"]

Progress = Callable[[str, int, int], None]
"""What long work calls to say how far it is: stage, done, total."""


def frames_of(arrays: Mapping[str, Array], names: Sequence[str]) -> Iterator[dict[str, Array]]:
    """Inputs of every frame, by name; an array of leading extent 1 serves all."""
    frames = max(len(array) for array in arrays.values())
    wanted = {name: arrays[name] for name in names}
    for t in range(frames):
        yield frame_at(wanted, t)


def spec_of(name: str, array: Array) -> TensorSpec:
    """Spec of one frame of a stream's array."""
    return TensorSpec(name, str(array.dtype), (1, *array.shape[1:]))


def frame_at(stream: Mapping[str, Array], t: int) -> dict[str, Array]:
    """Inputs of frame t; an array of leading extent 1 never changes and serves every frame."""
    return {name: array if array.shape[0] == 1 else array[t : t + 1] for name, array in stream.items()}

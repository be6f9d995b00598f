"""Where the inputs of a generator carry the motion of a surface."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Surface"]


@dataclass(frozen=True)
class Surface:
    """Where a generator's inputs carry the motion of a surface (docs/architecture.md, Motion).

    Attributes:
        atlas: Name of the atlas array in the stream, float32 [T, 3, h, w]; not a generator input.
        uv: Input, and first and last-plus-one channel, that hold u and v in [0, 1] (u right, v down).
        mask: Input and channel that hold coverage.
    """

    atlas: str
    uv: tuple[str, int, int]
    mask: tuple[str, int]

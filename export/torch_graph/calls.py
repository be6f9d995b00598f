"""One node of a graph as the PyTorch operators see it: attributes, constants and traced shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...engine.errors import ExportError
from ...engine.spec import Array

__all__ = ["Call", "Maker", "Run", "Shape", "as_many_frames"]

Shape = tuple[int, ...]
Run = Callable[..., Tensor | Sequence[Tensor]]
"""Takes the node's inputs in order (None for those left out), gives its output, or all of them."""


@dataclass(frozen=True)
class Call:
    """One node with what is known about it before anything runs.

    Attributes:
        operator: Its operator.
        name: Its name.
        attributes: Attribute name -> value; strings as `str`.
        read_constant: Position of an input -> its value, None where that is computed from graph inputs.
        shapes: Traced shapes of the inputs; None for those left out.
        results: Traced shapes of the outputs.
    """

    operator: str
    name: str
    attributes: Mapping[str, Any]
    read_constant: Callable[[int], Array | None]
    shapes: tuple[Shape | None, ...]
    results: tuple[Shape, ...]

    def has(self, position: int) -> bool:
        """Whether the optional input is given."""
        return position < len(self.shapes) and self.shapes[position] is not None

    def shape(self, position: int) -> Shape:
        """Traced shape of an input that is given."""
        shape = self.shapes[position]
        assert shape is not None
        return shape

    def setting(self, position: int) -> Array:
        """Value of an input that has to be a constant.

        Raises:
            ExportError: If it depends on the graph's inputs.
        """
        value = self.read_constant(position)
        if value is None:
            raise self.refuse(f"input {position} depends on the graph's inputs")
        return value

    def integers(self, position: int) -> list[int]:
        """A constant input as a list of integers."""
        return [int(value) for value in self.setting(position).reshape(-1)]

    def axes(self, position: int = 1) -> list[int]:
        """Non-negative axes of input 0 that a constant input, or the attribute ``axes``, names; all where none does."""
        rank = len(self.shape(0))
        named = self.integers(position) if self.has(position) else list(self.attributes.get("axes", ()))
        if not named:
            return [] if self.attributes.get("noop_with_empty_axes", 0) else list(range(rank))
        return [axis % rank for axis in named]

    def refuse(self, why: str) -> ExportError:
        """The error for what PyTorch cannot do, to be raised."""
        return ExportError(f"node {self.name!r} ({self.operator}) cannot run in PyTorch: {why}; train another part")


Maker = Callable[[Call], Run]
"""Reads what a node says once, and gives the function that runs it."""


def as_many_frames(parts: Sequence[Tensor]) -> list[Tensor]:
    """The tensors with those of one frame repeated for as many as the others have."""
    frames = max(part.shape[0] for part in parts)
    return [part if part.shape[0] == frames else part.expand(frames, *part.shape[1:]) for part in parts]

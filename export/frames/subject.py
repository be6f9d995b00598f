"""What is compiled: a generator's graph and its frames, checked against each other before any work is done."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from onnx import ModelProto

from ...engine.errors import InputError
from ...engine.spec import Array
from ..graph.index import GraphIndex
from ..graph.surgery import without_outputs
from .clip import Stream
from .state import State, is_picture
from .surface import Surface

__all__ = ["Subject"]


@dataclass(frozen=True)
class Subject:
    """A generator and its frames.

    Attributes:
        model: The whole, in normal form.
        train: Frames that are trained on.
        held: Frames that are calibrated on.
        surface: Where the inputs carry the surface's motion, or None.
        state: What the generator carries from frame to frame; `train` and `held` hold what every frame starts with.
    """

    model: ModelProto
    train: Stream
    held: Stream
    surface: Surface | None = None
    state: tuple[State, ...] = ()

    @cached_property
    def answering(self) -> ModelProto:
        """The whole without the next state: what a frame is answered with."""
        return without_outputs(self.model, {one.output for one in self.state})

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """The generator's inputs, in its order, the state among them."""
        return GraphIndex(self.model).inputs

    @property
    def state_inputs(self) -> frozenset[str]:
        """Those that a frame is not fed with."""
        return frozenset(one.input.name for one in self.state)

    @property
    def state_outputs(self) -> tuple[str, ...]:
        """Those that no frame is answered with."""
        return tuple(one.output for one in self.state)

    @cached_property
    def image_output(self) -> str | None:
        """The first output that is a picture."""
        index = GraphIndex(self.answering)
        return next((name for name in index.outputs if is_picture(index.specs[name])), None)

    @property
    def sample(self) -> dict[str, Array]:
        """The generator's inputs over the whole training part: its beginning may hardly move."""
        return {name: self.train.arrays[name] for name in self.inputs}

    def check(self) -> None:
        """Refuse, before the cut is searched for, what could not be compared in the end.

        Raises:
            InputError: If the truth does not fit.
        """
        specs = GraphIndex(self.model).specs
        for stream in (self.train, self.held):
            if stream.truth is None:
                continue
            if self.image_output is None:
                raise InputError("the inputs hold a truth, but no output is an image to compare with it; leave it out")
            if stream.truth.shape[1:] != specs[self.image_output].shape[1:]:
                raise InputError(
                    f"the truth is {list(stream.truth.shape[1:])} a frame, but output {self.image_output!r} is "
                    f"{list(specs[self.image_output].shape[1:])}; make them alike, or leave it out"
                )

"""What a device offers an engine: where modules are loaded, and what a session has there.

An engine and its sessions speak of frames, slots and answers only. A `Placement` loads the bundle's modules on its
device's streams; a `Workspace` holds one session's memory there, and its *lanes*: one module each, with the way in for
a frame's inputs and the way out for its answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ..bundle.manifest import Manifest
from ..bundle.roles import Route
from ..spec import Array, TensorSpec
from .module import Module
from .stream import Event, Stream

__all__ = ["Lane", "LoadedModule", "Placement", "Workspace"]


@dataclass(frozen=True)
class LoadedModule:
    """A module, the stream it was loaded for, and which of its inputs come from the frame and which from the cache."""

    module: Module
    stream: Stream
    frame_inputs: tuple[str, ...]
    cache_inputs: tuple[str, ...]

    @classmethod
    def of(cls, module: Module, stream: Stream, manifest: Manifest) -> LoadedModule:
        """Sort the inputs of `module` by where they come from."""
        cache = {spec.name for spec in manifest.cache}
        return cls(
            module,
            stream,
            # A predictor's age comes with the frame's inputs.
            frame_inputs=tuple(spec.name for spec in module.inputs if spec.name not in cache),
            cache_inputs=tuple(spec.name for spec in module.inputs if spec.name in cache),
        )


class Lane(Protocol):
    """One module of one session."""

    def enqueue(self, inputs: Mapping[str, Any], slot: int | None, outputs: Mapping[str, Any]) -> Event:
        """Run the module on its stream.

        Args:
            inputs: A frame's inputs as `Workspace.take_input` gave them; those that the module takes are picked.
            slot: The cache slot that an exit reads and a producer writes; None for an exit that reads none.
            outputs: An exit's answer, as `Workspace.take_outputs` gave it; empty for a producer. A predictor's come
                from `Workspace.take_prediction`, the auditor's from `Workspace.take_audit`.

        Returns:
            Done when the outputs, or the slot, are written.
        """
        ...


class Workspace(Protocol):
    """What one session has on the device: cache slots, memory for answers, and lanes through the engine's modules."""

    @property
    def graphs(self) -> int:
        """How many graphs are replayed instead of being issued call by call."""
        ...

    def adopt(self, spec: TensorSpec, array: Any) -> Any:
        """See what the caller gave for the input `spec` as an array with dtype and shape, one frame or many.

        Raises:
            InputError: If it is no array that this device can take.
        """
        ...

    def take_input(self, spec: TensorSpec, array: Any, *, finite: bool, keep: bool) -> Any:
        """Check one input of a frame, and make of it what lanes take.

        Args:
            spec: What it must be.
            array: One frame of what `adopt` gave.
            finite: Refuse NaN and Inf where the array can be looked at from here.
            keep: The caller may change the array as soon as this returns, so a copy is needed.

        Raises:
            InputError: If it does not fit; nothing was done.
        """
        ...

    def take_outputs(self) -> dict[str, Any]:
        """Memory for one answer, the caller's alone while anything refers to it."""
        ...

    def reserve(self) -> None:
        """See to it that the next `take_outputs` needs no fresh memory; cheap where that is so."""
        ...

    def exit(self, route: Route) -> Lane:
        """The lane of the exit `route`. As a mere fallback on the CPU its module is loaded when first needed."""
        ...

    def producer(self, index: int) -> Lane:
        """The lane of a producer."""
        ...

    def predictor(self, cold: bool) -> Lane:
        """The lane of a predictor, on the consumer's stream.

        ``predictor`` takes a slot, and with the frame's inputs ``age``: what `take_input` made of an `AGE_SPEC` array.
        ``predictor_cold`` takes the frame's inputs alone, and no slot. Only a placement that loaded them has them.
        """
        ...

    def take_prediction(self, cold: bool) -> dict[str, Array]:
        """Host memory for what a predictor gives, by name as its module says.

        The workspace's own and the same every time: read it before the next prediction. The lane's event is done when
        the values are there to be read.
        """
        ...

    def finite(self, outputs: Mapping[str, Any]) -> bool:
        """Whether an answer, whose lane has ended, holds neither NaN nor Inf; called for every routed frame.

        Args:
            outputs: What `take_outputs` gave and an exit's lane filled.
        """
        ...

    def auditor(self) -> Lane:
        """The lane of the whole generator on a background stream, where it holds up no frame.

        It takes what `keep_for_audit` gave, no slot, and what `take_audit` gave. Only a placement that loaded an
        auditor has it.
        """
        ...

    def keep_for_audit(self, inputs: Mapping[str, Any], image: Any) -> tuple[dict[str, Any], Array]:
        """Copy a frame's inputs and the picture it was answered with, to be compared later.

        The copies are in memory of the workspace's own, one set: no audit of this session may be under way. They stay
        as they are whatever the caller does with his arrays and with the answer. Called on the thread that answers
        frames, when the answer's lane has ended.

        Args:
            inputs: The frame's inputs, as `take_input` gave them; those that the generator takes are kept.
            image: One of the answer's outputs.

        Returns:
            The inputs as the auditor's lane takes them; the picture on the host, complete, float32.
        """
        ...

    def take_audit(self) -> dict[str, Array]:
        """Host memory for the auditor's answer by output name: the workspace's own and the same every time."""
        ...

    def close(self) -> None:
        """Give back what the device holds for the session, after the work that runs; safe to call twice."""
        ...


class Placement(Protocol):
    """Where an engine's modules run."""

    @property
    def name(self) -> str:
        """What people call it: ``cpu/onnxruntime``, ``cuda:0/tensorrt-rtx``."""
        ...

    @property
    def loads_ahead(self) -> bool:
        """Whether every exit that may ever run is loaded with the engine, because loading would hold up a frame."""
        ...

    def load(self, exits: Iterable[Route], *, predictors: tuple[str, ...] = (), auditor: bool = False) -> None:
        """Load the producers that the policy needs, and these exits.

        Args:
            exits: Names of exits.
            predictors: Of ``predictor`` and ``predictor_cold``, those to load for the consumer's stream.
            auditor: Also load the whole generator for a background stream, with memory of its own: a run of it and the
                exits' may overlap.

        Raises:
            BackendError: If an executor is missing or refuses a graph.
        """
        ...

    def workspace(self, slots: int) -> Workspace:
        """Memory and lanes for one session with so many cache slots."""
        ...

    def synchronize(self) -> None:
        """Wait until every producer that was started has ended."""
        ...

    def close(self) -> None:
        """Wait for what runs and unload the modules; safe to call twice."""
        ...

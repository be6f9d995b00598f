"""What a device offers an engine: where modules are loaded, and what a session has there.

An engine and its sessions speak of frames, slots and answers only. A `Placement` loads the bundle's modules on its
device's streams; a `Workspace` holds one session's memory there, and its *lanes*: one module each, with the way in for
a frame's inputs and the way out for its answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..bundle.manifest import Manifest, StateRecord
from ..bundle.roles import Role, Route
from ..spec import Array, TensorSpec
from .module import Module
from .stream import Event, Stream

__all__ = ["Lane", "LoadedModule", "LoadedModules", "Placement", "Wanted", "Workspace"]


@dataclass(frozen=True)
class LoadedModule:
    """A module, the stream it was loaded for, and where its inputs come from.

    Attributes:
        module: What runs.
        stream: Where it runs.
        frame_inputs: Inputs that come with the frame; a predictor's age among them.
        cache_inputs: Inputs that are read from a cache slot.
        state: What it hands from frame to frame: read as an input, written as an output.
        fills_slot: Whether its outputs are a cache slot's tensors.
    """

    module: Module
    stream: Stream
    frame_inputs: tuple[str, ...]
    cache_inputs: tuple[str, ...]
    state: tuple[StateRecord, ...] = ()
    fills_slot: bool = False

    @classmethod
    def of(cls, module: Module, stream: Stream, manifest: Manifest) -> LoadedModule:
        """Sort the inputs and outputs of `module` by where they come from and go to."""
        cache = {spec.name for spec in manifest.cache}
        state = {record.input.name: record for record in manifest.state}
        read = [spec.name for spec in module.inputs]
        return cls(
            module,
            stream,
            frame_inputs=tuple(name for name in read if name not in cache and name not in state),
            cache_inputs=tuple(name for name in read if name in cache),
            # A state may be written and not read, by a generator that only counts; never the other way round.
            state=tuple(
                record for record in manifest.state if any(spec.name == record.output for spec in module.outputs)
            ),
            fills_slot=any(spec.name in cache for spec in module.outputs),
        )

    @property
    def answers(self) -> tuple[TensorSpec, ...]:
        """What it writes besides the state."""
        state = {record.output for record in self.state}
        return tuple(spec for spec in self.module.outputs if spec.name not in state)


@dataclass(frozen=True)
class LoadedModules:
    """What an engine has loaded for its sessions.

    Attributes:
        producers: One a producer stream; empty where none runs.
        exits: By route.
        predictors: By role.
        auditor: The whole generator once more, on a background stream; None where nothing is audited.
    """

    producers: tuple[LoadedModule, ...] = ()
    exits: Mapping[Route, LoadedModule] = field(default_factory=dict)
    predictors: Mapping[Role, LoadedModule] = field(default_factory=dict)
    auditor: LoadedModule | None = None

    @property
    def background(self) -> tuple[LoadedModule, ...]:
        """Those whose work may go on when a frame is answered."""
        return self.producers if self.auditor is None else (*self.producers, self.auditor)


@dataclass(frozen=True)
class Wanted:
    """What is to be loaded besides the producers, which follow from the policy.

    Attributes:
        exits: Names of exits.
        predictors: Of `Role.PREDICTOR` and `Role.PREDICTOR_COLD`, those to load for the consumer's stream.
        auditor: Also load the whole generator for a background stream, with memory of its own: a run of it and the
            exits' may overlap.
    """

    exits: tuple[Route, ...]
    predictors: tuple[Role, ...] = ()
    auditor: bool = False


class Lane(Protocol):
    """One module of one session."""

    def take_outputs(self) -> dict[str, Any]:
        """Memory for what one run gives, by output name.

        An exit's is the caller's alone while anything refers to it. A predictor's and the auditor's is the lane's own,
        on the host, and the same every time: read it before the next run. A producer's is empty: it fills a slot.
        """
        ...

    def enqueue(
        self, inputs: Mapping[str, Any], slot: int | None, outputs: Mapping[str, Any], *, fresh: bool = False
    ) -> Event:
        """Run the module on its stream.

        Args:
            inputs: A frame's inputs as `Workspace.take_input` gave them; those that the module takes are picked.
            slot: The cache slot that an exit reads and a producer writes; None for an exit that reads none.
            outputs: From `take_outputs`.
            fresh: The frame is the first of a sequence: state starts with its first value.

        Returns:
            Done when the outputs, or the slot, are written, and the state is the next frame's. A run that fails leaves
            the state as it was.
        """
        ...


class Workspace(Protocol):
    """What one session has on the device: cache slots, state, memory for answers, and lanes through the modules."""

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

    def exit(self, route: Route) -> Lane:
        """The lane of the exit `route`. As a mere fallback on the CPU its module is loaded when first needed."""
        ...

    def lane(self, role: Role, index: int = 0) -> Lane:
        """The lane of a module that answers no frame.

        Args:
            role: `Role.PRODUCER`; `Role.PREDICTOR`, which takes a slot and with the frame's inputs the age, what
                `take_input` made of an `AGE_SPEC` array; `Role.PREDICTOR_COLD`, which takes no slot; `Role.WHOLE`, the
                auditor: the whole generator on a background stream, where it holds up no frame, fed with what
                `keep_for_audit` gave. Only those that the placement loaded are there.
            index: Which producer.
        """
        ...

    def reserve(self) -> None:
        """See to it that an exit's next `Lane.take_outputs` needs no fresh memory; cheap where that is so."""
        ...

    def finite(self, outputs: Mapping[str, Any]) -> bool:
        """Whether an answer, whose lane has ended, holds neither NaN nor Inf; called for every routed frame."""
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

    def load(self, wanted: Wanted) -> None:
        """Load the producers that the policy needs, and what is wanted.

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

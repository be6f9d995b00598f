"""A session's memory on the CPU, and lanes that bind the caller's arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from ..bundle.roles import Role, Route
from ..device.placement import Lane, LoadedModule, LoadedModules
from ..device.pools import OutputPool
from ..device.stream import Event
from ..errors import InputError
from ..spec import Array, TensorSpec
from .slots import SlotBuffers

__all__ = ["CpuWorkspace", "DirectLane"]


class CpuWorkspace:
    """A session's memory on the CPU. Lanes bind it as it is: nothing is copied.

    Args:
        modules: What is loaded.
        late: Loads the module of an exit that is needed only now.
        slots: The cache slots' memory.
        outputs: What an answer is.
        first_state: The first value of every state tensor, by the name it is read by.
    """

    def __init__(
        self,
        modules: LoadedModules,
        late: Callable[[Route], LoadedModule],
        slots: SlotBuffers,
        outputs: tuple[TensorSpec, ...],
        first_state: Mapping[str, Array],
    ) -> None:
        pool = OutputPool(outputs)
        self.graphs = 0
        self.reserve = pool.reserve
        self._take_answer = pool.take
        self._modules = modules
        self._late = late
        self._slots = slots
        self._first_state = first_state
        self._lanes: dict[Route | tuple[Role, int], DirectLane] = {}
        self._audited: tuple[dict[str, Any], Array] | None = None

    def adopt(self, spec: TensorSpec, array: Any) -> Array:
        """What the caller gave, which must be a NumPy array."""
        if not isinstance(array, np.ndarray):
            raise InputError(f"input {spec.name!r} is a {type(array).__name__}; give a NumPy array")
        return array

    def take_input(self, spec: TensorSpec, array: Any, *, finite: bool, keep: bool) -> Array:
        """Check one input of a frame (see `Workspace.take_input`)."""
        spec.check(array, finite=finite)
        return array.copy() if keep else np.ascontiguousarray(array)

    def exit(self, route: Route) -> Lane:
        """The lane of an exit."""
        lane = self._lanes.get(route)
        if lane is None:
            lane = self._lanes[route] = self._lane(self._late(route), self._take_answer)
        return lane

    def lane(self, role: Role, index: int = 0) -> Lane:
        """The lane of a module that answers no frame (see `Workspace.lane`)."""
        lane = self._lanes.get((role, index))
        if lane is None:
            lane = self._lanes[role, index] = self._lane(self._loaded(role, index), None)
        return lane

    def finite(self, outputs: Mapping[str, Any]) -> bool:
        """Whether an answer holds neither NaN nor Inf."""
        with np.errstate(all="ignore"):
            # As in `TensorSpec.check`: the sum is one pass, and only one that is not finite is worth looking closer.
            return all(
                array.dtype.kind != "f" or bool(np.isfinite(array.sum()) or np.isfinite(array).all())
                for array in outputs.values()
            )

    def keep_for_audit(self, inputs: Mapping[str, Any], image: Any) -> tuple[dict[str, Any], Array]:
        """Copy what an audit needs (see `Workspace.keep_for_audit`)."""
        if self._audited is None:
            names = self._loaded(Role.WHOLE, 0).frame_inputs
            self._audited = {name: np.empty_like(inputs[name]) for name in names}, np.empty_like(image)
        kept, picture = self._audited
        for name, copy in kept.items():
            np.copyto(copy, inputs[name])
        np.copyto(picture, image)
        return kept, picture

    def close(self) -> None:
        """Nothing is held that is not freed by being forgotten."""

    def _loaded(self, role: Role, index: int) -> LoadedModule:
        if role is Role.PRODUCER:
            return self._modules.producers[index]
        if role.predicts:
            return self._modules.predictors[role]
        assert self._modules.auditor is not None, "no auditor was loaded"
        return self._modules.auditor

    def _lane(self, loaded: LoadedModule, take: Callable[[], dict[str, Any]] | None) -> DirectLane:
        return DirectLane(loaded, self._slots, take, self._first_state)


class DirectLane:
    """A module whose buffers are the caller's arrays themselves (see `Lane`).

    Args:
        loaded: The module.
        slots: The session's cache slots.
        take: Lends memory for an answer; None: the lane has memory of its own.
        first_state: The first value of every state tensor.
    """

    def __init__(
        self,
        loaded: LoadedModule,
        slots: SlotBuffers,
        take: Callable[[], dict[str, Any]] | None,
        first_state: Mapping[str, Array],
    ) -> None:
        self._loaded = loaded
        self._slots = slots
        if take is None:
            own = {} if loaded.fills_slot else _memory(loaded.answers)
            take = lambda: own  # noqa: E731
        self.take_outputs = take
        # What the module reads, what it writes, and the first value: the next frame's takes the last one's place only
        # when the run has gone well.
        self._state = [
            (record, first_state[record.input.name].copy(), np.zeros(record.input.shape, record.input.dtype))
            for record in loaded.state
        ]
        self._first_state = first_state

    def enqueue(
        self, inputs: Mapping[str, Any], slot: int | None, outputs: Mapping[str, Any], *, fresh: bool = False
    ) -> Event:
        """Run the module on its stream."""
        loaded = self._loaded
        bindings = {name: inputs[name] for name in loaded.frame_inputs}
        if slot is not None:
            cache = self._slots[slot]
            for name in cache if loaded.fills_slot else loaded.cache_inputs:
                bindings[name] = cache[name]
        bindings.update(outputs)
        if not self._state:
            return loaded.module.enqueue(bindings, loaded.stream)
        reads = {spec.name for spec in loaded.module.inputs}
        for record, current, following in self._state:
            bindings[record.output] = following
            if record.input.name in reads:
                bindings[record.input.name] = current
        if fresh:
            loaded.stream.submit(self._begin)
        ran = loaded.module.enqueue(bindings, loaded.stream)
        return loaded.stream.submit(lambda: self._go_on(ran))

    def _begin(self) -> None:
        for record, current, _ in self._state:
            np.copyto(current, self._first_state[record.input.name])

    def _go_on(self, ran: Event) -> None:
        """The state becomes the next frame's, unless the run failed."""
        ran.wait()  # it has ended, for the stream runs in order; this raises what it raised
        for _, current, following in self._state:
            np.copyto(current, following)


def _memory(specs: Iterable[TensorSpec]) -> dict[str, Array]:
    return {spec.name: np.zeros(spec.shape, spec.dtype) for spec in specs}

"""A session's memory on the CPU, and lanes that bind the caller's arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bundle.roles import Route
from ..device.placement import Lane, LoadedModule
from ..device.pools import OutputPool
from ..device.stream import Event
from ..errors import InputError
from ..spec import Array, TensorSpec
from .slots import SlotBuffers

if TYPE_CHECKING:
    from .placement import CpuPlacement

__all__ = ["CpuWorkspace", "DirectLane"]


class CpuWorkspace:
    """A session's memory on the CPU. Lanes bind it as it is: nothing is copied.

    Args:
        placement: Where the modules are.
        slots: The cache slots' memory.
        outputs: What an answer is.
    """

    def __init__(self, placement: CpuPlacement, slots: SlotBuffers, outputs: tuple[TensorSpec, ...]) -> None:
        pool = OutputPool(outputs)
        self.graphs = 0
        self.take_outputs = pool.take
        self.reserve = pool.reserve
        self._placement = placement
        self._slots = slots
        self._outputs = outputs
        self._exits: dict[Route, DirectLane] = {}
        self._producers: dict[int, DirectLane] = {}
        self._predictors: dict[bool, DirectLane] = {}
        self._predictions: dict[bool, dict[str, Array]] = {}
        self._auditor: DirectLane | None = None
        self._audited: tuple[dict[str, Any], Array] | None = None
        self._audit: dict[str, Array] | None = None

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
        lane = self._exits.get(route)
        if lane is None:
            lane = self._exits[route] = DirectLane(self._placement.exit(route), self._slots)
        return lane

    def producer(self, index: int) -> Lane:
        """The lane of a producer."""
        lane = self._producers.get(index)
        if lane is None:
            lane = self._producers[index] = DirectLane(self._placement.producer(index), self._slots)
        return lane

    def predictor(self, cold: bool) -> Lane:
        """The lane of a predictor."""
        lane = self._predictors.get(cold)
        if lane is None:
            lane = self._predictors[cold] = DirectLane(self._placement.predictor(cold), self._slots)
        return lane

    def take_prediction(self, cold: bool) -> dict[str, Array]:
        """Memory for what a predictor gives, the same every time."""
        prediction = self._predictions.get(cold)
        if prediction is None:
            prediction = self._predictions[cold] = _memory(self._placement.predictor(cold).module.outputs)
        return prediction

    def finite(self, outputs: Mapping[str, Any]) -> bool:
        """Whether an answer holds neither NaN nor Inf."""
        with np.errstate(all="ignore"):
            # As in `TensorSpec.check`: the sum is one pass, and only one that is not finite is worth looking closer.
            return all(
                array.dtype.kind != "f" or bool(np.isfinite(array.sum()) or np.isfinite(array).all())
                for array in outputs.values()
            )

    def auditor(self) -> Lane:
        """The lane of the whole generator in the background."""
        if self._auditor is None:
            self._auditor = DirectLane(self._placement.auditor(), self._slots)
        return self._auditor

    def keep_for_audit(self, inputs: Mapping[str, Any], image: Any) -> tuple[dict[str, Any], Array]:
        """Copy what an audit needs (see `Workspace.keep_for_audit`)."""
        if self._audited is None:
            names = self._placement.auditor().frame_inputs
            self._audited = {name: np.empty_like(inputs[name]) for name in names}, np.empty_like(image)
        kept, picture = self._audited
        for name, copy in kept.items():
            np.copyto(copy, inputs[name])
        np.copyto(picture, image)
        return kept, picture

    def take_audit(self) -> dict[str, Array]:
        """Memory for the auditor's answer, the same every time."""
        if self._audit is None:
            self._audit = _memory(self._outputs)
        return self._audit

    def close(self) -> None:
        """Nothing is held that is not freed by being forgotten."""


class DirectLane:
    """A module whose buffers are the caller's arrays themselves (see `Lane`)."""

    def __init__(self, loaded: LoadedModule, slots: SlotBuffers) -> None:
        self._loaded = loaded
        self._slots = slots
        # A producer's outputs are the cache tensors, an exit's are the answer.
        self._fills_slot = loaded.module.name == "producer"

    def enqueue(self, inputs: Mapping[str, Any], slot: int | None, outputs: Mapping[str, Any]) -> Event:
        """Run the module on its stream."""
        loaded = self._loaded
        bindings = {name: inputs[name] for name in loaded.frame_inputs}
        if slot is not None:
            cache = self._slots[slot]
            for name in cache if self._fills_slot else loaded.cache_inputs:
                bindings[name] = cache[name]
        bindings.update(outputs)
        return loaded.module.enqueue(bindings, loaded.stream)


def _memory(specs: Iterable[TensorSpec]) -> dict[str, Array]:
    return {spec.name: np.zeros(spec.shape, spec.dtype) for spec in specs}

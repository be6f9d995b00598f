"""Modules on the CPU: which cores the consumer and the producers have, and lanes that bind the caller's arrays."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from ..bundle.bundle import Bundle
from ..device.module import Module
from ..device.placement import Lane, LoadedModule
from ..device.pools import OutputPool
from ..errors import ClosedError, InputError
from ..schedule.policy import Policy
from ..schedule.scheduler import Route
from ..schedule.slots import SlotBuffers
from ..spec import Array, TensorSpec
from .device import CoreShare, CpuDevice, Event, Stream

__all__ = ["Backend", "CpuPlacement", "CpuWorkspace", "DirectLane"]


class Backend(Protocol):
    """What loads a graph on the CPU: `OnnxRuntimeModule`, or a test's fake."""

    def __call__(
        self,
        path: Path,
        *,
        name: str,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        threads: int,
        spinning: bool,
    ) -> Module: ...


class CpuPlacement:
    """A bundle's modules on the cores of this process.

    Args:
        bundle: What to load.
        policy: Under ``async`` the consumer has cores of its own and producers the rest; otherwise one thing runs at a
            time and has them all.
        producers: Producer streams under ``async``.
        threads: Cores to use; None uses all that the process may.
        backend: What loads the graphs; None is ONNX Runtime.

    Raises:
        InputError: If `threads` is out of range.
    """

    def __init__(
        self, bundle: Bundle, *, policy: Policy, producers: int, threads: int | None, backend: Backend | None
    ) -> None:
        self.loads_ahead = False
        self._bundle = bundle
        self._policy = policy
        self._producer_count = producers
        self._backend = _onnx_runtime() if backend is None else backend
        self.name = "cpu/onnxruntime" if backend is None else "cpu/custom"
        self._loading = threading.Lock()
        self._closed = False
        self._loaded: list[LoadedModule] = []  # all that there is to close, also where loading stops half-way
        self._exits: dict[Route, LoadedModule] = {}
        self._producers: tuple[LoadedModule, ...] = ()
        self._predictors: dict[str, LoadedModule] = {}
        self._auditor: LoadedModule | None = None
        self._device = CpuDevice(threads)
        self._share = self._device.share(0 if policy.foreground else producers)

    def load(self, exits: Iterable[Route], *, predictors: tuple[str, ...] = (), auditor: bool = False) -> None:
        """Load the producers that the policy needs, these exits and predictors, and the auditor where it is wanted."""
        if auditor:
            self._load_auditor()
        share = self._share
        for name in predictors:
            # A predictor is too small for its work to be worth sharing out.
            inline = self._device.inline(cores=share.consumer_cores)
            self._predictors[name] = self._load_module(name, inline, 1, spinning=False)
        if not self._policy.foreground:
            self._producers = tuple(self._load_producer(share, index) for index in range(self._producer_count))
        elif self._policy.kind != "full":
            inline = self._device.inline(cores=share.consumer_cores)
            # Its executor's threads must not spin on while a consumer wants the cores.
            self._producers = (self._load_module("producer", inline, share.consumer_threads, spinning=False),)
        for route in exits:
            self._exits[route] = self._load_exit(route)

    def exit(self, route: Route) -> LoadedModule:
        """The module of an exit, loaded when it is first needed."""
        loaded = self._exits.get(route)
        if loaded is None:
            with self._loading:
                if self._closed:
                    raise ClosedError("the engine is closed; open a new one")
                loaded = self._exits.get(route) or self._load_exit(route)
                self._exits[route] = loaded
        return loaded

    def producer(self, index: int) -> LoadedModule:
        """The producer of that number, loaded on its stream."""
        return self._producers[index]

    def predictor(self, cold: bool) -> LoadedModule:
        """The module of a predictor."""
        return self._predictors["predictor_cold" if cold else "predictor"]

    def auditor(self) -> LoadedModule:
        """The whole generator on its background stream."""
        assert self._auditor is not None, "no auditor was loaded"
        return self._auditor

    def workspace(self, slots: int) -> CpuWorkspace:
        """Memory and lanes for one session with so many cache slots."""
        cache = () if self._policy.kind == "full" else self._bundle.manifest.cache
        return CpuWorkspace(self, SlotBuffers(cache, slots), self._bundle.manifest.outputs)

    def synchronize(self) -> None:
        """Wait until every producer and every audit that was started has ended."""
        for loaded in (*self._producers, *((self._auditor,) if self._auditor else ())):
            loaded.stream.synchronize()

    def close(self) -> None:
        """Wait for what runs and unload the modules; safe to call twice."""
        self._closed = True
        # Streams first: a producer that runs still needs its module.
        self._device.close()
        for loaded in self._loaded:
            loaded.module.close()

    def _load_producer(self, share: CoreShare, index: int) -> LoadedModule:
        # In the background even on cores of its own: the thread that answers frames is the caller's, which is not
        # pinned, and where it lands on a producer's core it goes first.
        stream = self._device.stream(f"warpcache-producer-{index}", cores=share.producer_cores[index], background=True)
        return self._load_module("producer", stream, share.producer_threads[index], spinning=not share.shared)

    def _load_auditor(self) -> None:
        """Load the whole generator where it takes nothing from the consumer."""
        share = self._share
        if not self._policy.foreground:
            cores = tuple(sorted({core for part in share.producer_cores for core in part or ()}))
        elif self._policy.kind == "lockstep":
            # Waited for, so it is one more thing that has all cores while it runs.
            cores = self._device.cores
        elif len(self._device.cores) > 1:
            # Nothing else runs in the background, but an audit does: it has a core, which the consumer goes without.
            *rest, last = self._device.cores
            cores = (last,)
            self._share = CoreShare(len(rest), (), tuple(rest), (), shared=False)
        else:
            cores = self._device.cores
            self._share = dataclasses.replace(share, shared=True)
        stream = self._device.stream("warpcache-auditor", cores=cores, background=True)
        name = self._bundle.manifest.exit("whole").module
        self._auditor = self._load_module(name, stream, len(cores), spinning=False, called="auditor")

    def _load_exit(self, route: Route) -> LoadedModule:
        share = self._share
        inline = self._device.inline(cores=share.consumer_cores)
        name = self._bundle.manifest.exit(route).module
        return self._load_module(name, inline, share.consumer_threads, spinning=not share.shared)

    def _load_module(
        self, name: str, stream: Stream, threads: int, *, spinning: bool, called: str | None = None
    ) -> LoadedModule:
        record = self._bundle.manifest.modules[name]
        path = self._bundle.file(record.file)

        def load() -> Module:
            return self._backend(
                path,
                name=called or name,
                inputs=record.inputs,
                outputs=record.outputs,
                threads=threads,
                spinning=spinning,
            )

        # On the stream's own thread and cores, which the executor's threads inherit.
        loaded = LoadedModule.of(stream.call(load), stream, self._bundle.manifest)
        self._loaded.append(loaded)
        return loaded


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


def _onnx_runtime() -> Backend:
    # ONNX Runtime itself is imported only when the first module is loaded.
    from ..onnxruntime.cpu import OnnxRuntimeModule

    return cast("Callable[..., Module]", OnnxRuntimeModule)

"""One session's memory on the GPU: cache slots, buffers, pinned staging, and a lane for every module that is loaded."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...kernels.array import DeviceArray
from ...kernels.finite import FiniteKernel
from ..bundle.bundle import Bundle
from ..bundle.manifest import Manifest
from ..bundle.roles import Route
from ..device.placement import Lane, LoadedModule
from ..device.pools import DevicePool, OutputPool
from ..errors import ClosedError, InputError, WarpcacheError
from ..spec import AGE_INPUT, AGE_SPEC, Array, TensorSpec
from .audit import AuditMemory
from .buffers import CudaSlots, HostInput, StaticInputs
from .device import CudaDevice, CudaStream
from .finite import FiniteCheck, finite_on_host
from .lane import CudaLane
from .options import CudaOptions

__all__ = ["CudaModules", "CudaWorkspace"]

# Frames whose inputs are held at once: the one being answered, the one that is prepared, those that wait (lockstep).
_WAITING_FRAMES = 10
_READY_FRAMES = 3
_READY_ANSWERS = 2
# Ages that a session's predictor is told, each held for as long as its router may name it again.
_AGES = 320


@dataclass(frozen=True)
class CudaModules:
    """What an engine has loaded for its sessions.

    Attributes:
        producers: One a producer stream; empty where none runs.
        exits: By route.
        predictors: By module name.
        auditor: The whole generator once more, on a worker stream; None where nothing is audited.
    """

    producers: tuple[LoadedModule, ...] = ()
    exits: Mapping[Route, LoadedModule] = field(default_factory=dict)
    predictors: Mapping[str, LoadedModule] = field(default_factory=dict)
    auditor: LoadedModule | None = None

    @property
    def background(self) -> tuple[LoadedModule, ...]:
        """Those whose work may go on when a frame is answered."""
        return self.producers if self.auditor is None else (*self.producers, self.auditor)


class CudaWorkspace:
    """One session's memory on the GPU (see `placement.Workspace`).

    Args:
        bundle: What is run.
        device: The consumer's GPU.
        consumer: The stream that frames wait for.
        modules: What is loaded.
        kernel: What looks for NaN in answers on the GPU; None where nobody is going to ask.
        slots: How many cache slots.
        options: What the user chose.
        turn: Held while the consumer's stream is used.

    Raises:
        DeviceError: If the GPU has no room for it.
        BackendError: If a module fails, or cannot be captured where that was demanded.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: CudaDevice,
        consumer: CudaStream,
        modules: CudaModules,
        kernel: FiniteKernel | None,
        slots: int,
        options: CudaOptions,
        turn: threading.Lock,
    ) -> None:
        manifest = bundle.manifest
        self._device = device
        self._consumer = consumer
        self._turn = turn
        self._background = tuple(loaded.stream for loaded in modules.background if loaded.stream is not consumer)
        # Borrowed arrays are ordered on a stream of their own, which every lane then waits for.
        self._intake = device.stream("warpcache-intake", priority="high")
        self._arrived = device.event()
        self._closed = False
        self._exit_lanes: dict[Route, CudaLane] = {}
        self._producer_lanes: list[CudaLane] = []
        self._predictor_lanes: dict[str, CudaLane] = {}
        self._predictions: dict[str, dict[str, Array]] = {}
        self._audit_lane: CudaLane | None = None
        self._audit: AuditMemory | None = None
        self._check: FiniteCheck | None = None
        specs = tuple(record.spec for record in manifest.inputs)
        depth = max(1, slots) + _WAITING_FRAMES
        # One more set for the frame that is being audited.
        frames = _READY_FRAMES + (modules.auditor is not None)
        self._staging = OutputPool(specs, allocate=device.allocate_pinned, kept=depth, ready=frames)
        self._ages = _age_pool(device) if modules.predictors else OutputPool(())
        self._answers: OutputPool | DevicePool
        # A router may need another for the same frame, while the caller still has the last one.
        ready = _READY_ANSWERS + bool(modules.predictors)
        if options.outputs == "device":
            self._answers = DevicePool(manifest.outputs, allocate=device.allocate, ready=ready)
        else:
            self._answers = OutputPool(manifest.outputs, allocate=device.allocate_pinned, ready=ready)
        with ExitStack() as undo:
            undo.callback(self._release)
            ring = CudaSlots(device, manifest.cache, slots) if slots else None
            shared = StaticInputs(device, (*specs, AGE_SPEC) if modules.predictors else specs)
            answers = {spec.name: device.allocate(spec) for spec in manifest.outputs}
            for loaded in modules.producers:
                lane = self._lane(loaded, inputs=_inputs_of(loaded), outputs=None, slots=ring, options=options)
                self._producer_lanes.append(lane)
                lane.prepare()
            # These share a frame's inputs: what one of them has copied there the next one finds.
            for route, loaded in modules.exits.items():
                lane = self._lane(loaded, inputs=shared, outputs=answers, slots=ring, options=options)
                self._exit_lanes[route] = lane
                lane.prepare()
            for name, loaded in modules.predictors.items():
                given = {spec.name: device.allocate(spec) for spec in loaded.module.outputs}
                lane = self._lane(loaded, inputs=shared, outputs=given, slots=ring, options=options)
                self._predictor_lanes[name] = lane
                self._predictions[name] = {spec.name: device.allocate_pinned(spec) for spec in loaded.module.outputs}
                lane.prepare()
            if modules.auditor is not None:
                self._open_audit(modules.auditor, manifest, options)
            if kernel is not None:
                self._check = FiniteCheck(device, kernel)
            undo.pop_all()

    @property
    def graphs(self) -> int:
        """How many graphs are replayed instead of being issued call by call."""
        return sum(lane.graphs for lane in self._lanes())

    def adopt(self, spec: TensorSpec, array: Any) -> Array | DeviceArray:
        """A NumPy array as it is; anything on the GPU is borrowed by DLPack or `__cuda_array_interface__`."""
        if isinstance(array, np.ndarray):
            return array
        self._device.context.make_current()
        borrowed = DeviceArray.borrow(
            array, device=self._device.ordinal, stream=self._intake.handle, name=f"input {spec.name!r}"
        )
        self._arrived.record(self._intake)
        return borrowed

    def take_input(
        self, spec: TensorSpec, array: Array | DeviceArray, *, finite: bool, keep: bool
    ) -> HostInput | DeviceArray:
        """Check one input and bring it to pinned memory, where it is not on the GPU already.

        Arrays on the GPU are not copied, `keep` or not, and their values are not looked at: that would wait for the
        GPU. They must stay as they are until the frame, and a producer that took it, have ended.
        """
        if isinstance(array, DeviceArray):
            spec.check_form(array)
            if not array.contiguous:
                raise InputError(f"input {spec.name!r} is not contiguous on the GPU; make it contiguous there first")
            # A view of its own: lanes leave out the copy of what they hold already, and tell it by the object. The
            # caller may hand in the same array again with something else in it.
            return array[:]
        spec.check(array, finite=finite)
        self._require_open()
        pinned = (self._ages if spec is AGE_SPEC else self._staging).take_one(spec)
        np.copyto(pinned, array)
        return HostInput(pinned, pinned.__array_interface__["data"][0])

    def take_outputs(self) -> dict[str, Any]:
        """Memory for one answer, pinned or on the GPU, the caller's alone while anything refers to it."""
        self._require_open()
        return self._answers.take()

    def reserve(self) -> None:
        """See to it that the next `take_outputs` needs no fresh memory."""
        if not self._closed:
            self._answers.reserve()

    def exit(self, route: Route) -> Lane:
        """The lane of an exit."""
        self._require_open()
        return self._exit_lanes[route]

    def producer(self, index: int) -> Lane:
        """The lane of a producer."""
        self._require_open()
        return self._producer_lanes[index]

    def predictor(self, cold: bool) -> Lane:
        """The lane of a predictor, on the consumer's stream: its event waits for what is issued there, and no more."""
        self._require_open()
        return self._predictor_lanes[_predictor_name(cold)]

    def take_prediction(self, cold: bool) -> dict[str, Array]:
        """Pinned memory for what a predictor gives, the same every time."""
        self._require_open()
        return self._predictions[_predictor_name(cold)]

    def finite(self, outputs: Mapping[str, Any]) -> bool:
        """Whether an answer holds neither NaN nor Inf; for one on the GPU this waits for a look at it there."""
        self._require_open()
        there = [array for array in outputs.values() if isinstance(array, DeviceArray)]
        if there:
            if self._check is None:
                raise WarpcacheError("answers were to be checked that nobody routed; report this bug")
            return self._check.finite(there)
        return all(finite_on_host(array) for array in outputs.values())

    def auditor(self) -> Lane:
        """The lane of the whole generator on a low-priority stream of its own."""
        self._require_open()
        assert self._audit_lane is not None, "no auditor was loaded"
        return self._audit_lane

    def keep_for_audit(self, inputs: Mapping[str, Any], image: Any) -> tuple[dict[str, Any], Array]:
        """Keep a frame's inputs and the picture it was answered with (see `Workspace.keep_for_audit`)."""
        self._require_open()
        assert self._audit is not None, "no auditor was loaded"
        return self._audit.keep(inputs, image)

    def take_audit(self) -> dict[str, Array]:
        """Pinned memory for the auditor's answer, the same every time."""
        self._require_open()
        assert self._audit is not None, "no auditor was loaded"
        return self._audit.answer

    def close(self) -> None:
        """Give the graphs and the memory back, after the work that runs; safe to call twice."""
        with self._turn:
            if self._closed:
                return
            self._closed = True
            for stream in self._background:
                stream.synchronize()
            self._release()

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError("the session is closed; open a new one with engine.session()")

    def _lane(
        self,
        loaded: LoadedModule,
        *,
        inputs: StaticInputs,
        outputs: Mapping[str, DeviceArray] | None,
        slots: CudaSlots | None,
        options: CudaOptions,
    ) -> CudaLane:
        return CudaLane(loaded, inputs=inputs, outputs=outputs, slots=slots, arrived=self._arrived, options=options)

    def _open_audit(self, auditor: LoadedModule, manifest: Manifest, options: CudaOptions) -> None:
        device = self._device
        inputs = _inputs_of(auditor)
        given = {spec.name: device.allocate(spec) for spec in auditor.module.outputs}
        self._audit_lane = self._lane(auditor, inputs=inputs, outputs=given, slots=None, options=options)
        self._audit = AuditMemory(
            device,
            inputs=inputs,
            image=next((spec for spec in manifest.outputs if spec.name == manifest.image_output), manifest.outputs[0]),
            outputs=manifest.outputs,
            on_device=options.outputs == "device",
            arrived=self._arrived,
        )
        self._audit_lane.prepare()

    def _lanes(self) -> tuple[CudaLane, ...]:
        audit = () if self._audit_lane is None else (self._audit_lane,)
        return (*self._exit_lanes.values(), *self._producer_lanes, *self._predictor_lanes.values(), *audit)

    def _release(self) -> None:
        for lane in self._lanes():
            lane.close()
        # Their slots and buffers go with the lanes, what waits in the pools with these; answers stay their callers'.
        self._exit_lanes.clear()
        self._producer_lanes.clear()
        self._predictor_lanes.clear()
        self._predictions.clear()
        self._staging = self._ages = OutputPool(())
        self._answers = OutputPool(())
        for item in (self._audit, self._check, self._arrived, self._intake):
            if item is not None:
                item.close()
        self._audit_lane = self._audit = self._check = None


def _inputs_of(loaded: LoadedModule) -> StaticInputs:
    """Buffers for the frame's inputs of a module that shares them with no other."""
    return StaticInputs(
        loaded.stream.device,  # type: ignore[attr-defined]  # a CUDA stream knows its device
        (spec for spec in loaded.module.inputs if spec.name in loaded.frame_inputs),
    )


def _age_pool(device: CudaDevice) -> OutputPool:
    """Pinned memory for ages: rows of one block, because a block of its own is a page and takes long to get."""
    rows = iter(device.allocate_pinned(TensorSpec(AGE_INPUT, AGE_SPEC.dtype, (_AGES, *AGE_SPEC.shape))))

    def allocate(spec: TensorSpec) -> Array:
        row = next(rows, None)
        return device.allocate_pinned(spec) if row is None else row

    return OutputPool((AGE_SPEC,), allocate=allocate, kept=_AGES, ready=_AGES)


def _predictor_name(cold: bool) -> str:
    return "predictor_cold" if cold else "predictor"

"""One session's memory on the GPU: cache slots, buffers, pinned staging, and a lane for every module that is loaded."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...kernels.array import DeviceArray
from ...kernels.finite import FiniteKernel
from ..bundle.manifest import Manifest
from ..bundle.roles import Role, Route
from ..device.placement import Lane, LoadedModule, LoadedModules
from ..device.pools import DevicePool, OutputPool
from ..errors import ClosedError, InputError, WarpcacheError
from ..spec import AGE_INPUT, AGE_SPEC, Array, TensorSpec
from .audit import AuditMemory
from .buffers import CudaSlots, HostInput, StaticInputs
from .device import CudaDevice, CudaStream
from .finite import FiniteCheck, finite_on_host
from .lane import CudaLane, LaneShared
from .options import CudaOptions

__all__ = ["CudaWorkspace", "Placed"]

# Frames whose inputs are held at once: the one being answered, the one that is prepared, those that wait (lockstep).
_WAITING_FRAMES = 10
_READY_FRAMES = 3
_READY_ANSWERS = 2
# Ages that a session's predictor is told, each held for as long as its router may name it again.
_AGES = 320


@dataclass(frozen=True)
class Placed:
    """What an engine has on its GPUs for all sessions.

    Attributes:
        device: The consumer's GPU.
        consumer: The stream that frames wait for.
        options: What the user chose.
        turn: Held while the consumer's stream is used.
        first_state: The first value of every state tensor, by the name it is read by.
        modules: What is loaded.
        kernel: What looks for NaN in answers on the GPU; None where nobody is going to ask.
    """

    device: CudaDevice
    consumer: CudaStream
    options: CudaOptions
    turn: threading.Lock
    first_state: Mapping[str, Array]
    modules: LoadedModules = field(default_factory=LoadedModules)
    kernel: FiniteKernel | None = None


class CudaWorkspace:
    """One session's memory on the GPU (see `placement.Workspace`).

    Args:
        manifest: Of the bundle that is run.
        placed: What the engine has there.
        slots: How many cache slots.

    Raises:
        DeviceError: If the GPU has no room for it.
        BackendError: If a module fails, or cannot be captured where that was demanded.
    """

    def __init__(self, manifest: Manifest, placed: Placed, *, slots: int) -> None:
        device, modules, options = placed.device, placed.modules, placed.options
        self._device = device
        self._turn = placed.turn
        self._background = tuple(loaded.stream for loaded in modules.background if loaded.stream is not placed.consumer)
        # Borrowed arrays are ordered on a stream of their own, which every lane then waits for.
        self._intake = device.stream("warpcache-intake", priority="high")
        self._arrived = device.event()
        self._closed = False
        self._lanes: dict[Route | tuple[Role, int], CudaLane] = {}
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
            session = LaneShared(self._arrived, options, placed.first_state)
            for index, loaded in enumerate(modules.producers):
                self._open(
                    (Role.PRODUCER, index),
                    CudaLane(loaded, inputs=_inputs_of(loaded), outputs=None, slots=ring, session=session),
                )
            # These share a frame's inputs: what one of them has copied there the next one finds.
            for route, loaded in modules.exits.items():
                self._open(
                    route,
                    CudaLane(
                        loaded, inputs=shared, outputs=answers, slots=ring, session=session, take=self._take_answer
                    ),
                )
            for role, loaded in modules.predictors.items():
                own = {spec.name: device.allocate_pinned(spec) for spec in loaded.answers}
                self._open(
                    (role, 0),
                    CudaLane(
                        loaded,
                        inputs=shared,
                        outputs={spec.name: device.allocate(spec) for spec in loaded.answers},
                        slots=ring,
                        session=session,
                        take=functools.partial(_given, own),
                    ),
                )
            if modules.auditor is not None:
                self._open_audit(modules.auditor, manifest, session)
            if placed.kernel is not None:
                self._check = FiniteCheck(device, placed.kernel)
            undo.pop_all()

    @property
    def graphs(self) -> int:
        """How many graphs are replayed instead of being issued call by call."""
        return sum(lane.graphs for lane in self._lanes.values())

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

    def reserve(self) -> None:
        """See to it that the next `take_outputs` needs no fresh memory."""
        if not self._closed:
            self._answers.reserve()

    def exit(self, route: Route) -> Lane:
        """The lane of an exit."""
        self._require_open()
        return self._lanes[route]

    def lane(self, role: Role, index: int = 0) -> Lane:
        """The lane of a module that answers no frame (see `Workspace.lane`).

        A predictor's is on the consumer's stream: its event waits for what is issued there, and no more.
        """
        self._require_open()
        return self._lanes[role, index]

    def finite(self, outputs: Mapping[str, Any]) -> bool:
        """Whether an answer holds neither NaN nor Inf; for one on the GPU this waits for a look at it there."""
        self._require_open()
        there = [array for array in outputs.values() if isinstance(array, DeviceArray)]
        if there:
            if self._check is None:
                raise WarpcacheError("answers were to be checked that nobody routed; report this bug")
            return self._check.finite(there)
        return all(finite_on_host(array) for array in outputs.values())

    def keep_for_audit(self, inputs: Mapping[str, Any], image: Any) -> tuple[dict[str, Any], Array]:
        """Keep a frame's inputs and the picture it was answered with (see `Workspace.keep_for_audit`)."""
        self._require_open()
        assert self._audit is not None, "no auditor was loaded"
        return self._audit.keep(inputs, image)

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

    def _take_answer(self) -> dict[str, Any]:
        """Memory for one answer, pinned or on the GPU, the caller's alone while anything refers to it."""
        self._require_open()
        return self._answers.take()

    def _open(self, key: Route | tuple[Role, int], lane: CudaLane) -> None:
        self._lanes[key] = lane
        lane.prepare()

    def _open_audit(self, auditor: LoadedModule, manifest: Manifest, session: LaneShared) -> None:
        device = self._device
        inputs = _inputs_of(auditor)
        self._audit = AuditMemory(
            device,
            inputs=inputs,
            image=next((spec for spec in manifest.outputs if spec.name == manifest.image_output), manifest.outputs[0]),
            on_device=session.options.outputs == "device",
            arrived=self._arrived,
        )
        own = {spec.name: device.allocate_pinned(spec) for spec in auditor.answers}
        self._open(
            (Role.WHOLE, 0),
            CudaLane(
                auditor,
                inputs=inputs,
                outputs={spec.name: device.allocate(spec) for spec in auditor.answers},
                slots=None,
                session=session,
                take=functools.partial(_given, own),
            ),
        )

    def _release(self) -> None:
        for lane in self._lanes.values():
            lane.close()
        # Their slots and buffers go with the lanes, what waits in the pools with these; answers stay their callers'.
        self._lanes.clear()
        self._staging = self._ages = OutputPool(())
        self._answers = OutputPool(())
        for item in (self._audit, self._check, self._arrived, self._intake):
            if item is not None:
                item.close()
        self._audit = self._check = None


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


def _given(outputs: dict[str, Any]) -> dict[str, Any]:
    return outputs

"""One module of one session on a GPU: the frame's inputs in, the module run or replayed, the answer out.

All memory is taken when the session opens. `StaticInputs` are the buffers that a graph reads; the exits of a session
share one set, because they run one after the other on the consumer's stream, and every producer has its own.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any, cast

from ...kernels.array import DeviceArray
from ...kernels.driver import check, load
from ..device.placement import LoadedModule
from ..device.stream import Event
from ..errors import BackendError, DeviceError
from .backend import CudaModule
from .buffers import CudaSlots, StaticInputs, _copy
from .device import CudaDevice, CudaEvent, CudaStream, CudaWorkerStream
from .graph import CudaGraph
from .options import CudaOptions

__all__ = ["CudaLane"]

logger = logging.getLogger(__name__)

_ALIGNMENT = 256


class CudaLane:
    """See `placement.Lane`.

    Args:
        loaded: The module and its stream, a `CudaStream` or a `CudaWorkerStream`.
        inputs: Buffers for the frame's inputs on the module's GPU.
        outputs: An exit's buffers for its outputs; None for a producer, whose outputs are a slot.
        slots: The session's cache slots; None where no producer runs.
        arrived: Recorded when arrays on the GPU were borrowed from their owner's stream.
        options: What the user chose.
    """

    def __init__(
        self,
        loaded: LoadedModule,
        *,
        inputs: StaticInputs,
        outputs: Mapping[str, DeviceArray] | None,
        slots: CudaSlots | None,
        arrived: CudaEvent,
        options: CudaOptions,
    ) -> None:
        self._loaded = loaded
        self._module = cast(CudaModule, loaded.module)
        self._submit = loaded.stream
        self._stream = _issued_to(loaded.stream)
        self._device = self._stream.device
        self._inputs = inputs
        self._outputs = outputs
        self._slots = slots
        self._arrived = arrived
        self._options = options
        self._cuda = load()
        self._uses_slot = slots is not None and (outputs is None or bool(loaded.cache_inputs))
        self._remote: dict[str, DeviceArray] | None = None
        self._written: tuple[CudaEvent, ...] = ()
        if outputs is None and slots is not None:
            self._written = tuple(self._device.event() for _ in range(len(slots)))
            if slots.device.ordinal != self._device.ordinal:
                self._remote = {spec.name: self._device.allocate(spec) for spec in loaded.module.outputs}
        # By slot; None is an exit that reads no slot.
        self._bindings: dict[int | None, dict[str, DeviceArray]] = {
            slot: self._bind(slot) for slot in (range(len(slots)) if slots and self._uses_slot else (None,))
        }
        self._graphs: dict[int | None, CudaGraph] = {}
        self._addresses: dict[int | None, tuple[int, ...]] = {}

    @property
    def graphs(self) -> int:
        """How many graphs it replays."""
        return len(self._graphs)

    def prepare(self) -> None:
        """Run once on every set of buffers, which loads what the executor loads lazily, and capture the graphs.

        Called when the session opens, while no frame of the engine is being answered.

        Raises:
            BackendError: If the module fails, or graphs were demanded and it cannot be captured.
        """
        self._submit.call(self._prepare)

    def enqueue(self, inputs: Mapping[str, Any], slot: int | None, outputs: Mapping[str, Any]) -> Event:
        """Run the module on its stream."""
        return self._submit.submit(lambda: self._issue(inputs, slot, outputs))

    def close(self) -> None:
        """Give the graphs back; the work that runs must have ended. Safe to call twice."""
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()

    def _prepare(self) -> None:
        for bindings in self._bindings.values():
            self._module.launch(bindings, self._stream)
            self._stream.synchronize()
        if self._options.graphs == "off":
            return
        if not self._module.capturable:
            self._go_without(f"module {self._module.name!r} cannot be captured by its backend")
            return
        for slot, bindings in self._bindings.items():
            name = f"module {self._module.name!r}" + ("" if slot is None else f", slot {slot}")
            try:
                graph = CudaGraph.capture(
                    self._stream, functools.partial(self._module.launch, bindings, self._stream), name=name
                )
            except BackendError as exc:
                self._go_without(str(exc), exc)
                return
            self._graphs[slot] = graph
            self._addresses[slot] = _addresses(bindings)

    def _go_without(self, why: str, cause: BackendError | None = None) -> None:
        self.close()
        if self._options.graphs == "on":
            raise BackendError(f"{why}; use graphs='auto' to go on without graphs") from cause
        logger.warning("module %r is issued call by call, without a graph: %s", self._module.name, why)

    def _issue(self, inputs: Mapping[str, Any], slot: int | None, outputs: Mapping[str, Any]) -> None:
        """Everything of one run, in order on the stream; the calling thread waits for nothing."""
        stream = self._stream
        key = slot if self._uses_slot else None
        graph = self._graphs.get(key)
        bindings = self._bindings[key]
        if graph is None:
            bindings = dict(bindings)
        ordered = False
        for name in self._loaded.frame_inputs:
            source = inputs[name]
            if isinstance(source, DeviceArray):
                if not ordered:
                    stream.wait_for(self._arrived)
                    ordered = True
                if graph is None and _bindable(source, self._device):
                    bindings[name] = source
                    continue
            self._inputs.fill(name, source, stream)
        if key is not None:
            self._wait_for_slot(key)
        if graph is not None:
            if self._options.debug and _addresses(bindings) != self._addresses[key]:
                raise DeviceError(f"the buffers of {graph.name} are not those it was captured with; report this bug")
            graph.launch(stream)
        else:
            for name, target in outputs.items():
                if isinstance(target, DeviceArray):
                    bindings[name] = target
            self._module.launch(bindings, stream)
        if key is not None:
            self._mark_slot(key)
        for name, target in outputs.items():
            self._give_out(bindings[name], target)

    def _wait_for_slot(self, slot: int) -> None:
        assert self._slots is not None
        if self._outputs is None:
            self._stream.wait_for(self._slots.read[slot])
        elif (written := self._slots.written[slot]) is not None:
            self._stream.wait_for(written)

    def _mark_slot(self, slot: int) -> None:
        assert self._slots is not None
        if self._outputs is not None:
            self._slots.read[slot].record(self._stream)
            return
        if self._remote is not None:
            for name, source in self._remote.items():
                target = self._slots.arrays[slot][name]
                check(
                    _copy(self._cuda, target, source, self._stream),
                    f"copying cache tensor {name!r} from cuda:{source.device} to cuda:{target.device}",
                )
        self._written[slot].record(self._stream)
        self._slots.written[slot] = self._written[slot]

    def _give_out(self, source: DeviceArray, target: Any) -> None:
        """Copy one output to the caller's memory, unless the module has just written it there."""
        if isinstance(target, DeviceArray):
            if target is source:
                return
            code = _copy(self._cuda, target, source, self._stream)
        else:
            address = target.__array_interface__["data"][0]
            code = self._cuda.cuMemcpyDtoHAsync(address, source.pointer, source.size_bytes, self._stream.stream)
        check(code, f"copying an output from {self._device.name}")

    def _bind(self, slot: int | None) -> dict[str, DeviceArray]:
        bindings = {name: self._inputs.arrays[name] for name in self._loaded.frame_inputs}
        if slot is not None:
            assert self._slots is not None
            cache = self._slots.arrays[slot]
            if self._outputs is not None:
                bindings.update({name: cache[name] for name in self._loaded.cache_inputs})
            else:
                bindings.update(cache if self._remote is None else self._remote)
        if self._outputs is not None:
            bindings.update(self._outputs)
        return bindings


def _issued_to(stream: Any) -> CudaStream:
    return stream.cuda if isinstance(stream, CudaWorkerStream) else cast(CudaStream, stream)


def _bindable(array: DeviceArray, device: CudaDevice) -> bool:
    """Whether a module can read the caller's memory itself; executors ask for memory as the driver aligns it."""
    return array.device == device.ordinal and array.pointer % _ALIGNMENT == 0


def _addresses(bindings: Mapping[str, DeviceArray]) -> tuple[int, ...]:
    return tuple(array.pointer for array in bindings.values())

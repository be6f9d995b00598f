"""One module of one session on a GPU: the frame's inputs in, the module run or replayed, the answer out.

All memory is taken when the session opens. `StaticInputs` are the buffers that a graph reads; the exits of a session
share one set, because they run one after the other on the consumer's stream, and every producer has its own.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from ...kernels.array import DeviceArray
from ...kernels.driver import check, load
from ..bundle.manifest import StateRecord
from ..device.placement import LoadedModule
from ..device.stream import Event
from ..errors import BackendError, DeviceError
from ..spec import Array
from .buffers import CudaSlots, StaticInputs, _copy
from .device import CudaDevice, CudaEvent, CudaStream, CudaWorkerStream
from .graph import CudaGraph
from .options import CudaOptions

__all__ = ["CudaLane", "LaneShared"]

logger = logging.getLogger(__name__)

_ALIGNMENT = 256


@dataclass(frozen=True)
class LaneShared:
    """What the lanes of one session share.

    Attributes:
        arrived: Recorded when arrays on the GPU were borrowed from their owner's stream.
        options: What the user chose.
        first_state: The first value of every state tensor, by the name it is read by.
    """

    arrived: CudaEvent
    options: CudaOptions
    first_state: Mapping[str, Array]


class CudaLane:
    """See `placement.Lane`.

    Args:
        loaded: The module and its stream, a `CudaStream` or a `CudaWorkerStream`.
        inputs: Buffers for the frame's inputs on the module's GPU.
        outputs: The buffers for its outputs, state apart; None for a producer, whose outputs are a slot.
        slots: The session's cache slots; None where no producer runs.
        session: What all lanes of the session share.
        take: Lends memory for what one run gives; None: nothing is given out.
    """

    def __init__(
        self,
        loaded: LoadedModule,
        *,
        inputs: StaticInputs,
        outputs: Mapping[str, DeviceArray] | None,
        slots: CudaSlots | None,
        session: LaneShared,
        take: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        self._loaded = loaded
        self._module = loaded.module
        self._submit = loaded.stream
        self._stream = _issued_to(loaded.stream)
        self._device = self._stream.device
        self._inputs = inputs
        self._outputs = outputs
        self._slots = slots
        self._arrived = session.arrived
        self._options = session.options
        self.take_outputs: Callable[[], dict[str, Any]] = dict if take is None else take
        self._cuda = load()
        self._uses_slot = slots is not None and (outputs is None or bool(loaded.cache_inputs))
        self._remote: dict[str, DeviceArray] | None = None
        self._written: tuple[CudaEvent, ...] = ()
        if outputs is None and slots is not None:
            self._written = tuple(self._device.event() for _ in range(len(slots)))
            if slots.device.ordinal != self._device.ordinal:
                self._remote = {spec.name: self._device.allocate(spec) for spec in loaded.answers}
        self._state = tuple(
            _CarriedState(self._device, record, session.first_state[record.input.name]) for record in loaded.state
        )
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

    def enqueue(
        self, inputs: Mapping[str, Any], slot: int | None, outputs: Mapping[str, Any], *, fresh: bool = False
    ) -> Event:
        """Run the module on its stream."""
        return self._submit.submit(lambda: self._issue(inputs, slot, outputs, fresh))

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

    def _issue(
        self, inputs: Mapping[str, Any], slot: int | None, outputs: Mapping[str, Any], fresh: bool = False
    ) -> None:
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
        if fresh:
            for state in self._state:
                state.begin(stream)
        if graph is not None:
            if self._options.debug and _addresses(bindings) != self._addresses[key]:
                raise DeviceError(f"the buffers of {graph.name} are not those it was captured with; report this bug")
            graph.launch(stream)
        else:
            for name, target in outputs.items():
                if isinstance(target, DeviceArray):
                    bindings[name] = target
            self._module.launch(bindings, stream)
        for state in self._state:
            state.go_on(stream)
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
        reads = {spec.name for spec in self._module.inputs}
        for state in self._state:
            bindings.update(state.arrays)
            if state.record.input.name not in reads:
                del bindings[state.record.input.name]
        return bindings


class _CarriedState:
    """One tensor that a module hands from frame to frame, at fixed addresses, so that a graph may hold them.

    The module reads one buffer and writes another; the copy back is issued behind the run, so that a run that could not
    be issued leaves the state as it was.
    """

    def __init__(self, device: CudaDevice, record: StateRecord, first: Array) -> None:
        self.record = record
        self._cuda = load()
        self._first = device.upload(first)
        self._current, self._following = device.allocate(record.input), device.allocate(record.written)
        self.arrays = {record.input.name: self._current, record.output: self._following}

    def begin(self, stream: CudaStream) -> None:
        """Make the first value the one that is read next."""
        check(_copy(self._cuda, self._current, self._first, stream), f"beginning state {self.record.input.name!r}")

    def go_on(self, stream: CudaStream) -> None:
        """Make what was written the one that is read next."""
        check(_copy(self._cuda, self._current, self._following, stream), f"keeping state {self.record.input.name!r}")


def _issued_to(stream: Any) -> CudaStream:
    return stream.cuda if isinstance(stream, CudaWorkerStream) else cast(CudaStream, stream)


def _bindable(array: DeviceArray, device: CudaDevice) -> bool:
    """Whether a module can read the caller's memory itself; executors ask for memory as the driver aligns it."""
    return array.device == device.ordinal and array.pointer % _ALIGNMENT == 0


def _addresses(bindings: Mapping[str, DeviceArray]) -> tuple[int, ...]:
    return tuple(array.pointer for array in bindings.values())

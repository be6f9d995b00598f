"""Modules on GPUs: streams by priority, everything loaded and captured before the first frame is answered."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..kernels.array import DeviceArray
from ..kernels.driver import check, load
from .bundle import Bundle
from .cuda_device import CudaDevice, CudaStream, CudaWorkerStream
from .cuda_lane import CudaLane, CudaSlots, HostInput, StaticInputs
from .cuda_options import CudaOptions
from .errors import ClosedError, InputError
from .module import CudaModule
from .outputs import DevicePool, OutputPool
from .placement import Lane, LoadedModule
from .policy import Policy
from .scheduler import Route
from .spec import Array, TensorSpec

__all__ = ["CudaBackend", "CudaPlacement", "CudaWorkspace", "ModuleFile"]

# Frames whose inputs are held at once: the one being answered, the one that is prepared, those that wait (lockstep).
_WAITING_FRAMES = 10


@dataclass(frozen=True)
class ModuleFile:
    """One graph of a bundle, as a backend is asked for it.

    Attributes:
        path: The ``.onnx`` file; external data lie beside it.
        name: What messages call it.
        inputs: What the graph must take.
        outputs: What the graph must give.
    """

    path: Path
    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, bundle: Bundle, name: str) -> ModuleFile:
        """The module `name` of `bundle`."""
        record = bundle.manifest.modules[name]
        return cls(bundle.file(record.file), name, record.inputs, record.outputs)


class CudaBackend(Protocol):
    """What executes modules on a GPU."""

    @property
    def name(self) -> str: ...

    def prepare(self, bundle: Bundle, modules: Sequence[str], devices: Sequence[CudaDevice]) -> None:
        """See to it that all of these can be loaded at once: engines that are missing are built here, and only here.

        Raises:
            BackendError: If the executor is missing, or refuses a graph or a GPU.
        """
        ...

    def load(self, module: ModuleFile, *, device: CudaDevice, stream: CudaStream) -> CudaModule:
        """Load one module for one stream of a GPU.

        Raises:
            BackendError: If it cannot be loaded.
        """
        ...


class CudaPlacement:
    """A bundle's modules on one GPU, or with producers on others.

    Args:
        bundle: What to load.
        policy: When producers run: under ``async`` on low-priority streams of their own, else on the consumer's.
        producers: Producer streams under ``async``.
        ordinal: The consumer's GPU.
        backend: What executes the modules.
        options: What the user chose.
        turn: Held while the consumer's stream is used.

    Raises:
        DeviceError: If a GPU or its driver is missing.
        InputError: If an option does not go with the policy.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        policy: Policy,
        producers: int,
        ordinal: int,
        backend: CudaBackend,
        options: CudaOptions,
        turn: threading.Lock,
    ) -> None:
        if policy.foreground and options.producer_ordinals:
            raise InputError(
                f"producer_devices goes with policy 'async', but the policy is '{policy}': there the producer runs "
                "between two frames"
            )
        self.loads_ahead = True
        self.name = f"cuda:{ordinal}/{backend.name}"
        self._bundle = bundle
        self._policy = policy
        self._producer_count = producers
        self._backend = backend
        self._options = options
        self._turn = turn
        self._closed = False
        self._loaded: list[LoadedModule] = []  # all that there is to close, also where loading stops half-way
        self._exits: dict[Route, LoadedModule] = {}
        self._producers: tuple[LoadedModule, ...] = ()
        self._devices: dict[int, CudaDevice] = {}
        with ExitStack() as undo:
            undo.callback(self.close)
            self.device = self._open(ordinal)
            for other in options.producer_ordinals:
                self._connect(self._open(other))
            self._stream = self.device.stream("warpcache-consumer", priority="high")
            undo.pop_all()

    def load(self, exits: Iterable[Route]) -> None:
        """Build what is missing, then load the producers that the policy needs, and these exits."""
        manifest = self._bundle.manifest
        wanted = {route: manifest.exit(route).module for route in exits}
        names = sorted(set(wanted.values()) | (set() if self._policy.kind == "full" else {"producer"}))
        self._backend.prepare(self._bundle, names, tuple(self._devices.values()))
        if not self._policy.foreground:
            ordinals = self._options.producer_ordinals or (self.device.ordinal,)
            self._producers = tuple(
                self._load(
                    "producer",
                    self._devices[ordinals[index % len(ordinals)]].worker_stream(f"warpcache-producer-{index}"),
                )
                for index in range(self._producer_count)
            )
        elif self._policy.kind != "full":
            self._producers = (self._load("producer", self._stream),)
        for route, name in wanted.items():
            self._exits[route] = self._load(name, self._stream)
        # It may hold every engine as bytes, and nothing is loaded any more.
        del self._backend

    def workspace(self, slots: int) -> CudaWorkspace:
        """Memory, lanes and graphs for one session; frames of other sessions wait meanwhile.

        Raises:
            DeviceError: If the GPU has no room for it.
        """
        if self._closed:
            raise ClosedError("the engine is closed; open a new one")
        with self._turn:
            return CudaWorkspace(
                self._bundle,
                device=self.device,
                consumer=self._stream,
                exits=self._exits,
                producers=self._producers,
                slots=0 if self._policy.kind == "full" else slots,
                options=self._options,
                turn=self._turn,
            )

    def synchronize(self) -> None:
        """Wait until every producer that was started has ended."""
        for loaded in self._producers:
            loaded.stream.synchronize()

    def close(self) -> None:
        """Wait for what runs and unload the modules; safe to call twice."""
        self._closed = True
        with ExitStack() as last:
            # Work that runs needs its module, and an executor its stream until it is closed: libraries look at the
            # streams that their handles were last set to.
            for device in self._devices.values():
                device.stop()
                last.callback(device.close)
            for loaded in self._loaded:
                loaded.module.close()

    def _open(self, ordinal: int) -> CudaDevice:
        device = self._devices.get(ordinal)
        if device is None:
            device = self._devices[ordinal] = CudaDevice(ordinal)
        return device

    def _connect(self, other: CudaDevice) -> None:
        """Let two GPUs copy directly, where the hardware can; elsewhere the driver copies by way of the host."""
        if other.ordinal == self.device.ordinal:
            return
        cuda = load()
        done = cuda.CUresult.CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED
        for one, two in ((self.device, other), (other, self.device)):
            if one.context.can_access(two.context):
                one.context.make_current()
                (code,) = cuda.cuCtxEnablePeerAccess(two.context.handle, 0)
                if code != done:
                    check((code,), f"connecting {one.name} and {two.name}")

    def _load(self, name: str, stream: CudaStream | CudaWorkerStream) -> LoadedModule:
        issued_to = stream.cuda if isinstance(stream, CudaWorkerStream) else stream
        file = ModuleFile.of(self._bundle, name)
        module = stream.call(lambda: self._backend.load(file, device=stream.device, stream=issued_to))
        # Lanes speak of a module's protocol only as far as the two kinds agree.
        loaded = LoadedModule.of(module, stream, self._bundle.manifest)  # type: ignore[arg-type]
        self._loaded.append(loaded)
        return loaded


class CudaWorkspace:
    """One session's memory on the GPU (see `placement.Workspace`)."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: CudaDevice,
        consumer: CudaStream,
        exits: dict[Route, LoadedModule],
        producers: tuple[LoadedModule, ...],
        slots: int,
        options: CudaOptions,
        turn: threading.Lock,
    ) -> None:
        manifest = bundle.manifest
        self._device = device
        self._consumer = consumer
        self._turn = turn
        self._producer_streams = tuple(loaded.stream for loaded in producers if loaded.stream is not consumer)
        self._cuda = load()
        # Borrowed arrays are ordered on a stream of their own, which every lane then waits for.
        self._intake = device.stream("warpcache-intake", priority="high")
        self._arrived = device.event()
        self._closed = False
        self._exit_lanes: dict[Route, CudaLane] = {}
        self._producer_lanes: list[CudaLane] = []
        specs = tuple(record.spec for record in manifest.inputs)
        depth = max(1, slots) + _WAITING_FRAMES
        self._staging = OutputPool(specs, allocate=device.allocate_pinned, kept=depth, ready=3)
        self._answers: OutputPool | DevicePool
        if options.outputs == "device":
            self._answers = DevicePool(manifest.outputs, allocate=device.allocate, ready=2)
        else:
            self._answers = OutputPool(manifest.outputs, allocate=device.allocate_pinned, ready=2)
        with ExitStack() as undo:
            undo.callback(self._release)
            ring = CudaSlots(device, manifest.cache, slots) if slots else None
            shared = StaticInputs(device, specs)
            answers = {spec.name: device.allocate(spec) for spec in manifest.outputs}
            for loaded in producers:
                inputs = StaticInputs(
                    loaded.stream.device,  # type: ignore[attr-defined]  # a CUDA stream knows its device
                    (spec for spec in loaded.module.inputs if spec.name in loaded.frame_inputs),
                )
                lane = CudaLane(loaded, inputs=inputs, outputs=None, slots=ring, arrived=self._arrived, options=options)
                self._producer_lanes.append(lane)
                lane.prepare()
            for route, loaded in exits.items():
                self._exit_lanes[route] = CudaLane(
                    loaded, inputs=shared, outputs=answers, slots=ring, arrived=self._arrived, options=options
                )
                self._exit_lanes[route].prepare()
            undo.pop_all()

    @property
    def graphs(self) -> int:
        """How many graphs are replayed instead of being issued call by call."""
        return sum(lane.graphs for lane in (*self._exit_lanes.values(), *self._producer_lanes))

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
        pinned = self._staging.take_one(spec)
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

    def close(self) -> None:
        """Give the graphs and the memory back, after the work that runs; safe to call twice."""
        with self._turn:
            if self._closed:
                return
            self._closed = True
            for stream in self._producer_streams:
                stream.synchronize()
            self._release()

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError("the session is closed; open a new one with engine.session()")

    def _release(self) -> None:
        for lane in (*self._exit_lanes.values(), *self._producer_lanes):
            lane.close()
        # Their slots and buffers go with the lanes, what waits in the pools with these; answers stay their callers'.
        self._exit_lanes.clear()
        self._producer_lanes.clear()
        self._staging = OutputPool(())
        self._answers = OutputPool(())
        self._arrived.close()
        self._intake.close()

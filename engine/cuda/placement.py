"""Modules on GPUs: streams by priority, everything loaded before the first frame is answered."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import ExitStack

from ...kernels.driver import check, load
from ...kernels.finite import FiniteKernel
from ..bundle.bundle import Bundle
from ..bundle.roles import Route
from ..device.placement import LoadedModule
from ..errors import ClosedError, InputError
from ..schedule.policy import Policy
from .backend import CudaBackend, ModuleFile
from .device import CudaDevice, CudaStream, CudaWorkerStream
from .options import CudaOptions
from .workspace import CudaModules, CudaWorkspace

__all__ = ["CudaPlacement"]


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
        self._modules = CudaModules()
        self._kernel: FiniteKernel | None = None
        self._devices: dict[int, CudaDevice] = {}
        with ExitStack() as undo:
            undo.callback(self.close)
            self.device = self._open(ordinal)
            for other in options.producer_ordinals:
                self._connect(self._open(other))
            self._stream = self.device.stream("warpcache-consumer", priority="high")
            undo.pop_all()

    def load(self, exits: Iterable[Route], *, predictors: tuple[str, ...] = (), auditor: bool = False) -> None:
        """Build what is missing, then load the producers that the policy needs, and the rest of what is asked for."""
        manifest = self._bundle.manifest
        wanted = {route: manifest.exit(route).module for route in exits}
        names = {*wanted.values(), *predictors}
        if self._policy.kind != "full":
            names.add("producer")
        if auditor:
            names.add("generator")
        self._backend.prepare(self._bundle, sorted(names), tuple(self._devices.values()))
        if predictors and self._options.outputs == "device":
            # Answers that a router chose are looked at before they are given out, and these do not come to the host.
            self._kernel = FiniteKernel(self.device.context)
        self._modules = CudaModules(
            producers=self._load_producers(),
            exits={route: self._load(name, self._stream) for route, name in wanted.items()},
            predictors={name: self._load(name, self._stream) for name in predictors},
            # A module has its activation memory for itself alone: this one is a second, for a stream that no frame
            # waits for, under every policy.
            auditor=self._load("generator", self.device.worker_stream("warpcache-auditor")) if auditor else None,
        )
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
                modules=self._modules,
                kernel=self._kernel,
                slots=0 if self._policy.kind == "full" else slots,
                options=self._options,
                turn=self._turn,
            )

    def synchronize(self) -> None:
        """Wait until every producer and every audit that was started has ended."""
        for loaded in self._modules.background:
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
            if self._kernel is not None:
                self._kernel.close()

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

    def _load_producers(self) -> tuple[LoadedModule, ...]:
        if self._policy.kind == "full":
            return ()
        if self._policy.foreground:
            return (self._load("producer", self._stream),)
        ordinals = self._options.producer_ordinals or (self.device.ordinal,)
        return tuple(
            self._load(
                "producer",
                self._devices[ordinals[index % len(ordinals)]].worker_stream(f"warpcache-producer-{index}"),
            )
            for index in range(self._producer_count)
        )

    def _load(self, name: str, stream: CudaStream | CudaWorkerStream) -> LoadedModule:
        issued_to = stream.cuda if isinstance(stream, CudaWorkerStream) else stream
        file = ModuleFile.of(self._bundle, name)
        module = stream.call(lambda: self._backend.load(file, device=stream.device, stream=issued_to))
        # Lanes speak of a module's protocol only as far as the two kinds agree.
        loaded = LoadedModule.of(module, stream, self._bundle.manifest)  # type: ignore[arg-type]
        self._loaded.append(loaded)
        return loaded

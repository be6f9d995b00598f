"""Modules on GPUs: streams by priority, everything loaded before the first frame is answered."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import replace

from ...kernels.driver import check, load
from ...kernels.finite import FiniteKernel
from ..bundle.bundle import Bundle
from ..bundle.roles import Role, Route
from ..device.chain import Chain
from ..device.module import Backend, ModuleFile, Site
from ..device.placement import LoadedModule, LoadedModules, Wanted
from ..device.stream import Stream
from ..errors import ClosedError, InputError
from ..schedule.policy import Policy
from .device import CudaDevice, CudaStream, CudaWorkerStream
from .options import CudaOptions
from .workspace import CudaWorkspace, Placed

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
        backend: Backend,
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
        self._loaded: dict[tuple[str, Stream], LoadedModule] = {}  # to be closed, also where loading stops half-way
        self._devices: dict[int, CudaDevice] = {}
        self._kernel: FiniteKernel | None = None
        with ExitStack() as undo:
            undo.callback(self.close)
            self.device = self._open(ordinal)
            for other in options.producer_ordinals:
                self._connect(self._open(other))
            self._stream = self.device.stream("warpcache-consumer", priority="high")
            self._placed = Placed(self.device, self._stream, options, turn, bundle.first_state())
            undo.pop_all()

    def load(self, wanted: Wanted) -> None:
        """Build what is missing, then load the producers that the policy needs, and what is wanted."""
        manifest = self._bundle.manifest
        roles = [*wanted.predictors, *([Role.WHOLE] if wanted.auditor else ())]
        if self._policy.uses_cache:
            roles.append(Role.PRODUCER)
        names = {name for route in wanted.exits for name in manifest.exit(route).modules}
        names |= {name for role in roles if (name := manifest.module_of(role)) is not None}
        self._backend.prepare(self._bundle, sorted(names), tuple(self._devices.values()))
        if wanted.predictors and self._options.outputs == "device":
            # Answers that a router chose are looked at before they are given out, and these do not come to the host.
            self._kernel = FiniteKernel(self.device.context)
        modules = LoadedModules(
            producers=self._load_producers(),
            exits={route: self._load_exit(route) for route in wanted.exits},
            predictors={role: self._load_role(role, self._stream) for role in wanted.predictors},
            # A module has its activation memory for itself alone: this one is a second, for a stream that no frame
            # waits for, under every policy.
            auditor=self._load_role(Role.WHOLE, self.device.worker_stream("warpcache-auditor"))
            if wanted.auditor
            else None,
        )
        self._placed = replace(self._placed, modules=modules, kernel=self._kernel)
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
            return CudaWorkspace(self._bundle.manifest, self._placed, slots=slots if self._policy.uses_cache else 0)

    def synchronize(self) -> None:
        """Wait until every producer and every audit that was started has ended."""
        for loaded in self._placed.modules.background:
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
            for loaded in self._loaded.values():
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
        if not self._policy.uses_cache:
            return ()
        if self._policy.foreground:
            return (self._load_role(Role.PRODUCER, self._stream),)
        ordinals = self._options.producer_ordinals or (self.device.ordinal,)
        return tuple(
            self._load_role(
                Role.PRODUCER,
                self._devices[ordinals[index % len(ordinals)]].worker_stream(f"warpcache-producer-{index}"),
            )
            for index in range(self._producer_count)
        )

    def _load_exit(self, route: Route) -> LoadedModule:
        manifest = self._bundle.manifest
        parts = [self._load(name, self._stream) for name in manifest.exit(route).modules]
        if len(parts) == 1:
            return parts[0]
        return LoadedModule.of(
            Chain(route, [part.module for part in parts], self.device.allocate), self._stream, manifest
        )

    def _load_role(self, role: Role, stream: CudaStream | CudaWorkerStream) -> LoadedModule:
        name = self._bundle.manifest.module_of(role)
        assert name is not None, f"the engine asked for a module of role {role}, which the bundle has not"
        return self._load(name, stream)

    def _load(self, name: str, stream: CudaStream | CudaWorkerStream) -> LoadedModule:
        """Load a module, once for each stream: exits may share their first parts."""
        loaded = self._loaded.get((name, stream))
        if loaded is None:
            site = Site(stream.cuda if isinstance(stream, CudaWorkerStream) else stream)
            file = ModuleFile.of(self._bundle, name)
            module = stream.call(lambda: self._backend.load(file, site))
            loaded = self._loaded[name, stream] = LoadedModule.of(module, stream, self._bundle.manifest)
        return loaded

"""Modules on the CPU: which cores the consumer and the producers have, and lanes that bind the caller's arrays."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np

from ..bundle.bundle import Bundle
from ..bundle.manifest import Manifest
from ..bundle.roles import Role, Route
from ..device.chain import Chain
from ..device.module import Backend, ModuleFile, Site
from ..device.placement import LoadedModule, LoadedModules, Wanted
from ..device.stream import Stream
from ..errors import ClosedError
from ..schedule.policy import Policy
from .device import CoreShare, CpuDevice
from .slots import SlotBuffers
from .workspace import CpuWorkspace

__all__ = ["CpuPlacement"]


class CpuPlacement:
    """A bundle's modules on the cores of this process.

    Args:
        bundle: What to load.
        policy: Under ``async`` the consumer has cores of its own and producers the rest; otherwise one thing runs at a
            time and has them all.
        producers: Producer streams under ``async``.
        threads: Cores to use; None uses all that the process may.
        backend: What loads the modules.

    Raises:
        InputError: If `threads` is out of range.
    """

    def __init__(
        self, bundle: Bundle, *, policy: Policy, producers: int, threads: int | None, backend: Backend
    ) -> None:
        self.loads_ahead = False
        self._bundle = bundle
        self._policy = policy
        self._producer_count = producers
        self._backend = backend
        self.name = f"cpu/{backend.name}"
        self._loading = threading.Lock()
        self._closed = False
        self._loaded: dict[tuple[str, Stream], LoadedModule] = {}  # to be closed, also where loading stops half-way
        self._exits: dict[Route, LoadedModule] = {}
        self._modules = LoadedModules()
        self._first_state = bundle.first_state()
        self._device = CpuDevice(threads)
        self._share = self._device.share(0 if policy.foreground else producers)
        self._inline = self._device.inline(cores=self._share.consumer_cores)

    def load(self, wanted: Wanted) -> None:
        """Load the producers that the policy needs, these exits and predictors, and the auditor where it is wanted."""
        manifest = self._bundle.manifest
        auditor = self._load_auditor() if wanted.auditor else None
        self._inline = self._device.inline(cores=self._share.consumer_cores)
        predictors = {
            # A predictor is too small for its work to be worth sharing out.
            role: self._load(_named(manifest, role), Site(self._inline))
            for role in wanted.predictors
        }
        producers = self._load_producers()
        for route in wanted.exits:
            self._exits[route] = self._load_exit(route)
        self._modules = LoadedModules(producers, self._exits, predictors, auditor)

    def workspace(self, slots: int) -> CpuWorkspace:
        """Memory and lanes for one session with so many cache slots."""
        manifest = self._bundle.manifest
        cache = manifest.cache if self._policy.uses_cache else ()
        buffers = SlotBuffers(cache, slots)
        return CpuWorkspace(self._modules, self._exit, buffers, manifest.outputs, self._first_state)

    def synchronize(self) -> None:
        """Wait until every producer and every audit that was started has ended."""
        for loaded in self._modules.background:
            loaded.stream.synchronize()

    def close(self) -> None:
        """Wait for what runs and unload the modules; safe to call twice."""
        self._closed = True
        # Streams first: a producer that runs still needs its module.
        self._device.close()
        for loaded in self._loaded.values():
            loaded.module.close()

    def _exit(self, route: Route) -> LoadedModule:
        """The module of an exit, loaded when it is first needed."""
        loaded = self._exits.get(route)
        if loaded is None:
            with self._loading:
                if self._closed:
                    raise ClosedError("the engine is closed; open a new one")
                loaded = self._exits.get(route) or self._load_exit(route)
                self._exits[route] = loaded
        return loaded

    def _load_producers(self) -> tuple[LoadedModule, ...]:
        share = self._share
        if not self._policy.uses_cache:
            return ()
        name = _named(self._bundle.manifest, Role.PRODUCER)
        if self._policy.foreground:
            # Its executor's threads must not spin on while a consumer wants the cores.
            return (self._load(name, Site(self._inline, share.consumer_threads)),)
        # In the background even on cores of their own: the thread that answers frames is the caller's, which is not
        # pinned, and where it lands on a producer's core it goes first.
        return tuple(
            self._load(
                name,
                Site(
                    self._device.stream(
                        f"warpcache-producer-{index}", cores=share.producer_cores[index], background=True
                    ),
                    share.producer_threads[index],
                    spinning=not share.shared,
                ),
            )
            for index in range(self._producer_count)
        )

    def _load_auditor(self) -> LoadedModule:
        """Load the whole generator where it takes nothing from the consumer."""
        share = self._share
        if not self._policy.foreground:
            cores = tuple(sorted({core for part in share.producer_cores for core in part or ()}))
        elif self._policy.deterministic:
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
        return self._load(_named(self._bundle.manifest, Role.WHOLE), Site(stream, len(cores)), called="auditor")

    def _load_exit(self, route: Route) -> LoadedModule:
        share, manifest = self._share, self._bundle.manifest
        site = Site(self._inline, share.consumer_threads, spinning=not share.shared)
        parts = [self._load(name, site) for name in manifest.exit(route).modules]
        if len(parts) == 1:
            return parts[0]
        chain = Chain(route, [part.module for part in parts], lambda spec: np.zeros(spec.shape, spec.dtype))
        return LoadedModule.of(chain, self._inline, manifest)

    def _load(self, name: str, site: Site, *, called: str | None = None) -> LoadedModule:
        """Load a module, once for each stream: exits may share their first parts."""
        loaded = self._loaded.get((name, site.stream))
        if loaded is None:
            file = ModuleFile.of(self._bundle, name, called=called)
            # On the stream's own thread and cores, which the executor's threads inherit.
            module = site.stream.call(lambda: self._backend.load(file, site))
            loaded = LoadedModule.of(module, site.stream, self._bundle.manifest)
            self._loaded[name, site.stream] = loaded
        return loaded


def _named(manifest: Manifest, role: Role) -> str:
    name = manifest.module_of(role)
    assert name is not None, f"the engine asked for a module of role {role}, which the bundle has not"
    return name

"""Modules on the CPU: which cores the consumer and the producers have, and lanes that bind the caller's arrays."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol, cast

from ..bundle.bundle import Bundle
from ..bundle.roles import Route
from ..device.module import Module
from ..device.placement import LoadedModule
from ..device.stream import Stream
from ..errors import ClosedError
from ..schedule.policy import Policy
from ..spec import TensorSpec
from .device import CoreShare, CpuDevice
from .slots import SlotBuffers
from .workspace import CpuWorkspace

__all__ = ["Backend", "CpuPlacement"]


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


def _onnx_runtime() -> Backend:
    # ONNX Runtime itself is imported only when the first module is loaded.
    from ..onnxruntime.cpu import OnnxRuntimeModule

    return cast("Callable[..., Module]", OnnxRuntimeModule)

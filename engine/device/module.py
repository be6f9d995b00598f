"""The seam between the engine and what executes: one loaded module on one device, and the backend that loads it.

The same for every executor and every device. What differs is where the arrays lie: NumPy's on the CPU, `DeviceArray` on
a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ..bundle.bundle import Bundle
from ..spec import TensorSpec
from .stream import Event

__all__ = ["Backend", "Module", "ModuleFile", "Site"]


@runtime_checkable
class Module(Protocol):
    """One loaded executable with named inputs and outputs, fixed at load.

    A module keeps no state between calls and may be called from several threads; calls on the same module take turns.

    Attributes:
        name: What messages call it, e.g. ``"warp"``.
        inputs: What it reads.
        outputs: What it writes.
        capturable: Whether `launch` may be captured into a CUDA graph, after one run on the same buffers; never so on
            the CPU.
    """

    @property
    def name(self) -> str: ...

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def capturable(self) -> bool: ...

    def enqueue(self, bindings: Mapping[str, Any], stream: Any) -> Event:
        """Run once, in order on `stream`; does not block, except on a stream that runs at once.

        Args:
            bindings: Every input and every output by name, nothing else: arrays of exactly the spec's dtype and shape,
                C-contiguous, on the module's device, owned by the caller. They must stay alive and untouched until the
                event is done; the outputs are written in place and overlap nothing else.
            stream: Where the work is ordered; on a GPU the thread's current context is the module's.

        Returns:
            An event that is done when the outputs are written; it raises what the execution raised.

        Raises:
            InputError: If a binding is missing, unknown, or of another dtype, shape or memory layout. Nothing ran.
            ClosedError: If the module or the stream is closed.
        """
        ...

    def launch(self, bindings: Mapping[str, Any], stream: Any) -> None:
        """`enqueue` without an event: issue one run and nothing else, no allocation, no wait. What a graph captures.

        Raises:
            InputError: As `enqueue`.
            BackendError: If the executor refuses.
            ClosedError: If the module is closed.
        """
        ...

    def close(self) -> None:
        """Release it; safe to call twice. On the CPU what runs is waited for; on a GPU it must have ended."""
        ...


@dataclass(frozen=True)
class ModuleFile:
    """One module of a bundle, as a backend is asked for it.

    Attributes:
        path: Its file; external data lie beside it.
        name: What messages call it.
        inputs: What it must take.
        outputs: What it must give.
    """

    path: Path
    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, bundle: Bundle, name: str, *, called: str | None = None) -> ModuleFile:
        """The module `name` of `bundle`, `called` something else in messages where given."""
        record = bundle.manifest.modules[name]
        return cls(bundle.file(record.file), called or name, record.inputs, record.outputs)


@dataclass(frozen=True)
class Site:
    """Where a module is loaded.

    Attributes:
        stream: What it is going to run on; a CUDA stream knows its GPU.
        threads: CPU threads of one call, the calling one included.
        spinning: Whether idle executor threads on the CPU spin for some time rather than sleep.
    """

    stream: Any
    threads: int = 1
    spinning: bool = False


class Backend(Protocol):
    """What executes modules, on the CPU or on a GPU."""

    @property
    def name(self) -> str: ...

    def prepare(self, bundle: Bundle, modules: Sequence[str], devices: Sequence[Any]) -> None:
        """See to it that all of these can be loaded at once: engines that are missing are built here, and only here.

        Args:
            bundle: Whose modules.
            modules: Their names.
            devices: The GPUs that they are loaded on; empty on the CPU.

        Raises:
            BackendError: If the executor is missing, or refuses a graph or a GPU.
        """
        ...

    def load(self, module: ModuleFile, site: Site) -> Module:
        """Load one module for one stream; called on that stream's own thread and cores, which executors inherit.

        Raises:
            BackendError: If it cannot be loaded.
        """
        ...

"""What executes modules on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ...kernels.array import DeviceArray
from ..bundle.bundle import Bundle
from ..device.stream import Event
from ..spec import TensorSpec
from .device import CudaDevice, CudaStream

if TYPE_CHECKING:
    from .device import CudaStream

__all__ = ["CudaBackend", "CudaModule", "ModuleFile"]


class CudaModule(Protocol):
    """One loaded graph on one GPU; what `Module` says holds, with arrays in the GPU's memory.

    Attributes:
        name: What messages call it.
        inputs: What `enqueue` reads.
        outputs: What `enqueue` writes.
        capturable: Whether `launch` may be captured into a graph, after one run on the same buffers.
    """

    @property
    def name(self) -> str: ...

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def capturable(self) -> bool: ...

    def launch(self, bindings: Mapping[str, DeviceArray], stream: CudaStream) -> None:
        """Issue one run to `stream` and nothing else: no event, no allocation, no wait. This is what a graph captures.

        Args:
            bindings: Every input and every output by name: C-contiguous arrays of exactly the spec's dtype and shape on
                the module's GPU. They must stay alive and untouched until the work has ended.
            stream: Where the work is ordered; the thread's current context is the module's GPU.

        Raises:
            InputError: If a binding does not fit. Nothing was issued.
            BackendError: If the executor refuses.
            ClosedError: If the module is closed.
        """
        ...

    def enqueue(self, bindings: Mapping[str, DeviceArray], stream: CudaStream) -> Event:
        """`launch`, and an event that is done when the outputs are written."""
        ...

    def close(self) -> None:
        """Release the graph; safe to call twice. Work that runs must have ended."""
        ...


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

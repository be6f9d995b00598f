"""The seam between the engine and what executes graphs: one loaded graph on one device, the same for every backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ...kernels.array import DeviceArray
from ..cpu.device import Event, Stream
from ..spec import Array, TensorSpec

if TYPE_CHECKING:
    from ..cuda.device import CudaStream

__all__ = ["CudaModule", "Module"]


@runtime_checkable
class Module(Protocol):
    """One loaded graph with named inputs and outputs, fixed at load.

    A module keeps no state between calls and may be called from several threads; calls on the same module take turns.

    Attributes:
        name: What messages call it, e.g. ``"warp"``.
        inputs: What `enqueue` reads.
        outputs: What `enqueue` writes.
    """

    @property
    def name(self) -> str: ...

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    def enqueue(self, bindings: Mapping[str, Array], stream: Stream) -> Event:
        """Run once, in order on `stream`; does not block, except on a stream that runs at once.

        Args:
            bindings: Every input and every output by name, nothing else: arrays of exactly the spec's dtype and shape,
                C-contiguous, owned by the caller. They must stay alive and untouched until the event is done; the
                outputs are written in place and overlap nothing else.
            stream: Where the work is ordered.

        Returns:
            An event that is done when the outputs are written; it raises what the execution raised.

        Raises:
            InputError: If a binding is missing, unknown, or of another dtype, shape or memory layout. Nothing ran.
            ClosedError: If the module or the stream is closed.
        """
        ...

    def close(self) -> None:
        """Release the graph; safe to call twice. Work that is running is waited for."""
        ...


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

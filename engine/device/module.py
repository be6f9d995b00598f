"""The seam between the engine and what executes graphs: one loaded graph on one device, the same for every backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ..spec import Array, TensorSpec
from .stream import Event, Stream

if TYPE_CHECKING:
    pass

__all__ = ["Module"]


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

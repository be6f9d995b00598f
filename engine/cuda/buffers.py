"""A session's buffers on a GPU: cache slots, inputs at fixed addresses, staging."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from ...kernels.array import DeviceArray
from ...kernels.driver import check, load
from ..spec import Array, TensorSpec
from .device import CudaDevice, CudaEvent, CudaStream

__all__ = ["CudaSlots", "HostInput", "StaticInputs"]


@dataclass(frozen=True, slots=True, eq=False)
class HostInput:
    """One input of a frame in pinned host memory, which it keeps from being lent to somebody else."""

    array: Array
    pointer: int


class CudaSlots:
    """The memory of a ring of cache slots on one GPU, and when each was last written and read.

    Args:
        device: The consumer's GPU.
        specs: The cache tensors.
        capacity: Number of slots.
    """

    def __init__(self, device: CudaDevice, specs: Iterable[TensorSpec], capacity: int) -> None:
        listed = tuple(specs)
        self.device = device
        self.arrays = tuple({spec.name: device.allocate(spec) for spec in listed} for _ in range(capacity))
        self.read = tuple(device.event() for _ in range(capacity))
        # The event of whoever wrote last: an event belongs to a GPU, and producers may be on several.
        self.written: list[CudaEvent | None] = [None] * capacity

    def __len__(self) -> int:
        return len(self.arrays)


class StaticInputs:
    """Buffers of fixed address for a frame's inputs, on one GPU.

    Args:
        device: The GPU.
        specs: The inputs.
    """

    def __init__(self, device: CudaDevice, specs: Iterable[TensorSpec]) -> None:
        self.device = device
        self.arrays = {spec.name: device.allocate(spec) for spec in specs}
        self._holds: dict[str, HostInput | DeviceArray] = {}
        self._cuda = load()

    def fill(self, name: str, source: HostInput | DeviceArray, stream: CudaStream) -> None:
        """Copy one input there, in order on `stream`; what is there already (an input that never changes, or the very
        buffer, which somebody else has filled) is left."""
        target = self.arrays[name]
        if self._holds.get(name) is source:
            return
        # Until the copy has been issued nothing is claimed to be there.
        self._holds.pop(name, None)
        if source is target:
            return
        if isinstance(source, HostInput):
            code = self._cuda.cuMemcpyHtoDAsync(target.pointer, source.pointer, target.size_bytes, stream.stream)
        else:
            code = _copy(self._cuda, target, source, stream)
        check(code, f"copying input {name!r} to {self.device.name}")
        self._holds[name] = source


def _copy(cuda: Any, target: DeviceArray, source: DeviceArray, stream: CudaStream) -> tuple[Any, ...]:
    """Issue a copy in GPU memory. One address space: the driver knows from the addresses which GPUs they are on, and
    copies directly between two that are connected, otherwise by way of the host."""
    return cast("tuple[Any, ...]", cuda.cuMemcpyAsync(target.pointer, source.pointer, source.size_bytes, stream.stream))

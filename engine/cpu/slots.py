"""The memory of a ring of cache slots on the CPU."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..spec import Array, TensorSpec

__all__ = ["SlotBuffers"]


class SlotBuffers:
    """The memory of a ring of slots, allocated once.

    Args:
        specs: The cache tensors, as the manifest lists them.
        capacity: Number of slots.
    """

    def __init__(self, specs: Iterable[TensorSpec], capacity: int) -> None:
        listed = tuple(specs)
        self._slots = tuple({spec.name: np.zeros(spec.shape, spec.dtype) for spec in listed} for _ in range(capacity))
        self.size_bytes = capacity * sum(spec.size_bytes for spec in listed)

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, slot: int) -> dict[str, Array]:
        """The buffers of `slot` by tensor name: C-contiguous, owned by this object, the same ones every time."""
        return self._slots[slot]

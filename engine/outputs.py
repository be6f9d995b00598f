"""Memory for answers: arrays that belong to the caller, in memory that is used again once the caller lets go of it.

A fresh array of an image's size is fresh pages, and the kernel maps them one by one when they are first written, which
here would be inside the consumer: measured at 0.3 ms for a 256x256 image, on a consumer of 1.1 ms. So memory comes
back when nothing refers to it any more, and one set is kept ready, written once, while a session has nothing to do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np

from .spec import Array, TensorSpec

__all__ = ["OutputPool"]

_KEPT = 4  # sets of memory that wait for their next use; what comes back beyond that is freed


class OutputPool:
    """Hands out arrays for the outputs of one frame after the other.

    Args:
        specs: The outputs.
    """

    def __init__(self, specs: Iterable[TensorSpec]) -> None:
        self._specs = tuple(specs)
        self._free: dict[str, deque[Array]] = {spec.name: deque(maxlen=_KEPT) for spec in self._specs}

    def take(self) -> dict[str, Array]:
        """One array per output: C-contiguous, of undefined content, the caller's alone while anything refers to it.

        A view of it, a memoryview or a tensor that shares its memory counts as referring to it.
        """
        return {spec.name: self._take(spec) for spec in self._specs}

    def reserve(self) -> None:
        """See to it that the next `take` needs no fresh memory; cheap where that is so."""
        for spec in self._specs:
            if not self._free[spec.name]:
                memory = np.empty(spec.shape, spec.dtype)
                memory.fill(0)  # maps the pages; np.zeros would not
                self._free[spec.name].append(memory)

    def _take(self, spec: TensorSpec) -> Array:
        free = self._free[spec.name]
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(spec.shape, spec.dtype)
        return np.asarray(_Lease(memory, free))


class _Lease:
    """The base of an array that was handed out: NumPy keeps it alive as long as the array or a view of it lives."""

    __slots__ = ("__array_interface__", "_free", "_memory")

    def __init__(self, memory: Array, free: deque[Array]) -> None:
        self._memory = memory
        self._free = free
        self.__array_interface__: dict[str, Any] = memory.__array_interface__

    def __del__(self) -> None:
        # Any thread may drop the last reference; appending to a deque is safe from all.
        self._free.append(self._memory)

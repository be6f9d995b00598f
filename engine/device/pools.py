"""Memory that is lent: arrays that belong to whoever took them, in memory that is used again once they let go of it.

A fresh array of an image's size is fresh pages, and the kernel maps them one by one when they are first written, which
here would be inside the consumer: measured at 0.3 ms for a 256x256 image, on a consumer of 1.1 ms. So memory comes
back when nothing refers to it any more, and one set is kept ready, written once, while a session has nothing to do.
Pinned and device memory, which are slow to get, are lent the same way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import numpy as np

from ...kernels.array import DeviceArray
from ..spec import Array, TensorSpec

__all__ = ["DevicePool", "OutputPool"]

_KEPT = 4  # sets of memory that wait for their next use; what comes back beyond that is freed


M = TypeVar("M")


class _Pool(ABC, Generic[M]):
    """Sets of memory, lent one after the other and used again once they are let go of.

    Args:
        specs: What a set holds.
        allocate: Where fresh memory comes from, mapped and written once.
        kept: How many sets wait for their next use; what comes back beyond that is freed.
        ready: How many are there from the start.
    """

    def __init__(
        self, specs: Iterable[TensorSpec], *, allocate: Callable[[TensorSpec], M], kept: int = _KEPT, ready: int = 0
    ) -> None:
        self._specs = tuple(specs)
        self._allocate = allocate
        self._free: dict[str, deque[M]] = {spec.name: deque(maxlen=max(kept, ready)) for spec in self._specs}
        for spec in self._specs:
            self._free[spec.name].extend(allocate(spec) for _ in range(ready))

    def take(self) -> dict[str, M]:
        """One array per output: C-contiguous, of undefined content, the caller's alone while anything refers to it.

        A view of it, a memoryview, or what was made from it by sharing its memory counts as referring to it.
        """
        return {spec.name: self.take_one(spec) for spec in self._specs}

    def take_one(self, spec: TensorSpec) -> M:
        """One of the set's arrays alone."""
        free = self._free[spec.name]
        try:
            memory = free.pop()
        except IndexError:
            memory = self._allocate(spec)
        return self._lend(memory, free)

    def reserve(self) -> None:
        """See to it that the next `take` needs no fresh memory; cheap where that is so."""
        for spec in self._specs:
            if not self._free[spec.name]:
                self._free[spec.name].append(self._allocate(spec))

    @staticmethod
    @abstractmethod
    def _lend(memory: M, free: deque[M]) -> M:
        """The same memory as an array that brings it back to `free` when it is let go of."""


class OutputPool(_Pool[Array]):
    """Lends host arrays: NumPy's, or pinned ones where `allocate` says so (see `_Pool`)."""

    def __init__(
        self,
        specs: Iterable[TensorSpec],
        *,
        allocate: Callable[[TensorSpec], Array] | None = None,
        kept: int = _KEPT,
        ready: int = 0,
    ) -> None:
        super().__init__(specs, allocate=_numpy_memory if allocate is None else allocate, kept=kept, ready=ready)

    @staticmethod
    def _lend(memory: Array, free: deque[Array]) -> Array:
        return np.asarray(_HostLease(memory, free))


class DevicePool(_Pool[DeviceArray]):
    """Lends arrays in a GPU's memory (see `_Pool`)."""

    @staticmethod
    def _lend(memory: DeviceArray, free: deque[DeviceArray]) -> DeviceArray:
        lease = _Lease(memory, free)
        return DeviceArray(memory.pointer, memory.shape, memory.dtype, device=memory.device, owner=lease)


class _Lease:
    """Brings memory back to where it is lent from when nothing refers to it any more."""

    __slots__ = ("_free", "_memory")

    def __init__(self, memory: Any, free: deque[Any]) -> None:
        self._memory = memory
        self._free = free

    def __del__(self) -> None:
        # Any thread may drop the last reference; appending to a deque is safe from all.
        self._free.append(self._memory)


class _HostLease(_Lease):
    """The base of an array that was handed out: NumPy keeps it alive as long as the array or a view of it lives."""

    __slots__ = ("__array_interface__",)

    def __init__(self, memory: Array, free: deque[Array]) -> None:
        super().__init__(memory, free)
        self.__array_interface__: dict[str, Any] = memory.__array_interface__


def _numpy_memory(spec: TensorSpec) -> Array:
    memory = np.empty(spec.shape, spec.dtype)
    memory.fill(0)  # maps the pages; np.zeros would not
    return memory

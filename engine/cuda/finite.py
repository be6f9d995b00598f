"""Whether a session's answers are finite: looked at on the host where they come to it, and on the GPU otherwise."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ...kernels.array import DeviceArray
from ...kernels.driver import check, load
from ...kernels.finite import FiniteKernel
from ..spec import Array, TensorSpec
from .device import CudaDevice

__all__ = ["FiniteCheck", "finite_on_host"]

_FOUND = TensorSpec("found", "int32", (1,))


class FiniteCheck:
    """Looks through a session's answers in a GPU's memory; only the verdict is copied, and waited for.

    It has a stream of its own: it waits for nothing else, and no capture on the consumer's stream sees it.

    Args:
        device: The GPU.
        kernel: What looks; of the same GPU, and open for as long as this is used.
    """

    def __init__(self, device: CudaDevice, kernel: FiniteKernel) -> None:
        self._cuda = load()
        self._device = device
        self._kernel = kernel
        self._stream = device.stream("warpcache-check", priority="high")
        self._found = device.allocate(_FOUND)
        self._verdict = device.allocate_pinned(_FOUND)
        self._address = self._verdict.__array_interface__["data"][0]

    def finite(self, arrays: Iterable[DeviceArray]) -> bool:
        """Whether none of them holds NaN or infinity; whoever wrote them must have ended.

        Raises:
            DeviceError: If the GPU reports a failure.
        """
        self._kernel.look(arrays, self._found, stream=self._stream.handle)
        code = self._cuda.cuMemcpyDtoHAsync(
            self._address, self._found.pointer, self._found.size_bytes, self._stream.stream
        )
        check(code, f"copying from {self._device.name} whether an answer is finite")
        self._stream.synchronize()
        return not self._verdict[0]

    def close(self) -> None:
        """Give the stream back; safe to call twice."""
        self._stream.close()


def finite_on_host(array: Array) -> bool:
    """Whether an array holds neither NaN nor infinity; whole numbers never do."""
    if array.dtype.kind != "f":
        return True
    # A sum is one pass without a temporary. Finite numbers may add up to infinity, above all those of float16.
    with np.errstate(over="ignore", invalid="ignore"):
        total = array.sum(dtype=np.float64 if array.dtype.itemsize == 8 else np.float32)
    return bool(np.isfinite(total)) or bool(np.isfinite(array).all())

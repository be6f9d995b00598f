"""What one session on a GPU keeps of a frame until the whole generator has rendered it in the background."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...kernels.array import DeviceArray
from ...kernels.driver import check, load
from ..spec import Array, TensorSpec
from .buffers import HostInput, StaticInputs
from .device import CudaDevice, CudaEvent

__all__ = ["AuditMemory"]


class AuditMemory:
    """One frame's inputs and the picture it was answered with.

    Args:
        device: The consumer's GPU, which the auditor runs on, too.
        inputs: The buffers that the auditor's lane reads.
        image: The output that is kept.
        on_device: Whether answers lie in the GPU's memory.
        arrived: Recorded when arrays on the GPU were borrowed from their owner's stream.
    """

    def __init__(
        self,
        device: CudaDevice,
        *,
        inputs: StaticInputs,
        image: TensorSpec,
        on_device: bool,
        arrived: CudaEvent,
    ) -> None:
        self._cuda = load()
        self._device = device
        self._inputs = inputs
        self._arrived = arrived
        self._stream = device.stream("warpcache-audit-copies", priority="high")
        self._raw = device.allocate_pinned(image) if on_device else None
        self._image: Array = np.zeros(image.shape, np.float32)
        if self._raw is not None and image.dtype == "float32":
            self._image = self._raw

    def keep(self, inputs: Mapping[str, Any], image: Any) -> tuple[dict[str, Any], Array]:
        """See `placement.Workspace.keep_for_audit`. Waits for the copies of what is on the GPU, and for them alone.

        Inputs in pinned memory are ours already, and are kept as they are; borrowed ones are their owner's, who may
        write into them as soon as he has his answer.
        """
        kept: dict[str, Any] = {}
        copies = 0
        for name, target in self._inputs.arrays.items():
            source = kept[name] = inputs[name]
            if isinstance(source, HostInput):
                continue
            if not copies:
                self._device.context.make_current()
                self._stream.wait_for(self._arrived)
            code = self._cuda.cuMemcpyDtoDAsync(target.pointer, source.pointer, target.size_bytes, self._stream.stream)
            check(code, f"copying input {name!r} on {self._device.name}")
            kept[name] = target
            copies += 1
        if isinstance(image, DeviceArray):
            self._fetch(image)
            copies += 1
        else:
            np.copyto(self._image, image)
        if copies:
            self._stream.synchronize()
        if self._raw is not None and self._raw is not self._image:
            np.copyto(self._image, self._raw)
        return kept, self._image

    def close(self) -> None:
        """Give the stream back; safe to call twice."""
        self._stream.close()

    def _fetch(self, image: DeviceArray) -> None:
        assert self._raw is not None
        self._device.context.make_current()
        code = self._cuda.cuMemcpyDtoHAsync(
            self._raw.__array_interface__["data"][0], image.pointer, image.size_bytes, self._stream.stream
        )
        check(code, f"copying an answer from {self._device.name}")

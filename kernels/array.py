"""Arrays in a GPU's memory, lent and borrowed without a copy by DLPack and `__cuda_array_interface__`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .driver import first_line
from .errors import InputError

__all__ = ["DeviceArray"]

_LEGACY = 1  # CU_STREAM_LEGACY: the default stream by a handle that is not 0


class DeviceArray:
    """A typed, shaped view of memory on one GPU; it owns nothing, `owner` does.

    NumPy cannot read it. torch, CuPy and others take it as it is: ``torch.from_dlpack(a)``, ``cupy.asarray(a)``.

    Args:
        pointer: Address on the device.
        shape: Extents.
        dtype: NumPy dtype or its name.
        device: The GPU's number.
        strides: In elements, one an axis; None for C-contiguous.
        owner: Kept alive as long as this array is.
        stream: Handle of the CUDA stream that work on the memory is ordered on, for whom it is lent to; 0 if the
            memory may be read at once.
    """

    __slots__ = ("_strides", "device", "dtype", "owner", "pointer", "shape", "stream")

    def __init__(
        self,
        pointer: int,
        shape: tuple[int, ...],
        dtype: Any,
        *,
        device: int,
        strides: tuple[int, ...] | None = None,
        owner: object = None,
        stream: int = 0,
    ) -> None:
        self.pointer = pointer
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self.device = device
        dense = _dense_strides(self.shape)
        self._strides = None if strides is None or _same_layout(self.shape, strides, dense) else tuple(strides)
        self.owner = owner
        self.stream = stream

    @classmethod
    def borrow(cls, source: Any, *, device: int, stream: int, name: str = "array") -> DeviceArray:
        """See somebody else's GPU array, without a copy.

        Args:
            source: Anything with ``__dlpack__`` or ``__cuda_array_interface__`` (torch, CuPy, PyCUDA, ours).
            device: The GPU it must be on.
            stream: Handle of our stream; work on it waits for what the owner has queued so far on its own.
            name: What messages call it.

        Raises:
            InputError: If it is no array on that GPU.
        """
        # Ours too is ordered like anybody's where it says that work on it is queued.
        ours = isinstance(source, DeviceArray) and not source.stream
        array: DeviceArray = source if ours else _viewed(source, stream, name)
        if array.device != device:
            where = "the CPU" if array.device < 0 else f"cuda:{array.device}"
            raise InputError(f"{name} is on {where}, expected cuda:{device}; move it there first")
        return array

    @property
    def strides(self) -> tuple[int, ...]:
        """In elements, one an axis."""
        return _dense_strides(self.shape) if self._strides is None else self._strides

    @property
    def contiguous(self) -> bool:
        """Whether it is C-contiguous."""
        return self._strides is None

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of its elements."""
        return int(math.prod(self.shape) * self.dtype.itemsize)

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, rows: slice) -> DeviceArray:
        """A view of some rows of the leading axis: ``a[2:3]``; steps are not supported."""
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise InputError(f"a step of {step} was asked of an array on a GPU; take rows one after the other")
        strides = self.strides
        return DeviceArray(
            self.pointer + start * strides[0] * self.dtype.itemsize,
            (max(0, stop - start), *self.shape[1:]),
            self.dtype,
            device=self.device,
            strides=strides,
            owner=self,
            stream=self.stream,
        )

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3 of the interface: https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html"""
        itemsize = self.dtype.itemsize
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "strides": None if self.contiguous else tuple(stride * itemsize for stride in self.strides),
            # 0 is not allowed there: None says that no ordering is needed.
            "stream": self.stream or None,
            "version": 3,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        """(2, ordinal): memory of a CUDA device."""
        return 2, self.device

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
        """A DLPack capsule.

        Args:
            stream: Handle of the taker's stream, which waits for `self.stream`; None is the default stream, as the
                protocol says, and -1 orders nothing.
            options: The rest of the protocol's (max_version, dl_device, copy).
        """
        # The device it is on may be asked for by name; the view refuses every name.
        if options.get("dl_device") == self.__dlpack_device__():
            del options["dl_device"]
        from cuda.core.utils import StridedMemoryView

        # By the other protocol: asked for any, it would take this one and end up here again.
        view = StridedMemoryView.from_cuda_array_interface(self, stream_ptr=_LEGACY if stream is None else stream)
        return view.__dlpack__(stream=stream, **options)

    def __repr__(self) -> str:
        return f"DeviceArray({self.dtype}, {list(self.shape)}, cuda:{self.device})"


def _dense_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


def _same_layout(shape: tuple[int, ...], strides: tuple[int, ...], dense: tuple[int, ...]) -> bool:
    if 0 in shape:
        return True
    return all(extent == 1 or a == b for extent, a, b in zip(shape, strides, dense, strict=True))


def _viewed(source: Any, stream: int, name: str) -> DeviceArray:
    if not hasattr(source, "__dlpack__") and not hasattr(source, "__cuda_array_interface__"):
        raise InputError(
            f"{name} is of type {type(source).__name__}, which offers neither DLPack nor __cuda_array_interface__; "
            "give an array of NumPy's or one on the GPU"
        )
    interface = getattr(source, "__cuda_array_interface__", None)
    if isinstance(interface, dict) and interface.get("stream") == 0:
        # The interface forbids it: the legacy and the per-thread default stream could both be meant.
        raise InputError(f"{name} names stream 0, which is ambiguous; give 1 (default), 2 (per thread), or a stream")
    if not _on_a_gpu(source):
        raise InputError(f"{name} is on the CPU, expected a GPU's memory; move it there first")
    from cuda.core.utils import StridedMemoryView

    try:
        view = StridedMemoryView.from_any_interface(source, stream_ptr=stream)
    # The owner's code runs here, and cuda.core's; their exceptions share no base class but this one.
    except Exception as exc:
        raise InputError(f"{name} cannot be borrowed: {first_line(exc)}; give a plain array on the GPU") from exc
    return DeviceArray(
        int(view.ptr),
        tuple(view.shape),
        view.dtype,
        device=int(view.device_id) if view.is_device_accessible else -1,
        strides=None if view.strides is None else tuple(view.strides),
        owner=view,
    )


def _on_a_gpu(source: Any) -> bool:
    """Whether the owner says so; asked first, because an owner on the CPU may not even take a stream's handle."""
    if not hasattr(source, "__dlpack_device__"):
        return True
    kind, _ = source.__dlpack_device__()
    # kDLCUDA and kDLCUDAManaged of dlpack.h.
    return int(kind) in (2, 13)

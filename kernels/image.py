"""Images on their way in and out, on the GPU: uint8 [H, W, C] <-> float16 or float32 [C, H, W], one kernel each way.

In both directions ``value = byte * scale + offset``: `load` computes the value in float32 and rounds it to the image's
dtype; `store` computes ``(value - offset) * (1 / scale)`` in float32, clamps to [0, 255] and rounds half to even; NaN
is stored as 0. With the default scale and offset `store` takes back exactly what `load` gave. `reference.image` is the
same in NumPy, to the bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from .arguments import Planes, aligned, planes
from .array import DeviceArray
from .driver import Context
from .errors import InputError
from .loader import Kernel, KernelLibrary, Launch

__all__ = ["ImageKernels"]

CHANNELS = (1, 3, 4)
_FLOATS = {"float32": "f32", "float16": "f16"}
_GROUP = 4  # pixels a thread, as in image.cu
_BLOCK = (32, 8, 1)


class _Plan(ctypes.Structure):
    """Mirrors `ImagePlan` in image.cu."""

    _fields_ = (
        ("pixels", ctypes.c_void_p),
        ("image", ctypes.c_void_p),
        ("pixel_strides", ctypes.c_longlong * 3),
        ("image_strides", ctypes.c_longlong * 3),
        ("channels", ctypes.c_int),
        ("height", ctypes.c_int),
        ("width", ctypes.c_int),
        ("grouped", ctypes.c_int),
        ("plane", ctypes.c_int * 4),
        ("factor", ctypes.c_float * 4),
        ("offset", ctypes.c_float * 4),
    )


class ImageKernels:
    """Converts images on one GPU; any thread may, on any stream.

    Args:
        context: The GPU.

    Raises:
        BackendError: If the kernels cannot be compiled or loaded.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._library = KernelLibrary(context, "image.cu")
        self._kernels = {
            (way, dtype): self._library.function(f"image_{way}_{suffix}")
            for way in ("load", "store")
            for dtype, suffix in _FLOATS.items()
        }

    def prepare_load(
        self,
        pixels: DeviceArray,
        image: DeviceArray,
        *,
        scale: float | Sequence[float] = 1 / 127.5,
        offset: float | Sequence[float] = -1.0,
        swap_red_blue: bool = False,
    ) -> Launch:
        """Everything of a `load` but its stream, to be launched again and again; both arrays must stay where they are.

        Args:
            pixels: uint8 [H, W, C], C one of 1, 3, 4, any strides. A leading axis of 1 is allowed here and below.
            image: float32 or float16 [C, H, W], any strides; written.
            scale: One number, or one a channel of `image`. The defaults map 0..255 to [-1, 1].
            offset: One number, or one a channel of `image`.
            swap_red_blue: Whether the first and the third channel change places.

        Raises:
            InputError: If an array is on another device, or of another dtype or shape.
        """
        return self._prepare("load", pixels, image, scale, offset, swap_red_blue)

    def prepare_store(
        self,
        image: DeviceArray,
        pixels: DeviceArray,
        *,
        scale: float | Sequence[float] = 1 / 127.5,
        offset: float | Sequence[float] = -1.0,
        swap_red_blue: bool = False,
    ) -> Launch:
        """As `prepare_load`, the other way: `pixels` is written. `scale` and `offset` mean the same as there.

        Raises:
            InputError: As `prepare_load`, and if a scale is 0.
        """
        return self._prepare("store", pixels, image, scale, offset, swap_red_blue)

    def load(
        self,
        pixels: DeviceArray,
        image: DeviceArray,
        *,
        stream: int,
        scale: float | Sequence[float] = 1 / 127.5,
        offset: float | Sequence[float] = -1.0,
        swap_red_blue: bool = False,
    ) -> None:
        """Convert `pixels` into `image`, in order on the stream with handle `stream`; see `prepare_load`."""
        self._prepare("load", pixels, image, scale, offset, swap_red_blue).launch(stream)

    def store(
        self,
        image: DeviceArray,
        pixels: DeviceArray,
        *,
        stream: int,
        scale: float | Sequence[float] = 1 / 127.5,
        offset: float | Sequence[float] = -1.0,
        swap_red_blue: bool = False,
    ) -> None:
        """Convert `image` into `pixels`, in order on the stream with handle `stream`; see `prepare_store`."""
        self._prepare("store", pixels, image, scale, offset, swap_red_blue).launch(stream)

    @staticmethod
    def bytes_moved(pixels: DeviceArray, image: DeviceArray) -> int:
        """Bytes that one call reads and writes: every element of both arrays once."""
        return pixels.size_bytes + image.size_bytes

    def close(self) -> None:
        """Unload the kernels; safe to call twice. What was launched must have ended."""
        self._library.close()

    def _prepare(
        self,
        way: str,
        pixels: DeviceArray,
        image: DeviceArray,
        scale: float | Sequence[float],
        offset: float | Sequence[float],
        swap_red_blue: bool,
    ) -> Launch:
        bytes_ = planes(pixels, "pixels", self._context, ("uint8",), layout="[H, W, C]")
        floats = planes(image, "image", self._context, tuple(_FLOATS))
        height, width, channels = bytes_.shape
        if channels not in CHANNELS:
            raise InputError(f"pixels has shape {list(pixels.shape)}, expected [H, W, C] with 1, 3 or 4 channels")
        if floats.shape != (channels, height, width):
            raise InputError(
                f"image has shape {list(image.shape)}, expected {[channels, height, width]} as pixels "
                f"{list(pixels.shape)} have it"
            )
        if swap_red_blue and channels == 1:
            raise InputError("red and blue cannot change places in an image of one channel; leave swap_red_blue out")
        order = [2, 1, 0, 3][:channels] if swap_red_blue else list(range(channels))
        scales = _per_channel(scale, "scale", channels)
        offsets = _per_channel(offset, "offset", channels)
        if way == "store":
            if 0 in scales:
                raise InputError("a scale of 0 cannot be undone; give the scale that the image was made with")
            scales = [1 / value for value in scales]
        kernel: Kernel = self._kernels[way, floats.dtype.name]
        plan = _Plan(
            bytes_.pointer,
            floats.pointer,
            bytes_.strides,
            floats.strides,
            channels,
            height,
            width,
            int(_grouped(bytes_, floats)),
            tuple(order),
            tuple(scales[plane] for plane in order),
            tuple(offsets[plane] for plane in order),
        )
        across, down = _BLOCK[0] * _GROUP, _BLOCK[1]
        return kernel.prepare((-(-width // across), -(-height // down), 1), _BLOCK, (plan,))


def _grouped(pixels: Planes, image: Planes) -> bool:
    """Whether four pixels can be moved at once: dense in both arrays, and every row starts where words may."""
    _, width, channels = pixels.shape
    row, column, channel = pixels.strides
    dense = (channels == 1 or channel == 1) and (width == 1 or column == channels)
    word = 4 if channels == 3 else 4 * channels
    return (
        dense
        and (width == 1 or image.strides[2] == 1)
        and pixels.pointer % word == 0
        and (pixels.shape[0] == 1 or row % word == 0)
        and aligned(image, _GROUP, steps=(0, 1))
    )


def _per_channel(value: float | Sequence[float], name: str, channels: int) -> list[float]:
    given = np.asarray(value, np.float64)
    if given.shape not in ((), (channels,)):
        raise InputError(f"{name} has shape {list(given.shape)}, expected one number or {channels}, one a channel")
    if not np.isfinite(given).all():
        raise InputError(f"{name} is {given.tolist()}, expected finite numbers")
    return [float(item) for item in np.broadcast_to(given, channels)]

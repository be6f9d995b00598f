"""Backward warp of several feature maps at once on the GPU, by one sampling grid.

Convention: the grid [2, h, w] holds for every output pixel where it reads, as (x, y) in grid_sample coordinates: -1 and
1 are the outer edges of the map's first and last pixel (align_corners=False), so one grid serves maps of every size. It
is a position and not an offset, like the first two channels of a surface atlas. Sampling is bilinear, in float32; the
results are those of torch's `grid_sample`. A coordinate that is NaN gives NaN in every channel; an infinite one is
outside. `reference.warp` is the same in NumPy, to the bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Literal

from .arguments import Planes, planes
from .array import DeviceArray
from .driver import Context
from .errors import InputError
from .loader import KernelLibrary, Launch

__all__ = ["MOST_MAPS", "WarpKernel"]

MOST_MAPS = 8
"""How many maps a call takes, as in warp.cu."""

_FLOATS = ("float32", "float16")
_BLOCK = (32, 8, 1)
# How many channels a thread does at least: below, the grid and the weights cost more than the values.
_FEWEST_CHANNELS = 8
# Threads of a multiprocessor that keep its memory busy; a small frame is split by channels to have as many.
_BUSY_THREADS = 1024


class _Map(ctypes.Structure):
    """Mirrors `WarpMap` in warp.cu."""

    _fields_ = (
        ("source", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        ("source_strides", ctypes.c_longlong * 2),
        ("target_strides", ctypes.c_longlong * 2),
        ("channels", ctypes.c_int),
        ("height", ctypes.c_int),
        ("width", ctypes.c_int),
        ("half_precision", ctypes.c_int),
    )


class _Plan(ctypes.Structure):
    """Mirrors `WarpPlan` in warp.cu."""

    _fields_ = (
        ("maps", _Map * MOST_MAPS),
        ("grid", ctypes.c_void_p),
        ("grid_strides", ctypes.c_longlong * 2),
        ("count", ctypes.c_int),
        ("height", ctypes.c_int),
        ("width", ctypes.c_int),
        ("clamp", ctypes.c_int),
        ("channels", ctypes.c_int),
    )


class WarpKernel:
    """Warps feature maps on one GPU; any thread may, on any stream.

    Args:
        context: The GPU.

    Raises:
        BackendError: If the kernel cannot be compiled or loaded.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._library = KernelLibrary(context, "warp.cu")
        self._kernel = self._library.function("warp_maps")
        self._busy_threads = context.attribute("MULTIPROCESSOR_COUNT") * _BUSY_THREADS

    def prepare(
        self,
        sources: Sequence[DeviceArray],
        grid: DeviceArray,
        targets: Sequence[DeviceArray],
        *,
        padding: Literal["zeros", "border"] = "zeros",
    ) -> Launch:
        """Everything of a `warp` but its stream, to be launched again and again; all arrays must stay where they are.

        Args:
            sources: Up to `MOST_MAPS` maps [C_i, H_i, W_i], float32 or float16, of any sizes. Here and below a leading
                axis of 1 is allowed; pixels of a row are neighbours in memory, rows and channels may be anywhere.
            grid: float32 [2, h, w], see the module's text.
            targets: One per source, [C_i, h, w], of its dtype; written. They must not overlap what is read.
            padding: What is outside a map: 0, or its nearest pixel.

        Raises:
            InputError: If an array is on another device, or of another dtype, shape or layout, or overlaps a target.
        """
        if padding not in ("zeros", "border"):
            raise InputError(f"padding is {padding!r}, expected 'zeros' or 'border'")
        if not 1 <= len(sources) <= MOST_MAPS:
            raise InputError(
                f"{len(sources)} maps were given, expected 1 to {MOST_MAPS}; split them over several calls"
            )
        if len(targets) != len(sources):
            raise InputError(f"{len(targets)} targets were given for {len(sources)} maps; give one for each")
        points = planes(grid, "grid", self._context, ("float32",), layout="[2, h, w]", dense_rows=True)
        if points.shape[0] != 2:
            raise InputError(f"grid has shape {list(grid.shape)}, expected [2, h, w]: x, y")
        _, height, width = points.shape
        plan = _Plan(
            grid=points.pointer,
            grid_strides=points.strides[:2],
            count=len(sources),
            height=height,
            width=width,
            clamp=int(padding == "border"),
        )
        read, written, channels = [("grid", points)], [], 0
        for index, (source, target) in enumerate(zip(sources, targets, strict=True)):
            name = f"map {index}"
            here = planes(source, name, self._context, _FLOATS, dense_rows=True)
            there = planes(target, f"target {index}", self._context, (here.dtype.name,), dense_rows=True)
            if there.shape != (here.shape[0], height, width):
                raise InputError(
                    f"target {index} has shape {list(target.shape)}, expected {[here.shape[0], height, width]}: "
                    f"the channels of {name} at the size of the grid"
                )
            plan.maps[index] = _Map(
                here.pointer, there.pointer, here.strides[:2], there.strides[:2], *here.shape, here.dtype.itemsize == 2
            )
            channels += here.shape[0]
            read.append((name, here))
            written.append((f"target {index}", there))
        _refuse_overlap(read, written)
        plan.channels = self._channels_a_thread(channels, height * width)
        blocks = (-(-width // _BLOCK[0]), -(-height // _BLOCK[1]), -(-channels // plan.channels))
        return self._kernel.prepare(blocks, _BLOCK, (plan,))

    def warp(
        self,
        sources: Sequence[DeviceArray],
        grid: DeviceArray,
        targets: Sequence[DeviceArray],
        *,
        stream: int,
        padding: Literal["zeros", "border"] = "zeros",
    ) -> None:
        """Warp `sources` into `targets`, in order on the stream with handle `stream`; see `prepare`. Does not wait."""
        self.prepare(sources, grid, targets, padding=padding).launch(stream)

    @staticmethod
    def bytes_moved(sources: Sequence[DeviceArray], grid: DeviceArray, targets: Sequence[DeviceArray]) -> int:
        """Bytes that one call reads and writes at least: every array once, as with a cache that forgets nothing.

        It is what a grid that covers the maps needs; one that looks at a part of them reads less.
        """
        return grid.size_bytes + sum(array.size_bytes for array in (*sources, *targets))

    def close(self) -> None:
        """Unload the kernel; safe to call twice. What was launched must have ended."""
        self._library.close()

    def _channels_a_thread(self, channels: int, pixels: int) -> int:
        """All of them where there are pixels enough to keep the GPU busy, so that the grid is read once."""
        parts = max(1, min(-(-self._busy_threads // pixels), channels // _FEWEST_CHANNELS))
        return -(-channels // parts)


def _refuse_overlap(read: Sequence[tuple[str, Planes]], written: Sequence[tuple[str, Planes]]) -> None:
    spans = [(*_span(item), name, False) for name, item in read] + [
        (*_span(item), name, True) for name, item in written
    ]
    for index, (start, end, name, is_written) in enumerate(spans):
        for other_start, other_end, other_name, other_written in spans[:index]:
            if (is_written or other_written) and start < other_end and other_start < end:
                raise InputError(f"{name} and {other_name} lie in the same memory; write to memory of its own")


def _span(item: Planes) -> tuple[int, int]:
    """The addresses between which all elements are."""
    reach = [
        (extent - 1) * stride * item.dtype.itemsize for extent, stride in zip(item.shape, item.strides, strict=True)
    ]
    low = sum(step for step in reach if step < 0)
    return item.pointer + low, item.pointer + sum(reach) - low + item.dtype.itemsize

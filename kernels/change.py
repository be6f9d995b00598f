"""How much two images differ, on the GPU: statistics of blocks of pixels and of the whole, without a host wait.

Results stay on the device, where a later kernel or an asynchronous copy reads them. Sums are taken in one fixed order,
without atomics: the same inputs give the same bits on every run. `reference.change` is the same in NumPy (its sums are
float64).
"""

from __future__ import annotations

import ctypes

import numpy as np

from .arguments import aligned, check_array, planes
from .array import DeviceArray
from .driver import Context
from .errors import InputError
from .loader import KernelLibrary, LaunchSequence

__all__ = ["ChangeMetric"]

BLOCKS = (4, 8, 16, 32, 64, 128)
_DTYPES = {"float32": "f32", "float16": "f16", "uint8": "u8"}
_GROUP = 4  # pixels a thread, as in change.cu
_LANES = 32
_ROWS = 8
_SUMMARY_THREADS = 256


class _Pair(ctypes.Structure):
    """Mirrors `ChangePair` in change.cu."""

    _fields_ = (
        ("first", ctypes.c_void_p),
        ("second", ctypes.c_void_p),
        ("first_strides", ctypes.c_longlong * 2),
        ("second_strides", ctypes.c_longlong * 2),
        ("channels", ctypes.c_int),
        ("height", ctypes.c_int),
        ("width", ctypes.c_int),
        ("block_log2", ctypes.c_int),
        ("grouped", ctypes.c_int),
    )


class ChangeMetric:
    """Compares images on one GPU, block by block; any thread may, on any stream.

    Args:
        context: The GPU.
        block: Height and width of a block in pixels: 4, 8, 16, 32, 64 or 128. Blocks at the right and lower border
            are smaller where the image is no multiple of it.

    Raises:
        InputError: If `block` is another number.
        BackendError: If the kernels cannot be compiled or loaded.
    """

    def __init__(self, context: Context, *, block: int = 16) -> None:
        if block not in BLOCKS:
            raise InputError(f"a block of {block} pixels is not supported; take one of {', '.join(map(str, BLOCKS))}")
        self.block = block
        self._context = context
        self._library = KernelLibrary(context, "change.cu")
        self._kernels = {dtype: self._library.function(f"change_blocks_{suffix}") for dtype, suffix in _DTYPES.items()}
        self._summary = self._library.function("change_summary")

    def blocks_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape of the block statistics of an image: (2, blocks down, blocks across)."""
        return 2, -(-height // self.block), -(-width // self.block)

    def prepare(
        self,
        first: DeviceArray,
        second: DeviceArray,
        blocks: DeviceArray,
        summary: DeviceArray,
        *,
        threshold: float,
    ) -> LaunchSequence:
        """Everything of a `measure` but its stream, to be launched again and again; arrays must stay where they are.

        Args:
            first: float32, float16 or uint8 [C, H, W] (a leading axis of 1 is allowed); pixels of a row are neighbours
                in memory, rows and channels may be anywhere. Differences are taken in float32.
            second: Of the same shape and dtype.
            blocks: float32, contiguous, of `blocks_shape`; written: of every block the mean absolute difference over
                its pixels and channels, then (second half) the largest.
            summary: float32 [3], contiguous; written: the mean over the whole image, the maximum, and the share of
                blocks whose mean is above `threshold`. A NaN in an input makes its block's mean and maximum NaN, and
                the image's; its block counts as changed.
            threshold: In the unit of the values.

        Raises:
            InputError: If an array is on another device, or of another dtype, shape or layout.
        """
        a = planes(first, "first", self._context, tuple(_DTYPES), dense_rows=True)
        b = planes(second, "second", self._context, tuple(_DTYPES), dense_rows=True)
        if a.shape != b.shape or a.dtype != b.dtype:
            raise InputError(
                f"second is {second.dtype} {list(second.shape)}, expected {first.dtype} {list(first.shape)} as first"
            )
        channels, height, width = a.shape
        _check_result(blocks, "blocks", self._context, self.blocks_shape(height, width))
        _check_result(summary, "summary", self._context, (3,))
        if not np.isfinite(threshold):
            raise InputError(f"threshold is {threshold}, expected a finite number")
        log2 = self.block.bit_length() - 1
        pair = _Pair(
            a.pointer,
            b.pointer,
            a.strides[:2],
            b.strides[:2],
            channels,
            height,
            width,
            log2,
            int(aligned(a, _GROUP, steps=(0, 1)) and aligned(b, _GROUP, steps=(0, 1))),
        )
        grid = (-(-width // (_LANES * _GROUP)), -(-height // self.block), 1)
        each = self._kernels[a.dtype.name].prepare(grid, (_LANES, min(_ROWS, self.block), 1), (pair, blocks))
        whole = self._summary.prepare(
            (1, 1, 1),
            (_SUMMARY_THREADS, 1, 1),
            (blocks, summary, height, width, log2, float(threshold)),
        )
        return LaunchSequence(each, whole)

    def measure(
        self,
        first: DeviceArray,
        second: DeviceArray,
        blocks: DeviceArray,
        summary: DeviceArray,
        *,
        threshold: float,
        stream: int,
    ) -> None:
        """Compare two images, in order on the stream with handle `stream`; see `prepare`. Does not wait."""
        self.prepare(first, second, blocks, summary, threshold=threshold).launch(stream)

    def bytes_moved(self, image: DeviceArray) -> int:
        """Bytes that one call reads and writes: both images, and the block statistics twice (written, then read)."""
        height, width = image.shape[-2:]
        statistics = 4 * int(np.prod(self.blocks_shape(height, width)))
        return 2 * image.size_bytes + 2 * statistics + 3 * 4

    def close(self) -> None:
        """Unload the kernels; safe to call twice. What was launched must have ended."""
        self._library.close()


def _check_result(array: DeviceArray, name: str, context: Context, shape: tuple[int, ...]) -> None:
    check_array(array, name, context, ("float32",))
    if array.shape != shape or not array.contiguous:
        raise InputError(f"{name} has shape {list(array.shape)}, expected {list(shape)}, contiguous")

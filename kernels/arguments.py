"""What launchers check of the arrays they are given, before anything is launched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .array import DeviceArray
from .driver import Context
from .errors import InputError

__all__ = ["Planes", "aligned", "check_array", "planes"]

# Grids have at most 65535 blocks in y, and kernels count rows and columns in 32 bits.
_LARGEST_EXTENT = 1 << 16


@dataclass(frozen=True)
class Planes:
    """An image or feature map as kernels address it.

    Attributes:
        pointer: Address of the first element.
        dtype: Of the elements.
        shape: Channels, height, width.
        strides: Of channel, row and column, in elements.
    """

    pointer: int
    dtype: np.dtype
    shape: tuple[int, int, int]
    strides: tuple[int, int, int]


def check_array(array: DeviceArray, name: str, context: Context, dtypes: Sequence[str]) -> None:
    """Refuse an array that is elsewhere, of another dtype, or not aligned to its elements.

    Raises:
        InputError: Says which.
    """
    if not isinstance(array, DeviceArray):
        raise InputError(f"{name} is of type {type(array).__name__}; borrow it first, with DeviceArray.borrow")
    if array.device != context.ordinal:
        raise InputError(f"{name} is on cuda:{array.device}, expected {context}; move it there first")
    if array.dtype.name not in dtypes:
        raise InputError(f"{name} is {array.dtype}, expected {' or '.join(dtypes)}; convert it first")
    if array.pointer % array.dtype.itemsize:
        raise InputError(
            f"{name} starts at address {array.pointer:#x}, which is not a multiple of its elements' "
            f"{array.dtype.itemsize} bytes; copy it"
        )


def planes(
    array: DeviceArray,
    name: str,
    context: Context,
    dtypes: Sequence[str],
    *,
    layout: str = "[C, H, W]",
    dense_rows: bool = False,
) -> Planes:
    """The array as three axes; a leading batch axis of 1 is left out.

    Args:
        array: The array.
        name: What messages call it.
        context: The GPU it must be on.
        dtypes: Names of those it may have.
        layout: The axes, for messages; their order is the caller's business.
        dense_rows: Whether neighbours in a row must be neighbours in memory.

    Raises:
        InputError: If it does not fit, or is empty.
    """
    check_array(array, name, context, dtypes)
    shape, strides = array.shape, array.strides
    if len(shape) == 4 and shape[0] == 1:
        shape, strides = shape[1:], strides[1:]
    if len(shape) != 3:
        raise InputError(f"{name} has shape {list(array.shape)}, expected {layout}; give one image at a time")
    if 0 in shape:
        raise InputError(f"{name} has shape {list(array.shape)}, which holds nothing; give at least one pixel")
    if max(shape) > _LARGEST_EXTENT:
        raise InputError(f"{name} has shape {list(array.shape)}; extents above {_LARGEST_EXTENT} are not supported")
    if dense_rows and shape[2] > 1 and strides[2] != 1:
        raise InputError(
            f"{name} has a stride of {strides[2]} elements along its rows, expected 1; make it contiguous first"
        )
    return Planes(array.pointer, array.dtype, (shape[0], shape[1], shape[2]), (strides[0], strides[1], strides[2]))


def aligned(item: Planes, group: int, *, steps: Sequence[int]) -> bool:
    """Whether groups of `group` elements can be read at once wherever a row starts.

    Args:
        item: The array.
        group: Elements of a group.
        steps: The axes of `strides` whose steps lead to the start of a row.
    """
    size = group * item.dtype.itemsize
    return item.pointer % size == 0 and all(
        item.shape[axis] == 1 or item.strides[axis] * item.dtype.itemsize % size == 0 for axis in steps
    )

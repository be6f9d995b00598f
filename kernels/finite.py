"""Whether arrays on the GPU hold NaN or infinity, found there: one number goes to the host, and not the image.

`reference.finite` is the same in NumPy.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable

from .arguments import check_array
from .array import DeviceArray
from .driver import Context, check, load
from .errors import InputError
from .loader import KernelLibrary, Launch

__all__ = ["FiniteKernel"]

_DTYPES = {"float16": "f16", "float32": "f32", "float64": "f64"}
_GROUP_BYTES = 16  # read at once, as in finite.cu
_THREADS = 256
# More blocks than that add nothing: threads go through what is left in steps of the whole grid.
_MOST_BLOCKS = 1024


class FiniteKernel:
    """Looks for NaN and infinity on one GPU; any thread may, on any stream.

    Args:
        context: The GPU.

    Raises:
        BackendError: If the kernels cannot be compiled or loaded.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._library = KernelLibrary(context, "finite.cu")
        self._kernels = {dtype: self._library.function(f"finite_{suffix}") for dtype, suffix in _DTYPES.items()}

    def prepare(self, array: DeviceArray, found: DeviceArray) -> Launch | None:
        """The look through one array, to be launched again and again; both must stay where they are.

        Args:
            array: Of any shape, C-contiguous.
            found: int32 [1]; written: 1 where the array holds NaN or infinity, otherwise left as it is. So several
                arrays may share one, which somebody sets to 0 before.

        Returns:
            None where there is nothing to look for: the array holds whole numbers, or nothing.

        Raises:
            InputError: If an array is on another device, not contiguous, or of another dtype.
        """
        check_array(found, "found", self._context, ("int32",))
        if found.shape != (1,):
            raise InputError(f"found has shape {list(found.shape)}, expected [1]")
        if array.dtype.kind in "biu":
            return None
        check_array(array, "array", self._context, tuple(_DTYPES))
        if not array.contiguous:
            raise InputError(f"array has strides {list(array.strides)}, expected those of C order; copy it first")
        count = math.prod(array.shape)
        if count == 0:
            return None
        grouped = array.pointer % _GROUP_BYTES == 0
        items = -(-count * array.dtype.itemsize // _GROUP_BYTES) if grouped else count
        return self._kernels[array.dtype.name].prepare(
            (min(_MOST_BLOCKS, -(-items // _THREADS)), 1, 1),
            (_THREADS, 1, 1),
            (array, (count, ctypes.c_longlong), grouped, found),
        )

    def look(self, arrays: Iterable[DeviceArray], found: DeviceArray, *, stream: int) -> None:
        """Look through arrays, in order on the stream with handle `stream`; does not wait.

        Args:
            arrays: See `prepare`.
            found: int32 [1]; written: 1 where one of them holds NaN or infinity, else 0.
            stream: Where the work is ordered.

        Raises:
            InputError: If an array does not fit; then nothing was launched.
        """
        launches = [launch for array in arrays if (launch := self.prepare(array, found)) is not None]
        self._context.make_current()
        check(load().cuMemsetD8Async(found.pointer, 0, found.size_bytes, stream), "setting a flag to 0")
        for launch in launches:
            launch.launch(stream)

    def close(self) -> None:
        """Unload the kernels; safe to call twice. What was launched must have ended."""
        self._library.close()

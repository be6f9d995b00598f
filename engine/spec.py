"""What a tensor is: name, dtype and shape, and the check of an array against it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError

__all__ = ["AGE_INPUT", "AGE_SPEC", "Array", "TensorSpec"]

Array = NDArray[Any]


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor of fixed dtype and shape.

    Attributes:
        name: Name, unique within a module.
        dtype: NumPy dtype name, e.g. ``"float32"``.
        shape: Dimensions; for a generator's input or output the leading one is the batch axis and is 1.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of one contiguous array of this spec."""
        size = np.dtype(self.dtype).itemsize
        for extent in self.shape:
            size *= extent
        return size

    def check_form(self, array: Any) -> None:
        """Check dtype and shape of anything that has them.

        Raises:
            InputError: If one differs.
        """
        if array.dtype != np.dtype(self.dtype):
            raise InputError(f"input {self.name!r} has dtype {array.dtype}, expected {self.dtype}; convert it first")
        if tuple(array.shape) != self.shape:
            raise InputError(f"input {self.name!r} has shape {tuple(array.shape)}, expected {self.shape}")

    def check(self, array: Array, *, finite: bool = True) -> None:
        """Check that `array` fits this spec.

        Args:
            array: The array to check.
            finite: Refuse NaN and Inf in floating-point arrays.

        Raises:
            InputError: If dtype or shape differ, or a value is not finite where `finite` asks for it.
        """
        self.check_form(array)
        # The sum is one pass without a temporary; only when it is not finite is it worth looking closer.
        if finite and array.dtype.kind == "f" and not np.isfinite(array.sum()) and not np.isfinite(array).all():
            raise InputError(f"input {self.name!r} holds NaN or Inf; replace those values before rendering")


AGE_INPUT = "age"
"""The input by which a predictor is told how old the cache is."""

AGE_SPEC = TensorSpec(AGE_INPUT, "float32", (1, 1))
"""Age in frames, as a number: what `AGE_INPUT` must be."""

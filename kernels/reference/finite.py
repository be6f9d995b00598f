"""The look for NaN and infinity in NumPy: what `finite.cu` finds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["all_finite"]


def all_finite(arrays: Iterable[NDArray[Any]]) -> bool:
    """Whether no number of these arrays is NaN or infinite; whole numbers never are."""
    return all(bool(np.isfinite(array).all()) for array in arrays)

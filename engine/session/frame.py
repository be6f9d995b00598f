"""The answer to one frame's inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..bundle.roles import Route
from ..routing.router import Degraded

__all__ = ["Frame"]


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """The answer to one frame's inputs.

    Attributes:
        index: Position in the session's sequence, from 0; a gap means that frames were dropped or refused.
        outputs: The generator's outputs by name, leading axis 1; arrays that belong to the caller. NumPy's, on a GPU in
            pinned memory; with ``CudaOptions(outputs="device")`` a `DeviceArray` each, complete, to be taken by DLPack.
        age: Age of the cache it was answered from, in frames; 0 where that is the frame's own, or none was read.
        route: The exit that answered: ``whole``, ``plain``, ``warp``, ``branch1``, ...
        latency_ms: From the arrival of the frame's inputs to the answer. They arrive when `Session.submit` is called;
            in `Session.render` when they are due by the frame rate, or else when the frame before is answered and they
            have been checked.
        refreshed: Whether the frame waited for a new cache or for the whole generator.
        predicted: With a quality, what the predictor expects of this answer, in the metric's unit; None where it is
            exactly the generator's output.
        degraded: With a deadline, what was given up for it: ``cheaper exit``, where every exit that keeps the quality
            takes too long, or ``older cache``, where a cache older than allowed served; None: nothing.
    """

    index: int
    outputs: dict[str, Any]
    age: int
    route: Route
    latency_ms: float
    refreshed: bool
    predicted: float | None = None
    degraded: Degraded | None = None

"""What an engine hands to a session: everything that the session needs of it, and nothing else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..device.placement import Workspace
from ..promise.calibration import Quality, Rule
from ..routing.plan import RoutingPlan
from ..schedule.scheduler import Scheduler
from ..spec import TensorSpec

__all__ = ["SessionParts"]


@dataclass(frozen=True)
class SessionParts:
    """One session's share of an engine.

    Attributes:
        scheduler: Decides; the session's own.
        workspace: Memory and lanes on the device; the session's own.
        specs: What one frame is fed with, by name.
        required: The inputs that a frame has to bring.
        plan: What the engine's quality comes to; None where nothing is promised.
        turn: Held while the consumer's stream is used; the engine's, because sessions take turns.
        validate: Whether NaN and Inf in inputs are refused.
        rule_for: The rule of a single frame's quality; raises InputError where it cannot be promised.
        frame_deadline: A single frame's deadline, checked; raises InputError.
    """

    scheduler: Scheduler
    workspace: Workspace
    specs: Mapping[str, TensorSpec]
    required: frozenset[str]
    plan: RoutingPlan | None
    turn: threading.Lock
    validate: bool
    rule_for: Callable[[Quality], Rule]
    frame_deadline: Callable[[float], float]

"""What a user may choose of a compile."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine.errors import InputError
from .adapter import AdapterConfig
from .cut import AUTO

__all__ = ["DEFAULT_STEPS", "CompileOptions"]

DEFAULT_STEPS = 3000


@dataclass(frozen=True)
class CompileOptions:
    """What a user may choose.

    Attributes:
        cut: "auto", or names of values or modules joined by commas.
        budget: The consumer's cost as a fraction of the generator's.
        steps: Training steps; 0 trains nothing.
        max_age: Ages 1..max_age are trained and calibrated.
        seed: Of the training.
        lpips: Weights file of LPIPS: used as a training loss and in the calibration.
        resume: Go on from the checkpoint of an interrupted compile of the same bundle.
        adapter: The adapter's size, instead of the largest that the budget allows.
        train: What else the training takes, see `DistillOptions`.

    Raises:
        InputError: If a number is out of its range.
    """

    cut: str = AUTO
    budget: float = 0.1
    steps: int = DEFAULT_STEPS
    max_age: int = 4
    seed: int = 0
    lpips: Path | None = None
    resume: bool = False
    adapter: AdapterConfig | None = None
    train: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value, ok, range_ in (
            ("budget", self.budget, 0 < self.budget <= 1, "above 0 and at most 1"),
            ("steps", self.steps, self.steps >= 0, "0 or more"),
            ("max_age", self.max_age, self.max_age >= 1, "1 or more"),
        ):
            if not ok:
                raise InputError(f"{name} is {value}; it must be {range_}")

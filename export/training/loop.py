"""The training loop: a subclass brings the loss of a step; optimiser, schedule, clipping and resuming are here."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...engine.errors import ExportError
from .checkpoint import load_checkpoint, save_checkpoint

__all__ = ["LoopOptions", "TrainingLoop", "one_cycle", "one_cycle_with_momentum"]


@dataclass(frozen=True)
class LoopOptions:
    """How to train: what every training is asked.

    Attributes:
        steps: Optimiser steps.
        batch: Frames a step.
        peak_rate: Learning rate at the top of its one cycle.
        seed: Of the frames drawn.
        detail_weight: Of the L1 between horizontal and vertical differences, which keeps edges sharp, beside 1 for the
            L1.
        perceptual_weight: Of the perceptual distance, where there is one.
        checkpoint_every: Steps between checkpoints.
    """

    steps: int
    batch: int = 4
    peak_rate: float = 1e-3
    seed: int = 0
    detail_weight: float = 0.5
    perceptual_weight: float = 0.3
    checkpoint_every: int = 200


class TrainingLoop(ABC):
    """One training run, resumable from its checkpoint file.

    Args:
        modules: All that is trained, in place.
        options: How to train.
        clipped: Modules whose gradients are clipped, each to a norm of 1; without them all modules together.
        identity: What the checkpoint must belong to; another identity is refused.
        plan: What was decided before training and must be decided alike by a resumed run, JSON-ready;
            `checkpoint_plan` gives it back.

    Attributes:
        step: Steps done.
    """

    options: LoopOptions

    def __init__(
        self,
        modules: nn.Module,
        options: LoopOptions,
        *,
        clipped: Sequence[nn.Module] = (),
        identity: str = "",
        plan: Mapping[str, Any] | None = None,
    ) -> None:
        self.modules, self.options, self.step = modules, options, 0
        self._clipped, self._identity, self._plan = tuple(clipped) or (modules,), identity, plan or {}
        trained = [parameter for parameter in modules.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.Adam(trained, lr=options.peak_rate, betas=(0.9, 0.99))

    @abstractmethod
    def losses(self, random: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the step that is next, scalar, and what is told of it; runs in bfloat16 where torch can.

        Args:
            random: Seeded by the step, so that a resumed run draws the same frames as one that was never stopped.
        """

    def schedule(self) -> tuple[float, float]:
        """Learning rate and momentum of the step that is next: functions of the step alone, so they need no state."""
        return one_cycle(self.step, self.options.steps, self.options.peak_rate), 0.9

    def after_step(self) -> None:  # noqa: B027 - a subclass need not do anything here
        """Called when `step` has gone up, before anyone is told."""

    def run(
        self, *, checkpoint: Path | None = None, on_step: Callable[[int, dict[str, float]], None] | None = None
    ) -> None:
        """Train until all steps are done.

        Args:
            checkpoint: File to resume from, if it is there, and to save to; removed by the caller when it is done.
            on_step: Told the number of steps done and the losses.

        Raises:
            ExportError: If a loss is not finite, or the checkpoint cannot be written, is damaged or belongs to another
                run.
        """
        if checkpoint is not None:
            self.keep(checkpoint)  # so that an early interrupt, too, leaves the plan
        self.modules.train()
        while self.step < self.options.steps:
            told = self._train_step()
            self.step += 1
            self.after_step()
            if on_step is not None:
                on_step(self.step, told)
            # After the last step too: what comes after may be interrupted as well.
            last = self.step == self.options.steps
            if checkpoint is not None and (last or self.step % self.options.checkpoint_every == 0):
                self.save(checkpoint)
        self.modules.eval()

    def keep(self, path: Path) -> None:
        """Resume from the checkpoint where there is one; else make it. Raises as `load` and `save`."""
        (self.load if path.exists() else self.save)(path)

    def save(self, path: Path) -> None:
        """Write a checkpoint beside `path`, then rename it there; missing parent folders are made.

        Raises:
            ExportError: If it cannot be written, e.g. on a full disk; what stood at `path` still stands.
        """
        save_checkpoint(path, self.modules, self._optimizer, step=self.step, identity=self._identity, plan=self._plan)

    def load(self, path: Path) -> None:
        """Resume from a checkpoint.

        Raises:
            ExportError: If it is damaged or was made with another model, data or options.
        """
        self.step = load_checkpoint(path, self.modules, self._optimizer, identity=self._identity)

    def _train_step(self) -> dict[str, float]:
        # bfloat16 is 3 to 4 times faster than float32 on CPUs that have it.
        with torch.autocast("cpu", torch.bfloat16):
            total, told = self.losses(np.random.default_rng([self.options.seed, self.step]))
        if not math.isfinite(float(total.detach())):
            raise ExportError(
                f"the loss of training step {self.step + 1} is {float(total.detach())}, so the training went astray; "
                "choose a lower peak_rate or another seed"
            )
        rate, momentum = self.schedule()
        for group in self._optimizer.param_groups:
            group["lr"], group["betas"] = rate, (momentum, 0.99)
        self._optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        for module in self._clipped:
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        self._optimizer.step()
        return {name: float(value.detach()) for name, value in told.items()}


def one_cycle(step: int, steps: int, peak: float) -> float:
    """Learning rate of a step: up over the first tenth, then down along a cosine to nearly nothing."""
    rise = max(steps // 10, 1)
    if step < rise:
        return peak * (step + 1) / rise
    done = (step - rise) / max(steps - rise, 1)
    return peak * (0.5 + 0.5 * math.cos(math.pi * done)) + 1e-4 * peak


def one_cycle_with_momentum(step: int, steps: int, peak: float) -> tuple[float, float]:
    """Learning rate and momentum of a step, as PyTorch's `OneCycleLR` has them with a rise over the first tenth.

    The momentum goes from 0.95 down to 0.85 and up again while the rate goes up and down.
    """
    # At least 20 steps: the length of the rise less one step is divided by, and is 0 for a cycle of 10.
    steps = max(steps, 20)
    top, low = 0.1 * steps - 1, peak / 25
    if step <= top:
        done, rates, momenta = step / top, (low, peak), (0.95, 0.85)
    else:
        done, rates, momenta = (step - top) / (steps - 1 - top), (peak, low / 1e4), (0.85, 0.95)
    left = math.cos(math.pi * done) + 1

    def between(ends: tuple[float, float]) -> float:
        return ends[1] + (ends[0] - ends[1]) / 2.0 * left

    return between(rates), between(momenta)

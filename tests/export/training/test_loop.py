"""The training loop: its schedules, and a loss that is no number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from warpcache.engine.errors import ExportError
from warpcache.export.training.loop import LoopOptions, TrainingLoop, one_cycle_with_momentum


class Shrinking(TrainingLoop):
    """A weight that is pulled to 0; from a step on the loss is something else."""

    def __init__(self, options: LoopOptions, *, broken_from: int, loss: float) -> None:
        self.weight = nn.Linear(1, 1, bias=False)
        self.broken_from, self.loss = broken_from, loss
        super().__init__(self.weight, options)

    def losses(self, random: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        total = self.weight.weight.square().sum()
        if self.step >= self.broken_from:
            total = total * self.loss
        return total, {"size": total}


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_the_first_loss_that_is_no_number_stops_the_training(tmp_path: Path, loss: float) -> None:
    checkpoint, told = tmp_path / "c.safetensors", []
    run = Shrinking(LoopOptions(steps=9, checkpoint_every=1), broken_from=3, loss=loss)
    with pytest.raises(ExportError, match=rf"^the loss of training step 4 is {loss}, .*; choose a lower peak_rate"):
        run.run(checkpoint=checkpoint, on_step=lambda step, _: told.append(step))
    assert told == [1, 2, 3]
    # What was learnt before is unharmed, and kept.
    assert torch.isfinite(run.weight.weight).all()
    before = run.weight.weight.detach().clone()
    again = Shrinking(LoopOptions(steps=9, checkpoint_every=1), broken_from=9, loss=loss)
    again.load(checkpoint)
    assert again.step == 3
    assert torch.equal(again.weight.weight, before)


@pytest.mark.parametrize("steps", [1, 10, 20, 57, 300])
def test_rate_and_momentum_are_those_of_pytorch(steps: int) -> None:
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=2e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(steps, 20), pct_start=0.1)
    for step in range(steps):
        group = optimizer.param_groups[0]
        # Bit for bit: a bundle of the same seed is to stay the same.
        assert one_cycle_with_momentum(step, steps, 2e-3) == (group["lr"], group["betas"][0])
        optimizer.step()
        schedule.step()

"""Train a reference generator on a clip."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["train_renderer"]


def train_renderer(
    model: nn.Module,
    clip: Mapping[str, NDArray[Any]],
    *,
    steps: int,
    batch: int = 4,
    peak_rate: float = 3e-3,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> nn.Module:
    """Fit a generator of one input `condition` to the clip's ground truth: L1, Adam, one-cycle rate.

    Args:
        model: Takes float32 [N, C, H, W], returns an image in [-1, 1]. Trained in place.
        clip: `condition` float32 [T, C, H, W] and `truth` float32 or uint8 [T, 3, H, W].
        steps: Optimiser steps.
        batch: Frames a step, drawn at random.
        peak_rate: Learning rate at the top of the cycle.
        seed: Of the order of frames; the model's own initial weights are the caller's.
        on_step: Told each step and its loss.

    Returns:
        The model, in evaluation mode.
    """
    generator = np.random.default_rng(seed)
    condition = torch.from_numpy(np.ascontiguousarray(clip["condition"]))
    truth = clip["truth"]
    model = model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(model.parameters(), lr=peak_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=peak_rate, total_steps=steps, pct_start=0.15)
    for step in range(steps):
        chosen = generator.integers(0, len(condition), batch)
        x = condition[chosen].contiguous(memory_format=torch.channels_last)
        y = _image(truth[chosen])
        # bfloat16 is 3 to 4 times faster than float32 on CPUs that have it; weights and optimiser stay float32.
        with torch.autocast("cpu", torch.bfloat16):
            image = model(x)
        loss = functional.l1_loss(image.float(), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step, float(loss.detach()))
    return model.eval()


def _image(frames: NDArray[Any]) -> Tensor:
    """float32 [N, 3, H, W] in [-1, 1] from float32 of that range or uint8."""
    tensor = torch.from_numpy(np.ascontiguousarray(frames))
    return tensor.float() / 127.5 - 1.0 if tensor.dtype == torch.uint8 else tensor

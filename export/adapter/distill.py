"""Train a warp adapter from the generator itself, on the user's own frames.

A step draws frames t and ages a in 1..A, encodes frame s = t - a, answers frame t, and compares with what the generator
rendered for t (self-distillation: no labels), and with ground truth where it is given. The generator is not run: its
images and cut tensors were recorded once.

Consumers of several sizes are trained together on one cache encoder, which runs once a step: a cache serves them all.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional

from ...engine.errors import ExportError
from ..training.checkpoint import load_checkpoint, save_checkpoint
from ..training.losses import detail_loss, same_crops
from .network import CacheEncoder, WarpConsumer, image_planes
from .recording import Recording

__all__ = ["DistillOptions", "Distillation", "read_plan"]

# Trained beyond the promised ages by this factor: a clip to come may move more than the one it was trained on.
AGE_MARGIN = 1.5


@dataclass(frozen=True)
class DistillOptions:
    """How to train.

    Attributes:
        steps: Optimiser steps.
        batch: Frames a step.
        max_age: Ages 1..max_age are promised; young ones are drawn more often, and a few beyond (`AGE_MARGIN`).
        peak_rate: Learning rate at the top of its one cycle; at 2e-3 some runs diverged.
        seed: Of initial weights and of the frames drawn.
        truth_weight: Of the error against ground truth, beside 1 for the L1 to the generator.
        perceptual_weight: Of the perceptual loss to the generator, where there is one.
        detail_weight: Of the L1 between horizontal and vertical differences, which keeps edges sharp.
        checkpoint_every: Steps between checkpoints.
    """

    steps: int
    batch: int = 8
    max_age: int = 4
    peak_rate: float = 1e-3
    seed: int = 0
    truth_weight: float = 0.35
    perceptual_weight: float = 0.3
    detail_weight: float = 0.5
    checkpoint_every: int = 200


class Distillation:
    """One training run, resumable from its checkpoint file.

    Args:
        encoder: Cache encoder, trained in place.
        consumers: Warp consumers that read what it makes, trained in place; the loss is the sum of theirs.
        recording: The generator's frames.
        options: How to train.
        perceptual: A perceptual distance between two batches of images, scalar, or None.
        identity: What the checkpoint must belong to (model, data): another identity is refused.
        plan: What was decided before training and must be decided alike by a resumed run, JSON-ready; `read_plan`
            gives it back.
    """

    def __init__(
        self,
        encoder: CacheEncoder,
        consumers: Sequence[WarpConsumer],
        recording: Recording,
        options: DistillOptions,
        *,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
        identity: str = "",
        plan: dict[str, Any] | None = None,
    ) -> None:
        frames = len(recording.images)
        if frames < 2:
            raise ExportError(f"training needs at least 2 frames, the inputs hold {frames}; give a longer clip")
        self.encoder, self.consumers = encoder, tuple(consumers)
        self.recording, self.options, self.perceptual = recording, options, perceptual
        self.max_age = min(round(options.max_age * AGE_MARGIN), frames - 1)
        self._identity = json.dumps({"of": identity, "options": asdict(options)}, sort_keys=True)
        self._plan = dict(plan or {})
        names = ["consumer", *(f"consumer{k}" for k in range(2, len(self.consumers) + 1))]
        self._modules = nn.ModuleDict({"encoder": encoder, **dict(zip(names, self.consumers, strict=True))})
        self._modules.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._optimizer = torch.optim.Adam(self._modules.parameters(), lr=options.peak_rate, betas=(0.9, 0.99))
        # At least 20 steps: OneCycleLR divides by the length of its rise less one step, which is 0 for a cycle of 10.
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer, max_lr=options.peak_rate, total_steps=max(options.steps, 20), pct_start=0.1
        )
        self.step = 0

    def run(
        self, *, checkpoint: Path | None = None, on_step: Callable[[int, dict[str, float]], None] | None = None
    ) -> None:
        """Train until `options.steps` steps are done.

        Args:
            checkpoint: File to resume from, if it is there, and to save to; removed by the caller when it is done.
            on_step: Told the number of steps done and the losses, summed over the consumers.
        """
        if checkpoint is not None and checkpoint.exists():
            self.load(checkpoint)
        elif checkpoint is not None:
            self.save(checkpoint)  # so that an early interrupt, too, leaves the plan
        self._modules.train()
        losses: dict[str, float] | None = None
        while self.step < self.options.steps:
            losses = self._train_step()
            self.step += 1
            if on_step is not None:
                on_step(self.step, losses)
            if checkpoint is not None and self.step % self.options.checkpoint_every == 0:
                self.save(checkpoint)
        if checkpoint is not None and losses is not None and self.step % self.options.checkpoint_every:
            self.save(checkpoint)  # what comes after may be interrupted too
        self._modules.eval()

    def answers(self, t: Tensor, s: Tensor) -> list[Tensor]:
        """Every consumer's answer to frames `t` from the caches of frames `s` (both int64 [N]): [N, C, H, W] each."""
        recording = self.recording
        then = {name: recording.at(name, s) for name in recording.inputs}
        now = {name: recording.at(name, t) for name in recording.inputs}
        image = recording.images[s]
        features = self.encoder([tap[s].float() for tap in recording.taps], then, image)
        atlas = None if recording.atlas is None else recording.atlas[s]
        planes = image_planes(image)
        return [consumer(features, planes, atlas, now) for consumer in self.consumers]

    def save(self, path: Path) -> None:
        """Write a checkpoint beside `path`, then rename it there; missing parent folders are made.

        Raises:
            ExportError: If it cannot be written, e.g. on a full disk; what stood at `path` still stands.
        """
        save_checkpoint(path, self._modules, self._optimizer, step=self.step, identity=self._identity, plan=self._plan)

    def load(self, path: Path) -> None:
        """Resume from a checkpoint.

        Raises:
            ExportError: If it is damaged or was made with another model, data or options.
        """
        self.step = load_checkpoint(path, self._modules, self._optimizer, identity=self._identity)
        # The schedule is a function of the step alone.
        self._schedule.last_epoch = self.step - 1
        with warnings.catch_warnings():
            # It takes a first step before the optimiser's for a mistake; here the optimiser's was in another process.
            warnings.simplefilter("ignore", UserWarning)
            self._schedule.step()

    def _train_step(self) -> dict[str, float]:
        options, recording = self.options, self.recording
        # Seeded by the step, so that a resumed run draws the same frames as one that was never stopped.
        random = np.random.default_rng([options.seed, self.step])
        ages = 1 + np.floor(self.max_age * random.random(options.batch) ** 1.8).astype(np.int64)
        later = ages + random.integers(0, len(recording.images) - ages)
        # A third of the pairs run backwards: just as natural a motion, and one that was not seen before.
        backwards = random.random(options.batch) < 1 / 3
        t = torch.from_numpy(np.where(backwards, later - ages, later))
        s = torch.from_numpy(np.where(backwards, later, later - ages))
        losses: dict[str, Tensor] = {}
        # bfloat16 is 3 to 4 times faster than float32 on CPUs that have it; flow stays float32 in the consumer.
        with torch.autocast("cpu", torch.bfloat16):
            totals = []
            for answer in self.answers(t, s):
                total, parts = self._loss(answer.float(), t, random)
                totals.append(total)
                losses = {name: losses[name] + value if name in losses else value for name, value in parts.items()}
            total = functools.reduce(torch.add, totals)
        self._optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._modules.parameters(), 1.0)
        self._optimizer.step()
        self._schedule.step()
        return {name: float(value.detach()) for name, value in losses.items()}

    def _loss(self, answer: Tensor, t: Tensor, random: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """One consumer's loss for its answer to frames `t`, and what it is made of."""
        options, recording = self.options, self.recording
        target = recording.images[t]
        losses = {"generator": functional.l1_loss(answer, target)}
        total = losses["generator"]
        if options.detail_weight:
            losses["detail"] = detail_loss(answer, target)
            total = total + options.detail_weight * losses["detail"]
        if recording.truth is not None and options.truth_weight:
            truth = recording.truth[t]
            # The square minds large errors, at edges out of place, and lets the generator rule the small ones.
            losses["truth"] = functional.l1_loss(answer, truth) + 5.0 * functional.mse_loss(answer, truth)
            total = total + options.truth_weight * losses["truth"]
        if self.perceptual is not None and options.perceptual_weight:
            losses["perceptual"] = self.perceptual(*same_crops([answer, target], random))
            total = total + options.perceptual_weight * losses["perceptual"]
        return total, losses


def read_plan(path: Path) -> dict[str, Any]:
    """The plan of the run that left a checkpoint.

    Raises:
        ExportError: If there is no checkpoint at `path`, or it is damaged.
    """
    if not path.exists():
        raise ExportError(f"there is no checkpoint {str(path)!r} to resume from; leave --resume out")
    try:
        with safe_open(path, "pt") as file:
            plan: dict[str, Any] = json.loads((file.metadata() or {})["plan"])
    except (OSError, SafetensorError, KeyError, ValueError) as exc:
        raise ExportError(f"the checkpoint {path} cannot be read ({exc}); delete it to start anew") from exc
    return plan

"""Train a warp adapter from the generator itself, on the user's own frames.

A step draws frames t and ages a in 1..A, encodes frame s = t - a, answers frame t, and compares with what the generator
rendered for t (self-distillation: no labels), and with ground truth where it is given. The generator is not run: its
images and cut tensors were recorded once.

Consumers of several sizes are trained together on one cache encoder, which runs once a step: a cache serves them all.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ...engine.errors import ExportError
from ..training.checkpoint import checkpoint_plan
from ..training.loop import LoopOptions, TrainingLoop, one_cycle_with_momentum
from ..training.losses import detail_loss, same_crops
from .network import CacheEncoder, WarpConsumer, image_planes
from .recording import Recording

__all__ = ["DistillOptions", "Distillation", "read_plan"]

# Trained beyond the promised ages by this factor: a clip to come may move more than the one it was trained on.
AGE_MARGIN = 1.5


@dataclass(frozen=True)
class DistillOptions(LoopOptions):
    """How to train; see `LoopOptions` for the others. At a `peak_rate` of 2e-3 some runs diverged.

    Attributes:
        seed: Of initial weights and of the frames drawn.
        max_age: Ages 1..max_age are promised; young ones are drawn more often, and a few beyond (`AGE_MARGIN`).
        truth_weight: Of the error against ground truth, beside 1 for the L1 to the generator.
    """

    batch: int = 8
    max_age: int = 4
    truth_weight: float = 0.35


class Distillation(TrainingLoop):
    """One training run, resumable from its checkpoint file; the losses told of are summed over the consumers.

    Args:
        encoder: Cache encoder, trained in place.
        consumers: Warp consumers that read what it makes, trained in place; the loss is the sum of theirs.
        recording: The generator's frames.
        options: How to train.
        perceptual: A perceptual distance between two batches of images, scalar, or None.
        identity: What the checkpoint must belong to (model, data): another identity is refused.
        plan: As for `TrainingLoop`; `read_plan` gives it back.

    Raises:
        ExportError: If there are fewer than 2 frames.
    """

    options: DistillOptions

    def __init__(
        self,
        encoder: CacheEncoder,
        consumers: Sequence[WarpConsumer],
        recording: Recording,
        options: DistillOptions,
        *,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
        identity: str = "",
        plan: Mapping[str, Any] | None = None,
    ) -> None:
        frames = len(recording.images)
        if frames < 2:
            raise ExportError(f"training needs at least 2 frames, the inputs hold {frames}; give a longer clip")
        self.encoder, self.consumers = encoder, tuple(consumers)
        self.recording, self.perceptual = recording, perceptual
        self.max_age = min(round(options.max_age * AGE_MARGIN), frames - 1)
        names = ["consumer", *(f"consumer{k}" for k in range(2, len(self.consumers) + 1))]
        modules = nn.ModuleDict({"encoder": encoder, **dict(zip(names, self.consumers, strict=True))})
        modules.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        identity = json.dumps({"of": identity, "options": asdict(options)}, sort_keys=True)
        super().__init__(modules, options, identity=identity, plan=plan)

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

    def schedule(self) -> tuple[float, float]:
        """Rate and momentum, both cycled."""
        return one_cycle_with_momentum(self.step, self.options.steps, self.options.peak_rate)

    def losses(self, random: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the consumers' losses on pairs of frames, and what it is made of."""
        options, recording = self.options, self.recording
        ages = 1 + np.floor(self.max_age * random.random(options.batch) ** 1.8).astype(np.int64)
        later = ages + random.integers(0, len(recording.images) - ages)
        # A third of the pairs run backwards: just as natural a motion, and one that was not seen before.
        backwards = random.random(options.batch) < 1 / 3
        t = torch.from_numpy(np.where(backwards, later - ages, later))
        s = torch.from_numpy(np.where(backwards, later, later - ages))
        losses: dict[str, Tensor] = {}
        totals = []
        # Flow stays float32 in the consumer.
        for answer in self.answers(t, s):
            total, parts = self._loss(answer.float(), t, random)
            totals.append(total)
            losses = {name: losses[name] + value if name in losses else value for name, value in parts.items()}
        return functools.reduce(torch.add, totals), losses

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
    return checkpoint_plan(path)

"""Train branches from the generator's own answers, all of them in one run, stopped and resumed as one likes.

A step draws frames, computes what the frozen first layers make of them once for all branches, and compares every
branch's answer with the generator's image of the frame (self-distillation: no labels). A branch starts from the
generator's own weights, so it begins with a picture and not with noise.

No labels also means no lack of frames: a part of every step's are moved, turned and scaled a little, and the generator
itself says what they should look like. On short clips branches otherwise learn the frames by heart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ...engine.errors import ExportError
from ..torch_graph.module import GraphModule
from ..training.checkpoint import load_checkpoint, one_cycle, save_checkpoint
from ..training.losses import detail_loss, same_crops
from .guide_bank import GuideBank, GuideLookup, pool_features

__all__ = ["BranchNetwork", "BranchTraining", "TrainOptions"]

# Steps between new keys of a bank whose branch trains its first layers, which drift slowly.
_REKEY_EVERY = 100


@dataclass(frozen=True)
class TrainOptions:
    """How to train.

    Attributes:
        steps: Optimiser steps.
        batch: Frames a step.
        peak_rate: Learning rate at the top of its one cycle.
        seed: Of the frames drawn.
        detail_weight: Of the L1 between horizontal and vertical differences, beside 1 for the L1.
        perceptual_weight: Of the perceptual distance, where there is one.
        moved: Share of a step's frames whose image inputs are moved, turned and scaled at random.
        near: Entries of a bank made from frames less than this many away are not found in training.
        checkpoint_every: Steps between checkpoints.
    """

    steps: int
    batch: int = 4
    peak_rate: float = 1e-3
    seed: int = 0
    detail_weight: float = 0.5
    perceptual_weight: float = 0.3
    moved: float = 0.5
    near: int = 1
    checkpoint_every: int = 200


class BranchNetwork(nn.Module):
    """One branch as it is trained.

    Args:
        rest: Depth values and generator inputs -> the generator's outputs.
        outputs: The generator's outputs, in order.
        prefix: Generator inputs -> depth values, where the branch trains its own; None where they are given to it.
        lookup: Its guide bank, or None.
        guided: Those of the depth's values that the bank reads, in its order.
    """

    def __init__(
        self,
        rest: GraphModule,
        outputs: Sequence[str],
        *,
        prefix: GraphModule | None = None,
        lookup: GuideLookup | None = None,
        guided: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.outputs, self.guided = tuple(outputs), tuple(guided)
        self.rest, self.prefix, self.lookup = rest, prefix, lookup

    def forward(self, given: Mapping[str, Tensor], excluded: Tensor | None = None) -> Tensor:
        """Answer frames.

        Args:
            given: Generator inputs, and the depth's values where the branch has no first layers of its own.
            excluded: Entries of the bank that are not to be found, bool [N, K].

        Returns:
            Every output, channels together, [N, C, H, W].
        """
        values = dict(given)
        if self.prefix is not None:
            values |= self.prefix({name: given[name] for name in self.prefix.input_names})
        if self.lookup is not None:
            read = [values[name] for name in self.guided]
            target = self.guided[self.lookup.target]
            values[target] = self.lookup.add(values[target], self.lookup.find(read, excluded))
        got = self.rest({name: values[name] for name in self.rest.input_names})
        images = [got[name] for name in self.outputs]
        return torch.cat(images, 1) if len(images) > 1 else images[0]

    def features(self, given: Mapping[str, Tensor]) -> Tensor:
        """Pooled features of the depth, [N, F], for a bank's keys."""
        values = dict(given)
        if self.prefix is not None:
            values |= self.prefix({name: given[name] for name in self.prefix.input_names})
        return pool_features([values[name].float() for name in self.guided])


class BranchTraining:
    """One training run of several branches, resumable from its checkpoint file.

    Args:
        branches: Trained in place.
        banks: Every branch's bank, or None.
        shared: Generator inputs -> the depth values of all branches, frozen; None where no branch reads any.
        inputs: Generator inputs, [T, ...]; [1, ...] where one never changes.
        images: The generator's outputs, channels together, float32 [T, C, H, W].
        options: How to train.
        whole: Generator inputs -> the generator's outputs, which answers moved frames; None: no frame is moved.
        perceptual: A perceptual distance between two batches of images, scalar, or None.
        identity: What the checkpoint must belong to; another identity is refused.
        plan: What was decided before training, JSON-ready.
    """

    def __init__(
        self,
        branches: Sequence[BranchNetwork],
        banks: Sequence[GuideBank | None],
        shared: GraphModule | None,
        inputs: Mapping[str, Tensor],
        images: Tensor,
        options: TrainOptions,
        *,
        whole: GraphModule | None = None,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
        identity: str = "",
        plan: Mapping[str, Any] | None = None,
    ) -> None:
        if len(images) < 2:
            raise ExportError(f"training needs at least 2 frames, the inputs hold {len(images)}; give a longer clip")
        self.branches, self.banks, self.shared = nn.ModuleList(branches), list(banks), shared
        self.inputs, self.images = inputs, images
        self.moving = [name for name, array in inputs.items() if _is_image(array)]
        self.whole = whole if self.moving else None
        self.options, self.perceptual, self.identity, self.plan = options, perceptual, identity, plan or {}
        # Everything stays in the default layout: channels-last convolutions are a little faster on CPUs, but a group
        # normalisation's backward pass is ten times slower there and takes more than they save.
        self.optimizer = torch.optim.Adam(
            [parameter for parameter in self.branches.parameters() if parameter.requires_grad],
            lr=options.peak_rate,
            betas=(0.9, 0.99),
        )
        self.step = 0

    def run(
        self, *, checkpoint: Path | None = None, on_step: Callable[[int, dict[str, float]], None] | None = None
    ) -> None:
        """Train until all steps are done.

        Args:
            checkpoint: File to resume from, if it is there, and to save to; removed by the caller when it is done.
            on_step: Told the number of steps done and every branch's L1.
        """
        if checkpoint is not None and checkpoint.exists():
            self.step = load_checkpoint(checkpoint, self.branches, self.optimizer, identity=self.identity)
        elif checkpoint is not None:
            self._save(checkpoint)  # so that an early interrupt, too, leaves the plan
        self.branches.train()
        losses = None
        while self.step < self.options.steps:
            losses = self._train_step()
            self.step += 1
            if self.step % _REKEY_EVERY == 0 or self.step == self.options.steps:
                self._rekey()
            if on_step is not None:
                on_step(self.step, losses)
            if checkpoint is not None and self.step % self.options.checkpoint_every == 0:
                self._save(checkpoint)
        if checkpoint is not None and losses is not None and self.step % self.options.checkpoint_every:
            self._save(checkpoint)  # what comes after may be interrupted too
        self.branches.eval()

    def answers(self, frames: Tensor, *, exclude: bool, inputs: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """Every branch's answer to `frames` (int64 [N]): float32 [N, C, H, W].

        Args:
            frames: Which.
            inputs: Their inputs, where they are not the stream's.
            exclude: Whether a bank's entries made from the frames themselves and their neighbours are left out.
        """
        given = self._with_depth(self._inputs(frames) if inputs is None else inputs)
        found = []
        for branch, bank in zip(self.branches, self.banks, strict=True):
            excluded = None
            if bank is not None and exclude and self.options.near:
                excluded = (torch.from_numpy(bank.frames)[None] - frames[:, None]).abs() < self.options.near
            found.append(branch(given, excluded).float())
        return found

    def _inputs(self, frames: Tensor) -> dict[str, Tensor]:
        """The stream's inputs of frames."""
        return {
            name: array.expand(len(frames), *array.shape[1:]) if len(array) == 1 else array[frames]
            for name, array in self.inputs.items()
        }

    @torch.no_grad()
    def _with_depth(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs, and what the shared first layers make of them."""
        if self.shared is None:
            return dict(inputs)
        return {**inputs, **self.shared({name: inputs[name] for name in self.shared.input_names})}

    @torch.no_grad()
    def _moved(self, frames: Tensor, random: np.random.Generator) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs and targets of a step, some of them moved; a frame's image inputs all alike."""
        inputs, target = self._inputs(frames), self.images[frames]
        count = round(self.options.moved * len(frames))
        if self.whole is None or count == 0:
            return inputs, target
        placements = torch.from_numpy(_placements(count, random))
        for name in self.moving:
            images = inputs[name].clone()
            grid = functional.affine_grid(placements, list(images[:count].shape), align_corners=False)
            images[:count] = functional.grid_sample(
                images[:count], grid.to(images.dtype), padding_mode="border", align_corners=False
            )
            inputs[name] = images
        # In full precision, whatever the step runs in: this is what is to be learnt.
        with torch.autocast("cpu", enabled=False):
            got = self.whole({name: inputs[name][:count] for name in self.whole.input_names})
        target = target.clone()
        target[:count] = torch.cat([got[name] for name in self.whole.output_names], 1)
        return inputs, target

    def _train_step(self) -> dict[str, float]:
        # Seeded by the step, so that a resumed run draws the same frames as one that was never stopped.
        random = np.random.default_rng([self.options.seed, self.step])
        count = len(self.images)
        frames = torch.from_numpy(random.choice(count, self.options.batch, replace=self.options.batch > count))
        inputs, target = self._moved(frames, random)
        told: dict[str, float] = {}
        # bfloat16 is 3 to 4 times faster than float32 on CPUs that have it.
        with torch.autocast("cpu", torch.bfloat16):
            answers = self.answers(frames, exclude=True, inputs=inputs)
            total = torch.zeros(())
            for k, answer in enumerate(answers, 1):
                error = functional.l1_loss(answer, target)
                total = total + error
                if self.options.detail_weight:
                    total = total + self.options.detail_weight * detail_loss(answer, target)
                told[f"branch{k}"] = float(error.detach())
            if self.perceptual is not None and self.options.perceptual_weight:
                *squares, wanted = same_crops([*answers, target], random)
                distance = self.perceptual(torch.cat(squares), wanted.repeat(len(squares), 1, 1, 1))
                # The distance is a mean over all; every branch is to weigh as much as it would alone.
                total = total + self.options.perceptual_weight * len(squares) * distance
                told["perceptual"] = float(distance.detach())
        for group in self.optimizer.param_groups:
            group["lr"] = one_cycle(self.step, self.options.steps, self.options.peak_rate)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        for branch in self.branches:
            nn.utils.clip_grad_norm_(branch.parameters(), 1.0)
        self.optimizer.step()
        return told

    @torch.no_grad()
    def _rekey(self) -> None:
        """New keys for banks whose branch trains the layers that make them."""
        for branch, bank in zip(self.branches, self.banks, strict=True):
            assert isinstance(branch, BranchNetwork)
            if bank is None or branch.lookup is None or branch.prefix is None:
                continue
            features = [
                branch.features(self._with_depth(self._inputs(torch.from_numpy(bank.frames[first : first + 16]))))
                for first in range(0, len(bank.frames), 16)
            ]
            branch.lookup.rekey(torch.cat(features) @ branch.lookup.projection + branch.lookup.offset)

    def _save(self, path: Path) -> None:
        save_checkpoint(path, self.branches, self.optimizer, step=self.step, identity=self.identity, plan=self.plan)


def _is_image(array: Tensor) -> bool:
    """Whether an input is an image that can be moved: floating point, with rows and columns."""
    return array.ndim == 4 and min(array.shape[2:]) > 1 and array.is_floating_point()


def _placements(count: int, random: np.random.Generator) -> NDArray[np.float32]:
    """Random placements [count, 2, 3] for `affine_grid`: up to 6 % of the side either way, 5 degrees, 8 % of size."""
    angle = np.deg2rad(random.uniform(-5.0, 5.0, count))
    scale = random.uniform(0.92, 1.08, count)
    # Grid units: the side is 2 long.
    shift = random.uniform(-0.12, 0.12, (count, 2))
    rows = [[scale * np.cos(angle), -scale * np.sin(angle), shift[:, 0]]]
    rows.append([scale * np.sin(angle), scale * np.cos(angle), shift[:, 1]])
    return np.asarray(rows, np.float32).transpose(2, 0, 1)

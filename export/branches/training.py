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
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ...engine.errors import ExportError
from ..torch_graph.module import GraphModule
from ..training.loop import LoopOptions, TrainingLoop
from ..training.losses import detail_loss, same_crops
from .guide_bank import GuideBank, GuideLookup, pool_features

__all__ = ["BranchNetwork", "BranchTraining", "Lesson", "TrainOptions"]

# Steps between new keys of a bank whose branch trains its first layers, which drift slowly.
_REKEY_EVERY = 100


@dataclass(frozen=True)
class TrainOptions(LoopOptions):
    """How to train; see `LoopOptions` for the others.

    Attributes:
        moved: Share of a step's frames that are moved, turned and scaled at random, the generator's answer to that
            being the target; 0: none.
    """

    moved: float = 0.5


@dataclass(frozen=True)
class Lesson:
    """What branches are trained on.

    Attributes:
        inputs: Generator inputs, [T, ...]; [1, ...] where one never changes.
        images: The generator's outputs, channels together, float32 [T, C, H, W].
        shared: Generator inputs -> the depth values of all branches, frozen; None where no branch reads any.
        whole: Generator inputs -> the generator's outputs, which answers moved frames; None: no frame is moved.
        near: Entries of a bank made from frames less than this many away are not found in training.
    """

    inputs: Mapping[str, Tensor]
    images: Tensor
    shared: GraphModule | None = None
    whole: GraphModule | None = None
    near: int = 1


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
        values = self._with_prefix(given)
        if self.lookup is not None:
            read = [values[name] for name in self.guided]
            target = self.guided[self.lookup.target]
            values[target] = self.lookup.add(values[target], self.lookup.find(read, excluded))
        got = self.rest({name: values[name] for name in self.rest.input_names})
        images = [got[name] for name in self.outputs]
        return torch.cat(images, 1) if len(images) > 1 else images[0]

    def features(self, given: Mapping[str, Tensor]) -> Tensor:
        """Pooled features of the depth, [N, F], for a bank's keys."""
        values = self._with_prefix(given)
        return pool_features([values[name].float() for name in self.guided])

    def _with_prefix(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is given, and what the branch's own first layers make of it."""
        if self.prefix is None:
            return dict(given)
        return {**given, **self.prefix({name: given[name] for name in self.prefix.input_names})}


class BranchTraining(TrainingLoop):
    """One training run of several branches, resumable from its checkpoint file; every branch's L1 is told of.

    Args:
        branches: Trained in place.
        banks: Every branch's bank, or None.
        lesson: What they are trained on.
        options: How to train.
        perceptual: A perceptual distance between two batches of images, scalar, or None.
        identity: As for `TrainingLoop`.
        plan: As for `TrainingLoop`.

    Raises:
        ExportError: If there are fewer than 2 frames.
    """

    options: TrainOptions

    def __init__(
        self,
        branches: Sequence[BranchNetwork],
        banks: Sequence[GuideBank | None],
        lesson: Lesson,
        options: TrainOptions,
        *,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
        identity: str = "",
        plan: Mapping[str, Any] | None = None,
    ) -> None:
        frames = len(lesson.images)
        if frames < 2:
            raise ExportError(f"training needs at least 2 frames, the inputs hold {frames}; give a longer clip")
        self.branches, self.banks, self.lesson, self.perceptual = list(branches), list(banks), lesson, perceptual
        self.moving = [name for name, array in lesson.inputs.items() if _is_image(array)]
        # Everything stays in the default layout: channels-last convolutions are a little faster on CPUs, but a group
        # normalisation's backward pass is ten times slower there and takes more than they save.
        super().__init__(nn.ModuleList(branches), options, clipped=branches, identity=identity, plan=plan)

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
            if bank is not None and exclude and self.lesson.near:
                excluded = (torch.from_numpy(bank.frames)[None] - frames[:, None]).abs() < self.lesson.near
            found.append(branch(given, excluded).float())
        return found

    def _inputs(self, frames: Tensor) -> dict[str, Tensor]:
        """The stream's inputs of frames."""
        return {
            name: array.expand(len(frames), *array.shape[1:]) if len(array) == 1 else array[frames]
            for name, array in self.lesson.inputs.items()
        }

    @torch.no_grad()
    def _with_depth(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs, and what the shared first layers make of them."""
        shared = self.lesson.shared
        return dict(inputs) if shared is None else {**inputs, **shared({n: inputs[n] for n in shared.input_names})}

    @torch.no_grad()
    def _moved(self, frames: Tensor, random: np.random.Generator) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs and targets of a step, some of them moved; a frame's image inputs all alike."""
        inputs, target, whole = self._inputs(frames), self.lesson.images[frames], self.lesson.whole
        count = round(self.options.moved * len(frames))
        if whole is None or count == 0 or not self.moving:
            return inputs, target
        placements = torch.from_numpy(_placements(count, random))
        for name in self.moving:
            images = inputs[name].clone()
            grid = functional.affine_grid(placements, list(images[:count].shape), align_corners=False)
            images[:count] = functional.grid_sample(
                images[:count], grid.to(images.dtype), padding_mode="border", align_corners=False
            )
            inputs[name] = images
        got = whole({name: inputs[name][:count] for name in whole.input_names})
        target = target.clone()
        target[:count] = torch.cat([got[name] for name in whole.output_names], 1)
        return inputs, target

    def losses(self, random: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the branches' losses on some frames, and every branch's L1."""
        options, count = self.options, len(self.lesson.images)
        frames = torch.from_numpy(random.choice(count, options.batch, replace=options.batch > count))
        with torch.autocast("cpu", enabled=False):  # in full precision: this is what is to be learnt
            inputs, target = self._moved(frames, random)
        told: dict[str, Tensor] = {}
        answers = self.answers(frames, exclude=True, inputs=inputs)
        total = torch.zeros(())
        for k, answer in enumerate(answers, 1):
            told[f"branch{k}"] = functional.l1_loss(answer, target)
            total = total + told[f"branch{k}"]
            if options.detail_weight:
                total = total + options.detail_weight * detail_loss(answer, target)
        if self.perceptual is not None and options.perceptual_weight:
            *squares, wanted = same_crops([*answers, target], random)
            told["perceptual"] = self.perceptual(torch.cat(squares), wanted.repeat(len(squares), 1, 1, 1))
            # The distance is a mean over all; every branch is to weigh as much as it would alone.
            total = total + options.perceptual_weight * len(squares) * told["perceptual"]
        return total, told

    @torch.no_grad()
    def after_step(self) -> None:
        """New keys now and then, and at the end, for banks whose branch trains the layers that make them."""
        if self.step % _REKEY_EVERY and self.step != self.options.steps:
            return
        for branch, bank in zip(self.branches, self.banks, strict=True):
            if bank is None or branch.lookup is None or branch.prefix is None:
                continue
            features = [
                branch.features(self._with_depth(self._inputs(torch.from_numpy(bank.frames[first : first + 16]))))
                for first in range(0, len(bank.frames), 16)
            ]
            branch.lookup.rekey(torch.cat(features) @ branch.lookup.projection + branch.lookup.offset)


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

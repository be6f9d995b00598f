"""Train the warp adapter: from a cut generator and its frames to the producer and the consumers."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from onnx import ModelProto
from torch import Tensor

from ...engine.metrics.lpips import SMALLEST_SIDE
from ..cut.candidate import CutCandidate
from ..cut.split import SplitModels
from ..frames.clip import Stream
from ..frames.streams import Progress
from ..frames.subject import Subject
from ..training.checkpoint import data_digest
from ..training.perceptual import PerceptualLoss
from .distill import Distillation, DistillOptions
from .graphs import choose_configs, consumer_graph, producer_graph
from .layout import AdapterConfig, AdapterLayout, subject_layout
from .network import CacheEncoder, WarpConsumer
from .recording import record

__all__ = ["AdapterOptions", "AdapterTraining", "TrainedAdapter", "perceptual_loss"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterOptions:
    """How many consumers, how large, and how to train them.

    Attributes:
        train: How to train.
        budget: The largest consumer's cost as a fraction of the generator's.
        consumers: Their number.
        sizes: A size a consumer, the largest first, all with the same encoding; none: the largest that the budget
            allows.
        lpips: Weights file of LPIPS, a training loss where it is given.
    """

    train: DistillOptions
    budget: float = 0.1
    consumers: int = 1
    sizes: tuple[AdapterConfig, ...] = ()
    lpips: Path | None = None


@dataclass(frozen=True)
class TrainedAdapter:
    """What training an adapter gives.

    Attributes:
        producer: Frame inputs -> cache tensors, the plain consumer's and the warp consumers'.
        consumers: Exit name -> consumer, the dearest first: ``warp``, ``warp2``, ...
        record: What the manifest says of the training, JSON-ready.
    """

    producer: ModelProto
    consumers: dict[str, ModelProto]
    record: dict[str, Any]


class AdapterTraining:
    """The training of one adapter: what is chosen and recorded for it at once, and then `run`.

    Args:
        subject: The generator and its frames.
        parts: Its halves.
        cut: Where they were cut.
        options: The user's choices.
        checkpoint: File to save to, and to resume from where it is there.
        plan: What the checkpoint's run had chosen, or None.
        progress: Told how far it is.

    Attributes:
        layout: What the adapter reads and writes.
        recording: The generator on the training frames.

    Raises:
        InputError: If the truth has no output's shape.
        ExportError: If nothing fits the budget, or the generator gives NaN.
    """

    def __init__(
        self,
        subject: Subject,
        parts: SplitModels,
        cut: CutCandidate,
        options: AdapterOptions,
        *,
        checkpoint: Path,
        plan: Mapping[str, Any] | None,
        progress: Progress,
    ) -> None:
        self._subject, self._parts, self._checkpoint, self._progress = subject, parts, checkpoint, progress
        model, train = subject.answering, subject.train
        self.layout = layout = subject_layout(subject, cut.names)
        configs = _planned(plan) if plan else options.sizes
        if not configs:
            feeds = {name: array[:1] for name, array in subject.sample.items()}
            configs = choose_configs(model, layout, options.budget, feeds, options.consumers, progress=progress)
        self._configs = configs
        self.recording = record(model, layout, configs[0], train.arrays, truth=train.truth, progress=progress)
        self._options = options.train
        torch.manual_seed(options.train.seed)
        self._distillation = Distillation(
            CacheEncoder(layout, configs[0]),
            [WarpConsumer(layout, config) for config in configs],
            self.recording,
            self._options,
            perceptual=perceptual_loss(options.lpips, layout),
            identity=_identity(model, train, options),
            plan={"cut": ",".join(cut.names), **_sizes(configs)},
        )

    def keep(self) -> None:
        """Make the checkpoint, or see that the one there is this training's: other work comes before `run`.

        Raises:
            ExportError: If it cannot be written, is damaged or belongs to another run.
        """
        self._distillation.keep(self._checkpoint)

    def run(self) -> TrainedAdapter:
        """Train, from the checkpoint on where there is one.

        Raises:
            ExportError: If the checkpoint is damaged or belongs to another run.
        """
        steps = self._options.steps
        self._distillation.run(
            checkpoint=self._checkpoint,
            on_step=lambda step, _: self._progress("training the warp adapter", step, steps),
        )
        images = self.recording.images
        limits = (float(images.min()), float(images.max()))
        encoder, consumers = self._distillation.encoder.eval(), self._distillation.consumers
        state = self._subject.state_outputs
        return TrainedAdapter(
            producer=producer_graph(self._subject.model, self._parts, encoder, self.layout, state),
            consumers={
                "warp" if k == 1 else f"warp{k}": consumer_graph(consumer.eval(), self.layout, limits)
                for k, consumer in enumerate(consumers, 1)
            },
            record={**_sizes(self._configs), **dataclasses.asdict(self._options)},
        )


def perceptual_loss(weights: Path | None, layout: AdapterLayout) -> Callable[[Tensor, Tensor], Tensor] | None:
    """LPIPS of the first RGB output among all outputs' channels; None without weights or such an output."""
    if weights is None:
        return None
    loss = PerceptualLoss(weights)
    first = 0
    for _, channels in layout.outputs:
        if channels == 3 and min(layout.height, layout.width) >= SMALLEST_SIDE:
            rgb = slice(first, first + 3)
            return lambda a, b: loss(a[:, rgb], b[:, rgb])
        first += channels
    logger.warning("no output is an RGB image of %d pixels or more, so LPIPS is no part of the training", SMALLEST_SIDE)
    return None


def _sizes(configs: Sequence[AdapterConfig]) -> dict[str, Any]:
    """What manifest and checkpoint say of the sizes: the first, and the others where there are some."""
    smaller = [config.to_record() for config in configs[1:]]
    return {"adapter": configs[0].to_record(), **({"smaller": smaller} if smaller else {})}


def _planned(plan: Mapping[str, Any]) -> tuple[AdapterConfig, ...]:
    """The sizes that `_sizes` wrote."""
    return tuple(AdapterConfig(**size) for size in (plan["adapter"], *plan.get("smaller", ())))


def _identity(model: ModelProto, train: Stream, options: AdapterOptions) -> str:
    """What a checkpoint belongs to: this generator, these frames, this loss and number of consumers."""
    digest = data_digest(model, train.arrays if train.truth is None else {**train.arrays, "the truth": train.truth})
    digest.update(f"perceptual {options.lpips is not None}".encode())
    if options.consumers > 1:
        digest.update(f"consumers {options.consumers}".encode())
    return digest.hexdigest()

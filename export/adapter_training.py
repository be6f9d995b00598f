"""Train the warp adapter: from a cut generator and its frames to the producer and the consumers."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto
from torch import Tensor

from ..engine.lpips import SMALLEST_SIDE
from .adapter import AdapterConfig, AdapterLayout, CacheEncoder, WarpConsumer
from .adapter_graph import choose_configs, consumer_graph, producer_graph
from .clip import Stream
from .compile_options import CompileOptions
from .cut import CutCandidate
from .distill import Distillation, DistillOptions
from .perceptual import PerceptualLoss
from .recording import Progress, Recording, record
from .split import SplitModels
from .subject import Subject

__all__ = ["TrainedAdapter", "perceptual_loss", "train_adapter"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedAdapter:
    """What training an adapter gives.

    Attributes:
        producer: Frame inputs -> cache tensors, the plain consumer's and the warp consumers'.
        consumers: Exit name -> consumer, the dearest first: ``warp``, ``warp2``, ...
        layout: What the adapter reads and writes.
        recording: The generator on the training frames.
        record: What the manifest says of the training, JSON-ready.
    """

    producer: ModelProto
    consumers: dict[str, ModelProto]
    layout: AdapterLayout
    recording: Recording
    record: dict[str, Any]


def train_adapter(
    subject: Subject,
    parts: SplitModels,
    cut: CutCandidate,
    options: CompileOptions,
    *,
    checkpoint: Path,
    plan: Mapping[str, Any] | None,
    progress: Progress,
) -> TrainedAdapter:
    """Choose the consumers' sizes, record the generator, train.

    Args:
        subject: The generator and its frames.
        parts: Its halves.
        cut: Where they were cut.
        options: The user's choices.
        checkpoint: File to save to, and to resume from where it is there.
        plan: What the checkpoint's run had chosen, or None.
        progress: Told how far it is.

    Raises:
        InputError: If the truth has no output's shape.
        ExportError: If nothing fits the budget, the generator gives NaN, or the checkpoint belongs to another run.
    """
    train = subject.train
    layout = subject.layout(cut.names)
    configs = _planned(plan) if plan else options.adapters
    if not configs:
        feeds = {name: array[:1] for name, array in subject.sample.items()}
        configs = choose_configs(subject.model, layout, options.budget, feeds, options.consumers, progress=progress)
    recording = record(subject.model, layout, configs[0], train.arrays, truth=train.truth, progress=progress)
    train_options = DistillOptions(steps=options.steps, max_age=options.max_age, seed=options.seed, **options.train)
    torch.manual_seed(options.seed)
    encoder = CacheEncoder(layout, configs[0])
    consumers = [WarpConsumer(layout, config) for config in configs]
    distillation = Distillation(
        encoder,
        consumers,
        recording,
        train_options,
        perceptual=perceptual_loss(options.lpips, layout),
        identity=_identity(subject.model, train, options),
        plan={"cut": ",".join(cut.names), **_sizes(configs)},
    )
    distillation.run(
        checkpoint=checkpoint, on_step=lambda step, _: progress("training the warp adapter", step, options.steps)
    )
    limits = (float(recording.images.min()), float(recording.images.max()))
    return TrainedAdapter(
        producer=producer_graph(subject.model, parts, encoder.eval(), layout),
        consumers={
            "warp" if k == 1 else f"warp{k}": consumer_graph(consumer.eval(), layout, limits)
            for k, consumer in enumerate(consumers, 1)
        },
        layout=layout,
        recording=recording,
        record={**_sizes(configs), **dataclasses.asdict(train_options)},
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


def _identity(model: ModelProto, train: Stream, options: CompileOptions) -> str:
    """What a checkpoint belongs to: this generator, these frames, this loss and number of consumers."""
    digest = hashlib.sha256(model.SerializeToString(deterministic=True))
    arrays = dict(train.arrays) if train.truth is None else {**train.arrays, "the truth": train.truth}
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    digest.update(f"perceptual {options.lpips is not None}".encode())
    if options.consumers > 1:
        digest.update(f"consumers {options.consumers}".encode())
    return digest.hexdigest()

"""The warp adapter as ONNX: its encoder joined to the producer, its consumer a module, its size chosen by budget."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from onnx import ModelProto
from torch import Tensor

from ...engine.errors import ExportError
from ...engine.spec import Array
from ..cut.split import SplitModels
from ..frames.streams import Progress
from ..graph.index import GraphIndex
from ..graph.profile import time_model
from ..graph.surgery import give_out, merge, rename_values
from ..graph.trace import export_call
from .layout import CACHE_ATLAS, CACHE_FEATURES, CACHE_IMAGE, AdapterConfig, AdapterLayout
from .network import CacheEncoder, WarpConsumer, image_planes
from .recording import working_tap

__all__ = [
    "CHEAPER",
    "LADDER",
    "choose_config",
    "choose_configs",
    "consumer_graph",
    "producer_graph",
    "smaller_configs",
]

# From the largest to the smallest; every step down saves about a fifth of the time.
LADDER = (
    AdapterConfig(width=96, blocks=4, features=64),
    AdapterConfig(width=80, blocks=3, features=64),
    AdapterConfig(width=64, blocks=3, features=48),
    AdapterConfig(width=64, blocks=2, features=48),
    AdapterConfig(width=48, blocks=2, features=48),
    AdapterConfig(width=48, blocks=1, features=32),
    AdapterConfig(width=32, blocks=2, features=32),
    AdapterConfig(width=32, blocks=1, features=32),
    AdapterConfig(width=24, blocks=1, features=24),
    AdapterConfig(width=16, blocks=1, features=16),
    AdapterConfig(width=16, blocks=0, features=16),
)
# Of the budget: what is measured here varies by some percent from run to run, and the promise is the budget itself.
_BUDGET_MARGIN = 0.93
CHEAPER = 0.45
"""Budget of a further consumer as a fraction of that of the one before: much closer ones save too little to choose."""


def choose_config(
    model: ModelProto,
    layout: AdapterLayout,
    budget: float,
    feeds: Mapping[str, Array],
    *,
    ladder: Sequence[AdapterConfig] = LADDER,
    progress: Progress,
) -> AdapterConfig:
    """The largest adapter whose consumer costs at most `budget` of the whole, both measured here on one thread.

    Args:
        model: The whole, in normal form.
        layout: What the adapter reads and writes.
        budget: The consumer's cost as a fraction of the generator's.
        feeds: One frame's generator inputs.
        ladder: Sizes to choose from, largest first.
        progress: Told how far it is.

    Raises:
        ExportError: If even the smallest is over the budget; the message says what it costs.
    """
    chosen, ratio = _largest_within(model, layout, budget, feeds, ladder, progress)
    if ratio > budget * _BUDGET_MARGIN:
        least = math.ceil(100 * ratio / _BUDGET_MARGIN) / 100
        remedy = (
            f"give --budget {least:.2f} or more" if least <= 1 else "compile with --steps 0 to cut without training"
        )
        raise ExportError(
            f"the smallest warp adapter costs {ratio:.1%} of this generator, over the budget of {budget:.1%}; {remedy}"
        )
    return ladder[chosen]


def choose_configs(
    model: ModelProto,
    layout: AdapterLayout,
    budget: float,
    feeds: Mapping[str, Array],
    count: int,
    *,
    ladder: Sequence[AdapterConfig] = LADDER,
    progress: Progress,
) -> tuple[AdapterConfig, ...]:
    """Adapters for consumers of several sizes on one cache, each cheaper than the one before.

    The first is what `choose_config` gives. Every further one is the largest of the smaller sizes whose consumer costs
    at most `CHEAPER` of the budget of the one before; where none does, as a consumer's work at the image's own
    resolution is the same for all, it is the smallest that leaves a size for each that is still to come.

    Args:
        model: The whole, in normal form.
        layout: What the adapters read and write.
        budget: The first consumer's cost as a fraction of the generator's.
        feeds: One frame's generator inputs.
        count: How many.
        ladder: Sizes to choose from, largest first.
        progress: Told how far it is.

    Returns:
        `count` sizes, dearest first, with the same encoding (`features`, `encoder_width`, `stride`).

    Raises:
        ExportError: If even the smallest is over the budget, or fewer sizes than asked for are below the first.
    """
    first = choose_config(model, layout, budget, feeds, ladder=ladder, progress=progress)
    chosen = [first]
    for k in range(1, count):
        budget *= CHEAPER
        sizes = smaller_configs(chosen[-1], ladder)
        later = count - 1 - k
        if len(sizes) <= later:
            raise ExportError(
                f"{count} consumers were asked for, but the largest that the budget allows (width {first.width}, "
                f"{first.blocks} blocks) leaves only {k + len(sizes)}; ask for fewer exits or give a larger --budget"
            )
        best, _ = _largest_within(model, layout, budget, feeds, sizes[: len(sizes) - later], progress)
        chosen.append(sizes[best])
    return tuple(chosen)


def smaller_configs(config: AdapterConfig, ladder: Sequence[AdapterConfig] = LADDER) -> tuple[AdapterConfig, ...]:
    """The sizes of `ladder` below `config`, largest first, for consumers that read the encoding that `config` makes."""
    found = []
    for step in ladder:
        if step.width <= config.width and step.blocks <= config.blocks:
            size = dataclasses.replace(config, width=step.width, blocks=step.blocks)
            if size != config and size not in found:
                found.append(size)
    return tuple(found)


def _largest_within(
    model: ModelProto,
    layout: AdapterLayout,
    budget: float,
    feeds: Mapping[str, Array],
    ladder: Sequence[AdapterConfig],
    progress: Progress,
) -> tuple[int, float]:
    """The first step of the ladder that fits the budget, or else its last, and that one's measured cost."""
    ratios: dict[int, float] = {}

    def fits(k: int) -> bool:
        consumer = consumer_graph(WarpConsumer(layout, ladder[k]).eval(), layout, (-1.0, 1.0))
        index = GraphIndex(consumer)
        arrays = dict(feeds)
        for name in index.inputs:
            if name not in arrays:
                arrays[name] = np.zeros(index.specs[name].shape, np.float32)
        times = time_model({"whole": model, "consumer": consumer}, arrays, threads=1, repeats=15)
        # The fastest runs: on a machine that does other work too, medians tell of that work.
        ratios[k] = times["consumer"].min_ms / times["whole"].min_ms
        trials = len(ratios)
        progress("fitting the adapter to the budget", trials, max(trials, len(ladder).bit_length()))
        return ratios[k] <= budget * _BUDGET_MARGIN

    # Cost falls along the ladder, so bisection finds the first that fits.
    low = bisect.bisect_left(range(len(ladder) - 1), True, key=fits)
    if low not in ratios:
        fits(low)
    return low, ratios[low]


def consumer_graph(consumer: WarpConsumer, layout: AdapterLayout, limits: tuple[float, float]) -> ModelProto:
    """The consumer as a module: cache tensors and inputs of frame t -> the generator's outputs.

    Args:
        consumer: In evaluation mode.
        layout: What it reads and writes.
        limits: Least and greatest value that the generator's images were seen to take; answers are kept within.
    """
    config = consumer.config
    rows, columns = layout.height // config.stride, layout.width // config.stride
    example = {
        CACHE_FEATURES: torch.zeros(1, config.features, rows, columns),
        CACHE_IMAGE: torch.zeros(1, 3 * layout.channels, layout.height, layout.width),
    }
    if layout.surface is not None:
        example[CACHE_ATLAS] = torch.zeros(1, 3, *layout.atlas_size)
    outputs = dict(layout.outputs)

    def call(given: dict[str, Tensor]) -> Tensor | tuple[Tensor, ...]:
        answer = consumer(given[CACHE_FEATURES], given[CACHE_IMAGE], given.get(CACHE_ATLAS), given).clamp(*limits)
        return answer if len(outputs) == 1 else tuple(answer.split(list(outputs.values()), dim=1))

    return export_call(call, example | layout.input_examples(), list(outputs), consumer=consumer)


def producer_graph(
    model: ModelProto, parts: SplitModels, encoder: CacheEncoder, layout: AdapterLayout, state: Sequence[str] = ()
) -> ModelProto:
    """The producer: everything that belongs to frame s, for the plain and the warp consumer alike.

    Args:
        model: The whole, in normal form.
        parts: Its halves; the plain consumer's cache tensors keep their names.
        encoder: In evaluation mode.
        layout: What the encoder reads.
        state: Outputs of the whole that are the next frame's state.

    Returns:
        Generator inputs and the atlas -> the plain cache, the warp consumer's, then the state.
    """
    index = GraphIndex(model)
    origins = {origin: cache for cache, origin in parts.origins.items()}
    taps = {f"tap.{k}": name for k, (name, *_) in enumerate(layout.taps)}
    images = {f"image.{k}": name for k, (name, _) in enumerate(layout.outputs)}
    links = taps | images
    example = {target: torch.zeros(index.specs[name].shape) for target, name in links.items()}
    example |= layout.input_examples()
    outputs = [CACHE_FEATURES, CACHE_IMAGE]
    if layout.surface is not None:
        example[layout.surface.atlas] = torch.zeros(1, 3, *layout.atlas_size)
        outputs.append(CACHE_ATLAS)

    def call(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        image = torch.cat([given[name] for name in images], 1) if len(images) > 1 else given["image.0"]
        features = encoder([working_tap(given[name], encoder.grid) for name in taps], given, image)
        # A graph may not hand an input straight through.
        atlas = () if layout.surface is None else (given[layout.surface.atlas].clone(),)
        return features, image_planes(image), *atlas

    encoded = export_call(call, example, outputs, encoder=encoder)
    # An input that the trained encoder does not read has no link to make.
    links = {target: source for target, source in links.items() if target in GraphIndex(encoded).inputs}
    joined = merge(give_out(model, list(origins)), encoded, links, [*origins, *outputs, *state])
    return rename_values(joined, origins)

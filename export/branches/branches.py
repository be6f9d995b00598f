"""Branches: the generator's first layers as they are, then its remaining ones with fewer channels (FIANCEE, CVPR 2023).

A branch answers from the frame's inputs alone. Where it leaves the generator (its depth) and how many channels it keeps
(its width) follow from what it may cost: a branch spends a small part of its time on first layers that are shared, and
is as wide as the rest allows, both measured here. All branches are trained together on the generator's own images.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto
from torch import Tensor

from ...engine.errors import ExportError, InputError
from ...engine.spec import Array
from ..frames.streams import Progress
from ..graph.index import GraphIndex
from ..graph.profile import time_model
from ..torch_graph.module import GraphModule
from ..training.checkpoint import checkpoint_plan, data_digest
from .graphs import branch_graph, prefix_graph
from .plan import BranchPlan, Guide, choose_depths, choose_widths, make_guides, near_frames, slim_rest
from .training import BranchNetwork, BranchTraining, Lesson, TrainOptions

__all__ = ["Branch", "BranchOptions", "default_costs", "train_branches"]

# Costs of the cheapest and the dearest branch, as fractions of the whole's.
_COSTS = (0.12, 0.30)


@dataclass(frozen=True)
class BranchOptions(TrainOptions):
    """How many branches, which, and how to train them; see `TrainOptions` for the others.

    Attributes:
        count: Number of branches.
        places: Every branch's depth, names of the generator's values (none: the inputs); None: chosen by cost.
        widths: Every branch's share of the channels, in (0, 1]; None: chosen by cost.
        costs: Every branch's cost as a fraction of the whole's, what is not given is chosen to meet; None: a geometric
            spread from 0.12 to 0.30.
        joint: Train the first layers too; then every branch has its own.
        bank_size: Entries of the guide bank; 0 does without.

    Raises:
        InputError: If a number is out of its range, or a list does not hold one entry a branch.
    """

    steps: int = 2000
    count: int = 2
    places: Sequence[Sequence[str]] | None = None
    widths: Sequence[float] | None = None
    costs: Sequence[float] | None = None
    joint: bool = False
    bank_size: int = 256

    def __post_init__(self) -> None:
        for name, value, ok, range_ in (
            ("count", self.count, self.count >= 1, "1 or more"),
            ("bank_size", self.bank_size, self.bank_size >= 0, "0 or more"),
            ("steps", self.steps, self.steps >= 0, "0 or more"),
            ("batch", self.batch, self.batch >= 1, "1 or more"),
            ("peak_rate", self.peak_rate, self.peak_rate > 0, "above 0"),
            ("moved", self.moved, 0 <= self.moved <= 1, "from 0 to 1"),
        ):
            if not ok:
                raise InputError(f"{name} is {value}; it must be {range_}")
        for name, listed in (("places", self.places), ("widths", self.widths), ("costs", self.costs)):
            if listed is not None and len(listed) != self.count:
                raise InputError(f"{name} has {len(listed)} entries for {self.count} branches; give one a branch")
        for name, numbers in (("widths", self.widths), ("costs", self.costs)):
            for number in numbers or ():
                if not 0 < number <= 1:
                    raise InputError(f"{name} holds {number}; it must be above 0 and at most 1")


@dataclass(frozen=True)
class Branch:
    """One trained branch.

    Attributes:
        name: ``branch1`` for the cheapest, and so on.
        graph: Generator inputs -> the generator's outputs.
        cost_ratio: Its time over the whole's, measured in turns on one thread.
        record: What the manifest is to say of it, JSON-ready.
    """

    name: str
    graph: ModelProto
    cost_ratio: float
    record: dict[str, Any]


def default_costs(count: int) -> tuple[float, ...]:
    """Costs of `count` branches, a geometric spread; of one the middle."""
    low, high = _COSTS
    if count == 1:
        return (round((low * high) ** 0.5, 4),)
    return tuple(round(low * (high / low) ** (k / (count - 1)), 4) for k in range(count))


def train_branches(
    model: ModelProto,
    arrays: Mapping[str, Array],
    images: Array,
    *,
    options: BranchOptions,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    progress: Progress,
    checkpoint: Path | None = None,
) -> list[Branch]:
    """Choose, train and emit branches.

    Args:
        model: The whole, in normal form; its outputs are float32 images of one size.
        arrays: The stream, name -> [T, ...]; [1, ...] where an input never changes. More than the generator's inputs
            may be there.
        images: What the generator gives on it, outputs' channels together, float32 [T, C, H, W].
        options: Which and how.
        perceptual: A perceptual distance between two batches of images, scalar, or None.
        progress: Told how far it is.
        checkpoint: File that an interrupted run leaves and a later one goes on from, if it is there; removed by the
            caller when all is done.

    Returns:
        The branches, cheapest first.

    Raises:
        InputError: If the images do not belong to the stream.
        ExportError: If the generator cannot be slimmed or trained, no branch is cheaper than it, or the checkpoint
            belongs to something else.
    """
    index = GraphIndex(model)
    _check(index, arrays, images)
    arrays = {name: np.ascontiguousarray(arrays[name]) for name in index.inputs}
    identity = _identity(model, arrays, options, perceptual is not None)
    feeds = {name: array[-1:] for name, array in arrays.items()}
    saved = None
    if checkpoint is not None and checkpoint.exists():
        saved = [BranchPlan(tuple(p["depth"]), p["width"]) for p in checkpoint_plan(checkpoint, identity)["branches"]]
    plans, guides = _plan(model, arrays, feeds, saved, options, progress)
    networks = [_network(model, plan, guides.get(plan.depth), options.joint) for plan in plans]
    shared = prefix_graph(model, list(dict.fromkeys(name for plan in plans for name in plan.depth)))
    training = BranchTraining(
        networks,
        [guides[plan.depth].bank if plan.depth in guides else None for plan in plans],
        Lesson(
            {name: torch.from_numpy(array) for name, array in arrays.items()},
            torch.from_numpy(np.ascontiguousarray(images)),
            shared=None if shared is None or options.joint else GraphModule(shared),
            whole=GraphModule(model) if options.moved else None,
            near=near_frames(len(images)),
        ),
        options,
        perceptual=perceptual,
        identity=identity,
        plan={"branches": [dataclasses.asdict(plan) for plan in plans]},
    )
    training.run(checkpoint=checkpoint, on_step=lambda step, _: progress("training the branches", step, options.steps))
    limits = (float(images.min()), float(images.max()))
    graphs = [
        _emit(model, plan, network, guides.get(plan.depth), limits)
        for plan, network in zip(plans, networks, strict=True)
    ]
    return _ranked(model, graphs, [_record(plan, guides.get(plan.depth), options) for plan in plans], feeds)


def _plan(
    model: ModelProto,
    arrays: Mapping[str, Array],
    feeds: Mapping[str, Array],
    saved: list[BranchPlan] | None,
    options: BranchOptions,
    progress: Progress,
) -> tuple[list[BranchPlan], dict[tuple[str, ...], Guide]]:
    """What to train: as an earlier run decided, as the caller says, or as costs have it."""
    if saved is not None:
        depths = [plan.depth for plan in saved]
        return saved, make_guides(model, arrays, depths, options.bank_size, progress)
    costs = tuple(options.costs or default_costs(options.count))
    if options.places is not None:
        depths = [tuple(place) for place in options.places]
    else:
        depths = choose_depths(model, feeds, costs)
    guides = make_guides(model, arrays, depths, options.bank_size, progress)
    if options.widths is not None:
        return [BranchPlan(depth, width) for depth, width in zip(depths, options.widths, strict=True)], guides
    return choose_widths(model, depths, guides, feeds, costs, progress), guides


def _network(model: ModelProto, plan: BranchPlan, guide: Guide | None, joint: bool) -> BranchNetwork:
    """A branch to train, from the generator's own weights."""
    prefix = prefix_graph(model, plan.depth) if joint else None
    return BranchNetwork(
        GraphModule(slim_rest(model, plan), train="all"),
        GraphIndex(model).outputs,
        prefix=None if prefix is None else GraphModule(prefix, train="all"),
        lookup=None if guide is None else guide.lookup(),
        guided=() if guide is None else guide.values,
    )


def _emit(
    model: ModelProto,
    plan: BranchPlan,
    network: BranchNetwork,
    guide: Guide | None,
    limits: tuple[float, float],
) -> ModelProto:
    """A trained branch as one graph."""
    return branch_graph(
        prefix_graph(model, plan.depth) if network.prefix is None else network.prefix.write_back(),
        network.rest.write_back(),
        None if guide is None else guide.graph(network.lookup),
        None if guide is None else guide.target,
        GraphIndex(model).outputs,
        limits,
    )


def _record(plan: BranchPlan, guide: Guide | None, options: BranchOptions) -> dict[str, Any]:
    return {
        "depth": list(plan.depth),
        "width": plan.width,
        "joint": options.joint,
        "bank": guide.bank.to_record() if guide is not None else None,
        "steps": options.steps,
        "batch": options.batch,
        "moved": options.moved,
        "seed": options.seed,
    }


def _ranked(
    model: ModelProto, graphs: Sequence[ModelProto], records: Sequence[dict[str, Any]], feeds: Mapping[str, Array]
) -> list[Branch]:
    """Name the branches in the order of what they cost, all measured in turns with the whole."""
    names = [f"candidate{k}" for k in range(len(graphs))]
    times = time_model({"whole": model, **dict(zip(names, graphs, strict=True))}, feeds, threads=1, repeats=20)
    ratios = [round(times[name].min_ms / times["whole"].min_ms, 4) for name in names]
    order = sorted(range(len(graphs)), key=lambda k: ratios[k])
    return [Branch(f"branch{rank}", graphs[k], ratios[k], records[k]) for rank, k in enumerate(order, 1)]


def _check(index: GraphIndex, arrays: Mapping[str, Array], images: Array) -> None:
    """Refuse what cannot be trained on."""
    missing = [name for name in index.inputs if name not in arrays]
    if missing:
        raise InputError(f"the stream lacks the generator's input {missing[0]!r}; add it")
    specs = [index.specs[name] for name in index.outputs]
    for spec in specs:
        if len(spec.shape) != 4 or spec.dtype != "float32" or spec.shape[2:] != specs[0].shape[2:]:
            raise ExportError(
                f"output {spec.name!r} is {spec.dtype} {spec.shape}; branches need outputs that are float32 images of "
                "one size; compile without branches"
            )
    frames = max(len(arrays[name]) for name in index.inputs)
    expected = (frames, sum(spec.shape[1] for spec in specs), *specs[0].shape[2:])
    if images.shape != expected:
        raise InputError(f"the generator's images are {images.shape}, but the stream has {expected}; record them anew")


def _identity(model: ModelProto, arrays: Mapping[str, Array], options: BranchOptions, perceptual: bool) -> str:
    """What a checkpoint belongs to: this generator, these frames, these options and this loss."""
    digest = data_digest(model, arrays)
    said = dataclasses.asdict(dataclasses.replace(options, checkpoint_every=0))
    digest.update(json.dumps(said | {"perceptual": perceptual}, sort_keys=True).encode())
    return digest.hexdigest()

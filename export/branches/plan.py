"""Where branches leave the generator, how wide they go on, what guides them: decided by measuring before training."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from onnx import ModelProto

from ...engine.errors import ExportError
from ...engine.spec import Array
from ..frames.streams import Progress, frame_at, frames_of
from ..graph.index import GraphIndex
from ..graph.profile import profile_nodes, time_model
from ..graph.run import open_session, run_session
from ..graph.surgery import extract
from ..training.k_centres import k_centres
from .graphs import branch_graph, lookup_graph, prefix_graph
from .guide_bank import GuideBank, GuideLookup, fit_keys, guide_value, make_bank, pool_features
from .slim import depths, slim

__all__ = [
    "BranchPlan",
    "Guide",
    "choose_depths",
    "choose_widths",
    "make_guides",
    "near_frames",
    "slim_rest",
    "untrained_graph",
]

# Of a branch's cost: what its first layers may take. They are not slimmed, so what they take the rest lacks: on the
# talking-head renderer at a cost of 0.32 to 0.35, after 300 steps, first layers that take a third of it left an LPIPS
# of 0.024 to the generator, and those that take a seventh 0.010.
_PREFIX_SHARE = 0.2
# As above where no depth is that cheap: to share a little more is better than to share nothing.
_PREFIX_MOST = 0.6
# A branch dearer than this is not worth having beside the whole.
_DEAREST = 0.9
# Widths that are tried are k / _WIDTHS.
_WIDTHS = 32
# Frames this near one another are too alike to stand for frames that were never seen; at most one in eight are.
_NEAR = 45
# What channel counts are rounded up to: the executors' favourite where layers are wide enough for it, else less.
_MULTIPLES = (8, 4, 2, 1)


@dataclass(frozen=True)
class BranchPlan:
    """One branch before it is trained.

    Attributes:
        depth: Names of the values that it reads; none: the inputs.
        width: Share of the channels that it keeps.
    """

    depth: tuple[str, ...]
    width: float


@dataclass(frozen=True)
class Guide:
    """The bank of one depth.

    Attributes:
        bank: Its entries.
        values: Those of the depth's values that it reads.
        shapes: Theirs, one frame each.
    """

    bank: GuideBank
    values: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def lookup(self) -> GuideLookup:
        """A fresh look-up, which adds nothing yet."""
        return GuideLookup(self.bank, self.shapes)

    def graph(self, lookup: GuideLookup | None = None) -> ModelProto:
        """A look-up, trained or fresh, as a graph."""
        return lookup_graph(lookup or self.lookup(), self.values, self.shapes)

    @property
    def target(self) -> str:
        """The value that takes the guide."""
        return self.values[self.lookup().target]


def near_frames(frames: int) -> int:
    """How many frames apart two are before they count as different."""
    return max(min(_NEAR, frames // 8), 1)


def choose_depths(model: ModelProto, feeds: Mapping[str, Array], costs: Sequence[float]) -> list[tuple[str, ...]]:
    """The deepest depth for every branch whose first layers leave most of its cost to the rest.

    Args:
        model: The whole, in normal form.
        feeds: One frame's inputs.
        costs: What every branch may cost, as a fraction of the whole.

    Returns:
        A depth a branch, as `slim` takes it; none of the values where even the first is too dear.
    """
    places = depths(model, profile_nodes(model, feeds))
    chosen: list[tuple[str, ...]] = []
    for cost in costs:
        cheap = [place for place in places if place.share <= _PREFIX_SHARE * cost]
        if cheap:
            chosen.append(cheap[-1].values)
        elif places and places[0].share <= _PREFIX_MOST * cost:
            chosen.append(places[0].values)
        else:
            chosen.append(())
    return chosen


def make_guides(
    model: ModelProto, arrays: Mapping[str, Array], places: Sequence[tuple[str, ...]], size: int, progress: Progress
) -> dict[tuple[str, ...], Guide]:
    """One bank a depth. All hold the same frames, so that a bundle stores their values once.

    The frames are chosen by the keys of the last depth, that of the dearest branch.

    Args:
        model: The whole, in normal form.
        arrays: The generator's inputs, [T, ...].
        places: Every branch's depth, that of the dearest last.
        size: Entries; fewer where there are fewer different frames. 0 makes none.
        progress: Told how far it is.

    Raises:
        ExportError: If there is nothing to guide with, or nothing that can take a guide.
    """
    if not size:
        return {}
    index = GraphIndex(model)
    value = guide_value(model)
    frames = max(len(array) for array in arrays.values())
    different = list(dict.fromkeys(places))
    read = {depth: _floating(index, depth) for depth in different}
    wanted = [
        name for name in dict.fromkeys(name for names in read.values() for name in names) if name in index.producer
    ]
    prefix = prefix_graph(model, wanted)
    session = None if prefix is None else open_session(prefix)
    features: dict[tuple[str, ...], list[Array]] = {depth: [] for depth in different}
    for t, feeds in enumerate(frames_of(arrays, index.inputs)):
        got = feeds | (run_session(session, feeds) if session is not None else {})
        for depth in different:
            pooled = pool_features([torch.from_numpy(np.ascontiguousarray(got[name])) for name in read[depth]])
            features[depth].append(pooled.numpy()[0])
        progress("making the guide bank", t + 1, frames)
    stacked = {depth: np.stack(rows) for depth, rows in features.items()}
    maps = {depth: fit_keys(rows, near=near_frames(frames)) for depth, rows in stacked.items()}
    projection, offset = maps[places[-1]]
    chosen, _ = k_centres(stacked[places[-1]] @ projection + offset, size)
    guides = _guides_of(model, arrays, value, chosen)
    made = {}
    for depth in different:
        bank = make_bank(stacked[depth], *maps[depth], chosen, guides)
        made[depth] = Guide(bank, read[depth], tuple(index.specs[name].shape for name in read[depth]))
        made[depth].lookup()  # refuses here, before anything is measured, what can take no guide
    return made


def choose_widths(
    model: ModelProto,
    places: Sequence[tuple[str, ...]],
    guides: Mapping[tuple[str, ...], Guide],
    feeds: Mapping[str, Array],
    costs: Sequence[float],
    progress: Progress,
) -> list[BranchPlan]:
    """The widest branch at every place that meets its cost, measured here in turns with the whole on one thread.

    Where even the narrowest is over its cost, that is what is chosen, as long as it is cheaper than the whole.

    Args:
        model: The whole, in normal form.
        places: Every branch's depth.
        guides: Banks by depth.
        feeds: One frame's inputs.
        costs: What every branch may cost, as a fraction of the whole.
        progress: Told how far it is.

    Returns:
        The plans, without those that are dearer than nine tenths of the whole, and without repetitions.

    Raises:
        ExportError: If no plan is left.
    """
    plans: list[BranchPlan] = []
    least, rounds = np.inf, _WIDTHS.bit_length()
    for k, (depth, cost) in enumerate(zip(places, costs, strict=True)):

        def tell(tried: int, k: int = k) -> None:
            progress("choosing the branches", min(k * rounds + tried, len(places) * rounds), len(places) * rounds)

        width, ratio = _widest(model, depth, guides.get(depth), feeds, cost, tell)
        least = min(least, ratio)
        plan = BranchPlan(depth, width / _WIDTHS)
        if ratio <= _DEAREST and plan not in plans:
            plans.append(plan)
    if not plans:
        raise ExportError(
            f"the cheapest branch costs {least:.0%} of the generator, and one above {_DEAREST:.0%} is not worth "
            "having; compile without branches"
        )
    progress("choosing the branches", len(places) * rounds, len(places) * rounds)
    return plans


def _widest(
    model: ModelProto,
    depth: tuple[str, ...],
    guide: Guide | None,
    feeds: Mapping[str, Array],
    cost: float,
    tell: Callable[[int], None],
) -> tuple[int, float]:
    """The largest width at a depth that meets a cost, or else 1, and what it costs; `tell` counts the measurements."""
    lookup, target = (None, None) if guide is None else (guide.graph(), guide.target)
    known: dict[int, float] = {}

    def ratio(width: int) -> float:
        if width not in known:
            try:
                graph = untrained_graph(model, BranchPlan(depth, width / _WIDTHS), lookup=lookup, target=target)
            except ExportError:
                if width == 1:
                    raise  # nothing there can be slimmed at all
                known[width] = np.inf  # so wide that every layer is kept whole
                return known[width]
            times = time_model({"whole": model, "branch": graph}, feeds, threads=1, repeats=12)
            # The fastest runs: on a machine that does other work too, medians tell of that work.
            known[width] = times["branch"].min_ms / times["whole"].min_ms
            tell(len(known))
        return known[width]

    ratio(1)  # refuses here what cannot be slimmed
    width = 1 + bisect.bisect_left(range(2, _WIDTHS + 1), True, key=lambda width: ratio(width) > cost)
    return width, ratio(width)


def untrained_graph(
    model: ModelProto, plan: BranchPlan, *, lookup: ModelProto | None = None, target: str | None = None
) -> ModelProto:
    """The branch of a plan as it is before training, with its look-up and the value that takes the guide."""
    return branch_graph(
        prefix_graph(model, plan.depth),
        slim_rest(model, plan),
        lookup,
        target,
        GraphIndex(model).outputs,
        (-np.inf, np.inf),
    )


def slim_rest(model: ModelProto, plan: BranchPlan) -> ModelProto:
    """The remainder of a plan, with the generator's own weights: depth values and inputs -> the generator's outputs.

    Raises:
        ExportError: If nothing behind the depth can be slimmed.
    """
    for multiple in _MULTIPLES[:-1]:
        try:
            return slim(model, plan.depth, plan.width, multiple=multiple).rest
        except ExportError:
            continue
    return slim(model, plan.depth, plan.width, multiple=_MULTIPLES[-1]).rest


def _floating(index: GraphIndex, depth: tuple[str, ...]) -> tuple[str, ...]:
    """Those of a depth's values, or of the inputs, that can be pooled."""
    names = depth or index.inputs
    found = tuple(name for name in names if index.specs[name].dtype == "float32" and len(index.specs[name].shape) > 1)
    if not found:
        raise ExportError(
            f"no value at the depth {', '.join(names)} is of floating point, so it can have no guide bank; "
            "set bank_size to 0"
        )
    return found


def _guides_of(model: ModelProto, arrays: Mapping[str, Array], value: str, frames: Array) -> Array:
    """`value` of the whole for some frames, [K, C, h, w]."""
    index = GraphIndex(model)
    session = open_session(extract(model, list(index.inputs), [value]))
    wanted = {name: arrays[name] for name in index.inputs}
    return np.concatenate([run_session(session, frame_at(wanted, int(t)))[value] for t in frames])

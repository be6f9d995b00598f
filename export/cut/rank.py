"""Find where to cut a generator: enumerate the sets of tensors that separate deep from shallow, cost and rank them.

A cut is a set of tensors S. The producer is everything that S needs. The consumer is everything that the outputs need
when S and the generator's inputs are given: a skip connection is either in S (cached) or computed anew from the input
of the new frame, whichever side of the trade it is on.

How cuts are found: walk a few topological orders (the graph's own; by distance from the outputs, which advances
parallel branches evenly; by distance from the inputs). At each position some tensors are live, made before it and
read after it. Each of them is cached or recomputed. What leads to the same consumer is the same cut.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from onnx import ModelProto

from ...engine.errors import ExportError, InputError
from ...engine.spec import Array, TensorSpec
from ..graph.fusion import find_fusions
from ..graph.profile import profile_nodes, time_model
from ..graph.run import frame_at, open_session, run_session
from ..graph.surgery import GraphIndex, give_out
from .split import SplitModels, check_exact, split

__all__ = ["AUTO", "CutCandidate", "choose_cut", "enumerate_cuts", "rank_cuts"]

AUTO = "auto"
# Above this the consumer is no shallow network any more. Above one half, because a U-Net whose consumer computes the
# outermost skip anew keeps the two outermost blocks, which take about half of its time.
MAX_COST_RATIO = 0.65
# Below this nothing is left that could follow the new input: it is showing the last image again.
MIN_COST_RATIO = 0.005
# A cut that leaves the consumer with more than this of the whole's cost separates nothing.
SEPARATES_BELOW = 0.9
# Of two cuts as large as each other and closer in cost than this, only the cheaper is worth measuring.
NEGLIGIBLE_COST_RATIO = 0.02
# An output off the cut's path is computed anew if that is cheaper than this part of the whole, else handed through.
CHEAP_OUTPUT_RATIO = 0.05
# The score's exchange rates, in dB of reuse PSNR: what 10 % of the generator's cost, and a doubling of the cache
# beyond the size of the image, must buy.
SCORE_DB_PER_COST_RATIO = 20.0
SCORE_DB_PER_DOUBLING = 0.25
# Identical frames have infinite PSNR; 60 dB is beyond what 8-bit video can show.
PSNR_CAP_DB = 60.0
_MAX_POSITIONS = 400
_ALL_SUBSETS_UP_TO = 4
_FLOATS = ("float32", "float16", "float64")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CutCandidate:
    """One way to cut, with what it costs and what it is worth.

    Attributes:
        tensors: The cached tensors: value names in the whole model, dtypes and shapes.
        labels: For each of them the name to show: the torch module whose output it is, else the value's name.
        consumer_ms: Time of the consumer, recomputed layers included.
        producer_ms: Time of the producer.
        whole_ms: Time of the whole model, measured with the other two.
        cache_bytes: Bytes of all tensors.
        recomputed_ms: The consumer's share that the producer computes too.
        reads_input: Whether the consumer reads any input of the new frame; if not, plain reuse shows the old frame.
        reuse_psnr_db: Age in frames -> PSNR of the consumer with a cache of that age against the whole, mean over
            the frames tried; empty until ranked.
        score: `rank_cuts`'s score in dB; None until ranked.
        consumer_nodes: Names of the consumer's nodes.
        anchors: Those of the tensors that the consumer anchors to stay exact, see `fusion`.
    """

    tensors: tuple[TensorSpec, ...]
    labels: tuple[str, ...]
    consumer_ms: float
    producer_ms: float
    whole_ms: float
    cache_bytes: int
    recomputed_ms: float = 0.0
    reads_input: bool = True
    reuse_psnr_db: Mapping[int, float] = field(default_factory=dict)
    score: float | None = None
    consumer_nodes: frozenset[str] = field(default_factory=frozenset, repr=False)
    anchors: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Value names of the cut's tensors."""
        return tuple(spec.name for spec in self.tensors)

    @property
    def cost_ratio(self) -> float:
        """The consumer's cost as a fraction of the whole's."""
        return self.consumer_ms / self.whole_ms if self.whole_ms else 0.0

    def to_record(self) -> dict[str, object]:
        """JSON-ready form for the manifest's ``cut.candidates``."""
        return {
            "tensors": list(self.names),
            "labels": list(self.labels),
            "shapes": [list(spec.shape) for spec in self.tensors],
            "consumer_ms": round(self.consumer_ms, 4),
            "producer_ms": round(self.producer_ms, 4),
            "whole_ms": round(self.whole_ms, 4),
            "cost_ratio": round(self.cost_ratio, 4),
            "cache_bytes": self.cache_bytes,
            "reads_input": self.reads_input,
            "reuse_psnr_db": {str(age): round(value, 3) for age, value in sorted(self.reuse_psnr_db.items())},
            "score": None if self.score is None else round(self.score, 3),
        }


def enumerate_cuts(
    model: ModelProto,
    costs: Mapping[str, float],
    *,
    max_tensors: int = 4,
    max_cost_ratio: float = MAX_COST_RATIO,
    min_cost_ratio: float = MIN_COST_RATIO,
) -> list[CutCandidate]:
    """List the cuts that separate a deep, costly part from a shallow one.

    Left out: constants and shape arithmetic, tensors that are not floating-point or of fixed shape, tensors inside
    what ONNX Runtime fuses into one kernel (the parts would round differently), and all but the smallest cache among
    cuts whose consumers have the same costly nodes.

    Args:
        model: The whole, in normal form.
        costs: Milliseconds of every node, from `profile_nodes`.
        max_tensors: At most so many cached tensors.
        max_cost_ratio: At most this fraction of the whole's cost for the consumer.
        min_cost_ratio: At least this fraction.

    Returns:
        Candidates, cheapest consumer first; may be empty.

    Raises:
        InputError: If `costs` lacks a node.
    """
    finder = _Finder(model, costs)
    allowed = finder.cacheable()
    best: dict[frozenset[int], tuple[int, float, frozenset[str]]] = {}
    tried: set[frozenset[str]] = set()
    for live in finder.frontiers():
        for chosen in finder.choices(live, allowed, max_tensors):
            if chosen in tried:
                continue
            tried.add(chosen)
            rest = finder.index.closure(finder.index.outputs, stop=chosen)
            used = finder.used(chosen, rest)
            cost = finder.cost(rest)
            if not used or not min_cost_ratio * finder.whole_ms <= cost <= max_cost_ratio * finder.whole_ms:
                continue
            if not finder.computes_an_output(rest) or not finder.stays_exact(used, rest):
                continue
            # Nodes below 0.2 % are a reshape or an activation: on which side they are makes no other cut.
            key = frozenset(i for i in rest if finder.costs[i] >= 0.002 * finder.whole_ms)
            size = sum(finder.index.specs[name].size_bytes for name in used)
            if key not in best or (size, cost) < best[key][:2]:
                best[key] = (size, cost, used)
    candidates = [finder.candidate(used) for _, _, used in best.values()]
    return sorted(candidates, key=lambda c: (c.consumer_ms, c.cache_bytes, c.names))


def rank_cuts(
    candidates: Sequence[CutCandidate],
    model: ModelProto,
    sample_stream: Mapping[str, Array],
    image_output: str | None = None,
    *,
    ages: Sequence[int] = (1, 2, 4),
    keep: int = 8,
    targets: int = 4,
    data_range: float = 2.0,
    threads: int = 1,
) -> list[CutCandidate]:
    """Measure the most promising cuts on a sample stream and order them, best first.

    Promising are the Pareto-best by consumer cost and cache bytes, front after front, up to twice `keep`; what hardly
    differs from a better one is skipped, and consumers that read the new frame's input go first. For those the PSNR
    of plain cache reuse is measured: the producer on frame t - age, the consumer on frame t, against the whole
    on frame t. Those that win are split, checked to be bit-identical with a fresh cache, and timed in turns with the
    whole. The score, in dB, is

        mean over ages of min(PSNR, 60) - 20 * cost ratio - 0.25 * log2(1 + cache bytes / image bytes)

    A consumer that reads nothing of the new frame can only show the old one again, at whatever cost: such cuts come
    after all others.

    Args:
        candidates: From `enumerate_cuts`.
        model: The whole, in normal form.
        sample_stream: Name -> array with time as the leading axis (or of leading extent 1: it never changes).
        image_output: The output that quality is measured on; by default the first floating-point one of four axes.
        ages: Cache ages in frames; those that the stream is too short for are left out.
        keep: At most so many are returned.
        targets: Frames t that quality is measured on, spread over the stream.
        data_range: Peak-to-peak range of the image, 2 for [-1, 1].
        threads: Threads of one operator.

    Returns:
        At most `keep` candidates with measured times, PSNR by age and score. Cuts whose consumer turns out to cost more
        than half of the whole are dropped, unless all do; those that are not exact are dropped.

    Raises:
        InputError: If the stream does not fit the model or is too short for every age, or there is no such output.
        ExportError: If no candidate is left.
    """
    index = GraphIndex(model)
    image = _image_output(index, image_output)
    frames = _stream_length(index, sample_stream)
    fitting = [age for age in ages if age < frames]
    if not fitting:
        raise InputError(f"the sample stream has {frames} frames, but reuse at age {min(ages)} needs {min(ages) + 1}")
    readers = _pareto_fronts([c for c in candidates if c.reads_input], 2 * keep)
    finalists = readers + _pareto_fronts([c for c in candidates if not c.reads_input], 2 * keep - len(readers))
    if not finalists:
        raise ExportError("no set of tensors separates a costly deep part from a shallow one; name a cut yourself")
    parts = [split(model, candidate) for candidate in finalists]
    quality = _reuse_psnr(model, parts, sample_stream, image, frames, fitting, targets, data_range, threads)
    image_bytes = index.specs[image].size_bytes

    def scored(candidate: CutCandidate) -> CutCandidate:
        return dataclasses.replace(candidate, score=_score(candidate, image_bytes))

    measured = [
        (scored(dataclasses.replace(candidate, reuse_psnr_db=psnr)), part)
        for candidate, part, psnr in zip(finalists, parts, quality, strict=True)
    ]
    measured.sort(key=lambda pair: _order(pair[0]))
    feeds = frame_at(sample_stream, frames - 1)
    exact: list[tuple[CutCandidate, SplitModels]] = []
    for candidate, part in measured:
        if len(exact) == keep:
            break
        try:
            check_exact(model, part, feeds)
        except ExportError as exc:
            logger.info("cut %s is left out: %s", ", ".join(candidate.names), exc)
        else:
            exact.append((candidate, part))
    ranked = [scored(candidate) for candidate in _timed(model, exact, feeds, threads)]
    if not ranked:
        raise ExportError("no cut gives the generator's exact output with a fresh cache; name a cut yourself")
    cheap = [candidate for candidate in ranked if candidate.cost_ratio <= MAX_COST_RATIO]
    if not cheap:
        # So it is with generators of less than a millisecond, where a call costs as much as the layers do.
        logger.warning("every cut's consumer takes more than half of the whole's time, though its layers do not")
    return sorted(cheap or ranked, key=_order)


def choose_cut(
    model: ModelProto,
    spec: str,
    sample_stream: Mapping[str, Array],
    image_output: str | None = None,
    *,
    ranked: Sequence[CutCandidate] | None = None,
    costs: Mapping[str, float] | None = None,
    ages: Sequence[int] = (1, 2, 4),
    data_range: float = 2.0,
    threads: int = 1,
) -> CutCandidate:
    """The cut that a user asked for, measured like the ranked ones.

    Args:
        model: The whole, in normal form.
        spec: ``"auto"`` for the best of the ranked ones, or names joined by commas: values of the ONNX graph or torch
            module paths (all their outputs).
        sample_stream: See `rank_cuts`.
        image_output: See `rank_cuts`.
        ranked: Result of `rank_cuts`, where there is one already.
        costs: Result of `profile_nodes`, where there is one already.
        ages: See `rank_cuts`.
        data_range: See `rank_cuts`.
        threads: See `rank_cuts`.

    Returns:
        The cut. Outputs that a named cut does not lead to are computed anew by the consumer if that is cheap, else
        they are cached as they are. Named tensors that the consumer does not need are dropped.

    Raises:
        InputError: If a name is unknown (the nearest are listed), or names an input or a constant.
        ExportError: If the cut does not separate anything, or is not exact.
    """
    index = GraphIndex(model)
    # Names first: a typing mistake should not cost a profile.
    named = None if spec.strip() == AUTO else _resolve(index, spec)
    frames = _stream_length(index, sample_stream)
    feeds = frame_at(sample_stream, frames - 1)
    if named is None:
        if ranked is None:
            costs = profile_nodes(model, feeds, threads=threads) if costs is None else costs
            candidates = enumerate_cuts(model, costs)
            ranked = rank_cuts(
                candidates, model, sample_stream, image_output, ages=ages, data_range=data_range, threads=threads
            )
        if not ranked:
            raise ExportError("there is no ranked cut to choose from; name a cut yourself")
        return ranked[0]
    finder = _Finder(model, profile_nodes(model, feeds, threads=threads) if costs is None else costs)
    candidate = finder.candidate(_completed(finder, named, spec))
    image = _image_output(index, image_output)
    part = split(model, candidate)
    check_exact(model, part, feeds)
    fitting = [age for age in ages if age < frames]
    if fitting:
        (psnr,) = _reuse_psnr(model, [part], sample_stream, image, frames, fitting, 4, data_range, threads)
        candidate = dataclasses.replace(candidate, reuse_psnr_db=psnr)
    (candidate,) = _timed(model, [(candidate, part)], feeds, threads)
    if not fitting:
        return candidate
    return dataclasses.replace(candidate, score=_score(candidate, index.specs[image].size_bytes))


class _Finder:
    """Costs and frontiers over one graph."""

    def __init__(self, model: ModelProto, costs: Mapping[str, float]) -> None:
        self.model = model
        self.index = GraphIndex(model)
        missing = [name for name in self.index.names if name not in costs]
        if missing:
            raise InputError(f"the costs lack node {missing[0]!r}; profile this very model")
        self.costs = [costs[name] for name in self.index.names]
        self.alive = sorted(self.index.closure(self.index.outputs) - self.index.constant)
        self.whole_ms = self.cost(self.alive)
        self.fusions = find_fusions(model)

    def cost(self, nodes: Iterable[int]) -> float:
        return sum(self.costs[i] for i in nodes)

    def cacheable(self) -> frozenset[str]:
        """Values that a cut may be made of."""
        index = self.index
        found = []
        for i in self.alive:
            for name in index.nodes[i].output:
                spec = index.specs.get(name)
                fits = spec is not None and spec.dtype in _FLOATS
                if fits and name in self.fusions.survivors and not self.fusions.joins(index, name):
                    found.append(name)
        return frozenset(found)

    def orders(self) -> Iterator[list[int]]:
        """Topological orders of the nodes that compute anything."""
        yield self.alive
        index, alive = self.index, set(self.alive)
        # Every step adds a little, so that an ancestor is strictly farther away even where nodes cost nothing.
        step = max(self.whole_ms, 1e-6) * 1e-6
        below = dict.fromkeys(self.alive, 0.0)
        for i in reversed(self.alive):
            readers = [r for name in index.nodes[i].output for r in index.consumers.get(name, ()) if r in alive]
            below[i] = self.costs[i] + step + max((below[r] for r in readers), default=0.0)
        yield sorted(self.alive, key=lambda i: (-below[i], i))
        above = dict.fromkeys(self.alive, 0.0)
        for i in self.alive:
            makers = [index.producer[name] for name in index.reads[i] if name in index.producer]
            above[i] = self.costs[i] + step + max((above[m] for m in makers if m in alive), default=0.0)
        yield sorted(self.alive, key=lambda i: (above[i], i))

    def frontiers(self) -> Iterator[tuple[str, ...]]:
        """Live values at positions of the orders: made before, read after or given out."""
        index, alive = self.index, set(self.alive)
        outputs = set(index.outputs)
        seen: set[tuple[str, ...]] = set()
        for order in self.orders():
            # Very long graphs are sampled; neighbours differ by one cheap node as a rule.
            stride = max(1, math.ceil(len(order) / _MAX_POSITIONS))
            done: set[int] = set()
            live: dict[str, None] = {}
            for position, i in enumerate(order):
                done.add(i)
                for name in index.nodes[i].output:
                    if name:
                        live[name] = None
                for name in [*index.reads[i], *index.nodes[i].output]:
                    readers = [r for r in index.consumers.get(name, ()) if r in alive]
                    if name in live and name not in outputs and all(r in done for r in readers):
                        del live[name]
                frontier = tuple(live)
                if position % stride == 0 and frontier not in seen:
                    seen.add(frontier)
                    yield frontier

    def choices(self, live: Sequence[str], allowed: frozenset[str], max_tensors: int) -> Iterator[frozenset[str]]:
        """Which of the live values to cache; the others are recomputed."""
        able = [name for name in live if name in allowed]
        # Cheapest to recompute first.
        able.sort(key=lambda name: self.cost(self.index.closure([name])))
        if len(able) <= _ALL_SUBSETS_UP_TO:
            for size in range(1, min(len(able), max_tensors) + 1):
                yield from map(frozenset, itertools.combinations(able, size))
            return
        for first in range(len(able)):
            if len(able) - first <= max_tensors:
                yield frozenset(able[first:])

    def stays_exact(self, chosen: Iterable[str], rest: frozenset[int]) -> bool:
        """Whether both halves keep the kernels of the whole, as far as the graph tells."""
        names = frozenset(chosen)
        if not self.fusions.keeps_layout(self.index, names, rest):
            return False
        parts = (rest, self.index.closure(names))
        return all(
            self.fusions.keeps_kernels(part) and not self.fusions.fuses_anew(self.index, part, names) for part in parts
        )

    def used(self, chosen: Iterable[str], rest: frozenset[int]) -> frozenset[str]:
        """Those of `chosen` that the consumer made of the nodes `rest` reads or gives out."""
        read = {name for i in rest for name in self.index.reads[i]}
        return frozenset(name for name in chosen if name in read or name in self.index.outputs)

    def computes_an_output(self, rest: frozenset[int]) -> bool:
        return any(self.index.producer.get(name) in rest for name in self.index.outputs)

    def candidate(self, chosen: Iterable[str]) -> CutCandidate:
        index = self.index
        names = sorted(chosen, key=lambda name: (index.producer[name], name))
        rest = index.closure(index.outputs, stop=names)
        made = index.closure(names)
        specs = tuple(index.specs[name] for name in names)
        return CutCandidate(
            tensors=specs,
            labels=tuple(index.label(name) for name in names),
            consumer_ms=self.cost(rest),
            producer_ms=self.cost(made),
            whole_ms=self.whole_ms,
            cache_bytes=sum(spec.size_bytes for spec in specs),
            recomputed_ms=self.cost(rest & made),
            reads_input=any(name in index.inputs for i in rest for name in index.reads[i]),
            consumer_nodes=frozenset(index.names[i] for i in rest),
            anchors=self.fusions.anchors(index, names, rest),
        )


def _resolve(index: GraphIndex, spec: str) -> list[str]:
    """Value names for a user's list of value names and module paths."""
    values: dict[str, None] = {}
    for name in (part.strip() for part in spec.split(",")):
        if not name:
            raise InputError(f"the cut {spec!r} holds an empty name; give names joined by commas, or {AUTO!r}")
        if name in index.producer and not index.is_constant(name):
            values[name] = None
            continue
        outputs = index.module_outputs(name)
        if outputs:
            values.update(dict.fromkeys(outputs))
            continue
        if name in index.inputs:
            raise InputError(f"{name!r} is an input of the generator; a cut is made of values computed from inputs")
        if index.is_constant(name):
            raise InputError(f"{name!r} is a constant of the generator; a cut is made of values computed from inputs")
        known = [*index.module_paths(), *(value for value in index.producer if not index.is_constant(value))]
        nearest = difflib.get_close_matches(name, known, n=5, cutoff=0.0)
        raise InputError(f"there is no value or module {name!r} in the generator; the nearest are {', '.join(nearest)}")
    return list(values)


def _completed(finder: _Finder, named: Sequence[str], spec: str) -> frozenset[str]:
    """The named values without those that are not needed, and with the outputs that they do not lead to."""
    index = finder.index
    chosen = list(named)
    unknown = [name for name in chosen if name not in index.specs]
    if unknown:
        raise ExportError(f"value {unknown[0]!r} has no fixed shape, so it cannot be cached; cut at another one")
    for output in index.outputs:
        needs = index.closure([output], stop=chosen)
        touches = any(name in index.reads[i] for i in needs for name in chosen) or output in chosen
        if not touches and finder.cost(needs) > CHEAP_OUTPUT_RATIO * finder.whole_ms and output in index.specs:
            logger.info("output %s does not depend on the cut %s; it is cached as it is", output, spec)
            chosen.append(output)
    rest = index.closure(index.outputs, stop=chosen)
    used = finder.used(chosen, rest)
    idle = [name for name in chosen if name not in used]
    if idle and used:
        logger.info("the consumer does not need %s of the cut %s", ", ".join(idle), spec)
    if not finder.computes_an_output(rest):
        raise ExportError(
            f"the cut {spec!r} does not separate the generator: nothing is left for the consumer; choose an earlier one"
        )
    if not used or finder.cost(rest) > SEPARATES_BELOW * finder.whole_ms:
        share = finder.cost(rest) / finder.whole_ms if finder.whole_ms else 1.0
        raise ExportError(
            f"the cut {spec!r} does not separate the generator: the consumer would still hold {share:.0%} of its cost; "
            "add the tensors that lead past it, e.g. skip connections, or choose one further on"
        )
    return used


def _image_output(index: GraphIndex, name: str | None) -> str:
    if name is not None:
        if name not in index.outputs:
            raise InputError(f"the generator has no output {name!r}; its outputs are {', '.join(index.outputs)}")
        if name not in index.specs:
            raise ExportError(f"output {name!r} has no fixed shape; fix the shapes of the inputs")
        return name
    for output in index.outputs:
        spec = index.specs.get(output)
        if spec is not None and spec.dtype in _FLOATS and len(spec.shape) == 4:
            return output
    raise InputError(f"none of the outputs {', '.join(index.outputs)} is an image (float, four axes); name one")


def _stream_length(index: GraphIndex, stream: Mapping[str, Array]) -> int:
    missing = [name for name in index.inputs if name not in stream]
    if missing:
        raise InputError(f"the sample stream lacks input {missing[0]!r}; it has {', '.join(stream) or 'nothing'}")
    lengths = {name: stream[name].shape[0] if stream[name].ndim else 0 for name in index.inputs}
    frames = max(lengths.values(), default=0)
    wrong = [name for name, length in lengths.items() if length not in (1, frames) or length == 0]
    if wrong:
        raise InputError(f"input {wrong[0]!r} has {lengths[wrong[0]]} frames, but the stream has {frames}")
    return frames


def _pareto_fronts(candidates: Sequence[CutCandidate], limit: int) -> list[CutCandidate]:
    """Best by consumer cost and cache bytes, front after front; a front that is too long is thinned evenly."""
    left: list[CutCandidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.consumer_ms, c.cache_bytes)):
        margin = NEGLIGIBLE_COST_RATIO * candidate.whole_ms
        if not any(
            other.cache_bytes <= candidate.cache_bytes and candidate.consumer_ms - other.consumer_ms < margin
            for other in left
        ):
            left.append(candidate)
    chosen: list[CutCandidate] = []
    while left and len(chosen) < limit:
        front: list[CutCandidate] = []
        for candidate in left:
            if not front or candidate.cache_bytes < front[-1].cache_bytes:
                front.append(candidate)
        room = limit - len(chosen)
        if len(front) > room:
            picks = sorted({round(k) for k in np.linspace(0, len(front) - 1, room)})
            front = [front[k] for k in picks]
            chosen += front
            break
        chosen += front
        taken = {id(candidate) for candidate in front}
        left = [candidate for candidate in left if id(candidate) not in taken]
    return chosen


def _reuse_psnr(
    model: ModelProto,
    parts: Sequence[SplitModels],
    stream: Mapping[str, Array],
    image: str,
    frames: int,
    ages: Sequence[int],
    targets: int,
    data_range: float,
    threads: int,
) -> list[dict[int, float]]:
    """For every split: age -> mean PSNR of the consumer with an old cache."""
    wanted = list(dict.fromkeys(name for part in parts for name in part.origins.values()))
    # All cuts' tensors come from one run of the whole per source frame.
    source = open_session(give_out(model, wanted), threads=threads)
    consumers = [open_session(part.plain, threads=threads) for part in parts]
    totals: list[dict[int, list[float]]] = [{age: [] for age in ages} for _ in parts]
    first = min(max(ages), frames - 1)
    for t in sorted({round(k) for k in np.linspace(first, frames - 1, targets)}):
        feeds = frame_at(stream, t)
        truth = run_session(source, feeds, [image])[image]
        for age in ages:
            old = run_session(source, frame_at(stream, t - age), wanted)
            for part, consumer, total in zip(parts, consumers, totals, strict=True):
                cache = {name: old[origin] for name, origin in part.origins.items()}
                got = run_session(consumer, {**feeds, **cache}, [image])[image]
                total[age].append(_psnr_db(got, truth, data_range))
    return [{age: float(np.mean(values)) for age, values in total.items()} for total in totals]


def _psnr_db(got: Array, want: Array, data_range: float) -> float:
    error = float(np.mean((got.astype(np.float64) - want.astype(np.float64)) ** 2))
    if error == 0.0:
        return PSNR_CAP_DB
    return min(PSNR_CAP_DB, 10.0 * math.log10(data_range**2 / error))


def _timed(
    model: ModelProto, pairs: Sequence[tuple[CutCandidate, SplitModels]], feeds: Mapping[str, Array], threads: int
) -> list[CutCandidate]:
    """The candidates with times of whole models measured in turns instead of sums over nodes."""
    if not pairs:
        return []
    models: dict[str, ModelProto] = {"whole": model}
    arrays = dict(feeds)
    links: dict[str, str] = {}
    for k, (_, part) in enumerate(pairs):
        models[f"producer {k}"], models[f"plain {k}"] = part.producer, part.plain
        links.update(part.origins)
    # Real caches, not zeros: denormals and NaN have costs of their own.
    values = run_session(open_session(give_out(model, list(links.values())), threads=threads), feeds)
    arrays.update({name: values[origin] for name, origin in links.items()})
    times = time_model(models, arrays, threads=threads, repeats=7, warmup=1)
    return [
        dataclasses.replace(
            candidate,
            consumer_ms=times[f"plain {k}"].min_ms,
            producer_ms=times[f"producer {k}"].min_ms,
            whole_ms=times["whole"].min_ms,
        )
        for k, (candidate, _) in enumerate(pairs)
    ]


def _score(candidate: CutCandidate, image_bytes: int) -> float:
    quality = float(np.mean(list(candidate.reuse_psnr_db.values())))
    size = math.log2(1.0 + candidate.cache_bytes / max(image_bytes, 1))
    return quality - SCORE_DB_PER_COST_RATIO * candidate.cost_ratio - SCORE_DB_PER_DOUBLING * size


def _order(candidate: CutCandidate) -> tuple[bool, float, float, tuple[str, ...]]:
    return (not candidate.reads_input, -(candidate.score or 0.0), candidate.consumer_ms, candidate.names)

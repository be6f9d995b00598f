"""Find where to cut a generator: enumerate the sets of tensors that separate deep from shallow, cost and rank them.

A cut is a set of tensors S. The producer is everything that S needs. The consumer is everything that the outputs need
when S and the generator's inputs are given: a skip connection is either in S (cached) or computed anew from the input
of the new frame, whichever side of the trade it is on.

How cuts are found: walk a few topological orders (the graph's own; by distance from the outputs, which advances
parallel branches evenly; by distance from the inputs). At each position some tensors are live, made before it and
read after it. Each of them is cached or recomputed. What leads to the same consumer is the same cut.
"""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

import numpy as np
from onnx import ModelProto

from ...engine.errors import ExportError, InputError
from ...engine.spec import Array
from ..frames.streams import frame_at
from ..graph.index import GraphIndex
from ..graph.profile import profile_nodes, time_model
from ..graph.run import open_session, run_session
from ..graph.surgery import give_out
from .candidate import _FLOATS, AUTO, CutCandidate
from .enumerate import MAX_COST_RATIO, _Finder, enumerate_cuts
from .split import SplitModels, check_exact, split

__all__ = ["Trial", "choose_cut", "rank_cuts"]

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
# Where reuse is as good as it can be: identical frames have infinite PSNR; 60 dB is beyond what 8-bit video can show.
REUSE_PSNR_CAP_DB = 60.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """How cuts are measured.

    Attributes:
        ages: Cache ages in frames; those that the stream is too short for are left out.
        targets: Frames t that quality is measured on, spread over the stream.
        data_range: Peak-to-peak range of the image, 2 for [-1, 1].
        threads: Threads of one operator.
        state: Inputs that are state, see `enumerate_cuts`.
    """

    ages: Sequence[int] = (1, 2, 4)
    targets: int = 4
    data_range: float = 2.0
    threads: int = 1
    state: AbstractSet[str] = frozenset()

    def within(self, frames: int) -> Trial:
        """The same with those ages only that a stream of so many frames has."""
        return replace(self, ages=[age for age in self.ages if age < frames])


DEFAULT_TRIAL = Trial()


def rank_cuts(
    candidates: Sequence[CutCandidate],
    model: ModelProto,
    sample_stream: Mapping[str, Array],
    image_output: str | None = None,
    *,
    keep: int = 8,
    trial: Trial = DEFAULT_TRIAL,
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
        keep: At most so many are returned.
        trial: How they are measured.

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
    fitting = trial.within(frames)
    if not fitting.ages:
        least = min(trial.ages)
        raise InputError(f"the sample stream has {frames} frames, but reuse at age {least} needs {least + 1}")
    readers = _pareto_fronts([c for c in candidates if c.reads_input], 2 * keep)
    finalists = readers + _pareto_fronts([c for c in candidates if not c.reads_input], 2 * keep - len(readers))
    if not finalists:
        raise ExportError("no set of tensors separates a costly deep part from a shallow one; name a cut yourself")
    parts = [split(model, candidate.names, anchors=candidate.anchors) for candidate in finalists]
    quality = _reuse_psnr(model, parts, sample_stream, image, frames, fitting)
    image_bytes = index.specs[image].size_bytes

    def scored(candidate: CutCandidate) -> CutCandidate:
        return replace(candidate, score=_score(candidate, image_bytes))

    measured = [
        (scored(replace(candidate, reuse_psnr_db=psnr)), part)
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
    ranked = [scored(candidate) for candidate in _timed(model, exact, feeds, trial.threads)]
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
    trial: Trial = DEFAULT_TRIAL,
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
        trial: How it is measured.

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
            costs = profile_nodes(model, feeds, threads=trial.threads) if costs is None else costs
            candidates = enumerate_cuts(model, costs, state=trial.state)
            ranked = rank_cuts(candidates, model, sample_stream, image_output, trial=trial)
        if not ranked:
            raise ExportError("there is no ranked cut to choose from; name a cut yourself")
        return ranked[0]
    costs = profile_nodes(model, feeds, threads=trial.threads) if costs is None else costs
    finder = _Finder(model, costs, trial.state)
    candidate = finder.candidate(_completed(finder, named, spec))
    image = _image_output(index, image_output)
    part = split(model, candidate.names, anchors=candidate.anchors)
    check_exact(model, part, feeds)
    fitting = trial.within(frames)
    if fitting.ages:
        (psnr,) = _reuse_psnr(model, [part], sample_stream, image, frames, fitting)
        candidate = replace(candidate, reuse_psnr_db=psnr)
    (candidate,) = _timed(model, [(candidate, part)], feeds, trial.threads)
    if not fitting.ages:
        return candidate
    return replace(candidate, score=_score(candidate, index.specs[image].size_bytes))


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
    chosen = [*chosen, *sorted(finder.with_state(chosen) - set(chosen))]
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
    trial: Trial,
) -> list[dict[int, float]]:
    """For every split: age -> mean PSNR of the consumer with an old cache."""
    wanted = list(dict.fromkeys(name for part in parts for name in part.origins.values()))
    # All cuts' tensors come from one run of the whole per source frame.
    source = open_session(give_out(model, wanted), threads=trial.threads)
    consumers = [open_session(part.plain, threads=trial.threads) for part in parts]
    totals: list[dict[int, list[float]]] = [{age: [] for age in trial.ages} for _ in parts]
    for t in sorted({round(k) for k in np.linspace(max(trial.ages), frames - 1, trial.targets)}):
        feeds = frame_at(stream, t)
        truth = run_session(source, feeds, [image])[image]
        for age in trial.ages:
            old = run_session(source, frame_at(stream, t - age), wanted)
            for part, consumer, total in zip(parts, consumers, totals, strict=True):
                cache = {name: old[origin] for name, origin in part.origins.items()}
                got = run_session(consumer, {**feeds, **cache}, [image])[image]
                total[age].append(_psnr_db(got, truth, trial.data_range))
    return [{age: float(np.mean(values)) for age, values in total.items()} for total in totals]


def _psnr_db(got: Array, want: Array, data_range: float) -> float:
    error = float(np.mean((got.astype(np.float64) - want.astype(np.float64)) ** 2))
    if error == 0.0:
        return REUSE_PSNR_CAP_DB
    return min(REUSE_PSNR_CAP_DB, 10.0 * math.log10(data_range**2 / error))


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
        replace(
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

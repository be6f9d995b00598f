"""Candidates for the cut: sets of tensors along a few topological orders of the graph."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet

from onnx import ModelProto

from ...engine.errors import InputError
from ..graph.fusion import find_fusions
from ..graph.index import GraphIndex
from .candidate import _FLOATS, CutCandidate

__all__ = ["enumerate_cuts"]

# Above this the consumer is no shallow network any more. Above one half, because a U-Net whose consumer computes the
# outermost skip anew keeps the two outermost blocks, which take about half of its time.
MAX_COST_RATIO = 0.65


# Below this nothing is left that could follow the new input: it is showing the last image again.
MIN_COST_RATIO = 0.005


_MAX_POSITIONS = 400


_ALL_SUBSETS_UP_TO = 4


def enumerate_cuts(
    model: ModelProto,
    costs: Mapping[str, float],
    *,
    max_tensors: int = 4,
    max_cost_ratio: float = MAX_COST_RATIO,
    min_cost_ratio: float = MIN_COST_RATIO,
    state: AbstractSet[str] = frozenset(),
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
        state: Inputs that are state: what the consumer would read of them is cached too.

    Returns:
        Candidates, cheapest consumer first; may be empty.

    Raises:
        InputError: If `costs` lacks a node.
    """
    finder = _Finder(model, costs, state)
    allowed = finder.cacheable()
    best: dict[frozenset[int], tuple[int, float, frozenset[str]]] = {}
    tried: set[frozenset[str]] = set()
    for live in finder.frontiers():
        for choice in finder.choices(live, allowed, max_tensors):
            chosen = finder.with_state(choice) if finder.state else choice
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


class _Finder:
    """Costs and frontiers over one graph."""

    def __init__(self, model: ModelProto, costs: Mapping[str, float], state: AbstractSet[str] = frozenset()) -> None:
        self.model = model
        self.index = GraphIndex(model)
        # What the state's inputs are passed on as (`frames.state.carried`): a consumer never reads the state itself.
        self.state = [
            name
            for node, reads in zip(self.index.nodes, self.index.reads, strict=True)
            if not state.isdisjoint(reads)
            for name in node.output
        ]
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

    def with_state(self, chosen: Iterable[str]) -> frozenset[str]:
        """`chosen`, and of the state what the consumer would otherwise have to read."""
        chosen = frozenset(chosen)
        rest = self.index.closure(self.index.outputs, stop=chosen)
        made = {name for i in rest for name in self.index.nodes[i].output}
        return chosen | {name for name in self.state if name in made}

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

"""Branches of a generator: its first layers as they are, the remaining ones with fewer channels.

The remainder is cut out of the graph at a *depth*, and what `channels` finds to belong together is dropped together,
the least important first, so that a branch begins as an approximation of the generator instead of at random.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from ...engine.errors import ExportError, InputError
from ...engine.spec import Array
from ..graph.index import GraphIndex
from ..graph.surgery import copy_model, extract
from .channel_rules import channel_slice, find_channels
from .channels import Atoms, Channels, Edit

__all__ = ["Depth", "GroupWidth", "SlimBranch", "depths", "slim"]

# Fewer channels than this carry no image, whatever the width asked for.
MIN_CHANNELS = 4
# Places that differ by less than this part of the whole's cost are one: an activation lies between them.
SAME_PLACE = 0.02
_FLOATS = ("float32", "float16", "float64")

Kept = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class GroupWidth:
    """How many channels of one group are kept.

    Attributes:
        layer: Name of the layer that makes them first.
        kept: Channels that are kept.
        total: Channels that there were.
    """

    layer: str
    kept: int
    total: int


@dataclass(frozen=True)
class SlimBranch:
    """A generator in two parts, the second one with fewer channels.

    Attributes:
        prefix: Inputs -> depth values, a part of the generator as it is; None where the depth is the inputs.
        rest: Depth values, and those inputs that it reads besides -> outputs.
        depth: Names of the depth values.
        groups: Widths of the remainder's channel groups, in the order of their first layers; also of those kept whole.
    """

    prefix: ModelProto | None
    rest: ModelProto
    depth: tuple[str, ...]
    groups: tuple[GroupWidth, ...]


@dataclass(frozen=True)
class Depth:
    """A place where a branch may leave the generator.

    Attributes:
        values: The values that separate first layers from the rest.
        share: Part of the generator's cost that is spent before, 0 to 1.
        size_bytes: Bytes of the values.
    """

    values: tuple[str, ...]
    share: float
    size_bytes: int


def slim(model: ModelProto, depth: Sequence[str], width: float, *, multiple: int = 8) -> SlimBranch:
    """Keep a generator up to a depth, and part of the channels behind it.

    A group of C channels keeps round(width * C), rounded up to `multiple`, and at least 4; where it is divided into
    parts (GroupNorm, grouped convolutions), equally many of each. Kept are those of largest importance, the L1 norm of
    the filters that make them (Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, section 3.1). At width 1
    the remainder is the generator's own, bit for bit.

    Args:
        model: In normal form, shapes fixed.
        depth: Value names; empty for the inputs: everything is slimmed.
        width: Part of the channels to keep, above 0 and at most 1.
        multiple: Executors are fastest at multiples of 8.

    Raises:
        InputError: If the width or `multiple` is out of range, or a depth value is none of the graph's.
        ExportError: If the depth does not lie between inputs and outputs, or nothing can be slimmed.
    """
    if not 0.0 < width <= 1.0:
        raise InputError(f"the width is {width}; it must be above 0 and at most 1")
    if multiple < 1:
        raise InputError(f"channels cannot be rounded up to a multiple of {multiple}; name a number of 1 or more")
    index = GraphIndex(model)
    for name in depth:
        if name not in index.producer or index.is_constant(name):
            raise InputError(f"there is no value {name!r} computed from the generator's inputs; name another depth")
        if name in index.outputs:
            raise ExportError(f"the depth value {name!r} is an output of the generator; nothing is left to slim")
    needed = index.closure(index.outputs, stop=depth)
    read = {name for i in needed for name in index.reads[i]}
    idle = [name for name in depth if name not in read]
    if idle:
        raise ExportError(f"the generator's outputs do not need the depth value {idle[0]!r}; leave it out")
    prefix = extract(model, index.inputs, depth) if depth else None
    inputs = [name for name in index.inputs if not depth or name in read]
    rest = extract(model, [*depth, *inputs], index.outputs)
    channels = find_channels(rest)
    kept = _choose(channels, width, multiple)
    groups = _widths(channels, kept)
    if width < 1.0 and kept.all():
        raise ExportError(
            f"nothing behind {', '.join(depth) or 'the inputs'} can be slimmed to a width of {width} in multiples of "
            f"{multiple}; choose an earlier depth, a smaller width or multiple"
        )
    return SlimBranch(prefix, _Rewrite(channels, kept).run() if not kept.all() else rest, tuple(depth), groups)


def depths(model: ModelProto, costs: Mapping[str, float], *, max_values: int = 6) -> list[Depth]:
    """Places where branches may leave a generator: few values that separate its first layers from the rest.

    Args:
        model: In normal form, shapes fixed.
        costs: Node name -> cost in any unit, e.g. from `profile.profile_nodes`.
        max_values: At most so many values.

    Returns:
        By share, least first. Of places less than 2 % of the whole apart, the one of the fewest bytes.

    Raises:
        InputError: If `costs` lacks a node.
    """
    index = GraphIndex(model)
    missing = [name for name in index.names if name not in costs]
    if missing:
        raise InputError(f"the costs lack node {missing[0]!r}; profile this very model")
    alive = index.closure(index.outputs) - index.constant
    whole = sum(costs[index.names[i]] for i in alive)
    found: list[Depth] = []
    for live in _frontiers(index, sorted(alive)):
        specs = [index.specs.get(name) for name in live]
        if not 1 <= len(live) <= max_values or set(live) & set(index.outputs):
            continue
        if any(spec is None or spec.dtype not in _FLOATS for spec in specs):
            continue
        before, after = index.closure(live) & alive, index.closure(index.outputs, stop=live) & alive
        spent, twice = (sum(costs[index.names[i]] for i in part) / whole for part in (before, before & after))
        if spent >= SAME_PLACE and twice < SAME_PLACE:
            values = tuple(sorted(live, key=lambda name: (index.producer[name], name)))
            found.append(Depth(values, spent, sum(spec.size_bytes for spec in specs if spec is not None)))
    places: list[list[Depth]] = []
    for depth in sorted(found, key=lambda depth: depth.share):
        if not places or depth.share - places[-1][0].share >= SAME_PLACE:
            places.append([])
        places[-1].append(depth)
    return [min(place, key=lambda depth: (depth.size_bytes, len(depth.values), -depth.share)) for place in places]


def _frontiers(index: GraphIndex, order: Sequence[int]) -> Iterator[tuple[str, ...]]:
    """At every position of the graph's order the live values: made before, read after or given out."""
    last = {name: i for i in order for name in index.reads[i]}
    last.update(dict.fromkeys(index.outputs, len(index.nodes)))
    live: dict[str, None] = {}
    for i in order:
        live.update(dict.fromkeys(name for name in index.nodes[i].output if last.get(name, -1) > i))
        for name in index.reads[i]:
            if last[name] == i:
                live.pop(name, None)
        yield tuple(live)


def _choose(channels: Channels, width: float, multiple: int) -> Kept:
    """For every atom whether it is kept."""
    classes = channels.classes
    count = int(classes.max()) + 1 if classes.size else 0
    importance = np.bincount(classes, channels.importance, count)
    pinned = np.zeros(count, bool)
    pinned[classes[channels.pinned]] = True
    # Channels that occur in the same values, at the same side of every partition, are a cell: of each as many are kept
    # as the width asks for, so that no value and no part of one runs empty.
    marks: list[list[tuple[int, ...]]] = [[] for _ in range(count)]
    for k, atoms in enumerate(_distinct([label.atoms for label in channels.labels.values()])):
        members, times = np.unique(classes[atoms], return_counts=True)
        for member, n in zip(members.tolist(), times.tolist(), strict=True):
            marks[member].append((k, n))
    partitions = _distinct(channels.partitions)
    for k, parts in enumerate(partitions):
        for group, atoms in enumerate(parts):
            for member in classes[atoms].tolist():
                marks[member].append((-1 - k, group))
    cells: dict[tuple[object, ...], list[int]] = {}
    for member in range(count):
        cells.setdefault((bool(pinned[member]), *sorted(marks[member])), []).append(member)
    members_of = list(cells.values())
    cell_of = np.zeros(count, np.int64)
    for k, cell in enumerate(members_of):
        cell_of[cell] = k
    kept = np.zeros(count, bool)
    for problem in _joined(len(members_of), [np.unique(cell_of[classes[parts.reshape(-1)]]) for parts in partitions]):
        sizes = [len(members_of[k]) for k in problem]
        share = 1.0 if any(pinned[members_of[k][0]] for k in problem) else _share(sizes, width, multiple)
        for k, size in zip(problem, sizes, strict=True):
            best = sorted(members_of[k], key=lambda member: (-importance[member], member))
            kept[best[: round(share * size)]] = True
    return kept[classes]


def _share(sizes: Sequence[int], width: float, multiple: int) -> float:
    """The part that every cell of a problem keeps: the least that is wide enough, in multiples, and fits every cell."""
    total, steps = sum(sizes), math.gcd(*sizes)
    wanted = max(round(width * total), min(total, MIN_CHANNELS))
    for k in range(1, steps):
        some = total * k // steps
        if some >= wanted and some % multiple == 0:
            return k / steps
    return 1.0


def _distinct(arrays: Sequence[Atoms]) -> list[Atoms]:
    found = {(array.shape, array.tobytes()): array for array in arrays}
    return list(found.values())


def _joined(count: int, ties: Sequence[Array]) -> list[list[int]]:
    """Numbers below `count` in lists: those tied to each other together."""
    parent = list(range(count))

    def find(k: int) -> int:
        while parent[k] != k:
            k = parent[k]
        return k

    for tie in ties:
        for k in tie.tolist():
            parent[find(k)] = find(int(tie[0]))
    lists: dict[int, list[int]] = {}
    for k in range(count):
        lists.setdefault(find(k), []).append(k)
    return list(lists.values())


def _widths(channels: Channels, kept: Array) -> tuple[GroupWidth, ...]:
    """Kept and total classes by the layer that made them first."""
    totals: dict[str, list[int]] = {}
    _, firsts = np.unique(channels.classes, return_index=True)
    for atom in firsts.tolist():
        if not channels.writers[atom]:
            continue
        entry = totals.setdefault(channels.writers[atom], [0, 0])
        entry[0] += int(kept[atom])
        entry[1] += 1
    return tuple(GroupWidth(layer, some, total) for layer, (some, total) in totals.items())


class _Rewrite:
    """The remainder without the channels that were dropped."""

    def __init__(self, channels: Channels, kept: Array) -> None:
        self.channels = channels
        self.kept = kept
        self.model = copy_model(channels.index.model)
        self.added: dict[str, TensorProto] = {}
        self.taken = {*channels.shapes, *channels.index.initializers}

    def run(self) -> ModelProto:
        channels = self.channels
        for i, node in enumerate(self.model.graph.node):
            self.settings(i, node)
        by_name: dict[str, list[tuple[NodeProto, int, Edit]]] = {}
        reads: dict[str, int] = {}
        for i, node in enumerate(self.model.graph.node):
            for position, name in enumerate(node.input):
                reads[name] = reads.get(name, 0) + 1
                edit = channels.edits.get((i, position))
                if edit is not None:
                    by_name.setdefault(name, []).append((node, position, edit))
        for name, uses in by_name.items():
            self.slice_initializer(name, uses, alone=len(uses) == reads[name])
        graph = self.model.graph
        graph.initializer.extend(self.added.values())
        used = {name for node in graph.node for name in node.input}
        initializers = [tensor for tensor in graph.initializer if tensor.name in used]
        del graph.initializer[:]
        graph.initializer.extend(initializers)
        return self.inferred()

    def slice_initializer(self, name: str, uses: Sequence[tuple[NodeProto, int, Edit]], alone: bool) -> None:
        """Slice an initializer for every node that reads it; its name stays where one slicing serves all."""
        tensor = self.channels.index.initializers[name]
        array = numpy_helper.to_array(tensor)
        results = [self.sliced(array, edit) for _, _, edit in uses]
        same = alone and all(np.array_equal(result, results[0]) for result in results)
        for (node, position, _), result in zip(uses, results, strict=True):
            if same:
                self.replace(name, result)
            elif result.shape != array.shape:
                node.input[position] = self.add(name, result)

    def sliced(self, array: Array, edit: Edit) -> Array:
        if edit.groups > 1:
            (_, rows), (_, columns) = edit.axes
            parts = [
                part[self.kept[row]][:, self.kept[column]]
                for part, row, column in zip(np.split(array, edit.groups), rows, columns, strict=True)
            ]
            return np.concatenate(parts)
        for axis, atoms in edit.axes:
            array = np.compress(self.kept[atoms], array, axis)
        return array

    def settings(self, i: int, node: NodeProto) -> None:
        """Shapes, split sizes and bounds that the node reads, and its number of groups."""
        channels, outputs = self.channels, list(node.output)
        if i in channels.depthwise:
            label = channels.label(node, 0)
            assert label is not None
            for attribute in node.attribute:
                if attribute.name == "group":
                    attribute.i = int(self.kept[label.atoms].sum())
        if not any(self.shrinks(name) for name in (*node.input, *outputs)):
            return
        if node.op_type in ("Reshape", "Expand"):
            target = channels.constant(node, 1)
            shape = self.shape(node.output[0])
            if target is not None and not _gives(target, self.shape(node.input[0]), shape, node):
                node.input[1] = self.add(node.input[1], np.array(shape, np.int64))
        elif node.op_type == "Resize" and len(node.input) > 3 and node.input[3]:
            sizes, label = channels.constant(node, 3), channels.label(node, 0)
            if sizes is not None and label is not None and sizes.size == len(channels.shape(node.input[0])):
                node.input[3] = self.add(node.input[3], np.array(self.shape(node.output[0]), np.int64))
        elif node.op_type == "Split":
            label = channels.label(node, 0)
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0) % len(channels.shape(node.input[0]))
            if label is not None and axis == label.axis:
                sizes = np.array([self.shape(name)[axis] for name in outputs], np.int64)
                named = self.add(node.input[1] if len(node.input) > 1 else f"{node.name}.sizes", sizes)
                del node.input[1:]
                node.input.append(named)
                kept = [a for a in node.attribute if a.name != "num_outputs"]
                del node.attribute[:]
                node.attribute.extend(kept)
        elif node.op_type == "Slice":
            self.slice_bounds(node)

    def slice_bounds(self, node: NodeProto) -> None:
        channels = self.channels
        label = channels.label(node, 0)
        if label is None:
            return
        pick = channel_slice(channels, node, label)
        starts, ends, axes = (channels.constant(node, k) for k in (1, 2, 3))
        if pick is None or starts is None or ends is None:
            return  # such a Slice has pinned its channels
        rank = len(channels.shape(node.input[0]))
        named = [int(a) % rank for a in axes] if axes is not None else list(range(len(starts)))
        if label.axis in named:
            k = named.index(label.axis)
            starts, ends = starts.copy(), ends.copy()
            starts[k] = self.kept[label.atoms[: pick.start]].sum()
            ends[k] = self.kept[label.atoms[: pick.stop]].sum()
            node.input[1] = self.add(node.input[1], starts)
            node.input[2] = self.add(node.input[2], ends)

    def shrinks(self, name: str) -> bool:
        label = self.channels.labels.get(name)
        return label is not None and not self.kept[label.atoms].all()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a value without the dropped channels."""
        shape, label = list(self.channels.shape(name)), self.channels.labels.get(name)
        if label is not None:
            axis = 2 if label.groups else label.axis
            shape[axis] = shape[axis] * int(self.kept[label.atoms].sum()) // len(label.atoms)
        return tuple(shape)

    def replace(self, name: str, array: Array) -> None:
        for tensor in self.model.graph.initializer:
            if tensor.name == name:
                tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))

    def add(self, name: str, array: Array) -> str:
        """Name of an initializer of this content, made where there is none."""
        data = np.ascontiguousarray(array)
        for known, tensor in self.added.items():
            if known.startswith(f"{name}.slim") and np.array_equal(numpy_helper.to_array(tensor), data):
                return known
        k = 1
        while (fresh := f"{name}.slim{k}") in self.taken:
            k += 1
        self.taken.add(fresh)
        self.added[fresh] = numpy_helper.from_array(data, fresh)
        return fresh

    def inferred(self) -> ModelProto:
        """The model with its shapes inferred anew.

        Raises:
            ExportError: If the shapes do not fit: a fault of ours.
        """
        del self.model.graph.value_info[:]
        try:
            return onnx.shape_inference.infer_shapes(self.model, check_type=True, strict_mode=True, data_prop=True)
        except onnx.shape_inference.InferenceError as exc:
            reason = " ".join(str(exc).split())[:300]
            raise ExportError(f"the slim graph's shapes do not fit: {reason}; please report this") from exc


def _gives(target: Array, before: Sequence[int], after: Sequence[int], node: NodeProto) -> bool:
    """Whether a Reshape's or Expand's target still leads to shape `after`."""
    wanted = [int(extent) for extent in target]
    if node.op_type == "Expand":
        return len(wanted) == len(after) and all(w in (1, a) for w, a in zip(wanted, after, strict=True))
    copies = not next((a.i for a in node.attribute if a.name == "allowzero"), 0)
    if len(wanted) != len(after):
        return False
    return all(
        w in (a, -1) or (w == 0 and copies and k < len(before) and before[k] == a)
        for k, (w, a) in enumerate(zip(wanted, after, strict=True))
    )

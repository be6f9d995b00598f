"""How channels go through each operator: what unites them, what makes new ones, what slices which initializer.

A rule returns whether it could follow; where it could not, the channels that the node reads are pinned, and what it
makes has none. So an operator without a rule is safe, and so is a rule that gives up half-way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper

from ...engine.spec import Array
from ..torch_graph.batching import ELEMENTWISE
from .channels import Channels, Label

__all__ = ["channel_slice", "find_channels"]


def find_channels(model: ModelProto) -> Channels:
    """Follow the channels of a graph from its first layers to its outputs, whose own are pinned.

    Args:
        model: In normal form, shapes fixed.

    Raises:
        ExportError: If a shape is not known.
    """
    channels = Channels(model)
    for i, node in enumerate(channels.index.nodes):
        _follow(channels, i, node)
    for name in channels.index.outputs:
        channels.pin(channels.labels.get(name))
    channels.finish()
    return channels


def _follow(c: Channels, i: int, node: NodeProto) -> None:
    labelled = [name for name in c.index.reads[i] if name in c.labels]
    maker = _MAKERS.get(node.op_type)
    if maker is not None and maker(c, i, node):
        return
    if not labelled:
        return
    folded = any(c.labels[name].groups for name in labelled)
    if (not folded or node.op_type in _KEEPS_FOLDS) and _passed_on(c, i, node):
        return
    for name in labelled:
        c.pin(c.labels[name])


def _passed_on(c: Channels, i: int, node: NodeProto) -> bool:
    """Follow an operator that reads labelled values and has no weights."""
    if node.op_type in ELEMENTWISE:
        return _elementwise(c, i, node)
    if node.op_type == "Concat":
        return _concat(c, i, node)
    label, rule = c.label(node, 0), _RULES.get(node.op_type)
    return label is not None and rule is not None and rule(c, i, node, label)


def _attributes(node: NodeProto) -> dict[str, Any]:
    """Attribute name -> value, strings as `str`."""
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


def _filters(weights: Array, axis: int) -> Array:
    """L1 norm of every filter; `axis` is that of the filters."""
    other = tuple(k for k in range(weights.ndim) if k != axis)
    norms: Array = np.abs(weights.astype(np.float64)).sum(other)
    return norms


# Makers: layers with weights. They give a label whether or not their input has one.


def _conv(c: Channels, i: int, node: NodeProto) -> bool:
    weights, transposed = c.constant(node, 1), node.op_type == "ConvTranspose"
    label, groups = c.label(node, 0), int(_attributes(node).get("group", 1))
    has_bias = len(node.input) > 2 and bool(node.input[2])
    if weights is None or (has_bias and not c.is_initializer(node, 2)) or (label and (label.axis != 1 or label.groups)):
        return False
    channels, name = c.shape(node.input[0])[1], c.index.names[i]
    out = c.shape(node.output[0])[1]
    if groups == channels and groups > 1:
        if label is None:
            return False
        made = np.repeat(label.atoms, out // channels)
        # Rows are outputs, or, transposed, inputs with their outputs as columns.
        c.edit(i, 1, (0, label.atoms if transposed else made))
        if not transposed:
            c.weigh(made, _filters(weights, 0))
        c.depthwise.add(i)
    else:
        # Transposed weights are [inputs, outputs of one group].
        norms = (
            np.concatenate([_filters(part, 1) for part in np.split(weights, groups)])
            if transposed
            else _filters(weights, 0)
        )
        made = c.new(out, name, norms)
        read = label.atoms if label is not None else None
        rows, columns = (read, made) if transposed else (made, read)
        if groups == 1:
            c.edit(i, 1, *[(axis, atoms) for axis, atoms in ((0, rows), (1, columns)) if atoms is not None])
        else:
            if read is None:
                # Pinned atoms stand for the channels that are all kept.
                read = c.new(channels, "")
                c.pin(Label(1, read))
                rows, columns = (read, made) if transposed else (made, read)
            parts = [atoms.reshape(groups, -1) for atoms in (rows, columns) if atoms is not None]
            c.partitions += parts
            c.edit(i, 1, (0, parts[0]), (1, parts[1]), groups=groups)
    if has_bias:
        c.edit(i, 2, (0, made))
    return c.give(node, Label(1, made))


def _gemm(c: Channels, i: int, node: NodeProto) -> bool:
    options, weights, label = _attributes(node), c.constant(node, 1), c.label(node, 0)
    has_bias = len(node.input) > 2 and bool(node.input[2])
    if weights is None or options.get("transA", 0) or (has_bias and not c.is_initializer(node, 2)):
        return False
    if label and (label.groups or label.axis != 1):
        return False
    rows, columns = (1, 0) if options.get("transB", 0) else (0, 1)
    made = c.new(weights.shape[columns], c.index.names[i], _filters(weights, columns))
    c.edit(i, 1, (columns, made), *([(rows, label.atoms)] if label else []))
    given = Label(1, made)
    if has_bias and not c.beside(i, 2, given, 2):
        c.pin(given)
    return c.give(node, given)


def _matmul(c: Channels, i: int, node: NodeProto) -> bool:
    weights, label = c.constant(node, 1), c.label(node, 0)
    rank = len(c.shape(node.input[0]))
    if weights is None or weights.ndim != 2 or rank < 2 or (label and label.groups):
        return False
    if label and label.axis != rank - 1:
        # The product runs over another axis; channels stay apart.
        return c.give(node, label)
    made = c.new(weights.shape[1], c.index.names[i], _filters(weights, 1))
    c.edit(i, 1, (1, made), *([(0, label.atoms)] if label else []))
    return c.give(node, Label(rank - 1, made))


def _embedding(c: Channels, i: int, node: NodeProto) -> bool:
    table = c.constant(node, 0)
    if table is None or table.ndim != 2 or _attributes(node).get("axis", 0) % 2 or c.is_initializer(node, 1):
        return False
    if table.dtype.kind != "f" or c.label(node, 1):
        return False
    made = c.new(table.shape[1], c.index.names[i], _filters(table, 1))
    c.edit(i, 0, (1, made))
    return c.give(node, Label(len(c.shape(node.input[1])), made))


# Rules: operators on labelled values. All but the first two are given the label of input 0.


def _elementwise(c: Channels, i: int, node: NodeProto) -> bool:
    rank = len(c.shape(node.output[0]))
    given = [(k, label) for k in range(len(node.input)) if (label := c.label(node, k)) is not None]
    aligned = {k: label.axis + rank - len(c.shape(node.input[k])) for k, label in given}
    # Of several, the one that the others are broadcast to.
    first, main = max(given, key=lambda pair: len(pair[1].atoms))
    main = Label(aligned[first], main.atoms, main.groups)
    followed = not main.groups or main.axis == 1
    for k, label in given:
        if aligned[k] != main.axis or label.groups != main.groups:
            c.pin(label)
            shape = c.shape(node.input[k])
            place = main.axis - rank + len(shape)
            followed = followed and not main.groups and (place < 0 or shape[place] == 1)
        elif len(label.atoms) == len(main.atoms):
            c.unite(main.atoms, label.atoms)
        elif main.groups:
            followed = False
    labelled = {k for k, _ in given}
    for k, name in enumerate(node.input):
        if name and k not in labelled:
            followed = c.beside(i, k, main, rank) and followed
    if not followed:
        return False
    whole = main.groups or c.shape(node.output[0])[main.axis] == len(main.atoms)
    return c.give(node, main) if whole else True


def _per_channel(c: Channels, i: int, node: NodeProto, label: Label) -> bool:
    """Norms over images: one scale, bias and so on for every channel."""
    if label.groups:
        # One scale a group; `Reshape` made sure that groups keep equally many channels.
        return node.op_type == "InstanceNormalization" and c.give(node, label)
    if label.axis != 1 or any(c.label(node, k) for k in range(1, len(node.input))):
        return False
    if not all(c.is_initializer(node, k) for k in range(1, len(node.input))):
        return False
    if node.op_type == "GroupNormalization":
        groups = _attributes(node)["num_groups"]
        c.partitions.append(label.atoms.reshape(groups, -1))
    for k in range(1, len(node.input)):
        # Before operator set 21, GroupNormalization had one scale a group.
        if c.shape(node.input[k]) == (len(label.atoms),):
            c.edit(i, k, (0, label.atoms))
    return c.give(node, label)


def _layer_norm(c: Channels, i: int, node: NodeProto, label: Label) -> bool:
    if len([name for name in node.output if name]) > 1:
        return False
    rank, others = len(c.shape(node.input[0])), [k for k in range(1, len(node.input)) if node.input[k]]
    return all(c.beside(i, k, label, rank) for k in others) and c.give(node, label)


def _spatial(c: Channels, i: int, node: NodeProto, label: Label) -> bool:
    """Pools: channels are those of axis 1, each by itself."""
    one = len([name for name in node.output if name]) == 1
    return label.axis == 1 and one and c.give(node, label)


def _same_extent(c: Channels, i: int, node: NodeProto, label: Label) -> bool:
    """Resize, Pad, Expand, Tile: followed where the channels' axis keeps its extent."""
    before, after = c.shape(node.input[0]), c.shape(node.output[0])
    if any(c.label(node, k) for k in range(1, len(node.input))):
        return False
    axis = label.axis + len(after) - len(before)
    if after[axis] != before[label.axis]:
        return False
    if node.op_type == "Pad" and not _pads_nothing(c, node, label.axis):
        return False
    if node.op_type == "Resize" and len(node.input) > 3 and node.input[3] and "axes" in _attributes(node):
        return False  # its sizes name other axes than the channels', as a rule, but they might not
    if node.op_type == "Expand" and not c.is_initializer(node, 1):
        return False
    return c.give(node, Label(axis, label.atoms))


def _pads_nothing(c: Channels, node: NodeProto, axis: int) -> bool:
    """Whether a Pad leaves an axis alone: equal extents may come from cutting here and adding there."""
    pads, axes = c.constant(node, 1), c.constant(node, 3)
    if pads is None:
        return False
    rank = len(c.shape(node.input[0]))
    padded = [int(a) % rank for a in axes.reshape(-1)] if axes is not None else list(range(rank))
    if axis not in padded:
        return True
    place = padded.index(axis)
    return not pads[place] and not pads[place + len(padded)]


def _reshape(c: Channels, i: int, node: NodeProto, label: Label) -> bool:
    before, after, count = c.shape(node.input[0]), c.shape(node.output[0]), len(label.atoms)
    if node.op_type == "Reshape" and not c.is_initializer(node, 1):
        return False
    if label.groups:
        if len(after) < 2 or after[0] != before[0]:
            return False
        if after[1] == count:
            return c.give(node, Label(1, label.atoms))
        still = len(after) > 2 and after[1] == label.groups and after[2] % (count // label.groups) == 0
        return still and c.give(node, label)
    if count == 1:
        return True  # an axis of one channel keeps it
    outer = int(np.prod(before[: label.axis]))
    readers = {c.index.nodes[r].op_type for r in c.index.consumers.get(node.output[0], ())}
    grouped = bool(readers & {"InstanceNormalization", "ReduceMean"}) and node.output[0] not in c.index.outputs
    if grouped and readers <= _KEEPS_FOLDS and label.axis == 1 and len(after) > 2 and after[0] == before[0]:
        groups = after[1]
        if count % groups == 0 and groups < count and after[2] % (count // groups) == 0:
            c.partitions.append(label.atoms.reshape(groups, -1))
            return c.give(node, Label(1, label.atoms, groups))
    places = [axis for axis in range(len(after)) if int(np.prod(after[:axis])) == outer]
    if not places:
        return False
    axis = places[-1]  # behind axes of extent 1
    extent = after[axis]
    if extent == count:
        return c.give(node, Label(axis, label.atoms))
    if extent % count == 0:  # channels and what follows become one axis, channel after channel
        return c.give(node, Label(axis, np.repeat(label.atoms, extent // count)))
    if count % extent:
        return False
    parts = label.atoms.reshape(extent, -1)
    # An axis is divided, e.g. a vector into an image: what becomes one channel is kept or dropped as a whole.
    for column in range(1, parts.shape[1]):
        c.unite(parts[:, 0], parts[:, column])
    return c.give(node, Label(axis, parts[:, 0].copy()))


def _transpose(c: Channels, i: int, node: NodeProto, label: Label) -> bool:
    order = list(_attributes(node).get("perm", reversed(range(len(c.shape(node.input[0]))))))
    return c.give(node, Label(order.index(label.axis), label.atoms))


def _concat(c: Channels, i: int, node: NodeProto) -> bool:
    rank = len(c.shape(node.output[0]))
    axis = _attributes(node)["axis"] % rank
    labels = [c.label(node, k) for k in range(len(node.input))]
    main = next(label for label in labels if label is not None)
    if any(label is not None and label.axis != main.axis for label in labels):
        return False
    if main.axis != axis:
        for k, label in enumerate(labels):
            if label is not None:
                c.unite(main.atoms, label.atoms)
            elif not c.beside(i, k, main, rank):
                return False
        return c.give(node, main)
    parts = []
    for k, label in enumerate(labels):
        if label is None:
            label = Label(axis, c.new(c.shape(node.input[k])[axis], ""))
            c.pin(label)
        parts.append(label.atoms)
    return c.give(node, Label(axis, np.concatenate(parts)))


def _split(c: Channels, i: int, node: NodeProto, label: Label) -> bool:
    axis = _attributes(node).get("axis", 0) % len(c.shape(node.input[0]))
    start = 0
    for name in node.output:
        extent = c.shape(name)[axis] if name else 0
        atoms = label.atoms[start : start + extent] if axis == label.axis else label.atoms
        start += extent
        if name:
            c.labels[name] = Label(label.axis, atoms)
    return True


def _slice(c: Channels, i: int, node: NodeProto, label: Label) -> bool:
    pick = channel_slice(c, node, label)
    if pick is None or pick.step != 1:
        return False
    return c.give(node, Label(label.axis, label.atoms[pick.start : pick.stop]))


def channel_slice(c: Channels, node: NodeProto, label: Label) -> range | None:
    """Of the channels `label` the ones that a Slice takes, None where its bounds are no constants."""
    shape = c.shape(node.input[0])
    starts, ends, axes, steps = (c.constant(node, k) for k in range(1, 5))
    if starts is None or ends is None or (axes is None and len(node.input) > 3 and node.input[3]):
        return None
    named = [int(a) % len(shape) for a in axes] if axes is not None else list(range(len(starts)))
    if label.axis not in named:
        return range(shape[label.axis])
    k = named.index(label.axis)
    step = int(steps[k]) if steps is not None else 1
    return range(*slice(int(starts[k]), int(ends[k]), step).indices(shape[label.axis]))


def _gather(c: Channels, i: int, node: NodeProto, label: Label) -> bool:
    places = c.constant(node, 1)
    axis = _attributes(node).get("axis", 0) % len(c.shape(node.input[0]))
    if places is None or axis == label.axis:
        return False
    return c.give(node, Label(label.axis + (places.ndim - 1 if axis < label.axis else 0), label.atoms))


def _softmax(c: Channels, i: int, node: NodeProto, label: Label) -> bool:
    axis = _attributes(node).get("axis", -1) % len(c.shape(node.input[0]))
    return axis != label.axis and c.give(node, label)


def _reduce(c: Channels, i: int, node: NodeProto, label: Label) -> bool:
    axes, options, rank = c.constant(node, 1), _attributes(node), len(c.shape(node.input[0]))
    if axes is None or not axes.size:  # all axes, or none: rare, and told apart by an attribute
        return False
    reduced = sorted({int(a) % rank for a in axes.reshape(-1)})
    if label.groups:
        # A mean over everything behind the groups is one number a group.
        return reduced == list(range(2, rank)) and node.op_type == "ReduceMean"
    if label.axis in reduced:
        # A mean over fewer channels is still a mean; a sum would shrink with them.
        return node.op_type in ("ReduceMean", "ReduceMax", "ReduceMin")
    keep = options.get("keepdims", 1)
    axis = label.axis - (0 if keep else sum(a < label.axis for a in reduced))
    return c.give(node, Label(axis, label.atoms))


def _grid_sample(c: Channels, i: int, node: NodeProto, label: Label) -> bool:
    return label.axis == 1 and c.label(node, 1) is None and c.give(node, label)


def _depth_to_space(c: Channels, i: int, node: NodeProto, label: Label) -> bool:
    options = _attributes(node)
    if label.axis != 1:
        return False
    area = options["blocksize"] ** 2
    # The channels that become one: neighbours in mode CRD, a stride apart in mode DCR.
    one = label.atoms.reshape(-1, area) if options.get("mode", "DCR") == "CRD" else label.atoms.reshape(area, -1).T
    for column in range(1, area):
        c.unite(one[:, 0], one[:, column])
    return c.give(node, Label(1, one[:, 0].copy()))


def _space_to_depth(c: Channels, i: int, node: NodeProto, label: Label) -> bool:
    options = _attributes(node)
    if label.axis != 1:
        return False
    area, crd = options["blocksize"] ** 2, options.get("mode", "DCR") == "CRD"
    return c.give(node, Label(1, np.repeat(label.atoms, area) if crd else np.tile(label.atoms, area)))


_MAKERS: dict[str, Callable[[Channels, int, NodeProto], bool]] = {
    "Conv": _conv,
    "ConvTranspose": _conv,
    "Gather": _embedding,
    "Gemm": _gemm,
    "MatMul": _matmul,
}
_RULES: dict[str, Callable[[Channels, int, NodeProto, Label], bool]] = {
    "AveragePool": _spatial,
    "BatchNormalization": _per_channel,
    "DepthToSpace": _depth_to_space,
    "Expand": _same_extent,
    "Flatten": _reshape,
    "Gather": _gather,
    "GlobalAveragePool": _spatial,
    "GlobalMaxPool": _spatial,
    "GridSample": _grid_sample,
    "GroupNormalization": _per_channel,
    "InstanceNormalization": _per_channel,
    "LayerNormalization": _layer_norm,
    "LogSoftmax": _softmax,
    "MaxPool": _spatial,
    "Pad": _same_extent,
    "ReduceL2": _reduce,
    "ReduceMax": _reduce,
    "ReduceMean": _reduce,
    "ReduceMin": _reduce,
    "ReduceSum": _reduce,
    "Reshape": _reshape,
    "Resize": _same_extent,
    "Slice": _slice,
    "Softmax": _softmax,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _reshape,
    "Tile": _same_extent,
    "Transpose": _transpose,
    "Unsqueeze": _reshape,
}
_KEEPS_FOLDS = frozenset({*ELEMENTWISE, "InstanceNormalization", "ReduceMean", "Reshape"})

"""Which channels of a graph belong together: what must be dropped with what.

Every channel that a layer makes is an *atom*. A *label* says where a value's channels are: an axis, and one atom for
every place along it. Element-wise operators unite the atoms of their inputs, convolutions read some and make new ones,
and what initializers are sliced by is written down as an *edit*. Channels that an operator mixes or hides in a way that
is not followed here are *pinned*: all of them are kept. A value without a label keeps its extents.

Two conditions go beyond "these are one": a *partition* asks that each part of a value keeps equally many channels
(GroupNorm, grouped convolutions), and a value's segments, whoever made them, must not run empty (see `slim`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, numpy_helper

from ...engine.errors import ExportError
from ...engine.spec import Array
from ..graph.index import GraphIndex

__all__ = ["Atoms", "Channels", "Edit", "Label"]

Atoms = npt.NDArray[np.int64]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Label:
    """Where a value's channels are.

    Attributes:
        axis: Their axis.
        atoms: One for each place along it; a folded label has them all.
        groups: Where not 0, the value is *folded*: axis 1 holds so many groups, and each group's channels come first in
            what follows (what GroupNorm is exported as).
    """

    axis: int
    atoms: Atoms
    groups: int = 0


@dataclass(frozen=True)
class Edit:
    """How an initializer that a node reads is sliced.

    Attributes:
        axes: Axis -> its atoms.
        groups: Where above 1, rows (axis 0) and columns (axis 1) go together group by group: a grouped convolution's
            weights, whose columns are other channels in every group. Both are given as [groups, channels of one].
    """

    axes: tuple[tuple[int, Atoms], ...]
    groups: int = 1


class Channels:
    """The channels of one graph.

    Args:
        model: In normal form, shapes fixed.

    Attributes:
        labels: Value name -> label, for the values whose channels are followed.
        edits: (node, input position) -> how the initializer read there is sliced.
        partitions: Atoms [groups, channels of one] of values that keep equally many in each group.
        importance: For every atom, summed over its writers: L1 norm of the filter that makes it.
        writers: For every atom the name of the layer that makes it; empty for those that stand for others.
        pinned: Whether each atom is pinned.
        depthwise: Nodes whose number of groups is that of their channels.
    """

    def __init__(self, model: ModelProto) -> None:
        self.index = GraphIndex(model)
        self.shapes: dict[str, Shape] = {name: tuple(t.dims) for name, t in self.index.initializers.items()}
        self.shapes.update({name: spec.shape for name, spec in self.index.specs.items()})
        self.labels: dict[str, Label] = {}
        self.edits: dict[tuple[int, int], Edit] = {}
        self.partitions: list[Atoms] = []
        self.depthwise: set[int] = set()
        self.writers: list[str] = []
        self._importance: list[Array] = []
        self._parent: list[int] = []
        self._pinned: list[Atoms] = []
        self.classes: Atoms = np.zeros(0, np.int64)
        """Atom -> number of its class: the atoms that are kept or dropped together."""
        self.importance: Array = np.zeros(0)
        self.pinned: npt.NDArray[np.bool_] = np.zeros(0, bool)

    def finish(self) -> None:
        """Number the classes, once every node was followed."""
        roots = np.array([self._find(a) for a in range(len(self._parent))], np.int64)
        self.classes = np.unique(roots, return_inverse=True)[1].astype(np.int64) if roots.size else roots
        self.importance = np.concatenate(self._importance) if self._importance else np.zeros(0)
        self.pinned = np.zeros(len(roots), bool)
        for atoms in self._pinned:
            self.pinned[atoms] = True

    def constant(self, node: NodeProto, position: int) -> Array | None:
        """Value of an initializer that a node reads; None for other values and inputs left out."""
        if position >= len(node.input):
            return None
        tensor = self.index.initializers.get(node.input[position])
        return None if tensor is None else numpy_helper.to_array(tensor)

    def label(self, node: NodeProto, position: int) -> Label | None:
        """Label of an input, None where it has none or is left out."""
        return self.labels.get(node.input[position]) if position < len(node.input) else None

    def shape(self, name: str) -> Shape:
        """Traced shape of a value.

        Raises:
            ExportError: If it is not known.
        """
        if name not in self.shapes:
            raise ExportError(f"value {name!r} has no fixed shape; fix the shapes of the graph's inputs")
        return self.shapes[name]

    def new(self, count: int, writer: str, importance: Array | None = None) -> Atoms:
        """Atoms that a layer makes."""
        first = len(self._parent)
        self._parent += range(first, first + count)
        self.writers += [writer] * count
        self._importance.append(np.zeros(count) if importance is None else importance.astype(np.float64))
        return np.arange(first, first + count)

    def weigh(self, atoms: Atoms, importance: Array) -> None:
        """Another layer of filters on atoms that exist: a depthwise convolution's."""
        extra = self.new(len(atoms), "", importance)
        self.unite(atoms, extra)

    def unite(self, a: Atoms, b: Atoms) -> None:
        """Atoms at the same place become one."""
        if a is b:
            return
        for x, y in zip(a.reshape(-1).tolist(), b.reshape(-1).tolist(), strict=True):
            first, second = self._find(x), self._find(y)
            if first != second:
                # The older one leads: it has a writer's name.
                self._parent[max(first, second)] = min(first, second)

    def _find(self, atom: int) -> int:
        parent = self._parent
        while parent[atom] != atom:
            parent[atom] = parent[parent[atom]]
            atom = parent[atom]
        return atom

    def pin(self, label: Label | None) -> None:
        """Keep all channels of a value."""
        if label is not None:
            self._pinned.append(label.atoms)

    def give(self, node: NodeProto, label: Label) -> bool:
        """Label the node's first output."""
        self.labels[node.output[0]] = label
        return True

    def edit(self, i: int, position: int, *axes: tuple[int, Atoms], groups: int = 1) -> None:
        """Slice the initializer that node `i` reads at `position`."""
        self.edits[i, position] = Edit(tuple(axes), groups)

    def is_initializer(self, node: NodeProto, position: int) -> bool:
        return position < len(node.input) and node.input[position] in self.index.initializers

    def beside(self, i: int, position: int, label: Label, rank: int) -> bool:
        """Whether an operand without a label goes with `label` by broadcasting; an initializer is sliced to."""
        node = self.index.nodes[i]
        shape = self.shape(node.input[position])
        lead = rank - len(shape)
        if label.groups:
            # Channels lie in the axes behind the groups.
            return all(extent == 1 for axis, extent in enumerate(shape) if axis + lead >= 2)
        axis = label.axis - lead
        if axis < 0 or shape[axis] == 1:
            return True
        if shape[axis] != len(label.atoms) or not self.is_initializer(node, position):
            return False
        self.edit(i, position, (axis, label.atoms))
        return True

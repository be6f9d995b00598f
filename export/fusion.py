"""What ONNX Runtime makes of a graph: which nodes become one kernel, and which kernels depend on the memory layout.

A cut must not change this, or its parts round differently from the whole. Two things matter on the CPU. Nodes that are
fused must stay on one side. And a convolution takes the addition that follows it into its kernel only if the other
summand is in the blocked NCHWc layout: inside the whole it is, but a cached tensor enters the consumer in plain NCHW.
Such a tensor is *anchored*: a 1x1 max pooling, which changes no value, makes the executor block it first.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime as ort
from onnx import ModelProto

from .graph import GraphIndex
from .run import open_session

__all__ = ["PROFILE_LEVEL", "Fusions", "find_fusions", "fused_group"]

# At ENABLE_ALL the NCHWc layout renames most convolutions; at EXTENDED nearly all of the time keeps its node's name.
PROFILE_LEVEL = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
_NCHWC = "com.microsoft.nchwc"
# These are blocked whatever the layout of their input.
_BLOCKING = frozenset({"Conv", "MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"})
# These have another kernel in the blocked layout, which may round differently.
_LAYOUT_KERNELS = frozenset({"BatchNormalization", "Resize", "Upsample"})


@dataclass(frozen=True)
class Fusions:
    """Fusions of one model, by node index of its `GraphIndex`.

    Attributes:
        survivors: Values that still exist after fusion; a cut elsewhere would break up a kernel.
        groups: Sets of nodes that become one kernel each.
        blocked: Nodes whose kernel, in the whole, is the one for the blocked layout.
    """

    survivors: frozenset[str]
    groups: tuple[frozenset[int], ...]
    blocked: frozenset[int]

    def keeps_kernels(self, part: frozenset[int]) -> bool:
        """Whether `part` holds every fused group completely or not at all."""
        return all(group <= part or not group & part for group in self.groups)

    def anchors(self, index: GraphIndex, cut: Iterable[str], rest: frozenset[int]) -> tuple[str, ...]:
        """Those of the cut's tensors that the consumer, made of the nodes `rest`, must block first."""
        names = set(cut)
        found: set[str] = set()
        for node in self.blocked & rest:
            todo, seen = list(index.reads[node]), set()
            while todo:
                value = todo.pop()
                if value in seen:
                    continue
                seen.add(value)
                if value in names:
                    found.add(value)
                    continue
                maker = index.producer.get(value)
                if maker is not None and index.nodes[maker].op_type not in _BLOCKING:
                    todo.extend(index.reads[maker])
        return tuple(sorted(found))


def find_fusions(model: ModelProto) -> Fusions:
    """Ask ONNX Runtime what it fuses, by its optimised graphs.

    Raises:
        ExportError: If ONNX Runtime refuses the model.
    """
    index = GraphIndex(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        open_session(model, threads=1, level=PROFILE_LEVEL, optimized_path=path)
        fused = GraphIndex(onnx.load(path, load_external_data=False))
        path.unlink()
        open_session(model, threads=1, optimized_path=path)
        blocked = GraphIndex(onnx.load(path, load_external_data=False))
    groups = [fused_group(index, fused, position) for position in range(len(fused.nodes))]
    return Fusions(
        survivors=frozenset(fused.producer),
        groups=tuple(group for group in groups if len(group) > 1),
        blocked=frozenset(_blocked(index, fused, blocked)),
    )


def fused_group(index: GraphIndex, fused: GraphIndex, position: int) -> frozenset[int]:
    """Nodes of the original that node `position` of the optimised graph stands for; empty for one that was inserted."""
    outputs = [value for value in fused.nodes[position].output if value in index.producer]
    # What survives is another kernel's result, also where this one reads values of the optimiser's own.
    stop = (set(fused.producer) | set(fused.reads[position])) - set(outputs)
    return index.closure(outputs, stop=stop) - index.constant


def _blocked(index: GraphIndex, fused: GraphIndex, blocked: GraphIndex) -> Iterable[int]:
    # The layout pass names a convolution after the value that it makes.
    sums = {
        node.name.partition("_nchwc")[0]
        for node in blocked.nodes
        if node.domain == _NCHWC and node.op_type == "Conv" and len(node.input) >= 4 and node.input[3]
    }
    for node in fused.nodes:
        value = node.output[0]
        maker = index.producer.get(value)
        if maker is None:
            continue
        if value in sums:
            yield from (r for r in index.consumers.get(value, ()) if index.nodes[r].op_type in ("Add", "Sum"))
        still = blocked.producer.get(value)
        same = still is not None and blocked.nodes[still].op_type == node.op_type
        if node.op_type in _LAYOUT_KERNELS and not same:
            yield maker

"""What ONNX Runtime makes of a graph: which nodes become one kernel, and which kernels depend on the memory layout.

A cut must not change this, or its parts round differently from the whole. Two things matter on the CPU. Nodes that are
fused must stay on one side. And a convolution takes the addition that follows it into its kernel only if the other
summand is in the blocked NCHWc layout: inside the whole it is, but a cached tensor enters the consumer in plain NCHW.
Such a tensor is *anchored*: a 1x1 max pooling, which changes no value, makes the executor block it first.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime as ort
from onnx import ModelProto, TensorProto, helper

from .index import GraphIndex
from .run import open_session

__all__ = ["PROFILE_LEVEL", "Fusions", "block_channels", "find_fusions", "fused_group"]

# At ENABLE_ALL the NCHWc layout renames most convolutions; at EXTENDED nearly all of the time keeps its node's name.
PROFILE_LEVEL = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
_NCHWC = "com.microsoft.nchwc"
# What the optimiser calls the float32 form of a float16 value between kernels that there are in float32 only.
_UNROUNDED = "InsertedPrecisionFreeCast_"
# These are blocked whatever the layout of their input.
_BLOCKING = frozenset({"Conv", "MaxPool", "AveragePool"})
# These have another kernel in the blocked layout, which may round differently.
_LAYOUT_KERNELS = frozenset({"BatchNormalization", "GlobalAveragePool", "GlobalMaxPool", "Resize", "Upsample"})
# These are blocked where they read blocked values, and also where they read an input of the graph itself.
_GLOBAL_POOLS = frozenset({"GlobalAveragePool", "GlobalMaxPool"})
# Pairs that become one kernel where nothing else reads the value between them.
_FUSES = frozenset(
    {
        ("Add", "Erf"),
        ("Add", "Gelu"),
        ("Add", "LayerNormalization"),
        ("ConvTranspose", "BatchNormalization"),
        ("Div", "MatMul"),
        ("Gemm", "LeakyRelu"),
        ("Gemm", "Relu"),
        ("Gemm", "Sigmoid"),
        ("Gemm", "Sum"),
        ("Gemm", "Tanh"),
        ("MatMul", "Add"),
        ("MatMul", "BatchNormalization"),
        ("MatMul", "Div"),
        ("MatMul", "Mul"),
        ("Mul", "MatMul"),
        ("Pad", "AveragePool"),
        ("Pad", "Conv"),
        ("Pad", "MaxPool"),
        ("Sigmoid", "Mul"),
    }
)
# What a convolution's kernel takes in from behind it.
_AFTER_CONV = frozenset(
    {"Add", "BatchNormalization", "Clip", "HardSigmoid", "LeakyRelu", "Mul", "Relu", "Sigmoid", "Sum", "Tanh"}
)
# These move values and compute none; the optimiser cancels them, and looks for pairs again.
_MOVES = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


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

    def keeps_layout(self, index: GraphIndex, cut: Iterable[str], rest: frozenset[int]) -> bool:
        """Whether the consumer made of the nodes `rest` can have the layout kernels of the whole.

        The anchor blocks a tensor only if its channels fill whole blocks. And a global pooling that is plain in the
        whole is blocked where it reads the consumer's input.
        """
        names = set(cut)
        if any(not _fills_blocks(index, name) for name in self.anchors(index, names, rest)):
            return False
        for node in rest - self.blocked:
            read = index.reads[node]
            if index.nodes[node].op_type in _GLOBAL_POOLS and read[0] in names and _fills_blocks(index, read[0]):
                return False
        return True

    def convolves(self, index: GraphIndex, node: int) -> bool:
        """Whether the node's kernel is, or in the blocked layout may be, a convolution.

        That holds for a normalisation and for a scale by channel as well, and for what a convolution has taken in.
        """
        found = index.nodes[node]
        if found.op_type in ("Conv", "BatchNormalization"):
            return True
        if found.op_type == "Mul" and any(index.is_constant(name) for name in found.input):
            return True
        return any(index.nodes[k].op_type == "Conv" for group in self.groups if node in group for k in group)

    def joins(self, index: GraphIndex, value: str) -> bool:
        """Whether an addition that reads `value` is part of the kernel that makes it; graphs do not show it."""
        maker = index.producer[value]
        read = any(reader in self.blocked for reader in index.consumers.get(value, ()))
        return read and self.convolves(index, maker)

    def fuses_anew(self, index: GraphIndex, part: frozenset[int], chosen: Iterable[str]) -> bool:
        """Whether a value loses all readers but one in `part`, and that one would then join its maker's kernel.

        Args:
            index: The whole.
            part: Nodes of one half.
            chosen: The cut's tensors, which a half gives out.
        """
        given_out = {*chosen, *index.outputs}
        for i in part:
            if index.nodes[i].op_type in _MOVES:
                continue
            lost, last = False, i
            while True:
                names = [name for name in index.nodes[last].output if name]
                readers = [r for name in names for r in index.consumers.get(name, ())]
                left = [r for r in readers if r in part]
                if len(left) != 1 or not given_out.isdisjoint(names):
                    break
                lost = lost or len(readers) > 1
                last = left[0]
                if index.nodes[last].op_type not in _MOVES:
                    if lost and self._fuse(index, i, last):
                        return True
                    break
        return False

    def _fuse(self, index: GraphIndex, first: int, second: int) -> bool:
        pair = (index.nodes[first].op_type, index.nodes[second].op_type)
        return pair in _FUSES or (pair[1] in _AFTER_CONV and self.convolves(index, first))


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
        survivors=frozenset(name for name in fused.producer if not _read_unrounded(fused, name)),
        groups=tuple(group for group in groups if len(group) > 1),
        blocked=frozenset(_blocked(index, fused, blocked)),
    )


def fused_group(index: GraphIndex, fused: GraphIndex, position: int) -> frozenset[int]:
    """Nodes of the original that node `position` of the optimised graph stands for; empty for one that was inserted."""
    outputs = [value for value in fused.nodes[position].output if value in index.producer]
    # What survives is another kernel's result, also where this one reads values of the optimiser's own.
    stop = (set(fused.producer) | set(fused.reads[position])) - set(outputs)
    return index.closure(outputs, stop=stop) - index.constant


@functools.cache
def block_channels() -> int | None:
    """Channels of one block of the NCHWc layout on this processor; None where ONNX Runtime has no such layout here."""
    for channels in (4, 8, 16, 32):
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, channels, 2, 2))
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, channels, 2, 2))
        node = helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[1, 1])
        opset = helper.make_opsetid("", 20)
        model = helper.make_model(helper.make_graph([node], "probe", [x], [y]), opset_imports=[opset], ir_version=10)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "probe.onnx"
            open_session(model, threads=1, optimized_path=path)
            if any(node.domain == _NCHWC for node in onnx.load(path).graph.node):
                return channels
    return None


def _fills_blocks(index: GraphIndex, value: str) -> bool:
    block, spec = block_channels(), index.specs.get(value)
    return block is not None and spec is not None and len(spec.shape) == 4 and spec.shape[1] % block == 0


def _read_unrounded(fused: GraphIndex, value: str) -> bool:
    """Whether kernels read a float16 value before it is rounded: they compute in float32, it is only given out."""
    maker = fused.producer.get(_UNROUNDED + value)
    return maker is not None and value not in fused.reads[maker]


def _blocked(index: GraphIndex, fused: GraphIndex, blocked: GraphIndex) -> Iterable[int]:
    # The layout pass names a convolution after the value that it makes, with what it was before.
    sums = {
        name.removesuffix(kind)
        for node in blocked.nodes
        if node.domain == _NCHWC and node.op_type == "Conv" and len(node.input) >= 4 and node.input[3]
        for name in [node.name.partition("_nchwc")[0]]
        for kind in ("", "_bn", "_mul")
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

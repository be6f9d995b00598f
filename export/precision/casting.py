"""Rewrite a float32 graph to compute in float16 or bfloat16, with some nodes kept in float32.

Why not ONNX Runtime's float16 converter: it rounds between two kept nodes (so that a region kept because it overflows
still overflows), clamps what is out of range without a word, appends its casts at the end of the graph, and knows no
bfloat16. Here every value has the type that its node computes in, a value read in another type is cast once, and what
an operator admits is read from ONNX's own schemas.

Three rules keep nodes in float32 without being asked:

- *coordinates*: a GridSample, the arithmetic that makes its grid, and what splits a position into a whole number and a
  fraction. Positions in [-1, 1] have 11 bits in float16: steps of 1/16 pixel at the border of 256 pixels, 1/8 in 512.
  Convolutions end the walk back: what they make are offsets, small and so exact enough.
- *constant*: the node reads a constant that the type cannot hold: beyond its range, or so small that it is lost.
- *type*: the operator does not admit the type (by schema, or by TensorRT), or its result's type is an attribute.

ONNX Runtime's CPU has hardly any kernel in these types: it computes float16 graphs in float32 and leaves out the
rounding between nodes, so that it shows neither their error nor their overflow. `emulated` is the graph to measure on:
float32, with each value rounded as the rewritten graph rounds it.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, defs, helper, numpy_helper, version_converter

from ...engine.errors import ExportError
from ...engine.spec import Array
from ..graph.index import SCOPES_KEY, GraphIndex, node_reads, subgraphs, unused_name
from ..graph.surgery import copy_model, rename_reads

__all__ = ["Casting", "HalfType", "Reason", "cast_model", "coordinate_values", "elem_types", "emulated"]

HalfType = Literal["float16", "bfloat16"]
Reason = Literal["asked", "coordinates", "constant", "type"]

_ELEM = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16, "float32": TensorProto.FLOAT}
_ONNX_NAME = {"float16": "tensor(float16)", "bfloat16": "tensor(bfloat16)"}
_LARGEST = {"float16": 65504.0, "bfloat16": 3.3895314e38}
# Relative error of a constant, root mean square, from which on it counts as lost. A normal number's is at most 2^-9
# (bfloat16); subnormal float16 numbers reach this when 7 of their 10 bits are gone.
_LOST = 2.0**-7
# The first operator set in which convolutions, poolings and norms admit bfloat16.
_BFLOAT16_OPSET = 22
# TensorRT-RTX 1.7 builds neither in bfloat16: "could not infer output types", "only FLOAT, HALF or INT8".
_NOT_BFLOAT16 = frozenset({"ConvTranspose", "HardSwish"})
# What may stand between the making of a position and the grid that is read at it: element-wise and moving operators.
_COORDINATE_OPS = frozenset(
    "Abs Add AveragePool Cast Ceil Clip Concat Cos DepthToSpace Div Expand Flatten Floor Gather GatherElements "  # noqa: SIM905
    "GatherND GridSample Identity Max MaxPool Mean Min Mod Mul Neg Pad Pow Reciprocal ReduceMean Reshape Resize Round "
    "ScatterND Sin Slice SpaceToDepth Split Sqrt Squeeze Sub Sum Tile Transpose Unsqueeze Where".split()
)
_WHOLE_NUMBERS = frozenset({"Ceil", "Floor", "Mod", "Round"})
# What moves values and makes none: its results are as round as what it reads.
_MOVING = frozenset(
    "Abs Clip Concat DepthToSpace Expand Flatten Gather GatherElements GatherND Identity Max MaxPool Min Neg Pad Relu "  # noqa: SIM905
    "Reshape ScatterND Slice SpaceToDepth Split Squeeze Tile Transpose Unsqueeze Where".split()
)


@dataclass(frozen=True)
class Casting:
    """A rewritten graph.

    Attributes:
        model: Passes the checker; node names, scopes and value names are those of the original, casts are added.
        kept: Node name -> why it computes in float32. Nodes without float32 tensors are not listed.
        constants: Node name -> one clause on the constant that keeps it in float32.
    """

    model: ModelProto
    kept: Mapping[str, Reason]
    constants: Mapping[str, str]


def cast_model(
    model: ModelProto,
    to: HalfType,
    *,
    keep: Collection[str] = (),
    io: Mapping[str, str] | None = None,
    coordinates: Iterable[str] = (),
) -> Casting:
    """Rewrite a graph so that it computes in `to` wherever that is possible and wise.

    Args:
        model: In normal form (`graph.normalise`), weights included.
        to: The type to compute in.
        keep: Names of nodes to keep in float32 (`GraphIndex.names`).
        io: Graph input or output -> ``"float16"``, for those float32 ones that are to change their type; the others
            keep it.
        coordinates: Values that carry coordinates besides those that `coordinate_values` finds.

    Raises:
        ExportError: If the result is not valid ONNX: a fault of ours, or a model that was none before.
    """
    if to == "bfloat16":
        model = _raised(model, _BFLOAT16_OPSET)
    index = GraphIndex(model)
    rewrite = _Rewrite(index, to, frozenset(keep), io or {}, coordinate_values(index, coordinates))
    result = rewrite.run()
    try:
        onnx.checker.check_model(result, full_check=result.ByteSize() < 2**31)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as exc:
        raise ExportError(f"the graph is not valid ONNX in {to}: {' '.join(str(exc).split())[:300]}") from exc
    return Casting(result, rewrite.kept, rewrite.constants)


def coordinate_values(index: GraphIndex, more: Iterable[str] = ()) -> frozenset[str]:
    """Values that are positions, or that positions are computed from by plain arithmetic, inputs included.

    Args:
        index: The graph.
        more: Values known to carry coordinates from elsewhere, e.g. outputs that another graph samples at.
    """
    todo = [node.input[1] for node in index.nodes if node.op_type == "GridSample"]
    # x - floor(x) is what remains of a position in pixels: all of its digits are those that float16 has lost.
    whole = [node for node in index.nodes if node.op_type in _WHOLE_NUMBERS]
    todo += [name for node in whole for name in node.output]
    todo += [
        name
        for node in whole
        for reader in index.consumers.get(node.output[0], ())
        for name in index.nodes[reader].output
        if set(node.input) & set(index.reads[reader])
    ]
    todo += [name for name in more if name in index.producer or name in index.inputs]
    found: set[str] = set()
    while todo:
        value = todo.pop()
        if value in found or value in index.initializers:
            continue
        producer = index.producer.get(value)
        if producer is None:
            found.add(value)
        elif index.nodes[producer].op_type in _COORDINATE_OPS:
            found.add(value)
            todo.extend(index.reads[producer])
    return frozenset(found)


def elem_types(model: ModelProto) -> dict[str, int]:
    """ONNX element type of every value of a known tensor type, initializers included."""
    graph = model.graph
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in itertools.chain(graph.value_info, graph.input, graph.output)
        if value.type.HasField("tensor_type")
    }
    types.update({tensor.name: tensor.data_type for tensor in graph.initializer})
    return types


def emulated(model: ModelProto) -> ModelProto:
    """The float32 graph that rounds every value as `model` does, for executors without kernels in its types.

    Operators accumulate in float32 and round their result, as tensor cores do. Inputs and outputs keep their types.
    What a dequantisation gives is not rounded: executors take it into the kernel that reads it.

    Args:
        model: From `cast_model`.
    """
    types = elem_types(model)
    halves = {name: kind for name, kind in types.items() if kind in (TensorProto.FLOAT16, TensorProto.BFLOAT16)}
    if not halves:
        return copy_model(model)
    fresh = copy_model(model)
    graph = fresh.graph
    inputs = {value.name: value for value in graph.input}
    outputs = {value.name for value in graph.output}
    for tensor in graph.initializer:
        if tensor.name in halves:
            tensor.CopyFrom(numpy_helper.from_array(_array(tensor).astype(np.float32), tensor.name))
    taken = set(types) | {name for node in model.graph.node for name in node.output}

    # Inside, a half value goes by its own name in float32; only at the border does the name hold the half itself.
    border = {name: unused_name(f"{name}.rounded", taken) for name in halves if name in inputs or name in outputs}

    def rounded(source: str, value: str) -> Iterator[NodeProto]:
        half = value if value in outputs else unused_name(f"{value}.half", taken)
        yield _cast(source, half, halves[value])
        yield _cast(half, border.get(value, value), TensorProto.FLOAT)

    nodes = [_cast(name, border[name], TensorProto.FLOAT) for name in inputs if name in border]
    for node in model.graph.node:
        copy = NodeProto()
        copy.CopyFrom(node)
        rename_reads(copy, border)
        produced = [name for name in copy.output if name in halves]
        if node.op_type == "Cast" and produced:
            (value,) = produced
            nodes.extend(rounded(copy.input[0], value))
            continue
        rounds = node.op_type not in _MOVING and node.op_type != "DequantizeLinear"
        after: list[NodeProto] = []
        for k, value in enumerate(copy.output):
            if value not in halves or not (rounds or value in outputs):
                continue
            copy.output[k] = unused_name(f"{value}.exact", taken)
            after.extend(rounded(copy.output[k], value))
        nodes.extend([copy, *after])
    del graph.node[:]
    graph.node.extend(nodes)
    infos = [value for value in graph.value_info if value.name not in halves]
    del graph.value_info[:]
    graph.value_info.extend(infos)
    return fresh


def _cast(source: str, target: str, kind: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"cast {target}", to=kind)


def _array(tensor: TensorProto) -> Array:
    array: Array = numpy_helper.to_array(tensor)
    return array


class _Rewrite:
    """One rewriting: which type each node computes in, and the nodes with the casts between them."""

    def __init__(
        self, index: GraphIndex, to: HalfType, keep: frozenset[str], io: Mapping[str, str], coordinates: frozenset[str]
    ) -> None:
        self.index, self.to, self.keep, self.io, self.coordinates = index, to, keep, io, coordinates
        self.types = elem_types(index.model)
        self.opsets = {entry.domain or "ai.onnx": entry.version for entry in index.model.opset_import}
        self.kept: dict[str, Reason] = {}
        self.constants: dict[str, str] = {}
        graph = index.model.graph
        described = itertools.chain(graph.value_info, graph.input, graph.output)
        self.infos: dict[str, ValueInfoProto] = {value.name: value for value in described}
        self.taken = {*index.producer, *index.inputs, *index.initializers}
        # (value, type) -> the name that it goes by in the result.
        self.places: dict[tuple[str, int], str] = {}
        self.made: dict[str, int] = {}  # float value -> the type that it is made in
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.new_infos: list[ValueInfoProto] = []
        self._judged: dict[str, str | None] = {}

    def run(self) -> ModelProto:
        index = self.index
        result = copy_model(index.model)
        graph = result.graph
        for value in graph.input:
            self._begin(value.name, self._border(value))
        for name, tensor in index.initializers.items():
            self._begin(name, tensor.data_type)
        for value in graph.output:
            value.type.tensor_type.elem_type = self._border(value)
        for number in range(len(index.nodes)):
            self._node(number)
        for value in graph.output:
            self._finish(value)
        read = {name for node in self.nodes for name in node_reads(node)}
        read |= {value.name for value in graph.output}
        initializers = [t for t in (*index.initializers.values(), *self.initializers) if t.name in read]
        del graph.node[:], graph.value_info[:]
        graph.node.extend(self.nodes)
        graph.value_info.extend(self.new_infos)
        del graph.initializer[:]
        graph.initializer.extend(initializers)
        return result

    def _border(self, value: ValueInfoProto) -> int:
        """Element type of a graph input or output in the result; sets it."""
        kind = value.type.tensor_type.elem_type
        if kind == TensorProto.FLOAT and value.name in self.io:
            kind = _ELEM[self.io[value.name]]
        value.type.tensor_type.elem_type = kind
        return kind

    def _begin(self, value: str, kind: int) -> None:
        self.made[value] = kind
        self.places[value, kind] = value

    def _node(self, number: int) -> None:
        node, name = self.index.nodes[number], self.index.names[number]
        slots_in, slots_out = self._slots(node)
        floats = [k for k, value in enumerate(node.input) if self._is_float(value)]
        touches = floats or any(map(self._is_float, node.output))
        reason: Reason | None = None
        if name in self.keep:
            reason = "asked"
        elif any(value in self.coordinates for value in node.output) or node.op_type == "GridSample":
            # TensorRT wants image and grid of one type, so the whole GridSample is in float32.
            reason = "coordinates"
        elif not any(slots_in) and not any(slots_out):
            reason = "type"
        elif unfit := self._unfit(node, slots_in):
            reason = "constant"
            self.constants[name] = unfit
        if reason is not None:
            slots_in, slots_out = [False] * len(node.input), [False] * len(node.output)
            # A node that only passes integers on has nothing to keep.
            if touches:
                self.kept[name] = reason
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.name = name
        half = _ELEM[self.to]
        for k in floats:
            copy.input[k] = self._read(node.input[k], half if slots_in[k] else TensorProto.FLOAT, node)
        if next(subgraphs(node), None):
            captured = [v for v in self.index.reads[number] if v not in node.input and v in self.made]
            renames = {v: self._read(v, TensorProto.FLOAT, node) for v in captured if self._is_float(v)}
            rename_reads(copy, {v: place for v, place in renames.items() if v != place})
        self.nodes.append(copy)
        for k, value in enumerate(node.output):
            if not value:
                continue
            kind = self.types.get(value, 0)
            if kind == TensorProto.FLOAT and slots_out[k]:
                kind = half
            place = value
            if value in self.index.outputs and kind != self._output_kind(value):
                place = self._name(value, kind)
                copy.output[k] = place
            self.made[value] = kind
            self.places[value, kind] = place
            self._describe(value, place, kind)

    def _is_float(self, value: str) -> bool:
        return self.types.get(value) == TensorProto.FLOAT

    def _output_kind(self, value: str) -> int:
        return _ELEM[self.io[value]] if value in self.io and self._is_float(value) else self.types.get(value, 0)

    def _finish(self, output: ValueInfoProto) -> None:
        """Cast an output to its type, where it was made in another."""
        made, kind = self.made[output.name], output.type.tensor_type.elem_type
        if made == kind or (output.name, made) not in self.places or self.places[output.name, made] == output.name:
            return
        producer = self.index.nodes[self.index.producer[output.name]]
        self.nodes.append(serving(producer, _cast(self.places[output.name, made], output.name, kind)))

    def _read(self, value: str, kind: int, reader: NodeProto) -> str:
        """The name under which `value` can be read in type `kind`; casts it at the first asking."""
        made = self.made.get(value)
        if made is None or (value, kind) in self.places:
            return self.places.get((value, kind), value)
        place = self._name(value, kind)
        tensor = self.index.initializers.get(value)
        if tensor is not None:
            dtype = helper.tensor_dtype_to_np_dtype(kind)
            self.initializers.append(numpy_helper.from_array(_array(tensor).astype(dtype), place))
        else:
            self.nodes.append(serving(reader, _cast(self.places[value, made], place, kind)))
            self._describe(value, place, kind)
        self.places[value, kind] = place
        return place

    def _name(self, value: str, kind: int) -> str:
        return unused_name(f"{value}.{helper.tensor_dtype_to_np_dtype(kind).name}", self.taken)

    def _describe(self, value: str, place: str, kind: int) -> None:
        info = self.infos.get(value)
        if info is None or place in self.index.outputs or place in self.index.inputs:
            return
        fresh = ValueInfoProto()
        fresh.CopyFrom(info)
        fresh.name = place
        if fresh.type.HasField("tensor_type"):
            fresh.type.tensor_type.elem_type = kind
        self.new_infos.append(fresh)

    def _slots(self, node: NodeProto) -> tuple[list[bool], list[bool]]:
        """For every input and output whether it can be of the half type; none where the node stays as it is."""
        nothing = [False] * len(node.input), [False] * len(node.output)
        domain = node.domain or "ai.onnx"
        if next(subgraphs(node), None) or (self.to == "bfloat16" and node.op_type in _NOT_BFLOAT16):
            return nothing
        try:
            schema = defs.get_schema(node.op_type, self.opsets.get(domain, 1), node.domain)
        except defs.SchemaError:
            return nothing
        allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
        variables_in = [_variable(schema.inputs, k) for k in range(len(node.input))]
        variables_out = [_variable(schema.outputs, k) for k in range(len(node.output))]
        halving: set[str] = set()
        for value, variable in zip(node.input, variables_in, strict=True):
            if not self._is_float(value) or variable not in allowed:
                continue  # no float, or float32 by definition, as Resize's scales
            if _ONNX_NAME[self.to] not in allowed[variable]:
                return nothing
            halving.add(variable)
        for value, variable in zip(node.output, variables_out, strict=True):
            # An output whose type no float input fixes is fixed by an attribute: Cast, ConstantOfShape, Range.
            if self._is_float(value) and variable not in halving:
                return nothing
        if node.op_type == "Cast" or any(value and value not in self.types for value in (*node.input, *node.output)):
            return nothing
        return (
            [v in halving and self._is_float(name) for name, v in zip(node.input, variables_in, strict=True)],
            [v in halving and self._is_float(name) for name, v in zip(node.output, variables_out, strict=True)],
        )

    def _unfit(self, node: NodeProto, slots: list[bool]) -> str | None:
        """What is wrong with the first constant that would not survive in the half type."""
        for value, slot in zip(node.input, slots, strict=True):
            if not slot or value not in self.index.initializers:
                continue
            if value not in self._judged:
                self._judged[value] = _fault(_array(self.index.initializers[value]), self.to)
            if self._judged[value]:
                return f"constant {value!r} {self._judged[value]}"
        return None


def _fault(array: Array, to: HalfType) -> str | None:
    """What `array` loses in type `to`, or None where it keeps what matters."""
    values = array[np.isfinite(array)].astype(np.float64)
    if not values.size:
        return None
    largest = float(np.abs(values).max())
    if largest > _LARGEST[to]:
        return f"reaches {largest:.3g}, beyond the {_LARGEST[to]:.3g} of {to}"
    rounded = array.astype(helper.tensor_dtype_to_np_dtype(_ELEM[to])).astype(np.float64)[np.isfinite(array)]
    # Scaled by the largest first: the squares of what is lost would underflow even in float64.
    error = float(np.linalg.norm((rounded - values) / largest)) if largest else 0.0
    if largest and error > _LOST * float(np.linalg.norm(values / largest)):
        return f"is at most {largest:.3g}, too small for {to}"
    return None


def _variable(formals: Any, k: int) -> str:
    """Type variable (or concrete type) of argument number k; the last formal argument may stand for many."""
    formal = formals[min(k, len(formals) - 1)]
    return str(formal.type_str)


def serving(node: NodeProto, made: NodeProto) -> NodeProto:
    """A node that was made, with the module path of the node that it serves."""
    made.metadata_props.extend(entry for entry in node.metadata_props if entry.key == SCOPES_KEY)
    return made


def _raised(model: ModelProto, opset: int) -> ModelProto:
    """The model in a newer operator set; ONNX's converter forgets the nodes' metadata, which is put back by name."""
    if all(entry.version >= opset for entry in model.opset_import if entry.domain in ("", "ai.onnx")):
        return model
    scopes = {node.name: list(node.metadata_props) for node in model.graph.node}
    try:
        raised: ModelProto = version_converter.convert_version(model, opset)
    except (RuntimeError, ValueError) as exc:
        raise ExportError(
            f"the graph cannot be raised to operator set {opset}, which bfloat16 needs: "
            f"{' '.join(str(exc).split())[:300]}; use fp16"
        ) from exc
    for node in raised.graph.node:
        if not node.metadata_props:
            node.metadata_props.extend(scopes.get(node.name, []))
    return raised

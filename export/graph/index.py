"""What is in an ONNX graph: names, shapes, who makes and who reads a value, and where nodes come from."""

from __future__ import annotations

import ast
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from ...engine.errors import InputError
from ...engine.spec import TensorSpec

__all__ = [
    "SCOPES_KEY",
    "GraphIndex",
    "first_line",
    "input_names",
    "load_model",
    "node_names",
    "node_reads",
    "subgraphs",
    "tensor_spec",
    "unused_name",
]

SCOPES_KEY = "pkg.torch.onnx.name_scopes"
"""Key of a node's metadata that holds the paths of the torch modules it lies in."""


class GraphIndex:
    """Look-up tables over one model's graph; read-only, and stale once the model is changed.

    Attributes:
        model: The model that is indexed.
        nodes: Its nodes, in their (topological) order.
        names: A unique name for every node, in the same order; the node's own name where that is unique.
        reads: For every node the values it reads, captured ones of subgraphs included.
        producer: Value name -> index of the node that makes it.
        consumers: Value name -> indices of the nodes that read it.
        inputs: Graph inputs that are no initializers.
        outputs: Graph outputs.
        initializers: Initializer name -> tensor.
        specs: Value name -> spec, for values of known dtype and fixed shape.
        constant: Indices of nodes that depend on no graph input: both sides of a cut hold them.
    """

    def __init__(self, model: ModelProto) -> None:
        graph = model.graph
        self.model = model
        self.nodes: list[NodeProto] = list(graph.node)
        self.names: list[str] = node_names(model)
        self.reads: list[tuple[str, ...]] = [tuple(dict.fromkeys(node_reads(node))) for node in self.nodes]
        self.initializers: dict[str, TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
        self.inputs: tuple[str, ...] = tuple(i.name for i in graph.input if i.name not in self.initializers)
        self.outputs: tuple[str, ...] = tuple(o.name for o in graph.output)
        self.producer: dict[str, int] = {}
        self.consumers: dict[str, list[int]] = {}
        for index, node in enumerate(self.nodes):
            for name in node.output:
                if name:
                    self.producer[name] = index
            for name in self.reads[index]:
                self.consumers.setdefault(name, []).append(index)
        self.specs: dict[str, TensorSpec] = {}
        for value in itertools.chain(graph.value_info, graph.input, graph.output):
            spec = tensor_spec(value)
            if spec is not None:
                self.specs[value.name] = spec
        variable = set(self.inputs)
        fixed: set[int] = set()
        for index, node in enumerate(self.nodes):
            if any(name in variable for name in self.reads[index]):
                variable.update(node.output)
            else:
                fixed.add(index)
        self.constant: frozenset[int] = frozenset(fixed)
        self._scopes: list[tuple[str, ...]] = [_scopes(node) for node in self.nodes]

    def closure(self, values: Iterable[str], stop: Iterable[str] = ()) -> frozenset[int]:
        """Nodes needed to compute `values` when the values in `stop` are given; graph inputs are always given."""
        given = set(stop)
        found: set[int] = set()
        todo = [name for name in values if name not in given]
        while todo:
            index = self.producer.get(todo.pop())
            if index is None or index in found:
                continue
            found.add(index)
            todo.extend(name for name in self.reads[index] if name not in given)
        return frozenset(found)

    def is_constant(self, value: str) -> bool:
        """Whether `value` is an initializer or computed from initializers alone."""
        return value in self.initializers or self.producer.get(value, -1) in self.constant

    def scopes(self, node: int) -> tuple[str, ...]:
        """Paths of the torch modules that node number `node` lies in, outermost first; empty for foreign models."""
        return self._scopes[node]

    def module_paths(self) -> list[str]:
        """All torch module paths in the graph, e.g. ``"enc.0.conv"``, in order of first use; the root is left out."""
        return list(dict.fromkeys(path for scopes in self._scopes for path in scopes if path))

    def module_outputs(self, path: str) -> list[str]:
        """Values made inside torch module `path` and used outside it (or given out by the graph)."""
        inside = {index for index, scopes in enumerate(self._scopes) if path in scopes}
        found = []
        for index in sorted(inside):
            for name in self.nodes[index].output:
                outside = any(reader not in inside for reader in self.consumers.get(name, ()))
                if name and index not in self.constant and (outside or name in self.outputs):
                    found.append(name)
        return found

    def label(self, value: str) -> str:
        """Name to show to users: the outermost torch module whose output `value` is, else the value's own name."""
        index = self.producer.get(value)
        if index is None:
            return value
        for path in self._scopes[index]:
            if path and value in self.module_outputs(path):
                return path
        return self._scopes[index][-1] if self._scopes[index] and self._scopes[index][-1] else value


def tensor_spec(value: ValueInfoProto) -> TensorSpec | None:
    """Spec of a value, or None where its dtype is unknown or a dimension is not a number."""
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not kind.elem_type or not kind.HasField("shape"):
        return None
    if any(not dim.HasField("dim_value") or dim.dim_value < 0 for dim in kind.shape.dim):
        return None
    try:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type))
    except (KeyError, TypeError):
        return None
    return TensorSpec(value.name, dtype.name, tuple(dim.dim_value for dim in kind.shape.dim))


def node_names(model: ModelProto) -> list[str]:
    """One unique name per node, the same for the same model every time; a node's own name where it is unique."""
    taken = {node.name for node in model.graph.node if node.name}
    seen: set[str] = set()
    names = []
    for index, node in enumerate(model.graph.node):
        name = node.name
        if not name or name in seen:
            stem = node.name or f"node_{node.op_type}"
            name = next(n for k in itertools.count() if (n := f"{stem}__{index + k}") not in taken | seen)
        seen.add(name)
        names.append(name)
    return names


def unused_name(name: str, taken: set[str]) -> str:
    """`name`, or with the first suffix that makes it new; the result is taken from now on."""
    fresh = next(n for k in itertools.count(1) if (n := name if k == 1 else f"{name}.{k}") not in taken or not n)
    taken.add(fresh)
    return fresh


def load_model(path: str | os.PathLike[str]) -> ModelProto:
    """Read an ONNX model from a file, external data included.

    Raises:
        InputError: If the file is missing or is no ONNX model, or its external data is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"the model {str(path)!r} does not exist; check the path")
    try:
        model = onnx.load(path)
    except Exception as exc:  # protobuf's DecodeError has no stable home; external data raises several
        raise InputError(f"{str(path)!r} is not a readable ONNX model: {first_line(exc)}") from exc
    if not model.graph.node:
        raise InputError(f"{str(path)!r} is not an ONNX model, or an empty one; it has no node")
    return model


def input_names(model: ModelProto) -> list[str]:
    """Names of what the model has to be fed with: initializers may be listed as inputs too."""
    fixed = {tensor.name for tensor in model.graph.initializer}
    return [value.name for value in model.graph.input if value.name not in fixed]


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs that an If, Loop, Scan or the like holds."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def node_reads(node: NodeProto) -> Iterator[str]:
    """Values that a node reads, those included that its subgraphs capture."""
    yield from (name for name in node.input if name)
    for graph in subgraphs(node):
        own = {v.name for v in graph.input} | {t.name for t in graph.initializer}
        own |= {name for inner in graph.node for name in inner.output}
        for inner in graph.node:
            yield from (name for name in node_reads(inner) if name not in own)
        yield from (value.name for value in graph.output if value.name not in own)


def _scopes(node: NodeProto) -> tuple[str, ...]:
    for entry in node.metadata_props:
        if entry.key == SCOPES_KEY:
            try:
                scopes = ast.literal_eval(entry.value)
            except (ValueError, SyntaxError):
                return ()
            # The last entry is the operation itself.
            return tuple(str(scope) for scope in scopes[:-1])
    return ()


def first_line(exc: BaseException) -> str:
    """What an error says, in one line."""
    return next((line.strip() for line in str(exc).splitlines() if line.strip()), type(exc).__name__)

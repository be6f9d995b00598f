"""Which other files an ``.onnx`` file reads, and where its nodes come from, without onnx and without running anything.

An ONNX tensor may lie in another file (external data), named by a path inside the ``.onnx`` file: content that a hash
cannot vouch for. So the protocol buffer is walked here, down to every tensor that can hold such a path (initializers,
attributes, sub-graphs, functions), before an executor sees the file. The wire format is four cases: see
https://protobuf.dev/programming-guides/encoding/; field numbers are those of onnx.proto.

Nodes that torch exported say which module of the user's model they come from; messages about a node want to say so too.
"""

from __future__ import annotations

import ast
import contextlib
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from ..errors import BundleError

__all__ = ["CHILDREN", "ExternalTensor", "Field", "external_reference", "external_tensors", "fields"]

# message -> field -> message of that field. Everything else (names, shapes, raw data) is stepped over.
CHILDREN: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
}
_TENSOR_NAME, _TENSOR_EXTERNAL_DATA = 8, 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_MODEL_GRAPH, _GRAPH_NODE = 7, 1
_NODE_OUTPUT, _NODE_NAME, _NODE_OP_TYPE, _NODE_METADATA = 2, 3, 4, 9
# What torch.onnx writes: the list of module paths from the outermost in, the exported program's own name last.
_SCOPES_KEY = "pkg.torch.onnx.name_scopes"
# protobuf itself stops at 100 nested messages, and so do the executors that use it.
_MAX_DEPTH = 100


@dataclass(frozen=True)
class ExternalTensor:
    """A tensor whose data lie in another file.

    Attributes:
        name: The tensor's name; may be empty.
        location: Path of the other file, as written.
        offset: First byte in it.
        size_bytes: How many bytes; None for all from `offset` on.
    """

    name: str
    location: str
    offset: int
    size_bytes: int | None


@dataclass(frozen=True)
class GraphNode:
    """A node of a model's main graph, as far as messages name it.

    Attributes:
        name: The node's name; may be empty.
        op_type: Its operator.
        outputs: The values that it makes.
        path: Where in the user's model it comes from, e.g. ``"enc.0.c1.conv2d"``; empty where the graph does not say.
    """

    name: str
    op_type: str
    outputs: tuple[str, ...]
    path: str


def graph_nodes(file: BinaryIO) -> list[GraphNode]:
    """The nodes of an ONNX model's main graph, in the file's order.

    Args:
        file: The model, open for reading; mapped into memory rather than read.

    Raises:
        BundleError: If the file is no well-formed protocol buffer.
    """
    with _mapped(file) as data:
        return [
            _node(data, *node)
            for number, *graph in _fields(data, 0, len(data))
            if number == _MODEL_GRAPH
            for number_, *node in _fields(data, *graph)
            if number_ == _GRAPH_NODE
        ]


def external_tensors(file: BinaryIO) -> list[ExternalTensor]:
    """Every tensor of an ONNX model that refers to another file.

    Args:
        file: The model, open for reading; mapped into memory rather than read, so that inline weights cost nothing.

    Raises:
        BundleError: If the file is no well-formed protocol buffer, or a reference holds no usable numbers.
    """
    with _mapped(file) as data:
        return list(_walk(data, 0, len(data), "Model", 0))


@contextlib.contextmanager
def _mapped(file: BinaryIO) -> Iterator[memoryview]:
    file.seek(0, 2)
    if file.tell() == 0:
        raise BundleError("it is empty, not an ONNX model")
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as data:
        yield data


def _node(data: memoryview, start: int, end: int) -> GraphNode:
    name = op_type = path = ""
    outputs = []
    for number, first, last in _fields(data, start, end):
        if number == _NODE_NAME:
            name = _text(data, first, last)
        elif number == _NODE_OP_TYPE:
            op_type = _text(data, first, last)
        elif number == _NODE_OUTPUT:
            outputs.append(_text(data, first, last))
        elif number == _NODE_METADATA:
            pair = {key: _text(data, a, b) for key, a, b in _fields(data, first, last)}
            if pair.get(_ENTRY_KEY) == _SCOPES_KEY:
                path = _path(pair.get(_ENTRY_VALUE, ""))
    return GraphNode(name, op_type, tuple(outputs), path)


def _path(scopes: str) -> str:
    """The innermost module's path and the name in it; empty for what is no list of names."""
    try:
        names = ast.literal_eval(scopes)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return ""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return ""
    return ".".join(filter(None, names[-2:]))


def _walk(data: memoryview, start: int, end: int, message: str, depth: int) -> Iterator[ExternalTensor]:
    if depth > _MAX_DEPTH:
        raise BundleError(f"its graphs are nested more than {_MAX_DEPTH} messages deep")
    if message == "Tensor":
        tensor = external_reference(data, start, end)
        if tensor is not None:
            yield tensor
        return
    children = CHILDREN[message]
    for number, first, last in _fields(data, start, end):
        if number in children:
            yield from _walk(data, first, last, children[number], depth + 1)


def external_reference(data: memoryview, start: int, end: int) -> ExternalTensor | None:
    """What the tensor message at these bytes refers to in another file; None where it refers to none.

    Raises:
        BundleError: As `external_tensors`.
    """
    name = ""
    entries: dict[str, str] = {}
    for number, first, last in _fields(data, start, end):
        if number == _TENSOR_NAME:
            name = _text(data, first, last)
        elif number == _TENSOR_EXTERNAL_DATA:
            pair = {key: _text(data, a, b) for key, a, b in _fields(data, first, last)}
            entries[pair.get(_ENTRY_KEY, "")] = pair.get(_ENTRY_VALUE, "")
    if not entries:
        return None
    size = entries.get("length")
    return ExternalTensor(
        name,
        entries.get("location", ""),
        _count(entries.get("offset", "0"), name),
        None if size is None else _count(size, name),
    )


class Field(NamedTuple):
    """One field of a message: its number and wire type, and the bytes of its value [first, last)."""

    number: int
    wire_type: int
    first: int
    last: int


def fields(data: memoryview, start: int, end: int) -> Iterator[Field]:
    """Every field of the message at bytes [start, end), in order.

    Raises:
        BundleError: If it is no well-formed message.
    """
    position = start
    while position < end:
        tag, position = _varint(data, position, end)
        number, wire_type = tag >> 3, tag & 7
        first = position
        if wire_type == 0:
            _, position = _varint(data, position, end)
        elif wire_type == 1:
            position += 8
        elif wire_type == 5:
            position += 4
        elif wire_type == 2:
            size, first = _varint(data, position, end)
            position = first + size
        else:
            # Groups (3 and 4) are not used by ONNX, 6 and 7 do not exist.
            raise _malformed(position)
        if position > end:
            raise _malformed(first)
        yield Field(number, wire_type, first, position)


def _fields(data: memoryview, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The length-delimited fields of one message, as (number, first byte, byte after the last); others are skipped."""
    for field in fields(data, start, end):
        if field.wire_type == 2:
            yield field.number, field.first, field.last


def _varint(data: memoryview, position: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _malformed(position)


def _text(data: memoryview, first: int, last: int) -> str:
    try:
        return str(data[first:last], "utf-8")
    except UnicodeDecodeError:
        raise _malformed(first) from None


def _count(text: str, name: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise BundleError(f"its tensor {name!r} lies at {text[:40]!r} of another file, which is no count of bytes")
    return int(text)


def _malformed(position: int) -> BundleError:
    return BundleError(f"it is not a well-formed ONNX model (at byte {position})")

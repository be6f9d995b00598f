"""What an ONNX graph is, as one hash: nodes, attributes, wiring and constants, wherever the constants lie.

A constant counts by its bytes, whether they stand in the ``.onnx`` file or in another one, at whatever offset: a bundle
that was copied, or whose weights were packed anew, is the same graph. Everything else in the file counts as it is
written, so another hash may mean the same network, but the same hash never means another one.
"""

from __future__ import annotations

import hashlib
import mmap
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

from ..errors import BundleError
from .external_data import CHILDREN, ExternalTensor, Field, external_reference, fields

__all__ = ["graph_digest"]

_TENSOR_RAW_DATA, _TENSOR_EXTERNAL_DATA, _TENSOR_DATA_LOCATION = 9, 13, 14
# As in onnx_files: protobuf itself stops there.
_MAX_DEPTH = 100
_BLOCK_BYTES = 1 << 20


def graph_digest(path: str | Path) -> str:
    """The SHA-256 of a graph's content, 64 hexadecimal digits.

    Args:
        path: The ``.onnx`` file; the files its constants lie in are looked for beside it.

    Raises:
        BundleError: If it is no ONNX model, or a constant's bytes are missing or lie outside the file's folder.
    """
    path = Path(path)
    hasher = hashlib.sha256()
    try:
        with path.open("rb") as file:
            if file.seek(0, 2) == 0:
                raise BundleError("it is empty, not an ONNX model")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as data:
                _hash_message(hasher, data, 0, len(data), "Model", path.parent, 0)
    except BundleError as exc:
        raise BundleError(f"the graph {path} cannot be identified: {exc}") from exc
    except OSError as exc:
        raise BundleError(f"the graph {path} cannot be read: {exc.strerror or exc}") from exc
    return hasher.hexdigest()


# Every piece starts with a byte that says what it is, and has a fixed size or gives its size: no two different
# sequences of pieces are the same bytes. Sizes of nested messages are left out, since they change with how an offset
# in another file is written.


def _hash_message(hasher: Any, data: memoryview, start: int, end: int, message: str, folder: Path, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise BundleError(f"its graphs are nested more than {_MAX_DEPTH} messages deep")
    if message == "Tensor":
        _hash_tensor(hasher, data, start, end, folder)
        return
    children = CHILDREN[message]
    for field in fields(data, start, end):
        if field.wire_type == 2 and field.number in children:
            hasher.update(b"(" + field.number.to_bytes(8, "little"))
            _hash_message(hasher, data, field.first, field.last, children[field.number], folder, depth + 1)
            hasher.update(b")")
        else:
            _hash_value(hasher, data, field)


def _hash_value(hasher: Any, data: memoryview, field: Field) -> None:
    numbers = (field.number, field.wire_type, field.last - field.first)
    hasher.update(b"=" + b"".join(number.to_bytes(8, "little") for number in numbers))
    hasher.update(data[field.first : field.last])


def _hash_tensor(hasher: Any, data: memoryview, start: int, end: int, folder: Path) -> None:
    content: list[tuple[int, bytes]] = []
    for field in fields(data, start, end):
        if field.number == _TENSOR_RAW_DATA and field.wire_type == 2:
            content = [(field.last - field.first, hashlib.sha256(data[field.first : field.last]).digest())]
        elif field.number not in (_TENSOR_EXTERNAL_DATA, _TENSOR_DATA_LOCATION):
            _hash_value(hasher, data, field)
    reference = external_reference(data, start, end)
    if reference is not None:
        content = [_external_content(reference, folder)]
    for size_bytes, digest in content:
        hasher.update(b"#" + size_bytes.to_bytes(8, "little") + digest)


def _external_content(tensor: ExternalTensor, folder: Path) -> tuple[int, bytes]:
    """Size and SHA-256 of the bytes a tensor refers to."""
    where = f"its tensor {tensor.name!r} lies in {tensor.location!r}"
    # Windows' rules are the stricter ones and cover POSIX's where the separators are told apart.
    parts = {*PurePosixPath(tensor.location).parts, *PureWindowsPath(tensor.location).parts}
    if not parts or ".." in parts or "/" in parts or PureWindowsPath(tensor.location).anchor:
        raise BundleError(f"{where}, which is outside its folder")
    try:
        with (folder / tensor.location).open("rb") as file:
            size_bytes = file.seek(0, 2) - tensor.offset if tensor.size_bytes is None else tensor.size_bytes
            file.seek(tensor.offset)
            return size_bytes, _hash_bytes(file, size_bytes, where)
    except OSError as exc:
        raise BundleError(f"{where}, which cannot be read: {exc.strerror or exc}") from exc


def _hash_bytes(file: BinaryIO, size_bytes: int, where: str) -> bytes:
    hasher = hashlib.sha256()
    left = size_bytes
    while left > 0:
        block = file.read(min(left, _BLOCK_BYTES))
        if not block:
            break
        hasher.update(block)
        left -= len(block)
    if left:
        raise BundleError(f"{where}, which is {abs(left)} bytes too short for it")
    return hasher.digest()

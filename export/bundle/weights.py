"""Weights of several models stored once, in one safetensors file that their ONNX files point into."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from onnx import ModelProto, TensorProto, numpy_helper

from ..graph.index import unused_name
from ..graph.surgery import copy_model

__all__ = ["SHARED_MIN_BYTES", "WEIGHTS_FILE", "shared_weights"]

WEIGHTS_FILE = "weights.safetensors"
# Below this an initializer stays in its .onnx: an external entry costs about as much as it saves.
SHARED_MIN_BYTES = 1024
_ALIGNMENT = 64
_SAFETENSORS_TYPES = {
    TensorProto.FLOAT: "F32",
    TensorProto.DOUBLE: "F64",
    TensorProto.FLOAT16: "F16",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.INT64: "I64",
    TensorProto.INT32: "I32",
    TensorProto.INT16: "I16",
    TensorProto.INT8: "I8",
    TensorProto.UINT64: "U64",
    TensorProto.UINT32: "U32",
    TensorProto.UINT16: "U16",
    TensorProto.UINT8: "U8",
    TensorProto.BOOL: "BOOL",
    TensorProto.FLOAT8E4M3FN: "F8_E4M3",
    TensorProto.FLOAT8E5M2: "F8_E5M2",
}


def shared_weights(models: Mapping[str, ModelProto], out_folder: str | os.PathLike[str]) -> dict[str, bytes]:
    """Write the large initializers of several models once into ``weights.safetensors``.

    The file is a valid safetensors file; the returned models point into it as ONNX external data, so they must lie in
    the same folder when they are loaded. Equal tensors (dtype, shape and bytes) are stored once, whatever their names.

    Args:
        models: Name -> model.
        out_folder: Existing folder that receives the file; an existing one is replaced.

    Returns:
        Name -> serialised model.
    """
    payloads: dict[str, bytes] = {}  # tensor name in the file -> bytes
    taken: set[str] = set()
    header: dict[str, dict[str, object]] = {}
    stored: dict[str, str] = {}  # content hash -> tensor name in the file
    copies = {name: copy_model(model) for name, model in models.items()}
    places: list[tuple[TensorProto, str]] = []
    for model in copies.values():
        for tensor in model.graph.initializer:
            kind = _SAFETENSORS_TYPES.get(tensor.data_type)
            if kind is None:
                continue
            data = _tensor_bytes(tensor)
            if len(data) < SHARED_MIN_BYTES:
                continue
            digest = hashlib.sha256(f"{kind} {list(tensor.dims)} ".encode() + data).hexdigest()
            if digest not in stored:
                key = unused_name(tensor.name, taken)
                stored[digest] = key
                payloads[key] = data
                header[key] = {"dtype": kind, "shape": list(tensor.dims)}
            places.append((tensor, stored[digest]))
    # The format allows no holes, so sizes that keep the next tensor on the alignment come first.
    order = sorted(
        payloads, key=lambda key: (len(payloads[key]) % _ALIGNMENT != 0, -(len(payloads[key]) & -len(payloads[key])))
    )
    offsets: dict[str, int] = {}
    position = 0
    for key in order:
        offsets[key] = position
        header[key]["data_offsets"] = [position, position + len(payloads[key])]
        position += len(payloads[key])
    text = json.dumps({key: header[key] for key in order}, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    start = 8 + len(text)
    with open(Path(out_folder) / WEIGHTS_FILE, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            file.write(payloads[key])
    for tensor, key in places:
        _make_external(tensor, start + offsets[key], len(payloads[key]))
    return {name: model.SerializeToString(deterministic=True) for name, model in copies.items()}


def _tensor_bytes(tensor: TensorProto) -> bytes:
    # raw_data is little-endian by ONNX's definition; the typed fields go through NumPy.
    return tensor.raw_data if tensor.HasField("raw_data") else numpy_helper.to_array(tensor).tobytes()


def _make_external(tensor: TensorProto, offset: int, length: int) -> None:
    name, dims, kind = tensor.name, list(tensor.dims), tensor.data_type
    tensor.Clear()
    tensor.name, tensor.data_type = name, kind
    tensor.dims.extend(dims)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", WEIGHTS_FILE), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)

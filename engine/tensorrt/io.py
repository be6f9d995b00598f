"""What a TensorRT network or engine takes and gives, held against what was announced."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import BackendError
from ..spec import TensorSpec

__all__ = ["IoTensor", "check_io", "dtype_name", "last_said", "names_text"]

# TensorRT's names of the data types that NumPy has too: inputs and outputs are of these.
_DTYPES = {
    "BOOL": "bool",
    "FLOAT": "float32",
    "HALF": "float16",
    "INT32": "int32",
    "INT64": "int64",
    "INT8": "int8",
    "UINT8": "uint8",
}


@dataclass(frozen=True)
class IoTensor:
    """One input or output as the library tells it.

    Attributes:
        dtype: NumPy's name of its data type, or the library's in lower case where NumPy has none.
        shape: Extents; -1 for one that is open.
        on_host: Whether it has to lie on the CPU, because it holds extents of other tensors.
    """

    dtype: str
    shape: tuple[int, ...]
    on_host: bool


def dtype_name(dtype: Any) -> str:
    """A member of the library's `DataType` as NumPy names it: ``float16``; ``bf16`` where NumPy has no such type."""
    name = str(dtype.name)
    return _DTYPES.get(name, name.lower())


def check_io(
    where: str, kind: str, announced: Sequence[TensorSpec], found: Mapping[str, IoTensor], *, remedy: str
) -> None:
    """Check that the tensors found are those announced; an open extent takes any.

    Args:
        where: The beginning of the message.
        kind: ``"input"`` or ``"output"``.
        announced: What they must be.
        found: What they are.
        remedy: The end of the message.

    Raises:
        BackendError: Naming the tensor and both sides.
    """
    names = {spec.name for spec in announced}
    if set(found) != names:
        raise BackendError(
            f"{where}: the graph's {kind}s are {names_text(found)}, but {names_text(names)} were announced; {remedy}"
        )
    for spec in announced:
        tensor = found[spec.name]
        if tensor.on_host:
            raise BackendError(
                f"{where}: {kind} {spec.name!r} holds extents of other tensors and would have to lie on the CPU; "
                "export the model with those extents fixed"
            )
        if tensor.dtype != spec.dtype:
            raise BackendError(
                f"{where}: {kind} {spec.name!r} is {tensor.dtype} in the graph, but {spec.dtype} was announced; "
                f"{remedy}"
            )
        if len(tensor.shape) != len(spec.shape) or any(
            there not in (-1, wanted) for there, wanted in zip(tensor.shape, spec.shape, strict=True)
        ):
            raise BackendError(
                f"{where}: {kind} {spec.name!r} is {list(tensor.shape)} in the graph, but {list(spec.shape)} was "
                f"announced; {remedy}"
            )


def names_text(names: Iterable[str]) -> str:
    """Names as a message lists them."""
    return ", ".join(repr(name) for name in sorted(names)) or "none"


def last_said(lines: Iterable[str], otherwise: object = "it does not say why") -> str:
    """What the library said last, on one line."""
    return "; ".join(" ".join(line.split()) for line in list(lines)[-2:]) or str(otherwise)

"""The check of what is bound to a module, the same for every backend: names, dtypes, shapes, place, and no overlap."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ...kernels.array import DeviceArray
from ..errors import InputError
from ..spec import TensorSpec

__all__ = ["DeviceBindings", "Port", "names_error", "ports_of", "refuse_overlap"]


class Port:
    """One input or output of a module, as it is compared with what is bound to it."""

    __slots__ = ("dtype", "is_output", "kind", "name", "shape", "size_bytes")

    def __init__(self, spec: TensorSpec, *, is_output: bool) -> None:
        self.name = spec.name
        self.shape = spec.shape
        self.dtype = np.dtype(spec.dtype)
        self.size_bytes = spec.size_bytes
        self.is_output = is_output
        self.kind = "output" if is_output else "input"


class DeviceBindings:
    """Checks what is bound to a module on a GPU; runs once a frame and is kept short.

    Args:
        module: What messages call the module.
        ports: Its inputs and outputs.
        ordinal: The module's GPU.
        alignment: What every address must be a multiple of.
    """

    def __init__(self, module: str, ports: Sequence[Port], *, ordinal: int, alignment: int = 1) -> None:
        self._module = module
        self._ports = tuple(ports)
        self._ordinal = ordinal
        self._alignment = alignment

    def arrays(self, bindings: Mapping[str, Any]) -> list[DeviceArray]:
        """The arrays in the order of the ports.

        Raises:
            InputError: If one is missing, unknown, or does not fit.
        """
        if len(bindings) != len(self._ports):
            raise names_error(self._module, self._ports, bindings)
        arrays, ordinal, alignment = [], self._ordinal, self._alignment
        for port in self._ports:
            array = bindings.get(port.name)
            if not isinstance(array, DeviceArray):
                raise self._error(port, array, bindings)
            if (
                array.shape != port.shape
                or array.dtype != port.dtype
                or array.device != ordinal
                or not array.contiguous
                or array.pointer % alignment
            ):
                raise self._error(port, array, bindings)
            arrays.append(array)
        return arrays

    def _error(self, port: Port, array: object, bindings: Mapping[str, Any]) -> InputError:
        where = f"module {self._module!r}: {port.kind} {port.name!r}"
        device = f"cuda:{self._ordinal}"
        if array is None:
            return names_error(self._module, self._ports, bindings)
        if not isinstance(array, DeviceArray):
            return InputError(f"{where} is of type {type(array).__name__}, expected an array on {device}")
        if array.device != self._ordinal:
            return InputError(f"{where} is on cuda:{array.device}, expected {device}; move it there first")
        if array.dtype != port.dtype:
            return InputError(f"{where} has dtype {array.dtype}, expected {port.dtype}; convert it first")
        if array.shape != port.shape:
            return InputError(f"{where} has shape {array.shape}, expected {port.shape}")
        if not array.contiguous:
            return InputError(f"{where} is not C-contiguous; pass a copy of it")
        return InputError(f"{where} does not begin at a multiple of {self._alignment} bytes; pass a copy of it")


def ports_of(inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]) -> tuple[Port, ...]:
    """The ports of a module, inputs first."""
    return (
        *(Port(spec, is_output=False) for spec in inputs),
        *(Port(spec, is_output=True) for spec in outputs),
    )


def names_error(module: str, ports: Sequence[Port], bindings: Mapping[str, Any]) -> InputError:
    """What to raise where `bindings` do not have the ports' names."""
    known = [port.name for port in ports]
    missing = ", ".join(repr(name) for name in known if bindings.get(name) is None) or "none"
    unknown = ", ".join(repr(name) for name in bindings if name not in known) or "none"
    return InputError(
        f"module {module!r} needs one array for every input and output; missing: {missing}; unknown: {unknown}"
    )


def refuse_overlap(module: str, ports: Sequence[Port], addresses: Sequence[int]) -> None:
    """An output that shares memory with another buffer would be read or written half-way through the graph.

    Raises:
        InputError: If there is one.
    """
    placed = sorted(zip(addresses, ports, strict=True), key=lambda pair: pair[0])
    for (address, lower), (above, upper) in pairwise(placed):
        if address + lower.size_bytes > above and (lower.is_output or upper.is_output):
            raise InputError(
                f"module {module!r}: {lower.kind} {lower.name!r} and {upper.kind} {upper.name!r} share memory; "
                "give every output an array of its own"
            )

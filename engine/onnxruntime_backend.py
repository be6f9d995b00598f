"""ONNX Runtime on the CPU as a backend: modules whose buffers belong to the caller; a call allocates no tensor."""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from .device import Event, Stream
from .errors import BackendError, ClosedError, InputError
from .spec import Array, TensorSpec

__all__ = ["OnnxRuntimeModule"]

logger = logging.getLogger(__name__)

_PROVIDERS = ["CPUExecutionProvider"]
_NUMPY_NAMES = {
    "tensor(bool)": "bool",
    "tensor(double)": "float64",
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    **{f"tensor({sign}int{bits})": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}


class OnnxRuntimeModule:
    """One ONNX graph, loaded on the CPU (a `warpcache.engine.module.Module`).

    The executor's threads inherit cores and priority from the thread that makes the module, so make it through
    `Stream.call` of the stream it is going to run on.

    Args:
        path: The ``.onnx`` file; external data is looked for beside it.
        name: What messages call it.
        inputs: What the graph must take.
        outputs: What the graph must give.
        threads: Threads of one call, the calling one included.
        spinning: Whether idle executor threads spin for some time rather than sleep: lower latency, at the price of
            cores that are busy between calls. Has no effect with one thread.

    Raises:
        BackendError: If ONNX Runtime is missing or refuses the graph, or the graph's inputs and outputs are others.
        InputError: If `threads` is less than 1.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        name: str,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        threads: int,
        spinning: bool,
    ) -> None:
        if threads < 1:
            raise InputError(f"module {name!r} was given {threads} threads; it needs at least 1")
        self.name = name
        self.inputs = inputs
        self.outputs = outputs
        # Calls from several sessions' threads take turns: one set of bound buffers, one set of executor threads.
        self._lock = threading.Lock()
        self._session: Any = _load(Path(path), name, threads, spinning)
        self._check_graph()
        self._slots = [_Slot(spec, is_output=False) for spec in inputs] + [
            _Slot(spec, is_output=True) for spec in outputs
        ]
        self._binding: Any = self._session.io_binding()

    def enqueue(self, bindings: Mapping[str, Array], stream: Stream) -> Event:
        """Run once on `stream` (see `Module.enqueue`).

        That an output shares memory with another binding is found on the stream: the event then raises InputError, and
        nothing ran.
        """
        arrays = self._check_bindings(bindings)
        return stream.submit(lambda: self._run(arrays))

    def close(self) -> None:
        """Release the graph after the call that is running, if any; safe to call twice."""
        with self._lock:
            self._session = self._binding = None
            for slot in self._slots:
                slot.bound = None

    def _check_bindings(self, bindings: Mapping[str, Array]) -> list[Array]:
        """The arrays in the order of the slots; this runs once a frame and is kept short."""
        if self._session is None:
            raise ClosedError(f"module {self.name!r} is closed; load it again")
        if len(bindings) != len(self._slots):
            raise self._names_error(bindings)
        arrays = []
        for slot in self._slots:
            array = bindings.get(slot.name)
            if not isinstance(array, np.ndarray):
                raise self._names_error(bindings) if array is None else self._array_error(slot, array)
            flags = array.flags
            # carray: C-contiguous, aligned and writable.
            fits = flags.carray if slot.is_output else flags.c_contiguous and flags.aligned
            if not fits or array.shape != slot.shape or array.dtype != slot.dtype:
                raise self._array_error(slot, array)
            arrays.append(array)
        return arrays

    def _run(self, arrays: list[Array]) -> None:
        with self._lock:
            if self._session is None:
                raise ClosedError(f"module {self.name!r} is closed; load it again")
            changed = False
            # A binding costs some microseconds. The slot holds on to its array, so that one object is one memory.
            for slot, array in zip(self._slots, arrays, strict=True):
                if array is not slot.bound:
                    self._bind(slot, array)
                    changed = True
            if changed:
                self._check_overlap()
            try:
                self._session.run_with_iobinding(self._binding)
            # ONNX Runtime's exceptions share no base class but this one.
            except Exception as exc:
                raise BackendError(f"module {self.name!r} failed in ONNX Runtime: {_first_line(exc)}") from exc

    def _bind(self, slot: _Slot, array: Array) -> None:
        # Left unbound until all is well: a slot that claims what is not bound would write into somebody's old buffer.
        slot.bound = None
        address = array.__array_interface__["data"][0]
        bind = self._binding.bind_output if slot.is_output else self._binding.bind_input
        try:
            bind(slot.name, "cpu", 0, slot.dtype.type, slot.shape, address)
        except Exception as exc:
            raise BackendError(
                f"module {self.name!r}: ONNX Runtime refused the buffer of {slot.name!r}: {_first_line(exc)}"
            ) from exc
        slot.address = address
        slot.bound = array

    def _check_overlap(self) -> None:
        """An output that shares memory with another buffer would be read or written half-way through the graph."""
        slots = sorted(self._slots, key=lambda slot: slot.address)
        for lower, upper in pairwise(slots):
            if lower.address + lower.size_bytes > upper.address and (lower.is_output or upper.is_output):
                lower.bound = upper.bound = None
                raise InputError(
                    f"module {self.name!r}: {lower.kind} {lower.name!r} and {upper.kind} {upper.name!r} share memory; "
                    "give every output an array of its own"
                )

    def _names_error(self, bindings: Mapping[str, Array]) -> InputError:
        known = [slot.name for slot in self._slots]
        missing = ", ".join(repr(name) for name in known if bindings.get(name) is None) or "none"
        unknown = ", ".join(repr(name) for name in bindings if name not in known) or "none"
        return InputError(
            f"module {self.name!r} needs one array for every input and output; missing: {missing}; unknown: {unknown}"
        )

    def _array_error(self, slot: _Slot, array: object) -> InputError:
        where = f"module {self.name!r}: {slot.kind} {slot.name!r}"
        if not isinstance(array, np.ndarray):
            return InputError(f"{where} is of type {type(array).__name__}, expected a NumPy array")
        if array.dtype != slot.dtype:
            return InputError(f"{where} has dtype {array.dtype}, expected {slot.dtype}; convert it first")
        if array.shape != slot.shape:
            return InputError(f"{where} has shape {array.shape}, expected {slot.shape}")
        if array.flags.c_contiguous and array.flags.aligned:
            return InputError(f"{where} is read-only; give it an array that can be written")
        return InputError(f"{where} is not C-contiguous and aligned; pass a copy of it")

    def _check_graph(self) -> None:
        for kind, wanted, nodes in (
            ("inputs", self.inputs, self._session.get_inputs()),
            ("outputs", self.outputs, self._session.get_outputs()),
        ):
            found = {node.name: (_NUMPY_NAMES.get(node.type, node.type), _shape(node)) for node in nodes}
            named = {spec.name: (spec.dtype, spec.shape) for spec in wanted}
            if found != named:
                raise BackendError(
                    f"module {self.name!r}: the graph's {kind} are {_shown(found)}, "
                    f"but {_shown(named)} were announced; compile the bundle again"
                )


class _Slot:
    """One input or output and the caller's array that is bound to it at present."""

    __slots__ = ("address", "bound", "dtype", "is_output", "kind", "name", "shape", "size_bytes")

    def __init__(self, spec: TensorSpec, *, is_output: bool) -> None:
        self.name = spec.name
        self.shape = spec.shape
        self.dtype = np.dtype(spec.dtype)
        self.size_bytes = spec.size_bytes
        self.is_output = is_output
        self.kind = "output" if is_output else "input"
        self.address = 0
        self.bound: Array | None = None


def _load(path: Path, name: str, threads: int, spinning: bool) -> Any:
    ort = _onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # Measured on a convolution network, one thread (ONNX Runtime 1.31): 17.3 ms, 20.6 ms without the layout changes of
    # this level; memory arena and pattern made no difference, nor did leaving out the packing of weights.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    try:
        session = ort.InferenceSession(str(path), options, providers=_PROVIDERS)
    except Exception as exc:
        raise BackendError(f"module {name!r} ({path.name}) was refused by ONNX Runtime: {_first_line(exc)}") from exc
    granted = session.get_providers()
    if granted != _PROVIDERS:
        raise BackendError(f"module {name!r} was asked to run on {_PROVIDERS}, but ONNX Runtime granted {granted}")
    logger.info("loaded module %r from %s with %d thread(s)", name, path.name, threads)
    return session


def _onnxruntime() -> Any:
    """ONNX Runtime, imported on first use: everything else of the engine works without it."""
    try:
        ort = importlib.import_module("onnxruntime")
    except ModuleNotFoundError as exc:
        if exc.name != "onnxruntime":
            raise BackendError(f"ONNX Runtime cannot be imported, because it needs {exc.name!r}; install it") from exc
        raise BackendError(
            'no ONNX Runtime is installed; install one of "warpcache[cpu]" or "warpcache[gpu]" '
            "(they exclude each other)"
        ) from exc
    except ImportError as exc:
        raise BackendError(f"ONNX Runtime cannot be imported: {_first_line(exc)}; install it again") from exc
    if not hasattr(ort, "InferenceSession"):
        # What is left of the folder that both wheels unpack into, after one of the two was uninstalled.
        raise BackendError(
            "the installed ONNX Runtime is incomplete; uninstall both onnxruntime and onnxruntime-gpu, "
            'then install one of "warpcache[cpu]" or "warpcache[gpu]"'
        )
    return ort


def _shape(node: Any) -> tuple[int | str | None, ...]:
    return tuple(node.shape)


def _shown(tensors: Mapping[str, tuple[str, tuple[int | str | None, ...]]]) -> str:
    return ", ".join(f"{name!r} ({dtype}, {list(shape)})" for name, (dtype, shape) in tensors.items()) or "none"


def _first_line(exc: BaseException) -> str:
    return (str(exc).strip() or type(exc).__name__).splitlines()[0]

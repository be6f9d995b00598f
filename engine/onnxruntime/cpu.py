"""ONNX Runtime on the CPU as a backend: modules whose buffers belong to the caller; a call allocates no tensor."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..device.bindings import names_error
from ..device.stream import Event, Stream
from ..errors import BackendError, ClosedError, InputError
from ..spec import Array, TensorSpec
from .session import BoundBuffers, Slot, check_graph, create_session, first_line, import_onnxruntime

__all__ = ["OnnxRuntimeModule"]

logger = logging.getLogger(__name__)

_PROVIDER = "CPUExecutionProvider"


class OnnxRuntimeModule:
    """One ONNX graph, loaded on the CPU (a `warpcache.engine.device.module.Module`).

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
        self.capturable = False
        self.inputs = inputs
        self.outputs = outputs
        # Calls from several sessions' threads take turns: one set of bound buffers, one set of executor threads.
        self._lock = threading.Lock()
        self._session: Any = _load(Path(path), name, threads, spinning)
        check_graph(self._session, name, inputs, outputs)
        self._buffers = BoundBuffers(self._session, name, inputs, outputs, device="cpu", ordinal=0)

    def enqueue(self, bindings: Mapping[str, Array], stream: Stream) -> Event:
        """Run once on `stream` (see `Module.enqueue`).

        That an output shares memory with another binding is found on the stream: the event then raises InputError, and
        nothing ran.
        """
        arrays = self._check_bindings(bindings)
        return stream.submit(lambda: self._run(arrays))

    def launch(self, bindings: Mapping[str, Array], stream: Stream) -> None:
        """Run once on `stream`, without an event."""
        self.enqueue(bindings, stream)

    def close(self) -> None:
        """Release the graph after the call that is running, if any; safe to call twice."""
        with self._lock:
            self._session = self._buffers.binding = None
            self._buffers.forget()

    def _check_bindings(self, bindings: Mapping[str, Array]) -> list[Array]:
        """The arrays in the order of the slots; this runs once a frame and is kept short."""
        if self._session is None:
            raise ClosedError(f"module {self.name!r} is closed; load it again")
        if len(bindings) != len(self._buffers.slots):
            raise names_error(self.name, self._buffers.slots, bindings)
        arrays = []
        for slot in self._buffers.slots:
            array = bindings.get(slot.name)
            if not isinstance(array, np.ndarray):
                raise (
                    names_error(self.name, self._buffers.slots, bindings)
                    if array is None
                    else self._array_error(slot, array)
                )
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
            # A binding costs some microseconds, so a buffer that is bound already is left alone.
            for slot, array in zip(self._buffers.slots, arrays, strict=True):
                if array is not slot.bound:
                    self._buffers.bind(slot, array, array.__array_interface__["data"][0])
                    changed = True
            if changed:
                self._buffers.check_overlap()
            try:
                self._session.run_with_iobinding(self._buffers.binding)
            # ONNX Runtime's exceptions share no base class but this one.
            except Exception as exc:
                raise BackendError(f"module {self.name!r} failed in ONNX Runtime: {first_line(exc)}") from exc

    def _array_error(self, slot: Slot, array: object) -> InputError:
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


def _load(path: Path, name: str, threads: int, spinning: bool) -> Any:
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # Measured on a convolution network, one thread (ONNX Runtime 1.31): 17.3 ms, 20.6 ms without the layout changes of
    # this level; memory arena and pattern made no difference, nor did leaving out the packing of weights.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    session = create_session(ort, path, name, options, (_PROVIDER, {}))
    logger.info("loaded module %r from %s with %d thread(s)", name, path.name, threads)
    return session

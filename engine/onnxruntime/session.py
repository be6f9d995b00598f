"""What ONNX Runtime modules share: the import, the session, the check of its graph, and the buffers bound to it."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..device.bindings import Port, refuse_overlap
from ..errors import BackendError, InputError
from ..spec import TensorSpec

__all__ = ["BoundBuffers", "Slot", "check_graph", "create_session", "first_line", "import_onnxruntime"]

logger = logging.getLogger(__name__)

_NUMPY_NAMES = {
    "tensor(bool)": "bool",
    "tensor(double)": "float64",
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    **{f"tensor({sign}int{bits})": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}


class Slot(Port):
    """One input or output and the caller's array that is bound to it at present."""

    __slots__ = ("address", "bound")

    def __init__(self, spec: TensorSpec, *, is_output: bool) -> None:
        super().__init__(spec, is_output=is_output)
        self.address = 0
        self.bound: Any = None


class BoundBuffers:
    """The callers' buffers, bound to a session by address; only what changed is bound again.

    Args:
        session: The ONNX Runtime session.
        name: What messages call the module.
        inputs: What the graph takes.
        outputs: What the graph gives.
        device: Where the buffers are: ``"cpu"`` or ``"cuda"``.
        ordinal: The device's number.
    """

    def __init__(
        self,
        session: Any,
        name: str,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        device: str,
        ordinal: int,
    ) -> None:
        self.slots = [Slot(spec, is_output=False) for spec in inputs]
        self.slots += [Slot(spec, is_output=True) for spec in outputs]
        self.binding: Any = session.io_binding()
        self._name = name
        self._device = device
        self._ordinal = ordinal

    def bind(self, slot: Slot, array: Any, address: int) -> None:
        """Bind the memory at `address` to `slot`, which keeps `array`: one object is one memory.

        Raises:
            BackendError: If ONNX Runtime refuses it.
        """
        # Left unbound until all is well: a slot that claims what is not bound would write into somebody's old buffer.
        slot.bound = None
        bind = self.binding.bind_output if slot.is_output else self.binding.bind_input
        try:
            bind(slot.name, self._device, self._ordinal, slot.dtype.type, slot.shape, address)
        # ONNX Runtime's exceptions share no base class but this one.
        except Exception as exc:
            raise BackendError(
                f"module {self._name!r}: ONNX Runtime refused the buffer of {slot.name!r}: {first_line(exc)}"
            ) from exc
        slot.address = address
        slot.bound = array

    def check_overlap(self) -> None:
        """An output that shares memory with another buffer would be read or written half-way through the graph.

        Raises:
            InputError: If there is one; nothing is bound then.
        """
        try:
            refuse_overlap(self._name, self.slots, [slot.address for slot in self.slots])
        except InputError:
            self.forget()
            raise

    def forget(self) -> None:
        """Let go of every array."""
        for slot in self.slots:
            slot.bound = None


def import_onnxruntime() -> Any:
    """ONNX Runtime, imported on first use: everything else of the engine works without it.

    Raises:
        BackendError: If it is missing or broken.
    """
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
        raise BackendError(f"ONNX Runtime cannot be imported: {first_line(exc)}; install it again") from exc
    if not hasattr(ort, "InferenceSession"):
        # What is left of the folder that both wheels unpack into, after one of the two was uninstalled.
        raise BackendError(
            "the installed ONNX Runtime is incomplete; uninstall both onnxruntime and onnxruntime-gpu, "
            'then install one of "warpcache[cpu]" or "warpcache[gpu]"'
        )
    return ort


def create_session(ort: Any, path: Path, name: str, options: Any, provider: tuple[str, dict[str, str]]) -> Any:
    """Load a graph on one execution provider and no other.

    Raises:
        BackendError: If ONNX Runtime refuses the graph, or grants another provider than was asked for.
    """
    try:
        # Without enable_fallback=0 a session that fails is made again on the CPU, which is only printed.
        session = ort.InferenceSession(str(path), options, providers=[provider], enable_fallback=0)
    except Exception as exc:
        raise BackendError(f"module {name!r} ({path.name}) was refused by ONNX Runtime: {first_line(exc)}") from exc
    granted = session.get_providers()
    # The CPU provider is always listed after others; that no node is on it is for the session's options to demand.
    if granted[:1] != [provider[0]] or not set(granted) <= {provider[0], "CPUExecutionProvider"}:
        raise BackendError(f"module {name!r} was asked to run on {[provider[0]]}, but ONNX Runtime granted {granted}")
    return session


def check_graph(session: Any, name: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    """Hold a loaded graph's inputs and outputs against what was announced.

    Raises:
        BackendError: If a name, dtype or shape differs.
    """
    for kind, wanted, nodes in (
        ("inputs", inputs, session.get_inputs()),
        ("outputs", outputs, session.get_outputs()),
    ):
        found = {node.name: (_NUMPY_NAMES.get(node.type, node.type), _shape(node)) for node in nodes}
        named = {spec.name: (spec.dtype, spec.shape) for spec in wanted}
        if found != named:
            raise BackendError(
                f"module {name!r}: the graph's {kind} are {_shown(found)}, "
                f"but {_shown(named)} were announced; compile the bundle again"
            )


def first_line(exc: BaseException) -> str:
    """The first line of what an exception says, or its name."""
    return (str(exc).strip() or type(exc).__name__).splitlines()[0]


def _shape(node: Any) -> tuple[int | str | None, ...]:
    return tuple(node.shape)


def _shown(tensors: Mapping[str, tuple[str, tuple[int | str | None, ...]]]) -> str:
    return ", ".join(f"{name!r} ({dtype}, {list(shape)})" for name, (dtype, shape) in tensors.items()) or "none"

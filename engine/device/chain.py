"""Several modules that run one after the other as one: an exit that shares its first part with others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..spec import TensorSpec
from .module import Module
from .stream import Event

__all__ = ["Chain"]


class Chain:
    """A `Module` made of modules in order; what is between them is the chain's own scratch memory.

    The answer is what the last one writes. Calls take turns, as those of any module, so that the scratch memory serves
    every session.

    Args:
        name: What messages call it.
        modules: Two or more, in their order, loaded for one stream. They are closed by whoever loaded them.
        allocate: Makes memory on their device.
    """

    def __init__(self, name: str, modules: Sequence[Module], allocate: Callable[[TensorSpec], Any]) -> None:
        self.name = name
        self._modules = tuple(modules)
        *firsts, last = self._modules
        between = {spec.name: spec for module in firsts for spec in module.outputs}
        read = {spec.name: spec for module in self._modules for spec in module.inputs}
        self.inputs = tuple(spec for name, spec in read.items() if name not in between)
        self.outputs: tuple[TensorSpec, ...] = last.outputs
        self.capturable = all(module.capturable for module in self._modules)
        self._scratch = {name: allocate(spec) for name, spec in between.items()}

    def enqueue(self, bindings: Mapping[str, Any], stream: Any) -> Event:
        """Run every module in order on `stream`; the event raises what the first one to fail raised."""
        events = [module.enqueue(self._of(module, bindings), stream) for module in self._modules]

        def check() -> None:
            # In order on the stream, so that all of them have ended.
            for event in events:
                event.wait()

        event: Event = stream.submit(check)
        return event

    def launch(self, bindings: Mapping[str, Any], stream: Any) -> None:
        """Issue every module in order."""
        for module in self._modules:
            module.launch(self._of(module, bindings), stream)

    def close(self) -> None:
        """Let go of the scratch memory; safe to call twice."""
        self._scratch.clear()

    def _of(self, module: Module, bindings: Mapping[str, Any]) -> dict[str, Any]:
        return {
            spec.name: self._scratch[spec.name] if spec.name in self._scratch else bindings[spec.name]
            for spec in (*module.inputs, *module.outputs)
        }

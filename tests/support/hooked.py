"""A module that runs a hook before every call."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from warpcache.engine.device.module import Module
from warpcache.engine.device.stream import Event, InlineStream, Stream
from warpcache.engine.spec import Array


class Hooked:
    """A module on the CPU that runs a hook before every call, on the stream."""

    capturable = False

    def __init__(self, inner: Module, hook: Callable[[], object]) -> None:
        self.inner, self.hook = inner, hook
        self.name, self.inputs, self.outputs = inner.name, inner.inputs, inner.outputs

    def enqueue(self, bindings: Mapping[str, Array], stream: Stream) -> Event:
        def work() -> None:
            self.hook()
            self.inner.enqueue(bindings, InlineStream()).wait()

        return stream.submit(work)

    def launch(self, bindings: Mapping[str, Array], stream: Stream) -> None:
        self.enqueue(bindings, stream)

    def close(self) -> None:
        self.inner.close()

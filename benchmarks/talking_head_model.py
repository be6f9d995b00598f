"""The reference generator of the talking-head benchmarks, as `warpcache compile` takes it."""

from __future__ import annotations

from warpcache.export.adapter import Surface
from warpcache.models.renderer import DeferredNeuralRenderer

__all__ = ["generator"]


def generator() -> DeferredNeuralRenderer:
    """A deferred neural renderer of 2.1 M parameters at 128x128, untrained."""
    model = DeferredNeuralRenderer(128)
    model.surface = Surface("atlas", ("condition", 0, 2), ("condition", 5))
    return model

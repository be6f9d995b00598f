"""The reference generators of the talking-head benchmarks, as `warpcache compile` takes them."""

from __future__ import annotations

from warpcache.export.frames.surface import Surface
from warpcache.models.renderer import DeferredNeuralRenderer

__all__ = ["generator", "generator_256", "with_surface"]


def generator() -> DeferredNeuralRenderer:
    """A deferred neural renderer of 2.1 M parameters at 128x128, untrained."""
    return with_surface(DeferredNeuralRenderer(128))


def generator_256() -> DeferredNeuralRenderer:
    """The same network at 256x256, untrained."""
    return with_surface(DeferredNeuralRenderer(256))


def with_surface(model: DeferredNeuralRenderer) -> DeferredNeuralRenderer:
    """The model, told where its conditions show the surface's atlas."""
    model.surface = Surface("atlas", ("condition", 0, 2), ("condition", 5))  # type: ignore[assignment]  # no tensor
    return model

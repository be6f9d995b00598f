"""What a TensorRT builder is told beside the graph, and which part of it an engine's key holds."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError

__all__ = ["BuildOptions", "ShapeProfile"]

# Part of every cache key: raised when what `tensorrt_network` sets by itself changes, so that engines of before are
# built again.
_RECIPE = "1"


@dataclass(frozen=True)
class ShapeProfile:
    """Which shapes of one input of a dynamic graph an engine serves.

    Attributes:
        name: The input.
        min: Smallest extents.
        opt: The extents that the engine is made fast for.
        max: Largest extents.

    Raises:
        InputError: If the three do not fit each other.
    """

    name: str
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.min) == len(self.opt) == len(self.max) or not all(
            1 <= low <= best <= high for low, best, high in zip(self.min, self.opt, self.max, strict=True)
        ):
            raise InputError(
                f"the shape profile of {self.name!r} is {self.min} to {self.max}, best {self.opt}; give as many "
                "positive extents for each, rising from min over opt to max"
            )

    def __str__(self) -> str:
        return f"{self.name}:{_extents(self.min)}:{_extents(self.opt)}:{_extents(self.max)}"


@dataclass(frozen=True)
class BuildOptions:
    """What a builder is told beside the graph. None leaves a choice to the library.

    Attributes:
        optimization_level: 0 (built quickly) to 5 (runs quickly).
        workspace_mib: Most scratch memory that a layer may take, in MiB.
        tf32: Whether float32 products may be taken of inputs rounded to 10 bits of mantissa. Off: precision is in the
            graph, and a float32 graph means float32.
        profiles: Shapes of the inputs whose extents the graph leaves open. An input without one is built for the shape
            of its spec alone.

    Raises:
        InputError: If a value is out of range, or an input has two profiles.
    """

    optimization_level: int | None = None
    workspace_mib: int | None = None
    tf32: bool = False
    profiles: tuple[ShapeProfile, ...] = ()

    def __post_init__(self) -> None:
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise InputError(f"the optimization level is {self.optimization_level}; it goes from 0 to 5")
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise InputError(f"the builder's workspace is {self.workspace_mib} MiB; give it at least 1")
        names = [profile.name for profile in self.profiles]
        if len(set(names)) != len(names):
            raise InputError(f"an input has two shape profiles, of {', '.join(names)}; give one each")

    def as_key(self) -> dict[str, str]:
        """Every option as text, for the key of a cache: equal exactly for options that build equal engines."""
        return {
            "recipe": _RECIPE,
            "optimization_level": _text(self.optimization_level),
            "workspace_mib": _text(self.workspace_mib),
            "tf32": "on" if self.tf32 else "off",
            "profiles": " ".join(sorted(map(str, self.profiles))) or "none",
        }


def _extents(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _text(value: int | None) -> str:
    return "default" if value is None else str(value)

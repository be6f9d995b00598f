"""Options that several benchmarks take, the stages that their work falls into, and how they refuse."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import click

from warpcache.engine.errors import WarpcacheError
from warpcache.tasks.options import option

__all__ = ["GENERATOR_STEPS", "OnClips", "Recorded", "Stage", "Staged", "one_sentence"]

GENERATOR_STEPS = 1500
"""Of a talking head's generator, by default."""


class Stage(StrEnum):
    """Where a benchmark that trains, compiles and measures may stop."""

    GENERATOR = "generator"
    BUNDLE = "bundle"
    MEASURE = "measure"


@dataclass(frozen=True)
class Recorded:
    """Options of a benchmark that writes a record."""

    json_path: Path | None = option("--json", default=None)


@dataclass(frozen=True)
class OnClips(Recorded):
    """Options of a benchmark on real clips."""

    data: Path = option("--data", "The clips.", envvar="WARPCACHE_CLIPS")
    lpips: Path = option("--lpips", envvar="WARPCACHE_LPIPS")


@dataclass(frozen=True)
class Staged(OnClips):
    """Options of a benchmark that trains, compiles and measures."""

    generator_steps: int = option("--generator-steps", default=GENERATOR_STEPS)
    stage: str = option(
        "--stage",
        "Where to stop.",
        default=Stage.MEASURE.value,
        type=click.Choice([stage.value for stage in Stage]),
        show_default=False,
    )


@contextmanager
def one_sentence() -> Iterator[None]:
    """What a user can cause ends as one sentence and no traceback."""
    try:
        yield
    except WarpcacheError as exc:
        raise click.ClickException(str(exc)) from exc

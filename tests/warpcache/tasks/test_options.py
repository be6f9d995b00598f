"""Options from the fields of a dataclass: what click makes of them, and what the command gets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click
import pytest
from click.testing import CliRunner, Result

from warpcache.tasks.options import holds, option, takes


@dataclass(frozen=True)
class Place:
    device: str = option("--device", "Where.", default="cpu")
    graphs: bool = option("--graphs", default=False)

    def settled(self) -> str:
        if self.graphs and self.device == "cpu":
            raise click.UsageError("--graphs is for a GPU")
        return f"at {self.device}"


@dataclass(frozen=True)
class Base:
    count: int | None = option("--count", default=None)
    place: str = holds(Place, default="nowhere")


@dataclass(frozen=True)
class Options(Base):
    out: Path = option("--out", "File to write.")
    colour: Literal["red", "green"] = option("--colour", default="red")
    sizes: tuple[float, ...] = option("--size", default=())


def call(*arguments: str) -> tuple[Result, Options | None]:
    got: list[Options] = []

    @click.command()
    @takes(Options)
    def command(options: Options) -> None:
        got.append(options)

    return CliRunner().invoke(command, arguments), got[0] if got else None


def test_types_and_defaults_follow_from_the_fields() -> None:
    assert call("--out", "a")[1] == Options(out=Path("a"), place="at cpu")
    _, got = call("--out", "a", "--count", "2", "--size", "1", "--size", "2.5", "--colour", "green", "--device", "gpu")
    assert got == Options(count=2, place="at gpu", out=Path("a"), colour="green", sizes=(1.0, 2.5))


def test_help_shows_own_options_first_and_defaults_that_say_something() -> None:
    text = call("--help")[0].output
    assert [line.split()[0] for line in text.splitlines() if line.startswith("  --")] == [
        "--out", "--colour", "--size", "--count", "--device", "--graphs", "--help",
    ]  # fmt: skip
    assert "[required]" in text
    assert "Where.  [default: cpu]" in text
    assert text.count("[default: ") == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Missing option '--out'"),
        (["--out", "a", "--colour", "blue"], "'blue' is not one of"),
        (["--out", "a", "--count", "x"], "'x' is not a valid integer"),
        (["--out", "a", "--graphs"], "--graphs is for a GPU"),
    ],
)
def test_what_is_wrong_is_wrong_usage(arguments: list[str], words: str) -> None:
    result, got = call(*arguments)
    assert (result.exit_code, got) == (2, None)
    assert words in result.output

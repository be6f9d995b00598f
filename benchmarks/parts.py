"""Parts of a benchmark, each measured alone: what cannot run says why in one row, and the others run all the same."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import click

from benchmarks.measuring import FIGURE_COLUMNS, Figure, figure_rows
from benchmarks.records import show_table, write_record
from warpcache.engine.cuda.options import parse_device
from warpcache.engine.errors import WarpcacheError
from warpcache.report.records import environment
from warpcache.report.tables import Column

__all__ = [
    "Measured",
    "Part",
    "device_record",
    "device_title",
    "finish",
    "measure_parts",
    "percentile_figures",
    "run_parts",
    "sentence",
    "show_parts",
    "write_parts",
]


@dataclass
class Measured:
    """What one part found.

    Attributes:
        figures: Numbers, some of them beside what they are to reach.
        notes: Sentences that are no numbers: which executor did not run, and why.
        details: JSON-ready: raw samples and what they were measured with.
    """

    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """One part after its run.

    Attributes:
        name: As it is asked for.
        measured: What it found; empty where it could not run.
        error: Why it could not run, one sentence; None where it did.
        seconds: How long it took.
        traceback: Where an error came from that is no sentence of ours; None for those.
    """

    name: str
    measured: Measured
    error: str | None
    seconds: float
    traceback: str | None = None

    def to_record(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "name": self.name,
            "error": self.error,
            "seconds": round(self.seconds, 3),
            "figures": [figure.to_record() for figure in self.measured.figures],
            "notes": list(self.measured.notes),
            "details": self.measured.details,
            **({} if self.traceback is None else {"traceback": self.traceback}),
        }


def run_parts(
    parts: Mapping[str, Callable[[], Measured]],
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Part]:
    """Run every part; an error ends its part only.

    Args:
        parts: What to run, by name, in order.
        clock: Seconds.
    """
    done = []
    for name, measure in parts.items():
        click.echo(f"measuring: {name}", err=True)
        begin = clock()
        try:
            done.append(Part(name, measure(), None, clock() - begin))
        except WarpcacheError as exc:
            done.append(Part(name, Measured(), sentence(exc), clock() - begin))
        # Whatever a library throws at one part must not take the others' figures along; its origin is kept.
        except Exception as exc:
            text = traceback.format_exc()
            print(text, file=sys.stderr)
            done.append(Part(name, Measured(), f"{type(exc).__name__}: {sentence(exc)}", clock() - begin, text))
    return done


def percentile_figures(
    name: str, samples: Sequence[float], *, unit: str, target_p50: float | None = None
) -> list[Figure]:
    """p50 (with its target), p95 and p99 of samples."""
    import numpy as np

    values = [float(value) for value in np.percentile(samples, [50, 95, 99])]
    return [
        Figure(f"{name}, p{percent}", value, target_p50 if percent == 50 else None, unit)
        for percent, value in zip((50, 95, 99), values, strict=True)
    ]


def sentence(exc: BaseException) -> str:
    """What an error says, on one line; its type where it says nothing."""
    return " ".join(str(exc).split()) or type(exc).__name__


def device_record(device: str) -> dict[str, Any]:
    """What a record says of the device: its name, and of a GPU also driver and CUDA.

    A GPU that is not there is said to be missing: a record without a device would read like one of any.
    """
    ordinal = parse_device(device)
    if ordinal is None:
        return {"device": device, "name": environment()["cpu"]}
    from warpcache.engine.cuda.gpu_facts import gpu_facts

    try:
        facts = gpu_facts([ordinal])
    except WarpcacheError as exc:
        return {"device": device, "name": None, "missing": sentence(exc)}
    return {"device": device, **facts["gpus"][f"cuda:{ordinal}"], "driver": facts["driver"], "cuda": facts["cuda"]}


def device_title(record: Mapping[str, Any]) -> str:
    """The device as a table's title names it, e.g. ``NVIDIA H200 (cuda:0, sm_90, driver 580.65.06, CUDA 13.0)``."""
    if record["name"] is None:
        return f"no GPU ({record['device']})"
    said = [record["device"]]
    if record["name"].startswith("Software CUDA"):
        said.append("a driver in software: no figure here is a GPU's")
    if "architecture" in record:
        said += [record["architecture"], f"driver {record['driver'] or 'unknown'}", f"CUDA {record['cuda']}"]
    return f"{record['name']} ({', '.join(said)})"


def show_parts(title: str, parts: Sequence[Part]) -> None:
    """One table: every figure beside what it is to reach, and a row for every part that could not run."""
    rows: list[tuple[str, ...]] = []
    for part in parts:
        rows += [(part.name, *row) for row in figure_rows(figure.to_record() for figure in part.measured.figures)]
        rows += [(part.name, note, "", "", "") for note in part.measured.notes]
        if part.error is not None:
            rows.append((part.name, part.error, "", "", "NOT RUN"))
    show_table(title, (Column("part"), *FIGURE_COLUMNS), rows)


def finish(context: click.Context, parts: Sequence[Part]) -> NoReturn:
    """End the command: its last line counts the parts, and its exit code is 0 only if all ran."""
    failed = [part.name for part in parts if part.error is not None]
    said = f"; not: {', '.join(failed)}" if failed else ""
    click.echo(f"{len(parts) - len(failed)} of {len(parts)} parts ran{said}")
    context.exit(1 if failed else 0)


def write_parts(path: Path | None, command: str, device: Mapping[str, Any], parts: Sequence[Part], **more: Any) -> None:
    """As `write_record`: the device, what else is given, and the parts."""
    write_record(path, command, device=dict(device), **more, parts=[part.to_record() for part in parts])


def measure_parts(
    context: click.Context,
    command: str,
    title: str,
    device: Mapping[str, Any],
    parts: Mapping[str, Callable[[], Measured]],
    json_path: Path | None,
) -> NoReturn:
    """Run parts, show them under a title, write the record and `finish`."""
    done = run_parts(parts)
    show_parts(title, done)
    write_parts(json_path, command, device, done)
    finish(context, done)

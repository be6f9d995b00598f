"""One short table of what `benchmarks/on_gpu.sh` left in its folder: steps, promised figures, latencies.

    python -m benchmarks.gpu_summary OUT_DIR

It reads ``steps.tsv`` (step, status, seconds, a note; one line a step) and the JSON of the benchmarks. The exit code
is 0 only if every step ended well and every part of a benchmark ran; figures that miss their target change nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.measuring import figure_rows
from benchmarks.parts import device_title
from benchmarks.records import show_table
from warpcache.report.tables import Column

__all__ = ["Row", "main", "read_rows", "running_backend"]

_BENCHMARKS = ("build_time", "gpu_kernels", "gpu_engine")
_LATENCIES = ("latency_demo", "latency_reference")
# No target, and still what everything beside it is compared with.
_SHOWN_PARTS = ("copy",)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        where: The step or the benchmark.
        what: The figure, or what went wrong.
        measured: As it is shown.
        reach: As it is shown; empty where nothing was promised.
        verdict: ``reached``, ``MISSED``, ``FAILED`` or ``NOT RUN``; empty where there is none.
    """

    where: str
    what: str
    measured: str = ""
    reach: str = ""
    verdict: str = ""

    @property
    def failed(self) -> bool:
        """Whether something did not run to its end."""
        return self.verdict in ("FAILED", "NOT RUN")


def read_rows(folder: Path) -> list[Row]:
    """Everything in the folder, steps first; a file that cannot be read becomes a row that says so."""
    rows = list(_steps(folder / "steps.tsv"))
    for name in (*_BENCHMARKS, *_LATENCIES):
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        try:
            document = json.loads(path.read_text("utf-8"))
            rows += list(_latencies(name, document) if name in _LATENCIES else _figures(name, document))
        except (OSError, ValueError, KeyError, TypeError) as exc:
            rows.append(Row(name, f"{path.name} cannot be read: {type(exc).__name__}: {exc}", verdict="FAILED"))
    return rows


def running_backend(folder: Path) -> str | None:
    """The executor that the engine's benchmark ran the demo by; None where none ran, or it was not measured."""
    try:
        document = json.loads((folder / "gpu_engine.json").read_text("utf-8"))
        found = [part["details"].get("backend") for part in document["parts"]]
        found += [
            item["backend"]
            for part in document["parts"]
            for item in part["details"].values()
            if isinstance(item, dict) and "backend" in item
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return next((str(name) for name in found if name), None)


def _steps(path: Path) -> Iterator[Row]:
    if not path.exists():
        yield Row("steps", f"{path.name} is missing: nothing was run here", verdict="FAILED")
        return
    for line in path.read_text("utf-8").splitlines():
        name, status, seconds, note = [*line.split("\t"), "", "", ""][:4]
        verdict = {"ok": "", "left out": ""}.get(status, "FAILED")
        yield Row(f"step {name}", f"{status}{': ' if note else ''}{note}", f"{seconds} s", verdict=verdict)


def _figures(name: str, document: dict[str, Any]) -> Iterator[Row]:
    failed: dict[str, list[str]] = {}
    for part in document["parts"]:
        if part["error"] is not None:
            failed.setdefault(part["error"], []).append(part["name"])
    for error, parts in failed.items():
        yield Row(f"{name} {', '.join(parts)}", error, verdict="NOT RUN")
    for part in document["parts"]:
        shown = [figure for figure in part["figures"] if figure["target"] is not None or part["name"] in _SHOWN_PARTS]
        for row in figure_rows(shown):
            yield Row(f"{name} {part['name']}", *row)
        for note in part["notes"]:
            yield Row(f"{name} {part['name']}", note)


def _latencies(name: str, document: dict[str, Any]) -> Iterator[Row]:
    for row in document["rows"]:
        said = f"{row['contender']} on {document['device']}, p50 / p99; {row['ratio']:.3f} of the first's p50"
        yield Row(name, said, f"{row['p50_ms']:.3f} / {row['p99_ms']:.3f} ms")


def _title(folder: Path) -> str:
    for name in ("gpu_engine", "gpu_kernels"):
        try:
            return device_title(json.loads((folder / f"{name}.json").read_text("utf-8"))["device"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return "unknown device"


@click.command(epilog="Example:  python -m benchmarks.gpu_summary out/gpu")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--backend", "only_backend", is_flag=True, help="Print the executor that ran the demo, nothing else.")
@click.pass_context
def main(context: click.Context, /, folder: Path, only_backend: bool) -> None:
    """Show what was measured on a GPU."""
    if only_backend:
        backend = running_backend(folder)
        click.echo(backend or "")
        context.exit(0 if backend else 1)
    rows = read_rows(folder)
    columns = (Column(""), Column("figure"), Column.number("measured"), Column.number("reach"), Column("verdict"))
    show_table(f"On {_title(folder)}", columns, [astuple(row) for row in rows])
    verdicts = [row.verdict for row in rows]
    failed = sum(row.failed for row in rows)
    click.echo(f"{verdicts.count('reached')} reached, {verdicts.count('MISSED')} missed, {failed} failed or not run")
    context.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

"""What is in a bundle, for people: tensors, the cut and its rivals, exits and what they cost, quality by age, files."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .engine.spec import TensorSpec

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from .engine.bundle import Bundle
    from .engine.manifest import Manifest

__all__ = ["calibration_rows", "plain_table", "print_bundle", "print_precision", "size_text"]

# "frozen" is no exit: it is what showing the last frame again would have given, the figure every exit has to beat.
FROZEN = "frozen"
LABELS = {FROZEN: "last frame shown again"}
# On a pipe there is no terminal to ask for its width; a table broken at 80 columns is hard to read and to search.
PIPE_WIDTH = 120


def print_bundle(bundle: Bundle, *, console: Console | None = None) -> None:
    """Print what `bundle` holds to `console` (default: stdout)."""
    from rich.console import Console

    out = console or Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    manifest = bundle.manifest
    created = ", ".join(str(manifest.created[key]) for key in ("by", "at") if key in manifest.created)
    fps = f", {manifest.fps:g} frames per second" if manifest.fps is not None else ""
    total = sum(record.size_bytes for record in manifest.files.values())
    out.print(f"{manifest.name}: {size_text(total)}{fps} ({created})", soft_wrap=True, markup=False)
    out.print(_tensors(manifest))
    out.print(_candidates(manifest))
    out.print(_exits(manifest))
    if manifest.calibration is None:
        out.print("Quality by age: not calibrated, so nothing is promised; compile with --holdout to measure it.")
    else:
        out.print(_calibration(manifest))
    if isinstance(manifest.created.get("precision"), Mapping):
        print_precision(manifest, out)
    out.print(_files(manifest))


def print_precision(manifest: Manifest, out: Console) -> None:
    """Print what a converted bundle computes in, how near it is to the one of fp32, and what was kept.

    Args:
        manifest: Its `created` has a record ``precision``; what is missing in it is left out.
        out: Where to.
    """
    record = manifest.created["precision"]
    parity = record.get("parity")
    if not isinstance(parity, Mapping):
        out.print("Parity with fp32 was not measured: no --inputs was given.")
    else:
        columns = ["frames", "PSNR dB, mean", "worst", "FLIP", "largest error", "NaN or Inf"]
        table = plain_table(f"Parity of {record.get('precision')} with fp32", "exit", *columns, numeric=columns)
        for name, figures in parity.items():
            psnr = figures.get("psnr_db") or {}
            table.add_row(
                name,
                _number(figures.get("frames"), "d"),
                _number(psnr.get("mean"), ".2f"),
                _number(psnr.get("worst"), ".2f"),
                _number(figures.get("flip"), ".5f"),
                _number(figures.get("max_error"), ".2g"),
                _number(figures.get("nan"), "d"),
            )
        out.print(table)
        out.print(f"How parity was measured: {record.get('measured')}.", soft_wrap=True, markup=False)
    lines = [f"Computes in {record.get('precision')}; the cache is in {record.get('cache')}"]
    for what, key in (("kept in fp32", "kept"), ("left in fp16", "unquantised")):
        names = list(dict.fromkeys(name for layers in (record.get(key) or {}).values() for name in layers))
        if names:
            lines.append(f"{what}: {', '.join(names)}")
    out.print("; ".join(lines) + ".", soft_wrap=True, markup=False)


def calibration_rows(manifest: Manifest) -> list[dict[str, Any]]:
    """The calibration as JSON-ready rows, one per exit and age; empty where there is none.

    Returns:
        Rows ``{"policy": "lockstep", "exit", "age", "frames", "quality": {"against", metric: mean, ...}}``.
    """
    calibration = manifest.calibration
    if calibration is None:
        return []
    return [
        {
            "policy": "lockstep",
            "exit": name,
            "age": int(age),
            "frames": calibration.get("frames"),
            "quality": {
                "against": calibration.get("against"),
                **{metric: spread.get("mean") for metric, spread in metrics.items()},
            },
        }
        for name, ages in calibration.get("exits", {}).items()
        for age, metrics in _by_age(ages)
    ]


def _by_age(ages: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The records of one exit, youngest cache first (JSON's keys are text, so "10" would come before "2")."""
    return sorted(ages.items(), key=lambda item: int(item[0]))


def plain_table(title: str, *columns: str, numeric: Iterable[str] = ()) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    right = set(numeric)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def size_text(size_bytes: float) -> str:
    """A size in bytes, short: 1 MB is 1,000,000 bytes."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.3g} {unit}"
    return f"{size_bytes:.0f} B"


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "-"


def _tensors(manifest: Manifest) -> Table:
    table = plain_table("Tensors", "kind", "name", "dtype", "shape", "size", numeric=["size"])

    def add(kind: str, spec: TensorSpec) -> None:
        table.add_row(kind, spec.name, spec.dtype, " x ".join(map(str, spec.shape)), size_text(spec.size_bytes))

    for record in manifest.inputs:
        add("input" if record.role == "generator" else "input (motion)", record.spec)
    for spec in manifest.outputs:
        add("output (image)" if spec.name == manifest.image_output else "output", spec)
    for spec in manifest.cache:
        add("cache", spec)
    return table


def _candidates(manifest: Manifest) -> Table:
    """The cuts that were considered; the one that was taken is marked."""
    ages = sorted({age for c in manifest.cut.candidates for age in (c.get("reuse_psnr_db") or {})}, key=int)
    reuse = [f"reuse at age {age}, dB" for age in ages]
    columns = ["consumer ms", "producer ms", "cost", "cache", *reuse]
    table = plain_table("Cut", "", "tensors", *columns, numeric=columns)
    taken = set(manifest.cut.tensors)
    if not any(set(c.get("tensors", ())) == taken for c in manifest.cut.candidates):
        table.add_row("*", ", ".join(manifest.cut.tensors), *["-"] * len(columns))
    for candidate in manifest.cut.candidates:
        tensors = candidate.get("tensors", ())
        cache_bytes = candidate.get("cache_bytes")
        psnr = candidate.get("reuse_psnr_db") or {}
        table.add_row(
            "*" if set(tensors) == taken else "",
            ", ".join(tensors),
            _number(candidate.get("consumer_ms"), ".2f"),
            _number(candidate.get("producer_ms"), ".2f"),
            _number(candidate.get("cost_ratio"), ".1%"),
            size_text(cache_bytes) if isinstance(cache_bytes, int | float) else "-",
            *(_number(psnr.get(age), ".2f") for age in ages),
        )
    return table


def _exits(manifest: Manifest) -> Table:
    table = plain_table("Exits", "exit", "module", "cost of the whole", numeric=["cost of the whole"])
    for record in manifest.exits:
        table.add_row(record.name, record.module, f"{record.cost_ratio:.1%}")
    return table


def _calibration(manifest: Manifest) -> Table:
    """Mean quality by exit and age, and the 5th percentile of the frames beside it."""
    from .engine.quality import METRICS

    calibration = manifest.calibration or {}
    names = list(calibration.get("metrics", ()))
    title = (
        f"Quality by age, against {calibration.get('against')}, {calibration.get('frames')} frames: mean (worst 5 %)"
    )
    table = plain_table(title, "exit", "age", *names, numeric=["age", *names])
    for name, ages in calibration.get("exits", {}).items():
        for age, metrics in _by_age(ages):
            cells = []
            for metric in names:
                spread = metrics.get(metric) or {}
                form = ".2f" if metric.endswith("_db") else ".4f"
                better_high = metric not in METRICS or METRICS[metric].higher_is_better
                worst = spread.get("p05" if better_high else "p95")
                cells.append(f"{_number(spread.get('mean'), form)} ({_number(worst, form)})")
            table.add_row(LABELS.get(name, name), age, *cells)
    return table


def _files(manifest: Manifest) -> Table:
    table = plain_table("Files", "file", "size", "sha256", numeric=["size"])
    for name, record in sorted(manifest.files.items()):
        table.add_row(name, size_text(record.size_bytes), record.sha256[:16])
    return table

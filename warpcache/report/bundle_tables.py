"""What is in a bundle, for people: tensors, the cut and its rivals, exits and what they cost, quality by age, files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..engine.metrics.images import METRICS
from .pareto import front_sentences
from .promise_tables import Promise
from .tables import Column, Sheet, plain_table, print_sheet, terminal
from .words import NO_PROMISE, count_text, created_text, size_text

if TYPE_CHECKING:
    from rich.console import Console

    from ..engine.bundle.bundle import Bundle
    from ..engine.bundle.manifest import Manifest

__all__ = ["calibration_rows", "plain_table", "print_bundle", "print_precision", "sheets_of"]

# "frozen" is no exit: it is what showing the last frame again would have given, the figure every exit has to beat.
FROZEN = "frozen"
LABELS = {FROZEN: "last frame shown again"}


def print_bundle(bundle: Bundle, *, console: Console | None = None) -> None:
    """Print what `bundle` holds to `console` (default: stdout)."""
    out, manifest = terminal(console), bundle.manifest
    out.print(f"{manifest.name}: {created_text(manifest)}", soft_wrap=True, markup=False)
    *before, files = sheets_of(manifest)
    for sheet in before:
        print_sheet(sheet, out)
    if manifest.calibration is None:
        out.print("Quality by age: not calibrated, so nothing is promised; compile with --holdout to measure it.")
    promise = Promise.of(bundle)
    if promise is None:
        out.print(f"Quality promise: {NO_PROMISE}.")
    else:
        for sentence in promise.sentences:
            out.print(sentence, soft_wrap=True, markup=False)
        qualities, *thresholds = promise.sheets
        print_sheet(qualities, out)
        for sentence in front_sentences(promise.points, promise.record.metric):
            out.print(sentence, soft_wrap=True, markup=False)
        for sheet in thresholds:
            print_sheet(sheet, out)
    if isinstance(manifest.created.get("precision"), Mapping):
        print_precision(manifest, out)
    print_sheet(files, out)


def sheets_of(manifest: Manifest) -> list[Sheet]:
    """What is in a bundle as tables, the files last."""
    calibration = [] if manifest.calibration is None else [_calibration(manifest)]
    return [_tensors(manifest), _candidates(manifest), _exits(manifest), *calibration, _files(manifest)]


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
        forms = {"frames": "d", "PSNR dB, mean": ".2f", "worst": ".2f", "FLIP": ".5f", "largest error": ".2g"}
        rows = []
        for name, figures in parity.items():
            psnr = figures.get("psnr_db") or {}
            values = (figures.get("frames"), psnr.get("mean"), psnr.get("worst"), figures.get("flip"))
            rows.append((name, *values, figures.get("max_error"), figures.get("nan")))
        columns = [Column.number(heading, form) for heading, form in {**forms, "NaN or Inf": "d"}.items()]
        measured = f"How parity was measured: {record.get('measured')}."
        print_sheet(
            Sheet(f"Parity of {record.get('precision')} with fp32", [Column("exit"), *columns], rows, measured), out
        )
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
    sheet = _calibration(manifest)
    names = [column.heading for column in sheet.columns[2:]]
    return [
        {
            "policy": "lockstep",
            "exit": name,
            "age": age,
            "frames": calibration.get("frames"),
            "quality": {
                "against": calibration.get("against"),
                **{metric: cell[0] for metric, cell in zip(names, cells, strict=True) if cell is not None},
            },
        }
        for name, age, *cells in sheet.rows
    ]


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "-"


def _tensors(manifest: Manifest) -> Sheet:
    named = [("input (motion)" if record.is_motion else "input", record.spec) for record in manifest.inputs]
    named += [(f"state (from {record.output})", record.input) for record in manifest.state]
    named += [("output (image)" if spec.name == manifest.image_output else "output", spec) for spec in manifest.outputs]
    named += [("cache", spec) for spec in manifest.cache]
    columns = [Column("kind"), Column("name"), Column("dtype"), Column("shape"), Column.number("size", size_text)]
    rows = [(kind, spec.name, spec.dtype, " x ".join(map(str, spec.shape)), spec.size_bytes) for kind, spec in named]
    return Sheet("Tensors", columns, rows)


def _candidates(manifest: Manifest) -> Sheet:
    """The cuts that were considered; the one that was taken is marked."""
    from ..engine.bundle.manifest import Cut

    cut = manifest.cut or Cut(())
    candidates, taken = cut.candidates, set(cut.tensors)
    ages = sorted({age for c in candidates for age in (c.get("reuse_psnr_db") or {})}, key=int)
    measured = ("consumer_ms", "producer_ms", "cost_ratio", "cache_bytes")
    columns = [Column.number("consumer ms", ".2f"), Column.number("producer ms", ".2f"), Column.number("cost", ".1%")]
    columns.append(Column.number("cache", lambda size: size_text(size) if isinstance(size, int | float) else "-"))
    columns += [Column.number(f"reuse at age {age}, dB", ".2f") for age in ages]
    rows: list[tuple[Any, ...]] = []
    if cut.tensors and not any(set(c.get("tensors", ())) == taken for c in candidates):
        rows.append(("*", cut.tensors, *[None] * len(columns)))
    for candidate in candidates:
        tensors, psnr = candidate.get("tensors", ()), candidate.get("reuse_psnr_db") or {}
        figures = (*(candidate.get(key) for key in measured), *(psnr.get(age) for age in ages))
        rows.append(("*" if set(tensors) == taken else "", tensors, *figures))
    return Sheet("Cut", [Column(""), Column("tensors", ", ".join), *columns], rows)


def _exits(manifest: Manifest) -> Sheet:
    """The exits and their cost; multiply-accumulates where they were counted."""
    from ..engine.promise.calibration import PromiseRecord

    columns = [Column("exit"), Column("module"), Column.number("cost of the whole", ".1%")]
    rows: list[tuple[Any, ...]] = [(record.name, record.module, record.cost_ratio) for record in manifest.exits]
    promise = PromiseRecord.of(manifest)
    if promise is not None:
        columns += [Column.number("MACs", count_text), Column.number("MACs of the whole", ".2%")]
        predictors = [name for name in ("predictor", "predictor_cold") if name in promise.macs]
        counted = [promise.macs.get(name) for name in (*(record.name for record in manifest.exits), *predictors)]
        rows = [
            (*row, macs, None if macs is None else macs / promise.macs["whole"])
            for row, macs in zip([*rows, *((f"({name})", name, None) for name in predictors)], counted, strict=True)
        ]
    return Sheet("Exits", columns, rows)


def _calibration(manifest: Manifest) -> Sheet:
    """Mean quality by exit and age, and the 5th percentile of the frames beside it: a pair, None where not measured."""
    calibration = manifest.calibration or {}
    names = list(calibration.get("metrics", ()))

    def column(metric: str) -> Column:
        form = ".2f" if metric.endswith("_db") else ".4f"
        return Column.number(metric, lambda pair: f"{_number(pair[0], form)} ({_number(pair[1], form)})")

    def pair(metric: str, spread: Mapping[str, Any] | None) -> tuple[Any, Any] | None:
        if spread is None:
            return None
        better_high = metric not in METRICS or METRICS[metric].higher_is_better
        return spread.get("mean"), spread.get("p05" if better_high else "p95")

    return Sheet(
        f"Quality by age, against {calibration.get('against')}, {calibration.get('frames')} frames: mean (worst 5 %)",
        [Column("exit", lambda name: LABELS.get(name, name)), Column.number("age"), *map(column, names)],
        [
            (name, int(age), *(pair(metric, ages[age].get(metric)) for metric in names))
            for name, ages in calibration.get("exits", {}).items()
            for age in sorted(ages, key=int)  # JSON's keys are text, so "10" would come before "2"
        ],
    )


def _files(manifest: Manifest) -> Sheet:
    rows = [(name, record.size_bytes, record.sha256[:16]) for name, record in sorted(manifest.files.items())]
    return Sheet("Files", [Column("file"), Column.number("size", size_text), Column("sha256")], rows)

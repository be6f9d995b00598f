"""What is in a bundle, for people: tensors, the cut and its rivals, exits and what they cost, quality by age, files."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..engine.spec import TensorSpec
from .tables import Sheet, plain_table
from .words import PIPE_WIDTH, created_text, size_text

if TYPE_CHECKING:
    from rich.console import Console

    from ..engine.bundle.bundle import Bundle
    from ..engine.bundle.manifest import Cut, Manifest

__all__ = ["calibration_rows", "plain_table", "print_bundle", "print_precision", "sheets_of"]

# "frozen" is no exit: it is what showing the last frame again would have given, the figure every exit has to beat.
FROZEN = "frozen"
LABELS = {FROZEN: "last frame shown again"}


def print_bundle(bundle: Bundle, *, console: Console | None = None) -> None:
    """Print what `bundle` holds to `console` (default: stdout)."""
    from rich.console import Console

    out = console or Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    manifest = bundle.manifest
    out.print(f"{manifest.name}: {created_text(manifest)}", soft_wrap=True, markup=False)
    *before, files = sheets_of(manifest)
    for sheet in before:
        out.print(sheet.table())
    if manifest.calibration is None:
        out.print("Quality by age: not calibrated, so nothing is promised; compile with --holdout to measure it.")
    _print_promise(bundle, out)
    if isinstance(manifest.created.get("precision"), Mapping):
        print_precision(manifest, out)
    out.print(files.table())


def sheets_of(manifest: Manifest) -> list[Sheet]:
    """What is in a bundle as tables, the files last."""
    calibration = [] if manifest.calibration is None else [_calibration(manifest)]
    return [_tensors(manifest), _candidates(manifest), _exits(manifest), *calibration, _files(manifest)]


def _print_promise(bundle: Bundle, out: Console) -> None:
    """Print what the bundle promises: its rule, every exit's cost and quality, the Pareto front, the thresholds."""
    from ..engine.promise.calibration import Calibration, PromiseRecord
    from .pareto import age_words, by_age, points_of, text_plot
    from .promise_tables import quality_sheet, rule_sentences, thresholds_sheet
    from .words import NO_PROMISE

    record = PromiseRecord.of(bundle.manifest)
    if record is None:
        out.print(f"Quality promise: {NO_PROMISE}.")
        return
    calibration = Calibration.read(bundle)
    points = points_of(calibration, bundle.manifest)
    for sentence in rule_sentences(record, calibration):
        out.print(sentence, soft_wrap=True, markup=False)
    qualities, thresholds = quality_sheet(record, bundle.manifest, points), thresholds_sheet(record)
    out.print(qualities.table())
    out.print(qualities.note, soft_wrap=True, markup=False)
    groups = by_age(points)
    # The youngest cache, and none: where the ages between lie is in the table.
    for age in dict.fromkeys((min((age for age in groups if age), default=0), 0)):
        if len(groups.get(age, ())) > 1:
            out.print(f"\n[bold]Pareto front, {age_words(age)}[/bold]")
            out.print(text_plot(groups[age], record.metric), soft_wrap=True, markup=False)
    out.print()
    if thresholds is not None:
        out.print(thresholds.table())
        out.print(thresholds.note, soft_wrap=True, markup=False)


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


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "-"


def _tensors(manifest: Manifest) -> Sheet:
    rows: list[tuple[str, ...]] = []

    def add(kind: str, spec: TensorSpec) -> None:
        rows.append((kind, spec.name, spec.dtype, " x ".join(map(str, spec.shape)), size_text(spec.size_bytes)))

    for record in manifest.inputs:
        add("input" if record.role == "generator" else "input (motion)", record.spec)
    for spec in manifest.outputs:
        add("output (image)" if spec.name == manifest.image_output else "output", spec)
    for spec in manifest.cache:
        add("cache", spec)
    return Sheet("Tensors", ("kind", "name", "dtype", "shape", "size"), rows, frozenset(["size"]))


def _candidates(manifest: Manifest) -> Sheet:
    """The cuts that were considered; the one that was taken is marked."""
    cut = manifest.cut or Cut(())
    ages = sorted({age for c in cut.candidates for age in (c.get("reuse_psnr_db") or {})}, key=int)
    reuse = [f"reuse at age {age}, dB" for age in ages]
    columns = ["consumer ms", "producer ms", "cost", "cache", *reuse]
    rows: list[tuple[str, ...]] = []
    taken = set(cut.tensors)
    if cut.tensors and not any(set(c.get("tensors", ())) == taken for c in cut.candidates):
        rows.append(("*", ", ".join(cut.tensors), *["-"] * len(columns)))
    for candidate in cut.candidates:
        tensors = candidate.get("tensors", ())
        cache_bytes = candidate.get("cache_bytes")
        psnr = candidate.get("reuse_psnr_db") or {}
        rows.append(
            (
                "*" if set(tensors) == taken else "",
                ", ".join(tensors),
                _number(candidate.get("consumer_ms"), ".2f"),
                _number(candidate.get("producer_ms"), ".2f"),
                _number(candidate.get("cost_ratio"), ".1%"),
                size_text(cache_bytes) if isinstance(cache_bytes, int | float) else "-",
                *(_number(psnr.get(age), ".2f") for age in ages),
            )
        )
    return Sheet("Cut", ("", "tensors", *columns), rows, frozenset(columns))


def _exits(manifest: Manifest) -> Sheet:
    """The exits and their cost; multiply-accumulates where they were counted."""
    from ..engine.promise.calibration import PromiseRecord
    from .promise_tables import count_text

    rows: list[tuple[str, ...]] = [
        (record.name, record.module, f"{record.cost_ratio:.1%}") for record in manifest.exits
    ]
    columns = ["cost of the whole"]
    promise = PromiseRecord.of(manifest)
    if promise is not None:
        columns += ["MACs", "MACs of the whole"]
        predictors = [name for name in ("predictor", "predictor_cold") if name in promise.macs]
        rows += [(f"({name})", name, "-") for name in predictors]
        counted = [promise.macs.get(name) for name in (*(record.name for record in manifest.exits), *predictors)]
        rows = [
            (*row, "-", "-") if macs is None else (*row, count_text(macs), f"{macs / promise.macs['whole']:.2%}")
            for row, macs in zip(rows, counted, strict=True)
        ]
    return Sheet("Exits", ("exit", "module", *columns), rows, frozenset(columns))


def _calibration(manifest: Manifest) -> Sheet:
    """Mean quality by exit and age, and the 5th percentile of the frames beside it."""
    from ..engine.metrics.images import METRICS

    calibration = manifest.calibration or {}
    names = list(calibration.get("metrics", ()))
    title = (
        f"Quality by age, against {calibration.get('against')}, {calibration.get('frames')} frames: mean (worst 5 %)"
    )
    rows = []
    for name, ages in calibration.get("exits", {}).items():
        for age, metrics in _by_age(ages):
            cells = []
            for metric in names:
                spread = metrics.get(metric) or {}
                form = ".2f" if metric.endswith("_db") else ".4f"
                better_high = metric not in METRICS or METRICS[metric].higher_is_better
                worst = spread.get("p05" if better_high else "p95")
                cells.append(f"{_number(spread.get('mean'), form)} ({_number(worst, form)})")
            rows.append((LABELS.get(name, name), age, *cells))
    return Sheet(title, ("exit", "age", *names), rows, frozenset(["age", *names]))


def _files(manifest: Manifest) -> Sheet:
    rows = [(name, size_text(record.size_bytes), record.sha256[:16]) for name, record in sorted(manifest.files.items())]
    return Sheet("Files", ("file", "size", "sha256"), rows, frozenset(["size"]))

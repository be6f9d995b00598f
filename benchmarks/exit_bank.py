"""Is the guide bank worth it? The same branches, trained alike with and without it, on frames that nothing has seen.

    python -m benchmarks.exit_bank --data CLIPS --lpips squeeze_v0.1.safetensors --case d6-128 --json exit_bank.json

Takes the bundle that `benchmarks.early_exits` has left in its work folder, trains its branches again without a bank
(same depths, widths, steps, batches and frames drawn), and compares their answers with the whole generator's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.early_exits import CASES, THRESHOLDS, load_case
from benchmarks.exit_cases import Case
from benchmarks.exit_tables import COLD, kept_table, within
from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.metrics.images import measure_frames
from warpcache.engine.metrics.lpips import Lpips
from warpcache.engine.promise.calibration import PromiseRecord
from warpcache.export.branches.branches import Branch, BranchOptions, train_branches
from warpcache.export.graph.index import load_model
from warpcache.export.graph.macs import count_macs
from warpcache.export.graph.run import open_session, run_session
from warpcache.export.training.perceptual import PerceptualLoss
from warpcache.report.policies import environment
from warpcache.tasks.progress import ProgressBar


@click.command()
@click.option("--data", type=click.Path(path_type=Path), envvar="WARPCACHE_CLIPS", required=True, help="The clips.")
@click.option("--lpips", type=click.Path(path_type=Path), envvar="WARPCACHE_LPIPS", required=True)
@click.option("--case", "names", type=click.Choice(CASES), multiple=True, default=("d6-128",), show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default="out/early_exits", show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(data: Path, lpips: Path, names: tuple[str, ...], work: Path, json_path: Path | None) -> None:
    """Train a bundle's branches without their guide bank and compare."""
    console = Console(width=150, highlight=False)
    report: dict[str, Any] = {"schema": 1, "command": "exit_bank", "environment": environment(), "cases": {}}
    for name in names:
        case = load_case(name, data, work)
        rows = _compare(case, Bundle.open(case.path), lpips)
        shown = Table(title=f"{name}: branches with and without their guide bank", title_justify="left")
        for column in ("branch", "bank", "MACs", "mean", "p95", *(f"within {t:g}" for t in THRESHOLDS)):
            shown.add_column(column, justify="left" if column in ("branch", "bank") else "right")
        for row in rows:
            shares = [f"{share:.1%}" for share in row["within"].values()]
            entries = str(row["bank"] or "none")
            shown.add_row(
                row["branch"], entries, f"{row['macs']:.2%}", f"{row['mean']:.4f}", f"{row['p95']:.4f}", *shares
            )
        console.print(shown)
        report["cases"][name] = rows
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _compare(case: Case, bundle: Bundle, weights: Path) -> list[dict[str, Any]]:
    """One row a branch and kind of training."""
    promise = PromiseRecord.of(bundle.manifest)
    image = bundle.manifest.image_output
    assert promise is not None
    assert image is not None
    lpips = Lpips.load(weights)
    records = bundle.manifest.created["training"]["branches"]
    with ProgressBar() as progress:
        table = kept_table(case.work / f"{case.name}.table.npz", bundle, case.test, promise, lpips, progress)
        plain = _without_bank(case, bundle, image, records, weights, progress)
    whole = promise.macs["whole"]
    rows = []
    for branch in plain:
        session = open_session(branch.graph, threads=1)
        answers = np.concatenate(
            [
                run_session(session, {"condition": case.test["condition"][t : t + 1]}, [image])[image]
                for t in range(len(table.images))
            ]
        )
        alone = np.asarray(measure_frames(answers, table.images, [promise.metric], lpips=lpips)[promise.metric])
        # Ranked by measured time, so names may be swapped between the two; depth and width say which is which.
        name = next(
            n
            for n, r in records.items()
            if (r["depth"], r["width"]) == (branch.record["depth"], branch.record["width"])
        )
        bank = records[name]["bank"]
        rows.append(
            _row(name, None if bank is None else bank["entries"], promise.macs[name] / whole, table.quality[COLD][name])
        )
        rows.append(_row(name, None, count_macs(branch.graph) / whole, alone))
    return rows


def _without_bank(
    case: Case, bundle: Bundle, image: str, records: dict[str, Any], weights: Path, progress: Any
) -> list[Branch]:
    model = load_model(bundle.file("generator.onnx"))
    session = open_session(model)
    frames = len(case.train["condition"])
    images = np.concatenate(
        [run_session(session, {"condition": case.train["condition"][t : t + 1]}, [image])[image] for t in range(frames)]
    )
    first = next(iter(records.values()))
    options = BranchOptions(
        count=len(records),
        places=[record["depth"] for record in records.values()],
        widths=[record["width"] for record in records.values()],
        bank_size=0,
        steps=first["steps"],
        batch=first["batch"],
        seed=first["seed"],
        joint=first["joint"],
    )
    arrays = {name: case.train[name] for name in ("condition",)}
    checkpoint = case.work / f"{case.name}.no-bank.checkpoint.safetensors"
    return train_branches(
        model,
        arrays,
        images,
        options=options,
        perceptual=PerceptualLoss(weights),
        progress=progress,
        checkpoint=checkpoint,
    )


def _row(name: str, bank: int | None, macs: float, values: NDArray[np.float64]) -> dict[str, Any]:
    return {
        "branch": name,
        "bank": bank,
        "macs": macs,
        "mean": float(values.mean()),
        "p95": float(np.quantile(values, 0.95)),
        "within": {str(threshold): within(values, threshold) for threshold in THRESHOLDS},
    }


if __name__ == "__main__":
    main()

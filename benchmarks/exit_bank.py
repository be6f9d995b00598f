"""Is the guide bank worth it? The same branches, trained alike with and without it, on frames that nothing has seen.

    python -m benchmarks.exit_bank --data CLIPS --lpips squeeze_v0.1.safetensors --case d6-128 --json exit_bank.json

Takes the bundle that `benchmarks.early_exits` has left in its work folder, trains its branches again without a bank
(same depths, widths, steps, batches and frames drawn), and compares their answers with the whole generator's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from benchmarks import flags
from benchmarks.early_exits import CASES, QUALITY_COLUMNS, THRESHOLDS, load_case
from benchmarks.exit_cases import Case
from benchmarks.exit_tables import COLD, kept_table, within
from benchmarks.making import Arrays
from benchmarks.records import show_table, write_record
from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.bundle.roles import Role
from warpcache.engine.metrics.images import measure_frames
from warpcache.engine.metrics.lpips import Lpips
from warpcache.engine.promise.calibration import PromiseRecord
from warpcache.export.branches.branches import Branch, BranchOptions, train_branches
from warpcache.export.graph.index import load_model
from warpcache.export.graph.macs import count_macs
from warpcache.export.graph.run import open_session, run_session
from warpcache.export.training.perceptual import PerceptualLoss
from warpcache.report.tables import Column
from warpcache.tasks.options import option, takes
from warpcache.tasks.progress import ProgressBar


@dataclass(frozen=True)
class Options(flags.OnClips):
    """Which cases are compared, and where they are kept."""

    names: tuple[str, ...] = option("--case", default=("d6-128",), type=click.Choice(CASES))
    work: Path = option("--work", default="out/early_exits")


@click.command()
@takes(Options)
def main(options: Options) -> None:
    """Train a bundle's branches without their guide bank and compare."""
    columns = (Column("branch"), Column("bank"), Column.number("MACs", ".2%"), *QUALITY_COLUMNS)
    cases: dict[str, Any] = {}
    for name in options.names:
        case = load_case(name, options.data, options.work)
        rows = cases[name] = _compare(case, Bundle.open(case.path), options.lpips)
        shown = [
            (row["branch"], row["bank"] or "none", row["macs"], row["mean"], row["p95"], *row["within"].values())
            for row in rows
        ]
        show_table(f"{name}: branches with and without their guide bank", columns, shown)
    write_record(options.json_path, "exit_bank", cases=cases)


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
        unbanked = _without_bank(case, bundle, image, records, weights, progress)
    whole = promise.macs[Role.WHOLE]
    rows = []
    for branch in unbanked:
        session = open_session(branch.graph, threads=1)
        answers = _answers(session, case.test, image)
        alone = np.asarray(measure_frames(answers, table.images, [promise.metric], lpips=lpips)[promise.metric])
        # Ranked by measured time, so names may be swapped between the two; depth and width say which is which.
        shape = branch.record["depth"], branch.record["width"]
        name = next(name for name, record in records.items() if (record["depth"], record["width"]) == shape)
        bank = records[name]["bank"]
        rows.append(
            _row(name, None if bank is None else bank["entries"], promise.macs[name] / whole, table.quality[COLD][name])
        )
        rows.append(_row(name, None, count_macs(branch.graph) / whole, alone))
    return rows


def _answers(session: Any, frames: Arrays, image: str) -> NDArray[np.float32]:
    """A module's images of all frames, float32 [T, C, H, W]."""
    conditions = frames["condition"]
    return np.concatenate(
        [run_session(session, {"condition": conditions[t : t + 1]}, [image])[image] for t in range(len(conditions))]
    )


def _without_bank(
    case: Case, bundle: Bundle, image: str, records: dict[str, Any], weights: Path, progress: Any
) -> list[Branch]:
    model = load_model(bundle.file("generator.onnx"))
    session = open_session(model)
    images = _answers(session, case.train, image)
    first = next(iter(records.values()))
    options = BranchOptions(
        count=len(records),
        places=[record["depth"] for record in records.values()],
        widths=[record["width"] for record in records.values()],
        bank_size=0,
        **{key: first[key] for key in ("steps", "batch", "seed", "joint")},
    )
    checkpoint = case.work / f"{case.name}.no-bank.checkpoint.safetensors"
    arrays, loss = {"condition": case.train["condition"]}, PerceptualLoss(weights)
    return train_branches(
        model, arrays, images, options=options, perceptual=loss, progress=progress, checkpoint=checkpoint
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

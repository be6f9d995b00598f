"""The commands that stream frames through bundles: demo, run, bench."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..tasks.choices import BenchOptions, DemoOptions, RunOptions
from ..tasks.options import PATH, json_option, takes

if TYPE_CHECKING:
    from ..tasks.bench import Measured

__all__ = ["bench", "demo", "run"]

EPILOG_DEMO = "Example:  warpcache demo --frames 300 --out warpcache-demo"
EPILOG_RUN = "Example:  warpcache run generator.warp drive.npz --out answer.mp4 --policy every:4"
EPILOG_BENCH = "Example:  warpcache bench generator.warp test.npz --policy full --policy async --json bench.json"


@click.command(epilog=EPILOG_DEMO, short_help="Stream a synthetic head, whole and cut, side by side.")
@takes(DemoOptions)
@json_option
def demo(options: DemoOptions, json_path: Path | None) -> None:
    """Stream a synthetic head with the whole generator and cut and cached, side by side.

    Needs no torch and no download. Prints a table and writes report.html and frames.mp4.
    """
    from ..tasks.demo import run_demo
    from ..tasks.progress import ProgressBar

    with ProgressBar() as progress:
        outcome = run_demo(options, progress=progress)
    _show_measured(outcome.measured, "demo", json_path)
    click.echo(f"wrote {outcome.report} and {outcome.video}")


@click.command(epilog=EPILOG_RUN, short_help="Stream inputs through a bundle, write the answer.")
@click.argument("bundle", metavar="B.warp", type=PATH)
@click.argument("inputs", metavar="INPUTS.npz|CLIP.mp4", type=PATH)
@takes(RunOptions)
@json_option
def run(bundle: Path, inputs: Path, options: RunOptions, json_path: Path | None) -> None:
    """Stream inputs through a bundle and write what it answers.

    Under async, frames arrive at --fps, or else at the pace of the clip or the bundle; the other policies take the
    next frame when the last one is answered, unless --fps is given.

    With --quality every frame is answered by the cheapest exit that keeps it, and the table says which answered, what
    was predicted, and what audits found. LPIPS is needed for the audits of a quality in LPIPS alone.
    """
    from ..tasks.bench import run_bundle
    from ..tasks.progress import ProgressBar

    with ProgressBar() as progress:
        measured = run_bundle(bundle, inputs, options, progress=progress)
    _show_measured(measured, "run", json_path)
    click.echo(f"wrote {options.out}")


@click.command(epilog=EPILOG_BENCH, short_help="Measure a bundle under several policies.")
@click.argument("bundle", metavar="B.warp", type=PATH)
@click.argument("inputs", metavar="INPUTS.npz|CLIP.mp4", type=PATH)
@takes(BenchOptions)
@json_option
def bench(bundle: Path, inputs: Path, options: BenchOptions, json_path: Path | None) -> None:
    """Measure a bundle under several policies on the same inputs: latency, age, quality.

    Quality is against the whole generator's output, and against the truth where INPUTS.npz holds an array `truth`.

    With --quality every policy is measured a second time with its frames routed, and of each the share of the frames
    that keep the quality.
    """
    from ..tasks.bench import bench_bundle
    from ..tasks.progress import ProgressBar

    with ProgressBar() as progress:
        measured = bench_bundle(bundle, inputs, options, progress=progress)
    _show_measured(measured, "bench", json_path)


def _show_measured(measured: Measured, command: str, json_path: Path | None) -> None:
    """Print what was measured, and write it as JSON where asked for."""
    from ..report.policies import print_table, write_json

    print_table(measured.rows, title=measured.title, caption=measured.caption)
    if json_path is not None:
        write_json(json_path, command, measured.rows, facts=measured.facts)

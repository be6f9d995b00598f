"""The commands that stream frames through bundles: demo, run, bench."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import (
    AGE,
    COUNT,
    PATH,
    RATE,
    checked_policy,
    device_options,
    exit_option,
    json_option,
    lpips_option,
    quality_options,
    threads_option,
    writable,
)

if TYPE_CHECKING:
    from ..tasks.bench import ExitName, Measured
    from ..tasks.device_choice import DeviceChoice
    from ..tasks.quality_choice import QualityChoice

__all__ = ["bench", "demo", "run"]

EPILOG_DEMO = "Example:  warpcache demo --frames 300 --out warpcache-demo"
EPILOG_RUN = "Example:  warpcache run generator.warp drive.npz --out answer.mp4 --policy every:4"
EPILOG_BENCH = "Example:  warpcache bench generator.warp test.npz --policy full --policy async --json bench.json"


@click.command(epilog=EPILOG_DEMO, short_help="Stream a synthetic head, whole and cut, side by side.")
@click.option("--frames", type=COUNT, default=300, show_default=True, help="Frames to stream.")
@click.option(
    "--out",
    type=PATH,
    callback=writable(),
    default="warpcache-demo",
    show_default=True,
    help="Folder for the report and the video.",
)
@lpips_option
@threads_option
@device_options
@json_option
def demo(
    frames: int, out: Path, lpips: Path | None, threads: int | None, on: DeviceChoice, json_path: Path | None
) -> None:
    """Stream a synthetic head with the whole generator and cut and cached, side by side.

    Needs no torch and no download. Prints a table and writes report.html and frames.mp4.
    """
    from ..tasks.demo import run_demo
    from ..tasks.progress import ProgressBar

    with ProgressBar() as progress:
        outcome = run_demo(frames=frames, out=out, lpips=lpips, threads=threads, on=on, progress=progress)
    _show_measured(outcome.measured, "demo", json_path)
    click.echo(f"wrote {outcome.report} and {outcome.video}")


@click.command(epilog=EPILOG_RUN, short_help="Stream inputs through a bundle, write the answer.")
@click.argument("bundle", metavar="B.warp", type=PATH)
@click.argument("inputs", metavar="INPUTS.npz|CLIP.mp4", type=PATH)
@click.option(
    "--out",
    type=PATH,
    callback=writable(".mp4", ".npz"),
    required=True,
    help="The answer: a video, or every output's array.",
)
@click.option(
    "--policy", callback=checked_policy, metavar="full|every:N|async", help="When producers run; default: async."
)
@click.option("--age", type=AGE, help="Lockstep: answer frame t from the cache of frame t - AGE, deterministic.")
@exit_option
@click.option("--fps", type=RATE, help="Pace of arrival and of the video; default: the clip's or the bundle's.")
@quality_options
@lpips_option
@threads_option
@device_options
@json_option
def run(
    bundle: Path,
    inputs: Path,
    out: Path,
    policy: str | None,
    age: int | None,
    exit_name: ExitName | None,
    fps: float | None,
    promise: QualityChoice | None,
    lpips: Path | None,
    threads: int | None,
    on: DeviceChoice,
    json_path: Path | None,
) -> None:
    """Stream inputs through a bundle and write what it answers.

    Under async, frames arrive at --fps, or else at the pace of the clip or the bundle; the other policies take the
    next frame when the last one is answered, unless --fps is given.

    With --quality every frame is answered by the cheapest exit that keeps it, and the table says which answered, what
    was predicted, and what audits found. LPIPS is needed for the audits of a quality in LPIPS alone.
    """
    from ..engine.schedule.policy import Policy
    from ..tasks.bench import run_bundle
    from ..tasks.progress import ProgressBar

    if policy is not None and age is not None:
        raise click.UsageError("--age is a mode of its own (lockstep); leave --policy or --age out")
    chosen = Policy.choose(policy, age)
    with ProgressBar() as progress:
        measured = run_bundle(
            bundle,
            inputs,
            out,
            policy=chosen,
            exit_name=exit_name,
            fps=fps,
            threads=threads,
            on=on,
            promise=promise,
            lpips=lpips,
            progress=progress,
        )
    _show_measured(measured, "run", json_path)
    click.echo(f"wrote {out}")


@click.command(epilog=EPILOG_BENCH, short_help="Measure a bundle under several policies.")
@click.argument("bundle", metavar="B.warp", type=PATH)
@click.argument("inputs", metavar="INPUTS.npz|CLIP.mp4", type=PATH)
@click.option(
    "--policy",
    "policies",
    callback=checked_policy,
    multiple=True,
    metavar="full|every:N|async",
    help="Repeatable; default: full, every:4, async.",
)
@click.option("--age", "ages", type=AGE, multiple=True, help="Repeatable; adds a lockstep run at this age.")
@exit_option
@click.option("--fps", type=RATE, help="Pace of arrival under async; default: the clip's or the bundle's.")
@click.option(
    "--measure-every", type=COUNT, help="Measure quality on every N-th frame; default: about 300 frames in all."
)
@quality_options
@threads_option
@device_options
@lpips_option
@json_option
def bench(
    bundle: Path,
    inputs: Path,
    policies: tuple[str, ...],
    ages: tuple[int, ...],
    exit_name: ExitName | None,
    fps: float | None,
    measure_every: int | None,
    promise: QualityChoice | None,
    threads: int | None,
    on: DeviceChoice,
    lpips: Path | None,
    json_path: Path | None,
) -> None:
    """Measure a bundle under several policies on the same inputs: latency, age, quality.

    Quality is against the whole generator's output, and against the truth where INPUTS.npz holds an array `truth`.

    With --quality every policy is measured a second time with its frames routed, and of each the share of the frames
    that keep the quality.
    """
    from ..engine.schedule.policy import Policy
    from ..tasks.bench import bench_bundle
    from ..tasks.progress import ProgressBar

    names = policies or (() if ages else ("full", "every:4", "async"))
    chosen = [*(Policy.parse(name) for name in names), *(Policy.lockstep(age) for age in ages)]
    with ProgressBar() as progress:
        measured = bench_bundle(
            bundle,
            inputs,
            policies=chosen,
            exit_name=exit_name,
            fps=fps,
            measure_every=measure_every,
            threads=threads,
            on=on,
            promise=promise,
            lpips=lpips,
            progress=progress,
        )
    _show_measured(measured, "bench", json_path)


def _show_measured(measured: Measured, command: str, json_path: Path | None) -> None:
    """Print what was measured, and write it as JSON where asked for."""
    from ..report.policies import print_table, write_json

    print_table(measured.rows, title=measured.title, caption=measured.caption)
    if json_path is not None:
        write_json(json_path, command, measured.rows, facts=measured.facts)

"""The command line: demo, compile, split, build, run, bench, inspect, doctor.

Each command parses its arguments, calls one function of the library and prints what came of it. Whatever a user can
cause ends as one sentence on stderr: exit code 0 is done, 1 failed, 2 wrong usage. Heavy imports (ONNX Runtime, PyAV,
matplotlib, torch) happen inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import errno
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from . import __version__
from .engine.errors import DeviceError, ExportError, InputError, WarpcacheError
from .options import (
    AGE,
    COUNT,
    PATH,
    RATE,
    checked_policy,
    cut_option,
    device_options,
    exit_option,
    json_option,
    lpips_option,
    one_line,
    split_names,
    threads_option,
    writable,
)

if TYPE_CHECKING:
    from .bench import ExitName, Measured
    from .building import Precision
    from .device_choice import DeviceChoice
    from .engine.bundle import Bundle
    from .engine.tensorrt_flavour import FlavourName

__all__ = ["cli", "main"]

EPILOG_DEMO = "Example:  warpcache demo --frames 300 --out warpcache-demo"
EPILOG_COMPILE = (
    "Example:  warpcache compile my_models.py:generator --weights generator.safetensors --inputs train.npz "
    "--holdout test.npz --budget 0.1 --out generator.warp"
)
EPILOG_SPLIT = "Example:  warpcache split generator.onnx --inputs train.npz --out generator.warp"
EPILOG_BUILD = (
    "Example:  warpcache build generator.warp --backend tensorrt-rtx --precision fp16 --inputs test.npz "
    "--target sm_86,sm_89,sm_120 --out edge"
)
EPILOG_RUN = "Example:  warpcache run generator.warp drive.npz --out answer.mp4 --policy every:4"
EPILOG_BENCH = "Example:  warpcache bench generator.warp test.npz --policy full --policy async --json bench.json"
EPILOG_INSPECT = "Example:  warpcache inspect generator.warp"
EPILOG_DOCTOR = "Example:  warpcache doctor --json"


class Failure(click.ClickException):
    """A command that failed for a reason the user can mend: one sentence on stderr, exit code 1."""

    exit_code = 1

    def show(self, file: Any = None) -> None:
        """Write the sentence to stderr."""
        click.echo(f"warpcache: {self.format_message()}", file=file, err=file is None)


class Commands(click.Group):
    """The command group; it turns everything a user can cause into a `Failure`."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was asked for.

        Raises:
            Failure: If the command failed on its input, on the disk, or was interrupted.
        """
        try:
            return super().invoke(ctx)
        except DeviceError as exc:
            raise Failure(_with_doctor(one_line(str(exc)))) from exc
        except WarpcacheError as exc:
            raise Failure(one_line(str(exc))) from exc
        except KeyboardInterrupt as exc:
            raise Failure("interrupted; nothing was written") from exc
        except MemoryError as exc:
            raise Failure("out of memory; use fewer frames or a machine with more memory") from exc
        except BrokenPipeError:
            raise  # the reader of stdout went away (`| head`): click ends quietly
        except OSError as exc:
            raise Failure(_os_sentence(exc)) from exc


def _with_doctor(message: str) -> str:
    """What went wrong with a GPU or its driver, and who says what is there."""
    return message if "warpcache doctor" in message else f"{message}; `warpcache doctor` says what is here"


def _os_sentence(exc: OSError) -> str:
    """What an error of the operating system means and what to do."""
    where = f" {str(exc.filename)!r}" if exc.filename is not None else ""
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full while writing{where}; free some space and try again"
    if exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission for{where or ' a file'}; choose another place or change its permissions"
    return one_line(f"{exc.strerror or exc}{where}")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="warpcache")
def cli() -> None:
    """Answer a heavy image generator's frames at a shallow network's latency, with the quality measured."""


@cli.command(epilog=EPILOG_DEMO, short_help="Stream a synthetic head, whole and cut, side by side.")
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
    from .demo import run_demo
    from .progress import ProgressBar

    with ProgressBar() as progress:
        outcome = run_demo(frames=frames, out=out, lpips=lpips, threads=threads, on=on, progress=progress)
    _show_measured(outcome.measured, "demo", json_path)
    click.echo(f"wrote {outcome.report} and {outcome.video}")


@cli.command("compile", epilog=EPILOG_COMPILE, short_help="Cut a PyTorch generator and train its warp adapter.")
@click.argument("factory", metavar="MODULE:FACTORY")
@click.option("--weights", type=PATH, help="The generator's weights, .safetensors; without it as the factory made it.")
@click.option("--inputs", type=PATH, required=True, help="Frames to train on: .npz, or .mp4 for one image input.")
@click.option(
    "--holdout", type=PATH, help="Frames to calibrate on; without it the last quarter of --inputs is kept back."
)
@cut_option
@click.option(
    "--budget",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.1,
    show_default=True,
    metavar="RATIO",
    help="The consumer's cost as a fraction of the generator's.",
)
@click.option(
    "--steps", type=click.IntRange(min=0), help="Training steps; 0 trains nothing (plain reuse of the cache)."
)
@click.option(
    "--max-age", type=COUNT, default=4, show_default=True, help="Oldest cache to train and calibrate for, in frames."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the training.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted compile of the same bundle.")
@click.option("--out", type=PATH, callback=writable(".warp"), required=True, help="The bundle to write, NAME.warp.")
@lpips_option
@json_option
def compile_command(
    factory: str,
    weights: Path | None,
    inputs: Path,
    holdout: Path | None,
    cut: str,
    budget: float,
    steps: int | None,
    max_age: int,
    seed: int,
    resume: bool,
    out: Path,
    lpips: Path | None,
    json_path: Path | None,
) -> None:
    """Cut a PyTorch generator, train its warp adapter, calibrate it and write a bundle.

    MODULE is a dotted module or a .py file, FACTORY a function in it that returns the torch.nn.Module.
    """
    _refuse_existing(out)
    from .compiling import compile_files
    from .progress import ProgressBar

    with _checkpoint_named(out.with_suffix(".checkpoint.safetensors")), _export_installed(), ProgressBar() as progress:
        bundle = compile_files(
            factory,
            weights=weights,
            inputs=inputs,
            holdout=holdout,
            cut=cut,
            budget=budget,
            steps=steps,
            out=out,
            lpips=lpips,
            seed=seed,
            max_age=max_age,
            progress=progress,
            resume=resume,
        )
    _show_compiled(bundle, "compile", json_path)


@cli.command(epilog=EPILOG_SPLIT, short_help="Cut an ONNX model; nothing is trained.")
@click.argument("model", metavar="MODEL.onnx", type=PATH)
@click.option("--inputs", type=PATH, required=True, help="Sample frames to choose and check the cut on.")
@cut_option
@click.option("--out", type=PATH, callback=writable(".warp"), required=True, help="The bundle to write, NAME.warp.")
@json_option
def split(model: Path, inputs: Path, cut: str, out: Path, json_path: Path | None) -> None:
    """Cut an ONNX model whose PyTorch source is not at hand; nothing is trained."""
    _refuse_existing(out)
    from .compiling import split_files
    from .progress import ProgressBar

    with _export_installed(), ProgressBar() as progress:
        bundle = split_files(model, inputs=inputs, cut=cut, out=out, progress=progress)
    _show_compiled(bundle, "split", json_path)


@cli.command(epilog=EPILOG_BUILD, short_help="Build a bundle's TensorRT engines, ahead of time.")
@click.argument("bundle", metavar="B.warp", type=PATH)
@click.option(
    "--backend",
    type=click.Choice(["tensorrt-rtx", "tensorrt"]),
    required=True,
    help="tensorrt-rtx builds for named GPUs, none needs to be here; tensorrt builds for the GPU that is here.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16", "int8", "fp8"]),
    help="Convert the bundle to this precision first; default: build it as it is.",
)
@click.option(
    "--target",
    callback=split_names,
    metavar="sm_XX[,sm_YY]|current",
    help="GPUs to build for; default: the one that is here, or without one, with tensorrt-rtx, sm_86,sm_89,sm_120.",
)
@click.option(
    "--inputs", type=PATH, help="Frames to calibrate int8 and fp8 on, and to measure any conversion's parity on."
)
@click.option(
    "--keep", multiple=True, metavar="PATH", help="Repeatable; a PyTorch module path or node to keep in fp32."
)
@click.option(
    "--cache-precision",
    type=click.Choice(["fp32", "fp16"]),
    help="Of the cache tensors; default: fp16 where parity allows it.",
)
@click.option("--min-psnr", type=RATE, help="Parity in dB that every answer must reach against fp32; default: 45.")
@click.option(
    "--out",
    type=PATH,
    callback=writable(),
    help="Write a folder that runs the bundle without anything else of this project; default: the engine cache.",
)
@json_option
def build(
    bundle: Path,
    backend: FlavourName,
    precision: Precision | None,
    target: tuple[str, ...] | None,
    inputs: Path | None,
    keep: tuple[str, ...],
    cache_precision: Literal["fp32", "fp16"] | None,
    min_psnr: float | None,
    out: Path | None,
    json_path: Path | None,
) -> None:
    """Build the TensorRT engines of a bundle, so that nothing is built when it is first run.

    With --precision the bundle is converted first, and written as NAME.PRECISION.warp beside the one it was made from.
    """
    from .building import Conversion, build_bundle, print_built
    from .progress import ProgressBar
    from .report import write_json

    asked = Conversion(inputs=inputs, keep=keep, cache_precision=cache_precision, min_psnr_db=min_psnr)
    with _engines_kept(), _export_installed("build --precision needs"), ProgressBar() as progress:
        built = build_bundle(
            bundle,
            backend=backend,
            precision=precision,
            targets=target,
            conversion=asked,
            out=out,
            progress=progress,
        )
    print_built(built)
    if json_path is not None:
        write_json(json_path, "build", built.rows(), more=built.record())


@cli.command(epilog=EPILOG_RUN, short_help="Stream inputs through a bundle, write the answer.")
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
    threads: int | None,
    on: DeviceChoice,
    json_path: Path | None,
) -> None:
    """Stream inputs through a bundle and write what it answers.

    Under async, frames arrive at --fps, or else at the pace of the clip or the bundle; the other policies take the
    next frame when the last one is answered, unless --fps is given.
    """
    from .bench import run_bundle
    from .engine.policy import Policy
    from .progress import ProgressBar

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
            progress=progress,
        )
    _show_measured(measured, "run", json_path)
    click.echo(f"wrote {out}")


@cli.command(epilog=EPILOG_BENCH, short_help="Measure a bundle under several policies.")
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
    threads: int | None,
    on: DeviceChoice,
    lpips: Path | None,
    json_path: Path | None,
) -> None:
    """Measure a bundle under several policies on the same inputs: latency, age, quality.

    Quality is against the whole generator's output, and against the truth where INPUTS.npz holds an array `truth`.
    """
    from .bench import bench_bundle
    from .engine.policy import Policy
    from .progress import ProgressBar

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
            lpips=lpips,
            progress=progress,
        )
    _show_measured(measured, "bench", json_path)


@cli.command(epilog=EPILOG_INSPECT, short_help="Show what is in a bundle.")
@click.argument("bundle", metavar="B.warp", type=PATH)
def inspect(bundle: Path) -> None:
    """Show what is in a bundle: tensors, cut, exits, measured quality by age, files."""
    from .describe import print_bundle
    from .engine.bundle import Bundle

    print_bundle(Bundle.open(bundle))


@cli.command(epilog=EPILOG_DOCTOR, short_help="Show what is here and what fits together.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def doctor(as_json: bool) -> None:
    """Show what is here: GPUs, driver, packages; what fits together, and what to do about the rest."""
    import json

    from .doctor import examine, print_report

    report = examine()
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2))
    else:
        print_report(report)


def main() -> None:
    """Run the command line and leave the process with its exit code."""
    # What ends a job from outside (timeout, a service manager, a closed terminal) is to clean up as Ctrl-C does.
    for name in ("SIGTERM", "SIGHUP"):
        ended = getattr(signal, name, None)
        if ended is not None and signal.getsignal(ended) is signal.SIG_DFL:
            signal.signal(ended, signal.default_int_handler)
    cli(prog_name="warpcache")


def _refuse_existing(out: Path) -> None:
    """Refuse, before any work is done, to write a bundle over something that stands there."""
    if out.exists() or out.is_symlink():
        raise InputError(f"{str(out)!r} already exists; remove it or choose another --out")


@contextmanager
def _checkpoint_named(checkpoint: Path) -> Iterator[None]:
    """Say of an interrupted compile what it left and how to go on from it."""
    try:
        yield
    except KeyboardInterrupt as exc:
        if checkpoint.exists():
            raise Failure(
                f"interrupted; no bundle was written, the training so far is in {str(checkpoint)!r}: "
                "go on from it with --resume"
            ) from exc
        raise


@contextmanager
def _engines_kept() -> Iterator[None]:
    """Say of an interrupted build what it left."""
    try:
        yield
    except KeyboardInterrupt as exc:
        raise Failure("interrupted; nothing unfinished was left behind, engines that were ready are kept") from exc


@contextmanager
def _export_installed(needing: str = "compile and split need") -> Iterator[None]:
    """Turn a missing package of the `export` extra into one sentence that says what to install."""
    try:
        yield
    except ModuleNotFoundError as exc:
        if (exc.name or "").split(".")[0] not in {"torch", "onnx", "onnxscript", "onnx_ir"}:
            raise
        raise ExportError(f'{exc.name} is not installed; {needing} pip install "warpcache[export]"') from exc


def _show_compiled(bundle: Bundle, command: str, json_path: Path | None) -> None:
    """Print a bundle that was just made, and its calibration as JSON where asked for."""
    from .describe import calibration_rows, print_bundle
    from .report import write_json

    print_bundle(bundle)
    click.echo(f"wrote {bundle.path}")
    if json_path is not None:
        write_json(json_path, command, calibration_rows(bundle.manifest))


def _show_measured(measured: Measured, command: str, json_path: Path | None) -> None:
    """Print what was measured, and write it as JSON where asked for."""
    from .report import print_table, write_json

    print_table(measured.rows, title=measured.title, caption=measured.caption)
    if json_path is not None:
        write_json(json_path, command, measured.rows, facts=measured.facts)

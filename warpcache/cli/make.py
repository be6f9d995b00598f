"""The commands that make bundles: compile, split, build."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from ..engine.errors import ExportError, InputError
from .failure import Failure
from .options import (
    COUNT,
    PATH,
    RATE,
    checked_metric,
    cut_option,
    json_option,
    lpips_option,
    split_names,
    state_option,
    writable,
)

if TYPE_CHECKING:
    from ..engine.bundle.bundle import Bundle
    from ..engine.tensorrt.flavour import FlavourName
    from ..tasks.build import Precision

__all__ = ["build", "compile_command", "split"]

EPILOG_COMPILE = (
    "Example:  warpcache compile my_models.py:generator --weights generator.safetensors --inputs train.npz "
    "--holdout test.npz --budget 0.1 --out generator.warp"
)
EPILOG_SPLIT = "Example:  warpcache split generator.onnx --inputs train.npz --out generator.warp"
EPILOG_BUILD = (
    "Example:  warpcache build generator.warp --backend tensorrt-rtx --precision fp16 --inputs test.npz "
    "--target sm_86,sm_89,sm_120 --out edge"
)


@click.command("compile", epilog=EPILOG_COMPILE, short_help="Cut a PyTorch generator and train its warp adapter.")
@click.argument("factory", metavar="MODULE:FACTORY")
@click.option("--weights", type=PATH, help="The generator's weights, .safetensors; without it as the factory made it.")
@click.option("--inputs", type=PATH, required=True, help="Frames to train on: .npz, or .mp4 for one image input.")
@click.option(
    "--holdout",
    type=PATH,
    help="Frames to calibrate on, which the generator was not trained on; default: the last quarter of --inputs.",
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
@click.option(
    "--exits",
    type=COUNT,
    metavar="N",
    help="Train N exits of different cost and promise quality with them: half of them (rounded up) read the cache, the "
    "others are branches of the generator that need none.",
)
@click.option(
    "--metric",
    callback=checked_metric,
    metavar="lpips|flip|psnr|ms-ssim",
    help="With --exits: what quality is promised in; default: lpips where its weights are given, else flip.",
)
@click.option(
    "--bank",
    "bank_size",
    type=click.IntRange(min=0),
    metavar="N",
    help="With --exits: entries of the guide bank that branches look up; 0 does without; default: 256.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the training.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted compile of the same bundle.")
@click.option("--out", type=PATH, callback=writable(".warp"), required=True, help="The bundle to write, NAME.warp.")
@state_option
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
    exits: int | None,
    metric: str | None,
    bank_size: int | None,
    seed: int,
    resume: bool,
    out: Path,
    state: dict[str, str],
    lpips: Path | None,
    json_path: Path | None,
) -> None:
    """Cut a PyTorch generator, train its warp adapter, calibrate it and write a bundle.

    MODULE is a dotted module or a .py file, FACTORY a function in it that returns the torch.nn.Module. With --exits
    the bundle can be asked to keep a quality: see `run --quality` and `inspect`.
    """
    for name, value in (("--metric", metric), ("--bank", bank_size)):
        if exits is None and value is not None:
            raise click.UsageError(f"{name} is for exits that a quality is promised with; say how many by --exits N")
    _refuse_existing(out)
    from ..tasks.compile import compile_files
    from ..tasks.progress import ProgressBar

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
            exits=exits,
            metric=metric,
            bank_size=bank_size,
            state=state,
            progress=progress,
            resume=resume,
        )
    _show_compiled(bundle, "compile", json_path)


@click.command(epilog=EPILOG_SPLIT, short_help="Cut an ONNX model; nothing is trained.")
@click.argument("model", metavar="MODEL.onnx", type=PATH)
@click.option("--inputs", type=PATH, required=True, help="Sample frames to choose and check the cut on.")
@cut_option
@state_option
@click.option("--out", type=PATH, callback=writable(".warp"), required=True, help="The bundle to write, NAME.warp.")
@json_option
def split(model: Path, inputs: Path, cut: str, state: dict[str, str], out: Path, json_path: Path | None) -> None:
    """Cut an ONNX model whose PyTorch source is not at hand; nothing is trained."""
    _refuse_existing(out)
    from ..tasks.compile import split_files
    from ..tasks.progress import ProgressBar

    with _export_installed(), ProgressBar() as progress:
        bundle = split_files(model, inputs=inputs, cut=cut, state=state, out=out, progress=progress)
    _show_compiled(bundle, "split", json_path)


@click.command(epilog=EPILOG_BUILD, short_help="Build a bundle's TensorRT engines, ahead of time.")
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
    from ..report.policies import write_json
    from ..tasks.build import Conversion, build_bundle, print_built
    from ..tasks.progress import ProgressBar

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
    from ..report.bundle_tables import calibration_rows, print_bundle
    from ..report.policies import write_json

    print_bundle(bundle)
    click.echo(f"wrote {bundle.path}")
    if json_path is not None:
        write_json(json_path, command, calibration_rows(bundle.manifest))

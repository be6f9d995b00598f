"""The commands that make bundles: compile, split, build."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..engine.errors import ExportError, InputError
from ..tasks.choices import BuildOptions, CompileChoice, SplitOptions
from ..tasks.options import PATH, json_option, takes
from .failure import Failure

if TYPE_CHECKING:
    from ..engine.bundle.bundle import Bundle

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
@takes(CompileChoice)
@json_option
def compile_command(factory: str, options: CompileChoice, json_path: Path | None) -> None:
    """Cut a PyTorch generator, train its warp adapter, calibrate it and write a bundle.

    MODULE is a dotted module or a .py file, FACTORY a function in it that returns the torch.nn.Module. With --exits
    the bundle can be asked to keep a quality: see `run --quality` and `inspect`.
    """
    _refuse_existing(options.out)
    from ..tasks.compile import compile_files
    from ..tasks.progress import ProgressBar

    checkpoint = options.out.with_suffix(".checkpoint.safetensors")
    with _checkpoint_named(checkpoint), _export_installed(), ProgressBar() as progress:
        bundle = compile_files(factory, options, progress=progress)
    _show_compiled(bundle, "compile", json_path)


@click.command(epilog=EPILOG_SPLIT, short_help="Cut an ONNX model; nothing is trained.")
@click.argument("model", metavar="MODEL.onnx", type=PATH)
@takes(SplitOptions)
@json_option
def split(model: Path, options: SplitOptions, json_path: Path | None) -> None:
    """Cut an ONNX model whose PyTorch source is not at hand; nothing is trained."""
    _refuse_existing(options.out)
    from ..tasks.compile import split_files
    from ..tasks.progress import ProgressBar

    with _export_installed(), ProgressBar() as progress:
        bundle = split_files(model, options, progress=progress)
    _show_compiled(bundle, "split", json_path)


@click.command(epilog=EPILOG_BUILD, short_help="Build a bundle's TensorRT engines, ahead of time.")
@click.argument("bundle", metavar="B.warp", type=PATH)
@takes(BuildOptions)
@json_option
def build(bundle: Path, options: BuildOptions, json_path: Path | None) -> None:
    """Build the TensorRT engines of a bundle, so that nothing is built when it is first run.

    With --precision the bundle is converted first, and written as NAME.PRECISION.warp beside the one it was made from.
    """
    from ..report.policies import write_json
    from ..tasks.build import build_bundle, print_built
    from ..tasks.progress import ProgressBar

    with _engines_kept(), _export_installed("build --precision needs"), ProgressBar() as progress:
        built = build_bundle(bundle, options, progress=progress)
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

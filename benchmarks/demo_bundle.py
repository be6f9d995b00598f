"""Make the bundle that `warpcache demo` streams: draw the head, train the renderer on it, compile.

    python -m benchmarks.demo_bundle --out warpcache/data/demo.warp

Every stage keeps its result in the work folder and is skipped when that is there: the clips, the generator's weights
and the training of the adapter (by its checkpoint).

    python -m benchmarks.demo_bundle --rewrite warpcache/data/demo.warp

writes a bundle that is there again in the newest format, in its place and without training.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.bundle.write import write_bundle
from warpcache.engine.errors import BundleError
from warpcache.export.adapter.layout import AdapterConfig
from warpcache.export.compile import CompileOptions, Footage, compile_generator
from warpcache.export.frames.surface import Surface
from warpcache.media.inputs import InputStream
from warpcache.models.head import SyntheticHead
from warpcache.models.renderer import DeferredNeuralRenderer
from warpcache.models.training import train_renderer
from warpcache.tasks.progress import ProgressBar, Report

SIZE = 256
FPS = 30.0
# Takes of the head: the demo's own (warpcache.tasks.demo.DEMO_MOTION_SEED) is none of them.
TRAIN_TAKE, TRAIN_FRAMES = 1, 600
HOLDOUT_TAKE, HOLDOUT_FRAMES = 2, 120


def demo_generator() -> DeferredNeuralRenderer:
    """The demo's generator, untrained."""
    model = DeferredNeuralRenderer(SIZE, widths=(24, 48, 96, 96, 128), texture_channels=8, texture_size=192)
    model.surface = Surface("atlas", ("condition", 0, 2), ("condition", 5))
    return model


@click.command(epilog="Example:  python -m benchmarks.demo_bundle --out warpcache/data/demo.warp")
@click.option("--out", type=click.Path(path_type=Path), help="The bundle to write.")
@click.option(
    "--rewrite", type=click.Path(path_type=Path), metavar="BUNDLE", help="Write this again, in the newest format."
)
@click.option("--work", type=click.Path(path_type=Path), default="out/demo", show_default=True, help="Work folder.")
@click.option("--generator-steps", type=int, default=2000, show_default=True)
@click.option("--steps", type=int, default=2500, show_default=True, help="Training steps of the warp adapter.")
@click.option("--lpips", type=click.Path(path_type=Path), envvar="WARPCACHE_LPIPS", help="Weights of LPIPS.")
@click.option("--stage", type=click.Choice(["generator", "bundle"]), default="bundle", help="Where to stop.")
def main(
    out: Path | None, rewrite: Path | None, work: Path, generator_steps: int, steps: int, lpips: Path | None, stage: str
) -> None:
    """Make the demo's bundle, or write one again in the newest format."""
    if rewrite is not None:
        if out is not None:
            raise click.UsageError("--rewrite writes a bundle in its own place; leave out --out")
        try:
            rewritten = rewrite_bundle(rewrite)
        except BundleError as exc:
            raise click.ClickException(str(exc)) from exc
        files = rewritten.manifest.files
        size_mb = sum(record.size_bytes for record in files.values()) / 1e6
        click.echo(f"wrote {rewritten.path} again: {len(files)} files, {size_mb:.2f} MB")
        return
    if out is None:
        raise click.UsageError("nothing is to be made; give --out or --rewrite")
    work.mkdir(parents=True, exist_ok=True)
    head = SyntheticHead(0, SIZE)
    with ProgressBar() as progress:
        train = _clip(head, TRAIN_TAKE, TRAIN_FRAMES, work / "train.npz", progress)
        holdout = _clip(head, HOLDOUT_TAKE, HOLDOUT_FRAMES, work / "holdout.npz", progress)
        model = _trained(train, work / "generator.safetensors", generator_steps, progress)
        if stage == "generator":
            return
        compile_generator(
            model,
            Footage(_stream(train), _stream(holdout)),
            out,
            options=CompileOptions(
                steps=steps,
                max_age=6,
                lpips=lpips,
                resume=out.with_suffix(".checkpoint.safetensors").exists(),
                adapter=AdapterConfig(width=32, blocks=2, features=32),
            ),
            made_from={"recipe": "python -m benchmarks.demo_bundle", "steps": steps},
            progress=progress,
        )
    print(f"wrote {out}")


def rewrite_bundle(path: Path) -> Bundle:
    """Write a bundle of any format that can be read again in its place, in the newest format.

    Raises:
        BundleError: If it cannot be read or written; what stood at `path` still stands then.
    """
    bundle = Bundle.open(path)
    files: dict[str, Path | bytes] = {name: bundle.file(name) for name in bundle.manifest.files}
    return write_bundle(path, bundle.manifest, files, overwrite=True)


def _clip(head: SyntheticHead, take: int, frames: int, path: Path, progress: Report) -> dict[str, NDArray[np.float32]]:
    """Draw a take, or load it where it was drawn before."""
    if path.exists():
        return dict(np.load(path))
    kept: dict[str, list[NDArray[np.float32]]] = {"condition": [], "atlas": [], "truth": []}
    for t, (inputs, truth) in enumerate(head.frames(head.motion(frames, FPS, seed=take))):
        for name, array in inputs.items():
            kept[name].append(array)
        kept["truth"].append(truth[None])
        progress(f"drawing take {take}", t + 1, frames)
    clip = {name: np.concatenate(arrays) for name, arrays in kept.items()}
    np.savez(path, **clip)  # type: ignore[arg-type]
    return clip


def _trained(
    clip: Mapping[str, NDArray[np.float32]], path: Path, steps: int, progress: Report
) -> DeferredNeuralRenderer:
    """Train the generator, or load it where it was trained before."""
    torch.manual_seed(0)
    model = demo_generator()
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    train_renderer(
        model, clip, steps=steps, on_step=lambda step, _: progress("training the generator", step + 1, steps)
    )
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return model


def _stream(clip: Mapping[str, NDArray[np.float32]]) -> InputStream:
    arrays = {name: clip[name] for name in ("condition", "atlas")}
    return InputStream.from_arrays(arrays, fps=FPS, truth=clip["truth"])


if __name__ == "__main__":
    main()

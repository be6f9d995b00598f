"""Make the bundle that `warpcache demo` streams: draw the head, train the renderer on it, compile.

    python -m benchmarks.demo_bundle --out warpcache/data/demo.warp

Every stage keeps its result in the work folder and is skipped when that is there: the clips, the generator's weights
and the training of the adapter (by its checkpoint).

    python -m benchmarks.demo_bundle --rewrite warpcache/data/demo.warp

writes a bundle that is there again in the newest format, in its place and without training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from benchmarks import flags
from benchmarks.making import drawn_take, trained
from benchmarks.talking_head_model import with_surface
from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.bundle.write import write_bundle
from warpcache.export.adapter.layout import AdapterConfig
from warpcache.export.compile import CompileOptions, Footage, compile_generator
from warpcache.media.inputs import InputStream
from warpcache.models.head import SyntheticHead
from warpcache.models.renderer import DeferredNeuralRenderer
from warpcache.tasks.options import option, takes
from warpcache.tasks.progress import ProgressBar

SIZE = 256
FPS = 30.0
# Takes of the head: the demo's own (warpcache.tasks.demo.DEMO_MOTION_SEED) is none of them.
TRAIN_TAKE, TRAIN_FRAMES = 1, 600
HOLDOUT_TAKE, HOLDOUT_FRAMES = 2, 120


def demo_generator() -> DeferredNeuralRenderer:
    """The demo's generator, untrained."""
    widths = (24, 48, 96, 96, 128)
    return with_surface(DeferredNeuralRenderer(SIZE, widths=widths, texture_channels=8, texture_size=192))


@dataclass(frozen=True)
class Options:
    """What is made, and where it is kept."""

    out: Path | None = option("--out", "The bundle to write.", default=None)
    rewrite: Path | None = option(
        "--rewrite", "Write this again, in the newest format.", default=None, metavar="BUNDLE"
    )
    work: Path = option("--work", "Work folder.", default="out/demo")
    generator_steps: int = option("--generator-steps", default=2000)
    steps: int = option("--steps", "Training steps of the warp adapter.", default=2500)
    lpips: Path | None = option("--lpips", "Weights of LPIPS.", default=None, envvar="WARPCACHE_LPIPS")
    stage: str = option(
        "--stage",
        "Where to stop.",
        default=flags.Stage.BUNDLE.value,
        type=click.Choice([flags.Stage.GENERATOR.value, flags.Stage.BUNDLE.value]),
        show_default=False,
    )


@click.command(epilog="Example:  python -m benchmarks.demo_bundle --out warpcache/data/demo.warp")
@takes(Options)
def main(options: Options) -> None:
    """Make the demo's bundle, or write one again in the newest format."""
    out = options.out
    if options.rewrite is not None:
        if out is not None:
            raise click.UsageError("--rewrite writes a bundle in its own place; leave out --out")
        with flags.one_sentence():
            rewritten = rewrite_bundle(options.rewrite)
        files = rewritten.manifest.files
        size_mb = sum(record.size_bytes for record in files.values()) / 1e6
        click.echo(f"wrote {rewritten.path} again: {len(files)} files, {size_mb:.2f} MB")
        return
    if out is None:
        raise click.UsageError("nothing is to be made; give --out or --rewrite")
    options.work.mkdir(parents=True, exist_ok=True)
    head = SyntheticHead(0, SIZE)
    with ProgressBar() as progress:
        train = drawn_take(head, TRAIN_TAKE, TRAIN_FRAMES, FPS, options.work / "train.npz", progress)
        holdout = drawn_take(head, HOLDOUT_TAKE, HOLDOUT_FRAMES, FPS, options.work / "holdout.npz", progress)
    model = trained(demo_generator, train, options.work / "generator.safetensors", options.generator_steps)
    if options.stage == flags.Stage.GENERATOR:
        return
    with ProgressBar() as progress:
        compile_generator(
            model,
            Footage(_stream(train), _stream(holdout)),
            out,
            options=CompileOptions(
                steps=options.steps,
                max_age=6,
                lpips=options.lpips,
                resume=out.with_suffix(".checkpoint.safetensors").exists(),
                adapter=AdapterConfig(width=32, blocks=2, features=32),
            ),
            made_from={"recipe": "python -m benchmarks.demo_bundle", "steps": options.steps},
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


def _stream(clip: Mapping[str, NDArray[np.float32]]) -> InputStream:
    arrays = {name: clip[name] for name in ("condition", "atlas")}
    return InputStream.from_arrays(arrays, fps=FPS, truth=clip["truth"])


if __name__ == "__main__":
    main()

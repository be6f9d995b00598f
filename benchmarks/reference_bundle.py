"""Make the 512x512 bundle that speed on a GPU is measured with: a real size, weights of no worth.

    python -m benchmarks.reference_bundle --size 512 --out R.warp
    python -m benchmarks.reference_bundle --size 512 --clip R.npz

What runs has the graphs, shapes and types of a trained bundle, so it takes the same time; but the generator's weights
are random and the adapter is trained for a single step. Its pictures mean nothing, and its manifest says so
(``created.options.purpose``). The generator is the same in every process, so that `benchmarks.latency` can run it by
torch beside the bundle:

    python -m benchmarks.latency R.warp --inputs R.npz --against torch --generator benchmarks.reference_bundle:generator
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from numpy.typing import NDArray

from benchmarks.flags import one_sentence
from warpcache.tasks.progress import ProgressBar, Report, silent

if TYPE_CHECKING:
    from warpcache.engine.bundle.bundle import Bundle
    from warpcache.models.renderer import DeferredNeuralRenderer

__all__ = ["CUT", "PURPOSE", "draw_clip", "generator", "make_reference_bundle"]

PURPOSE = "speed only: the generator's weights are random and the adapter is trained for one step"
CUT = "up.2"
"""The last block at half resolution: named, because the search for a cut takes minutes at this size."""

_FRAMES = 4  # what a compile needs at least
_FPS = 30.0
_TAKE = 3  # of the head's motion


def generator(size: int = 512) -> DeferredNeuralRenderer:
    """The reference generator at `size`, with the same random weights in every process."""
    import torch

    from benchmarks.talking_head_model import with_surface
    from warpcache.models.renderer import DeferredNeuralRenderer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return with_surface(DeferredNeuralRenderer(size)).eval()


def draw_clip(size: int, frames: int) -> dict[str, NDArray[np.float32]]:
    """The synthetic head's inputs: ``condition`` [T, 6, size, size] and ``atlas`` [T, 3, 64, 64]."""
    from warpcache.models.head import SyntheticHead

    head = SyntheticHead(0, size)
    return head.inputs(head.motion(frames, _FPS, seed=_TAKE))


def _noise(size: int, frames: int) -> dict[str, NDArray[np.float32]]:
    """Inputs of the same shapes and ranges, of noise: what the compile runs the generator on.

    Over the head's flat background ONNX Runtime's CPU adds up 10^6 equal numbers in float32 for every group that it
    normalises. With random weights that alone moves the answer by 0.25 % at 512x512, more than a trace may differ.
    """
    rng = np.random.default_rng(0)
    condition = rng.uniform(0, 1, (frames, 6, size, size))
    atlas = rng.uniform(-1, 1, (frames, 3, 64, 64))
    return {"condition": condition.astype(np.float32), "atlas": atlas.astype(np.float32)}


def make_reference_bundle(
    out: Path, *, size: int = 512, precision: str = "fp16", cut: str = CUT, progress: Report = silent
) -> Bundle:
    """Compile the reference generator, as little trained as possible, and convert it.

    Args:
        out: The bundle to write.
        size: Rows and columns of the pictures.
        precision: ``"fp32"``, ``"fp16"`` or ``"bf16"``.
        cut: Where to split, as `compile_generator` takes it.
        progress: Told how far it is.

    Raises:
        WarpcacheError: If something of it cannot be made or written.
    """
    from warpcache.export.adapter.layout import AdapterConfig
    from warpcache.export.compile import CompileOptions, Footage, compile_generator
    from warpcache.export.precision.convert import PrecisionOptions, convert_bundle
    from warpcache.media.inputs import InputStream

    footage = Footage(InputStream.from_arrays(_noise(size, _FRAMES), fps=_FPS))
    # The demo's adapter. Clips of one pair keep the one step's memory below that of a real training.
    options = CompileOptions(
        cut=cut,
        steps=1,
        max_age=1,
        adapter=AdapterConfig(width=32, blocks=2, features=32),
        train={"batch": 1},
    )
    recipe: Mapping[str, Any] = {"recipe": "python -m benchmarks.reference_bundle", "size": size, "purpose": PURPOSE}
    with tempfile.TemporaryDirectory() as scratch:
        first = out if precision == "fp32" else Path(scratch) / out.name
        bundle = compile_generator(
            generator(size), footage, first, options=options, made_from=recipe, progress=progress
        )
        if precision == "fp32":
            return bundle
        # Without frames: parity of random weights says nothing, and its search takes minutes.
        chosen = PrecisionOptions(precision=precision)  # type: ignore[arg-type]  # it checks the name
        return convert_bundle(bundle, out, options=chosen, frames=None, progress=progress)


@click.command(epilog="Example:  python -m benchmarks.reference_bundle --size 512 --out R.warp")
@click.option("--out", type=click.Path(path_type=Path), help="The bundle to write.")
@click.option("--clip", type=click.Path(path_type=Path), help="Write frames for it, .npz.")
@click.option("--clip-frames", type=click.IntRange(min=1), default=40, show_default=True)
@click.option("--size", type=click.IntRange(min=32), default=512, show_default=True, help="A multiple of 16.")
@click.option("--precision", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp16", show_default=True)
@click.option("--cut", default=CUT, show_default=True, help="Names of values or modules, joined by commas.")
def main(out: Path | None, clip: Path | None, clip_frames: int, size: int, precision: str, cut: str) -> None:
    """Make a bundle whose speed is measured."""
    if out is None and clip is None:
        raise click.UsageError("nothing is to be made; give --out, --clip or both")
    if size % 16:
        raise click.BadParameter(f"a size of {size} is not a multiple of 16, which five levels need")
    with one_sentence(), ProgressBar() as progress:
        if out is not None:
            make_reference_bundle(out, size=size, precision=precision, cut=cut, progress=progress)
        if clip is not None:
            np.savez(clip, fps=np.float64(_FPS), **draw_clip(size, clip_frames))  # type: ignore[arg-type]
    for path in (out, clip):
        if path is not None:
            click.echo(f"wrote {path}")


if __name__ == "__main__":
    main()

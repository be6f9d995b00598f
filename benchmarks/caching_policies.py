"""What to do with a generator that is too slow: its own speed, frame reuse, layer caching, and a trained consumer.

    python -m benchmarks.caching_policies --data CLIPS --lpips squeeze_v0.1.safetensors --json caching_policies.json

The same generator and the same frames (the test part of a clip that `benchmarks.talking_head` trains and compiles)
under:

- the whole generator, every frame;
- frame reuse: the generator on every N-th frame, and its last image shown again in between;
- plain reuse of the cache, which is what layer-caching methods do: the deep part on every N-th frame, the generator's
  own remaining layers on every frame; cut where those layers read the new inputs (without, it is frame reuse) and cost
  what this project's consumer does, or more;
- this project's consumer on the same schedule, and with producers running beside it, paced as the clip is.

Quality is that of the frames that were answered. A frame that is only shown again took no time, and counts so.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from benchmarks import flags
from benchmarks.clips import TalkingHead, load_talking_head
from benchmarks.talking_head import BUDGET, CONSUMER, compile_clip, dearer_cuts, train_generator
from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.bundle.roles import Role
from warpcache.engine.metrics.lpips import Lpips
from warpcache.engine.schedule.policy import Policy
from warpcache.export.compile import split_model
from warpcache.export.graph.index import load_model
from warpcache.media.inputs import InputStream
from warpcache.report.policies import print_table, row, write_json
from warpcache.tasks.bench import result_of
from warpcache.tasks.choices import ExitName, StreamOptions
from warpcache.tasks.options import COUNT, option, takes
from warpcache.tasks.progress import ProgressBar, Report, silent
from warpcache.tasks.stream import Recording, record

__all__ = ["Footage", "compare_policies", "frame_reuse", "plain_bundle"]

SHOWN_AGAIN = "shown again"
CHECKED_FRAMES = 8


@dataclass(frozen=True)
class Options(flags.OnClips):
    """What is compared, on which clip."""

    clip: str = option("--clip", default="d6")
    every: int = option("--every", "N of the schedules.", default=3, type=click.IntRange(min=2))
    threads: int | None = option("--threads", "Default: the cores of this process.", default=None, type=COUNT)
    work: Path = option("--work", default="out/talking_head")


@click.command(epilog="Example:  python -m benchmarks.caching_policies --data clips --lpips squeeze_v0.1.safetensors")
@takes(Options)
def main(options: Options) -> None:
    """Measure one generator under every way of caching."""
    clip = load_talking_head(options.data, options.clip)
    bundle = bundle_of(clip, options.work, options.lpips)
    arrays = {known.spec.name: clip.test[known.spec.name] for known in bundle.manifest.inputs}
    footage = Footage(arrays, clip.test["truth"], clip.fps)
    every = options.every
    with ProgressBar() as progress, tempfile.TemporaryDirectory() as scratch:
        plain = plain_bundle(bundle, arrays, Path(scratch) / "plain.warp", progress)
        lpips = Lpips.load(options.lpips)
        rows = compare_policies(
            bundle, plain, footage, every=every, lpips=lpips, threads=options.threads, progress=progress
        )
    caption = (
        f"{len(footage.truth)} frames; every {every}: the deep part, or the whole, runs on one frame in {every}; "
        f"async is paced at {clip.fps:g} frames per second. Latency from arrival to answer. The remaining layers of "
        f"plain reuse cost {plain.manifest.exits_of(Role.PLAIN)[0].cost_ratio:.0%} of the whole, the trained consumer "
        f"{bundle.manifest.exit(CONSUMER).cost_ratio:.0%}."
    )
    print_table(rows, title=f"{clip.name}: ways of caching", caption=caption)
    if options.json_path is not None:
        write_json(options.json_path, "caching_policies", rows)


def bundle_of(clip: TalkingHead, work: Path, lpips: Path) -> Bundle:
    """The bundle that `benchmarks.talking_head` leaves in its work folder, made where it is not there."""
    path = work / f"{clip.name}.warp"
    if path.exists():
        return Bundle.open(path)
    work.mkdir(parents=True, exist_ok=True)
    return compile_clip(clip, train_generator(clip, work, flags.GENERATOR_STEPS), lpips, None, BUDGET)


def plain_bundle(bundle: Bundle, arrays: Mapping[str, NDArray[Any]], out: Path, progress: Report = silent) -> Bundle:
    """Cut the same generator for plain reuse alone, at the cost of the bundle's own consumer.

    A bundle with a trained consumer has a producer that does more than the deep part, which plain reuse need not pay
    for; and its cut is chosen for another consumer.

    Args:
        bundle: Holds the generator, and the candidates that its cut was chosen among.
        arrays: Some frames, on which the cut is checked.
        out: Where to write.
        progress: Told how far it is.

    Returns:
        A bundle with the exit ``plain``: the cheapest candidate that costs no less than the exit ``warp`` and reads the
        new inputs; where none does, the cheapest that costs no less.
    """
    cut = bundle.manifest.cut
    assert cut is not None
    # False before True: those that read the inputs come first.
    ranked = sorted(dearer_cuts(bundle), key=lambda candidate: not candidate.get("reads_input", False))
    chosen = ranked[0]["tensors"] if ranked else cut.tensors
    names = [spec.name for spec in bundle.manifest.generator_inputs]
    sample = InputStream.from_arrays({name: arrays[name][:CHECKED_FRAMES] for name in names})
    model = load_model(bundle.file("generator.onnx"))
    return split_model(model, sample, out, cut=",".join(chosen), made_from={}, progress=progress)


@dataclass(frozen=True)
class Footage:
    """The frames that every policy answers.

    Attributes:
        arrays: Inputs by name, leading axis time.
        truth: The images to be answered, float32 [T, 3, H, W].
        fps: Pace under `async`.
    """

    arrays: Mapping[str, NDArray[Any]]
    truth: NDArray[np.float32]
    fps: float


def compare_policies(
    bundle: Bundle,
    plain: Bundle,
    footage: Footage,
    *,
    every: int,
    lpips: Lpips | None = None,
    threads: int | None = None,
    progress: Report = silent,
) -> list[dict[str, Any]]:
    """Stream the frames under every policy and compare the answers.

    Args:
        bundle: Holds the trained consumer.
        plain: The same generator, cut for plain reuse (`plain_bundle`).
        footage: What is streamed.
        every: N of the schedules.
        lpips: Loaded LPIPS; without it LPIPS is left out.
        threads: CPU threads; default: the cores of this process.
        progress: Told how far it is.

    Returns:
        One row a policy, as `warpcache bench` writes them: quality against the whole generator, and against truth.
    """
    arrays, truth = footage.arrays, footage.truth

    def run(
        label: str,
        policy: Policy,
        exit_name: ExitName | None = None,
        *,
        of: Bundle = bundle,
        clip: Mapping[str, NDArray[Any]] = arrays,
        fps: float | None = None,
    ) -> Recording:
        known = {spec.spec.name for spec in of.manifest.inputs}
        recording = record(
            of,
            {name: array for name, array in clip.items() if name in known},
            policy,
            StreamOptions(exit_name=exit_name, fps=fps, threads=threads),
            keep=lambda index: True,
            progress=lambda _, done, total: progress(label, done, total),
        )
        recording.policy = label
        return recording

    schedule = Policy("every", period=every)
    asked = {name: array if len(array) == 1 else array[::every] for name, array in arrays.items()}
    whole = run("whole generator", Policy("full"))
    recordings = [
        whole,
        frame_reuse(run(f"frame reuse every {every}", Policy("full"), clip=asked), len(truth), every),
        run(f"plain every {every}", schedule, plain.manifest.exits_of(Role.PLAIN)[0].name, of=plain),
        run(f"warp every {every}", schedule, CONSUMER),
        run("warp async", Policy("async"), CONSUMER, fps=footage.fps),
    ]
    references = {"whole generator": whole.images, "truth": dict(enumerate(truth))}
    return [row(result_of(r, references, lpips=lpips, progress=progress)) for r in recordings]


def frame_reuse(asked: Recording, frames: int, every: int) -> Recording:
    """The whole generator on every N-th frame, and its last image again on the frames between.

    Args:
        asked: What the generator answered when it was given every N-th frame of the clip only.
        frames: Frames of the clip.
        every: N.

    Returns:
        All frames of the clip: one that is shown again has latency 0 and the age of its image.

    Raises:
        ValueError: If `asked` is not the answer to every N-th of `frames` frames.
    """
    needed = -(-frames // every)
    if asked.indices != list(range(needed)):
        raise ValueError(f"every {every} of {frames} frames is {needed}, but {len(asked.indices)} were answered")
    ages = [t % every for t in range(frames)]
    return Recording(
        policy=asked.policy,
        latency_ms=[0.0 if age else asked.latency_ms[t // every] for t, age in enumerate(ages)],
        indices=list(range(frames)),
        ages=ages,
        routes=[SHOWN_AGAIN if age else asked.routes[t // every] for t, age in enumerate(ages)],
        seconds=asked.seconds,
        images={t: asked.images[t // every] for t in range(frames)},
    )


if __name__ == "__main__":
    main()

"""The demo: a synthetic head, streamed with the whole generator and cut and cached, side by side.

The bundle is in the package, the head is drawn by NumPy: no torch, no download. The motion has a seed that training
and calibration never see.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..engine.bundle.bundle import Bundle
from ..engine.errors import BundleError, InputError
from ..engine.schedule.policy import Policy
from ..engine.session.frame import Frame
from ..engine.spec import Array
from .bench import Measured, load_lpips, result_of
from .choices import DemoOptions, StreamOptions
from .progress import Report, silent
from .stream import Recording, pace, record

if TYPE_CHECKING:
    from ..models.head import HeadMotion

__all__ = ["DEMO_MOTION_SEED", "Demo", "demo_bundle", "demo_inputs", "run_demo"]

DEMO_MOTION_SEED = 20_000
"""Seed of the demo's motion; training and calibration of the shipped bundle use others."""

MEASURE_EVERY = 10
"""Quality is measured on every tenth frame: FLIP takes several times what the consumer does, and so does drawing."""

WHOLE_LABEL = "whole generator"
CACHED_LABEL = "cut and cached"


@dataclass(frozen=True)
class Demo:
    """What the demo gives.

    Attributes:
        measured: The table, side by side.
        report: The page that was written.
        video: The video that was written: both answers side by side.
    """

    measured: Measured
    report: Path
    video: Path


@dataclass(frozen=True)
class DemoInputs:
    """The stream that is shown.

    Attributes:
        arrays: Inputs by name, leading axis time.
        truth: The rendered truth of every `MEASURE_EVERY`-th frame, float32 [3, H, W] in [-1, 1], by frame index.
    """

    arrays: Mapping[str, Array]
    truth: Mapping[int, Array]


def demo_bundle() -> Bundle:
    """Open the bundle that is shipped inside the package.

    Raises:
        BundleError: If this installation has none, or it is damaged.
    """
    path = Path(str(resources.files("warpcache"))) / "data" / "demo.warp"
    if not path.is_dir():
        raise BundleError(
            "the demo's bundle is not in this installation; make it with "
            "`python -m benchmarks.demo_bundle --out warpcache/data/demo.warp` in a checkout"
        )
    return Bundle.open(path)


def demo_inputs(bundle: Bundle, frames: int, progress: Report = silent) -> DemoInputs:
    """Draw the synthetic head's conditions for `frames` frames, and the truth of the frames that are measured.

    Raises:
        InputError: If the bundle was not made for the synthetic head.
    """
    from ..models.head import SyntheticHead

    manifest = bundle.manifest
    specs = {record.spec.name: record.spec for record in manifest.inputs}
    if "condition" not in specs:
        raise InputError(f"bundle {manifest.name!r} takes {sorted(specs)}, but the demo draws 'condition'")
    head = SyntheticHead(seed=0, size=specs["condition"].shape[-1])
    motion = head.motion(frames, fps=manifest.fps or 30.0, seed=DEMO_MOTION_SEED)
    arrays = {name: np.empty((frames, *spec.shape[1:]), spec.dtype) for name, spec in specs.items()}
    truth: dict[int, Array] = {}
    for index in range(frames):
        moment = _moment(motion, index)
        if index % MEASURE_EVERY == 0:
            ((inputs, truth[index]),) = head.frames(moment)
        else:
            # Shading the picture takes twice as long as all that the generator needs.
            inputs = head.inputs(moment)
        for name, array in arrays.items():
            array[index] = inputs[name][0]
        progress("drawing the head", index + 1, frames)
    return DemoInputs(arrays, truth)


def _moment(motion: HeadMotion, index: int) -> HeadMotion:
    """One frame of a clip of parameters, as a clip."""
    arrays: dict[str, Any] = {name: v[index : index + 1] for name, v in vars(motion).items() if np.ndim(v)}
    return replace(motion, **arrays)


def run_demo(options: DemoOptions, *, bundle: Bundle | None = None, progress: Report = silent) -> Demo:
    """Stream the synthetic head twice, measure, and write report.html and frames.mp4 into `options.out`.

    Args:
        options: Frames, folder, and where it runs.
        bundle: Another bundle of the synthetic head; default: the shipped one.
        progress: Told how far it is.

    Returns:
        The table and where the files are.

    Raises:
        BundleError: If the bundle is missing or damaged.
        InputError: If `out` is in the way or cannot be written.
    """
    from ..report.bundle_page import promise_section
    from ..report.policies import environment, row, write_report
    from ..report.results import ReportData

    out, frames = options.out, options.frames
    bundle = bundle or demo_bundle()
    if out.exists() and not out.is_dir():
        raise InputError(f"{str(out)!r} is a file; choose another folder with --out")
    network = load_lpips(options.lpips)
    facts = options.on.facts()  # before the head is drawn: a GPU that is not there is found out at once
    inputs = demo_inputs(bundle, frames, progress)

    fps = bundle.manifest.fps or 30.0
    recordings, shown = [], []
    for policy in (Policy("full"), Policy("async")):
        placed = options.on.without_producers() if policy.foreground else options.on
        how = StreamOptions(fps=pace(policy, None, fps), threads=options.threads, on=placed)
        recording, images = _stream(bundle, inputs, policy, how, progress)
        recordings.append(recording)
        shown.append(images)
    references = {WHOLE_LABEL: recordings[0].images, "rendered truth": inputs.truth}
    results = [result_of(recording, references, lpips=network, progress=progress) for recording in recordings]
    caption = (
        f"{frames} frames; quality on every {MEASURE_EVERY}th. The whole generator takes a frame when the last is "
        f"answered; async gets {fps:g} a second. Latency from a frame's arrival to its answer."
    )
    title = f"Synthetic head, {bundle.manifest.name}"

    # Both files are made in a folder of their own and moved at the end, so that an interrupt leaves an old pair whole.
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".partial-", dir=out.absolute().parent))
    try:
        video, report = scratch / "frames.mp4", scratch / "report.html"
        _write_video(video, shown[0], shown[1], frames, fps, progress)
        surroundings = {**environment(), **facts}
        promise = promise_section(bundle)
        write_report(
            report,
            ReportData(
                title=title,
                caption=caption,
                results=results,
                video=video,
                environment=surroundings,
                sections=() if promise is None else (promise,),
            ),
        )
        out.mkdir(exist_ok=True)
        for file in (video, report):
            file.replace(out / file.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    measured = Measured(title=title, caption=caption, rows=[row(result) for result in results], facts=facts)
    return Demo(measured, out / "report.html", out / "frames.mp4")


def _stream(
    bundle: Bundle, inputs: DemoInputs, policy: Policy, options: StreamOptions, progress: Report
) -> tuple[Recording, dict[int, NDArray[np.uint8]]]:
    """Stream the inputs under one policy; with what it did, every frame's picture by its index, uint8 [3, H, W]."""
    from ..media.video import to_uint8

    name = bundle.manifest.image_output
    if name is None:
        raise InputError(f"bundle {bundle.manifest.name!r} has no image output, so there is nothing to show")

    images: dict[int, NDArray[np.uint8]] = {}

    def keep_picture(frame: Frame) -> None:
        # A quarter of the memory of float32, for about half a millisecond between two frames.
        images[frame.index] = to_uint8(frame.outputs[name][0])

    recording = record(
        bundle,
        inputs.arrays,
        policy,
        options,
        keep=lambda index: index % MEASURE_EVERY == 0,
        on_frame=keep_picture,
        progress=progress,
    )
    return recording, images


def _write_video(
    path: Path,
    whole: Mapping[int, NDArray[np.uint8]],
    cached: Mapping[int, NDArray[np.uint8]],
    frames: int,
    fps: float,
    progress: Report,
) -> None:
    """Write both answers side by side; where a frame was dropped, the last one stays, as on a screen."""
    from ..media.video import VideoWriter, side_by_side, to_float

    def picture(images: Mapping[int, NDArray[np.uint8]], index: int) -> NDArray[np.uint8]:
        return images[next((i for i in range(index, -1, -1) if i in images), min(images))]

    def both(index: int) -> Array:
        sides = (to_float(picture(images, index)) for images in (whole, cached))
        return side_by_side(*sides, labels=(WHOLE_LABEL, CACHED_LABEL))

    height, width = both(0).shape[1:]
    with VideoWriter(path, fps, (height, width)) as writer:
        for index in range(frames):
            writer.write(both(index))
            progress("writing the video", index + 1, frames)

"""Measure one bundle under several policies on the same inputs: latency, age of the caches, quality.

Every policy streams the same frames through its own engine, one after the other, in this process. Nothing but the
frames' copies happens between two frames; quality is measured afterwards, so that it takes no core from a producer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.schedule.policy import Policy
from ..engine.spec import Array
from .choices import BenchOptions, RunOptions
from .progress import Report, silent
from .stream import Recording, pace, record

if TYPE_CHECKING:
    from ..engine.bundle.manifest import Manifest
    from ..engine.metrics.lpips import Lpips
    from ..engine.promise.calibration import Quality
    from ..media.inputs import InputStream
    from ..report.results import PolicyResult
    from ..report.routed import Within
    from .quality_choice import QualityChoice

__all__ = [
    "MEASURED_FRAMES",
    "Measured",
    "bench_bundle",
    "result_of",
    "run_bundle",
]

MEASURED_FRAMES = 300
"""Frames that quality is measured on unless told otherwise: beyond it the mean hardly moves and the wait grows."""

WHOLE = "whole generator"
TRUTH = "truth"


@dataclass(frozen=True)
class Measured:
    """What a command prints and writes: a table and its words.

    Attributes:
        title: The table's heading.
        caption: How it was measured.
        rows: JSON-ready rows, one a policy.
        facts: What the record says of the GPUs; empty on the CPU.
    """

    title: str
    caption: str
    rows: list[dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)


def result_of(
    recording: Recording,
    references: Mapping[str, Mapping[int, Array]],
    *,
    lpips: Lpips | None = None,
    asked: Quality | None = None,
    progress: Report = silent,
) -> PolicyResult:
    """Compare the images of `recording` with each reference, frame by frame.

    Args:
        recording: What a policy answered.
        references: Name of the reference -> its images by frame index; only frames in both are compared.
        lpips: Loaded LPIPS; without it LPIPS is left out.
        asked: A quality whose frames are counted, against the whole generator.
        progress: Told how far it is.

    Returns:
        The policy's figures: means over the frames, and means by age of the cache against the first reference.
    """
    from ..report.results import PolicyResult
    from ..report.routed import within_of

    quality: dict[str, dict[str, float]] = {}
    by_age: dict[str, dict[int, dict[str, float]]] = {}
    within: Within | None = None
    age_of = dict(zip(recording.indices, recording.ages, strict=True))
    for name, images in references.items():
        frames = sorted(set(recording.images) & set(images))
        if not frames:
            continue
        values = _compare(recording, images, frames, name, lpips, asked, progress)
        if asked is not None and name == WHOLE:
            within = within_of(asked, values[asked.metric].tolist())
        quality[name] = {metric: float(np.mean(column)) for metric, column in values.items()}
        ages = np.array([age_of[index] for index in frames])
        by_age[name] = {
            int(age): {metric: float(np.mean(column[ages == age])) for metric, column in values.items()}
            for age in np.unique(ages)
        }
    return PolicyResult(
        policy=recording.policy,
        latency_ms=tuple(recording.latency_ms),
        ages=tuple(recording.ages),
        routes=tuple(recording.routes),
        fps=recording.fps,
        quality_against=quality,
        quality_by_age=by_age,
        placement=recording.placement,
        graphs=recording.graphs,
        routed=recording.routed,
        within=within,
    )


def _compare(
    recording: Recording,
    images: Mapping[int, Array],
    frames: Sequence[int],
    name: str,
    lpips: Lpips | None,
    asked: Quality | None,
    progress: Report,
) -> dict[str, Array]:
    """Every metric of every frame in `frames`, in that order: name -> float64 [len(frames)]."""
    from ..engine.metrics.images import available_metrics, measure

    # MS-SSIM says little that SSIM does not and takes as long as all others together.
    wanted = None if asked is None else asked.metric
    metrics = [
        metric
        for metric in available_metrics(images[frames[0]].shape, lpips=lpips)
        if metric == wanted or (metric != "ms_ssim" and (metric != "lpips" or lpips is not None))
    ]

    stage = f"quality of {recording.policy} against {name}"
    values: dict[str, list[float]] = {metric: [] for metric in metrics}
    itself: dict[str, float] | None = None
    for done, index in enumerate(frames, start=1):
        # One after the other: FLIP takes most of the time, holds the interpreter's lock and has threads of its own.
        if recording.images[index] is images[index]:
            # The reference against itself: what any image gives against itself, so once is enough.
            itself = itself or measure(images[index], images[index], metrics, lpips=lpips)
            measured = itself
        else:
            measured = measure(recording.images[index], images[index], metrics, lpips=lpips)
        for metric, value in measured.items():
            values[metric].append(value)
        progress(stage, done, len(frames))
    return {metric: np.array(column) for metric, column in values.items()}


def bench_bundle(path: Path, inputs: Path, options: BenchOptions, *, progress: Report = silent) -> Measured:
    """Measure the bundle at `path` under several policies on the frames of `inputs`.

    Args:
        path: The bundle.
        inputs: ``.npz`` or ``.mp4``; an array ``truth`` in the ``.npz`` is a second reference.
        options: Policies, pace and the rest; with a quality to keep every policy is measured a second time, its frames
            routed. Unless told otherwise, quality is measured on about `MEASURED_FRAMES` frames.
        progress: Told how far it is.

    Returns:
        One row a policy, and after it, where a quality is to be kept, the same policy routed.

    Raises:
        BundleError: If the bundle is damaged.
        InputError: If the inputs do not fit it.
        BackendError: If the backend is missing or refuses the bundle.
        DeviceError: If there is no such GPU.
    """
    from ..engine.bundle.bundle import Bundle
    from ..report.policies import row

    promise, on, policies = options.promise, options.on, options.chosen_policies
    if promise is not None:
        promise.require_lpips(options.lpips, measuring=True)
    bundle, network = Bundle.open(path), load_lpips(options.lpips)
    if promise is not None:
        promise.check(bundle)
    stream = open_inputs(inputs, bundle.manifest)
    step = options.measure_every or max(1, -(-stream.frames // MEASURED_FRAMES))
    rate = options.fps or stream.fps or bundle.manifest.fps

    # Beside producers in the background, what it is measured against: there is none there that could be elsewhere.
    # Where no policy has them the engine refuses the option.
    others = on if all(policy.foreground for policy in policies) else on.without_producers()

    def run(policy: Policy, promise: QualityChoice | None = None) -> Recording:
        placed = others if policy.foreground else on
        return record(
            bundle,
            stream.arrays,
            policy,
            replace(options, fps=pace(policy, None, rate), on=placed, promise=promise),
            keep=lambda index: index % step == 0,
            progress=progress,
        )

    recordings = []
    for policy in policies:
        # Routed first, so that a deadline that no exit meets is found out before anything was measured.
        routed = [] if promise is None else [run(policy, promise)]
        recordings += [run(policy), *routed]
    whole = next((r for r in recordings if r.policy == "full" and r.routed is None), None)
    if whole is None and bundle.manifest.image_output is not None:
        whole = run(Policy("full"))  # the reference; its own row was not asked for
    references: dict[str, Mapping[int, Array]] = {WHOLE: whole.images} if whole is not None else {}
    if stream.truth is not None:
        references[TRUTH] = {index: stream.truth[index] for index in range(0, len(stream.truth), step)}
    asked = None if promise is None else promise.quality
    rows = [row(result_of(r, references, lpips=network, asked=asked, progress=progress)) for r in recordings]
    which = "every frame" if step == 1 else f"every {_ordinal(step)} frame"
    paced = f"async paced at {rate:g} frames per second" if rate else "async unpaced"
    return Measured(
        title=f"{bundle.manifest.name}: {stream.frames} frames of {inputs.name}",
        caption=f"Quality on {which}; {paced}; latency from arrival to answer."
        + ("" if promise is None else f" Routed for {promise}."),
        rows=rows,
        facts=on.facts(),
    )


def run_bundle(path: Path, inputs: Path, options: RunOptions, *, progress: Report = silent) -> Measured:
    """Stream `inputs`, ``.npz`` or ``.mp4``, through the bundle at `path` and write the answers to `options.out`.

    They are an ``.mp4`` (the image output) or an ``.npz`` (one array per output, in the generator's order).

    Returns:
        One row: latency, frames per second and age; quality is not measured here.
    """
    from ..engine.bundle.bundle import Bundle
    from ..media.outputs import OutputWriter
    from ..report.policies import row

    promise, policy, fps = options.promise, options.chosen_policy, options.fps
    if promise is not None:
        promise.require_lpips(options.lpips, measuring=False)
    bundle = Bundle.open(path)
    if promise is not None:
        promise.check(bundle)
    manifest = bundle.manifest
    stream = open_inputs(inputs, manifest)
    rate = pace(policy, fps, stream.fps or manifest.fps)
    with OutputWriter(options.out, image_output=manifest.image_output, fps=fps or stream.fps or manifest.fps) as writer:
        recording = record(
            bundle,
            stream.arrays,
            policy,
            replace(options, fps=rate),
            on_frame=lambda frame: writer.write(frame.outputs),
            progress=progress,
        )
    return Measured(
        title=f"{manifest.name}: {len(recording.indices)} of {stream.frames} frames answered",
        caption=f"Frames came {f'{rate:g} a second' if rate else 'as fast as they were answered'}."
        + ("" if promise is None else f" Routed for {promise}."),
        rows=[row(result_of(recording, {}))],
        facts=options.on.facts(),
    )


def open_inputs(path: Path, manifest: Manifest) -> InputStream:
    """Load a stream of inputs and check it against what the bundle takes."""
    from ..media.inputs import load_inputs

    return load_inputs(path, manifest.inputs)


def load_lpips(path: Path | None) -> Lpips | None:
    """Load LPIPS where its weights are given."""
    if path is None:
        return None
    from ..engine.metrics.lpips import Lpips

    return Lpips.load(path)


def _ordinal(number: int) -> str:
    suffix = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"

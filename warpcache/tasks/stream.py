"""Stream inputs through a bundle under one policy, and keep what it did."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..engine.schedule.policy import Policy
from ..engine.spec import Array
from .choices import StreamOptions
from .progress import Report, silent

if TYPE_CHECKING:
    from ..engine.bundle.bundle import Bundle
    from ..engine.session.frame import Frame
    from ..report.routed import Routed

__all__ = ["Recording", "frame_count", "pace", "record"]


@dataclass
class Recording:
    """What one policy answered on a stream.

    Attributes:
        policy: The policy as people write it, e.g. ``every:4`` or ``lockstep:2``.
        latency_ms: From arrival to answer, one per answered frame.
        indices: Which frame of the stream each answer is; frames that were dropped are missing.
        ages: Age of the cache that each frame was answered from, in frames.
        routes: The exit that answered.
        seconds: Wall time from the first arrival to the last answer.
        images: The image output of the kept frames, float32 [C, H, W], by frame index.
        placement: Where it ran and by what, e.g. ``cuda:0/tensorrt-rtx``.
        graphs: CUDA graphs that were replayed; 0 on the CPU, and where a backend cannot be captured.
        routed: What routing did; None where no quality was asked for.
    """

    policy: str
    latency_ms: list[float] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    ages: list[int] = field(default_factory=list)
    routes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    images: dict[int, Array] = field(default_factory=dict)
    placement: str = ""
    graphs: int = 0
    routed: Routed | None = None

    @property
    def fps(self) -> float:
        """Frames answered per second of wall time."""
        return len(self.indices) / self.seconds if self.seconds > 0 else 0.0


def pace(policy: Policy, asked: float | None, known: float | None) -> float | None:
    """Frames per second at which inputs arrive, or None: the next one when the last is answered.

    Only `async` has a clock of its own: how old its caches are depends on how fast frames come. The other policies
    give the same answers at any pace, and unpaced they show how fast they can be.

    Args:
        policy: The policy.
        asked: What the user asked for; it wins.
        known: The clip's or the bundle's rate, if known.
    """
    if asked is not None:
        return asked
    return None if policy.foreground else known


def record(
    bundle: Bundle,
    arrays: Mapping[str, Array],
    policy: Policy,
    options: StreamOptions,
    *,
    keep: Callable[[int], bool] = lambda index: False,
    on_frame: Callable[[Frame], None] | None = None,
    progress: Report = silent,
) -> Recording:
    """Stream `arrays` through `bundle` under one policy.

    Args:
        bundle: An opened bundle.
        arrays: Inputs by name, leading axis time.
        policy: When producers run.
        options: How; of its pace None submits the next frame when the last one is answered.
        keep: Which frames' images to keep, by index.
        on_frame: Called with every frame between two frames; it must be short.
        progress: Told how far it is.

    Returns:
        Latency, ages and routes of every answered frame, and the kept images.
    """
    from ..engine import Engine

    promise = options.promise
    label = str(policy) if promise is None else f"{policy} routed"
    total = frame_count(arrays)
    result = Recording(policy=str(policy))
    image = bundle.manifest.image_output
    progress(label, 0, total)
    routing = {} if promise is None else promise.for_engine(options.lpips)
    answered: list[Frame] = []
    chosen = {"exit": options.exit_name, "threads": options.threads, **options.on.for_engine(), **routing}
    with Engine(bundle, policy=policy, **chosen) as engine:
        result.placement = engine.placement
        session = engine.session()
        begin = time.perf_counter()
        for frame in session.render(arrays, fps=options.fps):
            result.latency_ms.append(frame.latency_ms)
            result.indices.append(frame.index)
            result.ages.append(frame.age)
            result.routes.append(frame.route)
            if image is not None and keep(frame.index):
                result.images[frame.index] = frame.outputs[image][0]
            if on_frame is not None:
                on_frame(frame)
            if promise is not None:
                answered.append(replace(frame, outputs={}))  # its images are not ours to keep
            progress(label, frame.index + 1, total)
        result.seconds = time.perf_counter() - begin
        if promise is not None:
            from ..report.routed import Routed

            engine.synchronize()  # an audit that still runs counts too
            result.routed = Routed.of(
                promise.quality,
                answered,
                session.statistics,
                deadline_ms=promise.deadline_ms,
                audit_every=promise.audit_every,
            )
        result.graphs = session.statistics.graphs
    return result


def frame_count(arrays: Mapping[str, Array]) -> int:
    """Frames in a stream: the longest leading extent (1 serves every frame)."""
    return max((len(array) for array in arrays.values()), default=0)

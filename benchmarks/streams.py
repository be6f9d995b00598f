"""Frames for a bundle, and the time that a session takes to answer them one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.session.session import Session

if TYPE_CHECKING:
    from warpcache.engine.cuda.device import CudaDevice

__all__ = ["Streamed", "as_clip", "frames_for", "on_device", "stream"]

Frame = Mapping[str, Any]

_TAKE = 4  # of the head's motion; nothing was trained on it


@dataclass
class Streamed:
    """What was timed, frame by frame, warm-up left out.

    Attributes:
        answer_ms: From before the inputs are handed in to having the answer, on the clock of the benchmark.
        latency_ms: `Frame.latency_ms`, the session's own.
        ages: Of the caches.
        routes: Frames by exit.
    """

    answer_ms: list[float] = field(default_factory=list)
    latency_ms: list[float] = field(default_factory=list)
    ages: list[int] = field(default_factory=list)
    routes: dict[str, int] = field(default_factory=dict)

    @property
    def tail(self) -> float:
        """p99 of the latency over its median."""
        p50, p99 = np.percentile(self.latency_ms, [50, 99])
        return float(p99 / p50)

    def to_record(self) -> dict[str, Any]:
        """JSON-ready, with every sample."""
        return {
            "answer_ms": [round(value, 5) for value in self.answer_ms],
            "latency_ms": [round(value, 5) for value in self.latency_ms],
            "age_mean": float(np.mean(self.ages)) if self.ages else 0.0,
            "age_max": max(self.ages, default=0),
            "routes": self.routes,
        }


def frames_for(bundle: Bundle, count: int) -> list[dict[str, NDArray[Any]]]:
    """Inputs of `count` frames: of the synthetic head where the bundle takes its conditions, else noise in [0, 1]."""
    specs = [record.spec for record in bundle.manifest.inputs]
    if any(spec.name == "condition" and spec.shape[1] == 6 for spec in specs):
        from warpcache.models.head import SyntheticHead

        size = next(spec.shape[-1] for spec in specs if spec.name == "condition")
        head = SyntheticHead(0, size)
        drawn = head.inputs(head.motion(count, bundle.manifest.fps or 30.0, seed=_TAKE))
        return [{spec.name: drawn[spec.name][t : t + 1] for spec in specs} for t in range(count)]
    rng = np.random.default_rng(_TAKE)
    return [{spec.name: rng.uniform(0, 1, spec.shape).astype(spec.dtype) for spec in specs} for _ in range(count)]


def as_clip(frames: Sequence[Frame]) -> dict[str, NDArray[Any]]:
    """The frames as `Session.render` takes them: arrays with a leading axis of time."""
    return {name: np.concatenate([frame[name] for frame in frames]) for name in frames[0]}


def on_device(frames: Sequence[Frame], device: CudaDevice) -> list[dict[str, Any]]:
    """The same frames in a GPU's memory."""
    return [{name: device.upload(array) for name, array in frame.items()} for frame in frames]


def stream(
    session: Session,
    frames: Sequence[Frame],
    count: int,
    *,
    warmup: int,
    fps: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Streamed:
    """Hand in frames one by one and wait for each answer.

    Args:
        session: What answers.
        frames: Inputs, used over and over.
        count: Frames that are counted.
        warmup: Frames answered before.
        fps: A frame is handed in when it is due at this rate, not before; None: when the last was answered.
        clock: Seconds.
        sleep: Waits so many seconds.
    """
    answers = session.frames()
    found = Streamed()
    start = clock()
    for index in range(-warmup, count):
        if fps is not None:
            due = start + (index + warmup) / fps
            while (left := due - clock()) > 0:
                sleep(left)
        begin = clock()
        session.submit(frames[index % len(frames)])
        answer = next(answers)
        end = clock()
        if index >= 0:
            found.answer_ms.append((end - begin) * 1e3)
            found.latency_ms.append(answer.latency_ms)
            found.ages.append(answer.age)
            found.routes[answer.route] = found.routes.get(answer.route, 0) + 1
        # Its memory goes back before the next is asked for, as with a caller who shows it and lets go.
        del answer
    return found

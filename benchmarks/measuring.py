"""What the benchmarks share: bare modules, interleaved timing, quality of clips, and figures beside their targets."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.metrics.images import measure_frames
from warpcache.engine.metrics.lpips import Lpips
from warpcache.engine.schedule.policy import Policy
from warpcache.tasks.choices import ExitName, StreamOptions
from warpcache.tasks.stream import record

__all__ = [
    "BareModule",
    "Figure",
    "answers",
    "in_blocks_ms",
    "interleaved_ms",
    "means",
    "print_figures",
    "ratio_of_medians",
]


@dataclass(frozen=True)
class Figure:
    """One measured number beside what it is to reach.

    Attributes:
        name: What was measured.
        value: The number.
        target: What it must not exceed (or fall below); None where nothing was promised.
        unit: Unit, empty for ratios.
        at_least: Whether the target is a lower bound.
    """

    name: str
    value: float
    target: float | None
    unit: str = ""
    at_least: bool = False

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; None without one."""
        if self.target is None:
            return None
        return self.value > self.target if self.at_least else self.value <= self.target

    def to_record(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {**asdict(self), "value": round(self.value, 5), "reached": self.reached}


class BareModule:
    """One module of a bundle called through ONNX Runtime directly, without the engine: the baseline."""

    def __init__(self, bundle: Bundle, name: str, threads: int) -> None:
        import onnxruntime as ort  # what else is in this file serves machines without it

        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        path = bundle.file(bundle.manifest.modules[name].file)
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._inputs = [value.name for value in self._session.get_inputs()]
        self._outputs = [value.name for value in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run it with those of `feeds` that it takes."""
        results = self._session.run(self._outputs, {name: feeds[name] for name in self._inputs})
        return dict(zip(self._outputs, results, strict=True))


def interleaved_ms(calls: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 5) -> dict[str, list[float]]:
    """Time several calls in turns, so that a noisy machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-warmup, rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if turn >= 0:
                times[name].append((time.perf_counter() - begin) * 1000)
    return times


def in_blocks_ms(
    load: Mapping[str, Callable[[], BareModule]],
    feeds: Mapping[str, NDArray[Any]],
    *,
    blocks: int = 6,
    calls: int = 20,
    warmup: int = 5,
) -> dict[str, list[float]]:
    """Time modules in alternating blocks, one loaded at a time.

    Two modules with several threads each may not be loaded together: the idle threads of one keep a core busy waiting
    for work while the other is timed.
    """
    times: dict[str, list[float]] = {name: [] for name in load}
    for _ in range(blocks):
        for name, make in load.items():
            module = make()
            for call in range(-warmup, calls):
                begin = time.perf_counter()
                module.run(feeds)
                if call >= 0:
                    times[name].append((time.perf_counter() - begin) * 1000)
            del module
    return times


def ratio_of_medians(times: Mapping[str, Sequence[float]], over: str = "whole", of: str = "warp") -> float:
    """Median of one call over the median of another."""
    return float(np.median(times[of]) / np.median(times[over]))


def answers(
    bundle: Bundle,
    arrays: Mapping[str, NDArray[Any]],
    *,
    policy: Policy,
    exit_name: ExitName | None = None,
    fps: float | None = None,
) -> dict[int, NDArray[np.float32]]:
    """Images that the engine answers under a policy, by frame."""
    options = StreamOptions(exit_name=exit_name, fps=fps)
    return record(bundle, arrays, policy, options, keep=lambda index: True).images


def means(
    a: NDArray[np.float32], b: NDArray[np.float32], metrics: Sequence[str], lpips: Lpips | None
) -> dict[str, float]:
    """Mean of every metric over two clips [T, C, H, W]."""
    return {name: float(np.mean(v)) for name, v in measure_frames(a, b, metrics, lpips=lpips).items()}


def print_figures(console: Console, title: str, figures: Sequence[Figure]) -> None:
    """A table of figures beside their targets."""
    table = Table(title=title, title_justify="left")
    for column in ("figure", "measured", "reach", ""):
        table.add_column(column, justify="left" if column in ("figure", "") else "right")
    for figure in figures:
        bound = "" if figure.target is None else f"{'>' if figure.at_least else '<='} {figure.target:g} {figure.unit}"
        verdict = {None: "", True: "reached", False: "MISSED"}[figure.reached]
        table.add_row(figure.name, f"{figure.value:.4g} {figure.unit}", bound, verdict)
    console.print(table)

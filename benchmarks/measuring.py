"""What the benchmarks share: bare modules, interleaved timing, quality of clips, and figures beside their targets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.records import show_table
from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.bundle.roles import Role
from warpcache.engine.metrics.images import measure_frames
from warpcache.engine.metrics.lpips import Lpips
from warpcache.engine.schedule.policy import Policy
from warpcache.report.tables import Column
from warpcache.tasks.choices import ExitName, StreamOptions
from warpcache.tasks.stream import record

__all__ = [
    "FIGURE_COLUMNS",
    "BareModule",
    "Figure",
    "answers",
    "figure_rows",
    "in_blocks_ms",
    "interleaved_ms",
    "means",
    "print_figures",
    "ratio_of_medians",
    "timed_ms",
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
    """One module of a bundle, by its name or role, called through ONNX Runtime directly: the baseline of the engine."""

    def __init__(self, bundle: Bundle, name: str | Role, threads: int = 1) -> None:
        import onnxruntime as ort  # what else is in this file serves machines without it

        if isinstance(name, Role):
            found = bundle.manifest.module_of(name)
            assert found is not None, f"{bundle.path.name} has no module of the role {name}"
            name = found
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


def timed_ms(
    call: Callable[[], object], count: int, *, warmup: int = 0, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Milliseconds of each of `count` calls, after `warmup` that are not counted."""
    times = []
    for _ in range(warmup + count):
        begin = clock()
        call()
        times.append((clock() - begin) * 1e3)
    return times[warmup:]


def interleaved_ms(calls: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 5) -> dict[str, list[float]]:
    """Time several calls in turns, so that a noisy machine hits all alike."""
    turns = [{name: timed_ms(call, 1)[0] for name, call in calls.items()} for _ in range(warmup + rounds)]
    return {name: [turn[name] for turn in turns[warmup:]] for name in calls}


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
            times[name] += timed_ms(partial(module.run, feeds), calls, warmup=warmup)
            del module
    return times


def ratio_of_medians(times: Mapping[str, Sequence[float]], over: str = Role.WHOLE, of: str = Role.WARP) -> float:
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


def figure_rows(figures: Iterable[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Figure, measured, reach and verdict, as tables show the records of figures."""
    rows = []
    for figure in figures:
        target, unit = figure["target"], figure["unit"]
        reach = "" if target is None else f"{'>=' if figure['at_least'] else '<='} {target:g} {unit}".rstrip()
        verdict = {None: "", True: "reached", False: "MISSED"}[figure["reached"]]
        value = "NaN" if figure["value"] is None else f"{figure['value']:.4g}"
        rows.append((figure["name"], f"{value} {unit}".rstrip(), reach, verdict))
    return rows


FIGURE_COLUMNS = (Column("figure"), Column.number("measured"), Column.number("reach"), Column(""))


def print_figures(title: str, figures: Iterable[Figure]) -> None:
    """A table of figures beside their targets."""
    show_table(title, FIGURE_COLUMNS, figure_rows(figure.to_record() for figure in figures))

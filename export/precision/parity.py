"""How near the answers of converted graphs are to the float32 bundle's, and which layers stand in the way.

Exits are run as the engine runs them: producer, cache (in its own type), consumer. Converted graphs are run as
`casting.emulated` makes them, because ONNX Runtime's CPU computes half types in float32 without rounding between nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, TensorProto

from ...engine.bundle.manifest import Manifest
from ...engine.bundle.roles import Role
from ...engine.metrics.images import PSNR_CAP_DB, measure_frames
from ...engine.spec import Array
from ..frames.state import State, unrolled
from ..frames.streams import frame_at
from ..graph.run import open_session, run_session
from .casting import elem_types, emulated

__all__ = ["ExitParity", "Parity", "fewest_kept", "open_answering"]

_FLOAT8 = (TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2)

Group = TypeVar("Group")
_Answer = tuple[tuple[int, int], dict[str, Array]]  # (frame, source), outputs


@dataclass(frozen=True)
class ExitParity:
    """One exit's answers against float32.

    Attributes:
        psnr_db: Of every answer, in dB; 0 for one that holds NaN or Inf.
        flip: Mean, None where there is no RGB output or it was not measured.
        max_error: Largest absolute error of any output, among what is finite.
        nan: NaN and Inf values in all outputs that float32 does not give.
    """

    psnr_db: tuple[float, ...]
    flip: float | None
    max_error: float
    nan: int

    def holds(self, floor_db: float) -> bool:
        """Whether every answer reaches `floor_db` and nothing is NaN or Inf."""
        return not self.nan and min(self.psnr_db) >= floor_db

    def to_record(self) -> dict[str, Any]:
        """The manifest's form."""
        return {
            "frames": len(self.psnr_db),
            "psnr_db": {"mean": round(float(np.mean(self.psnr_db)), 3), "worst": round(min(self.psnr_db), 3)},
            "flip": None if self.flip is None else round(self.flip, 6),
            "max_error": round(self.max_error, 7),
            "nan": self.nan,
        }


class Parity:
    """The float32 bundle's answers on some frames, and other graphs' answers compared with them.

    Sources are spread over the stream. From each, what reads no cache (the whole generator, a branch) answers the
    source's frame and one that is `age` frames later; plain answers both from the source's cache; every other consumer
    the later one.

    Args:
        models: Module name -> float32 graph.
        manifest: Says what exits and modules are for, and which output is an image in [-1, 1]: PSNR and FLIP are of it.
            Where none is, PSNR is of the first float output, its peak the range that float32 gives.
        arrays: The stream, name -> [T, ...].
        sources: How many sources at most.
        age: Of the aged caches, in frames; less where the stream is shorter.
        state: What the generator carries; every graph is given the state that it carries itself, so that errors add up
            over the stream as they will.
    """

    def __init__(
        self,
        models: Mapping[str, ModelProto],
        manifest: Manifest,
        arrays: Mapping[str, Array],
        *,
        sources: int = 8,
        age: int = 4,
        state: tuple[State, ...] = (),
    ) -> None:
        self.manifest, self._arrays, self._state = manifest, arrays, state
        frames = max(len(array) for array in arrays.values())
        age = min(age, frames - 1)
        count = min(sources, frames - age)
        self.sources = sorted({round(s) for s in np.linspace(0, frames - 1 - age, count)})
        self._plan = {record.name: self._pairs(record.name, age) for record in manifest.exits}
        self._image = image_output = manifest.image_output
        self._reference: dict[tuple[str, int, int], dict[str, Array]] = {}
        for exit_, answers in self._answer(models, self._plan, emulate=False):
            for (t, s), outputs in answers:
                self._reference[exit_, t, s] = outputs
        first = next(iter(self._reference.values()))
        self._floats = [name for name, array in first.items() if array.dtype.kind == "f"]
        self._signal = image_output or (self._floats[0] if self._floats else None)
        images = [outputs[self._signal] for outputs in self._reference.values()] if self._signal else []
        self._peak = max((float(np.ptp(i[np.isfinite(i)])) for i in images if np.isfinite(i).any()), default=0.0) or 1.0

    def _pairs(self, exit_: str, age: int) -> list[tuple[int, int]]:
        """(frame, source) of every answer."""
        later = [(s + age, s) for s in self.sources]
        if not self.manifest.reads_cache(exit_):
            return [(t, t) for t in sorted({*self.sources, *(t for t, _ in later)})]
        if self.manifest.role_of(exit_) is Role.PLAIN or age == 0:
            return sorted({*((s, s) for s in self.sources), *later})
        return later

    def measure(
        self,
        models: Mapping[str, ModelProto],
        exits: Sequence[str] | None = None,
        *,
        floor_db: float | None = None,
        flip: bool = False,
        answers: int | None = None,
    ) -> dict[str, ExitParity]:
        """Compare the answers of other graphs.

        Args:
            models: Module name -> converted graph (not emulated yet); those that `exits` need.
            exits: Which; all by default.
            floor_db: Where given, an exit is left at the first answer below it: the search only asks whether it holds.
            flip: Measure FLIP too, which takes longer than the answers themselves.
            answers: Only so many of each exit, where a rough figure will do.
        """
        plan = {name: self._plan[name][:answers] for name in (exits if exits is not None else self._plan)}
        found: dict[str, ExitParity] = {}
        for exit_, given in self._answer(models, plan, emulate=True):
            psnr: list[float] = []
            flips: list[float] = []
            error, nan = 0.0, 0
            for (t, s), outputs in given:
                reference = self._reference[exit_, t, s]
                for name in reference:
                    off, bad = _difference(outputs[name], reference[name])
                    error, nan = max(error, off), nan + bad
                psnr.append(self._psnr(outputs, reference))
                if flip and self._image is not None and outputs[self._image].shape[1] == 3 and not nan:
                    flips.extend(measure_frames(outputs[self._image], reference[self._image], ["flip"])["flip"])
                if floor_db is not None and (nan or psnr[-1] < floor_db):
                    break
            found[exit_] = ExitParity(tuple(psnr), float(np.mean(flips)) if flips else None, error, nan)
        return found

    def _psnr(self, outputs: Mapping[str, Array], reference: Mapping[str, Array]) -> float:
        if self._signal is None:
            return PSNR_CAP_DB
        ours, theirs = outputs[self._signal], reference[self._signal]
        if not np.isfinite(ours[np.isfinite(theirs)]).all():
            return 0.0
        if self._image is not None:
            return float(measure_frames(ours, theirs, ["psnr_db"])["psnr_db"].mean())
        square = float(np.mean(np.square(np.nan_to_num(ours - theirs), dtype=np.float64))) / self._peak**2
        return PSNR_CAP_DB if square == 0 else min(PSNR_CAP_DB, float(-10 * np.log10(square)))

    def _answer(
        self, models: Mapping[str, ModelProto], plan: Mapping[str, Sequence[tuple[int, int]]], *, emulate: bool
    ) -> Iterator[tuple[str, Iterator[_Answer]]]:
        """Yield every exit of `plan` with an iterator over ((frame, source), outputs) of its answers.

        A source's cache is made once for all consumers, when the first asks for it.
        """
        caches: dict[int, dict[str, Array]] = {}
        opened: dict[str, ort.InferenceSession] = {}
        carried: dict[str, dict[str, Array]] = {}
        inputs, outputs = {one.input.name for one in self._state}, {one.output for one in self._state}
        producer = self.manifest.module_of(Role.PRODUCER) or ""

        def session(module: str) -> ort.InferenceSession:
            if module not in opened:
                opened[module] = open_answering(models[module]) if emulate else open_session(models[module])
            return opened[module]

        def feeds_of(module: str, t: int) -> dict[str, Array]:
            carries = any(value.name in inputs for value in models[module].graph.input)
            if carries and module not in carried:
                carried[module] = unrolled(session(module), self._state, self._arrays)
            return frame_at(carried.get(module, self._arrays), t)

        def answers(exit_: str, pairs: Sequence[tuple[int, int]]) -> Iterator[_Answer]:
            module = self.manifest.exit(exit_).module
            for t, s in pairs:
                feeds = feeds_of(module, t)
                if self.manifest.reads_cache(exit_):
                    if s not in caches:
                        caches[s] = run_session(session(producer), feeds_of(producer, s))
                    feeds = {**feeds, **caches[s]}
                made = run_session(session(module), feeds)
                yield (t, s), {name: array for name, array in made.items() if name not in outputs}

        for exit_, pairs in plan.items():
            yield exit_, answers(exit_, pairs)


def fewest_kept(groups: Sequence[Group], holds: Callable[[Sequence[Group]], bool]) -> list[Group]:
    """The groups that have to be kept so that `holds` is true: none of them can be left out.

    By bisection: the shortest beginning of `groups` with which all is well ends in a group that is needed; keep that
    one, and look for the shortest beginning again. It takes about log2(n) + 2 trials for each group found, provided
    that keeping more never makes matters worse.

    Args:
        groups: All that could be kept; those worth keeping first where there is a choice.
        holds: Whether all is well with these kept. It must be with all of them; that is not tried again. When it
            raises `TimeoutError`, the search ends with the best that is known.

    Returns:
        What to keep, a subset that holds.
    """
    kept: list[Group] = []
    best = len(groups)  # kept + groups[:best] holds
    try:
        while best and not holds(kept):
            fails = 0
            while best - fails > 1:
                middle = (fails + best) // 2
                if holds([*kept, *groups[:middle]]):
                    best = middle
                else:
                    fails = middle
            kept.append(groups[best - 1])
            best -= 1
    except TimeoutError:
        return [*kept, *groups[:best]]
    return kept


def open_answering(model: ModelProto) -> ort.InferenceSession:
    """A session that rounds as `model` does; from `casting.cast_model`, quantised or not."""
    # ONNX Runtime's optimiser takes apart fp8 pairs around matrix products and then refuses what it made.
    fp8 = any(kind in _FLOAT8 for kind in elem_types(model).values())
    level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL if fp8 else None
    return open_session(emulated(model), level=level)


def _difference(ours: Array, theirs: Array) -> tuple[float, int]:
    """Largest absolute error where both are finite, and how many values only `theirs` has finite."""
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    good = np.isfinite(a) & np.isfinite(b)
    error = float(np.abs(a - b)[good].max(initial=0.0))
    return error, int((np.isfinite(b) & ~np.isfinite(a)).sum())

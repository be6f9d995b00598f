"""What every exit would have answered on every unseen frame, and how far from the whole generator that is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.measuring import BareModule
from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.bundle.roles import Role
from warpcache.engine.metrics.images import measure_frames
from warpcache.engine.metrics.lpips import Lpips
from warpcache.engine.promise.calibration import PromiseRecord
from warpcache.tasks.progress import Report

__all__ = ["COLD", "ExitTable", "kept_table", "measure_table", "oracle_reuse", "within"]

COLD = 0
"""The age of frames that are answered without a cache."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ExitTable:
    """True quality and the predictor's opinion, frame by frame.

    Attributes:
        exits: The promise's exits, in the predictor's order.
        quality: Age -> exit -> metric against the whole generator, [T]; NaN where there is no frame so far back.
        predicted: Age -> scores [T, exits of that age].
        spread: Age -> [T, exits of that age].
        novelty: [T].
        frozen: Age -> metric of the whole generator's image of that age shown again, [T].
        images: The whole generator's images, float32 [T, C, H, W].
    """

    exits: tuple[str, ...]
    quality: Mapping[int, Mapping[str, Floats]]
    predicted: Mapping[int, Floats]
    spread: Mapping[int, Floats]
    novelty: Floats
    frozen: Mapping[int, Floats]
    images: NDArray[np.float32]

    def exits_at(self, age: int) -> tuple[str, ...]:
        """Exits that can answer at this age; age 0 is without a cache."""
        return tuple(self.quality[age])


def measure_table(
    bundle: Bundle, arrays: Mapping[str, NDArray[Any]], promise: PromiseRecord, lpips: Lpips, progress: Report
) -> ExitTable:
    """Run every exit at every age on every frame."""
    manifest = bundle.manifest
    image = manifest.image_output
    assert image is not None
    modules = {name: BareModule(bundle, manifest.exit(name).module) for name in promise.exits}
    whole, producer = BareModule(bundle, Role.WHOLE), BareModule(bundle, Role.PRODUCER)
    predictor, cold = BareModule(bundle, Role.PREDICTOR), BareModule(bundle, Role.PREDICTOR_COLD)
    total = len(next(iter(arrays.values())))
    frames = [{name: array[t : t + 1] for name, array in arrays.items()} for t in range(total)]
    images = np.concatenate([whole.run(frame)[image] for frame in frames])
    quality = {age: {name: np.full(total, np.nan) for name in names} for age, names in _columns(promise).items()}
    predicted = {age: np.full((total, len(columns)), np.nan) for age, columns in quality.items()}
    spread = {age: np.full((total, len(columns)), np.nan) for age, columns in quality.items()}
    frozen = {age: np.full(total, np.nan) for age in promise.ages}
    novelty = np.full(total, np.nan)
    caches: dict[int, dict[str, NDArray[Any]]] = {}

    def measured(answer: NDArray[np.float32], t: int) -> float:
        return float(measure_frames(answer, images[t : t + 1], [promise.metric], lpips=lpips)[promise.metric][0])

    for t, frame in enumerate(frames):
        caches[t] = producer.run(frame)
        caches.pop(t - max(promise.ages) - 1, None)
        for name in promise.cold_exits:
            quality[COLD][name][t] = measured(modules[name].run(frame)[image], t)
        opinion = cold.run(frame)
        predicted[COLD][t], spread[COLD][t] = opinion["predicted"][0], opinion["spread"][0]
        novelty[t] = opinion["novelty"][0, 0]
        for age in promise.ages:
            if age > t:
                continue
            feeds = {**frame, **caches[t - age]}
            opinion = predictor.run({**feeds, "age": np.array([[age]], np.float32)})
            predicted[age][t], spread[age][t] = opinion["predicted"][0], opinion["spread"][0]
            for name in promise.exits:
                known = name in promise.cold_exits
                quality[age][name][t] = (
                    quality[COLD][name][t] if known else measured(modules[name].run(feeds)[image], t)
                )
            frozen[age][t] = measured(images[t - age : t - age + 1], t)
        progress("measuring every exit", t + 1, total)
    return ExitTable(promise.exits, quality, predicted, spread, novelty, frozen, images)


def _columns(promise: PromiseRecord) -> dict[int, tuple[str, ...]]:
    """Age -> the exits that can answer at it."""
    return {COLD: promise.cold_exits, **dict.fromkeys(promise.ages, promise.exits)}


def kept_table(
    path: Path,
    bundle: Bundle,
    arrays: Mapping[str, NDArray[Any]],
    promise: PromiseRecord,
    lpips: Lpips,
    progress: Report,
) -> ExitTable:
    """`measure_table`, unless it was kept at `path` for this very bundle; then it is read from there."""
    manifest = (bundle.path / "manifest.json").read_bytes()
    identity = np.frombuffer(hashlib.sha256(manifest).digest(), np.uint8)
    if path.exists():
        with np.load(path) as file:
            arrays_kept = {name: file[name] for name in file.files}
        if np.array_equal(arrays_kept["identity"], identity):
            return _unpacked(promise, arrays_kept)
    table = measure_table(bundle, arrays, promise, lpips, progress)
    packed: dict[str, NDArray[Any]] = {"identity": identity, "images": table.images, "novelty": table.novelty}
    for age in table.quality:
        packed[f"quality.{age}"] = np.stack([table.quality[age][name] for name in table.exits_at(age)], 1)
        packed[f"predicted.{age}"], packed[f"spread.{age}"] = table.predicted[age], table.spread[age]
    packed |= {f"frozen.{age}": values for age, values in table.frozen.items()}
    np.savez(path, **packed)  # type: ignore[arg-type]
    return table


def _unpacked(promise: PromiseRecord, kept: Mapping[str, NDArray[Any]]) -> ExitTable:
    columns = _columns(promise)
    return ExitTable(
        exits=promise.exits,
        quality={age: dict(zip(names, kept[f"quality.{age}"].T, strict=True)) for age, names in columns.items()},
        predicted={age: kept[f"predicted.{age}"] for age in columns},
        spread={age: kept[f"spread.{age}"] for age in columns},
        novelty=kept["novelty"],
        frozen={age: kept[f"frozen.{age}"] for age in promise.ages},
        images=kept["images"],
    )


def oracle_reuse(images: NDArray[np.float32], threshold: float, metric: str, lpips: Lpips) -> float:
    """Share of frames that need the whole generator when the last one it made is shown again for as long as a perfect
    oracle says that it is within the threshold.
    """
    kept, needed = 0, 1
    for t in range(1, len(images)):
        distance = measure_frames(images[kept : kept + 1], images[t : t + 1], [metric], lpips=lpips)[metric][0]
        if distance > threshold:
            kept, needed = t, needed + 1
    return needed / len(images)


def within(values: Sequence[float] | Floats, threshold: float) -> float:
    """Share of values at most `threshold`."""
    return float(np.mean(np.asarray(values) <= threshold))

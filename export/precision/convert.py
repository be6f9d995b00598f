"""Convert a bundle to fp16, bf16, int8 or fp8: precision is in the graphs, and the manifest says what it costs.

Frame inputs and outputs keep their types; the cache has a type of its own. Where frames are given, every exit is
compared with the float32 bundle (`parity.py`), and where one falls short the layers that break it are searched for and
kept: in float32 for fp16 and bf16, in fp16 for int8 and fp8. A quality promise goes along as it was calibrated, and
with it the predictors, in float32.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from onnx import ModelProto

from ...engine.bundle.bundle import Bundle
from ...engine.bundle.manifest import Manifest
from ...engine.bundle.roles import Role
from ...engine.errors import ExportError, InputError
from ...engine.spec import Array, TensorSpec
from ..bundle.weights import WEIGHTS_FILE
from ..bundle.write import bundle_models, refuse_out
from ..frames.state import unrolled
from ..frames.streams import Progress, frame_at
from ..graph.run import open_session, run_session
from ..promise.calibrate import CalibrationTerms, calibrate
from .casting import Casting, HalfType, emulated
from .conversion import Choice, Conversion
from .parity import ExitParity, Parity, fewest_kept
from .quantize import METHODS, QuantType, RangeCollector

__all__ = ["Precision", "PrecisionOptions", "convert_bundle"]

Precision = Literal["fp16", "bf16", "int8", "fp8"]

# What parity may change in the calibrated PSNR before the calibration is measured again, in dB.
_CALIBRATION_SHIFT_DB = 0.1
# To rank layers by their harm, this many answers an exit will do.
_RANKING_ANSWERS = 2
_IN_FP32 = "measured in fp32"
_PROMISED_BEFORE = (
    "calibrated before the conversion; predictors and what they read are as they were, and audits watch what the exits "
    "became"
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrecisionOptions:
    """What a user may choose.

    Attributes:
        precision: What to compute in. int8 and fp8 are convolutions' and matrix products'; the rest is in fp16.
        cache_precision: Of the float32 cache tensors, but those that carry coordinates or that a predictor reads, which
            stay in fp32. None is fp16, or fp32 where no kept layer brings an exit to `min_psnr_db` with an fp16 cache.
        min_psnr_db: What every answer of every exit has to reach against fp32.
        keep: Paths of PyTorch modules, or names of nodes, to keep in fp32.
        calibration_frames: Frames at most that the ranges of int8 and fp8 are made of.
        parity_frames: Frames at most whose caches parity is measured from.
        age: Of the aged caches that parity is measured with, in frames.
        max_trials: Conversions at most that the search for layers tries.

    Raises:
        InputError: If a name or number is out of its range.
    """

    precision: Precision
    cache_precision: Literal["fp32", "fp16"] | None = None
    min_psnr_db: float = 45.0
    keep: tuple[str, ...] = ()
    calibration_frames: int = 32
    parity_frames: int = 8
    age: int = 4
    max_trials: int = 96

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise InputError(f"unknown precision {self.precision!r}; choose from {', '.join(get_args(Precision))}")
        if self.cache_precision not in (None, "fp32", "fp16"):
            raise InputError(f"unknown cache precision {self.cache_precision!r}; choose from fp32, fp16")
        if not 0 < self.min_psnr_db <= 100:
            raise InputError(f"min_psnr_db is {self.min_psnr_db}; it must be above 0 and at most 100")
        for name in ("calibration_frames", "parity_frames", "age", "max_trials"):
            value = getattr(self, name)
            if value < 1:
                raise InputError(f"{name} is {value}; it must be 1 or more")


def _silent(stage: str, done: int, total: int) -> None:
    """Says nothing."""


def convert_bundle(
    bundle: Bundle,
    out: Path,
    *,
    options: PrecisionOptions,
    frames: Mapping[str, Array] | None,
    progress: Progress = _silent,
) -> Bundle:
    """Write a bundle that computes in another precision; `bundle` stays as it is.

    Args:
        bundle: A float32 bundle.
        out: The bundle to write, ``NAME.warp``.
        options: The user's choices.
        frames: A stream of the bundle's inputs, name -> [T, ...]. Without it nothing is measured, no layer is searched
            for, and the manifest's parity is null; int8 and fp8 need it.
        progress: Told how far it is: stage, done, total.

    Returns:
        The new bundle, verified. Its manifest's ``created.precision`` holds:

        - ``precision``, ``cache`` ("fp16" or "fp32"), ``min_psnr_db``, and ``frames``: how many the stream had;
        - ``kept``: module -> layers in float32 that were asked for or searched for;
        - ``rules``: module -> what is in float32 by a rule: the number of nodes that compute coordinates, of those
          that decide what a look-up finds, and of those that a predictor's inputs come from; the nodes whose constants
          do not fit (with the reason); the operators without the type;
        - ``parity``: exit -> ``{"frames", "psnr_db": {"mean", "worst"}, "flip", "max_error", "nan"}``, or null;
        - ``measured``: how; ``trials``: conversions that the search tried; ``calibration``: what it was measured in;
          ``promise``: that it was calibrated before, or null where there is none;
        - for int8 and fp8 ``range`` (how ranges were made) and ``unquantised``: module -> layers left in fp16.

    Raises:
        InputError: If frames are missing or do not fit, or a name to keep names nothing.
        ExportError: If the precision cannot reach `min_psnr_db`, whatever is kept.
        BundleError: If the bundle is in the way or cannot be written; then nothing is.
    """
    refuse_out(out)
    _check_source(bundle.manifest)
    if frames is not None:
        frames = _checked_frames(bundle.manifest, frames)
    elif options.precision in ("int8", "fp8"):
        raise InputError(f"{options.precision} needs calibration frames: its ranges are made of real inputs; give some")
    started = time.perf_counter()
    progress(f"converting to {options.precision}", 0, 1)
    half: HalfType = "bfloat16" if options.precision == "bf16" else "float16"
    quant: QuantType | None = options.precision if options.precision in ("int8", "fp8") else None
    conversion = Conversion(bundle, half, quant, options.keep)
    progress(f"converting to {options.precision}", 1, 1)
    choice = Choice(half_cache=options.cache_precision != "fp32")
    fitted = _Fitted(choice, conversion.convert(choice), None, 0)
    state = conversion.state
    if frames is not None:
        if state:
            frames = unrolled(open_session(conversion.model_of(Role.WHOLE)), state, frames)
        fitted = _Fit(conversion, bundle.manifest, options, frames, progress).run(choice)
    graphs = _graphs(fitted.castings)
    calibration, said = _calibration(bundle.manifest, conversion, graphs, fitted.parity, frames, options, progress)
    promised = "promise" in (bundle.manifest.calibration or {})
    record = _record(conversion, fitted, options, 0 if frames is None else _length(frames))
    record |= {"calibration": said, "promise": _PROMISED_BEFORE if promised else None}
    types = conversion.cache_types(half_cache=fitted.choice.half_cache)
    progress("writing the bundle", 0, 1)
    manifest = _manifest(bundle.manifest, out, types, calibration, record)
    converted = bundle_models(out, manifest, graphs, more=_carried(bundle))
    progress("writing the bundle", 1, 1)
    logger.info("converted %s to %s in %.1f s", bundle.path, options.precision, time.perf_counter() - started)
    return converted


@dataclass(frozen=True)
class _Fitted:
    """A choice, the graphs that it gives, their parity where it was measured, and how many trials it took."""

    choice: Choice
    castings: Mapping[str, Casting]
    parity: Mapping[str, ExitParity] | None
    trials: int


class _Fit:
    """The search for a choice under which every exit reaches its floor."""

    def __init__(
        self,
        conversion: Conversion,
        manifest: Manifest,
        options: PrecisionOptions,
        frames: Mapping[str, Array],
        progress: Progress,
    ) -> None:
        self.conversion, self.options, self.frames, self.progress = conversion, options, frames, progress
        self.manifest = manifest
        self.trials = 0
        progress("measuring parity", 0, 1)
        self.reference = Parity(
            conversion.models,
            manifest,
            frames,
            sources=options.parity_frames,
            age=options.age,
            state=conversion.state,
        )

    def run(self, choice: Choice) -> _Fitted:
        """Search from `choice` on.

        Raises:
            ExportError: If nothing reaches the floor.
        """
        fitted = self._fit_half(choice)
        if self.conversion.quant is not None:
            fitted = self._fit_quantised(fitted.choice, self.conversion.quant)
        self.progress("measuring parity", 1, 1)
        return fitted

    def _fit_half(self, choice: Choice) -> _Fitted:
        """Keep in float32 what fp16 or bf16 breaks."""
        while failing := self._failing(fitted := self._fitted(choice)):
            layers = [
                layer
                for layer in self.conversion.layers_of(self._modules(failing), quantised=False)
                if layer not in choice.kept
            ]
            all_kept = self._measure(_with_kept(choice, layers), failing)
            broken = {name: p for name, p in all_kept.items() if not p.holds(self.options.min_psnr_db)}
            if broken:
                if self.options.cache_precision is None and choice.half_cache:
                    logger.info("no layer brings exit %r to its floor with an fp16 cache: it is fp32", failing[0])
                    choice = replace(choice, half_cache=False)
                    continue
                raise self._short(*next(iter(broken.items())))
            found = self._fewest(layers, failing, partial(_with_kept, choice))
            if len(found) == len(layers):
                raise ExportError(
                    f"{self.options.precision} reaches {self.options.min_psnr_db:g} dB at exit {failing[0]!r} only "
                    f"with all of its {len(layers)} layers in fp32, by {self.trials} trials; lower "
                    "min_psnr_db (--min-psnr)"
                )
            choice = _with_kept(choice, found)
        return fitted

    def _fit_quantised(self, choice: Choice, quant: QuantType) -> _Fitted:
        """Choose the ranges by parity, and leave in fp16 what quantisation breaks."""
        self._collect()
        worst: dict[str, float] = {}
        for method in METHODS[quant]:
            parity = self._measure(replace(choice, ranges=method), [record.name for record in self.manifest.exits])
            worst[method] = min(min(p.psnr_db) for p in parity.values())
        choice = replace(choice, ranges=max(worst, key=lambda method: worst[method]))
        quantised = self.conversion.layers_of(list(self.conversion.layers), quantised=True)
        while failing := self._failing(fitted := self._fitted(choice)):
            layers = [
                layer
                for layer in self.conversion.layers_of(self._modules(failing), quantised=True)
                if layer not in choice.unquantised
            ]
            layers = self._most_harmful_first(layers, failing, choice)
            choice = _with_unquantised(choice, self._fewest(layers, failing, partial(_with_unquantised, choice)))
            if set(quantised) <= {*choice.unquantised, *choice.kept}:
                raise ExportError(
                    f"{quant} reaches {self.options.min_psnr_db:g} dB only with every layer left in fp16 (with none: "
                    f"{max(worst.values()):.1f} dB); lower min_psnr_db (--min-psnr), or use fp16"
                )
        return fitted

    def _fewest(
        self, layers: Sequence[str], exits: Sequence[str], tried_with: Callable[[Sequence[str]], Choice]
    ) -> list[str]:
        """The fewest of `layers` that these exits hold with; `tried_with` makes a choice of some of them."""

        def holds(some: Sequence[str]) -> bool:
            if self.trials >= self.options.max_trials:
                raise TimeoutError
            parity = self._measure(tried_with(some), exits, floor_db=self.options.min_psnr_db)
            return all(p.holds(self.options.min_psnr_db) for p in parity.values())

        return fewest_kept(layers, holds)

    def _most_harmful_first(self, layers: Sequence[str], exits: Sequence[str], choice: Choice) -> list[str]:
        """Layers by what quantising each alone does, where there are trials for that; else as they are.

        Errors of many layers add up, so that many sets of kept layers hold; the most harmful make the smallest.
        """
        if len(layers) > (self.options.max_trials - self.trials) // 2:
            return list(layers)
        harm = {}
        for layer in layers:
            others = [other for other in layers if other != layer]
            parity = self._measure(_with_unquantised(choice, others), exits, answers=_RANKING_ANSWERS)
            harm[layer] = min(min(p.psnr_db) for p in parity.values())
        return sorted(layers, key=lambda layer: harm[layer])

    def _collect(self) -> None:
        """Distributions of what quantisable nodes read, over the calibration frames; consumers at age 0 and aged."""
        length = _length(self.frames)
        chosen = _spread(length, self.options.calibration_frames)
        models = self.conversion.models
        collectors = {name: RangeCollector(models[name]) for name in self.conversion.layers}
        producer = open_session(self.conversion.model_of(Role.PRODUCER))
        for done, t in enumerate(chosen):
            now = frame_at(self.frames, t)
            cache = run_session(producer, now)
            for name, collector in collectors.items():
                aged = [min(t + self.options.age, length - 1)] if self.manifest.modules[name].role.reads_cache else []
                for feeds in (now, *(frame_at(self.frames, later) for later in aged if later != t)):
                    collector.add({**feeds, **cache})
            self.progress("collecting ranges", done + 1, len(chosen))
        self.conversion.histograms = {name: collector.histograms for name, collector in collectors.items()}

    def _fitted(self, choice: Choice) -> _Fitted:
        """The choice with its graphs and their parity; an exit that does not reach its floor is left at that answer."""
        castings = self.conversion.convert(choice)
        parity = self.reference.measure(_graphs(castings), floor_db=self.options.min_psnr_db, flip=True)
        return _Fitted(choice, castings, parity, self.trials)

    def _failing(self, fitted: _Fitted) -> list[str]:
        """Exits that do not reach their floor."""
        assert fitted.parity is not None
        return [name for name, p in fitted.parity.items() if not p.holds(self.options.min_psnr_db)]

    def _measure(
        self, choice: Choice, exits: Sequence[str], *, floor_db: float | None = None, answers: int | None = None
    ) -> dict[str, ExitParity]:
        """One trial."""
        graphs = _graphs(self.conversion.convert(choice, self._modules(exits)))
        parity = self.reference.measure(graphs, exits, floor_db=floor_db, answers=answers)
        self.trials += 1
        stage = f"searching what {self.options.precision} breaks"
        self.progress(stage, self.trials, max(self.trials, self.options.max_trials))
        return parity

    def _modules(self, exits: Sequence[str]) -> list[str]:
        """The modules that these exits run."""
        names = {self.manifest.exit(name).module for name in exits}
        cached = any(self.manifest.reads_cache(name) for name in exits)
        return [
            name
            for name, module in self.manifest.modules.items()
            if name in names or (cached and module.role is Role.PRODUCER)
        ]

    def _short(self, exit_: str, parity: ExitParity) -> ExportError:
        what = f"{parity.nan} values that are NaN or Inf" if parity.nan else f"{min(parity.psnr_db):.1f} dB"
        return ExportError(
            f"{self.options.precision} gives {what} at exit {exit_!r} whatever is kept in fp32, where "
            f"{self.options.min_psnr_db:g} dB are asked for; lower min_psnr_db (--min-psnr), or set "
            "cache_precision (--cache-precision) to fp32"
        )


def _with_kept(choice: Choice, layers: Sequence[str]) -> Choice:
    return replace(choice, kept=(*choice.kept, *layers))


def _with_unquantised(choice: Choice, layers: Sequence[str]) -> Choice:
    return replace(choice, unquantised=(*choice.unquantised, *layers))


def _calibration(
    manifest: Manifest,
    conversion: Conversion,
    graphs: Mapping[str, ModelProto],
    parity: Mapping[str, ExitParity] | None,
    frames: Mapping[str, Array] | None,
    options: PrecisionOptions,
    progress: Progress,
) -> tuple[dict[str, Any] | None, str | None]:
    """The calibration of the result, and what the manifest is to say of it.

    The float32 bundle's was measured on frames that training never saw, and perhaps against a truth; the frames at hand
    may be neither. So it stays while parity shows that it can hardly differ, and is measured again where it may.
    """
    known, image = manifest.calibration, manifest.image_output
    if known is None or parity is None or frames is None or image is None:
        return known, None if known is None else _IN_FP32
    shifts = [_shift_db(known, name, exit_parity) for name, exit_parity in parity.items()]
    if max(shifts, default=0.0) <= _CALIBRATION_SHIFT_DB:
        return known, _IN_FP32
    ages = [int(age) for by_age in known["exits"].values() for age in by_age]
    rounded = {name: emulated(graph) for name, graph in graphs.items()}
    state, producer = conversion.state, rounded[manifest.module_of(Role.PRODUCER) or ""]
    carried = unrolled(open_session(producer), state, frames) if state else None
    again = calibrate(
        conversion.model_of(Role.WHOLE),
        producer,
        {record.name: rounded[record.module] for record in manifest.exits if record.name != manifest.exact_exit},
        frames,
        CalibrationTerms(image, max(ages, default=1), carried=carried),
        progress=progress,
    )
    if again is None:
        return known, _IN_FP32
    if "promise" in known:
        again["promise"] = known["promise"]
    return again, f"measured in {options.precision}, emulated on the CPU, on the frames given"


def _carried(bundle: Bundle) -> dict[str, bytes]:
    """The files that a conversion leaves as they are: what a quality promise was calibrated with."""
    made = {WEIGHTS_FILE, *(module.file for module in bundle.manifest.modules.values())}
    return {name: bundle.file(name).read_bytes() for name in bundle.manifest.files if name not in made}


def _shift_db(calibration: Mapping[str, Any], exit_: str, parity: ExitParity) -> float:
    """What parity's error adds to the calibrated one at most, were they independent: that of the youngest age."""
    ages = calibration.get("exits", {}).get(exit_, {})
    figures = [spread["psnr_db"]["mean"] for spread in ages.values() if "psnr_db" in spread]
    if not figures:
        return 0.0
    return 10 * math.log10(1 + 10 ** ((max(figures) - float(np.mean(parity.psnr_db))) / 10))


def _record(conversion: Conversion, fitted: _Fitted, options: PrecisionOptions, frames: int) -> dict[str, Any]:
    """The manifest's ``created.precision``."""
    choice, parity = fitted.choice, fitted.parity

    def by_module(layers: Sequence[str]) -> dict[str, list[str]]:
        return {name: [layer for layer in own if layer in layers] for name, own in conversion.layers.items()}

    kept = by_module(choice.kept)
    for name in kept:
        kept[name] += [layer for layer in conversion.asked_layers(name) if layer not in kept[name]]
    rules = {
        name: {
            **{
                rule: sum(reason == rule for reason in reasons.values())
                for rule in ("coordinates", "lookup", "predictor")
            },
            "constant": dict(fitted.castings[name].constants),
            "type": sorted(node for node, reason in reasons.items() if reason == "type"),
        }
        for name, reasons in conversion.rules.items()
    }
    record: dict[str, Any] = {
        "precision": options.precision,
        "cache": "fp16" if choice.half_cache else "fp32",
        "kept": kept,
        "rules": rules,
        "parity": None if parity is None else {name: p.to_record() for name, p in parity.items()},
        "measured": None if parity is None else "emulated on the CPU: float32, every value rounded to its type",
        "frames": frames,
        "min_psnr_db": options.min_psnr_db,
        "trials": fitted.trials,
    }
    if conversion.quant is not None:
        record |= {"range": choice.ranges, "unquantised": by_module(choice.unquantised)}
    return record


def _manifest(
    source: Manifest, out: Path, types: Mapping[str, str], calibration: dict[str, Any] | None, record: dict[str, Any]
) -> Manifest:
    def specs(tensors: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        return tuple(replace(spec, dtype=types.get(spec.name, spec.dtype)) for spec in tensors)

    return replace(
        source,
        name=out.stem,
        created=source.created | {"precision": record},
        cache=specs(source.cache),
        modules={
            name: replace(module, file=f"{name}.onnx", inputs=specs(module.inputs), outputs=specs(module.outputs))
            for name, module in source.modules.items()
        },
        calibration=calibration,
        files={},
    )


def _check_source(manifest: Manifest) -> None:
    already = manifest.created.get("precision")
    if already is not None:
        known = already.get("precision") if isinstance(already, dict) else already
        raise InputError(
            f"bundle {manifest.name!r} is in {known} already; convert the fp32 bundle that it was made from"
        )


def _checked_frames(manifest: Manifest, frames: Mapping[str, Array]) -> dict[str, Array]:
    """The stream, checked whole, in the manifest's order.

    Raises:
        InputError: If an input is missing, not of the bundle's, or does not fit.
    """
    specs = {record.spec.name: record.spec for record in manifest.inputs}
    missing, spare = [name for name in specs if name not in frames], [name for name in frames if name not in specs]
    if missing or spare:
        faults = [f"lack {', '.join(missing)}"] if missing else []
        faults += [f"hold {', '.join(spare)}, which it does not take"] if spare else []
        raise InputError(f"the frames {' and '.join(faults)}; the bundle takes {', '.join(specs)}")
    lengths = {name: len(frames[name]) for name in specs if np.ndim(frames[name]) and len(frames[name]) != 1}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        shown = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise InputError(f"the frames' arrays hold different numbers of frames, or none ({shown}); make them alike")
    for name, spec in specs.items():
        # One axis of time for the batch axis of 1: what is left is one frame's shape.
        replace(spec, shape=(len(frames[name]) if np.ndim(frames[name]) else 1, *spec.shape[1:])).check(frames[name])
    return {name: frames[name] for name in specs}


def _length(frames: Mapping[str, Array]) -> int:
    return max(len(array) for array in frames.values())


def _spread(length: int, count: int) -> list[int]:
    """At most `count` frames, evenly over the stream."""
    return sorted({round(t) for t in np.linspace(0, length - 1, min(count, length))})


def _graphs(castings: Mapping[str, Casting]) -> dict[str, ModelProto]:
    return {name: casting.model for name, casting in castings.items()}

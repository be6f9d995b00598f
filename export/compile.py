"""From a trained generator to a bundle: trace, cut, train, calibrate, write.

Nothing is written to the bundle's place before all is done. The one thing that an interrupted compile leaves is its
checkpoint, beside the bundle, which `resume` goes on from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from onnx import ModelProto
from torch import Tensor, nn

from .. import __version__
from ..engine.bundle import Bundle
from ..engine.errors import InputError
from ..engine.lpips import SMALLEST_SIDE, Lpips
from ..engine.manifest import Cut, ExitRecord, InputRecord, Manifest, ModuleRecord
from ..engine.spec import Array, TensorSpec
from .adapter import AdapterConfig, AdapterLayout, CacheEncoder, Surface, WarpConsumer
from .adapter_graph import choose_config, consumer_graph, producer_graph
from .bundling import bundle_models, refuse_out
from .calibrate import calibrate
from .cut import AUTO, CutCandidate, choose_cut, enumerate_cuts, rank_cuts
from .distill import Distillation, DistillOptions, read_plan
from .graph import GraphIndex, fix_input_shapes, input_names, normalise
from .perceptual import PerceptualLoss
from .profile import profile_nodes, time_model
from .recording import Progress, layout_of, record, spec_of
from .run import frame_at, open_session, run_session
from .split import SplitModels, check_exact, split
from .trace import input_names_of, trace_generator

__all__ = ["DEFAULT_STEPS", "CompileOptions", "Stream", "compile_generator", "split_model"]

DEFAULT_STEPS = 3000
# Of the inputs, where no holdout is given: the part at the end that training does not see.
HOLDOUT_SHARE = 0.25

logger = logging.getLogger(__name__)


class Stream(Protocol):
    """A clip of inputs in memory: arrays by name [T, ...], and ground-truth images where there are some."""

    @property
    def arrays(self) -> dict[str, Array]:
        """Inputs and motion."""

    @property
    def frames(self) -> int:
        """Their number."""

    @property
    def fps(self) -> float | None:
        """Frames a second, where known."""

    @property
    def truth(self) -> Array | None:
        """Images that the outputs should show, float32 [T, C, H, W]."""


@dataclass(frozen=True)
class CompileOptions:
    """What a user may choose.

    Attributes:
        cut: "auto", or names of values or modules joined by commas.
        budget: The consumer's cost as a fraction of the generator's.
        steps: Training steps; 0 trains nothing.
        max_age: Ages 1..max_age are trained and calibrated.
        seed: Of the training.
        lpips: Weights file of LPIPS: used as a training loss and in the calibration.
        resume: Go on from the checkpoint of an interrupted compile of the same bundle.
        adapter: The adapter's size, instead of the largest that the budget allows.
        train: What else the training takes, see `DistillOptions`.

    Raises:
        InputError: If a number is out of its range.
    """

    cut: str = AUTO
    budget: float = 0.1
    steps: int = DEFAULT_STEPS
    max_age: int = 4
    seed: int = 0
    lpips: Path | None = None
    resume: bool = False
    adapter: AdapterConfig | None = None
    train: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value, ok, range_ in (
            ("budget", self.budget, 0 < self.budget <= 1, "above 0 and at most 1"),
            ("steps", self.steps, self.steps >= 0, "0 or more"),
            ("max_age", self.max_age, self.max_age >= 1, "1 or more"),
        ):
            if not ok:
                raise InputError(f"{name} is {value}; it must be {range_}")


def compile_generator(
    module: nn.Module,
    stream: Stream,
    out: Path,
    *,
    holdout: Stream | None = None,
    options: CompileOptions,
    made_from: Mapping[str, Any],
    progress: Progress,
) -> Bundle:
    """Compile a PyTorch generator into a bundle.

    Args:
        module: The trained generator. An attribute `surface` (`Surface`) says where its inputs carry motion.
        stream: Frames to train on.
        out: The bundle to write, ``NAME.warp``.
        holdout: Frames to calibrate on; without it the last quarter of `stream` is kept back.
        options: The user's choices.
        made_from: What the manifest is to say of where it comes from, JSON-ready.
        progress: Told how far it is: stage, done, total.

    Returns:
        The bundle, verified.

    Raises:
        InputError: If the inputs do not fit the generator.
        ExportError: If it cannot be traced, cut or trained as asked.
        BundleError: If the bundle cannot be written.
    """
    refuse_out(out)
    surface: Surface | None = getattr(module, "surface", None) if options.steps else None
    motion = {surface.atlas} if surface is not None else set()
    names = set(input_names_of(module))
    declared = getattr(module, "surface", None)
    # A stream made for training serves `--steps 0` as well; what the cut alone does not need is left out.
    spare = {declared.atlas} if declared is not None and not options.steps else set()
    arrays = {name: array for name, array in stream.arrays.items() if name not in spare}
    train, held = _parts(_with_arrays(stream, arrays), holdout, training=options.steps > 0)
    example = {name: train.arrays[name][:1] for name in train.arrays if name not in motion or name in names}
    progress("tracing the generator", 0, 1)
    model = trace_generator(module, example)
    progress("tracing the generator", 1, 1)
    return _build(model, train, held, out, surface, options, made_from, progress)


def split_model(
    model: ModelProto, stream: Stream, out: Path, *, cut: str = AUTO, made_from: Mapping[str, Any], progress: Progress
) -> Bundle:
    """Cut an ONNX model into a bundle; nothing is trained.

    Args:
        model: The generator; symbolic dimensions take the stream's sizes.
        stream: Sample frames: the cut is chosen, checked and calibrated on them.
        out: The bundle to write, ``NAME.warp``.
        cut: "auto", or names of values joined by commas.
        made_from: As for `compile_generator`.
        progress: Told how far it is.

    Raises:
        As `compile_generator`.
    """
    refuse_out(out)
    known = input_names(model)
    _check_names(set(stream.arrays), known)
    shapes = {name: (1, *stream.arrays[name].shape[1:]) for name in known}
    model = normalise(fix_input_shapes(model, shapes))
    options = CompileOptions(cut=cut, steps=0)
    return _build(model, stream, stream, out, None, options, made_from, progress)


def _build(
    model: ModelProto,
    train: Stream,
    held: Stream,
    out: Path,
    surface: Surface | None,
    options: CompileOptions,
    made_from: Mapping[str, Any],
    progress: Progress,
) -> Bundle:
    """Everything after the graph is at hand."""
    image_output = _image_output(model)
    _check_fit(model, train, held, surface, image_output, training=options.steps > 0)
    checkpoint = out.with_suffix(".checkpoint.safetensors")
    plan = read_plan(checkpoint) if options.resume and options.steps else None
    generator_inputs = GraphIndex(model).inputs
    # The whole stream: frames are tried all over it, as its beginning may hardly move.
    sample = {name: train.arrays[name] for name in generator_inputs}
    cut, candidates = _choose(model, sample, plan["cut"] if plan else options.cut, image_output, progress)
    parts = split(model, cut)
    feeds = {name: array[:1] for name, array in sample.items()}
    check_exact(model, parts, feeds)
    models: dict[str, ModelProto] = {"generator": model, "producer": parts.producer, "plain": parts.plain}
    trained: dict[str, Any] = {}
    if options.steps:
        config = AdapterConfig(**plan["adapter"]) if plan else options.adapter
        producer, warp, trained = _train(
            model, parts, cut, train, surface, config, options, checkpoint, feeds, progress
        )
        models |= {"producer": producer, "warp": warp}
        # The cut's tensors now leave a producer that does more: still the same bits.
        check_exact(model, dataclasses.replace(parts, producer=producer), frame_at(train.arrays, 0))
    consumers = {name: model for name, model in models.items() if name in ("plain", "warp")}
    calibration = None
    if image_output is not None:
        calibration = calibrate(
            model,
            models["producer"],
            consumers,
            held.arrays,
            image_output=image_output,
            max_age=options.max_age,
            truth=held.truth,
            lpips=Lpips.load(options.lpips) if options.lpips is not None else None,
            progress=progress,
        )
    manifest = _manifest(out, models, parts, train, surface, candidates, calibration, made_from, image_output)
    manifest = dataclasses.replace(
        manifest,
        created=manifest.created | {"training": trained},
        exits=_exits(models, train),
    )
    progress("writing the bundle", 0, 1)
    bundle = bundle_models(out, manifest, models)
    progress("writing the bundle", 1, 1)
    checkpoint.unlink(missing_ok=True)
    return bundle


def _choose(
    model: ModelProto, sample: Mapping[str, Array], spec: str, image_output: str | None, progress: Progress
) -> tuple[CutCandidate, list[CutCandidate]]:
    """The cut, and the candidates that it was ranked among (it alone, where it was named)."""
    progress("choosing the cut", 0, 2)
    feeds = {name: array[-1:] for name, array in sample.items()}
    frames = max(len(array) for array in sample.values())
    # Where no output is a picture, what reuse is worth is still measured on one.
    measured_on = image_output or _first_float(model)
    # A typing mistake in a cut's name is found before anything is measured.
    if spec != AUTO:
        cut = choose_cut(model, spec, sample, measured_on)
        progress("choosing the cut", 2, 2)
        return cut, [cut]
    if frames < 2:
        raise InputError(
            "choosing a cut needs at least 2 frames to see what an old cache is worth; give more, or a cut"
        )
    costs = profile_nodes(model, feeds)
    progress("choosing the cut", 1, 2)
    ranked = rank_cuts(enumerate_cuts(model, costs), model, sample, measured_on)
    progress("choosing the cut", 2, 2)
    return ranked[0], ranked


def _train(
    model: ModelProto,
    parts: SplitModels,
    cut: CutCandidate,
    train: Stream,
    surface: Surface | None,
    config: AdapterConfig | None,
    options: CompileOptions,
    checkpoint: Path,
    feeds: Mapping[str, Array],
    progress: Progress,
) -> tuple[ModelProto, ModelProto, dict[str, Any]]:
    """Train the warp adapter: the producer with its encoder, the consumer, and what the manifest says of it."""
    atlas = None if surface is None else train.arrays.get(surface.atlas)
    layout = layout_of(model, cut.names, surface, None if atlas is None else atlas.shape)
    if config is None:
        config = choose_config(model, layout, options.budget, feeds, progress=progress)
    recording = record(model, layout, config, train.arrays, truth=train.truth, progress=progress)
    train_options = DistillOptions(steps=options.steps, max_age=options.max_age, seed=options.seed, **options.train)
    torch.manual_seed(options.seed)
    encoder, consumer = CacheEncoder(layout, config), WarpConsumer(layout, config)
    distillation = Distillation(
        encoder,
        consumer,
        recording,
        train_options,
        perceptual=_perceptual(options.lpips, layout),
        identity=_identity(model, train, options.lpips is not None),
        plan={"cut": ",".join(cut.names), "adapter": config.to_record()},
    )
    if not options.resume:
        checkpoint.unlink(missing_ok=True)
    distillation.run(
        checkpoint=checkpoint, on_step=lambda step, _: progress("training the warp adapter", step, options.steps)
    )
    limits = (float(recording.images.min()), float(recording.images.max()))
    warp = consumer_graph(consumer.eval(), layout, limits)
    producer = producer_graph(model, parts, encoder.eval(), layout)
    return producer, warp, {"adapter": config.to_record(), **dataclasses.asdict(train_options)}


def _perceptual(weights: Path | None, layout: AdapterLayout) -> Callable[[Tensor, Tensor], Tensor] | None:
    """LPIPS on the first RGB output; None without weights."""
    if weights is None:
        return None
    loss = PerceptualLoss(weights)
    first = 0
    for _, channels in layout.outputs:
        if channels == 3 and min(layout.height, layout.width) >= SMALLEST_SIDE:
            rgb = slice(first, first + 3)
            return lambda a, b: loss(a[:, rgb], b[:, rgb])
        first += channels
    logger.warning("no output is an RGB image of %d pixels or more, so LPIPS is no part of the training", SMALLEST_SIDE)
    return None


def _identity(model: ModelProto, train: Stream, perceptual: bool) -> str:
    """What a checkpoint belongs to: this generator, these frames and this loss."""
    digest = hashlib.sha256(model.SerializeToString(deterministic=True))
    arrays = dict(train.arrays) if train.truth is None else {**train.arrays, "the truth": train.truth}
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    digest.update(f"perceptual {perceptual}".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Part:
    """A part of a stream, in time."""

    arrays: dict[str, Array]
    frames: int
    fps: float | None
    truth: Array | None


def _with_arrays(stream: Stream, arrays: dict[str, Array]) -> _Part:
    """The stream with other arrays."""
    return _Part(arrays, stream.frames, stream.fps, stream.truth)


def _parts(stream: _Part, holdout: Stream | None, *, training: bool) -> tuple[_Part, _Part]:
    """Training frames and held-back frames."""
    if holdout is not None:
        lacking = sorted(set(stream.arrays) - set(holdout.arrays))
        if lacking:
            raise InputError(f"the holdout lacks {lacking[0]!r}, which the training inputs have; add it")
        for name, array in stream.arrays.items():
            other = holdout.arrays[name]
            if other.shape[1:] != array.shape[1:] or other.dtype != array.dtype:
                raise InputError(
                    f"holdout array {name!r} is {other.dtype} {other.shape[1:]} a frame, the training inputs' is "
                    f"{array.dtype} {array.shape[1:]}; make them alike"
                )
        if training and stream.frames < 2:
            raise InputError(f"training needs at least 2 frames, the inputs hold {stream.frames}; give a longer clip")
        held = _Part({n: holdout.arrays[n] for n in stream.arrays}, holdout.frames, holdout.fps, holdout.truth)
        return stream, held
    cut = stream.frames - max(2, int(stream.frames * HOLDOUT_SHARE))
    if cut < 2:
        if not training:  # nothing needs to be kept back, and choosing a cut takes 2 frames
            return stream, stream
        raise InputError(
            f"the inputs hold {stream.frames} frames; training and calibration need at least 4, or give --holdout"
        )
    return _slice(stream, 0, cut), _slice(stream, cut, stream.frames)


def _slice(stream: _Part, first: int, last: int) -> _Part:
    arrays = {name: array if len(array) == 1 else array[first:last] for name, array in stream.arrays.items()}
    return _Part(arrays, last - first, stream.fps, None if stream.truth is None else stream.truth[first:last])


def _check_fit(
    model: ModelProto, train: Stream, held: Stream, surface: Surface | None, image_output: str | None, *, training: bool
) -> None:
    """Refuse, before the cut is searched for, what could not be trained or compared in the end."""
    specs = GraphIndex(model).specs
    for stream in (train, held):
        if stream.truth is None:
            continue
        if image_output is None:
            raise InputError("the inputs hold a truth, but no output is an image to compare with it; leave it out")
        if stream.truth.shape[1:] != specs[image_output].shape[1:]:
            raise InputError(
                f"the truth is {list(stream.truth.shape[1:])} a frame, but output {image_output!r} is "
                f"{list(specs[image_output].shape[1:])}; make them alike, or leave it out"
            )
    if training:
        atlas = None if surface is None else train.arrays.get(surface.atlas)
        layout_of(model, (), surface, None if atlas is None else atlas.shape)
        if surface is not None and atlas is not None and atlas.dtype != np.float32:
            raise InputError(f"the atlas {surface.atlas!r} has dtype {atlas.dtype}; convert it to float32")


def _check_names(given: set[str], known: list[str]) -> None:
    missing, unexpected = sorted(set(known) - given), sorted(given - set(known))
    if missing or unexpected:
        faults = [f"lack {', '.join(missing)}"] if missing else []
        faults += [f"hold {', '.join(unexpected)}, which it does not take"] if unexpected else []
        raise InputError(f"the inputs {' and '.join(faults)}; the model takes {', '.join(known)}")


def _image_output(model: ModelProto) -> str | None:
    """The first output that is a picture."""
    index = GraphIndex(model)
    for name in index.outputs:
        spec = index.specs[name]
        if spec.dtype == "float32" and len(spec.shape) == 4 and spec.shape[1] in (1, 3) and min(spec.shape[2:]) > 1:
            return name
    return None


def _first_float(model: ModelProto) -> str | None:
    """The first floating-point output."""
    index = GraphIndex(model)
    return next((name for name in index.outputs if index.specs[name].dtype.startswith("float")), None)


def _exits(models: Mapping[str, ModelProto], stream: Stream) -> tuple[ExitRecord, ...]:
    """Every exit with its cost, all measured in turns on one thread."""
    feeds: dict[str, Array] = {name: array[-1:] for name, array in stream.arrays.items()}
    feeds |= run_session(open_session(models["producer"]), feeds)
    modules = {"whole": "generator", "plain": "plain"} | ({"warp": "warp"} if "warp" in models else {})
    times = time_model({name: models[module] for name, module in modules.items()}, feeds, threads=1, repeats=30)
    whole = times["whole"].min_ms
    return tuple(ExitRecord(name, module, round(times[name].min_ms / whole, 4)) for name, module in modules.items())


def _manifest(
    out: Path,
    models: Mapping[str, ModelProto],
    parts: SplitModels,
    stream: Stream,
    surface: Surface | None,
    candidates: list[CutCandidate],
    calibration: dict[str, Any] | None,
    made_from: Mapping[str, Any],
    image_output: str | None,
) -> Manifest:
    index = {name: GraphIndex(model) for name, model in models.items()}

    def specs(name: str, values: list[str]) -> tuple[TensorSpec, ...]:
        return tuple(index[name].specs[value] for value in values)

    inputs = [InputRecord(spec) for spec in specs("generator", list(index["generator"].inputs))]
    if surface is not None:
        inputs.append(InputRecord(spec_of(surface.atlas, stream.arrays[surface.atlas]), "motion"))
    return Manifest(
        name=out.stem,
        created={
            "by": f"warpcache {__version__}",
            "at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "options": json.loads(json.dumps(dict(made_from))),
        },
        inputs=tuple(inputs),
        outputs=specs("generator", list(index["generator"].outputs)),
        image_output=image_output,
        fps=stream.fps,
        cut=Cut(tuple(parts.origins.values()), tuple(candidate.to_record() for candidate in candidates)),
        cache=specs("producer", list(index["producer"].outputs)),
        modules={
            name: ModuleRecord(
                f"{name}.onnx", specs(name, list(index[name].inputs)), specs(name, list(index[name].outputs))
            )
            for name in models
        },
        exits=(),
        calibration=calibration,
    )

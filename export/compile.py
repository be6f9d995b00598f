"""From a trained generator to a bundle: trace, cut, train, calibrate, write.

Nothing is written to the bundle's place before all is done. The one thing that an interrupted compile leaves is its
checkpoint, beside the bundle, which `resume` goes on from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnx import ModelProto
from torch import nn

from ..engine.bundle import Bundle
from ..engine.errors import InputError
from ..engine.lpips import Lpips
from .adapter import Surface
from .adapter_training import train_adapter
from .bundling import bundle_models, refuse_out
from .calibrate import calibrate
from .clip import Clip, Stream, training_and_held
from .compile_options import DEFAULT_STEPS, CompileOptions
from .cut import AUTO, CutCandidate, choose_cut, enumerate_cuts, rank_cuts
from .distill import read_plan
from .graph import GraphIndex, fix_input_shapes, input_names, normalise
from .manifest_draft import WHOLE, draft_manifest, measure_costs
from .profile import profile_nodes
from .recording import Progress
from .run import frame_at
from .split import check_exact, split
from .subject import Subject
from .trace import input_names_of, trace_generator

__all__ = ["DEFAULT_STEPS", "CompileOptions", "Stream", "compile_generator", "split_model"]


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
    spare = declared.atlas if declared is not None and not options.steps else None
    train, held = training_and_held(Clip.of(stream, without=spare), holdout, training=options.steps > 0)
    example = {name: train.arrays[name][:1] for name in train.arrays if name not in motion or name in names}
    progress("tracing the generator", 0, 1)
    model = trace_generator(module, example)
    progress("tracing the generator", 1, 1)
    return _build(Subject(model, train, held, surface), out, options, made_from, progress)


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
    return _build(Subject(model, stream, stream), out, options, made_from, progress)


def _build(
    subject: Subject, out: Path, options: CompileOptions, made_from: Mapping[str, Any], progress: Progress
) -> Bundle:
    """Everything after the graph is at hand."""
    subject.check(training=options.steps > 0)
    model = subject.model
    checkpoint = out.with_suffix(".checkpoint.safetensors")
    plan = read_plan(checkpoint) if options.resume and options.steps else None
    cut, candidates = _choose(subject, plan["cut"] if plan else options.cut, progress)
    parts = split(model, cut)
    check_exact(model, parts, {name: array[:1] for name, array in subject.sample.items()})
    models: dict[str, ModelProto] = {"generator": model, "producer": parts.producer, "plain": parts.plain}
    exits = [WHOLE, "plain"]
    training: dict[str, Any] = {}
    if options.steps:
        adapter = train_adapter(subject, parts, cut, options, checkpoint=checkpoint, plan=plan, progress=progress)
        models |= {"producer": adapter.producer, **adapter.consumers}
        exits += adapter.consumers
        training = adapter.record
        # The cut's tensors now leave a producer that does more: still the same bits.
        check_exact(model, dataclasses.replace(parts, producer=adapter.producer), frame_at(subject.train.arrays, 0))
    calibration = None
    if subject.image_output is not None:
        calibration = calibrate(
            model,
            models["producer"],
            {name: models[name] for name in exits if name != WHOLE},
            subject.held.arrays,
            image_output=subject.image_output,
            max_age=options.max_age,
            truth=subject.held.truth,
            lpips=Lpips.load(options.lpips) if options.lpips is not None else None,
            progress=progress,
        )
    manifest = draft_manifest(
        out.stem,
        models,
        parts,
        subject,
        candidates=candidates,
        exits=measure_costs(models, exits, subject),
        calibration=calibration,
        made_from=made_from,
        training=training,
    )
    progress("writing the bundle", 0, 1)
    bundle = bundle_models(out, manifest, models)
    progress("writing the bundle", 1, 1)
    checkpoint.unlink(missing_ok=True)
    return bundle


def _choose(subject: Subject, spec: str, progress: Progress) -> tuple[CutCandidate, list[CutCandidate]]:
    """The cut, and the candidates that it was ranked among (it alone, where it was named)."""
    progress("choosing the cut", 0, 2)
    model, sample = subject.model, subject.sample
    feeds = {name: array[-1:] for name, array in sample.items()}
    frames = max(len(array) for array in sample.values())
    # Where no output is a picture, what reuse is worth is still measured on one.
    measured_on = subject.image_output or _first_float(model)
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


def _check_names(given: set[str], known: list[str]) -> None:
    missing, unexpected = sorted(set(known) - given), sorted(given - set(known))
    if missing or unexpected:
        faults = [f"lack {', '.join(missing)}"] if missing else []
        faults += [f"hold {', '.join(unexpected)}, which it does not take"] if unexpected else []
        raise InputError(f"the inputs {' and '.join(faults)}; the model takes {', '.join(known)}")


def _first_float(model: ModelProto) -> str | None:
    """The first floating-point output."""
    index = GraphIndex(model)
    return next((name for name in index.outputs if index.specs[name].dtype.startswith("float")), None)

"""Compile and split from files: the command line's way into `warpcache.export`.

Loads and checks what the user named, so that `export` sees modules and arrays only. Everything of `export` is imported
inside the functions: without the extra of that name the rest of the package works.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..media.inputs import InputStream, load_inputs
from .progress import Report

if TYPE_CHECKING:
    from ..engine.bundle.bundle import Bundle

__all__ = ["compile_files", "split_files"]


def compile_files(
    factory: str,
    *,
    weights: Path | None,
    inputs: Path,
    holdout: Path | None,
    cut: str,
    budget: float,
    steps: int | None,
    out: Path,
    lpips: Path | None,
    seed: int,
    max_age: int,
    resume: bool,
    exits: int | None = None,
    metric: str | None = None,
    bank_size: int | None = None,
    state: Mapping[str, str] | None = None,
    progress: Report,
) -> Bundle:
    """Compile the generator that `factory` makes.

    Args:
        factory: ``MODULE:FACTORY``.
        weights: Its weights, ``.safetensors``, or None to take it as the factory made it.
        inputs: Frames to train on.
        holdout: Frames to calibrate on, or None to keep the last quarter of `inputs` back.
        cut: ``auto``, or names joined by commas.
        budget: The consumer's cost as a fraction of the generator's.
        steps: Training steps, None for the default.
        out: The bundle to write.
        lpips: Weights of LPIPS, or None to do without.
        seed: Of the training.
        max_age: Oldest cache to train and calibrate for.
        resume: Go on from an interrupted compile's checkpoint.
        exits: How many exits to train for a promise of quality; None: one, and no promise.
        metric: What quality is promised in, None for LPIPS where its weights are given, else FLIP.
        bank_size: Entries of the branches' guide bank, 0 for none, None for the default.
        state: What the generator carries from frame to frame, output -> input.
        progress: Told how far it is.

    Raises:
        WarpcacheError: Whatever is wrong with what the user named; see `warpcache.export.compile`.
        ModuleNotFoundError: If the ``export`` extra is not installed.
    """
    from ..export.compile import DEFAULT_STEPS, CompileOptions, Footage, compile_generator
    from ..export.graph.trace import input_names_of, load_factory, load_weights

    # First: wrong options are found before anything is loaded.
    options = CompileOptions(
        cut=cut,
        budget=budget,
        steps=DEFAULT_STEPS if steps is None else steps,
        max_age=max_age,
        seed=seed,
        lpips=lpips,
        resume=resume,
        exits=exits,
        metric=metric,
        bank_size=bank_size,
        state=state or {},
    )
    module = load_factory(factory)
    if weights is not None:
        load_weights(module, weights)
    names = input_names_of(module)
    promise = {} if exits is None else {"exits": exits, "metric": options.promised_metric, "bank_size": bank_size}
    return compile_generator(
        module,
        Footage(_load(inputs, names), None if holdout is None else _load(holdout, names)),
        out,
        options=options,
        made_from={
            "factory": factory,
            "inputs": inputs.name,
            "cut": cut,
            "budget": budget,
            "steps": options.steps,
            "max_age": max_age,
            "seed": seed,
            "lpips": lpips is not None,
            **promise,
            **({"state": dict(state)} if state else {}),
        },
        progress=progress,
    )


def split_files(
    model: Path,
    *,
    inputs: Path,
    cut: str,
    state: Mapping[str, str] | None = None,
    out: Path,
    progress: Report,
) -> Bundle:
    """Cut the ONNX model in file `model`; nothing is trained.

    Args:
        model: The ``.onnx`` file.
        inputs: Sample frames.
        cut: ``auto``, or names joined by commas.
        state: What the generator carries from frame to frame, output -> input.
        out: The bundle to write.
        progress: Told how far it is.

    Raises:
        WarpcacheError: Whatever is wrong with what the user named.
        ModuleNotFoundError: If the ``export`` extra is not installed.
    """
    from ..export.compile import split_model
    from ..export.graph.index import input_names, load_model

    proto = load_model(model)
    return split_model(
        proto,
        _load(inputs, input_names(proto)),
        out,
        cut=cut,
        state=state,
        made_from={
            "model": model.name,
            "inputs": inputs.name,
            "cut": cut,
            **({"state": dict(state)} if state else {}),
        },
        progress=progress,
    )


def _load(path: Path, names: list[str]) -> InputStream:
    """Load frames; the frames of a video are the generator's one input, whatever its name."""
    stream = load_inputs(path)
    if path.suffix.lower() == ".mp4" and len(names) == 1:
        (frames,) = stream.arrays.values()
        return InputStream({names[0]: frames}, stream.frames, stream.fps, stream.truth)
    return stream

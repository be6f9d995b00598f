"""Compile and split from files: the command line's way into `warpcache.export`.

Loads and checks what the user named, so that `export` sees modules and arrays only. Everything of `export` is imported
inside the functions: without the extra of that name the rest of the package works.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..media.inputs import InputStream, load_inputs
from .choices import CompileChoice, SplitOptions
from .progress import Report

if TYPE_CHECKING:
    from ..engine.bundle.bundle import Bundle

__all__ = ["compile_files", "split_files"]

# What is loaded and written here, and is no option of a compile.
_FILES = frozenset({"weights", "inputs", "holdout", "out"})


def compile_files(factory: str, choice: CompileChoice, *, progress: Report) -> Bundle:
    """Compile the generator that `factory`, ``MODULE:FACTORY``, makes.

    Raises:
        WarpcacheError: Whatever is wrong with what the user named; see `warpcache.export.compile`.
        ModuleNotFoundError: If the ``export`` extra is not installed.
    """
    from ..export.compile import CompileOptions, Footage, compile_generator
    from ..export.graph.trace import input_names_of, load_factory, load_weights

    # First: wrong options are found before anything is loaded.
    given = {name: value for name, value in vars(choice).items() if value is not None}
    options = CompileOptions(**{name: value for name, value in given.items() if name not in _FILES})
    module = load_factory(factory)
    if choice.weights is not None:
        load_weights(module, choice.weights)
    names = input_names_of(module)
    promise: dict[str, Any] = {}
    if choice.exits is not None:
        promise = {"exits": choice.exits, "metric": options.promised_metric, "bank_size": choice.bank_size}
    return compile_generator(
        module,
        Footage(_load(choice.inputs, names), None if choice.holdout is None else _load(choice.holdout, names)),
        choice.out,
        options=options,
        made_from={
            "factory": factory,
            "inputs": choice.inputs.name,
            **{name: getattr(options, name) for name in ("cut", "budget", "steps", "max_age", "seed")},
            "lpips": choice.lpips is not None,
            **promise,
            **({"state": dict(choice.state)} if choice.state else {}),
        },
        progress=progress,
    )


def split_files(model: Path, options: SplitOptions, *, progress: Report) -> Bundle:
    """Cut the ONNX model in the file `model`; nothing is trained.

    Raises:
        WarpcacheError: Whatever is wrong with what the user named.
        ModuleNotFoundError: If the ``export`` extra is not installed.
    """
    from ..export.compile import split_model
    from ..export.graph.index import input_names, load_model

    proto = load_model(model)
    return split_model(
        proto,
        _load(options.inputs, input_names(proto)),
        options.out,
        cut=options.cut,
        state=options.state,
        made_from={
            "model": model.name,
            "inputs": options.inputs.name,
            "cut": options.cut,
            **({"state": dict(options.state)} if options.state else {}),
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

"""The manifest of a compile's result, and what every exit costs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from onnx import ModelProto

from ... import __version__
from ...engine.bundle.manifest import Cut, ExitRecord, InputRecord, Manifest, module_record
from ...engine.spec import Array, TensorSpec
from ..cut.candidate import CutCandidate
from ..cut.split import SplitModels
from ..frames.streams import spec_of
from ..frames.subject import Subject
from ..graph.index import GraphIndex
from ..graph.profile import time_model
from ..graph.run import open_session, run_session

__all__ = ["WHOLE", "Origin", "draft_manifest", "measure_costs"]

WHOLE = "whole"
"""The exit that the generator itself is; every other exit is called like its module."""


def measure_costs(models: Mapping[str, ModelProto], exits: Sequence[str], subject: Subject) -> tuple[ExitRecord, ...]:
    """Every exit with its cost, all measured in turns on one thread.

    Args:
        models: Module name -> model, the producer and every exit among them.
        exits: Names of the exits; `WHOLE` is the module ``generator``, the others are modules of their name.
        subject: Its last frame is what they run on.
    """
    feeds: dict[str, Array] = {name: array[-1:] for name, array in subject.train.arrays.items()}
    feeds |= run_session(open_session(models["producer"]), feeds)
    modules = {name: "generator" if name == WHOLE else name for name in exits}
    times = time_model({name: models[module] for name, module in modules.items()}, feeds, threads=1, repeats=30)
    whole = times[WHOLE].min_ms
    return tuple(ExitRecord(name, (module,), round(times[name].min_ms / whole, 4)) for name, module in modules.items())


@dataclass(frozen=True)
class Origin:
    """Where a bundle comes from.

    Attributes:
        name: What it is called.
        made_from: The user's options, JSON-ready.
        training: What was trained and how, JSON-ready; empty where nothing was.
    """

    name: str
    made_from: Mapping[str, Any]
    training: Mapping[str, Any]


def draft_manifest(
    origin: Origin,
    models: Mapping[str, ModelProto],
    parts: SplitModels,
    subject: Subject,
    *,
    candidates: Sequence[CutCandidate],
    exits: tuple[ExitRecord, ...],
    calibration: Mapping[str, Any] | None,
) -> Manifest:
    """Everything but the files' sizes and hashes, which come with writing.

    Args:
        origin: Where it comes from.
        models: Module name -> model.
        parts: The generator's halves.
        subject: The generator and its frames.
        candidates: The cuts that were considered, best first.
        exits: From `measure_costs`.
        calibration: What was measured, or None.
    """
    index = {name: GraphIndex(model) for name, model in models.items()}

    def specs(module: str, values: Sequence[str]) -> tuple[TensorSpec, ...]:
        return tuple(index[module].specs[value] for value in values)

    state = {one.output for one in subject.state}

    def without_state(module: str) -> tuple[TensorSpec, ...]:
        return specs(module, [name for name in index[module].outputs if name not in state])

    read = [name for name in index["generator"].inputs if name not in subject.state_inputs]
    inputs = [InputRecord(spec) for spec in specs("generator", read)]
    if subject.surface is not None:
        atlas = subject.surface.atlas
        inputs.append(InputRecord(spec_of(atlas, subject.train.arrays[atlas]), "motion"))
    return Manifest(
        name=origin.name,
        created={
            "by": f"warpcache {__version__}",
            "at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "options": json.loads(json.dumps(dict(origin.made_from))),
            "training": dict(origin.training),
        },
        inputs=tuple(inputs),
        outputs=without_state("generator"),
        image_output=subject.image_output,
        fps=subject.train.fps,
        cut=Cut(tuple(parts.origins.values()), tuple(candidate.to_record() for candidate in candidates)),
        cache=without_state("producer"),
        modules={
            module: module_record(module, specs(module, index[module].inputs), specs(module, index[module].outputs))
            for module in models
        },
        exits=exits,
        calibration=None if calibration is None else dict(calibration),
        state=tuple(one.record for one in subject.state),
    )

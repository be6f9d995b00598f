"""Graphs built by our own TensorRT-RTX builder, in processes of its own; nothing is run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnx

from warpcache.engine.spec import TensorSpec
from warpcache.engine.tensorrt.builder import BuildRequest, build_engines_isolated
from warpcache.engine.tensorrt.flavour import Flavour
from warpcache.export.graph.index import input_names, tensor_spec

__all__ = ["TARGETS", "build_all", "crashed"]

_builder_log = logging.getLogger("warpcache.engine.tensorrt.builder")

# Named, so that the same is built where there is a GPU; one of each generation that is sold.
TARGETS = ("sm_86", "sm_89", "sm_120")


def build_all(files: Mapping[str, Path], *, processes: int = 2) -> dict[str, str | None]:
    """Build every file: name -> None, or the error's message.

    Args:
        files: Name -> ONNX file with fixed shapes.
        processes: Building processes at a time.
    """
    flavour = Flavour.load("tensorrt-rtx")
    requests = [_request(name, path) for name, path in files.items()]
    shares = [requests[k::processes] for k in range(processes)]

    def built(share: Sequence[BuildRequest]) -> dict[str, str | None]:
        answers = build_engines_isolated(share, flavour=flavour)
        return {
            request.name: None if isinstance(answer, bytes) else str(answer)
            for request, answer in zip(share, answers, strict=True)
        }

    # A warning for every 64-bit integer would hide what a failing test has to say.
    level = _builder_log.level
    _builder_log.setLevel(logging.ERROR)
    try:
        with ThreadPoolExecutor(processes) as pool:
            parts = list(pool.map(built, shares))
    finally:
        _builder_log.setLevel(level)
    return {name: problem for part in parts for name, problem in part.items()}


def crashed(problem: str | None) -> bool:
    """Whether the builder's process ended while it built."""
    return problem is not None and " crashed while building it" in problem


def _request(name: str, path: Path) -> BuildRequest:
    model = onnx.load(path)
    fixed = {value.name: value for value in model.graph.input}
    return BuildRequest(
        path=path,
        name=name,
        inputs=_specs([fixed[key] for key in input_names(model)]),
        outputs=_specs(list(model.graph.output)),
        targets=TARGETS,
    )


def _specs(values: Sequence[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    return tuple(spec for value in values if (spec := tensor_spec(value)) is not None)

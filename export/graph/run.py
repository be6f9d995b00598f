"""Run ONNX protos with ONNX Runtime on the CPU: the oracle of compile time (the engine has modules of its own)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort
from onnx import ModelProto

from ...engine.errors import ExportError, InputError
from ...engine.spec import Array

__all__ = ["open_session", "run_model", "run_session"]


def open_session(
    model: ModelProto | bytes,
    *,
    threads: int | None = None,
    level: ort.GraphOptimizationLevel | None = None,
    profile_prefix: str | None = None,
    optimized_path: str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> ort.InferenceSession:
    """Load a model on the CPU.

    Args:
        model: The model, or its bytes.
        threads: Threads of one operator; None leaves it to ONNX Runtime.
        level: Graph optimisation level; None leaves ONNX Runtime's default (everything).
        profile_prefix: Where given, profiling is on and its file begins so.
        optimized_path: Where given, the optimised model is written there.
        folder: Folder that holds the model's external data.

    Raises:
        ExportError: If ONNX Runtime refuses the model; an operator it does not have is in the message.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3  # its warnings are for ONNX Runtime's developers, e.g. on unused initializers
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    if level is not None:
        options.graph_optimization_level = level
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile_prefix
    if optimized_path is not None:
        options.optimized_model_filepath = os.fspath(optimized_path)
    if folder is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", os.fspath(Path(folder).resolve())
        )
    data = model if isinstance(model, bytes) else model.SerializeToString()
    try:
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as exc:  # ONNX Runtime raises many unrelated classes
        reason = " ".join(str(exc).split())
        raise ExportError(f"ONNX Runtime cannot load the model: {reason[:300]}") from exc


def run_session(
    session: ort.InferenceSession, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
) -> dict[str, Array]:
    """Run a session once, with those of `feeds` that it takes.

    Raises:
        InputError: If `feeds` lacks an input.
        ExportError: If running fails.
    """
    names = [value.name for value in session.get_inputs()]
    missing = [name for name in names if name not in feeds]
    if missing:
        raise InputError(f"the model needs input {missing[0]!r}, but only {', '.join(feeds) or 'nothing'} was given")
    wanted = list(outputs) if outputs is not None else [value.name for value in session.get_outputs()]
    try:
        results: list[Any] = session.run(wanted, {name: feeds[name] for name in names})
    except Exception as exc:
        reason = " ".join(str(exc).split())
        raise ExportError(f"ONNX Runtime cannot run the model: {reason[:300]}") from exc
    return dict(zip(wanted, results, strict=True))


def run_model(model: ModelProto | bytes, feeds: Mapping[str, Array], *, threads: int | None = None) -> dict[str, Array]:
    """Load a model with ONNX Runtime's default settings, run it once, and return its outputs by name."""
    return run_session(open_session(model, threads=threads), feeds)

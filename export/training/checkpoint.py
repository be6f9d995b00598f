"""A training run's checkpoint: weights, optimiser and step in one safetensors file, which says what it belongs to."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ...engine.errors import ExportError
from ...engine.files.atomic import written_beside
from ...engine.spec import Array

__all__ = ["checkpoint_plan", "data_digest", "load_checkpoint", "save_checkpoint"]


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, step: int, identity: str, plan: Mapping[str, Any]
) -> None:
    """Write a checkpoint beside `path`, then rename it there; missing parent folders are made.

    Args:
        path: The file.
        model: Its parameters and buffers are kept.
        optimizer: Its state is kept.
        step: Steps done.
        identity: What it belongs to; another identity is refused by `load_checkpoint`.
        plan: What was decided before training, JSON-ready; `checkpoint_plan` gives it back.

    Raises:
        ExportError: If it cannot be written, e.g. on a full disk; what stood at `path` still stands.
    """
    tensors = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{name}": value.contiguous() for name, value in state.items()}
    metadata = {"identity": identity, "plan": json.dumps(dict(plan), sort_keys=True), "step": str(step)}
    try:
        with written_beside(path) as partial:
            save_file(tensors, partial, metadata=metadata)
    except (OSError, SafetensorError) as exc:  # a full disk is a SafetensorError here
        raise ExportError(
            f"the checkpoint {path} cannot be written ({exc}); make room, or choose another place"
        ) from exc


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, identity: str) -> int:
    """Put a checkpoint's weights and optimiser state back.

    Returns:
        Steps done.

    Raises:
        ExportError: If it is damaged or belongs to something else.
    """
    with _opened(path, identity) as (file, metadata):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    state = optimizer.state_dict()
    try:
        model.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model.")})
        for key, value in tensors.items():
            if key.startswith("adam."):
                _, index, name = key.split(".")
                state["state"].setdefault(int(index), {})[name] = value
        optimizer.load_state_dict(state)
        return int(metadata["step"])
    except (KeyError, RuntimeError, ValueError) as exc:  # the right identity, but not what `save_checkpoint` writes
        raise ExportError(f"the checkpoint {path} lacks what it should hold ({exc}); delete it to start anew") from exc


def checkpoint_plan(path: Path, identity: str | None = None) -> dict[str, Any]:
    """The plan of the run that left a checkpoint, whatever it belongs to where no `identity` is given.

    Raises:
        ExportError: If there is no checkpoint at `path`, it is damaged, or it belongs to something else.
    """
    with _opened(path, identity) as (_, metadata):
        plan: dict[str, Any] = json.loads(metadata["plan"])
    return plan


def data_digest(model: ModelProto, arrays: Mapping[str, Array]) -> hashlib._Hash:
    """SHA-256 of a generator and the frames that are trained on, for an identity; more can be added to it."""
    digest = hashlib.sha256(model.SerializeToString(deterministic=True))
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest


@contextlib.contextmanager
def _opened(path: Path, identity: str | None) -> Iterator[tuple[Any, dict[str, str]]]:
    """A checkpoint's file and metadata; what is damaged or belongs to something else is refused."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if identity is not None and metadata.get("identity") != identity:
                raise ExportError(
                    f"the checkpoint {path} belongs to another model, clip or options; delete it to start anew"
                )
            yield file, metadata
    except (OSError, SafetensorError, KeyError, ValueError) as exc:
        raise ExportError(f"the checkpoint {path} cannot be read ({exc}); delete it to start anew") from exc

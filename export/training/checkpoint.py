"""A training run's checkpoint: weights, optimiser and step in one safetensors file, which says what it belongs to."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ...engine.errors import ExportError
from ...engine.files.atomic import written_beside

__all__ = ["checkpoint_plan", "load_checkpoint", "one_cycle", "save_checkpoint"]


_FOREIGN = "the checkpoint {} belongs to another model, clip or options; delete it to start anew"


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
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (OSError, SafetensorError) as exc:
        raise ExportError(f"the checkpoint {path} cannot be read ({exc}); delete it to start anew") from exc
    if metadata.get("identity") != identity:
        raise ExportError(_FOREIGN.format(path))
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


def checkpoint_plan(path: Path, identity: str) -> dict[str, Any]:
    """The plan of the run that left a checkpoint.

    Raises:
        ExportError: If there is no checkpoint at `path`, it is damaged, or it belongs to something else.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            plan: dict[str, Any] = json.loads(metadata["plan"])
    except (OSError, SafetensorError, KeyError, ValueError) as exc:
        raise ExportError(f"the checkpoint {path} cannot be read ({exc}); delete it to start anew") from exc
    if metadata.get("identity") != identity:
        raise ExportError(_FOREIGN.format(path))
    return plan


def one_cycle(step: int, steps: int, peak: float) -> float:
    """Learning rate of a step: up over the first tenth, then down along a cosine to nearly nothing.

    A function of the step alone, so that a resumed run needs no state for it.
    """
    rise = max(steps // 10, 1)
    if step < rise:
        return peak * (step + 1) / rise
    done = (step - rise) / max(steps - rise, 1)
    return peak * (0.5 + 0.5 * math.cos(math.pi * done)) + 1e-4 * peak

"""What benchmarks make once and keep in their work folder: drawn takes, trained generators, compiled bundles."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn

from warpcache.engine.bundle.bundle import Bundle
from warpcache.models.head import SyntheticHead
from warpcache.models.training import train_renderer
from warpcache.tasks.progress import ProgressBar, Report

__all__ = ["Arrays", "compiled", "drawn_take", "trained"]

_M = TypeVar("_M", bound=nn.Module)
Arrays = dict[str, NDArray[np.float32]]


def drawn_take(head: SyntheticHead, take: int, frames: int, fps: float, path: Path, progress: Report) -> Arrays:
    """A take of the head: its inputs and the pictures to be answered, ``truth``; drawn unless it is kept at `path`."""
    if not path.exists():
        kept: dict[str, list[NDArray[np.float32]]] = {"condition": [], "atlas": [], "truth": []}
        for t, (inputs, truth) in enumerate(head.frames(head.motion(frames, fps, seed=take))):
            for name, array in {**inputs, "truth": truth[None]}.items():
                kept[name].append(array)
            progress(f"drawing take {take}", t + 1, frames)
        np.savez(path, **{name: np.concatenate(arrays) for name, arrays in kept.items()})  # type: ignore[arg-type]
    return dict(np.load(path))


def trained(make: Callable[[], _M], clip: Mapping[str, Any], path: Path, steps: int, batch: int = 4) -> _M:
    """A generator with the weights at `path`, trained on the clip and kept there unless they are there."""
    torch.manual_seed(0)
    model = make()
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    with ProgressBar() as progress:
        stage = f"{path.stem}: training"
        train_renderer(model, clip, steps=steps, batch=batch, on_step=lambda step, _: progress(stage, step + 1, steps))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return model


def compiled(
    out: Path, factory: str, weights: Path, train: Mapping[str, Any], held: Mapping[str, Any], options: Sequence[str]
) -> Bundle:
    """A bundle made by `warpcache compile`, as a user would, unless it is there.

    What that took is noted beside it, in ``*.compile.json``.

    Args:
        out: The bundle.
        factory: The generator, ``MODULE:FACTORY``.
        weights: Its weights.
        train: Frames to train on, with ``truth`` and ``fps``.
        held: Frames held back.
        options: Further options of the command.
    """
    if out.exists():
        return Bundle.open(out)
    inputs, holdout = out.with_suffix(".train.npz"), out.with_suffix(".held.npz")
    np.savez(inputs, **train)
    np.savez(holdout, **held)
    command = [sys.executable, "-m", "warpcache", "compile", factory, "--weights", str(weights)]
    command += ["--inputs", str(inputs), "--holdout", str(holdout), "--out", str(out), *options]
    if out.with_suffix(".checkpoint.safetensors").exists():
        command += ["--resume"]
    begin = time.perf_counter()
    subprocess.run(command, check=True)
    taken = {
        "minutes": round((time.perf_counter() - begin) / 60, 2),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6, 2),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "options": list(options),
    }
    out.with_suffix(".compile.json").write_text(json.dumps(taken) + "\n", encoding="utf-8")
    inputs.unlink()
    holdout.unlink()
    return Bundle.open(out)

"""What early exits are measured on: real clips and the synthetic head, each as a compiled bundle and unseen frames.

Of a clip's earlier three quarters, the first part trains its generator and the exits, and the rest is held back for the
predictor and the calibration; the last quarter is measured and nothing else. The generator may not have seen the frames
that are held back: it changes less from frame to frame on those that it was trained on, exits follow it more easily
there, and a calibration on them promises too much. The head has takes of its own for each.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import nn

from benchmarks.clips import load_talking_head
from benchmarks.demo_bundle import FPS, HOLDOUT_TAKE, SIZE, TRAIN_TAKE, demo_generator
from benchmarks.talking_head_model import generator, generator_256
from warpcache.engine.bundle.bundle import Bundle
from warpcache.models.head import SyntheticHead
from warpcache.models.training import train_renderer
from warpcache.tasks.demo import DEMO_MOTION_SEED
from warpcache.tasks.progress import ProgressBar

__all__ = ["EXITS", "HELD_SHARE", "Case", "clip_case", "head_case"]

EXITS = 4
HELD_SHARE = 0.3
HEAD_FRAMES = {"train": 600, "held": 240, "test": 240}
INPUTS = ("condition", "atlas")
# At 256x256 LPIPS alone takes 60 ms an answer; so many frames of a clip are measured there.
TEST_FRAMES = {128: 1000, 256: 120}

Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Case:
    """One generator with its frames.

    Attributes:
        name: E.g. "d6-128".
        size: Rows and columns of its images.
        fps: Frames a second.
        train: Frames that generator and exits are trained on, with `truth`.
        held: Frames held back for the predictor and the calibration, with `truth`.
        test: Inputs of frames that nothing has seen.
        factory: The generator as `warpcache compile` takes it.
        weights: Its weights.
        work: Folder of kept results.
    """

    name: str
    size: int
    fps: float
    train: Arrays
    held: Arrays
    test: Arrays
    factory: str
    weights: Path
    work: Path

    @property
    def path(self) -> Path:
        """Where its bundle is, or is going to be."""
        return self.work / f"{self.name}.warp"

    def compiled(self, lpips: Path, options: Sequence[str] = ()) -> Bundle:
        """Its bundle with exits, made as a user would unless it is there; what that took is noted beside it."""
        if self.path.exists():
            return Bundle.open(self.path)
        inputs, holdout = self.work / f"{self.name}.train.npz", self.work / f"{self.name}.held.npz"
        np.savez(inputs, **self.train, fps=self.fps)  # type: ignore[arg-type]
        np.savez(holdout, **self.held, fps=self.fps)  # type: ignore[arg-type]
        command = [sys.executable, "-m", "warpcache", "compile", self.factory, "--weights", str(self.weights)]
        command += ["--inputs", str(inputs), "--holdout", str(holdout), "--out", str(self.path)]
        command += ["--exits", str(EXITS), "--metric", "lpips", "--lpips", str(lpips), *options]
        if self.path.with_suffix(".checkpoint.safetensors").exists():
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
        self.path.with_suffix(".compile.json").write_text(json.dumps(taken) + "\n", encoding="utf-8")
        inputs.unlink()
        holdout.unlink()
        return Bundle.open(self.path)


def clip_case(data: Path, name: str, size: int, work: Path, generator_steps: int) -> Case:
    """A real clip at 128x128 or 256x256; its generator is trained unless its weights are there."""
    if size not in (128, 256):
        raise ValueError(f"size {size} has no generator; take 128 or 256")
    clip = load_talking_head(data, name, size)
    frames = len(clip.train["condition"])
    cut = frames - int(HELD_SHARE * frames)
    train = {key: array[:cut] for key, array in clip.train.items()}
    weights = work / f"{name}-{size}.generator.safetensors"
    # A quarter of the frames a step at four times the pixels: the same work and memory a step.
    _train_generator(generator if size == 128 else generator_256, train, weights, generator_steps, 512 // size)
    return Case(
        name=f"{name}-{size}",
        size=size,
        fps=clip.fps,
        train=train,
        held={key: array[cut:] for key, array in clip.train.items()},
        test={key: clip.test[key][: TEST_FRAMES[size]] for key in INPUTS},
        factory=f"benchmarks.talking_head_model:{'generator' if size == 128 else 'generator_256'}",
        weights=weights,
        work=work,
    )


def head_case(work: Path, generator_steps: int) -> Case:
    """The synthetic head at 256x256, with takes of its own for training, holding back and measuring."""
    head = SyntheticHead(0, SIZE)
    takes = {"train": TRAIN_TAKE, "held": HOLDOUT_TAKE, "test": DEMO_MOTION_SEED}
    drawn: dict[str, Arrays] = {}
    with ProgressBar() as progress:
        for part, seed in takes.items():
            path = work / f"head.{part}.npz"
            if not path.exists():
                kept: dict[str, list[NDArray[np.float32]]] = {"condition": [], "atlas": [], "truth": []}
                for t, (inputs, truth) in enumerate(head.frames(head.motion(HEAD_FRAMES[part], FPS, seed=seed))):
                    for key, array in {**inputs, "truth": truth[None]}.items():
                        kept[key].append(array)
                    progress(f"drawing the head, {part}", t + 1, HEAD_FRAMES[part])
                np.savez(path, **{key: np.concatenate(arrays) for key, arrays in kept.items()})  # type: ignore[arg-type]
            drawn[part] = dict(np.load(path))
    weights = work / "head-256.generator.safetensors"
    _train_generator(demo_generator, drawn["train"], weights, generator_steps, 4)
    return Case(
        name="head-256",
        size=SIZE,
        fps=FPS,
        train=drawn["train"],
        held=drawn["held"],
        test={key: drawn["test"][key][: TEST_FRAMES[SIZE]] for key in INPUTS},
        factory="benchmarks.demo_bundle:demo_generator",
        weights=weights,
        work=work,
    )


def _train_generator(
    make: Callable[[], nn.Module], clip: Mapping[str, Any], path: Path, steps: int, batch: int
) -> None:
    """Train a generator, unless its weights are there."""
    if path.exists():
        return
    torch.manual_seed(0)
    model = make()
    with ProgressBar() as progress:
        stage = f"{path.stem}: training"
        train_renderer(model, clip, steps=steps, batch=batch, on_step=lambda step, _: progress(stage, step + 1, steps))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)

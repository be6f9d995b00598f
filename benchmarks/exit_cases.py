"""What early exits are measured on: real clips and the synthetic head, each as a compiled bundle and unseen frames.

Of a clip's earlier three quarters, the first part trains its generator and the exits, and the rest is held back for the
predictor and the calibration; the last quarter is measured and nothing else. The generator may not have seen the frames
that are held back: it changes less from frame to frame on those that it was trained on, exits follow it more easily
there, and a calibration on them promises too much. The head has takes of its own for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.clips import load_talking_head
from benchmarks.demo_bundle import FPS, HOLDOUT_TAKE, SIZE, TRAIN_TAKE, demo_generator
from benchmarks.making import Arrays, compiled, drawn_take, trained
from benchmarks.talking_head_model import generator, generator_256
from warpcache.engine.bundle.bundle import Bundle
from warpcache.models.head import SyntheticHead
from warpcache.tasks.demo import DEMO_MOTION_SEED
from warpcache.tasks.progress import ProgressBar

__all__ = ["EXITS", "HELD_SHARE", "Case", "clip_case", "head_case"]

EXITS = 4
HELD_SHARE = 0.3
HEAD_FRAMES = {"train": 600, "held": 240, "test": 240}
INPUTS = ("condition", "atlas")
# At 256x256 LPIPS alone takes 60 ms an answer; so many frames of a clip are measured there.
TEST_FRAMES = {128: 1000, 256: 120}


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
        chosen = ["--exits", str(EXITS), "--metric", "lpips", "--lpips", str(lpips), *options]
        train, held = ({**frames, "fps": self.fps} for frames in (self.train, self.held))
        return compiled(self.path, self.factory, self.weights, train, held, chosen)


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
    trained(generator if size == 128 else generator_256, train, weights, generator_steps, 512 // size)
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
    with ProgressBar() as progress:
        drawn = {
            part: drawn_take(head, seed, HEAD_FRAMES[part], FPS, work / f"head.{part}.npz", progress)
            for part, seed in takes.items()
        }
    weights = work / "head-256.generator.safetensors"
    trained(demo_generator, drawn["train"], weights, generator_steps, 4)
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

"""What a user may choose of every command: the one list of the command line's options, handed on to the tasks whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from .device_choice import CPU, DeviceChoice
from .options import (
    AGE,
    COUNT,
    RATE,
    checked_metric,
    checked_policy,
    holds,
    option,
    split_names,
    state_pairs,
    writable,
)
from .quality_choice import QualityChoice, QualityOptions

if TYPE_CHECKING:
    from ..engine.schedule.policy import Policy

__all__ = [
    "BenchOptions",
    "BuildOptions",
    "CompileChoice",
    "DemoOptions",
    "ExitName",
    "LowPrecision",
    "MachineOptions",
    "Precision",
    "RunOptions",
    "SplitOptions",
    "StreamOptions",
]

ExitName = str
LowPrecision = Literal["fp16", "bf16", "int8", "fp8"]
Precision = Literal["fp32"] | LowPrecision

_LPIPS: dict[str, Any] = {
    "flag": "--lpips",
    "help": "Weights of LPIPS (.safetensors); also WARPCACHE_LPIPS. Without them LPIPS is left out.",
    "envvar": "WARPCACHE_LPIPS",
    "default": None,
}
_CUT: dict[str, Any] = {
    "flag": "--cut",
    "help": "Tensors (or PyTorch module paths) to cut at; auto measures the candidates.",
    "metavar": "auto|NAME[,NAME]",
    "default": "auto",
}
_STATE: dict[str, Any] = {
    "flag": "--state",
    "help": "Repeatable; output OUT of a frame is input IN of the next one. The first value is the array IN of "
    "the inputs, or zeros.",
    "multiple": True,
    "metavar": "OUT:IN",
    "callback": state_pairs,
    "factory": dict,
}
_NEW_BUNDLE: dict[str, Any] = {
    "flag": "--out",
    "help": "The bundle to write, NAME.warp.",
    "callback": writable(".warp"),
}


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """What streams take of the machine: weights of LPIPS, CPU threads, and where a bundle runs and by what."""

    lpips: Path | None = option(**_LPIPS)
    threads: int | None = option(
        "--threads", "CPU threads to use; default: the cores of this process.", default=None, type=COUNT
    )
    on: DeviceChoice = holds(DeviceChoice, default=CPU)


@dataclass(frozen=True, kw_only=True)
class StreamOptions(MachineOptions):
    """How a bundle is streamed through.

    Attributes:
        exit_name: Answer old caches with this exit only.
        fps: Pace of arrival; None submits the next frame when the last one is answered, unless a task knows better.
        promise: A quality to keep: every frame is routed to the cheapest exit that keeps it.
        lpips: For the audits of a promise in it too.
    """

    exit_name: ExitName | None = option(
        "--exit",
        "Answer old caches with this exit only: plain, warp, warp2, branch1, ...",
        default=None,
        metavar="NAME",
    )
    fps: float | None = option("--fps", default=None, type=RATE)
    promise: QualityChoice | None = holds(QualityOptions, default=None)

    def settled(self) -> StreamOptions:
        """Refuse a quality beside an exit.

        Raises:
            click.UsageError: If both are given.
        """
        if self.promise is not None and self.exit_name is not None:
            raise click.UsageError("--quality chooses an exit for every frame; leave --exit or --quality out")
        return self


@dataclass(frozen=True, kw_only=True)
class RunOptions(StreamOptions):
    """What `run` takes."""

    out: Path = option("--out", "The answer: a video, or every output's array.", callback=writable(".mp4", ".npz"))
    policy: str | None = option(
        "--policy",
        "When producers run; default: async.",
        default=None,
        callback=checked_policy,
        metavar="full|every:N|async",
    )
    age: int | None = option(
        "--age", "Lockstep: answer frame t from the cache of frame t - AGE, deterministic.", default=None, type=AGE
    )
    fps: float | None = option(
        "--fps", "Pace of arrival and of the video; default: the clip's or the bundle's.", default=None, type=RATE
    )

    def settled(self) -> StreamOptions:
        """Refuse an age beside a policy too.

        Raises:
            click.UsageError: If options exclude each other.
        """
        if self.policy is not None and self.age is not None:
            raise click.UsageError("--age is a mode of its own (lockstep); leave --policy or --age out")
        return super().settled()

    @property
    def chosen_policy(self) -> Policy:
        """When producers run."""
        from ..engine.schedule.policy import Policy

        return Policy.choose(self.policy, self.age)


@dataclass(frozen=True, kw_only=True)
class BenchOptions(StreamOptions):
    """What `bench` takes."""

    policies: tuple[str, ...] = option(
        "--policy",
        "Repeatable; default: full, every:4, async.",
        default=(),
        callback=checked_policy,
        metavar="full|every:N|async",
    )
    ages: tuple[int, ...] = option("--age", "Repeatable; adds a lockstep run at this age.", default=(), type=AGE)
    fps: float | None = option(
        "--fps", "Pace of arrival under async; default: the clip's or the bundle's.", default=None, type=RATE
    )
    measure_every: int | None = option(
        "--measure-every",
        "Measure quality on every N-th frame; default: about 300 frames in all.",
        default=None,
        type=COUNT,
    )

    @property
    def chosen_policies(self) -> list[Policy]:
        """Policies to measure, in this order."""
        from ..engine.schedule.policy import Policy

        names = self.policies or (() if self.ages else ("full", "every:4", "async"))
        return [*map(Policy.parse, names), *map(Policy.lockstep, self.ages)]


@dataclass(frozen=True, kw_only=True)
class DemoOptions(MachineOptions):
    """What `demo` takes; files of an earlier demo in the folder `out` are replaced."""

    frames: int = option("--frames", "Frames to stream.", default=300, type=COUNT)
    out: Path = option(
        "--out", "Folder for the report and the video.", default=Path("warpcache-demo"), callback=writable()
    )


@dataclass(frozen=True, kw_only=True)
class CompileChoice:
    """What `compile` takes; what is None is left to `warpcache.export.options.CompileOptions`."""

    weights: Path | None = option(
        "--weights", "The generator's weights, .safetensors; without it as the factory made it.", default=None
    )
    inputs: Path = option("--inputs", "Frames to train on: .npz, or .mp4 for one image input.")
    holdout: Path | None = option(
        "--holdout",
        "Frames to calibrate on, which the generator was not trained on; default: the last quarter of --inputs.",
        default=None,
    )
    cut: str = option(**_CUT)
    budget: float = option(
        "--budget",
        "The consumer's cost as a fraction of the generator's.",
        default=0.1,
        type=click.FloatRange(0, 1, min_open=True),
        metavar="RATIO",
    )
    steps: int | None = option(
        "--steps",
        "Training steps; 0 trains nothing (plain reuse of the cache).",
        default=None,
        type=click.IntRange(min=0),
    )
    max_age: int = option("--max-age", "Oldest cache to train and calibrate for, in frames.", default=4, type=COUNT)
    exits: int | None = option(
        "--exits",
        "Train N exits of different cost and promise quality with them: half of them (rounded up) read the "
        "cache, the others are branches of the generator that need none.",
        default=None,
        type=COUNT,
        metavar="N",
    )
    metric: str | None = option(
        "--metric",
        "With --exits: what quality is promised in; default: lpips where its weights are given, else flip.",
        default=None,
        callback=checked_metric,
        metavar="lpips|flip|psnr|ms-ssim",
    )
    bank_size: int | None = option(
        "--bank",
        "With --exits: entries of the guide bank that branches look up; 0 does without; default: 256.",
        default=None,
        type=click.IntRange(min=0),
        metavar="N",
    )
    seed: int = option("--seed", "Seed of the training.", default=0)
    resume: bool = option("--resume", "Go on with an interrupted compile of the same bundle.", default=False)
    out: Path = option(**_NEW_BUNDLE)
    state: Mapping[str, str] = option(**_STATE)
    lpips: Path | None = option(**_LPIPS)

    def settled(self) -> CompileChoice:
        """Refuse what is for exits without them.

        Raises:
            click.UsageError: If it is given.
        """
        for name, value in (("--metric", self.metric), ("--bank", self.bank_size)):
            if self.exits is None and value is not None:
                raise click.UsageError(
                    f"{name} is for exits that a quality is promised with; say how many by --exits N"
                )
        return self


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """What `split` takes."""

    inputs: Path = option("--inputs", "Sample frames to choose and check the cut on.")
    cut: str = option(**_CUT)
    state: Mapping[str, str] = option(**_STATE)
    out: Path = option(**_NEW_BUNDLE)


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What `build` takes; `inputs`, `keep`, `cache_precision` and `min_psnr_db` belong to a conversion."""

    backend: Literal["tensorrt-rtx", "tensorrt"] = option(
        "--backend",
        "tensorrt-rtx builds for named GPUs, none needs to be here; tensorrt builds for the GPU that is here.",
    )
    precision: Precision | None = option(
        "--precision", "Convert the bundle to this precision first; default: build it as it is.", default=None
    )
    targets: tuple[str, ...] | None = option(
        "--target",
        "GPUs to build for; default: the one that is here, or without one, with tensorrt-rtx, sm_86,sm_89,sm_120.",
        default=None,
        callback=split_names,
        metavar="sm_XX[,sm_YY]|current",
    )
    inputs: Path | None = option(
        "--inputs", "Frames to calibrate int8 and fp8 on, and to measure any conversion's parity on.", default=None
    )
    keep: tuple[str, ...] = option(
        "--keep", "Repeatable; a PyTorch module path or node to keep in fp32.", default=(), metavar="PATH"
    )
    cache_precision: Literal["fp32", "fp16"] | None = option(
        "--cache-precision", "Of the cache tensors; default: fp16 where parity allows it.", default=None
    )
    min_psnr_db: float | None = option(
        "--min-psnr", "Parity in dB that every answer must reach against fp32; default: 45.", default=None, type=RATE
    )
    out: Path | None = option(
        "--out",
        "Write a folder that runs the bundle without anything else of this project; default: the engine cache.",
        default=None,
        callback=writable(),
    )

    @property
    def of_conversion(self) -> list[str]:
        """The options of a conversion that were given."""
        given = {
            "--inputs": self.inputs is not None,
            "--keep": bool(self.keep),
            "--cache-precision": self.cache_precision is not None,
            "--min-psnr": self.min_psnr_db is not None,
        }
        return [name for name, is_given in given.items() if is_given]

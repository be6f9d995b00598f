"""What a user may choose of every command: the one list of the command line's options, handed on to the tasks whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import click

from .device_choice import CPU, DeviceChoice
from .options import (
    AGE,
    COUNT,
    PATH,
    RATE,
    checked_metric,
    checked_policy,
    option,
    split_names,
    state_pairs,
    writable,
)
from .quality_choice import QualityChoice, QualityOptions

if TYPE_CHECKING:
    from ..engine.schedule.policy import Policy

__all__ = [
    "PRECISIONS",
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
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8", "fp8")

Lpips = Annotated[
    Path | None,
    option(
        "--lpips",
        type=PATH,
        envvar="WARPCACHE_LPIPS",
        help="Weights of LPIPS (.safetensors); also WARPCACHE_LPIPS. Without them LPIPS is left out.",
    ),
]
Cut = Annotated[
    str,
    option(
        "--cut",
        metavar="auto|NAME[,NAME]",
        help="Tensors (or PyTorch module paths) to cut at; auto measures the candidates.",
    ),
]
State = Annotated[
    Mapping[str, str],
    option(
        "--state",
        multiple=True,
        metavar="OUT:IN",
        callback=state_pairs,
        help="Repeatable; output OUT of a frame is input IN of the next one. The first value is the array IN of the "
        "inputs, or zeros.",
    ),
]
NewBundle = Annotated[
    Path,
    option("--out", type=PATH, callback=writable(".warp"), required=True, help="The bundle to write, NAME.warp."),
]


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """What streams take of the machine: weights of LPIPS, CPU threads, and where a bundle runs and by what."""

    lpips: Lpips = None
    threads: Annotated[
        int | None, option("--threads", type=COUNT, help="CPU threads to use; default: the cores of this process.")
    ] = None
    on: Annotated[DeviceChoice, DeviceChoice] = CPU


@dataclass(frozen=True, kw_only=True)
class StreamOptions(MachineOptions):
    """How a bundle is streamed through.

    Attributes:
        exit_name: Answer old caches with this exit only.
        fps: Pace of arrival; None submits the next frame when the last one is answered, unless a task knows better.
        promise: A quality to keep: every frame is routed to the cheapest exit that keeps it.
        lpips: For the audits of a promise in it too.
    """

    exit_name: Annotated[
        ExitName | None,
        option(
            "--exit", metavar="NAME", help="Answer old caches with this exit only: plain, warp, warp2, branch1, ..."
        ),
    ] = None
    fps: Annotated[float | None, option("--fps", type=RATE)] = None
    promise: Annotated[QualityChoice | None, QualityOptions] = None

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

    out: Annotated[
        Path,
        option(
            "--out",
            type=PATH,
            callback=writable(".mp4", ".npz"),
            required=True,
            help="The answer: a video, or every output's array.",
        ),
    ]
    policy: Annotated[
        str | None,
        option(
            "--policy",
            callback=checked_policy,
            metavar="full|every:N|async",
            help="When producers run; default: async.",
        ),
    ] = None
    age: Annotated[
        int | None,
        option("--age", type=AGE, help="Lockstep: answer frame t from the cache of frame t - AGE, deterministic."),
    ] = None
    fps: Annotated[
        float | None,
        option("--fps", type=RATE, help="Pace of arrival and of the video; default: the clip's or the bundle's."),
    ] = None

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

    policies: Annotated[
        tuple[str, ...],
        option(
            "--policy",
            callback=checked_policy,
            multiple=True,
            metavar="full|every:N|async",
            help="Repeatable; default: full, every:4, async.",
        ),
    ] = ()
    ages: Annotated[
        tuple[int, ...],
        option("--age", type=AGE, multiple=True, help="Repeatable; adds a lockstep run at this age."),
    ] = ()
    fps: Annotated[
        float | None,
        option("--fps", type=RATE, help="Pace of arrival under async; default: the clip's or the bundle's."),
    ] = None
    measure_every: Annotated[
        int | None,
        option(
            "--measure-every", type=COUNT, help="Measure quality on every N-th frame; default: about 300 frames in all."
        ),
    ] = None

    @property
    def chosen_policies(self) -> list[Policy]:
        """Policies to measure, in this order."""
        from ..engine.schedule.policy import Policy

        names = self.policies or (() if self.ages else ("full", "every:4", "async"))
        return [*map(Policy.parse, names), *map(Policy.lockstep, self.ages)]


@dataclass(frozen=True, kw_only=True)
class DemoOptions(MachineOptions):
    """What `demo` takes; files of an earlier demo in the folder `out` are replaced."""

    frames: Annotated[int, option("--frames", type=COUNT, help="Frames to stream.")] = 300
    out: Annotated[
        Path, option("--out", type=PATH, callback=writable(), help="Folder for the report and the video.")
    ] = Path("warpcache-demo")


@dataclass(frozen=True, kw_only=True)
class CompileChoice:
    """What `compile` takes; what is None is left to `warpcache.export.options.CompileOptions`."""

    weights: Annotated[
        Path | None,
        option(
            "--weights",
            type=PATH,
            help="The generator's weights, .safetensors; without it as the factory made it.",
        ),
    ] = None
    inputs: Annotated[
        Path,
        option("--inputs", type=PATH, required=True, help="Frames to train on: .npz, or .mp4 for one image input."),
    ]
    holdout: Annotated[
        Path | None,
        option(
            "--holdout",
            type=PATH,
            help="Frames to calibrate on, which the generator was not trained on; default: the last quarter of "
            "--inputs.",
        ),
    ] = None
    cut: Cut = "auto"
    budget: Annotated[
        float,
        option(
            "--budget",
            type=click.FloatRange(0, 1, min_open=True),
            metavar="RATIO",
            help="The consumer's cost as a fraction of the generator's.",
        ),
    ] = 0.1
    steps: Annotated[
        int | None,
        option(
            "--steps", type=click.IntRange(min=0), help="Training steps; 0 trains nothing (plain reuse of the cache)."
        ),
    ] = None
    max_age: Annotated[
        int, option("--max-age", type=COUNT, help="Oldest cache to train and calibrate for, in frames.")
    ] = 4
    exits: Annotated[
        int | None,
        option(
            "--exits",
            type=COUNT,
            metavar="N",
            help="Train N exits of different cost and promise quality with them: half of them (rounded up) read the "
            "cache, the others are branches of the generator that need none.",
        ),
    ] = None
    metric: Annotated[
        str | None,
        option(
            "--metric",
            callback=checked_metric,
            metavar="lpips|flip|psnr|ms-ssim",
            help="With --exits: what quality is promised in; default: lpips where its weights are given, else flip.",
        ),
    ] = None
    bank_size: Annotated[
        int | None,
        option(
            "--bank",
            type=click.IntRange(min=0),
            metavar="N",
            help="With --exits: entries of the guide bank that branches look up; 0 does without; default: 256.",
        ),
    ] = None
    seed: Annotated[int, option("--seed", type=int, help="Seed of the training.")] = 0
    resume: Annotated[
        bool, option("--resume", is_flag=True, help="Go on with an interrupted compile of the same bundle.")
    ] = False
    out: NewBundle
    state: State = field(default_factory=dict)
    lpips: Lpips = None

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

    inputs: Annotated[
        Path, option("--inputs", type=PATH, required=True, help="Sample frames to choose and check the cut on.")
    ]
    cut: Cut = "auto"
    state: State = field(default_factory=dict)
    out: NewBundle


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What `build` takes; `inputs`, `keep`, `cache_precision` and `min_psnr_db` belong to a conversion."""

    backend: Annotated[
        Literal["tensorrt-rtx", "tensorrt"],
        option(
            "--backend",
            type=click.Choice(["tensorrt-rtx", "tensorrt"]),
            required=True,
            help="tensorrt-rtx builds for named GPUs, none needs to be here; tensorrt builds for the GPU that is here.",
        ),
    ]
    precision: Annotated[
        Precision | None,
        option(
            "--precision",
            type=click.Choice(PRECISIONS),
            help="Convert the bundle to this precision first; default: build it as it is.",
        ),
    ] = None
    targets: Annotated[
        tuple[str, ...] | None,
        option(
            "--target",
            callback=split_names,
            metavar="sm_XX[,sm_YY]|current",
            help="GPUs to build for; default: the one that is here, or without one, with tensorrt-rtx, "
            "sm_86,sm_89,sm_120.",
        ),
    ] = None
    inputs: Annotated[
        Path | None,
        option(
            "--inputs",
            type=PATH,
            help="Frames to calibrate int8 and fp8 on, and to measure any conversion's parity on.",
        ),
    ] = None
    keep: Annotated[
        tuple[str, ...],
        option(
            "--keep", multiple=True, metavar="PATH", help="Repeatable; a PyTorch module path or node to keep in fp32."
        ),
    ] = ()
    cache_precision: Annotated[
        Literal["fp32", "fp16"] | None,
        option(
            "--cache-precision",
            type=click.Choice(["fp32", "fp16"]),
            help="Of the cache tensors; default: fp16 where parity allows it.",
        ),
    ] = None
    min_psnr_db: Annotated[
        float | None,
        option("--min-psnr", type=RATE, help="Parity in dB that every answer must reach against fp32; default: 45."),
    ] = None
    out: Annotated[
        Path | None,
        option(
            "--out",
            type=PATH,
            callback=writable(),
            help="Write a folder that runs the bundle without anything else of this project; default: the engine "
            "cache.",
        ),
    ] = None

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

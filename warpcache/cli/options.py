"""The options that several commands share, and the checks of what is given for them.

Checks run while the arguments are parsed: what is wrong is wrong usage, and found out before any work is done.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..engine.errors import InputError

if TYPE_CHECKING:
    from ..tasks.quality_choice import QualityChoice

__all__ = [
    "AGE",
    "COUNT",
    "PATH",
    "RATE",
    "checked_device",
    "checked_metric",
    "checked_policy",
    "cut_option",
    "device_options",
    "exit_option",
    "json_option",
    "lpips_option",
    "one_line",
    "quality_options",
    "split_names",
    "state_option",
    "threads_option",
    "writable",
]

PATH = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)
AGE = click.IntRange(min=0)
RATE = click.FloatRange(min=0, min_open=True)


def one_line(message: str) -> str:
    """`message` on one line: a library underneath may have put line breaks into it."""
    return " ".join(message.split())


def checked_policy(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """Check policies.

    Raises:
        click.BadParameter: If a name is no policy.
    """
    from ..engine.schedule.policy import Policy

    return _checked(Policy.parse, ctx, param, value)


def checked_device(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """Check names of devices; whether they are there is found out when they are used.

    Raises:
        click.BadParameter: If a name is no device's.
    """
    from ..engine.cuda.options import parse_device

    return _checked(parse_device, ctx, param, value)


def checked_metric(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """Check a metric that quality is promised in.

    Raises:
        click.BadParameter: If there is no such metric.
    """
    if value is None:
        return None
    from ..engine.promise.calibration import canonical_metric

    return _checked(canonical_metric, ctx, param, value)


def split_names(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[str, ...] | None:
    """Names joined by commas, apart.

    Raises:
        click.BadParameter: If one of them is empty.
    """
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise click.BadParameter(f"{text!r} has an empty name between its commas", ctx, param)
    return names


def state_pairs(ctx: click.Context, param: click.Parameter, pairs: tuple[str, ...]) -> dict[str, str]:
    """State as output -> input.

    Raises:
        click.BadParameter: If a pair is none, or names what another one names too.
    """
    state: dict[str, str] = {}
    for pair in pairs:
        output, colon, name = (part.strip() for part in pair.partition(":"))
        if not (output and colon and name):
            raise click.BadParameter(f"{pair!r} is no pair of names; write OUT:IN, e.g. memory_next:memory", ctx, param)
        for named, others in ((output, state.keys()), (name, state.values())):
            if named in others:
                raise click.BadParameter(f"{named!r} is named twice; a state has one output and one input", ctx, param)
        state[output] = name
    return state


def _checked(parse: Callable[[str], object], ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    for text in value if isinstance(value, tuple) else [value]:
        if text is not None:
            try:
                parse(text)
            except InputError as exc:
                raise click.BadParameter(one_line(str(exc)), ctx, param) from exc
    return value


def writable(*suffixes: str) -> Callable[[click.Context, click.Parameter, Path | None], Path | None]:
    """A check that a path to write has one of the suffixes (none given: any) and is where writing is allowed.

    Found out while the arguments are parsed, and not after twenty minutes of work.
    """

    def check(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
        if path is None:
            return None
        if suffixes and path.suffix.lower() not in suffixes:
            raise click.BadParameter(f"{str(path)!r} must end in {' or '.join(suffixes)}", ctx, param)
        # The finished file takes the place of what is there, which would be the end of a device like /dev/stdout.
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise click.BadParameter(f"{str(path)!r} is no regular file", ctx, param)
        # Missing folders are made when the file is written.
        parent = next(folder for folder in path.absolute().parents if folder.exists())
        if not parent.is_dir():
            raise click.BadParameter(f"{str(parent)!r} is no folder", ctx, param)
        if not os.access(parent, os.W_OK):
            raise click.BadParameter(f"no permission to write into {str(parent)!r}", ctx, param)
        return path

    return check


json_option = click.option(
    "--json", "json_path", type=PATH, callback=writable(), help="Write the figures to this file too."
)
lpips_option = click.option(
    "--lpips",
    type=PATH,
    envvar="WARPCACHE_LPIPS",
    help="Weights of LPIPS (.safetensors); also WARPCACHE_LPIPS. Without them LPIPS is left out.",
)
threads_option = click.option("--threads", type=COUNT, help="CPU threads to use; default: the cores of this process.")
cut_option = click.option(
    "--cut",
    default="auto",
    show_default=True,
    metavar="auto|NAME[,NAME]",
    help="Tensors (or PyTorch module paths) to cut at; auto measures the candidates.",
)
state_option = click.option(
    "--state",
    multiple=True,
    metavar="OUT:IN",
    callback=state_pairs,
    help="Repeatable; output OUT of a frame is input IN of the next one. The first value is the array IN of the "
    "inputs, or zeros.",
)
exit_option = click.option(
    "--exit",
    "exit_name",
    metavar="NAME",
    help="Answer old caches with this exit only: plain, warp, warp2, branch1, ...",
)

_QUALITY_OPTIONS = (
    click.option(
        "--quality",
        metavar="METRIC=VALUE",
        help="Answer every frame with the cheapest exit that keeps this quality, e.g. lpips=0.1; the metric is the one "
        "that the bundle was compiled with --exits for: lpips, flip, psnr or ms-ssim.",
    ),
    click.option(
        "--confidence",
        type=float,
        metavar="SHARE",
        help="With --quality: share of the frames that keep it; default: 0.95.",
    ),
    click.option(
        "--deadline-ms",
        type=RATE,
        metavar="MS",
        help="With --quality: milliseconds that an answer may take; where no exit that keeps the quality is quick "
        "enough, the frame is answered worse, or dropped, and counted.",
    ),
    click.option(
        "--audit-every",
        type=click.IntRange(min=0),
        metavar="M",
        help="With --quality: the whole generator answers every M-th frame in the background too, to compare; "
        "0 never; default: 30.",
    ),
)


def device_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the parameter `on`, a `DeviceChoice`, from the options that say where a bundle runs."""
    import functools

    @click.option(
        "--device",
        default="cpu",
        show_default=True,
        metavar="cpu|cuda:N",
        callback=checked_device,
        help="Where to run.",
    )
    @click.option(
        "--backend",
        type=click.Choice(["onnxruntime", "tensorrt", "tensorrt-rtx"]),
        default="onnxruntime",
        show_default=True,
        help="What executes the graphs; the TensorRTs on a GPU only.",
    )
    @click.option(
        "--graphs",
        type=click.Choice(["auto", "on", "off"]),
        help="Replay CUDA graphs; default on a GPU: auto, where the backend can be captured.",
    )
    @click.option(
        "--producer-device",
        "producer_devices",
        multiple=True,
        metavar="cuda:N",
        callback=checked_device,
        help="Repeatable; a GPU that producers run on under async; default: the consumer's.",
    )
    @functools.wraps(command)
    def with_choice(
        *args: Any,
        device: str,
        backend: str,
        graphs: Any,
        producer_devices: tuple[str, ...],
        **options: Any,
    ) -> Any:
        from ..tasks.device_choice import DeviceChoice

        given = [name for name, value in (("--graphs", graphs), ("--producer-device", producer_devices)) if value]
        if device == "cpu" and given:
            # Not left to the engine: the policies of a benchmark that run first do without producers beside them.
            raise click.UsageError(f"{given[0]} is for a GPU, but the device is the CPU; name one by --device cuda:N")
        choice = DeviceChoice(device=device, backend=backend, graphs=graphs, producer_devices=producer_devices)
        return command(*args, on=choice, **options)

    return with_choice


def quality_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the parameter `promise`, a `QualityChoice` or None, from the options that ask for a quality."""
    import functools

    @functools.wraps(command)
    def with_promise(
        *args: Any,
        quality: str | None,
        confidence: float | None,
        deadline_ms: float | None,
        audit_every: int | None,
        **options: Any,
    ) -> Any:
        if quality is None:
            given = {"--confidence": confidence, "--deadline-ms": deadline_ms, "--audit-every": audit_every}
            for name, value in given.items():
                if value is not None:
                    raise click.UsageError(f"{name} goes with a quality to keep; name one by --quality, e.g. lpips=0.1")
            return command(*args, promise=None, **options)
        if options.get("exit_name") is not None:
            raise click.UsageError("--quality chooses an exit for every frame; leave --exit or --quality out")
        return command(*args, promise=_promise(quality, confidence, deadline_ms, audit_every), **options)

    for option in reversed(_QUALITY_OPTIONS):
        with_promise = option(with_promise)
    return with_promise


def _promise(
    quality: str, confidence: float | None, deadline_ms: float | None, audit_every: int | None
) -> QualityChoice:
    """The quality that was asked for.

    Raises:
        click.BadParameter: If the metric is unknown, or the threshold or the confidence is out of its range.
    """
    from ..engine.promise.calibration import Quality
    from ..tasks.quality_choice import QualityChoice

    hint = "--quality"
    try:
        asked = Quality.parse(quality)
        if confidence is not None:
            hint = "--confidence"
            asked = replace(asked, confidence=confidence)
    except InputError as exc:
        raise click.BadParameter(one_line(str(exc)), param_hint=hint) from exc
    every = {} if audit_every is None else {"audit_every": audit_every}
    return QualityChoice(asked, deadline_ms=deadline_ms, **every)

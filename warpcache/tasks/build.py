"""Build a bundle's engines from files: the command line's way into precision, engine building and the edge folder.

Nothing is at its final place before all is done: a conversion waits in a folder beside until the engines are built, and
the folder of a deployment is renamed as a whole. Engines go into the engine cache one by one, each of them whole.
"""

from __future__ import annotations

import dataclasses
import errno
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.errors import BackendError, DeviceError, InputError
from .choices import BuildOptions, LowPrecision
from .deploy import ENGINES, Deployment, add_bundle, add_runtime, bundle_name, check_place, written_folder
from .progress import Report, silent

if TYPE_CHECKING:
    from rich.console import Console

    from ..engine.bundle.bundle import Bundle
    from ..engine.tensorrt.engines import BuiltEngine
    from ..engine.tensorrt.flavour import Flavour

__all__ = [
    "CONSUMER_GPUS",
    "Built",
    "build_bundle",
    "choose_targets",
    "converted_path",
    "print_built",
]

CALIBRATED = ("int8", "fp8")
"""Precisions whose scales are measured on frames."""

CONSUMER_GPUS = ("sm_86", "sm_89", "sm_120")
"""GeForce RTX 30, 40 and 50: what is built for where no GPU is here and none was named."""


@dataclass(frozen=True)
class Built:
    """What was built.

    Attributes:
        bundle: The bundle that the engines are of; the deployed one, where there is a deployment.
        precision: What its graphs are written in.
        converted: Whether it was made now, from one of fp32.
        flavour: TensorRT's name and version.
        targets: The GPUs that were built for.
        why: Why those, where they were not asked for; else empty.
        engines: One a module.
        folder: Where the engines are.
        deployment: The folder that was written, if one was asked for.
        seconds: How long all of it took, conversion and kernels included.
    """

    bundle: Bundle
    precision: str
    converted: bool
    flavour: Flavour
    targets: tuple[str, ...]
    why: str
    engines: tuple[BuiltEngine, ...]
    folder: Path
    deployment: Deployment | None
    seconds: float

    def rows(self) -> list[dict[str, Any]]:
        """One JSON-ready row an engine; its seconds are those of all that were built with it."""
        return [
            {
                "module": engine.module,
                "precision": self.precision,
                "size_bytes": engine.size_bytes,
                "targets": list(engine.targets),
                "built": not engine.reused,
                "seconds": engine.seconds,
                "file": engine.path.name if engine.path is not None else None,
            }
            for engine in self.engines
        ]

    def record(self) -> dict[str, Any]:
        """What the JSON says besides the rows."""
        deployment = self.deployment
        return {
            "bundle": str(self.bundle.path),
            "backend": self.flavour.name,
            "version": self.flavour.version,
            "targets": list(self.targets),
            "converted": self.converted,
            "precision": self.bundle.manifest.created.get("precision"),
            "engines": str(self.folder),
            "total_seconds": self.seconds,
            "deployment": None
            if deployment is None
            else {
                "path": str(deployment.path),
                "size_bytes": deployment.size_bytes,
                "parts": deployment.parts,
                "dependencies": [dataclasses.asdict(dependency) for dependency in deployment.dependencies],
            },
        }


def build_bundle(path: Path, options: BuildOptions, *, progress: Report = silent) -> Built:
    """Build the engines of the bundle at `path`, converted to another precision first where one is asked for.

    Without a folder to write, engines stay in the engine cache, and a converted bundle is written beside `path`.

    Raises:
        BackendError: If the TensorRT is missing or of the other flavour, or refuses a graph or a target.
        BundleError: If the bundle is damaged.
        DeviceError: If a GPU is needed and there is none.
        ExportError: If the conversion fails.
        InputError: If what was asked for does not fit together, or something is in the way.
        ModuleNotFoundError: If a conversion needs the ``export`` extra and it is not installed.
    """
    from ..engine.bundle.bundle import Bundle
    from ..engine.tensorrt.engine_cache import default_folder
    from ..engine.tensorrt.engines import check_targets, precision_of
    from ..engine.tensorrt.flavour import Flavour

    started = time.perf_counter()
    out, targets = options.out, options.targets
    if out is not None:
        check_place(out, path)
    flavour = Flavour.load(options.backend)
    chosen, why = choose_targets(flavour, targets)
    bundle = Bundle.open(path)
    wanted = _wanted_precision(bundle, precision_of(bundle), options)
    if targets is None:
        chosen, why = _fitting(wanted or precision_of(bundle), chosen, why)
    # Before the conversion, which may take minutes.
    check_targets(wanted or precision_of(bundle), chosen)
    deployment = None
    if out is not None:
        with written_folder(out) as folder:
            name = bundle_name(bundle.path)
            inside = (
                _convert(bundle, folder / name, wanted, options, progress) if wanted else add_bundle(folder, bundle)
            )
            engines = _engines(inside, flavour, chosen, folder / ENGINES, progress, home=out / ENGINES)
            deployment = add_runtime(folder, out, inside, flavour=flavour, targets=chosen)
        bundle, home = dataclasses.replace(inside, path=out / name), out / ENGINES
    elif wanted:
        beside = converted_path(bundle.path, wanted)
        if beside.exists() or beside.is_symlink():
            raise InputError(
                f"{str(beside)!r} already exists; build that one (without --precision), or remove it to convert anew"
            )
        home = default_folder(beside)
        with tempfile.TemporaryDirectory(prefix=f".{beside.name}.", suffix=".partial", dir=beside.parent) as staging:
            inside = _convert(bundle, Path(staging) / beside.name, wanted, options, progress)
            engines = _engines(inside, flavour, chosen, home, progress, home=home)
            try:
                inside.path.rename(beside)
            except OSError as exc:
                if exc.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
                raise InputError(f"{str(beside)!r} was made by somebody else meanwhile; build that one") from exc
        bundle = dataclasses.replace(inside, path=beside)
    else:
        home = default_folder(bundle.path)
        engines = _engines(bundle, flavour, chosen, home, progress, home=home)
    return Built(
        bundle=bundle,
        precision=precision_of(bundle),
        converted=wanted is not None,
        flavour=flavour,
        targets=chosen,
        why=why,
        engines=tuple(
            dataclasses.replace(engine, path=home / engine.path.name) if engine.path is not None else engine
            for engine in engines
        ),
        folder=home,
        deployment=deployment,
        seconds=time.perf_counter() - started,
    )


def choose_targets(flavour: Flavour, asked: Sequence[str] | None) -> tuple[tuple[str, ...], str]:
    """The GPUs to build for, and why those where nothing was asked for.

    Nothing asked for means the GPU that is here; where there is none that a library can build for, and it builds ahead
    of time, `CONSUMER_GPUS`.

    Raises:
        BackendError: If the library does not know a target; the message lists those it knows.
        DeviceError: If a GPU is needed and there is none.
    """
    from ..engine.tensorrt.flavour import CURRENT

    if asked is not None:
        return flavour.resolve(tuple(asked)), ""
    try:
        return flavour.resolve((CURRENT,)), "the GPU that is here"
    except DeviceError:
        if not flavour.ahead_of_time:
            raise
        why = "no GPU is here"
    except BackendError:
        if not flavour.ahead_of_time:
            raise
        why = f"{flavour.title} does not build for the GPU that is here"
    return flavour.resolve(CONSUMER_GPUS), f"{why}, so for GeForce RTX 30, 40 and 50; choose others with --target"


def converted_path(path: Path, precision: str) -> Path:
    """Where a converted bundle is written: ``head.warp`` -> ``head.fp16.warp``, beside it."""
    name = bundle_name(path)
    return path.absolute().parent / f"{name.removesuffix('.warp')}.{precision}.warp"


def _wanted_precision(bundle: Bundle, there: str, options: BuildOptions) -> LowPrecision | None:
    """What to convert to; None where the bundle stays as it is."""
    asked = options.precision
    if asked is None or asked == there:
        if options.of_conversion:
            because = f"is {there} already" if asked is not None else "stays as it is without --precision"
            one = len(options.of_conversion) == 1
            raise InputError(
                f"{', '.join(options.of_conversion)} {'belongs' if one else 'belong'} to a conversion, but the bundle "
                f"{str(bundle.path)!r} {because}; leave {'it' if one else 'them'} out"
            )
        return None
    if there != "fp32" or asked == "fp32":
        raise InputError(
            f"the bundle {str(bundle.path)!r} is {there} already and cannot become {asked}; convert the fp32 bundle "
            "that it was made from, or build it as it is without --precision"
        )
    if asked in CALIBRATED and options.inputs is None:
        raise InputError(f"{asked} is calibrated on frames of yours; name them with --inputs FRAMES.npz")
    return asked


def _fitting(precision: str, targets: tuple[str, ...], why: str) -> tuple[tuple[str, ...], str]:
    """The targets that were chosen for the user, and why, without GPUs that do not compute in the precision."""
    from ..engine.tensorrt.engines import without_kernels

    lacking = without_kernels(precision, targets)
    if not lacking or len(lacking) == len(targets):
        return targets, why
    fitting = tuple(target for target in targets if target not in lacking)
    return fitting, f"{why}; without {', '.join(lacking)}, which has no {precision}"


def _engines(
    bundle: Bundle, flavour: Flavour, targets: tuple[str, ...], folder: Path, progress: Report, *, home: Path
) -> list[BuiltEngine]:
    """Build the engines into `folder`, which is going to be `home`; here one that cannot be kept is a failure."""
    from ..engine.tensorrt.engine_cache import EngineCache
    from ..engine.tensorrt.engines import Toolchain, build_engines

    engines = build_engines(bundle, Toolchain(flavour, targets), EngineCache(folder), progress=progress)
    lost = [engine.module for engine in engines if engine.path is None and not engine.reused]
    if lost:
        raise InputError(
            f"{len(lost)} of {len(engines)} engines could not be written into {str(home)!r}, that of {lost[0]!r} "
            "first; free some space there, or choose a folder that can be written"
        )
    return engines


def _convert(bundle: Bundle, out: Path, precision: LowPrecision, asked: BuildOptions, progress: Report) -> Bundle:
    from ..export.precision.convert import PrecisionOptions, convert_bundle
    from ..media.inputs import load_inputs

    given: dict[str, Any] = {"min_psnr_db": asked.min_psnr_db, "cache_precision": asked.cache_precision}
    options = PrecisionOptions(
        precision=precision, keep=asked.keep, **{name: value for name, value in given.items() if value is not None}
    )
    frames = None
    if asked.inputs is not None:
        frames = load_inputs(asked.inputs, bundle.manifest.inputs).arrays
    return convert_bundle(bundle, out, options=options, frames=frames, progress=progress)


def print_built(built: Built, *, console: Console | None = None) -> None:
    """Print what was built, where it is, and what to do next."""
    import sys

    from rich.console import Console

    from ..report.bundle_tables import plain_table, print_precision
    from ..report.words import PIPE_WIDTH, size_text

    out = console or Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)

    def say(text: str) -> None:
        out.print(text, soft_wrap=True, markup=False)

    because = f" ({built.why})" if built.why else ""
    library = f"{built.flavour.title} {built.flavour.version}"
    say(f"{built.bundle.manifest.name}: {library}, for {', '.join(built.targets)}{because}")
    # One process builds them all, so there is one time for all of them.
    taken = max((engine.seconds for engine in built.engines), default=0.0)
    made = sum(not engine.reused for engine in built.engines)
    title = f"Engines: {made} built in {taken:.1f} s, {len(built.engines) - made} found"
    table = plain_table(title, "module", "precision", "size", "targets", "", numeric=["size"])
    for engine in built.engines:
        table.add_row(
            engine.module,
            built.precision,
            size_text(engine.size_bytes),
            ", ".join(engine.targets),
            "found" if engine.reused else "built",
        )
    out.print(table)
    if built.converted:
        print_precision(built.bundle.manifest, out)
    say(f"{built.seconds:.1f} s in all")
    if built.deployment is None:
        if built.converted:
            say(f"wrote {built.bundle.path}")
        say(f"engines in {built.folder}")
        answer = "ANSWER.npz" if built.bundle.manifest.image_output is None else "ANSWER.mp4"
        say(
            f"next:  warpcache run {_shown(built.bundle.path)} INPUTS.npz --out {answer} --device cuda:0 "
            f"--backend {built.flavour.name}"
        )
        return
    deployment = built.deployment
    parts = plain_table(
        f"{deployment.path}: {size_text(deployment.size_bytes)}", "in the folder", "size", numeric=["size"]
    )
    for name, size_bytes in deployment.parts.items():
        parts.add_row(name, size_text(size_bytes))
    out.print(parts)
    needs = plain_table(
        "What it needs beside Python and the driver", "pip", "size installed", numeric=["size installed"]
    )
    for dependency in deployment.dependencies:
        size = "not installed here" if dependency.size_bytes is None else size_text(dependency.size_bytes)
        needs.add_row(dependency.requirement, size)
    out.print(needs)
    say(f"wrote {deployment.path}")
    say(f"next:  python {_shown(deployment.path / 'run.py')} FRAMES.npz ANSWERS.npz  (on a machine with such a GPU)")


def _shown(path: Path) -> str:
    import shlex

    return shlex.quote(str(path))

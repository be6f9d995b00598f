"""How long building the demo's engines takes ahead of time: every module, fp16, TensorRT-RTX, three GPUs, no GPU here.

    python -m benchmarks.build_time --json build_time.json

Every run builds into an empty engine cache. The bundle is converted to fp16 once, before the clock starts; the command
is timed in processes of its own, once on that bundle and once converting the fp32 one first. Medians over the runs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import numpy as np

from benchmarks import flags
from benchmarks.measuring import Figure
from benchmarks.parts import Measured, device_record, measure_parts
from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.errors import BackendError
from warpcache.engine.tensorrt.engine_cache import EngineCache
from warpcache.engine.tensorrt.engines import Toolchain, build_engines, precision_of
from warpcache.engine.tensorrt.flavour import Flavour
from warpcache.tasks.demo import demo_bundle
from warpcache.tasks.options import COUNT, option, takes

__all__ = ["PARTS", "TARGETS", "main"]

TARGETS = ("sm_86", "sm_89", "sm_120")
TARGET_S = 10.0
_BACKEND = "tensorrt-rtx"

# A checkout that is not installed is found by its root, whichever way it was started.
_ROOT = Path(__file__).resolve().parents[1]


def engines_part(bundle: Bundle, runs: int) -> Measured:
    """`build_engines`, as an engine that is loaded calls it."""
    flavour = Flavour.load(_BACKEND)
    times, modules = [], 0
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            built = build_engines(bundle, Toolchain(flavour, TARGETS), EngineCache(Path(folder)))
            times.append(time.perf_counter() - begin)
        if any(engine.reused for engine in built):
            raise BackendError("an engine was found in an empty cache, so the time is not that of building; report it")
        modules = len(built)
    what = f"{modules} modules, {precision_of(bundle)}, {len(TARGETS)} targets, build_engines"
    found = _summarised(what, times)
    found.notes.append(f"{bundle.path.name} by {flavour.title} {flavour.version} for {', '.join(TARGETS)}")
    found.details |= {"version": flavour.version, "targets": list(TARGETS), "modules": modules}
    return found


def command_part(bundle: Bundle, runs: int) -> Measured:
    """`warpcache build` on the fp16 bundle: the interpreter's start, the bundle's hashes and all."""
    return _summarised("warpcache build of the fp16 bundle", [_command_s(bundle.path) for _ in range(runs)])


def convert_part(bundle: Bundle, runs: int) -> Measured:
    """`warpcache build --precision fp16` on the fp32 bundle."""
    what = "warpcache build --precision fp16 of the fp32 bundle"
    return _summarised(what, [_command_s(bundle.path, "--precision", "fp16") for _ in range(runs)])


PARTS: dict[str, Callable[[Bundle, int], Measured]] = {
    "engines": engines_part,
    "command": command_part,
    "convert": convert_part,
}


def _summarised(what: str, times: list[float]) -> Measured:
    """The median is what was promised."""
    return Measured(
        [
            Figure(f"{what}, median", float(np.median(times)), TARGET_S, "s"),
            Figure(f"{what}, slowest run", max(times), None, "s"),
        ],
        details={"seconds": times},
    )


def _command_s(bundle: Path, *options: str) -> float:
    """Seconds of one run of the command on a copy of the bundle.

    Raises:
        BackendError: If it fails; the message is its last line.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / bundle.name
        shutil.copytree(bundle, copy)
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        surroundings = {**os.environ, "WARPCACHE_CACHE": str(Path(folder) / "cache"), "PYTHONPATH": path}
        command = [sys.executable, "-m", "warpcache", "build", str(copy), "--backend", _BACKEND, *options]
        command += ["--target", ",".join(TARGETS)]
        begin = time.perf_counter()
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=surroundings)
        taken = time.perf_counter() - begin
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        raise BackendError(f"`warpcache build` failed: {lines[-1].removeprefix('warpcache: ')}")
    return taken


@dataclass(frozen=True)
class Options(flags.Recorded):
    """What is built, and how often."""

    bundle: Path | None = option("--bundle", "In fp32; default: the demo's.", default=None)
    asked: tuple[str, ...] = option("--part", "Only this; repeatable.", default=(), type=click.Choice(list(PARTS)))
    runs: int = option("--runs", default=3, type=COUNT)


@click.command(epilog="Example:  python -m benchmarks.build_time --runs 5 --json build_time.json")
@click.pass_context
@takes(Options)
def main(context: click.Context, /, options: Options) -> None:
    """Time the building of a bundle's engines."""
    record = device_record("cpu")
    with tempfile.TemporaryDirectory() as folder:
        converted: list[Bundle] = []

        def measure(name: str) -> Measured:
            bundle = demo_bundle() if options.bundle is None else Bundle.open(options.bundle)
            if name == "convert":
                return PARTS[name](bundle, options.runs)
            if not converted:
                converted.append(_converted(bundle, Path(folder) / f"{bundle.path.stem}.fp16.warp"))
            return PARTS[name](converted[0], options.runs)

        parts = {name: partial(measure, name) for name in options.asked or PARTS}
        measure_parts(
            context,
            "build_time",
            f"Building engines on {record['name']}, no GPU used",
            record,
            parts,
            options.json_path,
        )


def _converted(bundle: Bundle, out: Path) -> Bundle:
    from warpcache.export.precision.convert import PrecisionOptions, convert_bundle

    # Without frames: what is timed are the engines, and parity is measured elsewhere.
    return convert_bundle(bundle, out, options=PrecisionOptions("fp16"), frames=None)


if __name__ == "__main__":
    main()

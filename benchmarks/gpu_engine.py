"""What an engine takes on a GPU: host time a frame, tails under running producers, 512x512, parity, memory.

    python -m benchmarks.gpu_engine --device cuda:0 --reference R.warp --json gpu_engine.json

Every part stands alone: one that cannot run says why in its row. The exit code is 0 only if all that were asked for
ran; a figure that misses its target is no failure. Executors are tried in the order of ``--backend``; the reference
part reports each that runs, the others take the first.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count, cycle
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from benchmarks import flags
from benchmarks.empty_backend import INPUT, EmptyCpuBackend, EmptyCudaBackend, write_empty_bundle
from benchmarks.measuring import Figure, timed_ms
from benchmarks.memory_growth import Growth, resident_bytes, watch_memory
from benchmarks.mesh_to_picture import MeshToPicture
from benchmarks.parts import (
    Measured,
    device_record,
    device_title,
    measure_parts,
    percentile_figures,
    sentence,
)
from benchmarks.rtx_probe import probe_rtx
from benchmarks.streams import Streamed, as_clip, frames_for, on_device, stream
from warpcache.engine.backends import choose_backend
from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.bundle.roles import Role
from warpcache.engine.cuda.device import CudaDevice
from warpcache.engine.cuda.graph import CudaGraph
from warpcache.engine.cuda.options import CUDA_BACKENDS, CudaOptions, parse_device
from warpcache.engine.engine import Engine
from warpcache.engine.errors import BackendError, InputError, WarpcacheError
from warpcache.engine.metrics.images import measure_frames
from warpcache.engine.session.session import Session
from warpcache.engine.spec import TensorSpec
from warpcache.kernels.driver import check, load
from warpcache.tasks.demo import demo_bundle
from warpcache.tasks.options import COUNT, option, takes

__all__ = ["BACKENDS", "PARTS", "Setup", "main"]

BACKENDS = ("tensorrt", "tensorrt-rtx", "onnxruntime")
"""In the order in which they are tried."""

HOST_TARGET_US = 50.0
TAIL_TARGET = 1.2
REFERENCE_TARGET_MS = 1.0
PARITY_TARGET_DB = 45.0
# What Python's allocator takes from the system at a time. Less than that cannot be told from its own bookkeeping.
HOST_GROWTH_TARGET_KIB = 1024.0

_PART_NAMES = ("host-time", "producers", "reference", "mesh", "parity", "memory", "rtx")
# One cache at the beginning, and the consumer alone from then on.
_ONE_CACHE = {"policy": "every:1000000000"}
_PARITY_AGE = 4
_REFUSALS = (WarpcacheError, ImportError, OSError, RuntimeError)


@dataclass(frozen=True)
class Setup(flags.Recorded):
    """What is measured, by what, and how long."""

    device: str = option("--device", default="cuda:0")
    backends: tuple[str, ...] = option(
        "--backend", "To try; repeatable.", default=BACKENDS, type=click.Choice(CUDA_BACKENDS), show_default=False
    )
    asked: tuple[str, ...] = option("--part", "Only this; repeatable.", default=(), type=click.Choice(_PART_NAMES))
    bundle: Path | None = option("--bundle", "In fp32; default: the demo's.", default=None)
    fp16: Path | None = option("--fp16", "The same in fp16; default: converted here.", default=None)
    reference: Path | None = option("--reference", "From benchmarks.reference_bundle.", default=None)
    engine_cache: Path | None = option("--engine-cache", "Folder of built engines.", default=None)
    frames: int = option("--frames", "Of a latency figure.", default=2000, type=click.IntRange(min=2))
    host_frames: int = option("--host-frames", "Of a host time.", default=5000, type=click.IntRange(min=2))
    warmup: int = option("--warmup", default=200, type=COUNT)
    fps: float = option("--fps", "Of the paced stream.", default=60.0, type=click.FloatRange(min=1))
    drawn: int = option("--drawn", "Frames used over and over.", default=48, type=click.IntRange(min=2))
    empty_frames: int = option("--empty-frames", "Memory, empty.", default=100_000, type=click.IntRange(min=50))
    demo_frames: int = option("--demo-frames", "Memory, bundle.", default=10_000, type=click.IntRange(min=0))
    parity_frames: int = option("--parity-frames", default=16, type=click.IntRange(min=6))

    @property
    def ordinal(self) -> int:
        """The GPU's number."""
        ordinal = parse_device(self.device)
        if ordinal is None:
            raise InputError(f"device {self.device!r} is no GPU; give cuda:N")
        return ordinal

    def open_bundle(self) -> Bundle:
        """The fp32 bundle."""
        return demo_bundle() if self.bundle is None else Bundle.open(self.bundle)


def host_time_part(setup: Setup) -> Measured:
    """From handing in a frame to having its answer, where modules do nothing: the session, copies, graph and waits."""
    found = Measured()
    policies: dict[str, dict[str, Any]] = {
        "async": {"policy": "async"},
        "lockstep": {"age": 1},
        "one cache": _ONE_CACHE,
    }
    with ExitStack() as stack:
        bundle = write_empty_bundle(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        device = stack.enter_context(CudaDevice(setup.ordinal))
        host = frames_for(bundle, 2)
        there = on_device(host, device)

        def on_gpu(label: str, frames: Any, target: float | None, outputs: Any, **policy: Any) -> None:
            cuda = CudaOptions(graphs="on", outputs=outputs)
            with (
                Engine(bundle, device=setup.device, backend=EmptyCudaBackend(), cuda=cuda, **policy) as engine,
                engine.session() as session,
            ):
                _add_host_time(found, label, session, frames, setup, target)

        for label, policy in policies.items():
            on_gpu(f"answer a frame, {label}", host, HOST_TARGET_US, "host", **policy)
        on_gpu("answer a frame, async, arrays on the GPU", there, None, "device", policy="async")
        for label, policy in policies.items():
            with Engine(bundle, backend=EmptyCpuBackend(), threads=1, **policy) as engine, engine.session() as session:
                _add_host_time(found, f"the same without a device, {label}", session, host, setup, None)
        round_trips = _bare_replay_us(device, setup.host_frames, setup.warmup)
        found.figures.append(Figure("bare graph replay and wait, p50", float(np.median(round_trips)), None, "us"))
        found.details["bare graph replay"] = [round(value, 3) for value in round_trips]
    return found


def producers_part(setup: Setup) -> Measured:
    """Latency of the consumer while producers run beside it, and without them."""
    found = Measured()
    bundle = setup.open_bundle()
    host = frames_for(bundle, setup.drawn)
    with ExitStack() as stack:
        there = on_device(host, stack.enter_context(CudaDevice(setup.ordinal)))
        for place, frames in (("host", host), ("device", there)):
            medians = {}
            streams: list[tuple[str, dict[str, Any], float | None]] = [
                ("without producers", _ONE_CACHE, None),
                ("async, unpaced", {"policy": "async"}, None),
                (f"async, {setup.fps:g} fps", {"policy": "async"}, setup.fps),
            ]
            for label, policy, fps in streams:
                with _opened(setup, bundle, found, outputs=place, **policy) as opened:
                    streamed = stream(opened.session, frames, setup.frames, warmup=setup.warmup, fps=fps)
                    backend, graphs = opened.backend, opened.session.statistics.graphs
                name = f"{label}, arrays on the {place}"
                medians[label] = float(np.median(streamed.latency_ms))
                target = TAIL_TARGET if policy is not _ONE_CACHE else None
                found.figures += [
                    Figure(f"latency p99 / p50, {name}", streamed.tail, target),
                    Figure(f"latency p50, {name}", medians[label], None, "ms"),
                ]
                if policy is not _ONE_CACHE:
                    found.figures += [
                        Figure(f"p50 / without producers, {name}", medians[label] / medians["without producers"], None),
                        Figure(f"age of the cache, mean, {name}", float(np.mean(streamed.ages)), None, "frames"),
                    ]
                found.details[name] = {**streamed.to_record(), "backend": backend, "graphs": graphs}
    found.notes.insert(0, f"{bundle.path.name} by {backend}, {graphs} graphs, {setup.frames} frames each")
    return found


def reference_part(setup: Setup) -> Measured:
    """The 512x512 consumer by every executor that runs here, arrays on the GPU and on the host."""
    if setup.reference is None:
        raise InputError(
            "no reference bundle was named; make one with `python -m benchmarks.reference_bundle --out R.warp`, and "
            "give --reference R.warp"
        )
    found = Measured()
    bundle = Bundle.open(setup.reference)
    host = frames_for(bundle, min(setup.drawn, 8))
    size = "x".join(map(str, bundle.manifest.outputs[0].shape[2:]))
    best: dict[str, float] = {}
    with ExitStack() as stack:
        there = on_device(host, stack.enter_context(CudaDevice(setup.ordinal)))
        for backend in setup.backends:
            one = Measured()
            try:
                for place, label, policy in (
                    ("device", "consumer alone", _ONE_CACHE),
                    ("device", "producers running", {"policy": "async"}),
                    ("host", "consumer alone", _ONE_CACHE),
                ):
                    with _opened_by(setup, bundle, backend, outputs=place, **policy) as opened:
                        frames = there if place == "device" else host
                        streamed = stream(opened.session, frames, setup.frames, warmup=setup.warmup)
                        graphs = opened.session.statistics.graphs
                    name = f"{size} {label}, {backend}, {place} to {place}"
                    one.figures += percentile_figures(name, streamed.answer_ms, unit="ms")
                    one.details[name] = {**streamed.to_record(), "graphs": graphs}
                    if place == "device" and policy is _ONE_CACHE:
                        best[backend] = float(np.median(streamed.answer_ms))
                        one.notes.append(f"{backend}: answered by {_shares(streamed)}, {graphs} graphs")
            except _REFUSALS as exc:
                best.pop(backend, None)
                one = Measured(notes=[f"{backend} does not run it: {sentence(exc)}"])
            found.figures += one.figures
            found.notes += one.notes
            found.details |= one.details
    if not best:
        raise BackendError("; ".join(found.notes))
    fastest = min(best, key=lambda name: best[name])
    headline = f"{size} consumer on the device, end to end, p50, best executor ({fastest})"
    found.figures.insert(0, Figure(headline, best[fastest], REFERENCE_TARGET_MS, "ms"))
    return found


def mesh_part(setup: Setup) -> Measured:
    """From vertices on the host to a picture in bytes on the host, everything between on the GPU."""
    found = Measured()
    with ExitStack() as stack:
        bundle = _fp16_bundle(setup, setup.open_bundle(), stack)
        device = stack.enter_context(CudaDevice(setup.ordinal))
        way = stack.enter_context(closing(MeshToPicture(device, bundle, setup.drawn)))
        opened = stack.enter_context(_opened(setup, bundle, found, outputs="device"))
        position, ages = count(), []
        answer = lambda: ages.append(way.answer(opened.session, next(position)).age)  # noqa: E731
        times = timed_ms(answer, setup.frames, warmup=setup.warmup)
        size = "x".join(map(str, bundle.manifest.outputs[0].shape[2:]))
        name = f"mesh of {way.triangles} triangles to {size} picture, {opened.backend}, host to host"
        found.figures += percentile_figures(name, times, unit="ms")
        found.details[name] = {
            "answer_ms": [round(value, 5) for value in times],
            "age_mean": float(np.mean(ages[setup.warmup :])),
        }
    return found


def parity_part(setup: Setup) -> Measured:
    """Every exit of the fp16 bundle on the GPU against the fp32 bundle on the CPU, frame by frame."""
    found = Measured()
    bundle = setup.open_bundle()
    clip = as_clip(frames_for(bundle, setup.parity_frames))
    manifest = bundle.manifest
    plans: dict[str, dict[str, Any]] = {record.name: {"policy": "full"} for record in manifest.exits_of(Role.WHOLE)}
    for record in manifest.exits:
        plans.setdefault(record.name, {"age": _PARITY_AGE, "exit": record.name})
    psnr: dict[str, list[float]] = {}
    bad = dict.fromkeys(plans, 0)
    with ExitStack() as stack:
        fp16 = _fp16_bundle(setup, bundle, stack)
        for exit_, options in plans.items():
            with Engine(bundle, **options) as engine, engine.session() as session:
                expected = _images(Opened("cpu", engine, session), clip)
            with _opened(setup, fp16, found, outputs="host", **options) as opened:
                answered, backend = _images(opened, clip), opened.backend
            for (route, wanted), (same, given) in zip(expected, answered, strict=True):
                if route != same:
                    raise BackendError(f"a frame was answered by {same!r} and not by {route!r}; report this")
                broken = int((~np.isfinite(given)).sum())
                bad[exit_] += broken
                # At age 0 the plain exit answers, whichever was asked for.
                quality = 0.0 if broken else measure_frames(given, wanted, ["psnr_db"])["psnr_db"][0]
                psnr.setdefault(route, []).append(float(quality))
    for route, values in psnr.items():
        found.figures.append(
            Figure(f"fp16 against fp32, {route}, worst frame's PSNR", min(values), PARITY_TARGET_DB, "dB", True)
        )
    found.figures.append(Figure("NaN and Inf in all answers", float(sum(bad.values())), 0.0))
    found.notes.insert(0, f"{fp16.path.name} by {backend} against {bundle.path.name} by ONNX Runtime on the CPU")
    found.details = {"psnr_db": psnr, "not_finite": bad, "backend": backend}
    return found


def memory_part(setup: Setup) -> Measured:
    """What the GPU's and the process's memory grew by while frames were answered, producers running."""
    found = Measured()
    with tempfile.TemporaryDirectory() as folder:
        bundle = write_empty_bundle(Path(folder))
        cuda = CudaOptions(graphs="on")
        with (
            Engine(bundle, device=setup.device, backend=EmptyCudaBackend(), cuda=cuda) as engine,
            engine.session() as session,
        ):
            growth = _watched(setup, Opened("empty", engine, session), frames_for(bundle, 2), setup.empty_frames)
    _add_growth(found, f"{setup.empty_frames} frames of an empty consumer", growth)
    if setup.demo_frames:
        bundle = setup.open_bundle()
        frames = frames_for(bundle, setup.drawn)
        with _opened(setup, bundle, found, outputs="host", policy="async") as opened:
            growth = _watched(setup, opened, frames, setup.demo_frames)
        _add_growth(found, f"{setup.demo_frames} frames of {bundle.path.name} by {opened.backend}", growth)
    return found


def rtx_part(setup: Setup) -> Measured:
    """Whether TensorRT-RTX takes this GPU."""
    return Measured(notes=probe_rtx(setup.open_bundle(), setup.ordinal))


_PART_FUNCTIONS = (host_time_part, producers_part, reference_part, mesh_part, parity_part, memory_part, rtx_part)
PARTS: dict[str, Callable[[Setup], Measured]] = dict(zip(_PART_NAMES, _PART_FUNCTIONS, strict=True))


def _measure(setup: Setup, name: str) -> Measured:
    # Without the GPU, that is what is wrong, and not whatever a part meets first; and frames need not be drawn for it.
    CudaDevice(setup.ordinal).close()
    return PARTS[name](setup)


# Engines -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Opened:
    """An engine with one session, and what executes its modules."""

    backend: str
    engine: Engine
    session: Session


@contextmanager
def _opened_by(setup: Setup, bundle: Bundle, backend: str, *, outputs: Any, **options: Any) -> Iterator[Opened]:
    """A session by one executor; every module has run once when it is open."""
    cuda = CudaOptions(outputs=outputs, engine_cache=setup.engine_cache)
    with (
        Engine(bundle, device=setup.device, backend=choose_backend(backend, cuda), cuda=cuda, **options) as engine,
        engine.session() as session,
    ):
        yield Opened(backend, engine, session)


@contextmanager
def _opened(setup: Setup, bundle: Bundle, found: Measured, *, outputs: Any, **options: Any) -> Iterator[Opened]:
    """A session by the first executor that runs the bundle; why others do not becomes a note, once."""
    refused: list[str] = []
    with ExitStack() as stack:
        for backend in setup.backends:
            try:
                opened = stack.enter_context(_opened_by(setup, bundle, backend, outputs=outputs, **options))
            except _REFUSALS as exc:
                refused.append(f"{backend} does not run it: {sentence(exc)}")
                continue
            found.notes += [note for note in refused if note not in found.notes]
            yield opened
            return
    raise BackendError("; ".join(refused))


def _fp16_bundle(setup: Setup, bundle: Bundle, stack: ExitStack) -> Bundle:
    if setup.fp16 is not None:
        return Bundle.open(setup.fp16)
    from warpcache.export.precision.convert import PrecisionOptions, convert_bundle

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    # Without frames: parity is what is measured here, on this GPU.
    return convert_bundle(bundle, folder / "fp16.warp", options=PrecisionOptions("fp16"), frames=None)


def _images(opened: Opened, clip: Mapping[str, NDArray[Any]]) -> list[tuple[str, NDArray[np.float32]]]:
    """Exit and image [1, C, H, W] of every frame."""
    name = opened.engine.manifest.image_output
    if name is None:
        raise InputError("the bundle has no image output; parity is measured on pictures")
    return [(frame.route, np.array(frame.outputs[name], np.float32)) for frame in opened.session.render(clip)]


def _add_host_time(
    found: Measured, label: str, session: Session, frames: Any, setup: Setup, target: float | None
) -> None:
    streamed = stream(session, frames, setup.host_frames, warmup=setup.warmup)
    us = [value * 1e3 for value in streamed.answer_ms]
    found.figures += percentile_figures(label, us, unit="us", target_p50=target)
    found.details[label] = {
        "us": [round(value, 3) for value in us],
        "routes": streamed.routes,
        "graphs": session.statistics.graphs,
    }


def _bare_replay_us(device: CudaDevice, frames: int, warmup: int) -> list[float]:
    """A graph of one memset replayed and waited for: what no session can be faster than."""
    target = device.allocate(TensorSpec("replayed", INPUT.dtype, INPUT.shape))
    cuda, consumer = load(), device.stream("bare", priority="high")

    def issue() -> None:
        check(cuda.cuMemsetD8Async(target.pointer, 0, 4, consumer.stream), "clearing four bytes")

    issue()
    consumer.synchronize()
    with closing(CudaGraph.capture(consumer, issue, name="a memset")) as graph, closing(device.event()) as event:

        def replay() -> None:
            graph.launch(consumer)
            event.record(consumer)
            event.wait()

        return [1e3 * ms for ms in timed_ms(replay, frames, warmup=warmup)]


def _watched(setup: Setup, opened: Opened, frames: Any, total: int) -> Growth:
    session = opened.session
    answers, inputs = session.frames(), cycle(frames)

    def answer() -> None:
        session.submit(next(inputs))
        next(answers)

    with closing(CudaDevice(setup.ordinal)) as device:

        def read() -> tuple[int, int]:
            opened.engine.synchronize()
            gc.collect()
            free, total = device.context.memory
            return total - free, resident_bytes()

        return watch_memory(answer, read, frames=total, warmup=max(setup.warmup, total // 20))


def _add_growth(found: Measured, label: str, growth: Growth) -> None:
    found.figures += [
        Figure(f"device memory grown over {label}", growth.device_bytes / 1024, 0.0, "KiB"),
        Figure(f"host memory grown over {label}", growth.host_bytes / 1024, HOST_GROWTH_TARGET_KIB, "KiB"),
        Figure(f"the same in the second half, a frame ({label})", growth.host_bytes_a_frame, None, "B"),
    ]
    found.details[label] = growth.to_record()


def _shares(streamed: Streamed) -> str:
    return ", ".join(f"{route} ({count})" for route, count in streamed.routes.items())


@click.command(epilog="Example:  python -m benchmarks.gpu_engine --device cuda:0 --reference R.warp --json out.json")
@click.pass_context
@takes(Setup)
def main(context: click.Context, /, options: Setup) -> None:
    """Measure engines on one GPU."""
    if parse_device(options.device) is None:
        raise click.BadParameter("this measures GPUs; give --device cuda:N")
    record = device_record(options.device)
    parts = {name: partial(_measure, options, name) for name in options.asked or PARTS}
    measure_parts(context, "gpu_engine", f"Engines on {device_title(record)}", record, parts, options.json_path)


if __name__ == "__main__":
    main()

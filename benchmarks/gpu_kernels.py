"""How fast this project's kernels are on a GPU, beside the copy bandwidth measured in the same run.

    python -m benchmarks.gpu_kernels --json gpu_kernels.json

Every case moves several times the GPU's L2 cache a launch, so that memory is what is measured. Its bytes (everything
read and written once) over CUDA-event time is compared with a device-to-device copy, timed in turns with it, so that
clocks hit both alike. The rasteriser is compared by frames a second at 512x512. Each kernel's result is first compared
with its NumPy reference at a small, odd size: the speed of something wrong is worth nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import click
import numpy as np
from numpy.typing import NDArray

from benchmarks import flags
from benchmarks.gpu_arrays import Gpu
from benchmarks.kernel_checks import MAP_CHANNELS, check_change, check_image, check_raster, check_warp, smooth_grid
from benchmarks.measuring import Figure
from benchmarks.parts import Measured, device_record, device_title, measure_parts
from warpcache.engine.cuda.graph import CudaGraph
from warpcache.engine.cuda.options import parse_device
from warpcache.kernels.array import DeviceArray
from warpcache.kernels.change import ChangeMetric
from warpcache.kernels.driver import check, load
from warpcache.kernels.image import ImageKernels
from warpcache.kernels.rasterizer import MeshRasterizer
from warpcache.kernels.reference.rasterizer import Mesh
from warpcache.kernels.warp import WarpKernel
from warpcache.tasks.options import COUNT, option, takes

__all__ = ["PARTS", "Case", "Timing", "bandwidth_gb_s", "face_mesh", "main", "ratio_figures"]

RATIO_TARGET = 0.7
FPS_TARGET = 10_000.0
# How many times the L2 cache a launch moves at least.
_L2_TIMES = 8
Floats = NDArray[np.float32]


class Launchable(Protocol):
    """A launch, or several, prepared."""

    def launch(self, stream: int) -> None: ...


@dataclass(frozen=True)
class Case:
    """One kernel on arrays of some size.

    Attributes:
        name: What tables call it.
        bytes_moved: Bytes of one launch, each element read or written once.
        launch: What is timed.
        keeps: Arrays that must stay.
    """

    name: str
    bytes_moved: int
    launch: Launchable
    keeps: tuple[object, ...] = ()


@dataclass(frozen=True)
class Timing:
    """How long to measure.

    Attributes:
        size_bytes: Bytes that a launch moves, at least.
        launches: Launches between two events.
        repeats: How often that is repeated; the median counts.
        frames: Frames that the rasteriser draws between two events.
        picture: Rows and columns of the rasteriser's picture.
    """

    size_bytes: int
    launches: int = 20
    repeats: int = 7
    frames: int = 2000
    picture: int = 512


def bandwidth_gb_s(bytes_moved: int, ms: float) -> float:
    """Bytes over milliseconds, in 10^9 bytes a second."""
    return bytes_moved / ms / 1e6


def ratio_figures(
    name: str, bytes_moved: int, times_ms: Sequence[float], copy_bytes: int, copies_ms: Sequence[float]
) -> list[Figure]:
    """A kernel's bandwidth, by the medians of its times and of the copies' that they were taken in turns with."""
    achieved = bandwidth_gb_s(bytes_moved, float(np.median(times_ms)))
    copied = bandwidth_gb_s(copy_bytes, float(np.median(copies_ms)))
    return [
        Figure(f"{name}, bandwidth / copy's", achieved / copied, RATIO_TARGET, at_least=True),
        Figure(f"{name}, bandwidth", achieved, None, "GB/s"),
    ]


def measure_cases(gpu: Gpu, timing: Timing, make: Sequence[Callable[[], Case]]) -> Measured:
    """Time cases against the copy, one in memory at a time."""
    found = Measured()
    copy = copy_case(gpu, timing.size_bytes // 2)
    for build in make:
        case = build()
        works = [partial(item.launch.launch, gpu.stream.handle) for item in (copy, case)]
        copies, times = gpu.times_ms(works, timing.launches, timing.repeats)
        found.figures += ratio_figures(case.name, case.bytes_moved, times, copy.bytes_moved, copies)
        found.details[case.name] = {
            "bytes_moved": case.bytes_moved,
            "ms": times,
            "copy_bytes": copy.bytes_moved,
            "copy_ms": copies,
        }
    return found


class _Copy:
    def __init__(self, target: DeviceArray, source: DeviceArray) -> None:
        self._target, self._source = target, source
        self._cuda = load()

    def launch(self, stream: int) -> None:
        code = self._cuda.cuMemcpyDtoDAsync(
            self._target.pointer, self._source.pointer, self._source.size_bytes, self._cuda.CUstream(stream)
        )
        check(code, "copying on the GPU")


def copy_case(gpu: Gpu, size_bytes: int) -> Case:
    """A device-to-device copy that reads and writes `size_bytes` each."""
    source, target = gpu.filled((size_bytes,), "uint8"), gpu.empty((size_bytes,), "uint8")
    return Case("copy", 2 * size_bytes, _Copy(target, source), (source, target))


def copy_part(gpu: Gpu, timing: Timing) -> Measured:
    """The copy alone, which everything else is compared with."""
    copy = copy_case(gpu, timing.size_bytes)
    times = gpu.times_ms([partial(copy.launch.launch, gpu.stream.handle)], timing.launches, timing.repeats)[0]
    achieved = bandwidth_gb_s(copy.bytes_moved, float(np.median(times)))
    name = f"device-to-device copy of {timing.size_bytes / 2**20:.0f} MiB, read and written"
    details = {"bytes_moved": copy.bytes_moved, "ms": times}
    return Measured([Figure(name, achieved, None, "GB/s")], details=details)


def image_part(gpu: Gpu, timing: Timing) -> Measured:
    """uint8 [H, W, 3] to and from float16 and float32 [3, H, W]."""
    with closing(ImageKernels(gpu.context)) as kernels:
        for dtype in ("float16", "float32"):
            check_image(gpu, kernels, dtype)

        def case(way: str, dtype: str) -> Case:
            side = _side(timing.size_bytes, 3 * (1 + np.dtype(dtype).itemsize))
            pixels, image = gpu.filled((side, side, 3), "uint8"), gpu.filled((3, side, side), dtype)
            launch = kernels.prepare_load(pixels, image) if way == "load" else kernels.prepare_store(image, pixels)
            named = f"image {'uint8 to ' + dtype if way == 'load' else dtype + ' to uint8'}, 3x{side}x{side}"
            return Case(named, kernels.bytes_moved(pixels, image), launch, (pixels, image))

        return measure_cases(
            gpu,
            timing,
            [partial(case, way, dtype) for way in ("load", "store") for dtype in ("float16", "float32")],
        )


def change_part(gpu: Gpu, timing: Timing) -> Measured:
    """Two images of uint8, float16 or float32 [3, H, W] compared in blocks of 16 x 16."""
    with closing(ChangeMetric(gpu.context, block=16)) as metric:
        for dtype in ("uint8", "float16", "float32"):
            check_change(gpu, metric, dtype)

        def case(dtype: str) -> Case:
            side = _side(timing.size_bytes, 2 * 3 * np.dtype(dtype).itemsize)
            first, second = gpu.filled((3, side, side), dtype), gpu.filled((3, side, side), dtype)
            blocks, summary = gpu.empty(metric.blocks_shape(side, side), "float32"), gpu.empty((3,), "float32")
            launch = metric.prepare(first, second, blocks, summary, threshold=0.1)
            keeps = (first, second, blocks, summary)
            return Case(f"change metric {dtype}, 3x{side}x{side}", metric.bytes_moved(first), launch, keeps)

        makers = [partial(case, dtype) for dtype in ("uint8", "float16", "float32")]
        return measure_cases(gpu, timing, makers)


def warp_part(gpu: Gpu, timing: Timing) -> Measured:
    """Three maps of 16, 9 and 3 channels, float16 or float32, by one smooth grid that covers them."""
    with closing(WarpKernel(gpu.context)) as kernel:
        for dtype in ("float16", "float32"):
            check_warp(gpu, kernel, dtype)

        def case(dtype: str) -> Case:
            side = _side(timing.size_bytes, 2 * sum(MAP_CHANNELS) * np.dtype(dtype).itemsize + 8)
            sources = [gpu.filled((channels, side, side), dtype) for channels in MAP_CHANNELS]
            targets = [gpu.empty((channels, side, side), dtype) for channels in MAP_CHANNELS]
            grid = gpu.upload(smooth_grid(side, side))
            launch = kernel.prepare(sources, grid, targets, padding="border")
            channels = "+".join(map(str, MAP_CHANNELS))
            keeps = (sources, targets, grid)
            return Case(
                f"warp {dtype}, ({channels})x{side}x{side}", kernel.bytes_moved(sources, grid, targets), launch, keeps
            )

        return measure_cases(gpu, timing, [partial(case, dtype) for dtype in ("float16", "float32")])


def rasterizer_part(gpu: Gpu, timing: Timing) -> Measured:
    """Frames a second of UV, normal and mask: a face of 900 triangles, then the synthetic head's mesh."""
    from warpcache.models.head import SyntheticHead

    found = Measured()
    size = timing.picture
    head = SyntheticHead(0, size)
    vertices = next(head.vertices(parameters) for parameters in head.motion(1))
    face = face_mesh(size)
    for vertices_px, mesh, target in ((*face, FPS_TARGET), (vertices, head.mesh, None)):
        name = f"{len(mesh.triangles)} triangles at {size}x{size}"
        with closing(MeshRasterizer(gpu.context, mesh, size, size)) as rasterizer:
            points, condition = gpu.upload(vertices_px), gpu.empty((1, 6, size, size), "float32")
            launches = rasterizer.prepare_render(points, condition)
            issue = partial(launches.launch, gpu.stream.handle)
            issue()
            covered = check_raster(gpu, rasterizer, condition, vertices_px, mesh)
            with closing(CudaGraph.capture(gpu.stream, issue, name=name)) as graph:
                (graph_ms,) = gpu.times_ms([partial(graph.launch, gpu.stream)], timing.frames, timing.repeats)
            (plain_ms,) = gpu.times_ms([issue], timing.frames, timing.repeats)
        for how, times, reach in (("graph replay", graph_ms, target), ("launch by launch", plain_ms, None)):
            rate = 1e3 / float(np.median(times))
            found.figures.append(Figure(f"rasteriser, {name}, {how}", rate, reach, "frames/s", at_least=True))
        found.details[name] = {"covered": covered, "graph_ms": graph_ms, "plain_ms": plain_ms}
    return found


PARTS: dict[str, Callable[[Gpu, Timing], Measured]] = {
    "copy": copy_part,
    "image": image_part,
    "change": change_part,
    "warp": warp_part,
    "rasterizer": rasterizer_part,
}


def face_mesh(size: int, columns: int = 25, rows: int = 18) -> tuple[Floats, Mesh]:
    """A face as trackers give it: a bulging grid of `rows` x `columns` quads over most of the picture, to the camera.

    Returns:
        Vertices float32 [V, 3] in pixels and depth, and the mesh of 2 * rows * columns triangles.
    """
    v, u = np.meshgrid(np.linspace(0, 1, rows + 1), np.linspace(0, 1, columns + 1), indexing="ij")
    across, down = 2 * u - 1, 2 * v - 1
    bulge = np.sqrt(np.maximum(0, 1 - 0.45 * across**2 - 0.45 * down**2))
    # Nearer in the middle, and wider there, as a head is; the borders are left free.
    x = size * (0.5 + 0.46 * across * (0.9 + 0.1 * bulge))
    y = size * (0.5 + 0.46 * down * (0.9 + 0.1 * bulge))
    points = np.stack([x, y, -0.3 * size * bulge], -1).reshape(-1, 3).astype(np.float32)
    number = np.arange((rows + 1) * (columns + 1)).reshape(rows + 1, columns + 1)
    upper = np.stack([number[:-1, :-1], number[1:, :-1], number[:-1, 1:]], -1).reshape(-1, 3)
    lower = np.stack([number[:-1, 1:], number[1:, :-1], number[1:, 1:]], -1).reshape(-1, 3)
    uv = np.stack([u, v], -1).reshape(-1, 2).astype(np.float32)
    return points, Mesh(np.concatenate([upper, lower]).astype(np.int32), uv)


def _side(size_bytes: int, bytes_a_pixel: int) -> int:
    """Of the smallest square, in steps of 64 pixels, whose pixels take `size_bytes`."""
    return 64 * math.ceil(math.sqrt(size_bytes / bytes_a_pixel) / 64)


@dataclass(frozen=True)
class Options(flags.Recorded):
    """What is measured, and how long."""

    device: str = option("--device", default="cuda:0")
    asked: tuple[str, ...] = option("--part", "Only this; repeatable.", default=(), type=click.Choice(list(PARTS)))
    mib: float | None = option(
        "--mib", "MiB a launch moves; default: 512, or 8 x L2.", default=None, type=click.FloatRange(min=0.1)
    )
    launches: int = option("--launches", "Between two events.", default=20, type=COUNT)
    repeats: int = option("--repeats", "The median counts.", default=7, type=COUNT)
    frames: int = option("--frames", "Of the rasteriser.", default=2000, type=COUNT)
    picture: int = option("--picture", "Its rows and columns.", default=512, type=click.IntRange(min=64))


@click.command(epilog="Example:  python -m benchmarks.gpu_kernels --json gpu_kernels.json")
@click.pass_context
@takes(Options)
def main(context: click.Context, /, options: Options) -> None:
    """Measure the kernels on one GPU."""
    record = device_record(options.device)
    ordinal = parse_device(options.device)
    if ordinal is None:
        raise click.BadParameter("the kernels run on a GPU only; give --device cuda:N")
    with ExitStack() as stack:
        opened: list[Gpu] = []

        def measure(name: str) -> Measured:
            if not opened:
                opened.append(stack.enter_context(closing(Gpu(ordinal))))
            gpu = opened[0]
            size = _size_bytes(gpu.context.attribute("L2_CACHE_SIZE"), options.mib)
            found = PARTS[name](gpu, Timing(size, options.launches, options.repeats, options.frames, options.picture))
            found.details["size_bytes"] = size
            return found

        parts = {name: partial(measure, name) for name in options.asked or PARTS}
        measure_parts(context, "gpu_kernels", f"Kernels on {device_title(record)}", record, parts, options.json_path)


def _size_bytes(l2_bytes: int, mib: float | None) -> int:
    """What a launch moves: as asked, or enough that the L2 cache does not matter."""
    if mib is not None:
        return int(mib * 2**20)
    return max(512 * 2**20, _L2_TIMES * l2_bytes)


if __name__ == "__main__":
    main()

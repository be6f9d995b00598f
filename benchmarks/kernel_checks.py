"""Each kernel against its NumPy reference at a small, odd size: what is wrong is not timed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu_arrays import Gpu
from warpcache.engine.errors import WarpcacheError
from warpcache.kernels.array import DeviceArray
from warpcache.kernels.change import ChangeMetric
from warpcache.kernels.image import ImageKernels
from warpcache.kernels.rasterizer import MeshRasterizer, unpack_keys
from warpcache.kernels.reference.change import measure_change
from warpcache.kernels.reference.image import load_image, store_image
from warpcache.kernels.reference.rasterizer import Mesh, condition_raster, rasterize
from warpcache.kernels.reference.warp import warp_map
from warpcache.kernels.warp import WarpKernel

__all__ = [
    "MAP_CHANNELS",
    "WrongResult",
    "check_change",
    "check_image",
    "check_raster",
    "check_warp",
    "smooth_grid",
]

MAP_CHANNELS = (16, 9, 3)
"""Channels of the maps that are warped together."""

_SMALL = (61, 83)  # of the comparison with the references: no multiple of anything
# Two orders of the same float32 sums of up to 3 * 61 * 83 values: n * eps / 2, relative, at most; see the tests of the
# change metric. Extremes are exact.
_SUM_TOLERANCE = 3 * 61 * 83 * 2.0**-24
# Values up to 1 of three products, a root and a division, each rounded to 2^-24; see the tests of the rasteriser.
_RASTER_TOLERANCE = 6 * 2.0**-24

Floats = NDArray[np.float32]


class WrongResult(WarpcacheError):
    """A kernel's result is not its reference's, so that its speed is not measured."""


def smooth_grid(height: int, width: int) -> Floats:
    """A sampling grid [2, height, width] that moves everything a little and smoothly, as a face does."""
    y, x = np.meshgrid(
        (np.arange(height, dtype=np.float32) + 0.5) * (2 / height) - 1,
        (np.arange(width, dtype=np.float32) + 0.5) * (2 / width) - 1,
        indexing="ij",
    )
    return np.stack([x + 0.02 * np.sin(3 * y), y + 0.02 * np.cos(3 * x)]).astype(np.float32)


def _require(equal: bool, what: str) -> None:
    if not equal:
        raise WrongResult(f"{what} is not what its NumPy reference gives here, so its speed is not measured; report it")


def check_image(gpu: Gpu, kernels: ImageKernels, dtype: str) -> None:
    """To the bit, as the kernel promises."""
    pixels = np.random.default_rng(1).integers(0, 256, (*_SMALL, 3)).astype(np.uint8)
    given, image, back = gpu.upload(pixels), gpu.empty((3, *_SMALL), dtype), gpu.empty((*_SMALL, 3), "uint8")
    kernels.load(given, image, stream=gpu.stream.handle)
    kernels.store(image, back, stream=gpu.stream.handle)
    expected = load_image(pixels, dtype)
    _require(np.array_equal(gpu.download(image), expected), f"loading an image as {dtype}")
    _require(np.array_equal(gpu.download(back), store_image(expected)), f"storing an image from {dtype}")


def check_change(gpu: Gpu, metric: ChangeMetric, dtype: str) -> None:
    rng = np.random.default_rng(2)
    first, second = (
        rng.integers(0, 256, (3, *_SMALL)).astype(dtype)
        if dtype == "uint8"
        else rng.uniform(-1, 1, (3, *_SMALL)).astype(dtype)
        for _ in range(2)
    )
    given = gpu.upload(first), gpu.upload(second)
    blocks, summary = gpu.empty(metric.blocks_shape(*_SMALL), "float32"), gpu.empty((3,), "float32")
    metric.measure(*given, blocks, summary, threshold=0.1, stream=gpu.stream.handle)
    expected = measure_change(first, second, block=metric.block, threshold=0.1)
    for found, wanted in zip((gpu.download(blocks), gpu.download(summary)), expected, strict=True):
        _require(np.allclose(found, wanted, rtol=_SUM_TOLERANCE, atol=0), f"the change metric of {dtype}")


def check_warp(gpu: Gpu, kernel: WarpKernel, dtype: str) -> None:
    """To the bit, as the kernel promises."""
    rng = np.random.default_rng(3)
    maps = [rng.uniform(-1, 1, (channels, *_SMALL)).astype(dtype) for channels in MAP_CHANNELS]
    grid = smooth_grid(*_SMALL)
    sources, placed = [gpu.upload(item) for item in maps], gpu.upload(grid)
    targets = [gpu.empty(item.shape, dtype) for item in maps]
    kernel.warp(sources, placed, targets, stream=gpu.stream.handle, padding="border")
    for item, target in zip(maps, targets, strict=True):
        wanted = warp_map(item, grid, padding="border")
        _require(np.array_equal(gpu.download(target), wanted), f"the warp of {dtype} maps")


def check_raster(
    gpu: Gpu, rasterizer: MeshRasterizer, condition: DeviceArray, vertices_px: Floats, mesh: Mesh
) -> float:
    """Triangles and depths to the bit; returns the share of the picture that the mesh covers."""
    found = gpu.download(condition)[0]
    triangle, depth = unpack_keys(gpu.download(rasterizer.keys()))
    expected = rasterize(vertices_px, mesh.triangles, rasterizer.height, rasterizer.width)
    wanted = condition_raster(vertices_px, mesh, rasterizer.height, rasterizer.width, expected)
    what = f"the picture of {len(mesh.triangles)} triangles"
    _require(np.array_equal(triangle, expected.triangle) and np.array_equal(depth, expected.depth), what)
    _require(np.allclose(found, wanted, rtol=0, atol=_RASTER_TOLERANCE), what)
    return float(expected.mask.mean())

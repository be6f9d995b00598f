"""Image quality in NumPy: PSNR, SSIM, MS-SSIM, FLIP and LPIPS, and the one table of them that everybody uses.

Images are float32 [C, H, W], clips float32 [T, C, H, W], RGB in [-1, 1]. Values beyond that range are clipped first, as
a display would. Every metric is symmetric in its arguments. A clip's value is the mean over its frames; for
PSNR that is the mean of the frames' decibels, each capped at `PSNR_CAP_DB`, so that one identical frame does not make
the whole clip infinite.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendError, InputError
from .lpips import LPIPS_VARIABLE, Lpips
from .lpips import SMALLEST_SIDE as LPIPS_SMALLEST_SIDE
from .products import SINGLE_THREAD_LIMIT

__all__ = [
    "METRICS",
    "PSNR_CAP_DB",
    "Lpips",
    "Metric",
    "available_metrics",
    "flip",
    "lpips",
    "measure",
    "measure_frames",
    "ms_ssim",
    "psnr",
    "ssim",
]

Images = NDArray[Any]
Float32 = NDArray[np.float32]

PSNR_CAP_DB = 100.0
"""What an identical frame counts in a mean, in dB: below it lies all that differs by 0.001 % of the range or more."""

_TAPS = 11
_SIGMA = 1.5
_C1 = 0.01**2  # (K1 L)^2 with L = 1: images are compared on [0, 1]
_C2 = 0.03**2
_SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_MS_SSIM_SMALLEST_SIDE = (_TAPS - 1) * 2 ** (len(_SCALE_WEIGHTS) - 1) + 1


@dataclass(frozen=True)
class Metric:
    """One way to compare two images, and how to read its numbers.

    Attributes:
        name: Key in manifests, JSON and tables, with the unit where there is one.
        title: What people read.
        unit: Unit, empty where the metric has none.
        higher_is_better: Direction.
        digits: Decimals worth printing.
        channels: Channels the metric is defined for; None is any number.
        smallest_side: Least height and width in pixels.
        function: (a, b) -> value of one image pair [C, H, W] or the mean over a clip pair [T, C, H, W].
    """

    name: str
    title: str
    unit: str
    higher_is_better: bool
    digits: int
    channels: int | None
    smallest_side: int
    function: Callable[[Images, Images], float]

    def better(self, a: float, b: float) -> bool:
        """Whether value `a` is strictly better than value `b`."""
        return a > b if self.higher_is_better else a < b

    def format(self, value: float) -> str:
        """Write `value` with the decimals and the unit people expect."""
        return f"{value:.{self.digits}f}{' ' + self.unit if self.unit else ''}"


def psnr(a: Images, b: Images) -> float:
    """Peak signal-to-noise ratio in dB, peak 2 on [-1, 1] (that is, peak 1 on [0, 1]).

    Args:
        a: Image or clip.
        b: Image or clip of the same shape.

    Returns:
        Decibels; inf for two identical images. For a clip, the mean of the frames' decibels, each capped at
        `PSNR_CAP_DB`.

    Raises:
        InputError: If the shapes differ or are not [C, H, W] or [T, C, H, W].
    """
    values = _each(_psnr, a, b)
    return float(values[0]) if np.ndim(a) == 3 else float(np.minimum(values, PSNR_CAP_DB).mean())


def ssim(a: Images, b: Images) -> float:
    """Structural similarity, Gaussian window of 11 x 11 with sigma 1.5, K = (0.01, 0.03), mean over channels.

    Borders: only windows that lie wholly inside the image count (5 pixels on each side are left out), population
    covariance; both as `skimage.metrics.structural_similarity` does it with ``gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=1`` on [0, 1] images.

    Args:
        a: Image or clip, at least 11 pixels high and wide.
        b: Image or clip of the same shape.

    Returns:
        Mean similarity, at most 1.

    Raises:
        InputError: If the shapes differ, have a wrong rank or are too small.

    Source: Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to structural
    similarity", IEEE TIP 13(4), 2004.
    """
    return float(_each(_ssim, a, b, smallest_side=_TAPS).mean())


def ms_ssim(a: Images, b: Images) -> float:
    """Multi-scale structural similarity over five scales, mean over channels; equal to package pytorch-msssim.

    Halving averages 2 x 2 pixels; an odd side is padded by a zero on both ends first. Negative similarities count 0.
    Fewer scales would be another metric under the same name, so small images are refused.

    Args:
        a: Image or clip, at least 161 pixels high and wide.
        b: Image or clip of the same shape.

    Raises:
        InputError: If the shapes differ, have a wrong rank or a side is below 161 pixels.

    Source: Wang, Simoncelli, Bovik, "Multiscale structural similarity for image quality assessment", Asilomar 2003.
    """
    return float(_each(_ms_ssim, a, b, smallest_side=_MS_SSIM_SMALLEST_SIDE).mean())


def flip(a: Images, b: Images) -> float:
    """Mean LDR-FLIP, 0 (alike) to 1, at the package's default of 67 pixels per degree of visual angle.

    Args:
        a: RGB image or clip.
        b: RGB image or clip of the same shape.

    Raises:
        InputError: If the shapes differ, have a wrong rank or are not RGB.
        BackendError: If the package flip-evaluator is missing.

    Source: Andersson et al., "FLIP: a difference evaluator for alternating images", HPG 2020; package flip-evaluator.
    """
    return float(_each(_flip, a, b, channels=3).mean())


def lpips(a: Images, b: Images) -> float:
    """LPIPS v0.1 with SqueezeNet, its weights found by the environment variable WARPCACHE_LPIPS.

    Args:
        a: RGB image or clip.
        b: RGB image or clip of the same shape.

    Raises:
        InputError: If the shapes differ or do not fit, or no weights are set.
    """
    return float(_each(_lpips_with(_default_lpips()), a, b, channels=3, smallest_side=LPIPS_SMALLEST_SIDE).mean())


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        metric.name: metric
        for metric in (
            Metric("psnr_db", "PSNR", "dB", True, 2, None, 1, psnr),
            Metric("ssim", "SSIM", "", True, 4, None, _TAPS, ssim),
            Metric("ms_ssim", "MS-SSIM", "", True, 4, None, _MS_SSIM_SMALLEST_SIDE, ms_ssim),
            Metric("flip", "FLIP", "", False, 4, 3, 1, flip),
            Metric("lpips", "LPIPS", "", False, 4, 3, LPIPS_SMALLEST_SIDE, lpips),
        )
    }
)
"""Every metric by name, in the order of tables."""


def available_metrics(shape: tuple[int, ...], *, lpips: Lpips | None = None) -> tuple[str, ...]:
    """Name the metrics that can be measured on images of this shape on this machine.

    Args:
        shape: Shape of an image or a clip; the last three extents are C, H, W.
        lpips: Loaded LPIPS; without it, "lpips" is named only where WARPCACHE_LPIPS is set.
    """
    channels, height, width = shape[-3:]
    return tuple(
        metric.name
        for metric in METRICS.values()
        if metric.channels in (None, channels)
        and min(height, width) >= metric.smallest_side
        and (metric.name != "lpips" or lpips is not None or os.environ.get(LPIPS_VARIABLE))
    )


def measure(a: Images, b: Images, metrics: Iterable[str], *, lpips: Lpips | None = None) -> dict[str, float]:
    """Measure several metrics at once.

    Args:
        a: Image [C, H, W] or clip [T, C, H, W].
        b: Image or clip of the same shape.
        metrics: Names from `METRICS`.
        lpips: LPIPS to use; without it, weights are found by WARPCACHE_LPIPS where "lpips" is asked for.

    Returns:
        Name -> mean over frames, always finite: an identical frame counts `PSNR_CAP_DB`.

    Raises:
        InputError: If a name is unknown or the images do not fit.
    """
    return {name: float(values.mean()) for name, values in measure_frames(a, b, metrics, lpips=lpips).items()}


def measure_frames(
    a: Images, b: Images, metrics: Iterable[str], *, lpips: Lpips | None = None
) -> dict[str, NDArray[np.float64]]:
    """Measure several metrics for every frame.

    Args:
        a: Image [C, H, W] (one frame) or clip [T, C, H, W].
        b: Image or clip of the same shape.
        metrics: Names from `METRICS`.
        lpips: LPIPS to use; without it, weights are found by WARPCACHE_LPIPS where "lpips" is asked for.

    Returns:
        Name -> float64 [T], finite; PSNR is capped at `PSNR_CAP_DB`.

    Raises:
        InputError: If a name is unknown or the images do not fit.
    """
    result: dict[str, NDArray[np.float64]] = {}
    for name in metrics:
        if name not in METRICS:
            raise InputError(f"unknown metric {name!r}; choose from {', '.join(METRICS)}")
        metric = METRICS[name]
        if name == "lpips":
            function = _lpips_with(lpips if lpips is not None else _default_lpips())
        else:
            function = _FRAME_FUNCTIONS[name]
        values = _each(function, a, b, channels=metric.channels, smallest_side=metric.smallest_side)
        result[name] = np.minimum(values, PSNR_CAP_DB) if name == "psnr_db" else values
    return result


def _each(
    function: Callable[[Float32, Float32], float],
    a: Images,
    b: Images,
    *,
    channels: int | None = None,
    smallest_side: int = 1,
) -> NDArray[np.float64]:
    """Check a pair and apply `function` frame by frame, on clipped float32 [C, H, W] in [-1, 1]."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        raise InputError(f"images to compare have shapes {a.shape} and {b.shape}; they must be the same")
    if a.ndim not in (3, 4):
        raise InputError(f"images to compare have shape {a.shape}; expected [C, H, W] or [T, C, H, W]")
    if a.dtype.kind != "f" or b.dtype.kind != "f":
        raise InputError(f"images to compare have dtypes {a.dtype} and {b.dtype}; convert them to float32 in [-1, 1]")
    if a.size == 0:
        raise InputError(f"images to compare have shape {a.shape}, which holds nothing")
    if channels is not None and a.shape[-3] != channels:
        raise InputError(f"images to compare have {a.shape[-3]} channels; this metric needs {channels}")
    if min(a.shape[-2:]) < smallest_side:
        raise InputError(
            f"images to compare are {a.shape[-1]} x {a.shape[-2]} pixels; this metric needs at least "
            f"{smallest_side} x {smallest_side}"
        )
    if a.ndim == 3:
        a, b = a[None], b[None]
    one, minus_one = np.float32(1), np.float32(-1)
    return np.array(
        [
            function(
                np.clip(x, minus_one, one).astype(np.float32, copy=False),
                np.clip(y, minus_one, one).astype(np.float32, copy=False),
            )
            for x, y in zip(a, b, strict=True)
        ],
        dtype=np.float64,
    )


def _psnr(a: Float32, b: Float32) -> float:
    difference = (a - b).ravel()
    # Accumulated in float64: the mean of many small squares loses digits in float32. /4 takes [-1, 1] to [0, 1].
    mean_square = float(np.mean(np.square(difference, dtype=np.float64))) / 4
    return float("inf") if mean_square == 0 else float(-10 * np.log10(mean_square))


def _ssim(a: Float32, b: Float32) -> float:
    similarity, _ = _similarity(a * np.float32(0.5), b * np.float32(0.5))
    # Rounding can leave two identical images a few 1e-10 above 1.
    return min(1.0, float(similarity.mean(dtype=np.float64)))


def _ms_ssim(a: Float32, b: Float32) -> float:
    # To [0, 1] at once: halving pads odd sides by zeros, and that zero must be black.
    x, y = (a + 1) * np.float32(0.5), (b + 1) * np.float32(0.5)
    product = np.ones(a.shape[0], np.float64)
    for scale, weight in enumerate(_SCALE_WEIGHTS):
        if scale:
            x, y = _halve(x), _halve(y)
        similarity, structure = _similarity(x - np.float32(0.5), y - np.float32(0.5))
        last = scale == len(_SCALE_WEIGHTS) - 1
        term = (similarity if last else structure).mean(axis=(1, 2), dtype=np.float64)
        product *= np.maximum(term, 0) ** weight
    return min(1.0, float(product.mean()))


def _similarity(x: Float32, y: Float32) -> tuple[Float32, Float32]:
    """SSIM map and its contrast-structure factor of two images [C, H, W] on [-0.5, 0.5].

    The images come centred on 0 rather than on [0, 1]: variances do not mind, and E[x^2] - E[x]^2 cancels far less in
    float32 around 0. The luminance term puts the 0.5 back.
    """
    mean_x, mean_y, mean_squares, mean_product = _blur(np.stack([x, y, x * x + y * y, x * y]))
    structure = 2 * (mean_product - mean_x * mean_y) + np.float32(_C2)
    structure /= mean_squares - mean_x * mean_x - mean_y * mean_y + np.float32(_C2)
    mean_x += np.float32(0.5)
    mean_y += np.float32(0.5)
    luminance = 2 * mean_x * mean_y + np.float32(_C1)
    luminance /= mean_x * mean_x + mean_y * mean_y + np.float32(_C1)
    return luminance * structure, structure


_BLOCK = 16
# Lines in one product: [16, 26] by [26, lines] stays below the size at which BLAS calls its threads.
_LINES = SINGLE_THREAD_LIMIT // (_BLOCK * (_BLOCK + _TAPS - 1))


@cache
def _blur_matrix() -> Float32:
    """Toeplitz matrix [16, 26] whose rows hold the window: 16 outputs from the 26 inputs they need."""
    offsets = np.arange(_TAPS) - _TAPS // 2
    window = np.exp(-0.5 * (offsets / _SIGMA) ** 2)
    window /= window.sum()
    matrix = np.zeros((_BLOCK, _BLOCK + _TAPS - 1), np.float32)
    for row in range(_BLOCK):
        matrix[row, row : row + _TAPS] = window
    return matrix


def _blur(x: Float32) -> Float32:
    """Gaussian window over the last two axes, windows wholly inside only: [..., H, W] -> [..., H - 10, W - 10].

    A separable filter as small products with a banded matrix: they take 1.0 ms where a sum of 11 shifted arrays takes
    3.7 ms (four planes of 3 x 256 x 256, one core), and no longer when other processes have the cores (`products`).
    """
    *_, height, width = x.shape
    matrix = _blur_matrix()
    margin = _TAPS - 1
    flat = np.ascontiguousarray(x).reshape(-1, height, width)
    down = np.empty((flat.shape[0], height - margin, width), np.float32)
    for top in range(0, height - margin, _BLOCK):
        rows = slice(top, min(top + _BLOCK, height - margin))
        needed = slice(top, rows.stop + margin)
        band = matrix[: rows.stop - top, : needed.stop - top]
        for left in range(0, width, _LINES):
            lines = slice(left, left + _LINES)
            np.matmul(band, flat[:, needed, lines], out=down[:, rows, lines])
    across = np.empty((flat.shape[0], height - margin, width - margin), np.float32)
    for left in range(0, width - margin, _BLOCK):
        columns = slice(left, min(left + _BLOCK, width - margin))
        needed = slice(left, columns.stop + margin)
        band = matrix[: columns.stop - left, : needed.stop - left].T
        for top in range(0, height - margin, _LINES):
            lines = slice(top, top + _LINES)
            np.matmul(down[:, lines, needed], band, out=across[:, lines, columns])
    return across.reshape(*x.shape[:-2], height - margin, width - margin)


def _halve(x: Float32) -> Float32:
    """Average of 2 x 2 pixels; an odd side gets a zero on both ends first (what pytorch-msssim does)."""
    rows, columns = (extent % 2 for extent in x.shape[-2:])
    if rows or columns:
        x = np.pad(x, [(0, 0), (rows, rows), (columns, columns)])
    height, width = x.shape[-2] // 2 * 2, x.shape[-1] // 2 * 2
    x = x[:, :height, :width]
    return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) * np.float32(0.25)


def _flip(a: Float32, b: Float32) -> float:
    try:
        # At first use: the package is native code, and only those who measure FLIP should pay for it.
        from flip_evaluator import evaluate
    except ImportError as error:
        raise BackendError(
            f'FLIP needs the package flip-evaluator ({error}); run "pip install flip-evaluator"'
        ) from error
    reference, test = (np.ascontiguousarray(((x + 1) * np.float32(0.5)).transpose(1, 2, 0)) for x in (b, a))
    _, mean, _ = evaluate(reference, test, "LDR", applyMagma=False)
    return float(mean)


def _lpips_with(network: Lpips) -> Callable[[Float32, Float32], float]:
    return lambda a, b: float(network(a, b)[0])


def _default_lpips() -> Lpips:
    path = os.environ.get(LPIPS_VARIABLE)
    return _load_lpips(path) if path else Lpips.load()  # the latter raises, and says what to set


@lru_cache(maxsize=1)
def _load_lpips(path: str) -> Lpips:
    return Lpips.load(path)


_FRAME_FUNCTIONS: Mapping[str, Callable[[Float32, Float32], float]] = MappingProxyType(
    {"psnr_db": _psnr, "ssim": _ssim, "ms_ssim": _ms_ssim, "flip": _flip}
)

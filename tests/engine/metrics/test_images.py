"""Metrics against independent references: scikit-image, pytorch-msssim, flip-evaluator, and hand-made cases."""

from __future__ import annotations

import math
import subprocess
import sys

import flip_evaluator
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pytorch_msssim import ms_ssim as reference_ms_ssim
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from warpcache.engine.errors import InputError
from warpcache.engine.metrics import images as quality
from warpcache.engine.metrics.images import METRICS, PSNR_CAP_DB, available_metrics, measure, measure_frames

Images = NDArray[np.float32]

# Float32 sums of about 100 products in another order than the reference's, divided by C2 = 9e-4: 1e-7 / 9e-4 is 1e-4 at
# one flat pixel, and averages out over ten thousand of them; measured 3e-8 on textured images, 2e-6 on flat ones.
SIMILARITY_TOLERANCE = 1e-5


def pair(height: int, width: int, *, channels: int = 3, noise: float = 0.1, seed: int = 0) -> tuple[Images, Images]:
    """A blocky picture and the same with noise, [C, H, W] in [-1, 1]."""
    rng = np.random.default_rng(seed)
    blocks = rng.normal(size=(channels, height // 8 + 1, width // 8 + 1))
    a = np.tanh(np.kron(blocks, np.ones((8, 8)))[:, :height, :width]).astype(np.float32)
    b = np.clip(a + rng.normal(size=a.shape) * noise, -1, 1).astype(np.float32)
    return a, b


def unit(x: Images) -> NDArray[np.float64]:
    return (x.astype(np.float64) + 1) / 2


def test_psnr_equals_scikit_image() -> None:
    a, b = pair(40, 31)
    expected = peak_signal_noise_ratio(unit(a), unit(b), data_range=1)
    assert quality.psnr(a, b) == pytest.approx(expected, rel=1e-6)  # float32 differences, eps 1.2e-7


def test_psnr_of_a_known_difference() -> None:
    a = np.zeros((1, 4, 4), np.float32)
    # 0.2 of the range of 2 is 0.1 of the unit range: -20 log10 0.1 = 20 dB. Float32 holds 0.2 to 1.5e-8.
    assert quality.psnr(a, a + np.float32(0.2)) == pytest.approx(20, abs=1e-5)


def test_psnr_of_identical_images_is_infinite_and_capped_in_means() -> None:
    a, b = pair(16, 16)
    assert quality.psnr(a, a) == math.inf
    assert measure(a, a, ["psnr_db"]) == {"psnr_db": PSNR_CAP_DB}
    clip_mean = quality.psnr(np.stack([a, a]), np.stack([a, b]))
    assert clip_mean == pytest.approx((PSNR_CAP_DB + quality.psnr(a, b)) / 2)


@pytest.mark.parametrize("size", [(11, 11), (64, 80), (75, 74), (133, 90)])
@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_equals_scikit_image(size: tuple[int, int], channels: int) -> None:
    a, b = pair(*size, channels=channels)
    expected = structural_similarity(
        unit(a),
        unit(b),
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=1,
        channel_axis=0,
    )
    assert quality.ssim(a, b) == pytest.approx(expected, abs=SIMILARITY_TOLERANCE)


@pytest.mark.parametrize("level", [-0.999, 0.0, 0.999])
def test_ssim_of_flat_images_survives_float32(level: float) -> None:
    """Flat images are where E[x^2] - E[x]^2 cancels; on [0, 1] instead of around 0 this fails for bright ones."""
    a = np.full((3, 40, 40), level, np.float32)
    b = (a + np.random.default_rng(0).normal(size=a.shape) * 2e-3).astype(np.float32)
    clipped = np.clip(b, -1, 1)
    expected = structural_similarity(
        unit(a),
        unit(clipped),
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=1,
        channel_axis=0,
    )
    assert quality.ssim(a, b) == pytest.approx(expected, abs=SIMILARITY_TOLERANCE)


@pytest.mark.parametrize("size", [(161, 161), (176, 203), (190, 167)])
def test_ms_ssim_equals_pytorch_msssim(size: tuple[int, int]) -> None:
    a, b = pair(*size)
    expected = reference_ms_ssim(torch.tensor(unit(a))[None], torch.tensor(unit(b))[None], data_range=1).item()
    assert quality.ms_ssim(a, b) == pytest.approx(expected, abs=SIMILARITY_TOLERANCE)


def test_ms_ssim_refuses_small_images_and_names_the_least_size() -> None:
    a, b = pair(160, 200)
    with pytest.raises(InputError, match=r"images to compare are 200 x 160 pixels; this metric needs at least 161 x"):
        quality.ms_ssim(a, b)


def test_flip_is_the_packages_mean_on_rgb_in_channel_last_order() -> None:
    a, b = pair(24, 32)
    reference, test = ((x.transpose(1, 2, 0) + 1) / 2 for x in (b, a))
    _, expected, parameters = flip_evaluator.evaluate(
        np.ascontiguousarray(reference), np.ascontiguousarray(test), "LDR", applyMagma=False
    )
    assert parameters["ppd"] == pytest.approx(67, abs=0.1)
    # The same code on inputs that differ by one float32 rounding at most.
    assert quality.flip(a, b) == pytest.approx(expected, rel=1e-5)
    red, blue = np.full((2, 3, 16, 16), -1, np.float32)
    red[0], blue[2] = 1, 1
    assert quality.flip(red, blue) > 0.5 > quality.flip(a, b)


def test_flip_is_not_paid_for_until_it_is_used() -> None:
    code = (
        "import sys, warpcache.engine.metrics.images; print(any(m.startswith('flip_evaluator') for m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_values_beyond_the_range_are_clipped_as_on_a_display() -> None:
    a, b = pair(20, 20)
    wild = np.where(b >= 1, 7, b).astype(np.float32)
    wild[0, 0, 0], b[0, 0, 0] = 3, 1
    for name in ("psnr_db", "ssim", "flip"):
        assert measure(a, wild, [name]) == measure(a, b, [name])


def test_a_clips_value_is_the_mean_of_its_frames() -> None:
    pairs = [pair(24, 24, noise=noise, seed=seed) for seed, noise in enumerate((0.02, 0.1, 0.3))]
    a, b = (np.stack(side) for side in zip(*pairs, strict=True))
    names = ["psnr_db", "ssim", "flip"]
    frames = measure_frames(a, b, names)
    for name in names:
        single = [measure(x, y, [name])[name] for x, y in pairs]
        assert frames[name].tolist() == single
        assert measure(a, b, [name])[name] == pytest.approx(np.mean(single))
        assert METRICS[name].function(a, b) == pytest.approx(np.mean(single))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), noise=st.floats(0.01, 1.0))
def test_metrics_know_identity_symmetry_and_direction(seed: int, noise: float) -> None:
    a, b = pair(24, 20, noise=noise, seed=seed)
    _, worse = pair(24, 20, noise=noise * 4, seed=seed)
    for name in ("psnr_db", "ssim", "flip"):
        metric = METRICS[name]
        same, near, far = (measure(a, other, [name])[name] for other in (a, b, worse))
        assert same == {"psnr_db": PSNR_CAP_DB, "ssim": pytest.approx(1, abs=1e-6), "flip": 0}[name]
        assert measure(b, a, [name])[name] == pytest.approx(near, rel=1e-5)  # float32, sums in another order
        assert metric.better(same, near)
        assert metric.better(near, far)
        assert not metric.better(near, near)


def test_available_metrics_follow_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WARPCACHE_LPIPS", raising=False)
    assert available_metrics((3, 256, 256)) == ("psnr_db", "ssim", "ms_ssim", "flip")
    assert available_metrics((10, 3, 128, 128)) == ("psnr_db", "ssim", "flip")
    assert available_metrics((1, 128, 128)) == ("psnr_db", "ssim")
    assert available_metrics((3, 8, 8)) == ("psnr_db", "flip")
    monkeypatch.setenv("WARPCACHE_LPIPS", "somewhere.safetensors")
    assert "lpips" in available_metrics((3, 128, 128))
    assert "lpips" not in available_metrics((3, 16, 16))


@pytest.mark.parametrize(
    ("a", "b", "opening"),
    [
        (np.zeros((3, 20, 20), "f4"), np.zeros((3, 20, 21), "f4"), r"images to compare have shapes \(3, 20, 20\)"),
        (np.zeros((20, 20), "f4"), np.zeros((20, 20), "f4"), r"images to compare have shape \(20, 20\); expected"),
        (np.zeros((3, 20, 20), "u1"), np.zeros((3, 20, 20), "u1"), "images to compare have dtypes uint8 and uint8"),
        (np.zeros((0, 3, 20, 20), "f4"), np.zeros((0, 3, 20, 20), "f4"), r"images to compare have shape \(0, 3"),
        (np.zeros((3, 20, 10), "f4"), np.zeros((3, 20, 10), "f4"), "images to compare are 10 x 20 pixels"),
    ],
)
def test_ssim_refuses_what_it_cannot_compare(a: Images, b: Images, opening: str) -> None:
    with pytest.raises(InputError, match=opening):
        quality.ssim(a, b)


def test_flip_refuses_what_is_not_rgb_and_measure_refuses_unknown_names() -> None:
    grey = np.zeros((1, 20, 20), np.float32)
    with pytest.raises(InputError, match="images to compare have 1 channels; this metric needs 3"):
        quality.flip(grey, grey)
    with pytest.raises(InputError, match="unknown metric 'vmaf'; choose from psnr_db, ssim, ms_ssim, flip, lpips"):
        measure(grey, grey, ["vmaf"])


def test_metrics_are_worded_with_their_unit() -> None:
    assert METRICS["psnr_db"].format(31.4159) == "31.42 dB"
    assert METRICS["flip"].format(0.03) == "0.0300"

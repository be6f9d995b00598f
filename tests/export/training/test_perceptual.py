"""LPIPS as a training loss is the runtime's metric, and teaches only the answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from warpcache.engine.errors import InputError
from warpcache.engine.metrics.lpips import Lpips
from warpcache.export.training.perceptual import PerceptualLoss

# in -> squeeze -> expand twice, by index among torchvision's `squeezenet1_1().features`
FIRES = {
    3: (64, 16, 64),
    4: (128, 16, 64),
    6: (128, 32, 128),
    7: (256, 32, 128),
    9: (256, 48, 192),
    10: (384, 48, 192),
    11: (384, 64, 256),
    12: (512, 64, 256),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file of the right names and shapes: random, scaled so that every layer keeps a range near 1."""
    rng = np.random.default_rng(11)

    def convolution(out: int, channels: int, side: int) -> np.ndarray:
        scale = np.sqrt(2 / (channels * side * side))
        return (rng.standard_normal((out, channels, side, side)) * scale).astype(np.float32)

    arrays = {"features.0.weight": convolution(64, 3, 3), "features.0.bias": rng.normal(0, 0.1, 64).astype(np.float32)}
    for index, (channels, squeeze, expand) in FIRES.items():
        for part, shape in (
            ("squeeze", (squeeze, channels, 1)),
            ("expand1x1", (expand, squeeze, 1)),
            ("expand3x3", (expand, squeeze, 3)),
        ):
            arrays[f"features.{index}.{part}.weight"] = convolution(*shape)
            arrays[f"features.{index}.{part}.bias"] = rng.normal(0, 0.1, shape[0]).astype(np.float32)
    for k, channels in enumerate((64, 128, 256, 384, 384, 512, 512)):
        arrays[f"lin{k}.weight"] = rng.uniform(0, 1, (1, channels, 1, 1)).astype(np.float32)
    path = tmp_path_factory.mktemp("lpips") / "random.safetensors"
    save_file(arrays, path)
    return path


def images(seed: int, count: int = 2, height: int = 33, width: int = 40) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# 33 x 40 and 18 x 17: poolings whose last window hangs over the border, on each axis.
@pytest.mark.parametrize(("height", "width"), [(33, 40), (18, 17), (32, 32)])
def test_loss_is_the_mean_of_the_metric(weights: Path, height: int, width: int) -> None:
    a, b = images(1, 3, height, width), images(2, 3, height, width)
    expected = Lpips.load(weights)(a.numpy(), b.numpy())
    got = PerceptualLoss(weights)(a, b)
    assert got.shape == ()
    assert expected.min() > 0.1
    # Two orders of summation through 18 convolutions of up to 576 products in float32: sqrt(576) * 18 * 2^-24 = 3e-5.
    np.testing.assert_allclose(float(got), expected.mean(), rtol=1e-4)


def test_identical_images_have_no_distance(weights: Path) -> None:
    a = images(3)
    assert float(PerceptualLoss(weights)(a, a.clone())) == 0
    # A layer that is dead in both (all zero) has no direction; it must not become NaN.
    black = torch.full_like(a, -1)
    assert torch.isfinite(PerceptualLoss(weights)(black, a))


def test_only_the_first_argument_is_taught(weights: Path) -> None:
    loss = PerceptualLoss(weights)
    a, b = images(4).requires_grad_(), images(5).requires_grad_()
    loss(a, b).backward()
    assert b.grad is None
    assert a.grad is not None
    assert a.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in loss.parameters())
    # The direction is right: a small step against the gradient makes the distance smaller, by about as much as the
    # gradient says (first order: within a tenth for a step this small).
    before = float(loss(a, b).detach())
    step = 1e-3 / float(a.grad.norm())
    with torch.no_grad():
        after = float(loss(a - step * a.grad, b))
    np.testing.assert_allclose(before - after, step * float(a.grad.square().sum()), rtol=0.1)


def test_wrong_weights_are_refused(tmp_path: Path, weights: Path) -> None:
    with pytest.raises(InputError, match=r"^LPIPS weights .* do not exist"):
        PerceptualLoss(tmp_path / "nothing.safetensors")
    half = tmp_path / "half.safetensors"
    half.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"^LPIPS weights .* cannot be read"):
        PerceptualLoss(half)
    save_file({"features.0.weight": np.zeros((64, 3, 3, 3), np.float32)}, half)
    with pytest.raises(InputError, match=r"^LPIPS weights lack 'features\.0\.bias'"):
        PerceptualLoss(half)

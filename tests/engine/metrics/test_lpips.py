"""LPIPS in NumPy against the network written in torch here, and against published values where weights are at hand."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.numpy import save_file

from warpcache.engine.errors import InputError
from warpcache.engine.metrics import images as quality
from warpcache.engine.metrics.lpips import LPIPS_FILE, LPIPS_VARIABLE, Lpips

Images = NDArray[np.float32]
Weights = dict[str, Images]

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
CHANNELS = (64, 128, 256, 384, 384, 512, 512)
# About ten layers of float32 sums of up to 2304 products, sqrt(2304) * 6e-8 = 3e-6 each and partly averaged out over
# pixels and channels; measured at most 4e-7.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def weights() -> Weights:
    """Random weights whose activations neither die nor explode (He), linear heads of one sign as the real ones."""
    rng = np.random.default_rng(7)
    found: Weights = {}

    def convolution(name: str, channels: int, outputs: int, side: int) -> None:
        scale = np.sqrt(2 / (channels * side * side))
        found[f"{name}.weight"] = (rng.normal(size=(outputs, channels, side, side)) * scale).astype(np.float32)
        found[f"{name}.bias"] = (rng.normal(size=outputs) * 0.1).astype(np.float32)

    convolution("features.0", 3, 64, 3)
    for index, (channels, squeeze, expand) in FIRES.items():
        convolution(f"features.{index}.squeeze", channels, squeeze, 1)
        convolution(f"features.{index}.expand1x1", squeeze, expand, 1)
        convolution(f"features.{index}.expand3x3", squeeze, expand, 3)
    for tap, channels in enumerate(CHANNELS):
        found[f"lin{tap}.weight"] = np.abs(rng.normal(size=(1, channels, 1, 1))).astype(np.float32)
    return found


def torch_lpips(weights: Weights, a: Images, b: Images) -> NDArray[np.float64]:
    """LPIPS as the package lpips computes it, from torch's own operators, in float64."""
    w = {name: torch.tensor(array, dtype=torch.float64) for name, array in weights.items()}

    def taps(x: torch.Tensor) -> list[torch.Tensor]:
        shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64)[:, None, None]
        scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64)[:, None, None]
        x = (x - shift) / scale
        found = []
        for index in range(13):
            if index == 0:
                x = F.conv2d(x, w["features.0.weight"], w["features.0.bias"], stride=2)
            elif index == 1:
                x = F.relu(x)
            elif index in (2, 5, 8):
                x = F.max_pool2d(x, 3, 2, ceil_mode=True)
            else:
                name = f"features.{index}"
                s = F.relu(F.conv2d(x, w[f"{name}.squeeze.weight"], w[f"{name}.squeeze.bias"]))
                one = F.relu(F.conv2d(s, w[f"{name}.expand1x1.weight"], w[f"{name}.expand1x1.bias"]))
                three = F.relu(F.conv2d(s, w[f"{name}.expand3x3.weight"], w[f"{name}.expand3x3.bias"], padding=1))
                x = torch.cat([one, three], 1)
            if index in (1, 4, 7, 9, 10, 11, 12):
                found.append(x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    total = torch.zeros(len(a), dtype=torch.float64)
    for tap, (x, y) in enumerate(zip(taps(torch.tensor(a).double()), taps(torch.tensor(b).double()), strict=True)):
        total += F.conv2d((x - y).pow(2), w[f"lin{tap}.weight"]).mean((1, 2, 3))
    return total.numpy()


def images(count: int, height: int, width: int, seed: int) -> Images:
    return np.random.default_rng(seed).uniform(-1, 1, (count, 3, height, width)).astype(np.float32)


@pytest.mark.parametrize("size", [(17, 17), (18, 31), (33, 20), (64, 64), (45, 70)])
def test_lpips_equals_the_torch_network_at_odd_and_even_sizes(weights: Weights, size: tuple[int, int]) -> None:
    a, b = images(2, *size, seed=1), images(2, *size, seed=2)
    found = Lpips(weights)(a, b)
    assert found.shape == (2,)
    np.testing.assert_allclose(found, torch_lpips(weights, a, b), rtol=TOLERANCE)


def test_a_changed_weight_shows(weights: Weights) -> None:
    """The comparison above can fail: one kernel of one late layer turned upside down is far outside its tolerance."""
    a, b = images(1, 33, 33, seed=1), images(1, 33, 33, seed=2)
    altered = dict(weights)
    altered["features.11.expand3x3.weight"] = weights["features.11.expand3x3.weight"][:, :, ::-1].copy()
    difference = Lpips(altered)(a, b) / torch_lpips(weights, a, b) - 1
    assert np.abs(difference).max() > 100 * TOLERANCE


def test_features_are_reusable_and_one_image_compares_with_many(weights: Weights) -> None:
    lpips = Lpips(weights)
    a, b = images(1, 40, 32, seed=3), images(3, 40, 32, seed=4)
    kept = lpips.features(a[0])
    found = lpips.distance(kept, lpips.features(b))
    # One product of a batch and of one image may add up in another order, in float64.
    assert found == pytest.approx([lpips(a[0], other)[0] for other in b], rel=1e-12)
    assert lpips.distance(kept, kept).tolist() == [0.0]
    # Unit length over channels, to the rounding of up to 512 float32 squares; a pixel whose features are all 0 stays 0.
    for maps in kept:
        length = np.sqrt((maps.astype(np.float64) ** 2).sum(1))
        assert np.all((np.abs(length - 1) < 1e-5) | (length == 0))


def test_distance_of_images_that_do_not_fit_is_refused(weights: Weights) -> None:
    lpips = Lpips(weights)
    small, large = lpips.features(images(1, 32, 32, seed=0)), lpips.features(images(1, 48, 32, seed=0))
    with pytest.raises(InputError, match="LPIPS features have shapes"):
        lpips.distance(small, large)
    with pytest.raises(InputError, match="LPIPS features have shapes"):
        lpips.distance(lpips.features(images(2, 32, 32, seed=0)), lpips.features(images(3, 32, 32, seed=0)))
    with pytest.raises(InputError, match="images to compare have shapes"):
        lpips(images(1, 32, 32, seed=0), images(1, 32, 33, seed=0))
    with pytest.raises(InputError, match="images for LPIPS are 32 x 16 pixels; it needs at least 17 x 17"):
        lpips.features(images(1, 16, 32, seed=0))
    with pytest.raises(InputError, match="images for LPIPS have shape"):
        lpips.features(np.zeros((1, 32, 32), np.float32))


def test_weights_come_from_a_path_a_folder_or_the_variable(
    weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / LPIPS_FILE
    save_file(weights, file)
    a, b = images(2, 24, 24, seed=5)
    expected = Lpips(weights)(a, b)[0]
    assert Lpips.load(file)(a, b)[0] == expected
    assert Lpips.load(tmp_path)(a, b)[0] == expected
    monkeypatch.setenv(LPIPS_VARIABLE, str(file))
    assert Lpips.load()(a, b)[0] == expected
    assert quality.lpips(a, b) == expected
    assert quality.measure(a, b, ["lpips"]) == {"lpips": expected}
    monkeypatch.delenv(LPIPS_VARIABLE)
    assert quality.measure(a, b, ["lpips"], lpips=Lpips(weights)) == {"lpips": expected}


def test_missing_weights_say_which_option_and_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LPIPS_VARIABLE, raising=False)
    with pytest.raises(InputError, match=r"LPIPS needs its weights: give the path .* --lpips .* WARPCACHE_LPIPS"):
        Lpips.load()
    a = np.zeros((3, 20, 20), np.float32)
    with pytest.raises(InputError, match="LPIPS needs its weights"):
        quality.measure(a, a, ["lpips"])
    with pytest.raises(InputError, match=r"LPIPS weights '.*none.safetensors' do not exist"):
        Lpips.load(tmp_path / "none.safetensors")


def test_damaged_and_foreign_weights_are_refused(weights: Weights, tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"not safetensors at all")
    with pytest.raises(InputError, match=r"LPIPS weights '.*' cannot be read"):
        Lpips.load(file)
    save_file(weights, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"LPIPS weights '.*' cannot be read"):
        Lpips.load(file)
    with pytest.raises(InputError, match=r"LPIPS weights lack 'lin3.weight'"):
        Lpips({name: array for name, array in weights.items() if name != "lin3.weight"})
    with pytest.raises(InputError, match=r"LPIPS weight 'features.0.bias' is float64"):
        Lpips(weights | {"features.0.bias": weights["features.0.bias"].astype(np.float64)})  # type: ignore[arg-type]


@pytest.mark.skipif(not os.environ.get(LPIPS_VARIABLE), reason=f"{LPIPS_VARIABLE} does not name the published weights")
def test_known_answers_of_the_published_weights() -> None:
    """Values that torchmetrics documents for net_type="squeeze", to the four digits they are given with."""
    lpips = Lpips.load()
    generator = torch.Generator().manual_seed(42)
    a, b = ((torch.rand(2, 3, 100, 100, generator=generator) * 2 - 1).numpy() for _ in range(2))
    np.testing.assert_allclose(lpips(a, b), [0.1024, 0.0938], atol=5e-5)
    generator = torch.Generator().manual_seed(123)
    a, b = ((torch.rand(10, 3, 100, 100, generator=generator) * 2 - 1).numpy() for _ in range(2))
    assert lpips(a, b).mean() == pytest.approx(0.1008, abs=5e-5)

"""Training a reference generator: it learns, it is the same for a seed, and takes both kinds of truth."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from warpcache.models.training import train_renderer

SIZE = 8


class Tinting(nn.Module):
    """One convolution and tanh, enough for a target that is a tint of the condition."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.conv = nn.Conv2d(6, 3, 1)

    def forward(self, condition: Tensor) -> Tensor:
        return torch.tanh(self.conv(condition))


@pytest.fixture
def clip() -> dict[str, np.ndarray]:
    """Six frames whose truth is a function that `Tinting` can take."""
    rng = np.random.default_rng(1)
    condition = rng.uniform(-1, 1, (6, 6, SIZE, SIZE)).astype(np.float32)
    mix = rng.normal(0, 0.7, (3, 6))
    truth = np.tanh(np.einsum("oc,tchw->tohw", mix, condition)).astype(np.float32)
    return {"condition": condition, "truth": truth}


def loss_of(model: nn.Module, clip: dict[str, np.ndarray]) -> float:
    """Mean absolute error over the whole clip, in NumPy."""
    with torch.no_grad():
        images = model(torch.from_numpy(clip["condition"])).numpy()
    return float(np.abs(images - clip["truth"]).mean())


def test_training_finds_the_function(clip: dict[str, np.ndarray]) -> None:
    model = Tinting()
    before = loss_of(model, clip)
    told: list[tuple[int, float]] = []
    trained = train_renderer(model, clip, steps=150, peak_rate=0.1, on_step=lambda *step: told.append(step))
    assert trained is model
    assert not trained.training
    # The target is in reach; what is left is the last steps' noise and bfloat16, whose steps are 2^-8 = 0.004.
    assert before > 0.3
    assert loss_of(model, clip) < 0.03
    assert [step for step, _ in told] == list(range(150))
    assert np.mean([loss for _, loss in told[-10:]]) < 0.1 * told[0][1]


def test_a_seed_makes_the_weights(clip: dict[str, np.ndarray]) -> None:
    def weights(seed: int) -> Tensor:
        return train_renderer(Tinting(), clip, steps=5, seed=seed).conv.weight.detach()

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_truth_in_bytes_is_truth_in_floats(clip: dict[str, np.ndarray]) -> None:
    in_bytes = np.round((clip["truth"] + 1) * 127.5).astype(np.uint8)
    as_floats = (in_bytes.astype(np.float64) / 127.5 - 1).astype(np.float32)
    one, other = Tinting(), Tinting()
    train_renderer(one, {**clip, "truth": in_bytes}, steps=4)
    train_renderer(other, {**clip, "truth": as_floats}, steps=4)
    # The bytes are converted in float32, which rounds at 2^-24 of values up to 1; Adam's steps hardly see it.
    torch.testing.assert_close(one.conv.weight, other.conv.weight, atol=1e-5, rtol=0)
    wrong = Tinting()
    train_renderer(wrong, {**clip, "truth": -as_floats}, steps=4)
    assert (wrong.conv.weight - one.conv.weight).abs().max() > 1e-3


def test_the_clip_is_left_as_it_was(clip: dict[str, np.ndarray]) -> None:
    kept = copy.deepcopy(clip)
    train_renderer(Tinting(), clip, steps=2)
    for name, array in kept.items():
        np.testing.assert_array_equal(clip[name], array)

"""The deferred renderer: what its channels mean, how the texture is read, and which sizes it takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from warpcache.models.renderer import CONDITION_CHANNELS, DeferredNeuralRenderer

SIZE = 16


def small(seed: int = 0) -> DeferredNeuralRenderer:
    torch.manual_seed(seed)
    return DeferredNeuralRenderer(SIZE, (8, 8, 16), texture_channels=4, texture_size=8).eval()


def condition(seed: int = 0, frames: int = 1) -> Tensor:
    """Random UV and normals under a mask of ones and zeros."""
    rng = torch.Generator().manual_seed(seed)
    mask = (torch.rand(frames, 1, SIZE, SIZE, generator=rng) > 0.4).float()
    uv = torch.rand(frames, 2, SIZE, SIZE, generator=rng)
    normal = torch.rand(frames, 3, SIZE, SIZE, generator=rng) * 2 - 1
    return torch.cat([uv * mask, normal * mask, mask], 1)


def first_layer_input(model: DeferredNeuralRenderer, x: Tensor) -> Tensor:
    """What the U-Net is fed with."""
    seen: list[Tensor] = []
    handle = model.down[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]


@torch.no_grad()
def test_images_have_the_sizes_and_the_range() -> None:
    model = small()
    images = model(condition(frames=3))
    assert images.shape == (3, 3, SIZE, SIZE)
    assert images.dtype == torch.float32
    assert images.abs().max() < 1
    # Not merely within the range: it answers the condition, and each frame by itself.
    assert (images[0] - images[1]).abs().mean() > 0.01
    # The same sums in another order where a batch is blocked differently; normalised layers keep values near 1.
    torch.testing.assert_close(model(condition(frames=3)[1:2])[0], images[1], atol=1e-5, rtol=0)


def test_texture_is_read_at_uv_under_the_mask() -> None:
    model, x = small(), condition(1)
    fed = first_layer_input(model, x)[0].numpy()
    texture = model.texture.detach()[0].numpy().astype(np.float64)
    channels, rows, columns = texture.shape
    u, v, mask = (x[0, k].numpy().astype(np.float64) for k in (0, 1, 5))
    expected = np.zeros((channels, SIZE, SIZE))
    for row in range(SIZE):
        for column in range(SIZE):
            if not mask[row, column]:
                continue
            # Texel centres lie at (k + 0.5) / size; reads beyond the outermost centre take the border's texel.
            at_x = min(max(u[row, column] * columns - 0.5, 0), columns - 1)
            at_y = min(max(v[row, column] * rows - 0.5, 0), rows - 1)
            i, j = min(int(at_y), rows - 2), min(int(at_x), columns - 2)
            b, a = at_y - i, at_x - j
            expected[:, row, column] = (
                texture[:, i, j] * (1 - a) * (1 - b)
                + texture[:, i, j + 1] * a * (1 - b)
                + texture[:, i + 1, j] * (1 - a) * b
                + texture[:, i + 1, j + 1] * a * b
            )
    assert fed.shape[0] == channels + CONDITION_CHANNELS - 2
    # UV in grid coordinates is rounded at 2^-23 and scaled by 8 texels whose values differ by some tenths.
    np.testing.assert_allclose(fed[:channels], expected, atol=2e-6)
    np.testing.assert_array_equal(fed[channels:], x[0, 2:].numpy())  # normals and mask as they are


def test_uv_outside_the_mask_changes_nothing() -> None:
    model, x = small(), condition(2)
    other = x.clone()
    other[:, :2] += (1 - x[:, 5:6]) * 0.7
    torch.testing.assert_close(first_layer_input(model, other), first_layer_input(model, x), atol=0, rtol=0)


def test_every_parameter_gets_a_gradient() -> None:
    model = small()
    model(condition(3)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_widths_make_the_levels() -> None:
    model = DeferredNeuralRenderer(32, (8, 16, 24, 32), texture_size=8)
    convolutions = {name: m.out_channels for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert [convolutions[f"down.{k}.conv1"] for k in range(4)] == [8, 16, 24, 32]
    assert [convolutions[f"up.{k}.conv1"] for k in range(3)] == [24, 16, 8]
    # Each way up reads what comes from below and the skip beside it.
    assert [model.up[k].conv1.in_channels for k in range(3)] == [32 + 24, 24 + 16, 16 + 8]


@pytest.mark.parametrize(("size", "widths"), [(18, (8, 8, 8)), (16, (8,) * 6)])
def test_a_size_that_cannot_be_halved_is_refused(size: int, widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"^size {size} is not a multiple of"):
        DeferredNeuralRenderer(size, widths)

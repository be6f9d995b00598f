"""LPIPS as a training loss (Zhang et al., CVPR 2018), SqueezeNet backbone, weights by path.

The runtime's metric is `warpcache.engine.metrics.lpips`, in NumPy; this one is differentiable. A test compares the two.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...engine.metrics.lpips import FIRE_CHANNELS, POOLS, TAP_CHANNELS, TAPS, Lpips

__all__ = ["PerceptualLoss"]


class PerceptualLoss(nn.Module):
    """Mean LPIPS between two batches of images.

    Args:
        weights: As for `Lpips.load`: the file, its folder, or None for the environment variable.

    Raises:
        InputError: If the file is missing or does not hold these tensors.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        self.features = nn.ModuleDict({"0": nn.Conv2d(3, 64, 3, 2)})
        for index, sizes in FIRE_CHANNELS.items():
            self.features[str(index)] = _Fire(*sizes)
        for k, channels in enumerate(TAP_CHANNELS):
            setattr(self, f"lin{k}", nn.Conv2d(channels, 1, 1, bias=False))
        # The runtime's reader has the checks and the messages.
        arrays = Lpips.load(weights).arrays()
        self.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Mean distance.

        Args:
            a: [N, 3, H, W] in [-1, 1].
            b: The same shape.

        Returns:
            Scalar.
        """
        # The target takes no gradient: half the backward pass is saved.
        with torch.no_grad():
            targets = self._layers(b)
        total = torch.zeros((), device=a.device)
        for k, (layer, target) in enumerate(zip(self._layers(a), targets, strict=True)):
            difference = (_unit(layer) - _unit(target)).pow(2)
            # The 1x1 convolution and the mean over pixels commute: average first.
            total = total + (difference.mean((0, 2, 3)) * getattr(self, f"lin{k}").weight.flatten()).sum()
        return total

    def _layers(self, x: Tensor) -> list[Tensor]:
        x = ((x - self.shift) / self.scale).contiguous(memory_format=torch.channels_last)
        kept = []
        for index in range(13):
            if index == 1:
                x = functional.relu(x)
            elif index in POOLS:
                x = functional.max_pool2d(x, 3, 2, ceil_mode=True)
            else:
                x = self.features[str(index)](x)
            if index in TAPS:
                kept.append(x)
        return kept


def _unit(layer: Tensor) -> Tensor:
    """Scale [N, C, H, W] to unit length over channels."""
    layer = layer.float()
    return layer * (layer.pow(2).sum(1, keepdim=True) + 1e-10).rsqrt()


class _Fire(nn.Module):
    def __init__(self, channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.squeeze(x))
        return torch.cat([functional.relu(self.expand1x1(x)), functional.relu(self.expand3x3(x))], 1)

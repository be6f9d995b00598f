"""A deferred neural renderer: learned texture on a rasterised mesh, then a U-Net (Thies et al., Deferred Neural
Rendering, SIGGRAPH 2019).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["CONDITION_CHANNELS", "DeferredNeuralRenderer"]

# u, v, normal x, y, z, mask (`rasterizer.condition_raster`).
CONDITION_CHANNELS = 6
_GROUPS = 8


class DeferredNeuralRenderer(nn.Module):
    """The reference generator: mesh rasters in, RGB out.

    Args:
        size: Rows and columns of condition and image; a multiple of 2 to the number of levels less one.
        widths: Channels of every level, from full resolution down.
        texture_channels: Channels of the neural texture.
        texture_size: Rows and columns of the neural texture.
    """

    output_names = ("image",)

    def __init__(
        self,
        size: int = 128,
        widths: Sequence[int] = (32, 64, 128, 128, 128),
        texture_channels: int = 10,
        texture_size: int = 128,
    ) -> None:
        super().__init__()
        step = 2 ** (len(widths) - 1)
        if size % step:
            raise ValueError(f"size {size} is not a multiple of {step}, which {len(widths)} levels need")
        self.size = size
        self.texture = nn.Parameter(torch.randn(1, texture_channels, texture_size, texture_size) * 0.1)
        channels = texture_channels + CONDITION_CHANNELS - 2
        self.down = nn.ModuleList()
        for width in widths:
            self.down.append(_Block(channels, width))
            channels = width
        self.up = nn.ModuleList()
        for width in reversed(widths[:-1]):
            self.up.append(_Block(channels + width, width))
            channels = width
        self.out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, condition: Tensor) -> Tensor:
        """Render one frame.

        Args:
            condition: float32 [N, 6, H, W]: u, v in [0, 1], normal, mask.

        Returns:
            float32 [N, 3, H, W] in [-1, 1].
        """
        uv, rest, mask = condition[:, :2], condition[:, 2:], condition[:, 5:6]
        grid = uv.permute(0, 2, 3, 1) * 2.0 - 1.0
        texture = self.texture.expand(condition.shape[0], -1, -1, -1)
        sampled = functional.grid_sample(texture, grid.to(texture.dtype), padding_mode="border", align_corners=False)
        x = torch.cat([sampled * mask, rest], 1)
        skips: list[Tensor] = []
        for level, block in enumerate(self.down):
            if level:
                x = functional.avg_pool2d(x, 2)
            x = block(x)
            skips.append(x)
        skips.pop()
        for block in self.up:
            x = functional.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
            x = block(torch.cat([x, skips.pop()], 1))
        return torch.tanh(self.out(x))


class _Block(nn.Module):
    """Two 3x3 convolutions, each with GroupNorm and SiLU."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(_GROUPS, channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(_GROUPS, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.silu(self.norm1(self.conv1(x)))
        return functional.silu(self.norm2(self.conv2(x)))

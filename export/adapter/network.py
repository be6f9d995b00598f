"""The warp adapter: a cache encoder that belongs to frame s, and a shallow consumer that answers frame t.

What depends on frame s alone is encoded once by `CacheEncoder`, inside the producer and off the latency path.
`WarpConsumer` works at a quarter of the image's resolution: it moves the cached features along the surface's motion
(where the inputs carry it), refines that motion with what it learned, and only then touches full resolution, three
times: one backward warp of the last image, one blend, one learned residual through a pixel shuffle.

The layout follows measurements with ONNX Runtime on CPUs: full-resolution convolutions, not channels, make a shallow
network slow; `grid_sample` that pads with zeros is three times faster than one that clamps to the border, so
coordinates are clipped first, which gives the same values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...engine.errors import ExportError
from ..frames.surface import Surface
from .layout import AdapterConfig, AdapterLayout

__all__ = ["CacheEncoder", "WarpConsumer"]


class CacheEncoder(nn.Module):
    """Encode what belongs to frame s.

    Args:
        layout: What it reads.
        config: Its size.
    """

    def __init__(self, layout: AdapterLayout, config: AdapterConfig) -> None:
        super().__init__()
        self.layout, self.config = layout, config
        self.grid = _working_grid(layout, config)
        channels = layout.channels * config.stride**2
        for _, tap_channels, rows, _ in layout.taps:
            channels += tap_channels if rows else 0
        self.inputs = InputEncoder(layout, config, config.encoder_width)
        self.squeeze = nn.Conv2d(channels, config.encoder_width, 1)
        self.vectors = nn.ModuleList(
            nn.Linear(tap_channels, config.encoder_width) for _, tap_channels, rows, _ in layout.taps if not rows
        )
        self.block = Residual(config.encoder_width)
        self.out = nn.Conv2d(config.encoder_width, config.features, 3, padding=1)

    def forward(self, taps: Sequence[Tensor], inputs: Mapping[str, Tensor], image: Tensor) -> Tensor:
        """Encode one frame.

        Args:
            taps: Cut tensors as `layout.taps` lists them: [N, C, rows, columns], or [N, C] for a vector; spatial ones
                already at the working resolution (`at_working_grid`).
            inputs: Generator inputs of frame s.
            image: Every output of frame s, channels together, [N, C, H, W].

        Returns:
            [N, features, H / stride, W / stride].
        """
        spatial = [tap for tap in taps if tap.ndim == 4]
        flat = [tap for tap in taps if tap.ndim == 2]
        x = self.squeeze(torch.cat([*spatial, functional.pixel_unshuffle(image, self.config.stride)], 1))
        x = x + self.inputs(inputs)
        for tap, linear in zip(flat, self.vectors, strict=True):
            x = x + linear(tap)[:, :, None, None]
        x = self.block(functional.silu(x))
        encoded: Tensor = self.out(functional.silu(x))
        return encoded


class WarpConsumer(nn.Module):
    """Answer frame t from the cache of frame s.

    Args:
        layout: What it reads and writes.
        config: Its size.
    """

    centres: Tensor
    coarse_centres: Tensor

    def __init__(self, layout: AdapterLayout, config: AdapterConfig) -> None:
        super().__init__()
        self.layout, self.config = layout, config
        rows, columns = _working_grid(layout, config)
        self.inputs = InputEncoder(layout, config, config.width)
        motion_channels = 6 if layout.surface else 0
        self.merge = nn.Conv2d(config.features + config.width + motion_channels, config.width, 3, padding=1)
        self.context = Context(config.width)
        self.blocks = nn.ModuleList(Residual(config.width) for _ in range(config.blocks))
        # For every image pixel: 2 of flow, 1 of how far to doubt the moved image, and a residual for every channel.
        self.head = nn.Conv2d(config.width, (3 + layout.channels) * config.stride**2, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        bias = torch.zeros(3 + layout.channels, config.stride**2)
        bias[2] = 0.02  # off the flat part of the clamp, so that doubt can be learned
        self.head.bias = nn.Parameter(bias.flatten())
        self.register_buffer("centres", _pixel_centres(layout.height, layout.width), persistent=False)
        self.register_buffer("coarse_centres", _pixel_centres(rows, columns), persistent=False)

    def forward(self, features: Tensor, planes: Tensor, atlas: Tensor | None, inputs: Mapping[str, Tensor]) -> Tensor:
        """Answer one frame.

        Args:
            features: `CacheEncoder`'s result for frame s.
            planes: `image_planes` of every output of frame s, channels together, [N, 3 C, H, W].
            atlas: Surface atlas of frame s, [N, 3, h, w], where the layout has a surface.
            inputs: Generator inputs of frame t.

        Returns:
            Every output of frame t, channels together, [N, C, H, W].
        """
        stride = self.config.stride
        encoded = self.inputs(inputs)
        if self.layout.surface is None or atlas is None:
            x = self.merge(torch.cat([features, encoded], 1))
            motion = None
        else:
            motion, hints = self._surface_motion(atlas, inputs, self.layout.surface)
            grid = (self.coarse_centres + motion).permute(0, 2, 3, 1)
            moved = _sample(features, grid)
            x = self.merge(torch.cat([moved, encoded, hints], 1))
        x = self.context(x)
        for block in self.blocks:
            x = block(x)
        made = functional.pixel_shuffle(self.head(functional.silu(x)), stride)
        flow = made[:, :2]
        if motion is not None:
            flow = flow + functional.interpolate(motion, scale_factor=float(stride), mode="bilinear")
        moved_image = _sample_cubic(planes, self.centres + flow)
        # A clamp and no sigmoid: where nothing is new the moved image passes whole, to the last digit.
        doubt = made[:, 2:3].clamp(0.0, 1.0)
        return moved_image - moved_image * doubt + made[:, 3:]

    def _surface_motion(self, atlas: Tensor, inputs: Mapping[str, Tensor], surface: Surface) -> tuple[Tensor, Tensor]:
        """Coarse backward flow [N, 2, h, w] in grid_sample units, and hint planes [N, 6, h, w]."""
        stride = self.config.stride
        name, first, last = surface.uv
        mask_name, mask_channel = surface.mask
        # One pixel of each cell stands for it: averages would mix both sides of a silhouette.
        middle = stride // 2
        uv = inputs[name][:, first:last, middle::stride, middle::stride]
        mask = inputs[mask_name][:, mask_channel : mask_channel + 1, middle::stride, middle::stride]
        position = _sample(atlas, uv.permute(0, 2, 3, 1) * 2.0 - 1.0)
        offset = (middle + 0.5) / stride - 0.5
        size = torch.tensor([self.coarse_centres.shape[3], self.coarse_centres.shape[2]])
        centre = self.coarse_centres + (offset * 2.0 / size).view(1, 2, 1, 1)
        inside = (position[:, :2] - centre) * mask
        # Off the surface its motion goes on, fading with distance (hair and neck follow the face).
        near = _spread(torch.cat([inside, mask], 1))
        around = near[:, :2] / (near[:, 2:] + 1e-3)
        motion = inside + around * (1.0 - mask)
        scale = 16.0  # flow of a few pixels is a few hundredths in grid units; convolutions like it near 1
        hints = torch.cat([motion * scale, inside * scale, position[:, 2:] * mask, mask], 1)
        return motion, hints


class InputEncoder(nn.Module):
    """Bring the generator's inputs to the working resolution and add them up, [N, out, rows, columns]."""

    def __init__(self, layout: AdapterLayout, config: AdapterConfig, out: int) -> None:
        super().__init__()
        self.layout = layout
        self.grid = _working_grid(layout, config)
        self.images = nn.ModuleList()
        for image in layout.images:
            # Each axis has a stride of its own: an input need not have the image's proportions.
            down, across = max(1, image.height // self.grid[0]), max(1, image.width // self.grid[1])
            kernel = (down if down > 1 else 3, across if across > 1 else 3)
            padding = (0 if down > 1 else 1, 0 if across > 1 else 1)
            self.images.append(nn.Conv2d(image.channels, out, kernel, (down, across), padding=padding))
        self.vectors = nn.ModuleList(nn.Linear(vector.elements, out) for vector in layout.vectors)
        self.bias = nn.Parameter(torch.zeros(1, out, 1, 1))

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Encode the inputs of one frame."""
        rows, columns = self.grid
        total = self.bias.expand(-1, -1, rows, columns)
        for image, convolution in zip(self.layout.images, self.images, strict=True):
            x = convolution(inputs[image.name].float())
            if x.shape[2:] != (rows, columns):
                x = functional.interpolate(x, size=(rows, columns), mode="bilinear")
            total = total + x
        for vector, linear in zip(self.layout.vectors, self.vectors, strict=True):
            # Not flatten(1): an input of one number a frame, e.g. an id, has no further axis.
            flat = inputs[vector.name].float().reshape(-1, vector.elements)
            total = total + linear(flat)[:, :, None, None]
        return total


class Context(nn.Module):
    """Add what only a wide view tells: where things beyond the surface move, and what changes everywhere at once.

    A generator that normalises over the image (GroupNorm, InstanceNorm) shifts every pixel a little with every frame;
    no stack of a few 3x3 convolutions can see that. A quarter of the working resolution makes a wide view cheap.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.whole = nn.Conv2d(width, width, 1)
        for last in (self.conv2, self.whole):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        coarse = functional.silu(self.conv1(functional.silu(_pool(x, 4))))
        wide = self.conv2(coarse) + self.whole(coarse.mean((2, 3), keepdim=True))
        return x + functional.interpolate(wide, size=(x.shape[2], x.shape[3]), mode="bilinear")


class Residual(nn.Module):
    """x + conv(silu(conv(silu(x)))), 3x3, without normalisation: it would cost more than a convolution here."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.conv2(functional.silu(self.conv1(functional.silu(x))))
        return x + added


def at_working_grid(tap: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bring a cut tensor [N, C, h, w] to the working resolution: area average down, bilinear up."""
    if tuple(tap.shape[2:]) == grid:
        return tap
    if tap.shape[2] >= grid[0] and tap.shape[3] >= grid[1]:
        return functional.adaptive_avg_pool2d(tap, grid)
    return functional.interpolate(tap, size=grid, mode="bilinear")


def _working_grid(layout: AdapterLayout, config: AdapterConfig) -> tuple[int, int]:
    if layout.height % config.stride or layout.width % config.stride:
        raise ExportError(
            f"the output is {layout.height}x{layout.width}, the warp adapter needs multiples of {config.stride}; "
            "pad the generator's output or compile with --steps 0"
        )
    return layout.height // config.stride, layout.width // config.stride


def _pixel_centres(rows: int, columns: int) -> Tensor:
    """[1, 2, rows, columns]: x and y of pixel centres in grid_sample coordinates (align_corners=False)."""
    x = (torch.arange(columns) + 0.5) * (2.0 / columns) - 1.0
    y = (torch.arange(rows) + 0.5) * (2.0 / rows) - 1.0
    return torch.stack([x.expand(rows, columns), y[:, None].expand(rows, columns)])[None]


def _sample(image: Tensor, grid: Tensor) -> Tensor:
    """grid_sample that clamps to the border: [N, C, H, W] at grid [N, h, w, 2]."""
    limit_x, limit_y = 1.0 - 1.0 / image.shape[3], 1.0 - 1.0 / image.shape[2]
    if limit_x == limit_y:
        clipped = grid.clamp(-limit_x, limit_x)
    else:
        limits = torch.tensor([limit_x, limit_y], dtype=grid.dtype)
        clipped = torch.minimum(torch.maximum(grid, -limits), limits)
    return functional.grid_sample(image, clipped, mode="bilinear", padding_mode="zeros", align_corners=False)


def image_planes(image: Tensor) -> Tensor:
    """What `_sample_cubic` reads: the image [N, C, H, W] with half its second differences along x and along y."""
    x = functional.pad(image, (1, 1, 0, 0), mode="replicate")
    y = functional.pad(image, (0, 0, 1, 1), mode="replicate")
    along_x = (x[..., :-2] - 2.0 * image + x[..., 2:]) * 0.5
    along_y = (y[..., :-2, :] - 2.0 * image + y[..., 2:, :]) * 0.5
    return torch.cat([image, along_x, along_y], 1)


def _sample_cubic(planes: Tensor, position: Tensor) -> Tensor:
    """Cubic interpolation at the price of a bilinear one: [N, 3 C, H, W] at [N, 2, h, w] -> [N, C, h, w].

    Catmull and Rom's cubic between two samples is their linear interpolation less f (1 - f) times that of half their
    second differences, f being the fraction of the way. Along both axes that leaves out a mixed term of fourth order.
    What a bilinear warp blurs, a consumer that works at a quarter of the resolution cannot bring back.
    """
    limits = torch.tensor([1.0 - 1.0 / planes.shape[3], 1.0 - 1.0 / planes.shape[2]], dtype=position.dtype)
    limits = limits.view(1, 2, 1, 1)
    clipped = torch.minimum(torch.maximum(position, -limits), limits)
    size = torch.tensor([planes.shape[3] / 2.0, planes.shape[2] / 2.0], dtype=position.dtype).view(1, 2, 1, 1)
    pixel = clipped * size + (size - 0.5)
    fraction = pixel - torch.floor(pixel)
    weight = fraction - fraction * fraction
    sampled = functional.grid_sample(
        planes, clipped.permute(0, 2, 3, 1), mode="bilinear", padding_mode="zeros", align_corners=False
    )
    image, along_x, along_y = sampled.chunk(3, 1)
    return image - weight[:, :1] * along_x - weight[:, 1:] * along_y


def _spread(planes: Tensor) -> Tensor:
    """Blur [N, C, h, w] widely, with a kernel that falls off, by averaging at coarser and coarser scales."""
    near = functional.avg_pool2d(_pool(planes, 2), 3, 1, 1)
    far = functional.avg_pool2d(_pool(planes, 8), 3, 1, 1)
    size = (planes.shape[2], planes.shape[3])
    near, far = (functional.interpolate(coarse, size=size, mode="bilinear") for coarse in (near, far))
    return near + 0.1 * far + 0.01 * planes.mean((2, 3), keepdim=True)


def _pool(planes: Tensor, factor: int) -> Tensor:
    """Area average by `factor`; a last partial cell counts what it has."""
    return functional.avg_pool2d(planes, factor, factor, ceil_mode=True, count_include_pad=False)

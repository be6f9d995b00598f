"""Four small image generators, one of each kind that is in use, with random weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """GroupNorm, SiLU, convolution; a time or style vector shifts and scales what lies between."""

    def __init__(self, channels_in: int, channels_out: int, embedding: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.GroupNorm(4, channels_in), nn.GroupNorm(4, channels_out)
        self.conv_1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.conv_2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.embed = nn.Linear(embedding, 2 * channels_out)
        self.skip = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv_1(functional.silu(self.norm_1(x)))
        scale, shift = self.embed(functional.silu(embedding))[:, :, None, None].chunk(2, dim=1)
        h = self.conv_2(functional.silu(self.norm_2(h) * (1 + scale) + shift))
        return h + self.skip(x)


class UNet(nn.Module):
    """A diffusion model's U-Net: three levels, skips by concatenation, a sinusoidal embedding of the time."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 32))
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.enc = nn.ModuleList([Block(8, 8, 32), Block(8, 16, 32)])
        self.down = nn.ModuleList([nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(16, 16, 3, 2, 1)])
        self.mid = Block(16, 16, 32)
        self.dec = nn.ModuleList([Block(32, 16, 32), Block(24, 8, 32)])
        self.last = nn.Sequential(nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, condition: Tensor, time: Tensor) -> Tensor:
        angles = time[:, None] * torch.exp(torch.arange(8) * -1.0)
        embedding = self.embed(torch.cat([angles.sin(), angles.cos()], 1))
        x = self.first(condition)
        skips = []
        for block, down in zip(self.enc, self.down, strict=True):
            x = block(x, embedding)
            skips.append(x)
            x = down(x)
        x = self.mid(x, embedding)
        for block in self.dec:
            x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
            x = block(torch.cat([x, skips.pop()], 1), embedding)
        return torch.tanh(self.last(x))


class Residual(nn.Module):
    """An image-to-image network: reflection padding, instance norm, residual blocks, both ways of going up."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(
            nn.ReflectionPad2d(3), nn.Conv2d(3, 8, 7), nn.InstanceNorm2d(8, affine=True), nn.ReLU()
        )
        self.down = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.LeakyReLU(0.2))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.ReflectionPad2d(1),
                nn.Conv2d(16, 16, 3),
                nn.InstanceNorm2d(16),
                nn.PReLU(16),
                nn.ReplicationPad2d(1),
                nn.Conv2d(16, 16, 3),
                nn.InstanceNorm2d(16),
            )
            for _ in range(2)
        )
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.Sigmoid())
        self.up = nn.Sequential(nn.ConvTranspose2d(16, 8, 3, 2, 1, output_padding=1), nn.InstanceNorm2d(8), nn.ReLU())
        self.shuffle = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.PixelShuffle(2))
        self.tail = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(16, 3, 7))

    def forward(self, condition: Tensor) -> Tensor:
        x = self.down(self.head(condition))
        for block in self.blocks:
            x = x + block(x)
        x = x * self.gate(x)
        x = torch.cat([self.up(x), functional.hardtanh(self.shuffle(x), -3.0, 3.0)], 1)
        return torch.clamp(condition + torch.tanh(self.tail(x)), -1.0, 1.0)


class Modulated(nn.Module):
    """StyleGAN2's layer: a convolution whose weights a style scales and normalises, noise, a blurred upsampling."""

    def __init__(self, channels_in: int, channels_out: int, *, up: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels_out, channels_in, 3, 3) / (3 * channels_in**0.5))
        self.style = nn.Linear(16, channels_in)
        self.strength = nn.Parameter(torch.randn(1))
        self.bias = nn.Parameter(torch.randn(channels_out))
        self.up = up
        tap = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("blur", (tap[:, None] * tap[None, :] / 16).reshape(1, 1, 4, 4))

    def forward(self, x: Tensor, w: Tensor, noise: Tensor) -> Tensor:
        weight = self.weight[None] * (self.style(w) + 1)[:, None, :, None, None]
        weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        if self.up:
            _, channels, height, width = x.shape
            # upfirdn: zeros between the pixels, then a low pass over each channel.
            x = torch.stack([x, torch.zeros_like(x)], -1).reshape(1, channels, height, 2 * width)
            x = torch.stack([x, torch.zeros_like(x)], 3).reshape(1, channels, 2 * height, 2 * width)
            x = functional.conv2d(functional.pad(x, (2, 1, 2, 1)), self.blur.repeat(channels, 1, 1, 1), groups=channels)
        x = functional.conv2d(x, weight[0], padding=1)
        x = x + self.strength * noise + self.bias[None, :, None, None]
        return functional.leaky_relu(x, 0.2) * 2**0.5


class StyleDecoder(nn.Module):
    """A GAN's decoder: mapping network, learned constant, modulated layers, skip outputs; AdaIN at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.mapping = nn.Sequential(nn.Linear(16, 16), nn.LeakyReLU(0.2), nn.Linear(16, 16), nn.LeakyReLU(0.2))
        self.start = nn.Parameter(torch.randn(1, 16, 4, 4))
        self.layers = nn.ModuleList(
            [Modulated(16, 16, up=False), Modulated(16, 16, up=True), Modulated(16, 8, up=True)]
        )
        self.rgb = nn.ModuleList([nn.Conv2d(16, 3, 1), nn.Conv2d(16, 3, 1), nn.Conv2d(8, 3, 1)])
        self.adain = nn.Linear(16, 16)
        self.last = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, latent: Tensor, noise: Tensor) -> Tensor:
        latent = latent * torch.rsqrt(latent.square().mean(1, keepdim=True) + 1e-8)
        w = self.mapping(latent)
        x = self.start
        image = torch.zeros(1, 3, 4, 4)
        for layer, rgb in zip(self.layers, self.rgb, strict=True):
            size = x.shape[-1] * (2 if layer.up else 1)
            x = layer(x, w, functional.adaptive_avg_pool2d(noise, size))
            if layer.up:
                image = functional.interpolate(image, scale_factor=2.0, mode="bilinear")
            image = image + rgb(x)
        scale, shift = self.adain(w).chunk(2, dim=1)
        mean, deviation = x.mean((2, 3), keepdim=True), x.std((2, 3), keepdim=True)
        x = (x - mean) / (deviation + 1e-5) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return torch.tanh(image + self.last(x))


class Attention(nn.Module):
    """Patches that attend to each other and to a sequence of context, then go back to an image that is warped."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.position = nn.Parameter(0.1 * torch.randn(1, 64, 16))
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(3))
        self.qkv, self.out = nn.Linear(16, 48, bias=False), nn.Linear(16, 16)
        self.words = nn.Embedding(11, 16)
        self.cross = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        self.rgb, self.flow = nn.Conv2d(16, 48, 3, padding=1), nn.Conv2d(16, 2, 3, padding=1)

    def forward(self, condition: Tensor, words: Tensor) -> Tensor:
        tokens = self.patches(condition).flatten(2).transpose(1, 2) + self.position
        q, k, v = (part.reshape(1, 64, 2, 8).transpose(1, 2) for part in self.qkv(self.norms[0](tokens)).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(q, k, v)
        tokens = tokens + self.out(mixed.transpose(1, 2).reshape(1, 64, 16))
        context = self.words(words)
        tokens = tokens + self.cross(self.norms[1](tokens), context, context, need_weights=False)[0]
        tokens = tokens + self.mlp(self.norms[2](tokens))
        x = tokens.transpose(1, 2).reshape(1, 16, 8, 8)
        line = torch.linspace(-1, 1, 32)
        grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)[None]
        flow = functional.interpolate(torch.tanh(self.flow(x)), size=(32, 32), mode="bilinear")
        moved = functional.grid_sample(condition, grid + 0.1 * flow.permute(0, 2, 3, 1), align_corners=True)
        return moved + functional.pixel_shuffle(self.rgb(x), 4)


def examples() -> dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]]:
    """Kind -> how to make it, and one frame's inputs."""
    noise = torch.Generator().manual_seed(11)
    image = torch.rand(1, 3, 32, 32, generator=noise) * 2 - 1
    return {
        "U-Net": (UNet, {"condition": image, "time": torch.tensor([3.5])}),
        "residual": (Residual, {"condition": image}),
        "GAN decoder": (
            StyleDecoder,
            {
                "latent": torch.randn(1, 16, generator=noise),
                "noise": torch.randn(1, 1, 16, 16, generator=noise),
            },
        ),
        "attention": (Attention, {"condition": image, "words": torch.tensor([[1, 7, 3, 3, 9]])}),
    }

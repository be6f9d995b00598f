"""Small generators of every kind that the cutter must cope with: random weights, tiny sizes, traced once a run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from warpcache.export.frames.surface import Surface
from warpcache.export.graph.index import GraphIndex
from warpcache.export.graph.trace import trace_generator
from warpcache.models.rasterizer import Mesh, SurfaceAtlas, condition_raster, rasterize

FRAMES = 6


class Block(nn.Module):
    """Convolution, GroupNorm, SiLU."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm = nn.GroupNorm(4, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(self.norm(self.conv(x)))


class UNet(nn.Module):
    """Three levels with skip connections."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.ModuleList([Block(3, 8), Block(8, 16), Block(16, 16)])
        self.dec = nn.ModuleList([Block(32, 16), Block(24, 8)])
        self.out = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, condition: Tensor) -> Tensor:
        skip_1 = self.enc[0](condition)
        skip_2 = self.enc[1](functional.avg_pool2d(skip_1, 2))
        x = self.enc[2](functional.avg_pool2d(skip_2, 2))
        x = self.dec[0](torch.cat([functional.interpolate(x, scale_factor=2.0), skip_2], 1))
        x = self.dec[1](torch.cat([functional.interpolate(x, scale_factor=2.0), skip_1], 1))
        return torch.tanh(self.out(x))


class Residual(nn.Module):
    """Image to image with residual blocks, batch norm (which executors fold into convolutions) and a global skip."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(16, 16, 3, padding=1), nn.InstanceNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)
            )
            for _ in range(3)
        )
        self.up = nn.Sequential(nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, image: Tensor) -> Tensor:
        x = self.down(image)
        for block in self.blocks:
            x = x + block(x)
        return image + torch.tanh(self.up(x))


class LatentDecoder(nn.Module):
    """A latent vector grows into an image; no input reaches the late layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16 * 4 * 4)
        self.stages = nn.ModuleList([Block(16, 16), Block(16, 8), Block(8, 8)])
        self.rgb = nn.Conv2d(8, 3, 1)

    def forward(self, latent: Tensor) -> Tensor:
        x = self.first(latent).reshape(1, 16, 4, 4)
        for stage in self.stages:
            x = functional.interpolate(stage(x), scale_factor=2.0, mode="bilinear")
        return torch.tanh(self.rgb(x))


class Attention(nn.Module):
    """Scaled dot-product attention at the bottleneck, layer norm and GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.norm_1, self.norm_2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.rgb = nn.Conv2d(16, 48, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        patches = self.patches(image)
        tokens = patches.flatten(2).transpose(1, 2)
        q, k, v = (part.reshape(1, 64, 2, 8).transpose(1, 2) for part in self.qkv(self.norm_1(tokens)).chunk(3, dim=-1))
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, 64, 16)
        tokens = tokens + self.out(attended)
        tokens = tokens + self.mlp(self.norm_2(tokens))
        back = tokens.transpose(1, 2).reshape(1, 16, 8, 8)
        return functional.pixel_shuffle(self.rgb(back), 4) + image


class ManyInputsOutputs(nn.Module):
    """A pose vector, an integer id for the deep part only, a switch for the end only, one input that nothing reads.

    Outputs: two heads, a deep feature, and one input handed straight through.
    """

    def __init__(self) -> None:
        super().__init__()
        self.start = Block(3, 8)
        self.identity = nn.Embedding(5, 8)
        self.pose = nn.Linear(6, 8)
        self.deep = nn.Sequential(Block(8, 16), Block(16, 16), Block(16, 8))
        self.image_head = nn.Sequential(Block(16, 8), nn.Conv2d(8, 3, 3, padding=1))
        self.mask_head = nn.Sequential(Block(16, 8), nn.Conv2d(8, 1, 3, padding=1))

    def forward(
        self, image: Tensor, pose: Tensor, person: Tensor, inverted: Tensor, unused: Tensor
    ) -> dict[str, Tensor]:
        start = self.start(image)
        x = functional.avg_pool2d(start, 2) + self.identity(person)[:, :, None, None]
        x = self.deep(x) + self.pose(pose)[:, :, None, None]
        wide = torch.cat([functional.interpolate(x, scale_factor=2.0), start], 1)
        rgb = torch.tanh(self.image_head(wide))
        return {
            "image": torch.where(inverted, -rgb, rgb),
            "mask": torch.sigmoid(self.mask_head(wide)),
            "feature": x,
            "pose": pose,
        }


class Portrait(nn.Module):
    """A generator with a surface: two images of 32x48 from a raster, a pose and an integer id.

    On its way lie cut tensors of every kind: a feature map (`deep`), tokens (`mix`) and a vector (`style`).
    """

    surface = Surface("atlas", ("condition", 0, 2), ("condition", 5))

    def __init__(self) -> None:
        super().__init__()
        self.start = Block(6, 8)
        self.people = nn.Embedding(5, 8)
        self.pose = nn.Linear(5, 8)
        self.deep = Block(8, 8)
        self.mix = nn.Linear(8, 8)
        self.style = nn.Linear(8, 8)
        self.image = nn.Conv2d(16, 3, 3, padding=1)
        self.matte = nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, condition: Tensor, pose: Tensor, person: Tensor) -> dict[str, Tensor]:
        start = self.start(condition)
        x = self.deep(functional.avg_pool2d(start, 4) + self.people(person)[:, :, None, None])
        tokens = self.mix(x.flatten(2).transpose(1, 2))
        style = self.style(x.mean((2, 3)) + self.pose(pose))
        x = tokens.transpose(1, 2).reshape(1, 8, 8, 12) * style[:, :, None, None]
        wide = torch.cat([functional.interpolate(x, scale_factor=4.0), start], 1)
        return {"image": torch.tanh(self.image(wide)), "matte": torch.sigmoid(self.matte(wide))}


def _portrait_stream() -> dict[str, np.ndarray]:
    """A square sheet that slides and bends over FRAMES frames, as raster and surface atlas; a pose; a constant id."""
    y, x = np.meshgrid(np.linspace(6, 26, 6), np.linspace(10, 34, 6), indexing="ij")
    number = np.arange(36).reshape(6, 6)
    first = np.stack([number[:-1, :-1], number[1:, :-1], number[:-1, 1:]], -1).reshape(-1, 3)
    second = np.stack([number[:-1, 1:], number[1:, :-1], number[1:, 1:]], -1).reshape(-1, 3)
    uv = np.stack([(x - 10) / 24, (y - 6) / 20], -1).reshape(-1, 2) * 0.8 + 0.1
    mesh = Mesh(np.concatenate([first, second]).astype(np.int32), uv.astype(np.float32))
    surface = SurfaceAtlas(mesh, 24)
    conditions, atlases = [], []
    for t in range(FRAMES):
        bent = np.stack([x + 1.5 * t, y + np.sin(x / 8 + t / 2), 4 * np.cos(y / 9)], -1).reshape(-1, 3)
        vertices = bent.astype(np.float32)
        fragments = rasterize(vertices, mesh.triangles, 32, 48)
        conditions.append(condition_raster(vertices, mesh, 32, 48, fragments))
        atlases.append(surface.positions(vertices, fragments))
    return {
        "condition": np.stack(conditions),
        "pose": np.random.default_rng(8).standard_normal((FRAMES, 5)).astype(np.float32),
        "person": np.array([3], np.int64),
        "atlas": np.stack(atlases),
    }


def _images(rng: np.random.Generator, size: int) -> np.ndarray:
    """A drifting pattern, float32 [FRAMES, 3, size, size] in [-1, 1]."""
    coarse = rng.uniform(-1, 1, (3, size // 4 + 4, size // 4 + 4))
    fine = np.kron(coarse, np.ones((1, 4, 4)))
    return np.stack([fine[:, t : t + size, t : t + size] for t in range(FRAMES)]).astype(np.float32)


def _streams() -> dict[str, tuple[Callable[[], nn.Module], dict[str, np.ndarray]]]:
    rng = np.random.default_rng(7)
    return {
        "unet": (UNet, {"condition": _images(rng, 32)}),
        "residual": (Residual, {"image": _images(rng, 32)}),
        "latent": (LatentDecoder, {"latent": rng.standard_normal((FRAMES, 12)).astype(np.float32)}),
        "attention": (Attention, {"image": _images(rng, 32)}),
        "many": (
            ManyInputsOutputs,
            {
                "image": _images(rng, 16),
                "pose": rng.standard_normal((FRAMES, 6)).astype(np.float32),
                "person": np.array([3], np.int64),
                "inverted": (np.arange(FRAMES) % 2 == 0).reshape(FRAMES, 1, 1, 1),
                "unused": np.zeros((1, 2), np.float32),
            },
        ),
    }


@dataclass(frozen=True)
class Traced:
    """One generator, traced.

    Attributes:
        name: Which one.
        module: The PyTorch module, in evaluation mode.
        stream: Inputs over time.
        model: The trace.
        costs: Made-up costs per node, the same on every machine: 10 for what multiplies matrices, 0.5 for the rest.
    """

    name: str
    module: nn.Module
    stream: dict[str, np.ndarray]
    model: onnx.ModelProto
    costs: dict[str, float]

    def frame(self, t: int) -> dict[str, np.ndarray]:
        """Inputs of frame t."""
        return {name: array if len(array) == 1 else array[t : t + 1] for name, array in self.stream.items()}

    def torch_outputs(self, t: int) -> dict[str, np.ndarray]:
        """What the module itself gives for frame t."""
        with torch.no_grad():
            result = self.module(**{name: torch.from_numpy(array) for name, array in self.frame(t).items()})
        tensors = list(result.values()) if isinstance(result, dict) else [result]
        # By position: an output with an input's name is called otherwise in the graph.
        return {value.name: tensor.numpy() for value, tensor in zip(self.model.graph.output, tensors, strict=True)}


def costs_of(model: onnx.ModelProto) -> dict[str, float]:
    """Made-up costs, the same on every machine."""
    index = GraphIndex(model)
    heavy = ("Conv", "ConvTranspose", "MatMul", "Gemm")
    return {name: 10.0 if node.op_type in heavy else 0.5 for name, node in zip(index.names, index.nodes, strict=True)}


@pytest.fixture(scope="session", autouse=True)
def one_operator_table() -> Iterator[None]:
    """PyTorch's exporter parses the sources of all its operators at each export, half a trace's time: here once."""
    from torch.onnx._internal.exporter import _registration

    with pytest.MonkeyPatch.context() as patch:
        apis = _registration.onnxscript_apis
        patch.setattr(apis, "get_torchlib_ops", functools.cache(apis.get_torchlib_ops))
        yield


_TRACED: dict[str, Traced] = {}


def _trace(name: str) -> Traced:
    if name not in _TRACED:
        make, stream = _streams()[name]
        torch.manual_seed(3)
        module = make().eval()
        model = trace_generator(module, {key: array[:1] for key, array in stream.items()})
        _TRACED[name] = Traced(name, module, stream, model, costs_of(model))
    return _TRACED[name]


@pytest.fixture(params=list(_streams()))
def traced(request: pytest.FixtureRequest) -> Traced:
    """Each generator in turn."""
    return _trace(request.param)


@pytest.fixture
def trace() -> Callable[[str], Traced]:
    """One generator by name."""
    return _trace


@pytest.fixture(scope="session")
def portrait() -> Traced:
    """The generator with a surface; its stream holds the atlas too."""
    torch.manual_seed(4)
    module = Portrait().eval()
    stream = _portrait_stream()
    model = trace_generator(module, {name: stream[name][:1] for name in ("condition", "pose", "person")})
    return Traced("portrait", module, stream, model, costs_of(model))


@pytest.fixture(scope="session")
def traced_unet() -> Traced:
    """The U-Net, for fixtures that outlive a test."""
    return _trace("unet")

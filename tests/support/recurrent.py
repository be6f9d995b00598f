"""Small networks that carry state from frame to frame, and PyTorch's own loop over them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

SIZE = 32


class ConvGru(nn.Module):
    """An image network whose deep features pass through a ConvGRU (Ballas et al., ICLR 2016)."""

    state = {"memory_next": "memory"}  # noqa: RUF012
    first = {"memory": (1, 8, SIZE // 4, SIZE // 4)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 4, stride=4)
        self.deep = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.SiLU()) for _ in range(6)))
        self.gates = nn.Conv2d(16, 16, 3, padding=1)
        self.candidate = nn.Conv2d(16, 8, 3, padding=1)
        self.late = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.Conv2d(11, 3, 3, padding=1)

    def forward(self, image: Tensor, memory: Tensor) -> dict[str, Tensor]:
        x = self.deep(self.down(image))
        reset, update = torch.sigmoid(self.gates(torch.cat([x, memory], 1))).chunk(2, 1)
        fresh = torch.tanh(self.candidate(torch.cat([x, reset * memory], 1)))
        memory = (1 - update) * memory + update * fresh
        wide = functional.interpolate(functional.silu(self.late(memory)), scale_factor=4.0)
        return {"picture": torch.tanh(self.up(torch.cat([wide, image], 1))), "memory_next": memory}


class Matting(nn.Module):
    """A recurrent encoder and decoder with a state at each of four resolutions, as robust video matting has them.

    The last state is read by the last layers, which a consumer computes anew: so a state itself has to be cached.
    """

    state = {f"r{k}_next": f"r{k}" for k in range(1, 5)}  # noqa: RUF012
    first = {f"r{k}": (1, 4, SIZE >> (4 - k), SIZE >> (4 - k)) for k in range(1, 5)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.ModuleList(nn.Conv2d(3 if k == 0 else 4, 4, 3, padding=1) for k in range(4))
        self.deep = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.SiLU()) for _ in range(6)))
        self.mix = nn.ModuleList(nn.Conv2d(12 if k else 8, 4, 3, padding=1) for k in range(4))
        self.head = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, image: Tensor, r1: Tensor, r2: Tensor, r3: Tensor, r4: Tensor) -> dict[str, Tensor]:
        skips, x = [], image
        for k, layer in enumerate(self.encode):
            x = functional.silu(layer(x if k == 0 else functional.avg_pool2d(x, 2)))
            skips.append(x)
        x = self.deep(skips[-1])
        following = {}
        for k, (memory, layer) in enumerate(zip((r1, r2, r3, r4), self.mix, strict=True)):
            parts = [x, memory] if k == 0 else [functional.interpolate(x, scale_factor=2.0), skips[3 - k], memory]
            x = torch.tanh(layer(torch.cat(parts, 1)))
            following[f"r{k + 1}_next"] = 0.5 * memory + 0.5 * x
        return {"picture": torch.tanh(self.head(x)), **following}


NETWORKS = {"gru": ConvGru, "matting": Matting}


def network(name: str) -> nn.Module:
    """One of them, with the same weights every time, in evaluation mode."""
    torch.manual_seed(11)
    return NETWORKS[name]().eval()


def stream(name: str, frames: int, seed: int = 3, *, zeros: bool = False) -> dict[str, np.ndarray]:
    """A drifting pattern, float32 [T, 3, 32, 32] in [-1, 1], and the state's first values [1, ...]."""
    rng = np.random.default_rng(seed)
    fine = np.kron(rng.uniform(-1, 1, (3, SIZE // 4 + 16, SIZE // 4 + 16)), np.ones((1, 4, 4)))
    images = np.stack([fine[:, t : t + SIZE, t : t + SIZE] for t in range(frames)]).astype(np.float32)
    first = {
        key: np.zeros(shape, np.float32) if zeros else rng.uniform(-0.5, 0.5, shape).astype(np.float32)
        for key, shape in NETWORKS[name].first.items()
    }
    return {"image": images, **first}


def torch_loop(module: nn.Module, name: str, inputs: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """PyTorch's loop: what the module gives for every frame, and the state that it started with."""
    carried = {key: torch.from_numpy(inputs[key]) for key in NETWORKS[name].first}
    made = []
    with torch.no_grad():
        for image in inputs["image"]:
            outputs = module(torch.from_numpy(image[None]), **carried)
            made.append({key: value.numpy() for key, value in (*carried.items(), *outputs.items())})
            carried = {read: outputs[written] for written, read in NETWORKS[name].state.items()}
    return made

"""Checkpoints of training runs: whole or not at all, refused where they belong to something else; shared losses."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from warpcache.engine.errors import ExportError
from warpcache.export.training import checkpoint as checkpoints
from warpcache.export.training.checkpoint import checkpoint_plan, load_checkpoint, save_checkpoint
from warpcache.export.training.loop import one_cycle
from warpcache.export.training.losses import detail_loss, same_crops

PLAN = {"branches": [{"depth": ["a"], "width": 0.5}]}


def run(seed: int, steps: int = 2) -> tuple[nn.Module, torch.optim.Adam]:
    """A network with a buffer, a few steps into its training."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        network(torch.randn(2, 2, 5, 5)).square().mean().backward()
        optimizer.step()
    return network, optimizer


def state(network: nn.Module, optimizer: torch.optim.Adam) -> list[torch.Tensor]:
    found = [value.clone() for value in network.state_dict().values()]
    for entry in optimizer.state_dict()["state"].values():
        found += [entry[name].clone() for name in sorted(entry)]
    return found


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "c.safetensors"
    saved = run(0)
    save_checkpoint(path, *saved, step=7, identity="it", plan=PLAN)
    other = run(1, steps=0)
    assert load_checkpoint(path, *other, identity="it") == 7
    before, after = state(*saved), state(*other)
    assert len(before) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert checkpoint_plan(path, "it") == PLAN
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_another_identity_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, *run(0), step=7, identity="it", plan=PLAN)
    other = run(1)
    before = state(*other)
    with pytest.raises(ExportError, match=r"^the checkpoint .* belongs to another model, clip or options"):
        load_checkpoint(path, *other, identity="something else")
    with pytest.raises(ExportError, match=r"^the checkpoint .* belongs to another model, clip or options"):
        checkpoint_plan(path, "something else")
    assert all(torch.equal(a, b) for a, b in zip(before, state(*other), strict=True))


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, *run(0), step=7, identity="it", plan=PLAN)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:4], b"", b"no safetensors file at all", b"\xff" * 64):
        path.write_bytes(damaged)
        with pytest.raises(ExportError, match=r"^the checkpoint .* cannot be read .*; delete it"):
            load_checkpoint(path, *run(0), identity="it")
        with pytest.raises(ExportError, match=r"^the checkpoint .* cannot be read .*; delete it"):
            checkpoint_plan(path, "it")
    with pytest.raises(ExportError, match=r"^the checkpoint .* cannot be read"):
        checkpoint_plan(tmp_path / "nothing.safetensors", "it")
    # The right labels on too little content.
    path.write_bytes(whole)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    tensors.pop("model.0.weight")
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ExportError, match=r"^the checkpoint .* lacks what it should hold"):
        load_checkpoint(path, *run(0), identity="it")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        # What safetensors raises when the disk is full.
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), ExportError),
        (OSError(28, "No space left on device"), ExportError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_what_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, expected: type[BaseException]
) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, *run(0), step=7, identity="it", plan=PLAN)
    before = path.read_bytes()

    def fail(tensors: object, partial: Path, metadata: object) -> None:
        partial.write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(checkpoints, "save_file", fail)
    opening = r"^the checkpoint .* cannot be written \(.*No space left" if expected is ExportError else None
    with pytest.raises(expected, match=opening):
        save_checkpoint(path, *run(1), step=8, identity="it", plan=PLAN)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 500])
def test_the_rate_goes_up_and_down_once(steps: int) -> None:
    rates = [one_cycle(step, steps, 2e-3) for step in range(steps)]
    top = int(np.argmax(rates))
    assert max(rates) == pytest.approx(2e-3, rel=1e-3)
    assert top <= max(steps // 10, 1)
    assert all(a < b for a, b in itertools.pairwise(rates[: top + 1]))
    assert all(a > b for a, b in itertools.pairwise(rates[top:]))
    assert min(rates) > 0
    if steps == 500:
        assert rates[-1] < 2e-6


def test_detail_is_the_difference_of_differences() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((2, 3, 5, 7)).astype(np.float32) for _ in range(2))
    across = np.abs(np.diff(a, axis=3) - np.diff(b, axis=3)).mean()
    down = np.abs(np.diff(a, axis=2) - np.diff(b, axis=2)).mean()
    got = float(detail_loss(torch.from_numpy(a), torch.from_numpy(b)))
    # Means of some hundred float32 numbers of size 1.
    assert got == pytest.approx((across + down) / 2, rel=1e-5)
    # A shift in brightness moves no edge.
    assert float(detail_loss(torch.from_numpy(a), torch.from_numpy(a) + 0.5)) < 1e-6


def test_crops_show_the_same_place() -> None:
    rows, columns = torch.meshgrid(torch.arange(150.0), torch.arange(200.0), indexing="ij")
    a = torch.stack([rows, columns])[None]
    places = set()
    for seed in range(5):
        one, two = same_crops([a, a.repeat(2, 1, 1, 1) + 1000.0], np.random.default_rng(seed))
        assert one.shape == (1, 2, 128, 128)
        assert torch.equal(two[:1], one + 1000.0)
        places.add((float(one[0, 0, 0, 0]), float(one[0, 1, 0, 0])))
    assert len(places) == 5
    small = torch.zeros(1, 3, 20, 30)
    assert same_crops([small], np.random.default_rng(0))[0].shape == small.shape

"""Distillation: the same run for the same seed, stopped and resumed or not; what it draws, compares and learns."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from warpcache.engine.errors import ExportError
from warpcache.export.adapter.distill import Distillation, DistillOptions, read_plan
from warpcache.export.adapter.layout import AdapterConfig, AdapterLayout, ImageInput, VectorInput
from warpcache.export.adapter.network import CacheEncoder, WarpConsumer
from warpcache.export.adapter.recording import Recording
from warpcache.export.training import checkpoint as checkpoint_module

SIZE = 32
CONFIG = AdapterConfig(stride=4, width=8, blocks=1, features=8, encoder_width=8)
LAYOUT = AdapterLayout(
    SIZE,
    SIZE,
    (("image", 3),),
    (ImageInput("condition", 1, SIZE, SIZE),),
    (VectorInput("id", (1,), torch.int64),),
    (("deep", 4, 8, 8),),
)
OPTIONS = DistillOptions(steps=6, batch=2, max_age=2, checkpoint_every=2)


def recording(frames: int = 8, *, still: bool = False, truth: bool = False, seed: int = 0) -> Recording:
    """A smooth pattern that slides 2 pixels a frame (or not at all), with a condition that shows where it is."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(-0.8, 0.8, (1, 4, 16, 16)).astype(np.float32))
    pattern = torch.nn.functional.interpolate(coarse, scale_factor=4.0, mode="bilinear")[0]
    places = [0 if still else 2 * t for t in range(frames)]
    views = torch.stack([pattern[:, 8 : 8 + SIZE, x : x + SIZE] for x in places])
    return Recording(
        inputs={"condition": views[:, 3:].clone(), "id": torch.tensor([2])},
        taps=(torch.from_numpy(rng.standard_normal((frames, 4, 8, 8)).astype(np.float32)).bfloat16(),),
        images=views[:, :3].clone(),
        truth=views[:, :3].clone() * 0.5 if truth else None,
    )


def distillation(data: Recording, options: DistillOptions = OPTIONS, **more: Any) -> Distillation:
    """A run from the initial weights that the options' seed makes."""
    torch.manual_seed(options.seed)
    return Distillation(CacheEncoder(LAYOUT, CONFIG), [WarpConsumer(LAYOUT, CONFIG)], data, options, **more)


def weights(run: Distillation) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": value.detach().clone()
        for part, module in (("encoder", run.encoder), *((f"consumer{k}", c) for k, c in enumerate(run.consumers)))
        for name, value in module.named_parameters()
    }


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Bit for bit: the same sums in the same order on one thread."""
    assert set(one) == set(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Sums in one order: how threads share the work may change it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Interrupt(KeyboardInterrupt):
    """Ctrl-C at a chosen step."""


def interrupted_at(stop: int) -> Callable[[int, object], None]:
    def on_step(step: int, _: object) -> None:
        if step == stop:
            raise Interrupt

    return on_step


def test_a_seed_makes_the_run() -> None:
    def trained(options: DistillOptions) -> dict[str, Tensor]:
        run = distillation(recording(), options)
        run.run()
        return weights(run)

    first = trained(OPTIONS)
    assert_same(first, trained(OPTIONS))
    other = trained(dataclasses.replace(OPTIONS, seed=1))
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("stop", [1, 4, 5, 6])
def test_a_resumed_run_is_the_one_that_was_never_stopped(tmp_path: Path, stop: int) -> None:
    whole_losses: list[tuple[int, dict[str, float]]] = []
    whole = distillation(recording())
    whole.run(on_step=lambda *step: whole_losses.append(step))

    checkpoint = tmp_path / "run.checkpoint.safetensors"
    with pytest.raises(Interrupt):
        distillation(recording()).run(checkpoint=checkpoint, on_step=interrupted_at(stop))
    # A new process would begin like this: other weights, overwritten by the checkpoint.
    resumed = distillation(recording(), OPTIONS)
    with torch.no_grad():
        for parameter in resumed.consumers[0].parameters():
            parameter.add_(1.0)
    losses: list[tuple[int, dict[str, float]]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a user who resumes reads stderr
        resumed.run(checkpoint=checkpoint, on_step=lambda *step: losses.append(step))
    # A checkpoint every 2 steps, and one before the first.
    saved = (stop - 1) // 2 * 2
    assert losses == whole_losses[saved:]
    assert_same(weights(resumed), weights(whole))
    assert [entry.name for entry in tmp_path.iterdir()] == [checkpoint.name]


def test_a_finished_run_leaves_its_last_step(tmp_path: Path) -> None:
    checkpoint = tmp_path / "c.safetensors"
    # Between two checkpoints: what comes after the training may be interrupted too.
    options = dataclasses.replace(OPTIONS, steps=5)
    distillation(recording(), options).run(checkpoint=checkpoint)
    with safe_open(checkpoint, "pt") as file:
        assert (file.metadata() or {})["step"] == "5"


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    checkpoint = tmp_path / "c.safetensors"
    first = distillation(recording())
    first.run(checkpoint=checkpoint)
    again = distillation(recording())
    again.run(checkpoint=checkpoint, on_step=interrupted_at(1))
    assert again.step == 6
    assert_same(weights(again), weights(first))


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "c.safetensors"
    distillation(recording(), identity="a").save(checkpoint)
    distillation(recording(), identity="a").load(checkpoint)
    for run in (
        distillation(recording(), identity="b"),
        distillation(recording(), dataclasses.replace(OPTIONS, peak_rate=1e-4), identity="a"),
        distillation(recording(), dataclasses.replace(OPTIONS, seed=3), identity="a"),
    ):
        before = weights(run)
        with pytest.raises(ExportError, match=r"^the checkpoint .* belongs to another model, clip or options"):
            run.run(checkpoint=checkpoint)
        assert_same(weights(run), before)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "c.safetensors"
    run = distillation(recording())
    run.save(checkpoint)
    whole = checkpoint.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:4], b"", b"no safetensors file at all", b"\xff" * 64):
        checkpoint.write_bytes(damaged)
        with pytest.raises(ExportError, match=r"^the checkpoint .* cannot be read .*; delete it"):
            distillation(recording()).run(checkpoint=checkpoint)
        with pytest.raises(ExportError, match=r"^the checkpoint .* cannot be read .*; delete it"):
            read_plan(checkpoint)
    # The right labels on too little content.
    checkpoint.write_bytes(whole)
    with safe_open(checkpoint, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    tensors.pop(next(name for name in tensors if name.startswith("model.")))
    save_file(tensors, checkpoint, metadata=metadata)
    with pytest.raises(ExportError, match=r"^the checkpoint .* lacks what it should hold"):
        distillation(recording()).load(checkpoint)


def test_the_plan_is_kept(tmp_path: Path) -> None:
    checkpoint = tmp_path / "new" / "folder" / "c.safetensors"
    plan = {"cut": "a,b", "adapter": {"width": 8}}
    with pytest.raises(Interrupt):
        # Before the first step is done: the plan is there from the beginning.
        distillation(recording(), plan=plan).run(checkpoint=checkpoint, on_step=interrupted_at(1))
    assert read_plan(checkpoint) == plan
    with pytest.raises(ExportError, match=r"^there is no checkpoint '.*' to resume from; leave --resume out"):
        read_plan(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        # What safetensors raises when the disk is full or the file would become too large.
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), ExportError),
        (OSError(28, "No space left on device"), ExportError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, expected: type[BaseException]
) -> None:
    checkpoint = tmp_path / "c.safetensors"
    distillation(recording()).save(checkpoint)
    before = checkpoint.read_bytes()

    def fail(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(checkpoint_module, "save_file", fail)
    opening = r"^the checkpoint .* cannot be written \(.*No space left" if expected is ExportError else None
    with pytest.raises(expected, match=opening):
        distillation(recording()).save(checkpoint)
    assert checkpoint.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [checkpoint.name]


def test_it_learns_what_moves() -> None:
    data = recording()
    run = distillation(data, DistillOptions(steps=150, batch=4, max_age=1, peak_rate=5e-3))
    losses: list[float] = []

    def error() -> float:
        """Mean absolute error of age 1 over the clip, in float32."""
        with torch.no_grad():
            t = torch.arange(1, 8)
            return float((run.answers(t, t - 1)[0] - data.images[t]).abs().mean())

    untrained = error()
    run.run(on_step=lambda _, told: losses.append(told["generator"]))
    frozen = float((data.images[1:] - data.images[:-1]).abs().mean())
    # Untrained it shows nearly the last image. The motion is the same in every frame and in reach of the flow.
    assert untrained > 0.8 * frozen
    assert error() < 0.6 * frozen
    assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:10])
    assert not run.encoder.training
    assert not run.consumers[0].training


def test_frames_that_never_change_are_learnt_by_heart() -> None:
    data = recording(5, still=True)
    run = distillation(data, DistillOptions(steps=60, batch=2, max_age=2, peak_rate=5e-3))
    told: list[dict[str, float]] = []
    run.run(on_step=lambda _, losses: told.append(losses))
    assert all(np.isfinite(list(losses.values())).all() for losses in told)
    with torch.no_grad():
        (answer,) = run.answers(torch.tensor([2]), torch.tensor([1]))
    # It begins 2 % off (it does not fully trust the moved image); what is left is noise of the last steps.
    assert (answer - data.images[2]).abs().mean() < 0.02


class Watched(Distillation):
    """A run that notes the pairs of frames that it draws."""

    def answers(self, t: Tensor, s: Tensor) -> list[Tensor]:
        self.__dict__.setdefault("pairs", []).extend(zip(t.tolist(), s.tolist(), strict=True))
        return super().answers(t, s)


def drawn(frames: int, options: DistillOptions) -> list[tuple[int, int]]:
    torch.manual_seed(0)
    run = Watched(CacheEncoder(LAYOUT, CONFIG), [WarpConsumer(LAYOUT, CONFIG)], recording(frames), options)
    run.run()
    return run.__dict__["pairs"]


def test_every_age_is_drawn_and_none_leaves_the_clip() -> None:
    pairs = drawn(7, DistillOptions(steps=12, batch=16, max_age=3))
    assert len(pairs) == 12 * 16
    assert all(0 <= s < 7 and 0 <= t < 7 and s != t for t, s in pairs)
    # Most pairs are as they will be answered, from an older frame; some run backwards.
    ages = [t - s for t, s in pairs if s < t]
    assert len(ages) > 0.5 * len(pairs)
    assert {1, 2, 3} <= set(ages)
    assert max(abs(t - s) for t, s in pairs) <= 6
    # Young caches are what is answered from most of the time.
    assert ages.count(1) > ages.count(2) > ages.count(3)
    assert {t for t, _ in pairs} >= {1, 2, 3, 4, 5, 6}
    assert {s for _, s in pairs} >= {0, 1, 2, 3, 4, 5}


def test_a_clip_shorter_than_the_oldest_age() -> None:
    assert (1, 0) in set(drawn(2, DistillOptions(steps=2, batch=4, max_age=9))) <= {(1, 0), (0, 1)}
    with pytest.raises(ExportError, match=r"^training needs at least 2 frames, the inputs hold 1"):
        distillation(recording(1))


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11, 20])
def test_any_number_of_steps(steps: int) -> None:
    run = distillation(recording(), dataclasses.replace(OPTIONS, steps=steps, batch=1))
    before = weights(run)
    run.run()
    assert run.step == steps
    assert any(not torch.equal(before[name], value) for name, value in weights(run).items())


def test_truth_is_compared_where_it_is_given() -> None:
    def told(data: Recording, weight: float) -> list[dict[str, float]]:
        losses: list[dict[str, float]] = []
        run = distillation(data, dataclasses.replace(OPTIONS, truth_weight=weight, steps=60, peak_rate=5e-3))
        run.run(on_step=lambda _, step: losses.append(step))
        return losses

    assert "truth" not in told(recording(), 1.0)[0]
    assert "truth" not in told(recording(truth=True), 0.0)[0]
    losses = told(recording(truth=True), 5.0)
    # The truth is the picture at half its contrast: with five times the weight it is what the answer goes to.
    truth, generator = (np.mean([step[name] for step in losses[-10:]]) for name in ("truth", "generator"))
    assert truth < 0.7 * losses[0]["truth"]
    assert truth < generator


def test_a_perceptual_loss_sees_answer_and_target() -> None:
    data, seen = recording(), []

    def distance(answer: Tensor, target: Tensor) -> Tensor:
        seen.append((answer, target))
        return (answer - target).square().mean()

    told: list[dict[str, float]] = []
    run = distillation(data, dataclasses.replace(OPTIONS, steps=1, perceptual_weight=2.0), perceptual=distance)
    run.run(on_step=lambda _, losses: told.append(losses))
    ((answer, target),) = seen
    assert answer.requires_grad
    assert not target.requires_grad
    # Targets are the recorded frames themselves (here no larger than what is looked at).
    assert all(any(torch.equal(frame, image) for image in data.images) for frame in target)
    assert told[0]["perceptual"] == pytest.approx(float((answer - target).square().mean().detach()))
    unused = distillation(data, dataclasses.replace(OPTIONS, steps=1, perceptual_weight=0.0), perceptual=distance)
    unused.run()
    assert len(seen) == 1

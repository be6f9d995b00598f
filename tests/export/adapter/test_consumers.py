"""Consumers of several sizes on one cache: how they are chosen, and that training them together is what it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import Tensor
from torch.nn import functional

from warpcache.engine.errors import ExportError
from warpcache.export.adapter import graphs as adapter_graph
from warpcache.export.adapter.distill import Distillation, DistillOptions
from warpcache.export.adapter.graphs import CHEAPER, LADDER, choose_config, choose_configs, smaller_configs
from warpcache.export.adapter.layout import AdapterConfig, AdapterLayout, ImageInput
from warpcache.export.adapter.network import CacheEncoder, WarpConsumer
from warpcache.export.adapter.recording import Recording
from warpcache.export.graph.profile import Timing

SIZE = 32
LARGE = AdapterConfig(stride=4, width=16, blocks=1, features=8, encoder_width=8)
SMALL = AdapterConfig(stride=4, width=8, blocks=0, features=8, encoder_width=8)
LAYOUT = AdapterLayout(SIZE, SIZE, (("image", 3),), (ImageInput("condition", 1, SIZE, SIZE),), (), (("deep", 4, 8, 8),))
OPTIONS = DistillOptions(steps=6, batch=2, max_age=2, checkpoint_every=2)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in one order: how threads share the work may change it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def recording(frames: int = 8) -> Recording:
    """A smooth pattern that slides 2 pixels a frame, with a condition that shows where it is."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.uniform(-0.8, 0.8, (1, 4, 16, 16)).astype(np.float32))
    pattern = functional.interpolate(coarse, scale_factor=4.0, mode="bilinear")[0]
    views = torch.stack([pattern[:, 8 : 8 + SIZE, x : x + SIZE] for x in range(0, 2 * frames, 2)])
    return Recording(
        inputs={"condition": views[:, 3:].clone()},
        taps=(torch.from_numpy(rng.standard_normal((frames, 4, 8, 8)).astype(np.float32)).bfloat16(),),
        images=views[:, :3].clone(),
    )


def distillation(*configs: AdapterConfig, options: DistillOptions = OPTIONS, **more: Any) -> Distillation:
    torch.manual_seed(options.seed)
    encoder = CacheEncoder(LAYOUT, configs[0])
    return Distillation(encoder, [WarpConsumer(LAYOUT, config) for config in configs], recording(), options, **more)


def values(*modules: torch.nn.Module) -> list[Tensor]:
    return [value.detach().clone() for module in modules for value in module.state_dict().values()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_first_consumer_begins_as_it_would_alone() -> None:
    alone, both = distillation(LARGE), distillation(LARGE, SMALL)
    assert same(values(alone.encoder, alone.consumers[0]), values(both.encoder, both.consumers[0]))


def test_the_encoder_runs_once_a_step_and_learns_from_all() -> None:
    run = distillation(LARGE, SMALL)
    calls = []
    run.encoder.register_forward_hook(lambda *_: calls.append(1))
    run.run()
    assert len(calls) == OPTIONS.steps
    alone = distillation(LARGE)
    alone.run()
    assert not same(values(alone.encoder), values(run.encoder))


def test_the_loss_is_the_sum_over_the_consumers() -> None:
    """Told losses against those worked out from the answers, before the first step changes anything."""
    run = distillation(LARGE, SMALL)
    seen: list[tuple[Tensor, Tensor]] = []

    def distance(answer: Tensor, target: Tensor) -> Tensor:
        seen.append((answer.detach(), target))
        return (answer - target).square().mean()

    run.perceptual = distance
    told: list[dict[str, float]] = []

    class Enough(Exception):
        pass

    def first(_: int, losses: dict[str, float]) -> None:
        told.append(losses)
        raise Enough

    with pytest.raises(Enough):
        run.run(on_step=first)
    assert len(seen) == 2
    # Sums of the same float32 numbers in another order.
    assert told[0]["generator"] == pytest.approx(sum(float((a - b).abs().mean()) for a, b in seen), rel=1e-5)
    assert told[0]["perceptual"] == pytest.approx(sum(float((a - b).square().mean()) for a, b in seen), rel=1e-5)


def test_every_consumer_learns() -> None:
    run = distillation(LARGE, SMALL, options=DistillOptions(steps=150, batch=4, max_age=1, peak_rate=5e-3))
    data = run.recording
    run.run()
    frozen = float((data.images[1:] - data.images[:-1]).abs().mean())
    with torch.no_grad():
        t = torch.arange(1, 8)
        errors = [float((answer - data.images[t]).abs().mean()) for answer in run.answers(t, t - 1)]
    # The motion is the same in every frame and in reach of the flow of both.
    assert max(errors) < 0.6 * frozen
    assert not any(consumer.training for consumer in run.consumers)


def test_one_checkpoint_holds_them_all(tmp_path: Path) -> None:
    whole = distillation(LARGE, SMALL)
    whole.run()
    checkpoint = tmp_path / "c.safetensors"

    def stop(step: int, _: object) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distillation(LARGE, SMALL).run(checkpoint=checkpoint, on_step=stop)
    resumed = distillation(LARGE, SMALL)
    with torch.no_grad():
        for parameter in resumed.consumers[1].parameters():
            parameter.add_(1.0)
    steps: list[int] = []
    resumed.run(checkpoint=checkpoint, on_step=lambda step, _: steps.append(step))
    assert steps == [5, 6]
    assert same(values(whole.encoder, *whole.consumers), values(resumed.encoder, *resumed.consumers))
    # The right labels, but of another number of consumers.
    with pytest.raises(ExportError, match=r"^the checkpoint .* lacks what it should hold"):
        distillation(LARGE).load(checkpoint)


class FakeCosts:
    """Consumers cost what a formula says of their size, as a fraction of the whole; graphs are not made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, floor: float = 0.0) -> None:
        self.floor = floor
        monkeypatch.setattr(adapter_graph, "consumer_graph", self.graph)
        monkeypatch.setattr(adapter_graph, "WarpConsumer", FakeConsumer)
        monkeypatch.setattr(adapter_graph, "time_model", self.time)

    def cost(self, config: AdapterConfig) -> float:
        return self.floor + config.width**2 * (config.blocks + 1.5) * 1e-5

    def graph(self, consumer: FakeConsumer, layout: AdapterLayout, limits: tuple[float, float]) -> onnx.ModelProto:
        return helper.make_model(helper.make_graph([], f"{self.cost(consumer.config):.9f}", [], []))

    def time(self, models: dict[str, onnx.ModelProto], feeds: object, **options: object) -> dict[str, Timing]:
        return {"whole": Timing((10.0,)), "consumer": Timing((10.0 * float(models["consumer"].graph.name),))}


class FakeConsumer:
    def __init__(self, layout: AdapterLayout, config: AdapterConfig) -> None:
        self.config = config

    def eval(self) -> FakeConsumer:
        return self


def chosen(budget: float, count: int, ladder: tuple[AdapterConfig, ...] = LADDER) -> tuple[AdapterConfig, ...]:
    return choose_configs(onnx.ModelProto(), LAYOUT, budget, {}, count, ladder=ladder, progress=lambda *_: None)


@pytest.mark.parametrize("budget", [0.1, 0.2, 0.4])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_consumer_is_the_largest_within_its_share(
    monkeypatch: pytest.MonkeyPatch, budget: float, count: int
) -> None:
    costs = FakeCosts(monkeypatch)
    sizes = chosen(budget, count)
    assert len(sizes) == count
    assert sizes[0] == choose_config(onnx.ModelProto(), LAYOUT, budget, {}, progress=lambda *_: None)
    # All read one encoding.
    assert len({(size.stride, size.features, size.encoder_width) for size in sizes}) == 1
    for k in range(1, count):
        share = budget * CHEAPER**k
        # 7 % of room is left for the noise of measuring.
        assert costs.cost(sizes[k]) <= 0.93 * share
        larger = [size for size in smaller_configs(sizes[k - 1]) if costs.cost(size) > costs.cost(sizes[k])]
        assert all(costs.cost(size) > 0.93 * share for size in larger)


def test_where_the_share_cannot_be_met_the_consumers_are_still_cheaper_and_cheaper(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The work at full resolution alone is 6 % of this generator.
    costs = FakeCosts(monkeypatch, floor=0.06)
    sizes = chosen(0.1, 3)
    ratios = [costs.cost(size) for size in sizes]
    assert ratios == sorted(ratios, reverse=True)
    assert len(set(sizes)) == 3
    assert sizes[2].width == LADDER[-1].width
    assert sizes[2].blocks == 0


def test_more_consumers_than_sizes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCosts(monkeypatch)
    below = len(smaller_configs(LADDER[-3]))
    with pytest.raises(
        ExportError,
        match=rf"^{below + 2} consumers were asked for, but the largest .* leaves only {below + 1}; ask for",
    ):
        chosen(0.5, below + 2, LADDER[-3:])
    assert len(chosen(0.5, below + 1, LADDER[-3:])) == below + 1


def test_smaller_sizes_cost_less_in_everything() -> None:
    for config in LADDER:
        sizes = smaller_configs(config)
        assert config not in sizes
        assert len(set(sizes)) == len(sizes)
        for size in sizes:
            assert (size.width, size.blocks) != (config.width, config.blocks)
            assert size.width <= config.width
            assert size.blocks <= config.blocks
            assert size.features == config.features
    assert smaller_configs(LADDER[-1]) == ()

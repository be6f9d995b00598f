"""Branches: a chosen depth and width, joined graphs that give the generator's own answers, training that resumes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from warpcache.engine.errors import ExportError, InputError
from warpcache.export.branches import plan as branch_plan
from warpcache.export.branches.branches import Branch, BranchOptions, default_costs, train_branches
from warpcache.export.branches.graphs import lookup_graph
from warpcache.export.branches.guide_bank import guide_value, pool_features
from warpcache.export.branches.plan import BranchPlan, choose_depths, choose_widths, make_guides, untrained_graph
from warpcache.export.branches.slim import slim
from warpcache.export.branches.training import BranchNetwork, BranchTraining, Lesson, TrainOptions
from warpcache.export.bundle.weights import shared_weights
from warpcache.export.frames.streams import frame_at
from warpcache.export.graph.index import GraphIndex
from warpcache.export.graph.macs import count_macs
from warpcache.export.graph.profile import Timing
from warpcache.export.graph.run import open_session, run_session
from warpcache.export.graph.surgery import give_out
from warpcache.export.torch_graph.module import GraphModule
from warpcache.export.training.checkpoint import checkpoint_plan


@dataclasses.dataclass(frozen=True)
class Case:
    """A generator and what it gives on its stream."""

    model: onnx.ModelProto
    stream: dict[str, np.ndarray]
    images: np.ndarray

    def frame(self, t: int) -> dict[str, np.ndarray]:
        return frame_at(self.stream, t)


def case_of(traced: Any) -> Case:
    session = open_session(traced.model)
    names = GraphIndex(traced.model).outputs
    frames = max(len(array) for array in traced.stream.values())
    images = [np.concatenate([run_session(session, traced.frame(t))[n] for n in names], 1) for t in range(frames)]
    return Case(traced.model, traced.stream, np.concatenate(images))


_KEPT: dict[str, Any] = {}


@pytest.fixture
def unet(trace: Callable[[str], Any]) -> Case:
    """The U-Net on its clip, made once."""
    if "unet" not in _KEPT:
        _KEPT["unet"] = case_of(trace("unet"))
    return _KEPT["unet"]


@pytest.fixture
def pair(unet: Case) -> dict[float, Branch]:
    """Two branches of it by width, a few steps into their training, made once: read them only."""
    if "pair" not in _KEPT:
        _KEPT["pair"] = widths_of(trained(unet, two(unet)))
    return _KEPT["pair"]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Sums in one order: how threads share the work may change it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def silent(*_: object) -> None:
    """Progress that nobody reads."""


def after_first_block(model: onnx.ModelProto) -> tuple[str, ...]:
    """The first encoder block's result, which the skip connection and the pooling read."""
    (value,) = GraphIndex(model).module_outputs("enc.0")
    return (value,)


def trained(case: Case, options: BranchOptions, **more: Any) -> list[Branch]:
    return train_branches(case.model, case.stream, case.images, options=options, progress=silent, **more)


def two(case: Case, **more: Any) -> BranchOptions:
    """Two branches at fixed places, so that no test depends on a clock."""
    place = after_first_block(case.model)
    return BranchOptions(
        **{"count": 2, "places": [place, place], "widths": [0.5, 1.0], "bank_size": 4, "steps": 4, "batch": 2} | more
    )


def answers(graph: onnx.ModelProto, case: Case) -> np.ndarray:
    """What a graph gives for every frame, outputs' channels together."""
    session, names = open_session(graph), GraphIndex(case.model).outputs
    return np.concatenate(
        [np.concatenate([run_session(session, case.frame(t))[n] for n in names], 1) for t in range(len(case.images))]
    )


def arrays_of(graph: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}


def widths_of(branches: list[Branch]) -> dict[float, Branch]:
    """By width: which is the cheaper is for a clock to say, not for a test."""
    return {branch.record["width"]: branch for branch in branches}


@pytest.mark.parametrize(("name", "bank_size"), [("unet", 0), ("residual", 0), ("latent", 4), ("attention", 0)])
def test_an_untrained_branch_of_full_width_is_the_generator(
    trace: Callable[[str], Any], name: str, bank_size: int
) -> None:
    case = case_of(trace(name))
    options = BranchOptions(count=1, costs=[0.9], widths=[1.0], bank_size=bank_size, steps=0)
    (branch,) = trained(case, options)
    assert (branch.record["bank"] is not None) == bool(bank_size)
    assert set(GraphIndex(branch.graph).inputs) <= set(GraphIndex(case.model).inputs)
    assert GraphIndex(branch.graph).outputs == GraphIndex(case.model).outputs
    onnx.checker.check_model(branch.graph, full_check=True)
    # The look-up adds zeros, and the limits are those of these images; but an addition in between can change what the
    # executor fuses, and with it the rounding of numbers of size 1 over a dozen layers.
    np.testing.assert_allclose(answers(branch.graph, case), case.images, atol=1e-5)


def test_several_outputs_and_inputs_of_every_kind(portrait: Any) -> None:
    case = case_of(portrait)
    wide, slimmed = (
        trained(case, BranchOptions(count=1, places=[()], widths=[width], bank_size=bank, steps=steps, batch=2))[
            0
        ].graph
        for width, bank, steps in ((1.0, 3, 0), (0.5, 0, 2))
    )
    np.testing.assert_allclose(answers(wide, case), case.images, atol=1e-5)
    assert np.isfinite(answers(slimmed, case)).all()
    # Its layers of 8 channels are no multiple of 8 at half the width; they are slimmed all the same.
    assert count_macs(slimmed) < 0.6 * count_macs(case.model)


def test_what_is_trained_is_what_is_emitted(unet: Case, pair: dict[float, Branch]) -> None:
    place = after_first_block(unet.model)
    for width, branch in pair.items():
        arrays = arrays_of(branch.graph)
        # The same branch by hand: the generator's first layers, then the slim rest with the trained weights.
        first = run_first(unet, place)
        rest = slim(unet.model, place, width).rest
        changed = 0
        for tensor in rest.graph.initializer:
            trained_name = next(
                n for n in (f"{tensor.name}.2", tensor.name) if n in arrays and arrays[n].shape == tuple(tensor.dims)
            )
            changed += not np.array_equal(arrays[trained_name], numpy_helper.to_array(tensor))
            tensor.CopyFrom(numpy_helper.from_array(arrays[trained_name], tensor.name))
        assert changed > 0
        (spread,) = (n for n in arrays if n.endswith("spread.weight"))
        assert (arrays[spread] != 0).any()
        session = open_session(rest)
        without_bank = np.concatenate(
            [run_session(session, unet.frame(t) | {place[0]: first[t]})["image"] for t in range(len(unet.images))]
        )
        low, high = unet.images.min(), unet.images.max()
        got = answers(branch.graph, unet)
        assert (got >= low).all()
        assert (got <= high).all()
        # After four steps the bank's part is small, and is not nothing.
        difference = np.abs(got - without_bank.clip(low, high)).max()
        assert 0 < difference < 0.1


def run_first(case: Case, place: tuple[str, ...]) -> list[np.ndarray]:
    session = open_session(give_out(case.model, place))
    return [run_session(session, case.frame(t))[place[0]] for t in range(len(case.images))]


def test_frozen_layers_are_stored_once(unet: Case, pair: dict[float, Branch], tmp_path: Path) -> None:
    generator = arrays_of(unet.model)
    own = set(GraphIndex(slim(unet.model, after_first_block(unet.model), 1.0).rest).initializers)
    frozen = {name: array for name, array in generator.items() if name not in own}
    assert any(array.ndim == 4 for array in frozen.values())
    for branch in pair.values():
        arrays = arrays_of(branch.graph)
        for name, array in frozen.items():
            assert arrays[name].tobytes() == array.tobytes(), name
    models = {"generator": unet.model, "half": pair[0.5].graph, "whole": pair[1.0].graph}
    shared_weights(models, tmp_path)
    stored = (tmp_path / "weights.safetensors").read_bytes()
    header = json.loads(stored[8 : 8 + int.from_bytes(stored[:8], "little")])
    # The bank's values are the same in both branches, and stored once too.
    values = [a for a in arrays_of(pair[0.5].graph).values() if a.shape == (4, 16 * 16 * 16)]
    assert len(values) == 1
    assert sum(entry["shape"] == [4, 16 * 16 * 16] for entry in header.values()) == 1


def test_joint_training_moves_the_first_layers(unet: Case) -> None:
    options = BranchOptions(
        count=1, places=[after_first_block(unet.model)], widths=[0.5], joint=True, bank_size=4, steps=2, batch=2
    )
    for branch in trained(unet, options):
        arrays, generator = arrays_of(branch.graph), arrays_of(unet.model)
        frozen = [n for n in generator if n in arrays and generator[n].shape == arrays[n].shape]
        moved = [n for n in frozen if not np.array_equal(arrays[n], generator[n])]
        assert any(n.startswith("enc.0") for n in moved), moved
        assert branch.record["joint"] is True
        assert np.isfinite(answers(branch.graph, unet)).all()


def test_branches_are_named_by_cost(pair: dict[float, Branch]) -> None:
    first, second = sorted(pair.values(), key=lambda branch: branch.name)
    assert (first.name, second.name) == ("branch1", "branch2")
    assert first.cost_ratio <= second.cost_ratio
    record = json.loads(json.dumps(first.record))
    assert record["bank"]["entries"] == 4
    assert record["steps"] == 4


def test_answers_stay_in_the_images_range(unet: Case) -> None:
    dim = dataclasses.replace(unet, images=(unet.images * 0.1 + 0.05).astype(np.float32))
    for branch in trained(dim, two(unet, steps=0, bank_size=0)):
        got = answers(branch.graph, unet)
        assert got.min() == dim.images.min()
        assert got.max() == dim.images.max()


def test_training_brings_it_closer(unet: Case) -> None:
    def error(options: BranchOptions) -> float:
        (branch,) = trained(unet, options)
        return float(np.abs(answers(branch.graph, unet) - unet.images).mean())

    place = after_first_block(unet.model)
    options = BranchOptions(count=1, places=[place], widths=[0.5], bank_size=0, steps=0, batch=6, peak_rate=5e-3)
    before = error(options)
    # Six frames of 32x32 are learnt by heart: measured 0.2 to 0.35 of what it began with, over three seeds.
    assert error(dataclasses.replace(options, steps=80)) < 0.6 * before


class Interrupt(KeyboardInterrupt):
    """Ctrl-C at a chosen step."""


def test_a_resumed_run_is_the_one_that_was_never_stopped(unet: Case, pair: dict[float, Branch], tmp_path: Path) -> None:
    stop, options = 3, two(unet, checkpoint_every=2)
    checkpoint = tmp_path / "b.checkpoint.safetensors"

    def interrupt(stage: str, done: int, _: int) -> None:
        if stage == "training the branches" and done == stop:
            raise Interrupt

    with pytest.raises(Interrupt):
        train_branches(unet.model, unet.stream, unet.images, options=options, progress=interrupt, checkpoint=checkpoint)
    told: list[int] = []

    def note(stage: str, done: int, _: int) -> None:
        if stage == "training the branches":
            told.append(done)

    resumed = widths_of(
        train_branches(unet.model, unet.stream, unet.images, options=options, progress=note, checkpoint=checkpoint)
    )
    # A checkpoint every two steps, and one before the first.
    assert told == [3, 4]
    for width, branch in pair.items():
        # Bit for bit: the same sums in the same order on one thread.
        assert resumed[width].graph.SerializeToString() == branch.graph.SerializeToString()
    other = dataclasses.replace(options, seed=1)
    with pytest.raises(ExportError, match=r"^the checkpoint .* belongs to another model, clip or options"):
        trained(unet, other, checkpoint=checkpoint)


def made_up_times(
    models: dict[str, onnx.ModelProto], feeds: object, *, threads: int, repeats: int
) -> dict[str, Timing]:
    """As long as they multiply."""
    return {name: Timing((count_macs(model) / 1e6,)) for name, model in models.items()}


def made_up_profile(model: onnx.ModelProto, feeds: object) -> dict[str, float]:
    """Ten for a convolution, a half for the rest."""
    index = GraphIndex(model)
    return {n: 10.0 if node.op_type == "Conv" else 0.5 for n, node in zip(index.names, index.nodes, strict=True)}


def test_places_and_widths_follow_from_costs(unet: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branch_plan, "time_model", made_up_times)
    monkeypatch.setattr(branch_plan, "profile_nodes", made_up_profile)
    model, feeds = unet.model, unet.frame(0)
    index, times = GraphIndex(model), made_up_profile(unet.model, None)

    def share(depth: tuple[str, ...]) -> float:
        return sum(times[index.names[k]] for k in index.closure(depth)) / sum(times.values())

    places = choose_depths(model, feeds, (0.05, 0.35, 0.9))
    # The first convolution alone is a seventh of all.
    assert places[0] == ()
    assert 0.2 * 0.35 < share(places[1]) <= 0.6 * 0.35
    assert share(places[1]) <= share(places[2]) <= 0.2 * 0.9
    places = places[::2]
    guides = make_guides(model, unet.stream, places, 3, silent)
    plans = choose_widths(model, places, guides, feeds, (0.3, 0.7), silent)
    whole = count_macs(model)
    for plan, cost in zip(plans, (0.3, 0.7), strict=True):
        guide = guides[plan.depth]
        lookup = lookup_graph(guide.lookup(), guide.values, guide.shapes)
        graph, wider, narrowest = (
            untrained_graph(model, BranchPlan(plan.depth, width), lookup=lookup, target=guide.target)
            for width in (plan.width, min(plan.width + 1 / 32, 1.0), 1 / 32)
        )
        assert count_macs(graph) / whole <= cost or count_macs(graph) == count_macs(narrowest)
        assert count_macs(wider) / whole > cost or plan.width == 1.0


def test_no_branch_is_worth_it(unet: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branch_plan, "time_model", lambda models, *_, **__: {n: Timing((1.0,)) for n in models})
    monkeypatch.setattr(branch_plan, "profile_nodes", made_up_profile)
    with pytest.raises(ExportError, match=r"^the cheapest branch costs 100% of the generator"):
        trained(unet, BranchOptions(steps=0, bank_size=0))


def test_costs_spread_evenly() -> None:
    assert default_costs(2) == (0.12, 0.3)
    assert default_costs(1) == (pytest.approx(0.19, abs=0.001),)
    three = default_costs(3)
    assert three[1] / three[0] == pytest.approx(three[2] / three[1], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "opening"),
    [
        ({"count": 0}, r"^count is 0; it must be 1 or more"),
        ({"bank_size": -1}, r"^bank_size is -1; it must be 0 or more"),
        ({"steps": -1}, r"^steps is -1"),
        ({"batch": 0}, r"^batch is 0"),
        ({"peak_rate": 0.0}, r"^peak_rate is 0.0"),
        ({"count": 2, "widths": [0.5]}, r"^widths has 1 entries for 2 branches"),
        ({"count": 1, "places": [(), ()]}, r"^places has 2 entries for 1 branches"),
        ({"count": 1, "widths": [1.5]}, r"^widths holds 1.5; it must be above 0 and at most 1"),
        ({"count": 1, "costs": [0.0]}, r"^costs holds 0.0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], opening: str) -> None:
    with pytest.raises(InputError, match=opening):
        BranchOptions(**options)


def test_what_cannot_be_trained_is_refused(unet: Case, trace: Callable[[str], Any]) -> None:
    options = BranchOptions(count=1, widths=[0.5], places=[()], bank_size=0, steps=1)
    with pytest.raises(InputError, match=r"^the stream lacks the generator's input 'condition'"):
        train_branches(unet.model, {}, unet.images, options=options, progress=silent)
    with pytest.raises(InputError, match=r"^the generator's images are \(5, 3, 32, 32\), but the stream has \(6, 3"):
        train_branches(unet.model, unet.stream, unet.images[:5], options=options, progress=silent)
    many = trace("many")
    with pytest.raises(ExportError, match=r"^output 'feature' is float32 .*; branches need outputs that are"):
        train_branches(many.model, many.stream, unet.images, options=options, progress=silent)
    short = {name: array[:1] for name, array in unet.stream.items()}
    with pytest.raises(ExportError, match=r"^training needs at least 2 frames"):
        train_branches(unet.model, short, unet.images[:1], options=options, progress=silent)


def training(
    case: Case, *, joint: bool = False, near: int = 2, steps: int = 2, seed: int = 0, **more: Any
) -> BranchTraining:
    """A run of one branch with a bank of every frame, as `train_branches` sets it up."""
    place = after_first_block(case.model)
    guide = make_guides(case.model, case.stream, [place], 6, silent)[place]
    made = slim(case.model, place, 0.5)
    prefix = branch_plan.prefix_graph(case.model, place)
    assert prefix is not None
    network = BranchNetwork(
        GraphModule(made.rest, train="all"),
        ["image"],
        prefix=GraphModule(prefix, train="all") if joint else None,
        lookup=guide.lookup(),
        guided=guide.values,
    )
    return BranchTraining(
        [network],
        [guide.bank],
        Lesson(
            {name: torch.from_numpy(array) for name, array in case.stream.items()},
            torch.from_numpy(case.images),
            shared=None if joint else GraphModule(prefix),
            near=near,
        ),
        TrainOptions(steps=steps, batch=2, seed=seed),
        **more,
    )


def test_a_seed_makes_the_run(unet: Case) -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        run = training(unet, seed=seed)
        run.run()
        return [parameter.detach() for parameter in run.modules.parameters()]

    first, again, other = weights(0), weights(0), weights(1)
    # Bit for bit: the same sums in the same order on one thread.
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_an_entry_holds_what_the_whole_made_of_its_frame(unet: Case) -> None:
    place = after_first_block(unet.model)
    bank = make_guides(unet.model, unet.stream, [place], 4, silent)[place].bank
    value = guide_value(unet.model)
    session = open_session(give_out(unet.model, [value]))
    whole = np.stack([run_session(session, unet.frame(int(t)))[value][0] for t in bank.frames])
    assert len(set(bank.frames.tolist())) == 4
    # All 16 channels of 16x16 are kept, so the reduction is a rotation and one scale: it changes no ratio of distances.
    there, here = (((a[:, None] - a[None]) ** 2).sum((2, 3, 4)) for a in (whole.astype(np.float64), bank.values))
    off = ~np.eye(4, dtype=bool)
    ratio = here[off] / there[off]
    # float32 sums over 4096 numbers.
    assert ratio[0] > 0
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)
    # The keys are the frames' own too: a frame in the bank lies at no distance from its entry.
    first = run_first(unet, place)
    own = pool_features([torch.from_numpy(np.concatenate([first[int(t)] for t in bank.frames]))]).numpy()
    np.testing.assert_allclose(own @ bank.projection + bank.offset, bank.keys, atol=1e-3)


def test_in_training_a_frame_does_not_find_itself(unet: Case) -> None:
    run = training(unet)
    network = run.branches[0]
    torch.nn.init.normal_(network.lookup.spread.weight)
    frames = torch.arange(6)
    with torch.no_grad():
        (with_itself,), (without,) = run.answers(frames, exclude=False), run.answers(frames, exclude=True)
    assert all(not torch.equal(a, b) for a, b in zip(with_itself, without, strict=True))
    asked: list[torch.Tensor] = []
    network.register_forward_pre_hook(lambda _, arguments: asked.append(arguments[1]))
    run.run()
    entries = torch.from_numpy(run.banks[0].frames)
    assert len(asked) == 2
    for excluded in asked:
        assert excluded.shape == (2, len(entries))
        for row in excluded:
            # The frame and its neighbours: three in a row, or two at an end of the clip.
            lost = sorted(entries[row].tolist())
            assert lost in [[0, 1], [4, 5]] or (len(lost) == 3 and lost[2] - lost[0] == 2), lost


def test_keys_follow_the_layers_that_make_them(unet: Case) -> None:
    run = training(unet, joint=True, steps=3)
    network = run.branches[0]
    frames = torch.from_numpy(run.banks[0].frames)
    before = network.lookup.keys.clone()
    run.run()
    assert not torch.equal(network.lookup.keys, before)
    with torch.no_grad():
        features = network.features({"condition": torch.from_numpy(unet.stream["condition"])[frames]})
        keys = features @ network.lookup.projection + network.lookup.offset
    # Computed frame by frame or together: float32 sums in another order.
    torch.testing.assert_close(network.lookup.keys, 2.0 * keys.T, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(network.lookup.lengths, keys.square().sum(1), atol=1e-2, rtol=1e-3)


def test_the_perceptual_loss_weighs_every_branch_alike(unet: Case) -> None:
    seen: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seen.append((tuple(a.shape), tuple(b.shape)))
        return (a - b).abs().mean()

    trained(unet, two(unet, steps=1, bank_size=0), perceptual=distance)
    assert seen == [((4, 3, 32, 32), (4, 3, 32, 32))]


def test_a_plan_can_be_read_back(unet: Case, tmp_path: Path) -> None:
    checkpoint = tmp_path / "c.safetensors"
    plan = {"branches": [{"depth": ["a"], "width": 0.5}]}
    training(unet, identity="mine", plan=plan).run(checkpoint=checkpoint)
    assert checkpoint_plan(checkpoint, "mine") == plan

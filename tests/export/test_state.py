"""Generators that carry state, through the compiler and the engine, against PyTorch's own loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest
import torch
from onnx import helper
from recurrent import NETWORKS, network, stream, torch_loop
from torch import Tensor, nn

from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.bundle.roles import Role
from warpcache.engine.engine import Engine
from warpcache.engine.errors import ExportError, InputError
from warpcache.export import compile as compile_module
from warpcache.export.adapter.layout import AdapterConfig
from warpcache.export.compile import Footage, compile_generator, split_model
from warpcache.export.frames.state import apart, carried, state_of
from warpcache.export.graph.index import GraphIndex
from warpcache.export.graph.run import run_model
from warpcache.export.graph.surgery import normalise
from warpcache.export.graph.trace import trace_generator
from warpcache.export.options import CompileOptions
from warpcache.export.precision.convert import PrecisionOptions, convert_bundle

FRAMES = 10
SMALL = AdapterConfig(stride=4, width=16, blocks=0, features=16, encoder_width=16)
# ONNX Runtime and PyTorch add up convolutions in different orders; states feed the difference back for ten frames.
TOLERANCE = 5e-5


@dataclass
class Frames:
    """A clip in memory."""

    arrays: dict[str, np.ndarray]
    fps: float | None = None
    truth: np.ndarray | None = None
    frames: int = field(init=False)

    def __post_init__(self) -> None:
        self.frames = max(map(len, self.arrays.values()))


def compile_(name: str, out: Path, *, steps: int = 0, **options: Any) -> Bundle:
    return compile_generator(
        network(name),
        Footage(Frames(stream(name, 16))),
        out,
        options=CompileOptions(steps=steps, max_age=2, state=NETWORKS[name].state, **options),
        made_from={},
        progress=lambda *_: None,
    )


@pytest.fixture(scope="module", params=sorted(NETWORKS))
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Bundle]:
    """Each network, cut without training."""
    name: str = request.param
    return name, compile_(name, tmp_path_factory.mktemp(name) / f"{name}.warp")


def test_the_bundle_keeps_state_to_itself(compiled: tuple[str, Bundle]) -> None:
    name, bundle = compiled
    manifest = bundle.manifest
    assert [spec.name for spec in manifest.generator_inputs] == ["image"]
    assert [spec.name for spec in manifest.outputs] == ["picture"]
    assert {record.output: record.input.name for record in manifest.state} == NETWORKS[name].state
    assert {record.initial for record in manifest.state} == {"state.npz"}
    first = bundle.first_state()
    for key, array in stream(name, 1).items():
        if key != "image":
            np.testing.assert_array_equal(first[key], array)
    for module in manifest.modules.values():
        reads = {spec.name for spec in module.inputs} & set(first)
        assert not reads or module.role in (Role.WHOLE, Role.PRODUCER)


@pytest.mark.parametrize("options", [{"policy": "full"}, {"age": 0}])
def test_the_exact_policies_are_pytorchs_loop(compiled: tuple[str, Bundle], options: dict[str, Any]) -> None:
    name, bundle = compiled
    inputs = stream(name, FRAMES, seed=9)
    expected = torch_loop(network(name), name, {**inputs, **bundle.first_state()})
    with Engine(bundle, **options) as engine:
        frames = list(engine.session().render({"image": inputs["image"]}))
    for frame, made in zip(frames, expected, strict=True):
        np.testing.assert_allclose(frame.outputs["picture"], made["picture"], atol=TOLERANCE)


def test_age_0_is_the_whole_bit_for_bit(compiled: tuple[str, Bundle]) -> None:
    name, bundle = compiled
    inputs = {"image": stream(name, FRAMES, seed=9)["image"]}
    with Engine(bundle, policy="full") as whole, Engine(bundle, age=0) as cut:
        for one, other in zip(whole.session().render(inputs), cut.session().render(inputs), strict=True):
            np.testing.assert_array_equal(one.outputs["picture"], other.outputs["picture"])


@pytest.mark.parametrize("options", [{"age": 2}, {"policy": "every:3"}, {"policy": "async"}])
def test_aged_answers_read_the_loops_caches(compiled: tuple[str, Bundle], options: dict[str, Any]) -> None:
    """The same as an engine at that age in lockstep, whose caches the loop above vouches for."""
    name, bundle = compiled
    inputs = {"image": stream(name, FRAMES, seed=9)["image"]}
    with Engine(bundle, exit="plain", **options) as engine:
        frames = list(engine.session().render(inputs))
        engine.synchronize()
    for age in sorted({frame.age for frame in frames}):
        with Engine(bundle, exit="plain", age=age) as engine:
            same = list(engine.session().render(inputs))
        for frame in frames:
            if frame.age == age:
                assert same[frame.index].age == age
                np.testing.assert_array_equal(frame.outputs["picture"], same[frame.index].outputs["picture"])


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_a_trained_consumer_reads_no_state(name: str, tmp_path: Path) -> None:
    bundle = compile_(name, tmp_path / "trained.warp", steps=3, adapter=SMALL)
    manifest = bundle.manifest
    assert [record.name for record in manifest.exits] == ["whole", "plain", "warp"]
    assert not {spec.name for spec in manifest.modules["warp"].inputs} & set(NETWORKS[name].first)
    assert manifest.calibration is not None
    inputs = {"image": stream(name, 6)["image"]}
    with Engine(bundle, policy="async") as engine:
        assert len(list(engine.session().render(inputs))) == 6


def test_an_onnx_model_may_start_with_zeros(tmp_path: Path) -> None:
    inputs = stream("gru", 12, zeros=True)
    module = network("gru")
    model = trace_generator(module, {key: array[:1] for key, array in inputs.items()})
    bundle = split_model(
        model,
        Frames({"image": inputs["image"]}),
        tmp_path / "split.warp",
        state={"memory_next": "memory"},
        made_from={},
        progress=lambda *_: None,
    )
    assert [record.initial for record in bundle.manifest.state] == [None]
    with Engine(bundle, age=0) as engine:
        frames = list(engine.session().render({"image": inputs["image"]}))
    for frame, made in zip(frames, torch_loop(module, "gru", inputs), strict=True):
        np.testing.assert_allclose(frame.outputs["picture"], made["picture"], atol=TOLERANCE)


class Grows(nn.Module):
    """Its state is of another shape, or another kind, one frame later; its answer is a picture."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, image: Tensor, memory: Tensor) -> dict[str, Tensor]:
        return {"picture": image * memory.float().mean(), "memory_next": self.change(memory)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m[:, :2] * 2,
            r"state output 'memory_next' is float32 \[1, 2\], but input 'memory' is",
        ),
        (
            lambda m: (m > 0).to(torch.int64),
            r"state output 'memory_next' is int64 \[1, 4\], but input 'memory'",
        ),
    ],
)
def test_a_state_that_does_not_fit_itself_is_refused(
    change: Callable[[Tensor], Tensor], message: str, tmp_path: Path
) -> None:
    arrays = {"image": np.zeros((6, 3, 8, 8), np.float32), "memory": np.ones((1, 4), np.float32)}
    with pytest.raises(InputError, match=f"^{message}"):
        compile_generator(
            Grows(change).eval(),
            Footage(Frames(arrays)),
            tmp_path / "out.warp",
            options=CompileOptions(steps=0, state={"memory_next": "memory"}),
            made_from={},
            progress=lambda *_: None,
        )


@pytest.mark.parametrize(
    ("state", "first", "message"),
    [
        ({"memory_new": "memory"}, {}, r"the generator has no output 'memory_new' to carry as state; it has picture, "),
        ({"memory_next": "mem"}, {}, r"the generator has no input 'mem' to carry as state; it has image, memory"),
        (
            {"memory_next": "memory"},
            {"memory": np.zeros((1, 8, 4, 8), np.float32)},
            r"the first value of state 'memory' is float32 \[1, 8, 4, 8\], but the generator",
        ),
        (
            {"memory_next": "memory"},
            {"memory": np.zeros((1, 8, 8, 8))},
            r"the first value of state 'memory' is float64 \[1, 8, 8, 8\], but the generator",
        ),
        (
            {"memory_next": "memory", "picture": "image"},
            {},
            r"every output of the generator \(picture, memory_next\)",
        ),
    ],
)
def test_what_is_no_state_is_refused(state: dict[str, str], first: dict[str, np.ndarray], message: str) -> None:
    inputs = stream("gru", 1)
    model = trace_generator(network("gru"), {key: array[:1] for key, array in inputs.items()})
    with pytest.raises(InputError, match=f"^{message}"):
        state_of(model, state, first)


class Leads(nn.Module):
    """Its one picture is its state."""

    def forward(self, image: Tensor, last: Tensor) -> dict[str, Tensor]:
        return {"level": image.mean((2, 3)), "shown": 0.5 * image + 0.5 * last}


def test_a_picture_that_is_state_only_is_refused() -> None:
    image = np.zeros((1, 3, 8, 8), np.float32)
    model = trace_generator(Leads(), {"image": image, "last": image})
    with pytest.raises(InputError, match=r"^output 'shown' is a picture, but it is state only, .* another name$"):
        state_of(model, {"shown": "last"}, {})


def test_a_generator_without_frames_is_refused() -> None:
    image = np.zeros((1, 3, 8, 8), np.float32)
    model = trace_generator(Leads(), {"image": image, "last": image})
    model.graph.output.add().CopyFrom(model.graph.output[1])
    model.graph.output[2].name = "again"
    model.graph.node.append(helper.make_node("Identity", ["shown"], ["again"], name="again"))
    with pytest.raises(InputError, match=r"^every input of the generator \(image, last\) is state; none is left"):
        state_of(model, {"shown": "last", "again": "image"}, {})


def test_an_onnx_model_with_symbolic_state_takes_the_first_values_shape(tmp_path: Path) -> None:
    inputs = stream("gru", 12)
    model = trace_generator(network("gru"), {key: array[:1] for key, array in inputs.items()})
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith("memory"):
            value.type.tensor_type.shape.dim[2].dim_param = "rows"
    del model.graph.value_info[:]

    def split(arrays: dict[str, np.ndarray]) -> Bundle:
        return split_model(
            model,
            Frames(arrays),
            tmp_path / "symbolic.warp",
            state={"memory_next": "memory"},
            made_from={},
            progress=lambda *_: None,
        )

    with pytest.raises(InputError, match=r"^state 'memory' has no fixed shape in the generator; add its first value"):
        split({"image": inputs["image"]})
    assert split(inputs).manifest.state[0].input.shape == (1, 8, 8, 8)


def test_a_state_that_a_branch_of_the_graph_captures_is_carried() -> None:
    """An If reads the state from inside, where no node of the main graph shows it."""
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]>
        g (float[1, 2] x, float[1, 2] h, bool[1] keep) => (float[1, 2] y, float[1, 2] h_next) {
            h_next = If (keep) <then_branch = t () => (float[1, 2] a) { a = Add (h, x) },
                                else_branch = e () => (float[1, 2] b) { b = Mul (h, x) }>
            y = Neg (h_next)
        }"""
    )
    model = normalise(model)
    feeds = {"x": np.full((1, 2), 3, "f4"), "h": np.full((1, 2), 2, "f4"), "keep": np.array([True])}
    ends = carried(model, state_of(model, {"h_next": "h"}, {}))
    index = GraphIndex(ends)
    assert [index.nodes[reader].op_type for reader in index.consumers["h"]] == ["Identity"]
    expected, given = run_model(model, feeds), run_model(ends, feeds)
    assert list(given) == list(expected) == ["y", "h_next"]
    for name in expected:
        np.testing.assert_array_equal(given[name], expected[name])


def test_a_cut_whose_producer_changes_the_state_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[object] = []
    give = compile_module.with_state

    def with_state(*arguments: Any) -> Any:
        tried.append(arguments[1])
        if len(tried) == 1:
            raise ExportError("the producer's state differs")
        return give(*arguments)

    monkeypatch.setattr(compile_module, "with_state", with_state)
    bundle = compile_("gru", tmp_path / "second.warp")
    candidates = bundle.manifest.cut.candidates
    assert list(bundle.manifest.cut.tensors) == candidates[1]["tensors"] != candidates[0]["tensors"]


def test_half_precision_is_measured_with_the_state_that_it_carries_itself(
    compiled: tuple[str, Bundle], tmp_path: Path
) -> None:
    name, bundle = compiled
    frames = {"image": stream(name, FRAMES, seed=9)["image"]}
    half = convert_bundle(bundle, tmp_path / "half.warp", options=PrecisionOptions("fp16"), frames=frames)
    assert half.manifest.state == bundle.manifest.state
    for key, value in bundle.first_state().items():
        np.testing.assert_array_equal(half.first_state()[key], value)
    parity = half.manifest.created["precision"]["parity"]
    assert set(parity) == {"whole", "plain"}
    assert all(40 < record["psnr_db"]["worst"] < 100 for record in parity.values())
    with Engine(half, policy="full") as engine:
        assert len(list(engine.session().render(frames))) == FRAMES


@pytest.mark.parametrize(
    ("state", "arrays", "message"),
    [
        ({"a": "memory", "b": "memory"}, {}, r"state input 'memory' is named twice"),
        ({"a": "memory"}, {"memory": np.zeros((3, 4))}, r"the inputs hold 3 frames of state 'memory'; give its first"),
    ],
)
def test_what_is_given_for_state_is_checked(state: dict[str, str], arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        apart(state, arrays)


def test_exits_and_a_missing_first_value_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^2 exits were asked for of a generator that carries state"):
        CompileOptions(exits=2, metric="psnr", state={"memory_next": "memory"})
    with pytest.raises(InputError, match=r"^state 'memory' has no first value; add an array 'memory'"):
        compile_generator(
            network("gru"),
            Footage(Frames({"image": stream("gru", 8)["image"]})),
            tmp_path / "out.warp",
            options=CompileOptions(steps=0, state={"memory_next": "memory"}),
            made_from={},
            progress=lambda *_: None,
        )

"""Graphs run in PyTorch: against ONNX's own cases, ONNX Runtime, and the modules that they were traced from."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from onnx import ModelProto
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "conformance"))
import onnx_cases
import random_graphs

from warpcache.engine.errors import ExportError, InputError
from warpcache.export.graph.run import open_session, run_model, run_session
from warpcache.export.graph.surgery import normalise
from warpcache.export.graph.trace import trace_generator
from warpcache.export.torch_graph.module import GraphModule
from warpcache.export.torch_graph.operators import OPERATORS
from warpcache.models.renderer import DeferredNeuralRenderer

Trace = Callable[[str], Any]

# Two libraries add up the same products in another order. Each of n sums may be off by n / 2 units in the last place;
# these graphs have sums of at most some thousand terms and a dozen layers, whose errors partly cancel.
FLOAT32_ERROR = 1e-4
# What ONNX has cases for that PyTorch cannot do, and says so.
REFUSED = {"AveragePool", "ConvTranspose", "MaxPool", "Resize"}


def _model(text: str) -> ModelProto:
    return normalise(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]>\n{text}'))


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


def _assert_close(got: Tensor, want: np.ndarray, error: float = FLOAT32_ERROR) -> None:
    assert tuple(got.shape) == want.shape
    scale = max(1.0, float(np.abs(want).max()))
    assert float(np.abs(got.detach().float().numpy() - want).max()) <= error * scale


def test_operators_give_what_onnx_expects_of_them() -> None:
    passed: set[str] = set()
    refused: dict[str, str] = {}
    wrong: dict[str, str] = {}
    ran = 0
    for case in onnx_cases.collect().tried:
        if case.dtype != "float32" or case.derived_from or case.operator not in OPERATORS:
            continue
        try:
            module = GraphModule(normalise(case.model))
        except ExportError as exc:
            refused[case.operator] = str(exc)
            continue
        with torch.no_grad():
            got = module(_tensors(case.inputs))
        ran += 1
        passed.add(case.operator)
        for name, want in case.outputs.items():
            try:
                # ONNX's own tolerances, 1e-3 and 1e-7 as a rule; where a sum cancels, float32 leaves 1e-6 of its terms.
                np.testing.assert_allclose(got[name].numpy(), want, rtol=case.rtol, atol=max(case.atol, 1e-6))
                assert got[name].numpy().dtype == want.dtype
            except AssertionError as exc:
                wrong[case.name] = " ".join(str(exc).split())[:200]
    assert not wrong
    assert set(refused) == REFUSED
    assert all("cannot run in PyTorch: " in message for message in refused.values())
    assert ran > 450
    # ONNX's cases for it are all of other types; see below.
    assert set(OPERATORS) - passed == {"Cast"}


def test_casts_round_towards_zero() -> None:
    model = _model(
        """cast (float[1, 6] x) => (int64[1, 6] whole, bool[1, 6] truth, float[1, 6] back) {
            whole = Cast <to = 7> (x)
            truth = Cast <to = 9> (x)
            back = Cast <to = 1> (whole)
        }"""
    )
    x = np.array([[-2.7, -0.4, 0.0, 0.6, 1.5, 9.9]], np.float32)
    got = GraphModule(model)(torch.from_numpy(x))
    for name, want in run_model(model, {"x": x}, threads=1).items():
        assert np.array_equal(got[name].numpy(), want)
        assert got[name].numpy().dtype == want.dtype


@settings(max_examples=20, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(random_graphs.models())
def test_frames_stacked_are_frames_one_by_one(model: ModelProto) -> None:
    model = normalise(model)
    x = np.random.default_rng(2).standard_normal((3, *random_graphs.INPUT_SHAPE[1:])).astype(np.float32)
    session = open_session(model, threads=1)
    module = GraphModule(model)
    assert module.mixing_node is None
    with torch.no_grad():
        got = module(torch.from_numpy(x))
    for t in range(3):
        for name, want in run_session(session, {"x": x[t : t + 1]}).items():
            _assert_close(got[name][t : t + 1], want)


def test_generators_run_in_batches_and_train(traced: Any) -> None:
    module = GraphModule(traced.model, train="all")
    frames = {name: array[:3] for name, array in traced.stream.items()}
    got = module(_tensors(frames))
    for t in range(3):
        want = run_model(traced.model, traced.frame(t), threads=1)
        assert list(got) == list(want)
        for name, value in want.items():
            length = value.shape[0]
            _assert_close(got[name][t * length : (t + 1) * length], value)
    torch.cat([value.flatten() for value in got.values()]).square().mean().backward()
    idle = [name for name, parameter in module.trained.items() if parameter.grad is None or not parameter.grad.any()]
    # A bias before a norm that takes the mean away has no effect; its gradient may round to nothing.
    assert [name for name in idle if not name.endswith("bias")] == []


@pytest.fixture(scope="module")
def renderer() -> tuple[DeferredNeuralRenderer, dict[str, np.ndarray], ModelProto]:
    torch.manual_seed(5)
    module = DeferredNeuralRenderer(32, (8, 16, 16), 4, 16)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # norms at 1 and 0 would hide a wrong scale
    condition = np.random.default_rng(5).uniform(0, 1, (3, 6, 32, 32)).astype(np.float32)
    return module.eval(), {"condition": condition}, trace_generator(module, {"condition": condition[:1]})


def test_gradients_are_those_of_the_module_that_was_traced(renderer: Any) -> None:
    module, inputs, model = renderer
    condition = torch.from_numpy(inputs["condition"])
    want = module(condition)
    (want - 0.3).square().mean().backward()
    graph = GraphModule(model, train="all")
    got = graph({"condition": condition})["image"]
    _assert_close(got, want.detach().numpy())
    (got - 0.3).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    module.zero_grad()
    by_name = {name: parameter.grad for name, parameter in graph.trained.items()}
    same = [name for name in gradients if name in by_name]
    # The exporter gives what it reshapes or expands another name; all else keeps its own.
    renamed = [name for name in gradients if name not in same]
    assert set(renamed) == {name for name in gradients if ".norm" in name or name == "texture"}
    for name in same:
        _assert_close(by_name[name], gradients[name].numpy(), error=1e-5)
    # Lists of floats sort as their first elements do.
    want_others = sorted(gradients[name].numpy().ravel().tolist() for name in renamed)
    got_others = sorted(value.numpy().ravel().tolist() for name, value in by_name.items() if name not in same)
    assert len(got_others) == len(renamed)
    np.testing.assert_allclose(np.concatenate(got_others), np.concatenate(want_others), atol=1e-5)


def test_trained_weights_go_back_into_the_graph(renderer: Any) -> None:
    _, inputs, model = renderer
    module = GraphModule(model, train="all")
    assert module.write_back() == model
    condition = torch.from_numpy(inputs["condition"][:1])
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        module(condition)["image"].square().mean().backward()
        optimizer.step()
    trained = module.write_back()
    before, after = (run_model(m, {"condition": inputs["condition"][:1]}, threads=1)["image"] for m in (model, trained))
    _assert_close(module(condition)["image"], after)
    assert np.abs(before - after).max() > 0.01
    fixed = {t.name for t in model.graph.initializer} - set(module.trained)
    changed = {a.name for a, b in zip(model.graph.initializer, trained.graph.initializer, strict=True) if a != b}
    assert changed == set(module.trained)
    assert changed.isdisjoint(fixed)
    # A second module continues where the first one stopped.
    _assert_close(GraphModule(trained)(condition)["image"], after)


def test_only_named_initializers_are_trained(renderer: Any) -> None:
    _, inputs, model = renderer
    module = GraphModule(model, train=["out.weight", "up.0.conv1.weight"])
    assert list(module.trained) == [
        t.name for t in model.graph.initializer if t.name in ("out.weight", "up.0.conv1.weight")
    ]
    assert len(list(module.parameters())) == 2
    module(torch.from_numpy(inputs["condition"]))["image"].mean().backward()
    assert all(parameter.grad.any() for parameter in module.parameters())
    assert list(GraphModule(model).parameters()) == []


def test_half_precision_and_channels_last(renderer: Any) -> None:
    _, inputs, model = renderer
    condition = torch.from_numpy(inputs["condition"])
    module = GraphModule(model, train="all")
    want = module(condition)["image"].detach()
    last = copy.deepcopy(module).to(memory_format=torch.channels_last)
    got = last(condition.to(memory_format=torch.channels_last))["image"]
    # The layout reached the end: nothing on the way went back to rows of one channel.
    assert got.is_contiguous(memory_format=torch.channels_last)
    _assert_close(got, want.numpy())
    with torch.autocast("cpu", torch.bfloat16):
        half = module(condition)["image"]
        half.float().square().mean().backward()
    assert half.dtype == torch.bfloat16
    # bfloat16 has 8 bits: each of 11 convolutions rounds its result by up to 2^-9, of values about 1.
    assert 0 < float((half.detach().float() - want).abs().max()) < 11 * 2.0**-9 * 2
    assert all(parameter.grad.dtype == torch.float32 for parameter in module.parameters())


class _Modulated(nn.Module):
    """A convolution whose weights a style makes: frames cannot share it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.style = nn.Linear(5, 3)

    def forward(self, image: Tensor, latent: Tensor) -> Tensor:
        weight = self.weight[None] * self.style(latent)[:, None, :, None, None]
        return nn.functional.conv2d(image, weight[0], padding=1)


def test_graphs_that_mix_frames_run_as_if_one_by_one() -> None:
    rng = np.random.default_rng(6)
    inputs = {
        "image": rng.standard_normal((3, 3, 8, 8)).astype(np.float32),
        "latent": rng.standard_normal((3, 5)).astype(np.float32),
    }
    torch.manual_seed(6)
    model = trace_generator(_Modulated(), {name: array[:1] for name, array in inputs.items()})
    module = GraphModule(model, train="all")
    assert module.mixing_node is not None
    (got,) = module(_tensors(inputs)).values()
    for t in range(3):
        want = run_model(model, {name: array[t : t + 1] for name, array in inputs.items()}, threads=1)
        _assert_close(got[t : t + 1], next(iter(want.values())))
    # One image for all latents: what is given once is the same in every frame.
    shared = module({"image": torch.from_numpy(inputs["image"][:1]), "latent": torch.from_numpy(inputs["latent"])})
    want = run_model(model, {"image": inputs["image"][:1], "latent": inputs["latent"][2:]}, threads=1)
    _assert_close(next(iter(shared.values()))[2:], next(iter(want.values())))
    got.square().mean().backward()
    assert all(parameter.grad.any() for parameter in module.parameters())


# Bodies of a graph (float[1, 4] x, int64[1, 2] k) -> y, and whether frames stay apart when they are stacked.
FRAMES_APART = {
    "t = Constant <value = int64[1] {0}> () y = ReduceMean (x, t)": False,
    "t = Constant <value = int64[1] {-1}> () y = ReduceMean (x, t)": True,
    "y = Gather <axis = 1> (x, k)": False,
    "t = Constant <value = int64[2] {3, -1}> () y = Gather <axis = 1> (x, t)": True,
    "t = Constant <value = float[4, 2] {1, 2, 3, 4, 5, 6, 7, 8}> () y = Gather (t, k)": True,
    "t = Transpose (x) y = MatMul (t, x)": False,
    "t = Transpose (x) y = Add (t, x)": False,
    "y = Gemm <transA = 1> (x, x)": False,
    "t = Constant <value = float[4, 2] {1, 2, 3, 4, 5, 6, 7, 8}> () y = Gemm (x, t)": True,
    "y = Concat <axis = 0> (x, x)": False,
    "t = Constant <value = float[1, 1] {5}> () y = Concat <axis = 1> (x, t, x)": True,
    "y = Softmax <axis = 0> (x)": False,
    "y = Flatten <axis = 0> (x)": True,
    "t = Constant <value = int64[3] {1, -1, 2}> () y = Reshape (x, t)": True,
    "t = Constant <value = int64[3] {2, -1, 1}> () y = Reshape (x, t)": False,
    "t = Constant <value = int64[1] {0}> () y = Squeeze (x, t)": False,
    "t = Constant <value = float[3, 1] {1, 2, 3}> () y = Mul (x, t)": False,
}


@pytest.mark.parametrize("body", FRAMES_APART)
def test_frames_are_told_apart_by_what_nodes_do(body: str) -> None:
    text = f"apart (float[1, 4] x, int64[1, 2] k) => (float y, int64[1, 2] same) {{ {body} same = Identity (k) }}"
    parsed = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {text}')
    parsed.graph.output[0].type.tensor_type.ClearField("shape")  # the text form means a scalar, inference knows better
    model = normalise(parsed)
    inputs = {
        "x": np.random.default_rng(8).standard_normal((3, 4)).astype(np.float32),
        "k": np.array([[1, 0], [2, 2], [3, 1]]),
    }
    module = GraphModule(model)
    assert (module.mixing_node is None) == FRAMES_APART[body]
    got = module(_tensors(inputs))
    want = [run_model(model, {name: array[t : t + 1] for name, array in inputs.items()}, threads=1) for t in range(3)]
    _assert_close(got["y"], np.concatenate([frame["y"] for frame in want]))


@pytest.mark.parametrize("scales", ["{1, 1}", "{2, 0.5}"])
def test_a_group_norm_keeps_scales_of_its_groups(scales: str) -> None:
    model = _model(
        f"""norm (float[1, 4, 3, 3] x) => (float[1, 4, 3, 3] y)
        <int64[3] folded = {{0, 2, -1}}, int64[4] image = {{1, 4, 3, 3}}, float[2] scale = {scales},
         float[2] bias = {{0, 0}}, float[4, 1, 1] gamma = {{1, 2, 3, 4}}> {{
            f = Reshape (x, folded)
            n = InstanceNormalization (f, scale, bias)
            u = Reshape (n, image)
            y = Mul (u, gamma)
        }}"""
    )
    x = np.random.default_rng(9).standard_normal((2, 4, 3, 3)).astype(np.float32)
    got = GraphModule(model, train=["gamma"])(torch.from_numpy(x))["y"]
    for t in range(2):
        _assert_close(got[t : t + 1], run_model(model, {"x": x[t : t + 1]}, threads=1)["y"])


def test_weights_behind_constant_nodes_are_trained_and_constants_repeat() -> None:
    model = _model(
        """constants (float[1, 4, 6] x) => (float[1, 6, 4] y, float[2, 3] constant)
        <float[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}, float[2, 1] c = {1, 2}, int64[2] shape = {2, 3}> {
            turned = Transpose <perm = [1, 0]> (w)
            square = MatMul (w, turned)
            moved = Transpose <perm = [0, 2, 1]> (x)
            y = MatMul (moved, square)
            constant = Expand (c, shape)
        }"""
    )
    x = np.random.default_rng(7).standard_normal((2, 4, 6)).astype(np.float32)
    module = GraphModule(model, train=["w"])
    got = module(torch.from_numpy(x))
    for t in range(2):
        want = run_model(model, {"x": x[t : t + 1]}, threads=1)
        _assert_close(got["y"][t : t + 1], want["y"])
        assert np.array_equal(got["constant"][2 * t : 2 * t + 2].detach().numpy(), want["constant"])
    got["y"].sum().backward()
    assert module.trained["w"].grad is not None
    assert module.trained["w"].grad.any()


def test_what_cannot_be_trained_is_refused() -> None:
    several = _model(
        """several (float[1, 2, 4, 4] x) => (float[1, 2, 4, 4] y) {
            a = Hardmax (x)
            b = LRN <size = 3> (a)
            y = Relu (b)
        }"""
    )
    with pytest.raises(ExportError, match="the graph has operators that cannot be trained in PyTorch: Hardmax, LRN"):
        GraphModule(several)
    cropped = _model(
        """cropped (float[1, 2, 4, 4] x) => (float[1, 2, 4, 4] y)
        <float[8] roi = {0, 0, 0.2, 0.2, 1, 1, 0.8, 0.8}, int64[4] sizes = {1, 2, 4, 4}, float[0] none = {}> {
            y = Resize <mode = "linear", coordinate_transformation_mode = "tf_crop_and_resize"> (x, roi, none, sizes)
        }"""
    )
    with pytest.raises(ExportError, match=r"node '.*' \(Resize\) cannot run in PyTorch: it crops as well"):
        GraphModule(cropped)
    clipped = _model(
        """clipped (float[1, 2] x) => (float[1, 2] y) <float low = {0}, float[2] b = {1, 2}, int64[1] n = {2}> {
            a = Add (x, b)
            y = Clip (a, low)
        }"""
    )
    assert list(GraphModule(clipped, train="all").trained) == ["b"]
    with pytest.raises(InputError, match="initializer 'low' says how a node works"):
        GraphModule(clipped, train=["low"])
    with pytest.raises(InputError, match="the graph has no float32 initializer 'x' to train"):
        GraphModule(clipped, train=["x"])


def test_inputs_that_do_not_fit_are_refused() -> None:
    model = _model(
        """two (float[1, 2] x, float[1, 2] z) => (float[1, 2] y) {
            y = Add (x, z)
        }"""
    )
    module = GraphModule(model)
    x = torch.ones(3, 2)
    assert module(x, x)["y"].tolist() == [[2.0, 2.0]] * 3
    assert module(x, x[:1])["y"].shape == (3, 2)
    with pytest.raises(InputError, match="the graph takes x, z, but 1 tensors were given"):
        module(x)
    with pytest.raises(InputError, match="the graph needs input 'z'; given are x"):
        module({"x": x})
    with pytest.raises(InputError, match=r"input 'z' has shape \(2, 2\), but the graph was traced with \(1, 2\)"):
        module(x, x[:2])
    with pytest.raises(InputError, match=r"input 'x' has shape \(3, 4\), but"):
        module(torch.ones(3, 4), x)

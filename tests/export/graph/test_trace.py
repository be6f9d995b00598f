"""Tracing: names, dtypes, numbers against PyTorch, nothing of the machine in the file, errors that name the line."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from warpcache.engine.errors import ExportError, InputError
from warpcache.export.graph.index import GraphIndex
from warpcache.export.graph.run import run_model
from warpcache.export.graph.trace import load_factory, load_weights, trace_generator

X = {"x": np.linspace(-1, 1, 8, dtype=np.float32).reshape(1, 8)}


def _line(function: Any, text: str) -> int:
    """Line number of the line of `function` that holds `text`."""
    lines, first = inspect.getsourcelines(function)
    return first + next(k for k, line in enumerate(lines) if text in line)


def _names(values: Any) -> list[str]:
    return [value.name for value in values]


class Returns(nn.Module):
    """Gives back what a function makes of its input."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x * 2
        return x


class Sizes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        count = int(x.abs().sum().item())
        return torch.zeros(1, count)


class Unsupported(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x + 1
        return torch.special.bessel_j0(y)


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.ones(3, 3)


class Counts(nn.Module):
    """Python state: every call gives something else."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


def test_interface_and_numbers(traced: Any) -> None:
    model = traced.model
    onnx.checker.check_model(model, full_check=True)
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == 20
    for value in model.graph.input:
        array = traced.frame(0)[value.name]
        assert tuple(d.dim_value for d in value.type.tensor_type.shape.dim) == array.shape
        assert onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type) == array.dtype
    # Frames that tracing did not see. Float32 with sums of some hundred terms and a normalisation: 1e-5 measured at
    # most, 1e-4 of the range allowed.
    for t in (1, 5):
        actual = run_model(model, traced.frame(t))
        for name, want in traced.torch_outputs(t).items():
            assert np.max(np.abs(actual[name] - want)) <= 1e-4 * np.max(np.abs(want))


def test_names_of_inputs_and_outputs(trace: Any) -> None:
    many = trace("many").model
    assert _names(many.graph.input) == ["image", "pose", "person", "inverted", "unused"]
    # Two outputs have the names of inputs, which a graph cannot have twice.
    assert _names(many.graph.output) == ["image_out", "mask", "feature", "pose_out"]
    assert _names(trace("unet").model.graph.output) == ["image"]


@pytest.mark.parametrize(
    ("function", "output_names", "expected"),
    [
        (lambda x: (x + 1, x * 2), None, ["output_0", "output_1"]),
        (lambda x: [x + 1, x * 2], ["rgb", "alpha"], ["rgb", "alpha"]),
        (lambda x: {"b": x + 1, "a": x * 2}, None, ["b", "a"]),
    ],
)
def test_outputs_keep_their_order(function: Any, output_names: list[str] | None, expected: list[str]) -> None:
    module = Returns(function)
    if output_names:
        module.output_names = output_names
    model = trace_generator(module, X)
    assert _names(model.graph.output) == expected
    results = run_model(model, X)
    np.testing.assert_array_equal(results[expected[0]], X["x"] + 1)
    np.testing.assert_array_equal(results[expected[1]], X["x"] * 2)


def test_constants_inputs_and_doubles_given_out() -> None:
    def function(x: Tensor) -> dict[str, Tensor]:
        y = x.exp()
        return {"y": y, "again": y, "same": x, "fixed": torch.arange(3.0)}

    model = trace_generator(Returns(function), X)
    onnx.checker.check_model(model, full_check=True)
    results = run_model(model, X)
    np.testing.assert_array_equal(results["y"], results["again"])
    np.testing.assert_array_equal(results["same"], X["x"])
    np.testing.assert_array_equal(results["fixed"], [0, 1, 2])


def test_nothing_of_the_machine_is_kept(traced: Any) -> None:
    data = traced.model.SerializeToString()
    for secret in (b".py", str(Path(__file__).parent).encode(), b"stack_trace", b"graph_signature"):
        assert secret not in data


def test_module_paths_are_kept(trace: Any) -> None:
    index = GraphIndex(trace("unet").model)
    assert {"enc.0", "enc.0.conv", "dec.1.norm", "out"} <= set(index.module_paths())
    (value,) = index.module_outputs("dec.1")
    assert index.label(value) == "dec.1"
    reader = index.consumers[value][0]
    assert index.nodes[reader].op_type == "Conv"
    assert index.scopes(reader)[-1] == "out"


def test_mode_is_put_back_and_tracing_is_in_evaluation_mode() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.9))
    module[0].eval()

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    wrapper = Wrapper()
    module[0].eval()
    model = trace_generator(wrapper, X)
    assert "Dropout" not in {node.op_type for node in model.graph.node}
    assert wrapper.training
    assert module[1].training
    assert not module[0].training


def test_tracing_is_quiet(capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    trace_generator(Returns(lambda x: torch.tanh(x)), X)
    assert capfd.readouterr() == ("", "")
    assert not [w for w in recwarn if "torch" in str(w.filename) or "onnx" in str(w.filename)]


@pytest.mark.parametrize(
    ("module", "text"), [(Branches, "if x.sum()"), (Sizes, "int(x.abs()"), (Fails, "x @ torch.ones")]
)
def test_errors_name_the_users_line(module: type[nn.Module], text: str) -> None:
    with pytest.raises(ExportError, match=r"the generator (cannot be traced|fails on the example)") as info:
        trace_generator(module(), X)
    assert f"{Path(__file__).name}:{_line(module.forward, text)}" in str(info.value)
    assert "\n" not in str(info.value)


def test_unsupported_operators_are_named_with_their_line() -> None:
    with pytest.raises(ExportError, match="the generator uses an operator that ONNX does not have") as info:
        trace_generator(Unsupported(), X)
    assert "bessel_j0" in str(info.value)
    assert f"{Path(__file__).name}:{_line(Unsupported.forward, 'bessel_j0')}" in str(info.value)


def test_a_trace_that_computes_something_else_is_refused() -> None:
    with pytest.raises(ExportError, match="output 'image' of the trace differs from PyTorch by up to"):
        trace_generator(Counts(), X)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"X1": X["x"]}, "forward has no input 'X1'"),
        ({}, "forward needs input 'x', which is not given"),
        ({"x": X["x"].astype(np.float64)}, "input 'x' has dtype float64"),
        ({"x": X["x"], "xx": X["x"]}, "forward has no input 'xx'; did you mean x?"),
    ],
)
def test_examples_that_do_not_fit(example: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        trace_generator(Returns(lambda x: x + 1), example)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: 3, "forward returns a int; it must return a tensor"),
        (lambda x: {"a": x, "b": 1.5}, "output 'b' is a float; every output must be a tensor"),
        (lambda x: {}, "forward returns no tensor"),
    ],
)
def test_results_that_are_no_tensors(function: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        trace_generator(Returns(function), X)


def test_output_names_must_fit() -> None:
    module = Returns(lambda x: (x + 1, x * 2))
    module.output_names = ["one"]
    with pytest.raises(ExportError, match=r"output_names is .*, but forward returns 2 tensors"):
        trace_generator(module, X)


FACTORY = """
from torch import nn

LIMIT = 3
def make_generator():
    return nn.Linear(2, 2)
def make_nothing():
    return "no module"
def make_error():
    raise ValueError("no such size")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Current folder that holds a module; what importing changes is undone."""
    (tmp_path / "user_made_model.py").write_text(FACTORY)
    (tmp_path / "user_broken_model.py").write_text("import os\nimport surely_not_installed_xyz\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("user_made_model", "user_broken_model"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.mark.parametrize("reference", ["user_made_model:make_generator", "user_made_model.py:make_generator"])
def test_factory_from_the_current_folder(folder: Path, reference: str) -> None:
    assert isinstance(load_factory(reference), nn.Linear)
    sys.modules.pop("user_made_model", None)


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        ("user_made_model", InputError, "'user_made_model' is not of the form MODULE:FACTORY"),
        ("no_such_module_xyz:make", InputError, "there is no module 'no_such_module_xyz'"),
        ("no_such_file.py:make", InputError, "there is no file no_such_file.py"),
        (
            "user_made_model:make_generater",
            InputError,
            "user_made_model has no 'make_generater'; did you mean make_gen",
        ),
        ("user_made_model:LIMIT", InputError, "user_made_model:LIMIT is a int and cannot be called"),
        ("user_made_model:make_nothing", ExportError, "user_made_model:make_nothing returns a str"),
        ("user_made_model:make_error", ExportError, r"user_made_model:make_error fails .*user_made_model.py:10\)"),
        ("user_broken_model:make", ExportError, r"importing user_broken_model fails .*user_broken_model.py:2\)"),
    ],
)
def test_bad_factories(folder: Path, reference: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_factory(reference)
    sys.modules.pop("user_made_model", None)


def test_weights_are_loaded(tmp_path: Path) -> None:
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    load_weights(target, tmp_path / "w.safetensors")
    assert torch.equal(source.weight, target.weight)
    assert torch.equal(source.bias, target.bias)


def test_tied_weights_need_one_entry_only(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    module[1].weight = module[0].weight
    save_file({"0.weight": torch.full((2, 2), 7.0)}, tmp_path / "w.safetensors")
    load_weights(module, tmp_path / "w.safetensors")
    assert torch.equal(module[1].weight, torch.full((2, 2), 7.0))


def test_bad_weights(tmp_path: Path) -> None:
    module = nn.Linear(3, 2)
    before = module.weight.detach().clone()
    file = tmp_path / "w.safetensors"
    save_file({"weight": torch.zeros(2, 4), "extra": torch.zeros(1)}, file)
    with pytest.raises(InputError, match=r"w.safetensors does not fit the generator") as info:
        load_weights(module, file)
    for part in ("missing: bias", "unexpected: extra", "weight is (2, 4) in the file and (2, 3) in the module"):
        assert part in str(info.value)
    assert torch.equal(module.weight, before)
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(InputError, match=r"w.safetensors is no intact safetensors file"):
        load_weights(module, file)
    with pytest.raises(InputError, match=r"there is no weights file"):
        load_weights(module, tmp_path / "none.safetensors")
    with pytest.raises(InputError, match=r"w.pt is a pickle, and pickle is never loaded; save it with safetensors"):
        load_weights(module, tmp_path / "w.pt")

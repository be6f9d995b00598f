"""Graph operations: normal form, extract and merge, against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import helper

from warpcache.engine.errors import ExportError, InputError
from warpcache.export.cut.split import split
from warpcache.export.graph.index import GraphIndex, node_names
from warpcache.export.graph.run import run_model
from warpcache.export.graph.surgery import (
    extract,
    fix_input_shapes,
    give_out,
    merge,
    normalise,
    rename_values,
)

HEAD = '<ir_version: 10, opset_import: ["" : 20]>\n'
X = {"x": np.array([[-1.0, 0.5, 2.0]], np.float32)}


def _parse(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(HEAD + text)


def _names(values: Any) -> list[str]:
    return [value.name for value in values]


def test_normalise_inlines_lifts_folds_and_drops() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20, "own" : 1]>
        g (float[1,3] x) => (float[1,3] y, float[3] w, int64 n) <float[3] w = {1, 2, 3}> {
          two = Constant<value_float = 2.0>()
          a = own.Twice(x, two)
          dead = Sin(a)
          n = Size(a)
          y = Add(a, w)
        }
        <domain: "own", opset_import: ["" : 20]>
        Twice (p, q) => (r) { r = Mul(p, q) }"""
    )
    model.graph.node[0].metadata_props.add(key="pkg.torch.onnx.stack_trace", value="/home/somebody/secret.py")
    before = model.SerializeToString()
    flat = normalise(model)
    assert model.SerializeToString() == before
    assert not flat.functions
    assert sorted(node.op_type for node in flat.graph.node) == ["Add", "Identity", "Identity", "Mul"]
    assert len({node.name for node in flat.graph.node}) == 4
    assert b"somebody" not in flat.SerializeToString()
    onnx.checker.check_model(flat, full_check=True)
    want, got = run_model(model, X), run_model(flat, X)
    assert list(got) == ["y", "w", "n"]
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])


def test_a_damaged_graph_is_refused() -> None:
    model = _parse("g (float[1,3] x) => (float[1,3] y) { y = Sin(x) }")
    model.graph.node[0].input[0] = "nowhere"
    with pytest.raises(ExportError, match="the graph is not valid ONNX"):
        normalise(model)


def test_node_names_are_unique_and_keep_what_is_there() -> None:
    model = _parse("g (float[1,3] x) => (float[1,3] y) { a = Sin(x)\n b = Sin(a)\n c = Sin(b)\n y = Sin(c) }")
    for node, name in zip(model.graph.node, ["n", "n", "", "node_Sin__2"], strict=True):
        node.name = name
    names = node_names(model)
    assert names[0] == "n"
    assert names[3] == "node_Sin__2"
    assert len(set(names)) == 4
    assert names == node_names(model)


def test_captured_values_of_subgraphs_are_read() -> None:
    """A value that only the branches of an If read belongs to the part that holds the If."""
    then, other = (
        helper.make_graph(
            [helper.make_node(op, ["deep"], [f"{op}_out"])],
            op,
            [],
            [helper.make_tensor_value_info(f"{op}_out", onnx.TensorProto.FLOAT, [1, 3])],
        )
        for op in ("Sin", "Cos")
    )
    model = _parse("g (float[1,3] x, bool flag) => (float[1,3] y) { deep = Exp(x)\n y = Neg(x) }")
    del model.graph.node[1:]
    model.graph.node.append(helper.make_node("If", ["flag"], ["y"], then_branch=then, else_branch=other))
    model = normalise(model)
    index = GraphIndex(model)
    assert index.consumers["deep"] == [1]
    parts = split(model, ["deep"])
    feeds = {**X, "flag": np.array(False)}
    want = run_model(model, feeds)["y"]
    # Two implementations of exp and cos: a few units in the last place of an argument up to 7.4.
    np.testing.assert_allclose(want, np.cos(np.exp(X["x"])), atol=5e-6)
    got = run_model(parts.plain, {**feeds, **run_model(parts.producer, feeds)})["y"]
    np.testing.assert_array_equal(got, want)
    # What only a branch of the If reads, and the input that it comes from, goes with the If.
    assert [node.op_type for node in parts.producer.graph.node] == ["Exp"]
    model.graph.output.append(helper.make_tensor_value_info("early", onnx.TensorProto.FLOAT, [1, 3]))
    model.graph.input.append(helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [1, 3]))
    model.graph.node.append(helper.make_node("Neg", ["z"], ["early"]))
    early = extract(model, ["z"], ["early"])
    assert ([node.op_type for node in early.graph.node], _names(early.graph.input)) == (["Neg"], ["z"])


def test_extract_says_what_is_missing() -> None:
    model = normalise(_parse("g (float[1,3] x, float[1,3] z) => (float[1,3] y) { a = Sin(x)\n y = Add(a, z) }"))
    part = extract(model, ["a", "z"], ["y"])
    assert _names(part.graph.input) == ["a", "z"]
    assert [node.op_type for node in part.graph.node] == ["Add"]
    with pytest.raises(ExportError, match=r"the outputs \['y'\] also need the inputs \['z'\]"):
        extract(model, ["x"], ["y"])
    with pytest.raises(ExportError, match="'x' is made by no node"):
        extract(model, ["x"], ["x"])


def test_fix_input_shapes_makes_every_shape_a_number() -> None:
    model = _parse('g (float["N",3,"H"] x) => (float["N",3,"H"] y) { a = Sin(x)\n y = Neg(a) }')
    fixed = normalise(fix_input_shapes(model, {"x": (1, 3, 5)}))
    assert {name: spec.shape for name, spec in GraphIndex(fixed).specs.items()} == dict.fromkeys("xay", (1, 3, 5))
    with pytest.raises(InputError, match=r"input 'x' has shape \(1, 4, 5\), but the model expects \('N', 3, 'H'\)"):
        fix_input_shapes(model, {"x": (1, 4, 5)})
    with pytest.raises(InputError, match="the model has no input 'image'; its inputs are x"):
        fix_input_shapes(model, {"image": (1,)})


def test_merge_runs_one_after_the_other() -> None:
    first = normalise(
        _parse("g (float[1,3] x) => (float[1,3] y) <float[3] w = {1,2,3}> { a = Mul(x, w)\n y = Sin(a) }")
    )
    second = normalise(
        _parse(
            "h (float[1,3] p, float[1,3] x, float[1,3] other) => (float[1,3] code) <float[3] w = {5,6,7}> "
            "{ a = Mul(p, w)\n b = Add(a, x)\n code = Add(b, other) }"
        )
    )
    merged = merge(first, second, {"p": "a"}, outputs=["code", "y", "a"])
    onnx.checker.check_model(merged, full_check=True)
    # "x" is one input for both, "other" stays an input; the inner names "a" and "w" of both live side by side.
    assert _names(merged.graph.input) == ["x", "other"]
    assert _names(merged.graph.output) == ["code", "y", "a"]
    other = np.full((1, 3), 0.25, np.float32)
    results = run_model(merged, {**X, "other": other})
    a = X["x"] * np.array([1, 2, 3], np.float32)
    np.testing.assert_array_equal(results["a"], a)
    np.testing.assert_array_equal(results["code"], a * np.array([5, 6, 7], np.float32) + X["x"] + other)
    # Sin of two implementations: within a few units in the last place of values up to 1.
    np.testing.assert_allclose(results["y"], np.sin(a), atol=1e-6)
    assert _names(merge(first, second, {"p": "y"}).graph.output) == ["y", "code"]
    assert len({node.name for node in merged.graph.node}) == len(merged.graph.node)


def test_merge_refuses_what_does_not_fit() -> None:
    first = normalise(_parse("g (float[1,3] x) => (float[1,3] y) { y = Sin(x) }"))
    second = normalise(_parse("h (float[1,4] p) => (float[1,4] code) { code = Sin(p) }"))
    with pytest.raises(InputError, match="the second model has no input 'q'; its inputs are p"):
        merge(first, second, {"q": "y"})
    with pytest.raises(InputError, match="the first model has no value 'z' to feed 'p' with"):
        merge(first, second, {"p": "z"})
    with pytest.raises(InputError, match=r"'p' expects float32 \(1, 4\), but 'y' is float32 \(1, 3\)"):
        merge(first, second, {"p": "y"})
    with pytest.raises(ExportError, match="both models make 'y'"):
        merge(first, rename_values(second, {"code": "y"}), {})
    older = onnx.version_converter.convert_version(second, 17)
    with pytest.raises(ExportError, match=r"the models use versions 20 and 17 of operator set 'ai.onnx'"):
        merge(first, older, {})


def test_give_out_adds_inner_values() -> None:
    model = normalise(_parse("g (float[1,3] x) => (float[1,3] y) { a = Sin(x)\n y = Neg(a) }"))
    results = run_model(give_out(model, ["a", "y"]), X)
    np.testing.assert_array_equal(results["a"], -results["y"])
    with pytest.raises(ExportError, match="value 'b' has no known dtype"):
        give_out(model, ["b"])


def test_arguments_stay_as_they_are() -> None:
    """Renaming a value renames its tensor too, which must not be the one of the model that was handed in."""
    first = normalise(_parse("g (float[1,3] x) => (float[1,3] y) <float[3] w = {1,2,3}> { y = Mul(x, w) }"))
    second = normalise(
        _parse("h (float[1,3] p) => (float[1,3] q, float[1,3] r) <float[3] w = {5,6,7}> { q = Mul(p, w)\n r = Sin(q) }")
    )
    before = [first.SerializeToString(), second.SerializeToString()]
    merged = merge(first, second, {"p": "y"})
    assert {tensor.name for tensor in merged.graph.initializer} == {"w", "w.2"}
    part = extract(second, ["q"], ["r", "q"], renames={"q": "given"})
    assert (_names(part.graph.input), _names(part.graph.output)) == (["given"], ["r", "q"])
    np.testing.assert_array_equal(run_model(part, {"given": X["x"]})["q"], X["x"])
    assert [first.SerializeToString(), second.SerializeToString()] == before

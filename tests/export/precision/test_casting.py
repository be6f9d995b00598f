"""The rewriting to float16 and bfloat16: what is cast, what stays, and that the emulation rounds as the graph does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from warpcache.engine.spec import TensorSpec
from warpcache.export.graph.index import SCOPES_KEY, GraphIndex
from warpcache.export.graph.run import run_model
from warpcache.export.graph.surgery import normalise
from warpcache.export.precision.casting import cast_model, coordinate_values, elem_types, emulated

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT
RNG = np.random.default_rng(5)


def graph(
    nodes: list[NodeProto],
    inputs: dict[str, tuple[int, ...]],
    outputs: list[str],
    constants: dict[str, np.ndarray] | None = None,
    kinds: dict[str, int] | None = None,
) -> ModelProto:
    """A model in normal form; values are float32 unless `kinds` says otherwise."""
    kinds = kinds or {}
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, kinds.get(name, FLOAT), shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, kinds.get(name, FLOAT), None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return normalise(onnx.shape_inference.infer_shapes(model))


def node(op: str, inputs: list[str], outputs: list[str], name: str = "", **attributes: object) -> NodeProto:
    return helper.make_node(op, inputs, outputs, name=name or f"n_{outputs[0]}", **attributes)


def casts(model: ModelProto) -> list[tuple[str, str, int]]:
    return [(n.input[0], n.output[0], n.attribute[0].i) for n in model.graph.node if n.op_type == "Cast"]


def rtx(model: ModelProto, folder: Path, targets: tuple[str, ...] = ("sm_86", "sm_89", "sm_120")) -> int:
    """Bytes of the TensorRT-RTX engine that is made of a model."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    from warpcache.engine.tensorrt.flavour import Flavour
    from warpcache.engine.tensorrt.network import BuildRequest, build_engine

    path = folder / "model.onnx"
    onnx.save(model, path)
    specs = {
        value.name: TensorSpec(
            value.name,
            helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
            tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim),
        )
        for value in (*model.graph.input, *model.graph.output)
    }
    request = BuildRequest(
        path,
        name="model",
        inputs=tuple(specs[value.name] for value in model.graph.input),
        outputs=tuple(specs[value.name] for value in model.graph.output),
        targets=targets,
    )
    return len(build_engine(request, flavour=Flavour.load("tensorrt-rtx")))


# What the emulation is compared with is ONNX's own reference in NumPy, which computes float16 graphs in float16.


def elementwise_model() -> ModelProto:
    """Only operators whose float16 result is one rounding of the exact one, so both sides agree to the bit."""
    return graph(
        [
            node("Mul", ["x", "a"], ["m"]),
            node("Add", ["m", "b"], ["s"]),
            node("Relu", ["s"], ["r"]),
            node("Concat", ["r", "m"], ["c"], axis=1),
            node("Transpose", ["c"], ["t"], perm=[0, 1, 3, 2]),
            node("Sub", ["t", "x2"], ["d"]),
            node("Split", ["d"], ["y", "z"], axis=1, num_outputs=2),
            node("Div", ["z", "a"], ["q"]),
        ],
        {"x": (1, 2, 4, 4), "x2": (1, 4, 4, 4)},
        ["y", "q"],
        {"a": np.array(1.7, np.float32), "b": RNG.normal(0, 3, (1, 2, 1, 1)).astype(np.float32)},
    )


@pytest.mark.parametrize(
    "io", [{}, {"x": "float16", "q": "float16"}], ids=["float32 inside out", "float16 at the border"]
)
@pytest.mark.parametrize("keep", [(), ("n_s", "n_r"), ("n_q",), ("n_y", "n_m")])
def test_the_emulation_rounds_every_value_as_the_graph_does(keep: tuple[str, ...], io: dict[str, str]) -> None:
    casting = cast_model(elementwise_model(), "float16", keep=keep, io=io)
    feeds = {
        "x": RNG.normal(0, 4, (1, 2, 4, 4)).astype(io.get("x", "float32")),
        "x2": RNG.normal(0, 4, (1, 4, 4, 4)).astype(np.float32),
    }
    names = ["y", "q"]
    expected = ReferenceEvaluator(casting.model).run(names, feeds)
    given = run_model(emulated(casting.model), feeds)
    for name, array in zip(names, expected, strict=True):
        assert given[name].dtype == array.dtype == np.dtype(io.get(name, "float32"))
        np.testing.assert_array_equal(given[name], array)
    # That it rounds at all: the float32 graph gives something else.
    exact = run_model(elementwise_model(), {name: array.astype(np.float32) for name, array in feeds.items()})
    assert not np.array_equal(given["q"], exact["q"])


def test_onnx_runtime_itself_does_not_round_between_nodes() -> None:
    """Why there is an emulation at all; when this fails, it may have become needless."""
    model = graph(
        [node("Mul", ["x", "up"], ["m"]), node("Mul", ["m", "down"], ["y"])],
        {"x": (1, 4)},
        ["y"],
        {"up": np.array(4e4, np.float32), "down": np.array(2.5e-5, np.float32)},
    )
    converted = cast_model(model, "float16").model
    x = np.full((1, 4), 3.0, np.float32)  # 120,000 is beyond float16
    assert np.isinf(ReferenceEvaluator(converted).run(["y"], {"x": x})[0]).all()
    assert np.isinf(run_model(emulated(converted), {"x": x})["y"]).all()
    assert np.isfinite(run_model(converted, {"x": x})["y"]).all()


def test_nothing_is_rounded_between_kept_nodes() -> None:
    model = graph(
        [
            node("Mul", ["x", "up"], ["m"]),
            node("Mul", ["m", "down"], ["d"]),
            node("Relu", ["d"], ["y"]),
        ],
        {"x": (1, 4)},
        ["y"],
        {"up": np.array(4e4, np.float32), "down": np.array(2.5e-5, np.float32)},
    )
    casting = cast_model(model, "float16", keep=("n_m", "n_d"))
    assert casting.kept == {"n_m": "asked", "n_d": "asked"}
    types = elem_types(casting.model)
    assert (types["m"], types["d"]) == (FLOAT, FLOAT)
    # Only what leaves the kept nodes is cast, and only once: x is read in float32 as it comes.
    assert [c[2] for c in casts(casting.model)] == [HALF, FLOAT]
    x = np.full((1, 4), 3.0, np.float32)
    np.testing.assert_array_equal(ReferenceEvaluator(casting.model).run(["y"], {"x": x})[0], x)


def test_a_value_is_cast_once_however_often_it_is_read() -> None:
    model = graph(
        [node("Relu", ["x"], ["a"]), node("Neg", ["x"], ["b"]), node("Add", ["a", "b"], ["y"])], {"x": (1, 4)}, ["y"]
    )
    converted = cast_model(model, "float16").model
    assert [(source, kind) for source, _, kind in casts(converted)] == [("x", HALF), ("y.float16", FLOAT)]


def test_integers_booleans_and_what_must_be_float32_stay() -> None:
    model = graph(
        [
            node("Gather", ["table", "person"], ["e"], axis=0),
            node("Reshape", ["e", "shape"], ["r"]),
            node("Resize", ["r", "", "scales"], ["u"], mode="linear"),
            node("Greater", ["u", "zero"], ["positive"]),
            node("Where", ["positive", "u", "zero"], ["w"]),
            node("Cast", ["positive"], ["f"], to=FLOAT),
            node("Mul", ["w", "f"], ["y"]),
            node("ArgMax", ["y"], ["best"], axis=1),
        ],
        {"person": (1,)},
        ["y", "best"],
        {
            "table": RNG.normal(0, 1, (3, 8)).astype(np.float32),
            "shape": np.array([1, 2, 2, 2], np.int64),
            "scales": np.array([1, 1, 2, 2], np.float32),
            "zero": np.zeros((), np.float32),
        },
        {"person": TensorProto.INT64, "best": TensorProto.INT64},
    )
    casting = cast_model(model, "float16")
    types = elem_types(casting.model)
    resize = next(n for n in casting.model.graph.node if n.op_type == "Resize")
    assert types[resize.input[2]] == FLOAT
    assert types[resize.input[0]] == types["u"] == types["w"] == HALF
    # A cast to float32 is by its attribute; its reader's half version is a cast of that.
    assert casting.kept == {"n_f": "type"}
    assert types["f"] == FLOAT
    feeds = {"person": np.array([1], np.int64)}
    given, exact = run_model(emulated(casting.model), feeds), run_model(model, feeds)
    assert given["best"].dtype == np.int64
    np.testing.assert_array_equal(given["best"], exact["best"])
    # Roundings of the table, of the interpolation (of numbers of both signs) and of the product, 2^-11 each.
    largest = np.abs(numpy_helper.to_array(model.graph.initializer[0])).max()
    np.testing.assert_allclose(given["y"], exact["y"], rtol=0, atol=3 * 2**-11 * largest)


def test_a_subgraph_reads_what_it_captures_in_float32() -> None:
    def branch(op: str) -> onnx.GraphProto:
        return helper.make_graph(
            [node(op, ["h"], [f"{op}_out"])], op, [], [helper.make_tensor_value_info(f"{op}_out", FLOAT, (1, 4))]
        )

    model = graph(
        [
            node("Relu", ["x"], ["h"]),
            node("If", ["flag"], ["i"], then_branch=branch("Neg"), else_branch=branch("Exp")),
            node("Tanh", ["i"], ["y"]),
        ],
        {"x": (1, 4), "flag": (1,)},
        ["y"],
        kinds={"flag": TensorProto.BOOL},
    )
    casting = cast_model(model, "float16")
    assert casting.kept["n_i"] == "type"
    for flag in (True, False):
        feeds = {"x": np.array([[0.1, -1, 2, 0.7]], np.float32), "flag": np.array([flag])}
        expected = run_model(model, feeds)["y"]
        assert np.abs(run_model(casting.model, feeds)["y"] - expected).max() <= 2**-10
        assert np.abs(run_model(emulated(casting.model), feeds)["y"] - expected).max() <= 2**-10


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([1.0, 7e4], r"constant 'a' reaches 7e\+04, beyond the 6.55e\+04 of float16"),
        ([1e-9, -3e-9], r"constant 'a' is at most 3e-09, too small for float16"),
        ([1e-7, 0.0], r"constant 'a' is at most 1e-07, too small for float16"),
        ([1.0, 1e-9], None),  # lost beside the other, which is what matters
        ([1e-5, 2e-5], None),  # subnormal, still 7 bits
        ([np.inf, -np.inf], None),
        ([0.0, 0.0], None),
    ],
)
def test_a_constant_that_float16_cannot_hold_keeps_its_node(values: list[float], reason: str | None) -> None:
    model = graph([node("Mul", ["x", "a"], ["y"])], {"x": (1, 2)}, ["y"], {"a": np.array(values, np.float32)})
    casting = cast_model(model, "float16")
    if reason is None:
        assert not casting.kept
    else:
        assert casting.kept == {"n_y": "constant"}
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(casting.constants["n_y"])
        assert casting.model.graph.initializer[0].data_type == FLOAT
    assert not cast_model(model, "bfloat16").kept  # it has float32's range


def warp_model() -> ModelProto:
    """An image sampled at a grid of a base, a flow out of a convolution, and a position's fraction."""
    return graph(
        [
            node("Conv", ["image", "w"], ["flow"], pads=[1, 1, 1, 1]),
            node("Add", ["flow", "base"], ["position"]),
            node("Mul", ["position", "size"], ["pixels"]),
            node("Floor", ["pixels"], ["whole"]),
            node("Sub", ["pixels", "whole"], ["fraction"]),
            node("Transpose", ["position"], ["grid"], perm=[0, 2, 3, 1]),
            node("GridSample", ["cache.image", "grid"], ["moved"], mode="linear", padding_mode="border"),
            node("ReduceMean", ["fraction", "axes"], ["weight"], keepdims=1),
            node("Mul", ["moved", "weight"], ["y"]),
        ],
        {"image": (1, 3, 8, 8), "cache.image": (1, 3, 8, 8)},
        ["y"],
        {
            "w": RNG.normal(0, 0.01, (2, 3, 3, 3)).astype(np.float32),
            "base": np.stack(np.meshgrid(*[(np.arange(8, dtype=np.float32) * 2 + 1) / 8 - 1] * 2))[None],
            "size": np.array(4, np.float32),
            "axes": np.array([1], np.int64),
        },
    )


def test_coordinates_are_computed_in_float32_from_the_convolution_on() -> None:
    model = warp_model()
    casting = cast_model(model, "float16")
    kept = {name for name, reason in casting.kept.items() if reason == "coordinates"}
    assert kept == {"n_position", "n_pixels", "n_whole", "n_fraction", "n_grid", "n_moved"} == set(casting.kept)
    types = elem_types(casting.model)
    assert (types["flow"], types["weight"]) == (HALF, HALF)
    sample = next(n for n in casting.model.graph.node if n.op_type == "GridSample")
    # TensorRT wants both of one type, whatever ONNX allows.
    assert types[sample.input[0]] == types[sample.input[1]] == FLOAT
    # What is sampled is no coordinate; where what is sampled is one, it comes in float32.
    assert "cache.image" not in coordinate_values(GraphIndex(model))
    assert "image" in coordinate_values(GraphIndex(model), ["image"])


def test_coordinates_go_back_through_an_atlas_that_is_sampled() -> None:
    model = graph(
        [
            node("GridSample", ["cache.atlas", "uv"], ["positions"], mode="linear"),
            node("Transpose", ["positions"], ["grid"], perm=[0, 2, 3, 1]),
            node("GridSample", ["cache.features", "grid"], ["y"], mode="linear"),
        ],
        {"cache.atlas": (1, 2, 4, 4), "uv": (1, 8, 8, 2), "cache.features": (1, 3, 8, 8)},
        ["y"],
    )
    assert coordinate_values(GraphIndex(model)) == {"cache.atlas", "uv", "positions", "grid"}


def test_module_paths_stay_and_casts_get_their_readers() -> None:
    model = graph(
        [node("Relu", ["x"], ["h"]), node("Conv", ["h", "w"], ["y"])],
        {"x": (1, 2, 4, 4)},
        ["y"],
        {"w": RNG.normal(0, 1, (2, 2, 1, 1)).astype(np.float32)},
    )
    for n, path in zip(model.graph.node, ("first", "deep.conv"), strict=True):
        n.metadata_props.add(key=SCOPES_KEY, value=f"['', '{path}', 'op']")
    for to in ("float16", "bfloat16"):
        index = GraphIndex(cast_model(model, to).model)
        paths = {n.op_type if n.op_type != "Cast" else n.input[0]: index.scopes(i) for i, n in enumerate(index.nodes)}
        assert paths == {
            "x": ("", "first"),
            "Relu": ("", "first"),
            "Conv": ("", "deep.conv"),
            f"y.{to}": ("", "deep.conv"),
        }


def test_bfloat16_is_of_operator_set_22_and_leaves_out_what_tensorrt_cannot() -> None:
    model = graph(
        [node("Conv", ["x", "w"], ["h"]), node("ConvTranspose", ["h", "w"], ["y"])],
        {"x": (1, 2, 4, 4)},
        ["y"],
        {"w": RNG.normal(0, 1, (2, 2, 1, 1)).astype(np.float32)},
    )
    casting = cast_model(model, "bfloat16")
    assert casting.model.opset_import[0].version == 22
    assert casting.kept == {"n_y": "type"}
    assert elem_types(casting.model)["h"] == TensorProto.BFLOAT16
    assert model.opset_import[0].version == 20


@pytest.mark.parametrize("to", ["float16", "bfloat16"])
def test_every_kind_of_generator_converts_runs_and_builds(traced: Any, to: str, tmp_path: Path) -> None:
    casting = cast_model(traced.model, to)
    # Only casts by attribute and their like may be left; a rule that catches convolutions would be seen here.
    assert not {n for n, reason in casting.kept.items() if reason in ("coordinates", "constant", "asked")}
    assert not {"Conv", "MatMul", "Gemm", "InstanceNormalization"} & {
        n.op_type for n in casting.model.graph.node if casting.kept.get(n.name) == "type"
    }
    given, exact = run_model(emulated(casting.model), traced.frame(1)), run_model(traced.model, traced.frame(1))
    for name, array in exact.items():
        if array.dtype.kind != "f":
            continue
        noise = float(
            np.sqrt(np.mean((given[name].astype(np.float64) - array) ** 2) / np.mean(array.astype(float) ** 2))
        )
        # Random walks of some tens of roundings, each of 2^-11 (2^-8) relative: an eighth of a percent (1 %).
        assert noise < {"float16": 2**-9, "bfloat16": 2**-6}[to]
        # And it did compute in half: no float32 result is left as it was.
        assert noise > 0 or name == "pose"
    assert rtx(casting.model, tmp_path) > 0


def test_tensorrt_takes_the_warp_in_float16(tmp_path: Path) -> None:
    assert rtx(cast_model(warp_model(), "float16", io={"cache.image": "float16"}).model, tmp_path) > 0


def test_the_original_is_left_as_it_is(trace: Callable[[str], Any]) -> None:
    model = trace("unet").model
    before = model.SerializeToString(deterministic=True)
    emulated(cast_model(model, "float16", keep=("nothing",)).model)
    cast_model(model, "bfloat16")
    assert model.SerializeToString(deterministic=True) == before

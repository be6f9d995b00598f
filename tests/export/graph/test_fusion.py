"""Which cuts keep the executor's kernels: places that look harmless and are not, each found by comparing bits."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from warpcache.engine.errors import ExportError
from warpcache.export.cut.enumerate import enumerate_cuts
from warpcache.export.cut.split import check_exact, split
from warpcache.export.graph.fusion import block_channels, find_fusions
from warpcache.export.graph.index import GraphIndex
from warpcache.export.graph.surgery import normalise

BLOCK = block_channels()
needs_blocks = pytest.mark.skipif(BLOCK is None, reason="this processor's ONNX Runtime has no blocked layout")


def _parse(text: str, weights: dict[str, tuple[int, ...]] | None = None) -> onnx.ModelProto:
    model = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 20]>\n' + text)
    rng = np.random.default_rng(2)
    for name, shape in (weights or {}).items():
        # Positive, so that they serve as variances too.
        model.graph.initializer.append(numpy_helper.from_array(rng.uniform(0.2, 1.2, shape).astype(np.float32), name))
    return normalise(model)


def _legal(model: onnx.ModelProto) -> set[frozenset[str]]:
    costs = dict.fromkeys(GraphIndex(model).names, 1.0)
    cuts = enumerate_cuts(model, costs, max_cost_ratio=1.0, min_cost_ratio=0.0)
    return {frozenset(cut.names) for cut in cuts}


def _feeds(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    index = GraphIndex(model)
    return {name: rng.standard_normal(index.specs[name].shape).astype(index.specs[name].dtype) for name in index.inputs}


def _is_exact(model: onnx.ModelProto, cut: list[str], anchors: list[str] | None = None) -> bool:
    try:
        check_exact(model, split(model, cut, anchors=anchors or []), _feeds(model))
    except ExportError as exc:
        if "differs from the whole" not in str(exc):
            raise
        return False
    return True


def _norm(name: str) -> str:
    return f"BatchNormalization(%s, {name}0, {name}1, {name}2, {name}3)"


def _norm_weights(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}{k}": (channels,) for k in range(4)}


@needs_blocks
def test_an_addition_moves_into_a_normalisation_that_lost_a_reader() -> None:
    """In the blocked layout a normalisation is a convolution, which takes in the addition behind it."""
    model = _parse(
        f"""g (float[1,16,8,8] x) => (float[1,16,8,8] y, float[1,16,8,8] z) {{
          a = Conv<pads = [1,1,1,1]>(x, w)
          t = Tanh(a)
          n = {_norm("p") % "t"}
          y = Add(t, n)
          e = Erf(n)
          deep = Conv<pads = [1,1,1,1]>(e, v)
          z = Abs(deep) }}""",
        {"w": (16, 16, 3, 3), "v": (16, 16, 3, 3), **_norm_weights("p", 16)},
    )
    assert not _is_exact(model, ["e"])
    legal = _legal(model)
    assert not any("e" in cut or "deep" in cut for cut in legal if "y" not in cut)
    assert frozenset({"deep", "y"}) in legal or frozenset({"t", "n"}) in legal


@needs_blocks
def test_a_scale_moves_into_a_convolution_that_lost_a_reader() -> None:
    """Behind what the convolution has taken in already: the kernel's last value counts, not the convolution's."""
    model = _parse(
        f"""g (float[1,16,8,8] x) => (float[1,16,8,8] y, float[1,16,4,4] z) {{
          a = Conv<pads = [1,1,1,1]>(x, w)
          n = {_norm("p") % "a"}
          y = Mul(n, k)
          m = MaxPool<kernel_shape = [2,2], strides = [2,2]>(n)
          z = Tanh(m) }}""",
        {"w": (16, 16, 3, 3), "k": (1, 16, 1, 1), **_norm_weights("p", 16)},
    )
    assert not _is_exact(model, ["y"])
    assert frozenset({"y"}) not in _legal(model)


def test_a_normalisation_moves_into_a_transposed_convolution_that_lost_a_reader() -> None:
    model = _parse(
        f"""g (float[1,4,4,4] x) => (float[1,8,8,8] y, float[1,8,8,8] z) {{
          a = ConvTranspose<strides = [2,2], pads = [1,1,1,1]>(x, w)
          n = {_norm("p") % "a"}
          y = Abs(n)
          z = Erf(a) }}""",
        {"w": (4, 8, 4, 4), **_norm_weights("p", 8)},
    )
    assert not _is_exact(model, ["n"])
    legal = _legal(model)
    assert frozenset({"n"}) not in legal
    assert frozenset({"a"}) in legal


def test_a_gate_that_lost_a_reader_becomes_one_kernel() -> None:
    """x * sigmoid(x) has a kernel of its own where nothing else reads the sigmoid."""
    model = _parse(
        """g (float[1,4,8,8] x) => (float[1,4,8,8] y, float[1,4,8,8] z) {
          a = Conv<pads = [1,1,1,1]>(x, w)
          s = Sigmoid(a)
          y = Mul(a, s)
          e = Erf(s)
          z = Conv<pads = [1,1,1,1]>(e, w) }""",
        {"w": (4, 4, 3, 3)},
    )
    index = GraphIndex(model)
    fusions = find_fusions(model)
    assert fusions.fuses_anew(index, index.closure(["y"]), {"e"})
    assert not fusions.fuses_anew(index, index.closure(["y", "z"]), {"e"})
    assert frozenset({"e"}) not in _legal(model)


def test_a_normalisation_joins_the_addition_before_it_through_reshapes() -> None:
    """They move values only, so the optimiser drops them, and then finds the pair."""
    model = _parse(
        """g (float[1,16,8] x) => (float[1,16,8] y, float[1,8,16] z) {
          m = MatMul(x, w)
          a = Add(x, m)
          t = Transpose<perm = [0,2,1]>(a)
          z = Erf(t)
          u = Transpose<perm = [0,2,1]>(t)
          n = LayerNormalization(u, g0, g1)
          y = MatMul(n, w) }""",
        {"w": (8, 8), "g0": (8,), "g1": (8,)},
    )
    index = GraphIndex(model)
    assert find_fusions(model).fuses_anew(index, index.closure(["n"]), {"n"})
    assert frozenset({"n"}) not in _legal(model)


@needs_blocks
def test_a_tensor_that_fills_no_block_cannot_be_anchored() -> None:
    """A convolution blocks it all the same, a pooling does not."""
    text = """g (float[1,{c},8,8] x) => (float[1,{c},8,8] y) {{
      a = Conv<pads = [1,1,1,1]>(x, w)
      b = Add(a, a)
      d = Conv<pads = [1,1,1,1]>(b, v)
      y = Add(d, b) }}"""
    legal = {}
    for channels in (BLOCK, BLOCK - 3):
        weights = {"w": (channels, channels, 3, 3), "v": (channels, channels, 3, 3)}
        model = _parse(text.format(c=channels), weights)
        legal[channels] = frozenset({"b"}) in _legal(model)
        assert _is_exact(model, ["b"], anchors=["b"]) == legal[channels]
    assert legal == {BLOCK: True, BLOCK - 3: False}


@needs_blocks
def test_a_global_pooling_of_a_cached_tensor_is_blocked() -> None:
    """It reads an input of the consumer's graph then; in the whole it reads what a concatenation made, and is not."""
    model = _parse(
        f"""g (float[1,{BLOCK},8,8] x) => (float[1,{2 * BLOCK},8,8] y) {{
          a = Conv<pads = [1,1,1,1]>(x, w)
          c = Concat<axis = 1>(a, x)
          p = GlobalAveragePool(c)
          s = Sigmoid(p)
          y = Mul(c, s) }}""",
        {"w": (BLOCK, BLOCK, 3, 3)},
    )
    assert frozenset({"c"}) not in _legal(model)
    assert frozenset({"c", "p"}) in _legal(model)
    assert _is_exact(model, ["c", "p"])


@needs_blocks
def test_a_global_pooling_behind_a_scale_is_anchored() -> None:
    """In the whole the scale is blocked, and the pooling with it."""
    model = _parse(
        """g (float[1,16,8,8] x) => (float[1,16,8,8] y, float[1,16,8,8] z) {
          a = Conv<pads = [1,1,1,1]>(x, w)
          z = Tanh(a)
          b = Mul(a, k)
          d = Conv<pads = [1,1,1,1]>(b, w)
          p = GlobalAveragePool(b)
          s = Sigmoid(p)
          y = Mul(d, s) }""",
        {"w": (16, 16, 3, 3), "k": (1, 16, 1, 1)},
    )
    index = GraphIndex(model)
    fusions = find_fusions(model)
    rest = index.closure(index.outputs, stop={"a"})
    assert fusions.anchors(index, ["a"], rest) == ("a",)
    assert _is_exact(model, ["a"], anchors=["a"])


def test_a_value_that_is_rounded_only_to_be_given_out_is_no_place_to_cut() -> None:
    """float16 without a float16 kernel: what reads it inside the whole reads more digits than a cache would hold."""
    model = _parse(
        """g (float16[1,6,8] x) => (float16[1,6,8] y, float16[1,6,8] kept) {
          h = Cast<to = 10>(w)
          a = MatMul(x, h)
          s = Softmax(a)
          kept = Identity(s)
          y = MatMul(s, h) }""",
        {"w": (8, 8)},
    )
    assert "s" not in find_fusions(model).survivors
    assert not any("s" in cut for cut in _legal(model))
    assert not _is_exact(model, ["s"])


def test_one_output_of_a_node_is_cached_and_another_computed_anew() -> None:
    """The consumer holds the node too; what it makes of the cached name must not stand beside the cached tensor."""
    model = _parse(
        """g (float[1,8] x) => (float[1,4] y) {
          left, right = Split<axis = 1, num_outputs = 2>(x)
          a = Sin(left)
          b = Cos(right)
          y = Add(a, b) }"""
    )
    parts = split(model, ["left"])
    assert [node.op_type for node in parts.plain.graph.node].count("Split") == 1
    onnx.checker.check_model(parts.plain, full_check=True)
    check_exact(model, parts, _feeds(model))


def test_files_of_the_oldest_kind_are_read() -> None:
    """Before version 4 of the file format initializers are listed as inputs, which the normal form does not do."""
    model = onnx.parser.parse_model(
        '<ir_version: 3, opset_import: ["" : 9]>'
        "g (float[1,2] x, float[2,2] w) => (float[1,2] y) <float[2,2] w = {1,2,3,4}> { m = MatMul(x, w)\n y = Sin(m) }"
    )
    if all(value.name != "w" for value in model.graph.input):
        model.graph.input.append(onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, (2, 2)))
    onnx.checker.check_model(model)
    flat = normalise(model)
    assert [value.name for value in flat.graph.input] == ["x"]
    check_exact(flat, split(flat, ["m"]), _feeds(flat))

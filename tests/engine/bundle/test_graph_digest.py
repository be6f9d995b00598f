"""What makes a graph another one, and what does not: on the tiny bundle's generator and on graphs made for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from warpcache.engine.bundle.graph_digest import graph_digest
from warpcache.engine.errors import BundleError

WEIGHTS = {
    "w1": np.arange(12, dtype=np.float32).reshape(3, 4),
    "w2": np.linspace(-1, 1, 8, dtype=np.float32).reshape(4, 2),
    "b2": np.float32([0.5, -0.5]),
}


def model() -> onnx.ModelProto:
    """y = (x @ w1) @ w2 + b2, then an If whose branches hold constants of their own."""
    branches = [
        helper.make_graph(
            [helper.make_node("Constant", [], [f"c{value}"], value=numpy_helper.from_array(np.float32(value)))],
            f"branch{value}",
            [],
            [helper.make_tensor_value_info(f"c{value}", TensorProto.FLOAT, [])],
        )
        for value in (1, 2)
    ]
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w1"], ["h"], name="first"),
            helper.make_node("MatMul", ["h", "w2"], ["p"], name="second"),
            helper.make_node("Add", ["p", "b2"], ["s"], name="third"),
            helper.make_node("If", ["which"], ["c"], then_branch=branches[0], else_branch=branches[1]),
            helper.make_node("Mul", ["s", "c"], ["m"]),
            helper.make_node("LeakyRelu", ["m"], ["y"], alpha=0.1),
        ],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3]),
            helper.make_tensor_value_info("which", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2])],
        initializer=[numpy_helper.from_array(value, name) for name, value in WEIGHTS.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def save(folder: Path, proto: onnx.ModelProto, places: dict[str, tuple[str, int]], *, with_length: bool = True) -> Path:
    """Write `proto` with some initializers in other files, at the given offsets; what is between is noise."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, bytearray] = {}
    for tensor in proto.graph.initializer:
        if tensor.name not in places:
            continue
        location, offset = places[tensor.name]
        content = tensor.raw_data
        file = files.setdefault(location, bytearray())
        file.extend(b"\xaa" * max(0, offset + len(content) - len(file)))
        file[offset : offset + len(content)] = content
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
        tensor.external_data.add(key="offset", value=str(offset))
        if with_length:
            tensor.external_data.add(key="length", value=str(len(content)))
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    path = folder / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> str:
    return graph_digest(save(tmp_path_factory.mktemp("inline"), model(), {}))


gaps = st.integers(0, 300)
place = st.integers(0, 2)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.permutations(sorted(WEIGHTS)), gap=st.tuples(gaps, gaps, gaps), files=st.tuples(*[st.integers(0, 2)] * 3)
)
def test_where_the_constants_lie_does_not_matter(tmp_path, inline, order, gap, files):
    """In the graph itself (0) or in one of two files, in any order, at any offset."""
    ends = [0, 0, 0]
    places = {}
    for name, space, file in zip(order, gap, files, strict=True):
        if file:
            offset = ends[file] + space
            places[name] = (f"weights{file}.bin", offset)
            ends[file] = offset + WEIGHTS[name].nbytes
    assert graph_digest(save(tmp_path / "case", model(), places)) == inline


def test_a_constant_without_a_length_reaches_to_the_end_of_its_file(tmp_path, inline):
    assert graph_digest(save(tmp_path, model(), {"w1": ("w.bin", 7)}, with_length=False)) == inline


def test_a_copy_of_a_bundle_has_the_same_graphs_and_they_differ_from_each_other(tiny_bundle, tmp_path):
    copy = shutil.copytree(tiny_bundle, tmp_path / "elsewhere.warp")
    names = sorted(path.name for path in tiny_bundle.glob("*.onnx"))
    digests = [graph_digest(tiny_bundle / name) for name in names]
    assert [graph_digest(copy / name) for name in names] == digests
    assert len(set(digests)) == len(names) == 4


def swap_wires(proto: onnx.ModelProto) -> None:
    node = proto.graph.node[2]
    node.input[0], node.input[1] = node.input[1], node.input[0]


def change_constant_in_branch(proto: onnx.ModelProto) -> None:
    constant = proto.graph.node[3].attribute[1].g.node[0].attribute[0].t
    constant.raw_data = np.float32(2.5).tobytes()


def change_weight(proto: onnx.ModelProto) -> None:
    weight = proto.graph.initializer[1]
    weight.raw_data = weight.raw_data[:-1] + bytes([weight.raw_data[-1] ^ 1])


CHANGES: dict[str, Callable[[onnx.ModelProto], object]] = {
    "operator": lambda proto: setattr(proto.graph.node[2], "op_type", "Sub"),
    "domain": lambda proto: setattr(proto.graph.node[2], "domain", "com.microsoft"),
    "attribute": lambda proto: setattr(proto.graph.node[5].attribute[0], "f", 0.2),
    "attribute's name": lambda proto: setattr(proto.graph.node[5].attribute[0], "name", "beta"),
    "wiring": swap_wires,
    "constant in a branch": change_constant_in_branch,
    "branch's place": lambda proto: setattr(proto.graph.node[3].attribute[0], "name", "else_branch2"),
    "weight": change_weight,
    "weight's dtype": lambda proto: setattr(proto.graph.initializer[1], "data_type", TensorProto.INT32),
    "weight's shape": lambda proto: proto.graph.initializer[1].dims.__setitem__(slice(None), [2, 4]),
    "weight's name": lambda proto: setattr(proto.graph.initializer[1], "name", "other"),
    "node removed": lambda proto: proto.graph.node.pop(),
    "input's shape": lambda proto: setattr(proto.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 4),
    "opset": lambda proto: setattr(proto.opset_import[0], "version", 21),
}


@pytest.mark.parametrize("outside", [False, True], ids=["inline", "external"])
@pytest.mark.parametrize("what", sorted(CHANGES))
def test_any_change_of_the_graph_is_another_graph(tmp_path, inline, what, outside):
    changed = model()
    CHANGES[what](changed)
    places = {"w1": ("w.bin", 0), "w2": ("w.bin", 48)} if outside else {}
    assert graph_digest(save(tmp_path, changed, places)) != inline


def test_two_constants_that_trade_their_bytes_are_another_graph(tmp_path, inline):
    """Same file and same bytes, but each weight points at the other's."""
    proto = model()
    first, second = proto.graph.initializer[0], proto.graph.initializer[1]
    first.raw_data, second.raw_data = second.raw_data, first.raw_data
    assert graph_digest(save(tmp_path, proto, {})) != inline


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bit_of_a_constant_elsewhere_counts(tmp_path, inline, data):
    path = save(tmp_path / "case", model(), {"w1": ("w.bin", 16)})
    content = bytearray((path.parent / "w.bin").read_bytes())
    where = data.draw(st.integers(0, len(content) - 1))
    content[where] ^= 1 << data.draw(st.integers(0, 7))
    (path.parent / "w.bin").write_bytes(content)
    # The first 16 bytes are nobody's.
    assert (graph_digest(path) == inline) == (where < 16)


def external(folder: Path, location: str, *, size_bytes: int = 48) -> Path:
    proto = model()
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    tensor.external_data.add(key="length", value=str(size_bytes))
    path = folder / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize(
    "location", ["../w.bin", "a/../../w.bin", "/etc/hostname", "..\\w.bin", "C:\\w.bin", "\\w.bin", ""]
)
def test_a_constant_outside_the_folder_is_not_read(tmp_path, location):
    with pytest.raises(BundleError, match=r"^the graph .*m\.onnx cannot be identified: .* is outside its folder"):
        graph_digest(external(tmp_path, location))


def test_a_missing_or_short_file_of_constants_is_named(tmp_path):
    path = external(tmp_path, "w.bin")
    with pytest.raises(BundleError, match=r"^the graph .* its tensor 'w1' lies in 'w\.bin', which cannot be read: No"):
        graph_digest(path)
    (tmp_path / "w.bin").write_bytes(bytes(40))
    with pytest.raises(BundleError, match=r"^the graph .* lies in 'w\.bin', which is 8 bytes too short for it"):
        graph_digest(path)


def test_what_is_no_graph_is_refused(tmp_path):
    path = tmp_path / "m.onnx"
    with pytest.raises(BundleError, match=r"^the graph .* cannot be read: No such file"):
        graph_digest(path)
    path.write_bytes(b"")
    with pytest.raises(BundleError, match=r"^the graph .* cannot be identified: it is empty"):
        graph_digest(path)
    path.write_bytes(b"\xff" * 40)
    with pytest.raises(BundleError, match=r"^the graph .* cannot be identified: it is not a well-formed"):
        graph_digest(path)
    nested = b""
    for _ in range(120):  # a node's attribute holds a graph, which holds a node, and so on
        for tag in (0x32, 0x2A, 0x0A):
            size, prefix = len(nested), bytearray([tag])
            while size >= 0x80:
                prefix.append(size & 0x7F | 0x80)
                size >>= 7
            nested = bytes(prefix) + bytes([size]) + nested
    size, prefix = len(nested), bytearray([0x3A])
    while size >= 0x80:
        prefix.append(size & 0x7F | 0x80)
        size >>= 7
    path.write_bytes(bytes(prefix) + bytes([size]) + nested)
    with pytest.raises(BundleError, match=r"^the graph .* cannot be identified: its graphs are nested more than 100"):
        graph_digest(path)

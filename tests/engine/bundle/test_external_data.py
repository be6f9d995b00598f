"""References to other files inside ONNX models: found wherever they can hide, against the onnx package as reference."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.bundle.external_data import ExternalTensor, GraphNode, external_tensors, graph_nodes
from warpcache.engine.errors import BundleError


def read(path: Path, data: bytes) -> list[ExternalTensor]:
    path.write_bytes(data)
    with path.open("rb") as file:
        return external_tensors(file)


def external(name: str, location: str, **numbers: int) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **numbers}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def sparse(location: str) -> onnx.SparseTensorProto:
    indices = numpy_helper.from_array(np.array([0, 1]), "indices")
    return onnx.SparseTensorProto(values=external("sparse", location), indices=indices, dims=[4])


def graph(nodes: list[onnx.NodeProto], *tensors: TensorProto, name: str = "g") -> onnx.GraphProto:
    return helper.make_graph(nodes, name, [], [], initializer=list(tensors))


def constant(**attribute: object) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["c"], **attribute)


def nested(depth: int, location: str) -> onnx.GraphProto:
    inner = graph([], external("deep", location))
    for _ in range(depth):
        inner = graph([helper.make_node("If", ["b"], ["c"], then_branch=inner)])
    return inner


def with_sparse_initializer(location: str) -> onnx.GraphProto:
    made = graph([])
    made.sparse_initializer.append(sparse(location))
    return made


def function(location: str) -> onnx.FunctionProto:
    return helper.make_function(
        "local", "f", [], ["c"], [constant(value=external("t", location))], [helper.make_opsetid("", 20)]
    )


PLACES: dict[str, Callable[[str], onnx.ModelProto]] = {
    "initializer": lambda to: onnx.ModelProto(graph=graph([], external("w", to))),
    "attribute": lambda to: onnx.ModelProto(graph=graph([constant(value=external("w", to))])),
    "list attribute": lambda to: onnx.ModelProto(
        graph=graph([helper.make_node("X", [], ["c"], domain="d", tensors=[external("w", to)])])
    ),
    "sub-graph": lambda to: onnx.ModelProto(graph=nested(1, to)),
    "sub-graph of sub-graphs": lambda to: onnx.ModelProto(graph=nested(12, to)),
    "list of graphs": lambda to: onnx.ModelProto(
        graph=graph([helper.make_node("X", [], ["c"], domain="d", graphs=[nested(0, to)])])
    ),
    "sparse initializer": lambda to: onnx.ModelProto(graph=with_sparse_initializer(to)),
    "sparse attribute": lambda to: onnx.ModelProto(graph=graph([constant(sparse_value=sparse(to))])),
    "function": lambda to: onnx.ModelProto(graph=graph([]), functions=[function(to)]),
    "training": lambda to: onnx.ModelProto(training_info=[onnx.TrainingInfoProto(algorithm=nested(0, to))]),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_reference_is_found_wherever_it_hides(tmp_path, place):
    found = read(tmp_path / "m.onnx", PLACES[place]("../elsewhere.bin").SerializeToString())
    assert [tensor.location for tensor in found] == ["../elsewhere.bin"]


def test_references_are_those_that_the_onnx_package_sees(tiny_bundle):
    counts = {}
    for path in tiny_bundle.glob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        expected = []
        for tensor in model.graph.initializer:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if entries:
                numbers = int(entries["offset"]), int(entries["length"])
                expected.append(ExternalTensor(tensor.name, entries["location"], *numbers))
        with path.open("rb") as file:
            assert external_tensors(file) == expected
        counts[path.stem] = len(expected)
    assert counts == {"generator": 4, "producer": 4, "plain": 2, "warp": 0}


def test_inline_weights_are_no_reference(tmp_path):
    weight = numpy_helper.from_array(np.arange(5000, dtype=np.float32), "w")
    assert read(tmp_path / "m.onnx", onnx.ModelProto(graph=graph([], weight)).SerializeToString()) == []


def test_the_last_of_two_equal_keys_counts_as_in_every_map(tmp_path):
    tensor = external("w", "weights.safetensors")
    tensor.external_data.add(key="location", value="../second.bin")
    found = read(tmp_path / "m.onnx", onnx.ModelProto(graph=graph([], tensor)).SerializeToString())
    assert found == [ExternalTensor("w", "../second.bin", 0, None)]


@pytest.mark.parametrize("offset", ["-5", "1e3", "", "٣", "9" * 30])
def test_a_number_that_is_none_is_refused(tmp_path, offset):
    tensor = external("w", "weights.safetensors")
    tensor.external_data.add(key="offset", value=offset)
    with pytest.raises(BundleError, match=r"^its tensor 'w' lies at '.*' of another file, which is no count of bytes"):
        read(tmp_path / "m.onnx", onnx.ModelProto(graph=graph([], tensor)).SerializeToString())


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(BundleError, match=r"^it is empty"):
        read(tmp_path / "m.onnx", b"")


def test_endless_nesting_is_refused(tmp_path):
    with pytest.raises(BundleError, match=r"^its graphs are nested more than 100 messages deep"):
        read(tmp_path / "m.onnx", deep_bytes(60))


def deep_bytes(depth: int) -> bytes:
    """A model whose graphs nest, written by hand: the onnx package itself stops at protobuf's limit."""

    def field(number: int, body: bytes) -> bytes:
        return varint(number << 3 | 2) + varint(len(body)) + body

    body = b""
    for _ in range(depth):
        body = field(1, field(5, field(6, body)))
    return field(7, body)


def varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


@settings(deadline=None)
@given(data=st.binary(min_size=1, max_size=60) | st.binary(max_size=40).map(lambda body: b"\x3a\x28" + body))
def test_rubbish_is_refused_or_harmless(data, tmp_path_factory):
    try:
        found = read(tmp_path_factory.getbasetemp() / "rubbish.onnx", data)
    except BundleError:
        return
    assert all(isinstance(tensor, ExternalTensor) for tensor in found)


@settings(deadline=None)
@given(where=st.floats(0, 1, exclude_max=True))
def test_a_truncated_model_never_loses_its_references_silently(where, tmp_path_factory):
    """Cut anywhere, the model is refused or the cut fell between two whole fields, where protobuf reads it too."""
    data = PLACES["sub-graph"]("weights.safetensors").SerializeToString() + b"\x08\x0a"
    cut = data[: max(1, int(where * len(data)))]
    try:
        read(tmp_path_factory.getbasetemp() / "cut.onnx", cut)
    except BundleError:
        return
    assert onnx.ModelProto.FromString(cut) is not None  # raises where protobuf cannot read it either


# Where nodes come from


def test_nodes_are_those_that_the_onnx_package_sees(tiny_bundle):
    for path in tiny_bundle.glob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        expected = [GraphNode(node.name, node.op_type, tuple(node.output), "") for node in model.graph.node]
        with path.open("rb") as file:
            assert graph_nodes(file) == expected


@pytest.mark.parametrize(
    ("scopes", "path"),
    [
        ("['', 'enc.0', 'enc.0.c1', 'conv2d']", "enc.0.c1.conv2d"),
        ("['', 'conv2d']", "conv2d"),
        ("[]", ""),
        ("", ""),
        ("['a'", ""),
        ("{'a': 1}", ""),
        ("[1, 2]", ""),
        ("__import__('os').getcwd()", ""),
        ("(" * 5000, ""),
    ],
)
def test_a_node_says_where_in_the_users_model_it_comes_from(tmp_path, scopes, path):
    node = helper.make_node("Relu", ["x"], ["y", "z"], name="n")
    for key, value in (("namespace", ": a.B"), ("pkg.torch.onnx.name_scopes", scopes), ("other", "['', 'wrong']")):
        node.metadata_props.add(key=key, value=value)
    # Nodes of sub-graphs are not the main graph's.
    branch = helper.make_node("If", ["b"], ["c"], then_branch=graph([helper.make_node("Tanh", ["x"], ["t"])]))
    (tmp_path / "m.onnx").write_bytes(onnx.ModelProto(graph=graph([node, branch])).SerializeToString())
    with (tmp_path / "m.onnx").open("rb") as file:
        assert graph_nodes(file) == [GraphNode("n", "Relu", ("y", "z"), path), GraphNode("", "If", ("c",), "")]


# In a bundle


def infect(bundle: Path, edit: Callable[[TensorProto], None]) -> None:
    """Change the references in the generator and seal the bundle again, hashes and all."""
    model = onnx.load(bundle / "generator.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        edit(tensor)
    data = model.SerializeToString()
    (bundle / "generator.onnx").write_bytes(data)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"]["generator.onnx"] = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def setting(key: str, value: str) -> Callable[[TensorProto], None]:
    def edit(tensor: TensorProto) -> None:
        for entry in tensor.external_data:
            if entry.key == key:
                entry.value = value

    return edit


@pytest.mark.parametrize(
    "location", ["../outside.bin", "/etc/passwd", "./weights.safetensors", "sub/../weights.safetensors", ""]
)
def test_a_graph_that_reads_outside_its_bundle_is_refused(make_bundle, location):
    bundle = make_bundle()
    infect(bundle, setting("location", location))
    with pytest.raises(
        BundleError, match=rf"^bundle .*: file 'generator.onnx' reads '{location}' for its tensor 'conv1"
    ):
        Bundle.open(bundle)


@pytest.mark.parametrize(("key", "value"), [("offset", "1000000"), ("length", "1000000")])
def test_a_graph_that_reads_past_the_end_is_refused(make_bundle, key, value):
    bundle = make_bundle()
    infect(bundle, setting(key, value))
    with pytest.raises(
        BundleError, match=r"^bundle .*: file 'generator.onnx' reads bytes \d+ to \d+ of 'weights.safetens"
    ):
        Bundle.open(bundle)


def test_a_graph_that_is_no_model_is_refused(make_bundle):
    bundle = make_bundle()
    manifest = json.loads((bundle / "manifest.json").read_text())
    data = b"\xff" * 64
    (bundle / "warp.onnx").write_bytes(data)
    manifest["files"]["warp.onnx"] = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        BundleError, match=r"^bundle .*: file 'warp.onnx' is refused: it is not a well-formed ONNX model"
    ):
        Bundle.open(bundle)


def test_harmless_edits_still_open(make_bundle):
    """The refusals above are for the reference, not for the change as such."""
    bundle = make_bundle()
    infect(bundle, lambda tensor: None)
    assert Bundle.open(bundle).manifest.name == "tiny"

"""Fixtures that tests of several packages use."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save

from warpcache.engine.bundle import Cut, ExitRecord, InputRecord, Manifest, ModuleRecord, write_bundle
from warpcache.engine.spec import TensorSpec

# The doubles of TensorRT's Python modules are imported by name, also by the process that builds engines.
sys.path.append(str(Path(__file__).parent / "software_tensorrt"))

SIZE = 16
CHANNELS = 8
X = TensorSpec("x", "float32", (1, 3, SIZE, SIZE))
IMAGE = TensorSpec("image", "float32", (1, 3, SIZE, SIZE))
HIDDEN = TensorSpec("cache.h", "float32", (1, CHANNELS, SIZE, SIZE))
LAST = TensorSpec("cache.y_s", "float32", (1, 3, SIZE, SIZE))


def _software_cuda_fixtures() -> ModuleType:
    """The fixtures of tests/software_cuda, imported as the package `software_cuda`: tests/ itself is no package."""
    folder = Path(__file__).resolve().parent / "software_cuda"
    spec = importlib.util.spec_from_file_location(
        "software_cuda", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["software_cuda"] = package
    spec.loader.exec_module(package)
    return importlib.import_module("software_cuda.fixture")


_fixtures = _software_cuda_fixtures()
software_cuda_driver = _fixtures.software_cuda_driver
software_cuda = _fixtures.software_cuda
no_cuda_driver = _fixtures.no_cuda_driver


def pytest_configure(config: pytest.Config) -> None:
    """Say what the fixtures' marker means."""
    config.addinivalue_line(
        "markers", "leaves_cuda_behind: the test may keep memory, streams, events and graphs of software CUDA"
    )


def make_tiny_bundle(folder: Path, name: str = "tiny.warp") -> Path:
    """A complete bundle whose modules are small enough to be checked by hand.

    generator: image = tanh(conv2(relu(conv1(x)))); producer: cache.h = relu(conv1(x)), cache.y_s = image;
    plain: image = tanh(conv2(cache.h)); warp: image = cache.y_s + 0.1 * x. The weights are in weights.safetensors.

    Returns:
        The bundle's folder, `folder` / `name`.
    """
    rng = np.random.default_rng(7)
    weights = {
        "conv1.weight": rng.normal(0, 0.3, (CHANNELS, 3, 3, 3)).astype(np.float32),
        "conv1.bias": rng.normal(0, 0.1, CHANNELS).astype(np.float32),
        "conv2.weight": rng.normal(0, 0.3, (3, CHANNELS, 3, 3)).astype(np.float32),
        "conv2.bias": rng.normal(0, 0.1, 3).astype(np.float32),
    }
    packed = save(weights)
    deep = [
        helper.make_node("Conv", ["x", "conv1.weight", "conv1.bias"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["h"]),
    ]
    shallow = [
        helper.make_node("Conv", ["h", "conv2.weight", "conv2.bias"], ["c2"], pads=[1, 1, 1, 1]),
        helper.make_node("Tanh", ["c2"], ["image"]),
    ]
    keep = [helper.make_node("Identity", ["h"], ["cache.h"]), helper.make_node("Identity", ["image"], ["cache.y_s"])]
    take = [helper.make_node("Identity", ["cache.h"], ["h"])]
    move = [
        helper.make_node("Constant", [], ["tenth"], value=numpy_helper.from_array(np.float32(0.1))),
        helper.make_node("Mul", ["x", "tenth"], ["step"]),
        helper.make_node("Add", ["cache.y_s", "step"], ["image"]),
    ]
    graphs = {
        "generator": ([*deep, *shallow], (X,), (IMAGE,)),
        "producer": ([*deep, *shallow, *keep], (X,), (HIDDEN, LAST)),
        "plain": ([*take, *shallow], (HIDDEN,), (IMAGE,)),
        "warp": (move, (X, LAST), (IMAGE,)),
    }
    files: dict[str, Path | bytes] = {
        f"{module}.onnx": _model(module, nodes, inputs, outputs, packed).SerializeToString()
        for module, (nodes, inputs, outputs) in graphs.items()
    }
    manifest = Manifest(
        name="tiny",
        created={"by": "tests", "at": "2026-01-01T00:00:00Z", "options": {}},
        inputs=(InputRecord(X, "generator"),),
        outputs=(IMAGE,),
        image_output="image",
        fps=30.0,
        cut=Cut(("h",), ({"tensors": ["h"], "cost_ratio": 0.5},)),
        cache=(HIDDEN, LAST),
        modules={
            module: ModuleRecord(f"{module}.onnx", inputs, outputs) for module, (_, inputs, outputs) in graphs.items()
        },
        exits=(
            ExitRecord("whole", "generator", 1.0),
            ExitRecord("plain", "plain", 0.5),
            ExitRecord("warp", "warp", 0.1),
        ),
        calibration=None,
    )
    return write_bundle(folder / name, manifest, {**files, "weights.safetensors": packed}).path


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Engines and compiled kernels go into a folder of the run: neither does it write to the user's, nor live on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WARPCACHE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny complete bundle, shared by all tests: read it only (`make_bundle` gives one to damage)."""
    return make_tiny_bundle(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make_bundle(tmp_path: Path) -> Callable[[], Path]:
    """A function that makes a fresh tiny bundle, which the test may damage."""
    return lambda: make_tiny_bundle(tmp_path)


def _model(
    name: str,
    nodes: list[onnx.NodeProto],
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    packed: bytes,
) -> onnx.ModelProto:
    used = {value for node in nodes for value in node.input}
    graph = helper.make_graph(
        nodes,
        name,
        [_value_info(spec) for spec in inputs],
        [_value_info(spec) for spec in outputs],
        initializer=[tensor for tensor in _external_tensors(packed) if tensor.name in used],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _value_info(spec: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(spec.name, helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype)), spec.shape)


def _external_tensors(packed: bytes) -> list[TensorProto]:
    """One initializer per tensor of a safetensors file, pointing into it: 8 bytes of header length, header, data."""
    header_bytes = int.from_bytes(packed[:8], "little")
    header = json.loads(packed[8 : 8 + header_bytes])
    tensors = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=entry["shape"])
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (
            ("location", "weights.safetensors"),
            ("offset", 8 + header_bytes + start),
            ("length", end - start),
        ):
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
    return tensors

"""Two tiny complete bundles, made without PyTorch: one plain, one with a quality promise that its input steers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save

from warpcache.engine.bundle.bundle import Cut, ExitRecord, InputRecord, Manifest
from warpcache.engine.bundle.manifest import module_record
from warpcache.engine.bundle.write import write_bundle
from warpcache.engine.promise.calibration import Calibration, PromiseRecord
from warpcache.engine.spec import AGE_SPEC, TensorSpec

__all__ = ["SIZE", "STEER", "make_routed_bundle", "make_tiny_bundle"]

SIZE = 16
CHANNELS = 8
X = TensorSpec("x", "float32", (1, 3, SIZE, SIZE))
IMAGE = TensorSpec("image", "float32", (1, 3, SIZE, SIZE))
HIDDEN = TensorSpec("cache.h", "float32", (1, CHANNELS, SIZE, SIZE))
LAST = TensorSpec("cache.y_s", "float32", (1, 3, SIZE, SIZE))
THUMBNAIL = TensorSpec("cache.thumbnail", "float32", (1, 3))

ROUTED_EXITS = ("warp2", "warp", "branch1")
ROUTED_AGES = (1, 2, 3)
STEER = {"warp2": 0, "warp": 1, "branch1": 2, "novelty": 4, "predictor": 6}
STEER |= {f"nan_{name}": 7 + index for index, name in enumerate((*ROUTED_EXITS, "whole"))}
"""Where in row 0 of the first channel a frame's input steers the routed bundle (`make_routed_bundle`)."""


def make_tiny_bundle(folder: Path, name: str = "tiny.warp") -> Path:
    """A complete bundle whose modules are small enough to be checked by hand.

    generator: image = tanh(conv2(relu(conv1(x)))); producer: cache.h = relu(conv1(x)), cache.y_s = image;
    plain: image = tanh(conv2(cache.h)); warp: image = cache.y_s + 0.1 * x. The weights are in weights.safetensors.

    Returns:
        The bundle's folder, `folder` / `name`.
    """
    packed = _weights()
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
        "generator": ([*_deep(), *shallow], (X,), (IMAGE,)),
        "producer": ([*_deep(), *shallow, *keep], (X,), (HIDDEN, LAST)),
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
        modules={module: module_record(module, inputs, outputs) for module, (_, inputs, outputs) in graphs.items()},
        exits=(
            ExitRecord("whole", ("generator",), 1.0),
            ExitRecord("plain", ("plain",), 0.5),
            ExitRecord("warp", ("warp",), 0.1),
        ),
        calibration=None,
    )
    return write_bundle(folder / name, manifest, {**files, "weights.safetensors": packed}).path


def make_routed_bundle(
    folder: Path, name: str = "routed.warp", *, metric: str = "psnr_db", branch: bool = True
) -> Path:
    """The tiny bundle with a quality promise, whose predictor says what the frame's input tells it to.

    Exits: ``warp`` as in the tiny bundle; ``warp2``: image = cache.y_s; ``branch1``: image = 0.99 * generator(x).
    Pixels of row 0 of x's first channel steer (`STEER`): those called after an exit are a tenth of its predicted score
    at age 1 (it rises by 0.1 a frame), ``novelty`` is half the novelty; below -1, ``predictor`` makes the predictors
    give NaN, and ``nan_EXIT`` that exit. ``change`` is 4 times the largest difference of a channel's mean between x_t
    and x_s. Every spread is 0.5, and in the calibration measured scores lie around the predicted ones within it.

    Args:
        folder: Where the bundle goes.
        name: Its folder's name.
        metric: What the promise is made in.
        branch: Whether there is ``branch1``, the only exit that needs no cache.

    Returns:
        The bundle's folder.
    """
    exits = ROUTED_EXITS if branch else ROUTED_EXITS[:2]
    cold_exits = exits[2:]
    packed = _weights()

    def constant(name: str, value: object, dtype: type = np.float32) -> onnx.NodeProto:
        return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(value, dtype)))

    def pixels(first: int, count: int, name: str) -> list[onnx.NodeProto]:
        """`name` [1, count]: x[0, 0, 0, first : first + count]."""
        return [
            constant(f"{name}.start", [0, 0, first], np.int64),
            constant(f"{name}.end", [1, 1, first + count], np.int64),
            constant(f"{name}.axes", [1, 2, 3], np.int64),
            constant(f"{name}.shape", [1, count], np.int64),
            helper.make_node("Slice", ["x", f"{name}.start", f"{name}.end", f"{name}.axes"], [f"{name}.cut"]),
            helper.make_node("Reshape", [f"{name}.cut", f"{name}.shape"], [name]),
        ]

    def guarded(value: str, steer: str, result: str) -> list[onnx.NodeProto]:
        """`result` = `value`, or NaN where the pixel that `steer` names is below -1."""
        return [
            *pixels(STEER[steer], 1, f"{steer}.pixel"),
            constant(f"{steer}.one", 1.0),
            constant(f"{steer}.zero", 0.0),
            helper.make_node("Add", [f"{steer}.pixel", f"{steer}.one"], [f"{steer}.above"]),
            helper.make_node("Sqrt", [f"{steer}.above"], [f"{steer}.root"]),
            helper.make_node("Mul", [f"{steer}.root", f"{steer}.zero"], [f"{steer}.guard"]),
            helper.make_node("Add", [value, f"{steer}.guard"], [result]),
        ]

    def prediction(columns: tuple[str, ...], raw: str) -> list[onnx.NodeProto]:
        """spread and novelty, and predicted from `raw`, for exits whose pixels lie side by side."""
        return [
            constant("ten", 10.0),
            constant("two", 2.0),
            *pixels(STEER[columns[0]], len(columns), "told"),
            helper.make_node("Mul", ["told", "ten"], ["scores"]),
            *guarded(raw, "predictor", "predicted"),
            constant("spread", [[0.5] * len(columns)]),
            *pixels(STEER["novelty"], 1, "new"),
            helper.make_node("Mul", ["new", "two"], ["novelty"]),
        ]

    shallow = [helper.make_node("Conv", ["h", "conv2.weight", "conv2.bias"], ["c2"], pads=[1, 1, 1, 1])]
    picture = helper.make_node("Tanh", ["c2"], ["image"])
    drawn = helper.make_node("Tanh", ["c2"], ["drawn"])
    mean = [constant("plane", [2, 3], np.int64), helper.make_node("ReduceMean", ["x", "plane"], ["mean"], keepdims=0)]
    graphs = {
        "generator": ([*_deep(), *shallow, drawn, *guarded("drawn", "nan_whole", "image")], (X,), (IMAGE,)),
        "producer": (
            [
                *_deep(),
                *shallow,
                picture,
                *mean,
                helper.make_node("Identity", ["h"], ["cache.h"]),
                helper.make_node("Identity", ["image"], ["cache.y_s"]),
                helper.make_node("Identity", ["mean"], ["cache.thumbnail"]),
            ],
            (X,),
            (HIDDEN, LAST, THUMBNAIL),
        ),
        "plain": ([helper.make_node("Identity", ["cache.h"], ["h"]), *shallow, picture], (HIDDEN,), (IMAGE,)),
        "warp": (
            [
                constant("tenth", 0.1),
                helper.make_node("Mul", ["x", "tenth"], ["step"]),
                helper.make_node("Add", ["cache.y_s", "step"], ["moved"]),
                *guarded("moved", "nan_warp", "image"),
            ],
            (X, LAST),
            (IMAGE,),
        ),
        "warp2": (guarded("cache.y_s", "nan_warp2", "image"), (X, LAST), (IMAGE,)),
        "branch1": (
            [
                *_deep(),
                *shallow,
                drawn,
                constant("less", 0.99),
                helper.make_node("Mul", ["drawn", "less"], ["paler"]),
                *guarded("paler", "nan_branch1", "image"),
            ],
            (X,),
            (IMAGE,),
        ),
        "predictor": (
            [
                *prediction(exits, "aged"),
                constant("tenth", 0.1),
                constant("first", [[1.0]]),
                helper.make_node("Sub", ["age", "first"], ["older"]),
                helper.make_node("Mul", ["older", "tenth"], ["rise"]),
                helper.make_node("Add", ["scores", "rise"], ["aged"]),
                *mean,
                constant("four", 4.0),
                constant("last", [1], np.int64),
                helper.make_node("Sub", ["mean", "cache.thumbnail"], ["difference"]),
                helper.make_node("Abs", ["difference"], ["distance"]),
                helper.make_node("ReduceMax", ["distance", "last"], ["largest"]),
                helper.make_node("Mul", ["largest", "four"], ["change"]),
            ],
            (X, THUMBNAIL, AGE_SPEC),
            _prediction_specs(len(exits), cold=False),
        ),
        "predictor_cold": (
            prediction(cold_exits, "scores") if cold_exits else [],
            (X,),
            _prediction_specs(len(cold_exits), cold=True),
        ),
    }
    if not branch:
        del graphs["branch1"], graphs["predictor_cold"]
    files: dict[str, Path | bytes] = {
        f"{module}.onnx": _model(module, _in_order(nodes), inputs, outputs, packed).SerializeToString()
        for module, (nodes, inputs, outputs) in graphs.items()
    }
    calibration = _routed_calibration(metric, exits, cold_exits)
    promise = PromiseRecord(
        metric=metric,
        exits=exits,
        cold_exits=cold_exits,
        ages=ROUTED_AGES,
        samples=len(calibration.age),
        frames=len(set(calibration.frame.tolist())),
        at="2026-01-01T00:00:00Z",
        file="calibration.npz",
        macs={"whole": 1000.0, "plain": 500.0, "warp": 100.0, "warp2": 50.0},
        errors={},
    )
    costs = {"whole": 1.0, "plain": 0.5, "warp": 0.1, "warp2": 0.05, "branch1": 0.3}
    modules = {"whole": "generator"}
    manifest = Manifest(
        name="routed",
        created={"by": "tests", "at": "2026-01-01T00:00:00Z", "options": {}},
        inputs=(InputRecord(X, "generator"),),
        outputs=(IMAGE,),
        image_output="image",
        fps=30.0,
        cut=Cut(("h",), ({"tensors": ["h"], "cost_ratio": 0.5},)),
        cache=(HIDDEN, LAST, THUMBNAIL),
        modules={module: module_record(module, inputs, outputs) for module, (_, inputs, outputs) in graphs.items()},
        exits=tuple(ExitRecord(name, (modules.get(name, name),), costs[name]) for name in ("whole", "plain", *exits)),
        calibration={"promise": promise.to_record()},
    )
    return write_bundle(
        folder / name, manifest, {**files, "weights.safetensors": packed, "calibration.npz": calibration.to_npz()}
    ).path


def _weights() -> bytes:
    """The weights of both bundles' convolutions, as a safetensors file."""
    rng = np.random.default_rng(7)
    weights = {
        "conv1.weight": rng.normal(0, 0.3, (CHANNELS, 3, 3, 3)).astype(np.float32),
        "conv1.bias": rng.normal(0, 0.1, CHANNELS).astype(np.float32),
        "conv2.weight": rng.normal(0, 0.3, (3, CHANNELS, 3, 3)).astype(np.float32),
        "conv2.bias": rng.normal(0, 0.1, 3).astype(np.float32),
    }
    return save(weights)


def _deep() -> list[onnx.NodeProto]:
    """x -> h, the producer's part."""
    return [
        helper.make_node("Conv", ["x", "conv1.weight", "conv1.bias"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["h"]),
    ]


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


def _prediction_specs(exits: int, *, cold: bool) -> tuple[TensorSpec, ...]:
    one = (TensorSpec("novelty", "float32", (1, 1)), TensorSpec("change", "float32", (1, 1)))
    scores = tuple(TensorSpec(name, "float32", (1, exits)) for name in ("predicted", "spread"))
    return (*scores, *one[: 1 if cold else 2])


def _routed_calibration(metric: str, exits: tuple[str, ...], cold_exits: tuple[str, ...]) -> Calibration:
    """400 frames at every age: predictions all over, measured scores around them by half a spread or so."""
    rng = np.random.default_rng(11)
    ages = np.repeat([*((0,) if cold_exits else ()), *ROUTED_AGES], 400)
    predicted = rng.uniform(-12, -2, (len(ages), len(exits)))
    measured = predicted + 0.25 * rng.standard_normal(predicted.shape)
    for column, exit_ in enumerate(exits):
        if exit_ not in cold_exits:
            measured[ages == 0, column] = np.nan
    return Calibration(
        metric=metric,
        exits=exits,
        cold_exits=cold_exits,
        ages=ROUTED_AGES,
        predicted=predicted.astype(np.float32),
        spread=np.full(predicted.shape, 0.5, np.float32),
        measured=measured.astype(np.float32),
        age=ages.astype(np.int32),
        frame=np.tile(np.arange(400), len(ages) // 400).astype(np.int32),
    )


def _in_order(nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes so that each follows those whose values it takes."""
    made = {output for node in nodes for output in node.output}
    ordered: list[onnx.NodeProto] = []
    left = list(nodes)
    while left:
        missing = made - {output for node in ordered for output in node.output}
        ready = [node for node in left if not missing.intersection(node.input)]
        assert ready, "the nodes form a cycle"
        ordered.extend(ready)
        left = [node for node in left if node not in ready]
    return ordered


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

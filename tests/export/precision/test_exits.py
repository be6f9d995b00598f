"""Converting a bundle with branches, predictors and a promise: what stays to the bit, what is kept, what builds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from warpcache.engine.bundle.bundle import Bundle, Cut, ExitRecord, InputRecord, Manifest
from warpcache.engine.bundle.manifest import module_record
from warpcache.engine.promise.calibration import Calibration, PromiseRecord, Quality
from warpcache.engine.spec import AGE_SPEC, TensorSpec
from warpcache.export.branches.graphs import lookup_graph
from warpcache.export.branches.guide_bank import GuideBank, GuideLookup
from warpcache.export.bundle.write import bundle_models
from warpcache.export.graph.index import SCOPES_KEY, GraphIndex, load_model
from warpcache.export.graph.lookups import lookup_nodes
from warpcache.export.graph.run import run_model
from warpcache.export.graph.surgery import normalise
from warpcache.export.precision import conversion as conversion_module
from warpcache.export.precision.casting import elem_types, emulated
from warpcache.export.precision.convert import PrecisionOptions, convert_bundle
from warpcache.export.promise.calibrate import CalibrationTerms, calibrate

SIZE, WIDTH, KEY, ENTRIES = 16, 8, 16, 12
POOLED = 3 * 4 * 4  # an image's 4x4 cells, flattened
FEATURES = WIDTH * 4 * 4
IMAGE = (1, 3, SIZE, SIZE)
X, ATLAS = TensorSpec("x", "float32", IMAGE), TensorSpec("atlas", "float32", (1, 2, SIZE, SIZE))
OUT = TensorSpec("image", "float32", IMAGE)
CACHE = (
    TensorSpec("cache.h", "float32", (1, WIDTH, SIZE, SIZE)),
    TensorSpec("cache.image", "float32", IMAGE),
    TensorSpec("cache.atlas", "float32", ATLAS.shape),
    TensorSpec("cache.thumbnail", "float32", (1, POOLED)),
)
EXITS = ("warp", "branch1")
RNG = np.random.default_rng(5)


def frames(count: int = 6) -> dict[str, np.ndarray]:
    """A pattern that drifts, and where every texel is."""
    pattern = np.kron(RNG.uniform(-1, 1, (3, 8, 8)), np.ones((1, 4, 4)))
    line = (np.arange(SIZE) * 2 + 1) / SIZE - 1
    still = np.stack(np.meshgrid(line, line))
    return {
        "x": np.stack([pattern[:, t : t + SIZE, t : t + SIZE] for t in range(count)]).astype(np.float32),
        "atlas": np.stack([still + 0.05 * np.sin(t + 3 * still) for t in range(count)]).astype(np.float32),
    }


FRAMES = frames()


def constants() -> dict[str, np.ndarray]:
    """Weights, and a bank whose keys lie far from the origin: as trained ones do, beside their distances."""
    made = {
        "w1": RNG.normal(0, 0.3, (WIDTH, 3, 3, 3)),
        "b1": RNG.normal(0, 0.1, WIDTH),
        "w3": RNG.normal(0, 0.1, (3, WIDTH, 3, 3)),
        "b3": RNG.normal(0, 0.1, 3),
        "projection": RNG.normal(0, 0.1, (FEATURES, KEY)),
        "offset": np.full(KEY, 9.0),
        "values": RNG.normal(0, 0.5, (ENTRIES, WIDTH)),
        "judge": RNG.normal(0, 0.2, (POOLED, 2)),
        "slope": np.full((1, 2), 0.1),
        "half": np.full((1, 1), 0.5),
        "spread": np.ones((1, 2)),
        "only": np.array([[0.0], [1.0]]),
        "tenth": np.array(0.1),
    }
    keys = RNG.normal(9.0, 0.4, (ENTRIES, KEY))
    made |= {"keys": 2 * keys.T, "lengths": (keys**2).sum(1)}
    return {name: array.astype(np.float32) for name, array in made.items()} | {
        "three": np.array([3], np.int64),
        "as_map": np.array([1, WIDTH, 1, 1], np.int64),
        "as_row": np.array([-1], np.int64),
        "all": np.array([0, 1], np.int64),
    }


CONSTANTS = constants()

Node = tuple[str, str, list[str], list[str], dict[str, Any]]


def thumbnail(source: str, target: str, path: str) -> list[Node]:
    return [
        (path, "AveragePool", [source], [f"{target}.cells"], {"kernel_shape": [4, 4], "strides": [4, 4]}),
        (path, "Flatten", [f"{target}.cells"], [target], {"axis": 1}),
    ]


def graphs() -> dict[str, tuple[list[Node], tuple[TensorSpec, ...], tuple[TensorSpec, ...]]]:
    pads = {"pads": [1, 1, 1, 1]}
    first: list[Node] = [
        ("conv1", "Conv", ["x", "w1", "b1"], ["c1"], pads),
        ("conv1", "Relu", ["c1"], ["h"], {}),
    ]
    last: list[Node] = [
        ("conv3", "Conv", ["h", "w3", "b3"], ["c3"], pads),
        ("", "Tanh", ["c3"], ["image"], {}),
    ]
    keep: list[Node] = [
        ("", "Identity", [source], [f"cache.{name}"], {})
        for source, name in (("h", "h"), ("image", "image"), ("atlas", "atlas"))
    ]
    warp: list[Node] = [
        ("mover", "Transpose", ["cache.atlas"], ["grid"], {"perm": [0, 2, 3, 1]}),
        ("mover", "GridSample", ["cache.image", "grid"], ["moved"], {"padding_mode": "border"}),
        ("mover", "Mul", ["x", "tenth"], ["step"], {}),
        ("mover", "Add", ["moved", "step"], ["image"], {}),
    ]
    # As `guide_bank.GuideLookup` is exported: 2 q.k - |k|^2, the three largest, their softmax over their values.
    bank: list[Node] = [
        *thumbnail("h", "features", "bank"),
        ("bank", "MatMul", ["features", "projection"], ["key0"], {}),
        ("bank", "Add", ["key0", "offset"], ["key"], {}),
        ("bank", "MatMul", ["key", "keys"], ["products"], {}),
        ("bank", "Sub", ["products", "lengths"], ["closeness"], {}),
        ("bank", "TopK", ["closeness", "three"], ["best", "entries"], {}),
        ("bank", "Softmax", ["best"], ["weights"], {"axis": 1}),
        ("bank", "Reshape", ["entries", "as_row"], ["rows"], {}),
        ("bank", "Gather", ["values", "rows"], ["picked"], {}),
        ("bank", "MatMul", ["weights", "picked"], ["found"], {}),
        ("bank", "Reshape", ["found", "as_map"], ["guide"], {}),
        ("bank", "Add", ["h", "guide"], ["guided"], {}),
    ]
    rest: list[Node] = [
        (path, op, ["guided" if v == "h" else v for v in reads], w, a) for path, op, reads, w, a in last
    ]
    judge: list[Node] = [
        *thumbnail("x", "now", "judge"),
        ("judge", "MatMul", ["now", "judge"], ["score"], {}),
        ("judge", "Abs", ["now"], ["size"], {}),
        ("judge", "ReduceMean", ["size", "all"], ["novelty"], {}),
    ]
    warm: list[Node] = [
        *judge,
        ("judge", "Mul", ["age", "slope"], ["older"], {}),
        ("judge", "Add", ["score", "older"], ["predicted"], {}),
        ("judge", "Sub", ["now", "cache.thumbnail"], ["moved"], {}),
        ("judge", "Abs", ["moved"], ["far"], {}),
        ("judge", "ReduceMean", ["far", "all"], ["change"], {}),
        ("judge", "Add", ["change", "spread"], ["spread.made"], {}),
    ]
    cold: list[Node] = [
        *judge,
        ("judge", "MatMul", ["score", "only"], ["predicted"], {}),
        ("judge", "Add", ["novelty", "half"], ["spread.made"], {}),
    ]
    two, one = (1, 2), (1, 1)

    def gives(shape: tuple[int, int], *more: str) -> tuple[TensorSpec, ...]:
        return (
            TensorSpec("predicted", "float32", shape),
            TensorSpec("spread", "float32", shape),
            *(TensorSpec(name, "float32", one) for name in ("novelty", *more)),
        )

    h, picture, places, small = CACHE
    return {
        "generator": ([*first, *last], (X,), (OUT,)),
        "producer": ([*first, *last, *keep, *thumbnail("x", "cache.thumbnail", "thumb")], (X, ATLAS), CACHE),
        "plain": ([("", "Identity", ["cache.h"], ["h"], {}), *last], (h,), (OUT,)),
        "warp": (warp, (picture, places, X), (OUT,)),
        "branch1": ([*first, *bank, *rest], (X,), (OUT,)),
        "predictor": (_named_spread(warm), (X, small, AGE_SPEC), gives(two, "change")),
        "predictor_cold": (_named_spread(cold), (X,), gives(one)),
    }


def _named_spread(nodes: list[Node]) -> list[Node]:
    return [*nodes, ("judge", "Identity", ["spread.made"], ["spread"], {})]


def build(nodes: list[Node], inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> ModelProto:
    made = []
    for path, op, reads, writes, attributes in nodes:
        # "spread" is a constant's name in one node and an output's in another.
        reads = ["spread.least" if name == "spread" and op == "Add" else name for name in reads]
        node = helper.make_node(op, reads, writes, name=f"node_{writes[0]}", **attributes)
        node.metadata_props.add(key=SCOPES_KEY, value=str(["", *([path] if path else []), op]))
        made.append(node)
    weights = {("spread.least" if name == "spread" else name): array for name, array in CONSTANTS.items()}
    read = {name for node in made for name in node.input}
    graph = helper.make_graph(
        made,
        "g",
        [helper.make_tensor_value_info(s.name, TensorProto.FLOAT, s.shape) for s in inputs],
        [helper.make_tensor_value_info(s.name, TensorProto.FLOAT, s.shape) for s in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items() if name in read],
    )
    return normalise(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def make_bundle(folder: Path, *, calibrated: Mapping[str, np.ndarray] | None = None) -> Bundle:
    """A bundle with a warp and a branch with a bank, predictors, and a promise of PSNR on 40 frames."""
    parts = graphs()
    models = {name: build(*part) for name, part in parts.items()}
    rows = np.arange(40)
    scores = RNG.normal(-4, 0.5, (80, 2)).astype(np.float32)
    calibration = Calibration(
        "psnr_db",
        EXITS,
        ("branch1",),
        (1,),
        predicted=scores,
        spread=np.ones_like(scores),
        measured=scores + RNG.normal(0, 0.1, scores.shape).astype(np.float32),
        age=np.repeat([0, 1], 40).astype(np.int32),
        frame=np.tile(rows, 2).astype(np.int32),
    )
    promise = PromiseRecord(
        metric="psnr_db",
        exits=EXITS,
        cold_exits=("branch1",),
        ages=(1,),
        samples=80,
        frames=40,
        at="2026-01-01T00:00:00Z",
        file="calibration.npz",
        macs={"whole": 1000, "warp": 10},
        errors={"warp": 0.1},
    )
    measured: dict[str, Any] = {"frames": 0, "exits": {}}
    if calibrated is not None:
        found = calibrate(
            models["generator"],
            models["producer"],
            {name: models[name] for name in ("plain", *EXITS)},
            calibrated,
            CalibrationTerms("image", 1),
            progress=lambda *_: None,
        )
        assert found is not None
        measured = found
    manifest = Manifest(
        name="exits",
        created={"by": "tests", "at": "2026-01-01T00:00:00Z", "options": {}},
        inputs=(InputRecord(X), InputRecord(ATLAS, "motion")),
        outputs=(OUT,),
        image_output="image",
        fps=30.0,
        cut=Cut(("h",)),
        cache=CACHE,
        modules={name: module_record(name, takes, gives) for name, (_, takes, gives) in parts.items()},
        exits=(
            ExitRecord("whole", ("generator",), 1.0),
            ExitRecord("plain", ("plain",), 0.5),
            ExitRecord("warp", ("warp",), 0.1),
            ExitRecord("branch1", ("branch1",), 0.4),
        ),
        calibration={**measured, "promise": promise.to_record()},
    )
    return bundle_models(folder / "exits.warp", manifest, models, more={"calibration.npz": calibration.to_npz()})


@pytest.fixture(scope="module")
def exits(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle in float32; read it only."""
    return make_bundle(tmp_path_factory.mktemp("exits"))


def convert(bundle: Bundle, out: Path, precision: str, **options: Any) -> Bundle:
    given = {"frames": options.pop("frames", FRAMES)}
    return convert_bundle(bundle, out, options=PrecisionOptions(precision, **options), **given)  # type: ignore[arg-type]


def record_of(bundle: Bundle) -> dict[str, Any]:
    record: dict[str, Any] = bundle.manifest.created["precision"]
    return record


def answers(bundle: Bundle, module: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    # Emulated, since the CPU has no bfloat16; what is in float32 stays as it is.
    return run_model(emulated(load_model(bundle.file(f"{module}.onnx"))), feeds)


@pytest.fixture(scope="module")
def half(exits: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle in fp16, its parity measured from two sources; read it only."""
    return convert(exits, tmp_path_factory.mktemp("half") / "half.warp", "fp16", parity_frames=2, age=3)


@pytest.mark.parametrize(("precision", "floor_db"), [("fp16", 45), ("bf16", 30), ("int8", 20)])
def test_predictors_give_to_the_bit_what_the_calibration_saw(
    exits: Bundle, tmp_path: Path, precision: str, floor_db: float
) -> None:
    low = convert(exits, tmp_path / "low.warp", precision, min_psnr_db=floor_db)
    kept = {spec.name: spec.dtype for spec in low.manifest.cache}
    # The atlas is coordinates; the thumbnail is what the predictor reads.
    assert kept == {
        "cache.h": "float16",
        "cache.image": "float16",
        "cache.atlas": "float32",
        "cache.thumbnail": "float32",
    }
    for t in range(3):
        now, later = ({name: array[i : i + 1] for name, array in FRAMES.items()} for i in (t, t + 2))
        cached, cached_low = answers(exits, "producer", now), answers(low, "producer", now)
        np.testing.assert_array_equal(cached_low["cache.thumbnail"], cached["cache.thumbnail"])
        feeds = {"x": later["x"], "cache.thumbnail": cached["cache.thumbnail"], "age": np.full((1, 1), 2, np.float32)}
        for module in ("predictor", "predictor_cold"):
            given = {spec.name: feeds[spec.name] for spec in exits.manifest.modules[module].inputs}
            for name, value in answers(exits, module, given).items():
                np.testing.assert_array_equal(answers(low, module, given)[name], value, err_msg=name)
    assert {low.manifest.modules[name] for name in ("predictor", "predictor_cold")} == {
        exits.manifest.modules[name] for name in ("predictor", "predictor_cold")
    }


def test_the_promise_goes_along_and_the_manifest_says_when_it_was_made(
    exits: Bundle, half: Bundle, tmp_path: Path
) -> None:
    low = half
    assert low.file("calibration.npz").read_bytes() == exits.file("calibration.npz").read_bytes()
    assert PromiseRecord.of(low.manifest) == PromiseRecord.of(exits.manifest)
    quality = Quality("psnr_db", 15.0, confidence=0.8)
    assert Calibration.read(low).rule(quality) == Calibration.read(exits).rule(quality)
    assert record_of(low)["promise"].startswith("calibrated before the conversion")
    # A bundle that promises nothing is said nothing of.
    plain = dataclasses.replace(exits.manifest, calibration=None, files={})
    models = {name: load_model(exits.file(f"{name}.onnx")) for name in exits.manifest.modules}
    silent = bundle_models(tmp_path / "silent.warp", plain, models)
    silent = convert(silent, tmp_path / "other.warp", "fp16", frames=None)
    assert record_of(silent)["promise"] is None


def test_parity_is_measured_of_every_exit(half: Bundle) -> None:
    record = record_of(half)
    assert set(record["parity"]) == {"whole", "plain", "warp", "branch1"}
    # What reads no cache answers the sources' frames and the later ones: 0, 2, 3 and 5; the warp the later ones.
    assert {name: parity["frames"] for name, parity in record["parity"].items()} == {
        "whole": 4,
        "plain": 4,
        "warp": 2,
        "branch1": 4,
    }
    assert all(parity["psnr_db"]["worst"] >= 45 and parity["nan"] == 0 for parity in record["parity"].values())
    assert record["trials"] == 0


def test_what_is_kept_by_which_rule(exits: Bundle, half: Bundle, tmp_path: Path) -> None:
    record = record_of(half)
    assert set(record["kept"]) == set(record["rules"]) == set(exits.manifest.modules) - {"predictor", "predictor_cold"}
    assert not any(record["kept"].values())
    counts = {name: (rule["lookup"], rule["predictor"]) for name, rule in record["rules"].items()}
    # What is pooled as a vector, two products, sum, difference, TopK and softmax; pooling and vector of the thumbnail.
    assert counts.pop("branch1") == (7, 0)
    assert counts.pop("producer") == (0, 2)
    assert set(counts.values()) == {(0, 0)}
    types = elem_types(load_model(half.file("branch1.onnx")))
    assert [types[name] for name in ("key", "closeness", "best", "weights")] == [TensorProto.FLOAT] * 4
    lowered = ("c1", "features.cells", "picked", "found", "guided", "c3")
    assert [types[name] for name in lowered] == [TensorProto.FLOAT16] * len(lowered)
    # A user's wish is told apart from the rule.
    asked = record_of(convert(exits, tmp_path / "asked.warp", "fp16", keep=("bank",), frames=None))
    assert {"node_key", "node_closeness", "node_guided"} <= set(asked["kept"]["branch1"])
    assert asked["rules"]["branch1"]["lookup"] == 0


def test_without_the_rule_a_look_up_finds_others(
    exits: Bundle, half: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Distances of keys far from the origin are differences of sums above 1000, where float16 has steps of 1."""
    good = record_of(half)["parity"]["branch1"]["psnr_db"]
    monkeypatch.setattr(conversion_module, "lookup_nodes", lambda index: frozenset())
    bad: Any = record_of(convert(exits, tmp_path / "bad.warp", "fp16", min_psnr_db=10, parity_frames=2, age=3))
    bad = bad["parity"]["branch1"]["psnr_db"]
    assert bad["worst"] < good["worst"] - 10


def test_lookups_are_found_between_what_makes_keys_and_what_reads_weights() -> None:
    nodes, takes, gives = graphs()["branch1"]
    model = build(nodes, takes, gives)
    names = {"features", "key0", "key", "products", "closeness", "best", "weights"}
    assert lookup_nodes(GraphIndex(model)) == {f"node_{name}" for name in names}
    nodes, takes, gives = graphs()["generator"]
    assert lookup_nodes(GraphIndex(build(nodes, takes, gives))) == frozenset()


def test_the_look_up_of_trained_branches_is_found_as_it_is_exported() -> None:
    rng = np.random.default_rng(2)
    shape = (1, 8, 16, 16)
    bank = GuideBank(
        frames=np.arange(6),
        radius=1.0,
        projection=rng.normal(size=(8 * 16, 4)).astype(np.float32),
        offset=np.zeros(4, np.float32),
        keys=rng.normal(size=(6, 4)).astype(np.float32),
        values=rng.normal(size=(6, 5, 4, 4)).astype(np.float32),
    )
    index = GraphIndex(normalise(lookup_graph(GuideLookup(bank, [shape]), ["h"], [shape])))
    found = lookup_nodes(index)
    kinds = [node.op_type for node, name in zip(index.nodes, index.names, strict=True) if name in found]
    # The key's two products, the squares that are taken off, and the three nearest; a vector is made by a reshape.
    assert (
        {"MatMul", "Sub", "TopK", "Softmax"}
        <= set(kinds)
        <= {"Reshape", "MatMul", "Gemm", "Add", "Sub", "Pow", "Mul", "ReduceSum", "TopK", "Softmax"}
    )
    assert kinds.count("MatMul") + kinds.count("Gemm") == 2
    left = {node.op_type for node, name in zip(index.nodes, index.names, strict=True) if name not in found}
    assert {"AveragePool", "Gather", "MatMul", "Conv", "Resize", "Add"} <= left


def test_int8_leaves_look_ups_and_predictors_alone(exits: Bundle, tmp_path: Path) -> None:
    low = convert(exits, tmp_path / "low.warp", "int8", min_psnr_db=15, parity_frames=2, calibration_frames=2)
    for module, quantised in (("branch1", {"w1.int8", "w3.int8"}), ("predictor", set()), ("predictor_cold", set())):
        tensors = {tensor.name for tensor in load_model(low.file(f"{module}.onnx")).graph.initializer}
        assert {name for name in tensors if name.endswith(".int8")} >= quantised
        assert not {"projection.int8", "keys.int8", "judge.int8"} & tensors


def test_a_calibration_that_is_measured_again_keeps_the_promise(tmp_path: Path) -> None:
    still = {name: array[:1] + (array - array[:1]) * np.float32(0.02) for name, array in FRAMES.items()}
    bundle = make_bundle(tmp_path, calibrated=still)
    low = convert(bundle, tmp_path / "low.warp", "int8", min_psnr_db=15, frames=still)
    assert record_of(low)["calibration"].startswith("measured in int8")
    assert low.manifest.calibration != bundle.manifest.calibration
    assert low.manifest.calibration is not None
    assert bundle.manifest.calibration is not None
    assert low.manifest.calibration["promise"] == bundle.manifest.calibration["promise"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_module_builds(exits: Bundle, half: Bundle, tmp_path: Path, precision: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    from warpcache.engine.tensorrt.engine_cache import EngineCache
    from warpcache.engine.tensorrt.engines import Toolchain, build_engines
    from warpcache.engine.tensorrt.flavour import Flavour

    bundle = exits if precision == "fp32" else half
    flavour, cache = Flavour.load("tensorrt-rtx"), EngineCache(tmp_path / "engines")
    built = build_engines(bundle, Toolchain(flavour, ("sm_86", "sm_120")), cache)
    assert sorted(engine.module for engine in built) == sorted(exits.manifest.modules)
    assert len({engine.digest for engine in built}) == len(built)

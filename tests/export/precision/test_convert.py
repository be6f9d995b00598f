"""Converting bundles: precisions run and build, parity is true, layers that break are found, failures leave nothing."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch.nn import functional

from warpcache.engine.bundle.bundle import Bundle, Cut, ExitRecord, InputRecord, Manifest
from warpcache.engine.bundle.manifest import module_record
from warpcache.engine.bundle.write import write_bundle
from warpcache.engine.engine import Engine
from warpcache.engine.errors import BundleError, ExportError, InputError
from warpcache.engine.spec import TensorSpec
from warpcache.export.bundle.write import bundle_models
from warpcache.export.graph.index import SCOPES_KEY, GraphIndex, load_model
from warpcache.export.graph.run import run_model
from warpcache.export.graph.surgery import normalise
from warpcache.export.precision import convert as precision_module
from warpcache.export.precision.casting import elem_types, emulated
from warpcache.export.precision.convert import PrecisionOptions, convert_bundle
from warpcache.export.precision.parity import fewest_kept
from warpcache.export.promise.calibrate import CalibrationTerms, calibrate

SIZE = 16
TARGETS = ("sm_86", "sm_89", "sm_120")
RNG = np.random.default_rng(21)
WEIGHTS = {
    name: torch.from_numpy(array.astype(np.float32))
    for name, array in {
        "w1": RNG.normal(0, 0.3, (8, 3, 3, 3)),
        "b1": RNG.normal(0, 0.1, 8),
        "w2": RNG.normal(0, 0.2, (8, 8, 3, 3)),
        "b2": RNG.normal(0, 0.1, 8),
        "w3": RNG.normal(0, 0.1, (3, 8, 3, 3)),
        "b3": RNG.normal(0, 0.1, 3),
    }.items()
}
IDENTITY = np.stack(np.meshgrid(*[(np.arange(SIZE, dtype=np.float32) * 2 + 1) / SIZE - 1] * 2), -1)[None]


def frames(count: int = 6) -> dict[str, np.ndarray]:
    """A drifting pattern and an atlas: where each texel is, a little further every frame."""
    pattern = np.kron(RNG.uniform(-1, 1, (3, 8, 8)), np.ones((1, 4, 4)))
    drift = [
        IDENTITY[0].transpose(2, 0, 1) + 0.05 * np.sin(t + IDENTITY[0].transpose(2, 0, 1) * 3) for t in range(count)
    ]
    return {
        "x": np.stack([pattern[:, t : t + SIZE, t : t + SIZE] for t in range(count)]).astype(np.float32),
        "atlas": np.stack(drift).astype(np.float32),
    }


FRAMES = frames()


def make_bundle(
    folder: Path,
    *,
    planted: float | None = None,
    cached: float = 1.0,
    calibrated: Mapping[str, np.ndarray] | None = None,
) -> Bundle:
    """A bundle of three layers whose answers can be computed by hand.

    generator: h = relu(conv1 x) * cached, [planted: h * planted / planted], image = tanh(conv3 relu(conv2 h / cached));
    producer: cache.h = h, cache.image = image, cache.atlas = atlas; plain: the rest of the generator from cache.h;
    warp: cache.image read where cache.atlas says.

    Args:
        folder: Where.
        planted: A scale that is applied and taken back before the cut, by a module of its own, "planted".
        cached: The cut tensor is so many times as large as what its maker gives.
        calibrated: Frames to calibrate on.
    """
    pads = {"pads": [1, 1, 1, 1]}
    deep = [("conv1", "Conv", ["x", "w1", "b1"], "c1", pads), ("conv1", "Relu", ["c1"], "r1", {})]
    value = "r1"
    if planted is not None:
        deep += [("planted", "Mul", ["r1", "up"], "large", {}), ("planted", "Mul", ["large", "down"], "p", {})]
        value = "p"
    deep += [("scale", "Mul", [value, "scale"], "h", {})]
    rest = [
        ("unscale", "Mul", ["h", "unscale"], "u", {}),
        ("conv2", "Conv", ["u", "w2", "b2"], "c2", pads),
        ("conv2", "Relu", ["c2"], "r2", {}),
        ("conv3", "Conv", ["r2", "w3", "b3"], "c3", pads),
        ("", "Tanh", ["c3"], "image", {}),
    ]
    keep = [
        ("", "Identity", ["h"], "cache.h", {}),
        ("", "Identity", ["image"], "cache.image", {}),
        ("", "Identity", ["atlas"], "cache.atlas", {}),
    ]
    move = [
        ("mover", "Transpose", ["cache.atlas"], "grid", {"perm": [0, 2, 3, 1]}),
        ("mover", "GridSample", ["cache.image", "grid"], "moved", {"padding_mode": "border"}),
        ("mover", "Mul", ["x", "tenth"], "step", {}),
        ("mover", "Add", ["moved", "step"], "image", {}),
    ]
    image = (1, 3, SIZE, SIZE)
    x, atlas = TensorSpec("x", "float32", image), TensorSpec("atlas", "float32", (1, 2, SIZE, SIZE))
    out = TensorSpec("image", "float32", image)
    cut = TensorSpec("cache.h", "float32", (1, 8, SIZE, SIZE))
    last, places = TensorSpec("cache.image", "float32", image), TensorSpec("cache.atlas", "float32", atlas.shape)
    constants = {name: array.numpy() for name, array in WEIGHTS.items()} | {
        "up": np.array(planted or 1, np.float32),
        "down": np.array(1 / (planted or 1), np.float32),
        "scale": np.array(cached, np.float32),
        "unscale": np.array(1 / cached, np.float32),
        "tenth": np.array(0.1, np.float32),
    }
    start = ("", "Identity", ["cache.h"], "h", {})
    graphs = {
        "generator": ([*deep, *rest], (x,), (out,)),
        "producer": ([*deep, *rest, *keep], (x, atlas), (cut, last, places)),
        "plain": ([start, *rest], (cut,), (out,)),
        "warp": (move, (last, places, x), (out,)),
    }
    models = {name: _model(nodes, inputs, outputs, constants) for name, (nodes, inputs, outputs) in graphs.items()}
    calibration = None
    if calibrated is not None:
        calibration = calibrate(
            models["generator"],
            models["producer"],
            {name: models[name] for name in ("plain", "warp")},
            calibrated,
            CalibrationTerms("image", 2),
            progress=lambda *_: None,
        )
    manifest = Manifest(
        name="three",
        created={"by": "tests", "at": "2026-01-01T00:00:00Z", "options": {}},
        inputs=(InputRecord(x), InputRecord(atlas, "motion")),
        outputs=(out,),
        image_output="image",
        fps=30.0,
        cut=Cut(("h",)),
        cache=(cut, last, places),
        modules={name: module_record(name, inputs, outputs) for name, (_, inputs, outputs) in graphs.items()},
        exits=(
            ExitRecord("whole", ("generator",), 1.0),
            ExitRecord("plain", ("plain",), 0.5),
            ExitRecord("warp", ("warp",), 0.1),
        ),
        calibration=calibration,
    )
    return bundle_models(folder / "three.warp", manifest, models)


def _model(
    nodes: list[tuple[str, str, list[str], str, dict[str, object]]],
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    constants: Mapping[str, np.ndarray],
) -> ModelProto:
    made = []
    for path, op, reads, writes, attributes in nodes:
        node = helper.make_node(op, reads, [writes], name=f"node_{writes}", **attributes)
        node.metadata_props.add(key=SCOPES_KEY, value=str(["", *([path] if path else []), op]))
        made.append(node)
    read = {name for node in made for name in node.input}
    graph = helper.make_graph(
        made,
        "g",
        [helper.make_tensor_value_info(s.name, TensorProto.FLOAT, s.shape) for s in inputs],
        [helper.make_tensor_value_info(s.name, TensorProto.FLOAT, s.shape) for s in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items() if name in read],
    )
    return normalise(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle without anything planted; read it only."""
    return make_bundle(tmp_path_factory.mktemp("three"))


def convert(bundle: Bundle, out: Path, precision: str, **options: object) -> Bundle:
    given = {"frames": FRAMES, **{k: options.pop(k) for k in list(options) if k in ("frames", "progress")}}
    return convert_bundle(bundle, out, options=PrecisionOptions(precision, **options), **given)


def record_of(bundle: Bundle) -> dict:
    return bundle.manifest.created["precision"]


def content(bundle: Bundle) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(bundle.path.iterdir())}


@pytest.mark.parametrize(
    ("precision", "floor_db", "targets"),
    [("fp16", 60, TARGETS), ("bf16", 42, TARGETS), ("int8", 25, TARGETS), ("fp8", 20, TARGETS[1:])],
)
def test_each_precision_converts_answers_and_builds(
    three: Bundle, tmp_path: Path, precision: str, floor_db: float, targets: tuple[str, ...]
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    from warpcache.engine.tensorrt.engine_cache import EngineCache
    from warpcache.engine.tensorrt.engines import Toolchain, build_engines
    from warpcache.engine.tensorrt.flavour import Flavour

    before = content(three)
    bundle = convert(three, tmp_path / "low.warp", precision, min_psnr_db=floor_db)
    assert content(three) == before
    manifest, record = bundle.manifest, record_of(bundle)
    assert (manifest.name, record["precision"], record["cache"], record["frames"]) == ("low", precision, "fp16", 6)
    # What a caller gives and gets keeps its type; what the atlas says is coordinates and stays.
    assert {r.spec.dtype for r in manifest.inputs} | {s.dtype for s in manifest.outputs} == {"float32"}
    assert {s.name: s.dtype for s in manifest.cache} == {
        "cache.h": "float16",
        "cache.image": "float16",
        "cache.atlas": "float32",
    }
    for name, parity in record["parity"].items():
        assert floor_db <= parity["psnr_db"]["worst"] <= parity["psnr_db"]["mean"] < 100, name
        assert parity["nan"] == 0
    wanted = {"fp16": "w2.float16", "bf16": "w2.bfloat16", "int8": "w2.int8", "fp8": "w2.fp8"}[precision]
    for module in ("generator", "producer", "plain"):
        model = load_model(bundle.file(f"{module}.onnx"))
        assert wanted in {tensor.name for tensor in model.graph.initializer}
        assert "conv2" in {path for i, _ in enumerate(model.graph.node) for path in GraphIndex(model).scopes(i)}
    # Weights are in the bundle once, in the type that they are computed in.
    assert bundle.file("weights.safetensors").stat().st_size < three.file("weights.safetensors").stat().st_size
    built = build_engines(bundle, Toolchain(Flavour.load("tensorrt-rtx"), targets), EngineCache(tmp_path / "engines"))
    assert sorted(engine.module for engine in built) == ["generator", "plain", "producer", "warp"]


def test_an_fp16_bundle_streams_on_the_cpu(three: Bundle, tmp_path: Path) -> None:
    low = convert(three, tmp_path / "low.warp", "fp16")
    answers = {}
    for name, bundle in (("full", three), ("low", low)):
        with Engine(bundle, age=1, threads=1) as engine:
            answers[name] = [frame.outputs["image"].copy() for frame in engine.session().render(FRAMES)]
    assert len(answers["low"]) == 6
    for a, b in zip(answers["low"], answers["full"], strict=True):
        assert a.dtype == np.float32
        # Rounding of values up to 1 by 2^-11, some of them one after another.
        assert 0 < np.abs(a - b).max() < 8 * 2**-11


def test_parity_is_what_torch_computes_with_the_same_roundings(three: Bundle, tmp_path: Path) -> None:
    record = record_of(convert(three, tmp_path / "low.warp", "fp16", parity_frames=2, age=3))

    def half(x: torch.Tensor) -> torch.Tensor:
        return x.half().float()

    def image(x: torch.Tensor, rounded: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        w = {name: rounded(array) for name, array in WEIGHTS.items()}
        h = rounded(functional.conv2d(rounded(x), w["w1"], w["b1"], padding=1)).relu()
        h = rounded(functional.conv2d(h, w["w2"], w["b2"], padding=1)).relu()
        return rounded(torch.tanh(rounded(functional.conv2d(h, w["w3"], w["b3"], padding=1))))

    x = torch.from_numpy(FRAMES["x"])
    exact, low = image(x, lambda v: v), image(x, half)
    # The warp: coordinates in float32, the image from the cache in float16, the result rounded.
    grid = torch.from_numpy(FRAMES["atlas"]).permute(0, 2, 3, 1)

    def warp(t: int, s: int, images: torch.Tensor, rounded: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        moved = functional.grid_sample(images[s : s + 1], grid[s : s + 1], padding_mode="border", align_corners=False)
        return rounded(rounded(moved) + rounded(rounded(x[t : t + 1]) * rounded(torch.tensor(0.1))))

    def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
        a, b = a.double().clamp(-1, 1), b.double().clamp(-1, 1)
        return 10 * math.log10(4 / float(((a - b) ** 2).mean()))

    # Sources 0 and 2, answers 3 frames later.
    expected = {
        "whole": [psnr(low[t], exact[t]) for t in (0, 2, 3, 5)],
        "plain": [psnr(low[s], exact[s]) for s in (0, 0, 2, 2)],
        "warp": [psnr(warp(t, s, low, half), warp(t, s, exact, lambda v: v)) for t, s in ((3, 0), (5, 2))],
    }
    for name, values in expected.items():
        # torch and ONNX Runtime add in another order: a sum in 10^4 falls on the other side of a rounding.
        assert record["parity"][name]["psnr_db"]["mean"] == pytest.approx(np.mean(values), abs=0.05)
        assert record["parity"][name]["psnr_db"]["worst"] == pytest.approx(min(values), abs=0.05)
        assert record["parity"][name]["frames"] == len(values)
    assert record["calibration"] is None


def test_a_layer_that_overflows_is_found_and_nothing_else_is_kept(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, planted=4e4)
    steps: list[tuple[str, int, int]] = []
    low = convert(bundle, tmp_path / "low.warp", "fp16", min_psnr_db=60, progress=lambda *step: steps.append(step))
    record = record_of(low)
    assert record["kept"] == {"generator": ["planted"], "producer": ["planted"], "plain": [], "warp": []}
    assert not any(rule["constant"] for rule in record["rules"].values())
    assert all(p["nan"] == 0 and p["psnr_db"]["worst"] >= 60 for p in record["parity"].values())
    # Six layers: all kept, none kept, three to halve them, the one alone.
    assert 3 <= record["trials"] <= 6
    assert [step for step in steps if step[0] == "searching what fp16 breaks"][-1][1] == record["trials"]
    types = elem_types(load_model(low.file("generator.onnx")))
    assert (types["large"], types["c2"]) == (TensorProto.FLOAT, TensorProto.FLOAT16)
    # bfloat16 has the range, so there is nothing to be found.
    assert not any(record_of(convert(bundle, tmp_path / "b.warp", "bf16", min_psnr_db=40))["kept"].values())


def test_a_cut_tensor_beyond_fp16_makes_the_cache_fp32_unless_fp16_was_asked_for(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, cached=6e4)
    low = convert(bundle, tmp_path / "low.warp", "fp16", min_psnr_db=60)
    record = record_of(low)
    assert (record["cache"], {s.dtype for s in low.manifest.cache}) == ("fp32", {"float32"})
    # No more than the two layers that make and take the large values.
    assert record["kept"]["generator"] == ["scale", "unscale"]
    with pytest.raises(
        ExportError, match=r"^fp16 gives \d+ values that are NaN or Inf at exit 'plain' whatever is kept"
    ):
        convert(bundle, tmp_path / "other.warp", "fp16", cache_precision="fp16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["low.warp", "three.warp"]
    asked = convert(make_bundle(tmp_path / "sub"), tmp_path / "fp32.warp", "fp16", cache_precision="fp32")
    assert {s.dtype for s in asked.manifest.cache} == {"float32"}


def test_a_layer_that_int8_spoils_is_left_in_fp16(
    three: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders: list[list[str]] = []

    def search(groups: Sequence[str], holds: Callable[[Sequence[str]], bool]) -> list[str]:
        orders.append(list(groups))
        return fewest_kept(groups, holds)

    monkeypatch.setattr(precision_module, "fewest_kept", search)
    free = record_of(convert(three, tmp_path / "free.warp", "int8", min_psnr_db=20))
    worst = min(p["psnr_db"]["worst"] for p in free["parity"].values())
    assert free["range"] in ("minmax", "percentile", "mse")
    assert not any(free["unquantised"].values())
    low = convert(three, tmp_path / "low.warp", "int8", min_psnr_db=worst + 3)
    record = record_of(low)
    left = record["unquantised"]["generator"]
    assert 1 <= len(left) < 3
    assert set(left) < {"conv1", "conv2", "conv3"}
    assert not any(record["kept"].values())
    assert min(p["psnr_db"]["worst"] for p in record["parity"].values()) >= worst + 3
    # It is the one that gains most when it is spared (kept in fp32, which does the same to it as fp16 within 0.1 dB).
    spared = {}
    for layer in ("conv1", "conv2", "conv3"):
        parity = record_of(convert(three, tmp_path / f"{layer}.warp", "int8", min_psnr_db=20, keep=(layer,)))["parity"]
        spared[layer] = min(p["psnr_db"]["worst"] for p in parity.values())
    assert max(spared, key=lambda layer: spared[layer]) in left
    # And the search began with it.
    assert orders[0][0] == max(spared, key=lambda layer: spared[layer])
    assert (len(left) == 1) == (max(spared.values()) >= worst + 3)
    tensors = {tensor.name for tensor in load_model(low.file("generator.onnx")).graph.initializer}
    for layer in ("conv1", "conv2", "conv3"):
        assert (f"w{layer[-1]}.int8" in tensors) == (layer not in left)


def test_ranges_are_made_of_old_and_new_caches(three: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, np.ndarray]] = []

    class Recorder(precision_module.RangeCollector):
        def add(self, feeds: Mapping[str, np.ndarray]) -> None:
            seen.append(dict(feeds))
            super().add(feeds)

    monkeypatch.setattr(precision_module, "RangeCollector", Recorder)
    convert(three, tmp_path / "low.warp", "int8", min_psnr_db=20, calibration_frames=2, age=3)

    def frame(image: np.ndarray) -> int:
        return next(t for t in range(6) if np.array_equal(image[0], FRAMES["x"][t]))

    images = run_model(load_model(three.file("producer.onnx")), {n: a[:1] for n, a in FRAMES.items()})["cache.image"]
    # Frames 0 and 5: generator and producer once each, both consumers at age 0, and at age 3 where there is one.
    assert sorted(frame(feeds["x"]) for feeds in seen) == sorted([0, 0, 0, 0, 3, 3, 5, 5, 5, 5])
    aged = [feeds for feeds in seen if frame(feeds["x"]) == 3]
    assert all(np.array_equal(feeds["cache.image"], images) for feeds in aged)


def test_what_no_choice_reaches_is_said(three: Bundle, tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"^int8 reaches 70 dB only with every layer left in fp16 \(with none: [0-9.]+ dB\)"
    ):
        convert(three, tmp_path / "low.warp", "int8", min_psnr_db=70)
    with pytest.raises(
        ExportError, match=r"^fp16 gives [0-9.]+ dB at exit 'plain' whatever is kept in fp32, where 99 dB"
    ):
        convert(three, tmp_path / "low.warp", "fp16", min_psnr_db=99, cache_precision="fp16")
    with pytest.raises(
        ExportError, match=r"^fp16 reaches 99 dB at exit '(whole|plain)' only with all of its 10 layers"
    ):
        convert(three, tmp_path / "low.warp", "fp16", min_psnr_db=99, max_trials=1)
    assert list(tmp_path.iterdir()) == []


def test_without_frames_nothing_is_measured(three: Bundle, tmp_path: Path) -> None:
    low = convert(three, tmp_path / "low.warp", "fp16", frames=None)
    record = record_of(low)
    assert (record["parity"], record["measured"], record["frames"]) == (None, None, 0)
    # The same graphs as with frames, since nothing had to be searched for.
    other = convert(three, tmp_path / "other.warp", "fp16")
    assert low.file("warp.onnx").read_bytes() == other.file("warp.onnx").read_bytes()
    for precision in ("int8", "fp8"):
        with pytest.raises(InputError, match=f"^{precision} needs calibration frames"):
            convert(three, tmp_path / "never.warp", precision, frames=None)


def test_layers_can_be_kept_by_name(three: Bundle, tmp_path: Path) -> None:
    low = convert(three, tmp_path / "low.warp", "fp16", keep=("conv2", "node_image"))
    assert record_of(low)["kept"] == {
        "generator": ["conv2", "node_image"],
        "producer": ["conv2", "node_image"],
        "plain": ["conv2", "node_image"],
        # Its last node has that name too.
        "warp": ["mover"],
    }
    types = elem_types(load_model(low.file("generator.onnx")))
    assert [types[name] for name in ("c1", "c2", "r2", "c3", "image")] == [10, 1, 1, 10, 1]
    with pytest.raises(InputError, match=r"^no module path or node to keep is called 'conv22'; the closest are conv2"):
        convert(three, tmp_path / "never.warp", "fp16", keep=("conv22",))


def test_the_calibration_is_kept_while_it_holds_and_measured_again_where_it_may_not(tmp_path: Path) -> None:
    # Hardly anything moves, so that old caches are worth much and int8 could spoil what they are worth.
    still = {name: array[:1] + (array - array[:1]) * np.float32(0.02) for name, array in FRAMES.items()}
    bundle = make_bundle(tmp_path, calibrated=still)
    known = bundle.manifest.calibration
    near = convert(bundle, tmp_path / "near.warp", "fp16", frames=still)
    assert (near.manifest.calibration, record_of(near)["calibration"]) == (known, "measured in fp32")
    unmeasured = convert(bundle, tmp_path / "unmeasured.warp", "fp16", frames=None)
    assert (unmeasured.manifest.calibration, record_of(unmeasured)["calibration"]) == (known, "measured in fp32")
    far = convert(bundle, tmp_path / "far.warp", "int8", min_psnr_db=20, frames=still)
    assert record_of(far)["calibration"] == "measured in int8, emulated on the CPU, on the frames given"
    # The same as running the converted graphs by hand: the plain exit at age 2, one frame after the other.
    graphs = {name: emulated(load_model(far.file(f"{name}.onnx"))) for name in ("producer", "plain")}
    values = []
    for t in range(2, 6):
        feeds = {name: array[t - 2 : t - 1] for name, array in still.items()}
        given = run_model(graphs["plain"], run_model(graphs["producer"], feeds))["image"]
        exact = run_model(load_model(bundle.file("generator.onnx")), {"x": still["x"][t : t + 1]})["image"]
        values.append(10 * math.log10(4 / float(np.mean((given - exact) ** 2))))
    assert far.manifest.calibration["exits"]["plain"]["2"]["psnr_db"]["mean"] == pytest.approx(
        np.mean(values), abs=1e-3
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp4"}, "unknown precision 'fp4'; choose from fp16, bf16, int8, fp8"),
        ({"precision": "fp16", "cache_precision": "int8"}, "unknown cache precision 'int8'; choose from fp32, fp16"),
        ({"precision": "fp16", "min_psnr_db": 0}, "min_psnr_db is 0; it must be above 0 and at most 100"),
        ({"precision": "fp16", "max_trials": 0}, "max_trials is 0; it must be 1 or more"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        PrecisionOptions(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: {"x": f["x"]}, "the frames lack atlas; the bundle takes x, atlas"),
        (lambda f: f | {"y": f["x"]}, "the frames hold y, which it does not take; the bundle takes x, atlas"),
        (
            lambda f: f | {"x": f["x"][:3]},
            r"the frames' arrays hold different numbers of frames, or none \(x: 3, atlas: 6\)",
        ),
        (lambda f: f | {"x": f["x"].astype(np.float64)}, "input 'x' has dtype float64, expected float32"),
        (lambda f: f | {"x": f["x"][:, :, :4]}, r"input 'x' has shape \(6, 3, 4, 16\), expected \(6, 3, 16, 16\)"),
        (lambda f: f | {"x": f["x"] * np.nan}, "input 'x' holds NaN or Inf"),
    ],
)
def test_frames_that_do_not_fit_are_refused(
    three: Bundle, tmp_path: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], message: str
) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        convert(three, tmp_path / "low.warp", "fp16", frames=change(FRAMES))
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_in_the_way_and_a_converted_one_are_refused_before_any_work(three: Bundle, tmp_path: Path) -> None:
    low = convert(three, tmp_path / "low.warp", "fp16", frames=None)
    before = content(low)
    with pytest.raises(BundleError, match=r"low\.warp exists already"):
        convert(three, low.path, "fp16")
    with pytest.raises(BundleError, match=r"^a bundle's name ends in \.warp"):
        convert(three, tmp_path / "low", "fp16")
    with pytest.raises(InputError, match=r"^bundle 'low' is in fp16 already; convert the fp32 bundle"):
        convert(low, tmp_path / "again.warp", "bf16")
    assert content(low) == before
    assert list(tmp_path.iterdir()) == [low.path]


@pytest.mark.parametrize(
    "stage", ["converting to int8", "measuring parity", "collecting ranges", "searching what int8 breaks"]
)
def test_an_interrupt_leaves_nothing(three: Bundle, tmp_path: Path, stage: str) -> None:
    before = content(three)

    def interrupt(what: str, done: int, total: int) -> None:
        if what == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(three, tmp_path / "low.warp", "int8", min_psnr_db=20, progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    assert content(three) == before


def test_a_failure_while_writing_leaves_nothing(three: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(out: Path, manifest: Manifest, models: Mapping[str, ModelProto], **more: object) -> Bundle:
        return write_bundle(out, manifest, {"generator.onnx": b"", "producer.onnx": tmp_path / "missing"})

    monkeypatch.setattr(precision_module, "bundle_models", fail)
    with pytest.raises(BundleError, match=r"cannot be written"):
        convert(three, tmp_path / "low.warp", "fp16", frames=None)
    assert list(tmp_path.iterdir()) == []


def test_the_demo_bundle_in_fp16(tmp_path: Path) -> None:
    """The figure in the results, on two frames: 78 dB and more. Without the rule for coordinates the warp has 59 dB."""
    from warpcache.tasks.demo import demo_bundle, demo_inputs

    bundle = demo_bundle()
    arrays = dict(demo_inputs(bundle, 2).arrays)
    record = record_of(convert(bundle, tmp_path / "demo.warp", "fp16", frames=arrays, parity_frames=1, min_psnr_db=70))
    assert record["trials"] == 0
    assert not any(record["kept"].values())

"""The demo on a small bundle of the synthetic head: what it streams, measures and writes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

import warpcache.tasks.demo
from warpcache.cli.main import cli
from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.bundle.manifest import Cut, ExitRecord, InputRecord, Manifest, module_record
from warpcache.engine.bundle.write import write_bundle
from warpcache.engine.errors import BundleError, InputError
from warpcache.engine.promise.calibration import Calibration, PromiseRecord
from warpcache.engine.spec import TensorSpec
from warpcache.tasks.choices import DemoOptions
from warpcache.tasks.demo import DEMO_MOTION_SEED, MEASURE_EVERY, demo_inputs, run_demo

SIZE = 48
FRAMES = 11
CONDITION = TensorSpec("condition", "float32", (1, 6, SIZE, SIZE))
ATLAS = TensorSpec("atlas", "float32", (1, 3, 64, 64))
IMAGE = TensorSpec("image", "float32", (1, 3, SIZE, SIZE))
CACHE = TensorSpec("cache.h", "float32", (1, 4, SIZE, SIZE))


def model(nodes: list[onnx.NodeProto], inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> bytes:
    rng = np.random.default_rng(5)
    weights = {"w1": rng.normal(0, 0.4, (4, 6, 3, 3)), "w2": rng.normal(0, 0.4, (3, 4, 3, 3))}
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "g",
        *(
            [helper.make_tensor_value_info(s.name, TensorProto.FLOAT, s.shape) for s in specs]
            for specs in (inputs, outputs)
        ),
        [numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items() if name in used],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


@pytest.fixture(scope="module")
def head_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """image = tanh(conv(relu(conv(condition)))), cut after the relu; the warp adds a tenth of the atlas's corner."""
    conv1 = helper.make_node("Conv", ["condition", "w1"], ["c1"], pads=[1] * 4)
    relu = helper.make_node("Relu", ["c1"], ["h"])
    tail = [helper.make_node("Conv", ["h", "w2"], ["c2"], pads=[1] * 4), helper.make_node("Tanh", ["c2"], ["image"])]
    take = helper.make_node("Identity", ["cache.h"], ["h"])
    moved = [
        helper.make_node("Conv", ["h", "w2"], ["c2"], pads=[1] * 4),
        helper.make_node("ReduceMean", ["atlas"], ["m"], keepdims=1),
        helper.make_node("Add", ["c2", "m"], ["c3"]),
        helper.make_node("Tanh", ["c3"], ["image"]),
    ]
    keep = helper.make_node("Identity", ["h"], ["cache.h"])
    graphs: dict[str, tuple[list[onnx.NodeProto], tuple[TensorSpec, ...], tuple[TensorSpec, ...]]] = {
        "generator": ([conv1, relu, *tail], (CONDITION,), (IMAGE,)),
        "producer": ([conv1, relu, keep], (CONDITION,), (CACHE,)),
        "plain": ([take, *tail], (CACHE,), (IMAGE,)),
        "warp": ([take, *moved], (CACHE, ATLAS), (IMAGE,)),
    }
    manifest = Manifest(
        name="small head",
        created={"by": "tests", "at": "2026-01-01T00:00:00Z", "options": {}},
        inputs=(InputRecord(CONDITION, "generator"), InputRecord(ATLAS, "motion")),
        outputs=(IMAGE,),
        image_output="image",
        fps=100.0,
        cut=Cut(("h",), ()),
        cache=(CACHE,),
        modules={name: module_record(name, graph[1], graph[2]) for name, graph in graphs.items()},
        exits=(
            ExitRecord("whole", ("generator",), 1.0),
            ExitRecord("plain", ("plain",), 0.5),
            ExitRecord("warp", ("warp",), 0.5),
        ),
        calibration=None,
    )
    files: dict[str, Path | bytes] = {f"{name}.onnx": model(*graph) for name, graph in graphs.items()}
    return write_bundle(tmp_path_factory.mktemp("head") / "head.warp", manifest, files)


def test_the_inputs_are_the_heads_own(head_bundle: Bundle) -> None:
    from warpcache.models.head import SyntheticHead

    inputs = demo_inputs(head_bundle, FRAMES)
    head = SyntheticHead(seed=0, size=SIZE)
    motion = head.motion(FRAMES, fps=100.0, seed=DEMO_MOTION_SEED)
    expected = head.inputs(motion)
    for name in ("condition", "atlas"):
        np.testing.assert_array_equal(inputs.arrays[name], expected[name])
    assert sorted(inputs.truth) == list(range(0, FRAMES, MEASURE_EVERY))
    for index, image in inputs.truth.items():
        np.testing.assert_array_equal(image, head.render(motion[index]))


@pytest.fixture(scope="module")
def promised_head(head_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same with a quality promise for its warp; the demo asks nothing of it, so its predictor never runs."""
    rng, rows = np.random.default_rng(1), 40
    scores = rng.normal(-5, 0.5, (rows, 1)).astype(np.float32)
    calibration = Calibration(
        "flip", ("warp",), (), (1,), scores, np.ones_like(scores), scores, np.ones(rows, np.int32), np.arange(rows)
    )
    record = PromiseRecord(
        "flip", ("warp",), (), (1,), rows, rows, "2026-01-01T00:00:00Z", "calibration.npz", {"whole": 9.0}, {}
    )
    one = TensorSpec("predicted", "float32", (1, 1))
    outputs = tuple(dataclasses.replace(one, name=name) for name in ("predicted", "spread", "novelty", "change"))
    manifest = head_bundle.manifest
    manifest = dataclasses.replace(
        manifest,
        modules={**manifest.modules, "predictor": module_record("predictor", (CONDITION,), outputs)},
        calibration={"promise": record.to_record()},
        files={},
    )
    files: dict[str, Path | bytes] = {path.name: path for path in head_bundle.path.glob("*.onnx")}
    files |= {"predictor.onnx": files["generator.onnx"], "calibration.npz": calibration.to_npz()}
    return write_bundle(tmp_path_factory.mktemp("promised") / "head.warp", manifest, files)


def test_the_report_shows_what_the_bundle_promises(promised_head: Bundle, tmp_path: Path) -> None:
    demo = run_demo(DemoOptions(frames=4, out=tmp_path / "demo"), bundle=promised_head)
    page = demo.report.read_text(encoding="utf-8")
    for words in ("What it promises", "<h3>Pareto front</h3>", "cache 1 frame old", "conformal risk control"):
        assert words in page, words


def test_the_demo_measures_and_writes(head_bundle: Bundle, tmp_path: Path) -> None:
    from warpcache.media.video import read_video

    out = tmp_path / "demo"
    stages: dict[str, tuple[int, int]] = {}
    demo = run_demo(
        DemoOptions(frames=FRAMES, out=out),
        bundle=head_bundle,
        progress=lambda stage, done, total: stages.update({stage: (done, total)}),
    )
    whole, cached = demo.measured.rows
    assert (whole["policy"], cached["policy"]) == ("full", "async")
    assert whole["frames"] == FRAMES
    assert whole["routes"] == {"whole": FRAMES}
    assert [quality["against"] for quality in cached["quality_against"]] == ["whole generator", "rendered truth"]
    assert whole["quality"]["psnr_db"] == 100  # the whole generator against itself: the stated cap
    for row in (whole, cached):
        for quality in row["quality_against"]:
            assert {"psnr_db", "ssim", "flip"} <= set(quality)
    assert sorted(path.name for path in out.iterdir()) == ["frames.mp4", "report.html"]
    assert (demo.report, demo.video) == (out / "report.html", out / "frames.mp4")
    video = read_video(demo.video)
    assert len(video.frames) == FRAMES
    assert video.frames.shape[3] >= 2 * SIZE  # both beside each other
    page = demo.report.read_text(encoding="utf-8")
    assert "data:video/mp4;base64," in page
    assert f"every {MEASURE_EVERY}th" in page
    assert "What it promises" not in page  # this bundle promises nothing
    assert all(done == total for done, total in stages.values())
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]  # nothing unfinished is left


def test_an_interrupted_demo_leaves_the_last_one_whole(
    head_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "demo"
    out.mkdir()
    (out / "report.html").write_text("the last one")

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(warpcache.tasks.demo, "demo_bundle", lambda: head_bundle)
    monkeypatch.setattr("warpcache.report.policies.write_report", interrupted)
    result = CliRunner().invoke(cli, ["demo", "--frames", "6", "--out", str(out)])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "warpcache: interrupted; nothing was written"
    assert [path.name for path in out.iterdir()] == ["report.html"]
    assert (out / "report.html").read_text() == "the last one"
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_the_command_prints_the_table_and_writes_json(
    head_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warpcache.tasks.demo, "demo_bundle", lambda: head_bundle)
    out, figures = tmp_path / "demo", tmp_path / "demo.json"
    result = CliRunner().invoke(cli, ["demo", "--frames", "6", "--out", str(out), "--json", str(figures)])
    assert result.exit_code == 0, result.output
    for word in ("p50", "p95", "p99", "frames per second", "PSNR", "SSIM", "FLIP", "against the rendered truth"):
        assert word in result.stdout, word
    document = json.loads(figures.read_text())
    assert (document["schema"], document["command"]) == (1, "demo")
    assert [row["policy"] for row in document["rows"]] == ["full", "async"]


def test_a_file_in_the_way_is_refused(head_bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    out.write_text("mine")
    with pytest.raises(InputError, match=f"^'{out}' is a file"):
        run_demo(DemoOptions(frames=2, out=out), bundle=head_bundle)
    assert out.read_text() == "mine"


def test_another_generators_bundle_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match=r"^bundle 'tiny' takes"):
        demo_inputs(Bundle.open(tiny_bundle), 2)


def test_an_installation_without_the_bundle_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    with pytest.raises(BundleError, match=r"^the demo's bundle is not in this installation"):
        warpcache.tasks.demo.demo_bundle()

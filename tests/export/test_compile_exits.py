"""Compile with exits, end to end on a tiny generator: what is in the bundle, interrupts, what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors import safe_open

from warpcache import Engine
from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.errors import ExportError, InputError
from warpcache.engine.metrics.images import psnr
from warpcache.engine.promise.calibration import Calibration, PromiseRecord, Quality, to_score
from warpcache.export import compile as compile_module
from warpcache.export.adapter.layout import AdapterConfig
from warpcache.export.branches.branches import BranchOptions
from warpcache.export.compile import CompileOptions, Footage, compile_generator
from warpcache.export.frames.subject import Subject
from warpcache.export.graph.index import load_model
from warpcache.export.graph.macs import count_macs
from warpcache.export.graph.run import open_session, run_session
from warpcache.export.promise.check import check_promise, least_held_frames
from warpcache.export.promise.exit_quality import ExitModels
from warpcache.export.promise.promise import Promise, PromiseOptions, split_blocks
from warpcache.media.inputs import InputStream

LARGE = AdapterConfig(stride=4, width=16, blocks=0, features=8, encoder_width=8)
SMALL = dataclasses.replace(LARGE, width=8)
# Depth and width of the branch are given, so that nothing depends on what a busy machine measures.
BRANCH = {
    "places": [["silu", "silu_1", "avg_pool2d_1"]],
    "widths": [0.5],
    "steps": 4,
    "batch": 2,
    "bank_size": 4,
    "checkpoint_every": 2,
}
OPTIONS = CompileOptions(
    cut="dec.0",
    steps=4,
    max_age=1,
    seed=3,
    adapter=(LARGE, SMALL),
    train={"batch": 2, "checkpoint_every": 2},
    exits=3,
    metric="psnr",
    branch=BRANCH,
    promise=PromiseOptions(train_frames=8, steps=0),
)
EXITS = ["whole", "plain", "warp", "warp2", "branch1"]
Stages = list[tuple[str, int, int]]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Sums in one order: how threads share the work may change it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def clip(frames: int, seed: int = 0) -> InputStream:
    """A pattern that drifts a pixel a frame."""
    coarse = np.random.default_rng(seed).uniform(-1, 1, (3, 16, 16))
    fine = np.kron(coarse, np.ones((1, 4, 4))).astype(np.float32)
    return InputStream.from_arrays(
        {"condition": np.stack([np.roll(fine, t, 2)[:, :32, :32] for t in range(frames)])}, fps=25.0
    )


def compiled(
    model: onnx.ModelProto,
    out: Path,
    options: CompileOptions = OPTIONS,
    *,
    train: InputStream | None = None,
    held: InputStream | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Bundle:
    return compile_generator(
        model,
        Footage(train or clip(8), held or clip(29, seed=1)),
        out,
        options=options,
        made_from={"why": "test"},
        progress=progress,
    )


@dataclasses.dataclass(frozen=True)
class Compiled:
    bundle: Bundle
    stages: Stages


@pytest.fixture(scope="module")
def unet(request: pytest.FixtureRequest) -> onnx.ModelProto:
    """A U-Net of 32x32, traced; module paths are in it, so cuts can be named by them."""
    model: onnx.ModelProto = request.getfixturevalue("traced_unet").model
    return model


@pytest.fixture(scope="module")
def made(unet: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    stages: Stages = []
    out = tmp_path_factory.mktemp("exits") / "u.warp"
    return Compiled(compiled(unet, out, progress=lambda *stage: stages.append(stage)), stages)


def module(bundle: Bundle, name: str) -> onnx.ModelProto:
    return load_model(bundle.path / f"{name}.onnx")


def run(bundle: Bundle, name: str, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = open_session((bundle.path / f"{name}.onnx").read_bytes(), threads=1, folder=bundle.path)
    return run_session(session, feeds)


def frame(stream: InputStream, t: int) -> dict[str, np.ndarray]:
    return {name: array[t : t + 1] for name, array in stream.arrays.items()}


def test_the_bundle_holds_exits_predictors_and_promise(made: Compiled) -> None:
    bundle = Bundle.open(made.bundle.path)
    manifest = bundle.manifest
    assert [record.name for record in manifest.exits] == EXITS
    assert manifest.exits[0].cost_ratio == 1.0
    assert set(manifest.modules) == {
        "generator", "producer", "plain", "warp", "warp2", "branch1", "predictor", "predictor_cold",
    }  # fmt: skip
    assert "cache.thumbnail" in {spec.name for spec in manifest.cache}
    training = manifest.created["training"]
    assert training["adapter"] == LARGE.to_record()
    assert training["smaller"] == [SMALL.to_record()]
    assert training["branches"]["branch1"]["width"] == 0.5
    assert training["branches"]["branch1"]["depth"] == BRANCH["places"][0]  # type: ignore[index]
    assert "calibration.npz" in manifest.files
    record = PromiseRecord.of(manifest)
    assert record is not None
    assert record.metric == "psnr_db"
    assert record.exits == ("warp", "warp2", "branch1")
    assert record.cold_exits == ("branch1",)
    assert record.ages == (1,)
    # A tiny generator makes a small bundle: nothing of the training is left in it.
    assert sum(file.stat().st_size for file in bundle.path.iterdir()) < 1_000_000
    assert [entry.name for entry in bundle.path.parent.iterdir()] == ["u.warp"]


def test_work_is_counted_from_the_graphs_that_are_shipped(made: Compiled) -> None:
    record = PromiseRecord.of(made.bundle.manifest)
    assert record is not None
    modules = {"whole": "generator"} | {name: name for name in ("plain", *record.exits, "predictor", "predictor_cold")}
    assert record.macs == {name: count_macs(module(made.bundle, file)) for name, file in modules.items()}
    assert record.macs["warp2"] < record.macs["warp"] < record.macs["whole"]
    assert record.macs["branch1"] < record.macs["whole"]


def test_every_exit_and_predictor_runs(made: Compiled) -> None:
    bundle, stream = made.bundle, clip(3, seed=2)
    now = frame(stream, 2)
    cache = run(bundle, "producer", frame(stream, 1))
    whole = run(bundle, "generator", now)["image"]
    answers = {name: run(bundle, name, {**now, **cache})["image"] for name in ("warp", "warp2")}
    answers["branch1"] = run(bundle, "branch1", now)["image"]  # reads no cache
    for name, answer in answers.items():
        assert answer.shape == (1, 3, 32, 32), name
        assert np.isfinite(answer).all()
        # Trained little, but each begins with a picture: the last one moved, or the generator's own channels.
        assert psnr(answer[0], whole[0]) > 5.0, name
    assert not np.array_equal(answers["warp"], answers["warp2"])
    age = {"age": np.ones((1, 1), np.float32)}
    warm = run(bundle, "predictor", {**now, **cache, **age})
    cold = run(bundle, "predictor_cold", now)
    assert warm["predicted"].shape == warm["spread"].shape == (1, 3)
    assert cold["predicted"].shape == cold["spread"].shape == (1, 1)
    for given in (warm, cold):
        assert all(np.isfinite(array).all() for array in given.values())
        assert (given["spread"] > 0).all()
    # What a branch is worth depends on the input alone; sums of a few dozen products in another order.
    np.testing.assert_allclose(warm["predicted"][:, 2:], cold["predicted"], rtol=1e-4, atol=1e-4)


def test_at_age_0_the_plain_consumer_is_the_generator(made: Compiled) -> None:
    now = frame(clip(1, seed=2), 0)
    got = run(made.bundle, "plain", {**now, **run(made.bundle, "producer", now)})
    # Bit for bit, with the encoder and the thumbnail in the producer too.
    np.testing.assert_array_equal(got["image"], run(made.bundle, "generator", now)["image"])


def test_the_promise_is_of_what_the_exits_answer(made: Compiled) -> None:
    bundle, held = made.bundle, clip(29, seed=1)
    calibration = Calibration.read(bundle)
    row = int(np.flatnonzero(calibration.age == 1)[5])
    t = int(calibration.frame[row])
    now, cache = frame(held, t), run(bundle, "producer", frame(held, t - 1))
    whole = run(bundle, "generator", now)["image"][0]
    for column, name in enumerate(calibration.exits):
        value = psnr(run(bundle, name, {**now, **cache})["image"][0], whole)
        # Stored in float32; threads may add up otherwise.
        assert calibration.measured[row, column] == pytest.approx(float(to_score("psnr", value)), abs=1e-4)
    given = run(bundle, "predictor", {**now, **cache, "age": np.ones((1, 1), np.float32)})
    np.testing.assert_allclose(calibration.predicted[row], given["predicted"][0], atol=1e-4)
    # Half of the time, what half of the frames keep can be promised.
    best = calibration.best(0.5)
    assert calibration.rule(Quality("psnr", best, confidence=0.5)).margin(1) < np.inf


def test_an_engine_keeps_the_promised_quality(made: Compiled) -> None:
    # 2 dB easier than the best that can be promised: exits differ by less here, so every frame has eligible ones.
    quality = Quality("psnr", Calibration.read(made.bundle).best(0.5) - 2.0, confidence=0.5)
    stream = clip(12, seed=1)
    with Engine(made.bundle, age=1, threads=1, quality=quality, audit_every=0) as engine:
        answers = list(engine.session().render(stream.arrays))
    routes = [answer.route for answer in answers]
    assert set(routes) <= set(EXITS)
    assert set(routes) & {"warp", "warp2", "branch1"}
    for t, answer in enumerate(answers):
        whole = run(made.bundle, "generator", frame(stream, t))["image"]
        assert np.isfinite(answer.outputs["image"]).all()
        if answer.route in ("whole", "plain"):
            np.testing.assert_array_equal(answer.outputs["image"], whole)


def test_calibration_covers_every_exit(made: Compiled) -> None:
    calibration = made.bundle.manifest.calibration
    assert calibration is not None
    assert {name: list(ages) for name, ages in calibration["exits"].items()} == {
        "plain": ["1"], "warp": ["1"], "warp2": ["1"], "branch1": ["0"], "frozen": ["1"],
    }  # fmt: skip
    held = clip(29, seed=1)
    values = []
    for t in range(1, 29):
        now = frame(held, t)
        values.append(
            psnr(run(made.bundle, "branch1", now)["image"][0], run(made.bundle, "generator", now)["image"][0])
        )
    # Rounded to 5 decimals; threads may add up otherwise.
    assert calibration["exits"]["branch1"]["0"]["psnr_db"]["mean"] == pytest.approx(np.mean(values), abs=1e-3)


def test_every_stage_is_told_and_ended(made: Compiled) -> None:
    done = {stage: (now, total) for stage, now, total in made.stages}
    assert list(done) == [
        "choosing the cut",
        "recording the generator",
        "making the guide bank",
        "training the branches",
        "training the warp adapter",
        "calibrating",
        "measuring the exits on training frames",
        "measuring the exits on held-back frames",
        "fitting the predictor",
        "writing the bundle",
    ]
    assert all(now == total for now, total in done.values())


class Stop:
    """Raises KeyboardInterrupt when a stage has come so far."""

    def __init__(self, stage: str, done: int) -> None:
        self.stage, self.done = stage, done

    def __call__(self, stage: str, done: int, total: int) -> None:
        if (stage, done) == (self.stage, self.done):
            raise KeyboardInterrupt


def test_a_compile_is_resumed_at_every_stage(unet: onnx.ModelProto, made: Compiled, tmp_path: Path) -> None:
    """Stopped again and again, it ends with the same files as the one that was never stopped."""
    out = tmp_path / "u.warp"
    resume = dataclasses.replace(OPTIONS, resume=True)
    own, branches = tmp_path / "u.checkpoint.safetensors", tmp_path / "u.branches.checkpoint.safetensors"
    for options, stage, done, steps in (
        (OPTIONS, "training the branches", 3, ("0", "2")),
        (resume, "training the warp adapter", 3, ("2", "4")),
    ):
        with pytest.raises(KeyboardInterrupt):
            compiled(unet, out, options, progress=Stop(stage, done))
        assert {entry.name for entry in tmp_path.iterdir()} == {own.name, branches.name}
        for path, step in zip((own, branches), steps, strict=True):
            with safe_open(path, "pt") as file:
                assert (file.metadata() or {})["step"] == step, (stage, path.name)
    stages: Stages = []
    bundle = compiled(unet, out, resume, progress=lambda *stage: stages.append(stage))
    # Branches are trained already, and the adapter half.
    assert [stage for stage in stages if stage[0].startswith("training")] == [
        ("training the warp adapter", 3, 4),
        ("training the warp adapter", 4, 4),
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["u.warp"]
    assert bundle.manifest.files == made.bundle.manifest.files
    assert bundle.manifest.created["training"] == made.bundle.manifest.created["training"]


def test_resume_takes_only_its_own_checkpoint(unet: onnx.ModelProto, tmp_path: Path) -> None:
    out, resume = tmp_path / "u.warp", dataclasses.replace(OPTIONS, resume=True)
    with pytest.raises(KeyboardInterrupt):
        compiled(unet, out, progress=Stop("training the branches", 1))
    for options, train in (
        (resume, clip(8, seed=5)),
        (dataclasses.replace(resume, seed=4), None),
        # Another number of consumers than the plan's.
        (dataclasses.replace(resume, exits=1, adapter=LARGE, branch=None), None),
    ):
        with pytest.raises(ExportError, match=r"^the checkpoint .* belongs to another model, clip or options"):
            compiled(unet, out, options, train=train)
    # A compile that starts anew minds neither checkpoint, of whatever run.
    (tmp_path / "u.branches.checkpoint.safetensors").write_bytes(b"leftover")
    with pytest.raises(KeyboardInterrupt):
        compiled(unet, out, progress=Stop("training the branches", 1))


def test_one_exit_is_a_consumer(
    unet: onnx.ModelProto, made: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def promise(models: ExitModels, *_: object, **__: object) -> Promise:
        # What one makes of it is tested with it; here, that nothing is put in for what it leaves out.
        asked.append(list(models.exits))
        return Promise(module(made.bundle, "predictor"), None, {"metric": "psnr_db"}, b"rows")

    monkeypatch.setattr(compile_module, "make_promise", promise)
    bundle = compiled(unet, tmp_path / "u.warp", dataclasses.replace(OPTIONS, exits=1, adapter=SMALL, branch=None))
    assert asked == [["warp"]]
    assert [record.name for record in bundle.manifest.exits] == ["whole", "plain", "warp"]
    assert set(bundle.manifest.modules) == {"generator", "producer", "plain", "warp", "predictor"}
    assert "branches" not in bundle.manifest.created["training"]
    assert bundle.file("calibration.npz").read_bytes() == b"rows"


@pytest.mark.parametrize(
    ("more", "opening"),
    [
        ({"exits": 0}, "exits is 0; it must be 1 or more"),
        ({"exits": 2, "steps": 0}, "2 exits were asked for with 0 steps, but exits are trained; leave out --steps 0"),
        ({"exits": 2, "metric": "vmaf"}, "no quality can be promised in metric 'vmaf'; choose one of: lpips, flip"),
        (
            {"exits": 2, "metric": "lpips"},
            "quality cannot be promised in lpips without its weights; give --lpips FILE or set WARPCACHE_LPIPS",
        ),
        ({"metric": "flip"}, "metric is given, but no exits that it is for; give exits (--exits N) too"),
        ({"bank_size": 8}, "bank_size is given, but no exits that it is for"),
        ({"exits": 1, "branch_steps": 8}, "one exit is a consumer, so there are no branches to give options for"),
        ({"exits": 2, "branch_steps": 0}, "branch_steps is 0; it must be 1 or more"),
        ({"exits": 2, "bank_size": -1}, "bank_size is -1; it must be 0 or more"),
        ({"exits": 3, "adapter": LARGE}, "adapter gives 1 sizes for 2 consumers; give one a consumer"),
        (
            {"exits": 3, "adapter": (LARGE, dataclasses.replace(SMALL, features=4))},
            "the sizes in adapter differ in stride, features or encoder_width",
        ),
        ({"exits": 4, "branch": {"count": 3}}, "branch asks for 3 branches, but 4 exits make it 2; leave count out"),
        ({"exits": 4, "branch": {"depth": 3}}, "branch holds 'depth', which no branch has; it takes bank_size, batch"),
        (
            {"exits": 2, "branch": BranchOptions(count=1), "bank_size": 4},
            "branch is a whole BranchOptions, which says steps and bank_size itself",
        ),
    ],
)
def test_options_that_cannot_be(more: dict[str, Any], opening: str) -> None:
    with pytest.raises(InputError) as info:
        CompileOptions(**more)
    assert str(info.value).startswith(opening)


def test_what_options_come_to() -> None:
    assert (CompileOptions().consumers, CompileOptions().branches) == (1, 0)
    for exits, consumers, branches in ((1, 1, 0), (2, 1, 1), (3, 2, 1), (4, 2, 2), (5, 3, 2)):
        options = CompileOptions(exits=exits)
        assert (options.consumers, options.branches) == (consumers, branches)
    assert CompileOptions(exits=2).promised_metric == "flip"
    assert CompileOptions(exits=2, lpips=Path("weights")).promised_metric == "lpips"
    assert CompileOptions(exits=2, lpips=Path("weights"), metric="ms-ssim").promised_metric == "ms_ssim"
    branch = CompileOptions(exits=4, steps=300, seed=7, bank_size=0, branch={"joint": True}).branch_options()
    assert (branch.count, branch.steps, branch.seed, branch.bank_size, branch.joint) == (2, 200, 7, 0, True)
    given = BranchOptions(count=2, steps=11)
    assert CompileOptions(exits=4, branch=given).branch_options() == given


def convolution(channels: int) -> onnx.ModelProto:
    """A generator of one layer, with an output of so many channels."""
    shapes = {"condition": (1, 3, 32, 32), "image": (1, channels, 32, 32)}
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name])] for name in ("condition", "image")
    )
    weight = numpy_helper.from_array(np.ones((channels, 3, 1, 1), np.float32), "weight")
    node = helper.make_node("Conv", ["condition", "weight"], ["image"])
    graph = helper.make_graph([node], "g", inputs, outputs, [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def test_what_no_promise_can_be_made_of_is_refused_before_training(unet: onnx.ModelProto, tmp_path: Path) -> None:
    stages: list[str] = []

    def refused(opening: str, model: onnx.ModelProto, options: CompileOptions, held: int = 29) -> None:
        with pytest.raises(InputError) as info:
            compiled(
                model,
                tmp_path / "u.warp",
                options,
                held=clip(held, seed=1),
                progress=lambda stage, *_: stages.append(stage),
            )
        assert str(info.value).startswith(opening)

    refused(
        "metric ms-ssim needs images of 161 pixels a side or more, but output 'image' is 32x32; choose another",
        unet,
        dataclasses.replace(OPTIONS, metric="ms-ssim"),
    )
    refused(
        "a promise at ages up to 1 and confidence 0.95 needs 29 held-back frames at least, but there are 28; give",
        unet,
        OPTIONS,
        held=28,
    )
    refused(
        "metric flip is for images of 3 channels, but output ",
        convolution(1),
        dataclasses.replace(OPTIONS, metric=None),
    )
    refused("quality is promised for an image, but no output is a float32 image", convolution(2), OPTIONS)
    assert stages == []
    assert list(tmp_path.iterdir()) == []


def test_an_input_called_like_the_predictors_own_is_refused_before_training() -> None:
    model = convolution(3)
    model.graph.input[0].name = model.graph.node[0].input[0] = "age"
    frames = InputStream.from_arrays({"age": clip(40).arrays["condition"]}, fps=25.0)
    with pytest.raises(InputError, match=r"^an input is called 'age', which is what a predictor is told"):
        check_promise(Subject(model, frames, frames), OPTIONS.promised_metric, OPTIONS.max_age, None)


@pytest.mark.parametrize("max_age", [1, 2, 4, 8])
def test_the_frames_that_are_asked_for_are_enough(max_age: int) -> None:
    needed = least_held_frames(max_age)
    _, calibrated = split_blocks(needed, max_age, needed)
    # (0 + 1) / (n + 1) <= 0.05 takes 19.
    assert sum(map(len, calibrated)) >= 19
    _, fewer = split_blocks(needed - 1, max_age, needed - 1)
    assert sum(map(len, fewer)) < 19

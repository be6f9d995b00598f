"""Compile end to end on tiny generators: what the bundle answers, interrupts and resumes, and everything refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from warpcache import Engine
from warpcache.engine.bundle import write as bundle_writing
from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.errors import BundleError, ExportError, InputError, WarpcacheError
from warpcache.engine.metrics.images import psnr
from warpcache.export import compile as compile_module
from warpcache.export.adapter import training as adapter_training
from warpcache.export.adapter.graphs import LADDER, choose_configs
from warpcache.export.adapter.layout import AdapterConfig, AdapterLayout
from warpcache.export.bundle import write as bundling
from warpcache.export.compile import CompileOptions, Footage, compile_generator, split_model
from warpcache.export.frames.surface import Surface
from warpcache.export.graph.run import run_model
from warpcache.media.inputs import InputStream
from warpcache.models.renderer import DeferredNeuralRenderer

SMALL = AdapterConfig(stride=4, width=8, blocks=0, features=8, encoder_width=8)
TRAINED = CompileOptions(
    cut="deep", steps=5, max_age=2, seed=3, adapter=SMALL, train={"batch": 2, "checkpoint_every": 2}
)
UNTRAINED = CompileOptions(cut="deep", steps=0, max_age=2)

Stages = list[tuple[str, int, int]]


def stream_of(portrait: Any, frames: slice = slice(None), **more: Any) -> InputStream:
    arrays = {name: array if len(array) == 1 else array[frames] for name, array in portrait.stream.items()}
    return InputStream.from_arrays(arrays, fps=25.0, **more)


def compiled(
    module: nn.Module,
    stream: InputStream,
    out: Path,
    options: CompileOptions,
    *,
    holdout: InputStream | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Bundle:
    return compile_generator(
        module, Footage(stream, holdout), out, options=options, made_from={"why": "test"}, progress=progress
    )


def answers(path: Path, stream: InputStream, age: int) -> list[dict[str, np.ndarray]]:
    """What the engine gives in lockstep, frame by frame."""
    with Engine(path, age=age, threads=1) as engine:
        known = {record.spec.name for record in engine.manifest.inputs}
        inputs = {name: array for name, array in stream.arrays.items() if name in known}
        return [frame.outputs for frame in engine.session().render(inputs)]


def direct(path: Path, module: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One of the bundle's modules run by ONNX Runtime alone."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path / f"{module}.onnx", options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    results = session.run(names, {value.name: feeds[value.name] for value in session.get_inputs()})
    return dict(zip(names, results, strict=True))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in one order: how threads share the work may change it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for temporary files, so that a test sees what is left there."""
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def traced_once(portrait: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the portrait's trace from its fixture: a second or so saved in tests of what comes after."""
    trace = compile_module.trace_generator

    def kinds(frame: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
        return {name: (array.dtype, array.shape) for name, array in frame.items() if name != "atlas"}

    def trace_generator(module: nn.Module, example: Mapping[str, Any]) -> Any:
        known = module is portrait.module and kinds(example) == kinds(portrait.frame(0))
        return portrait.model if known else trace(module, example)

    monkeypatch.setattr(compile_module, "trace_generator", trace_generator)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A bundle compiled with everything: a surface, two outputs, a constant id, a holdout with truth."""

    bundle: Bundle
    holdout: InputStream
    stages: Stages

    @property
    def path(self) -> Path:
        return self.bundle.path


@pytest.fixture(scope="module")
def portrait_bundle(portrait: Any, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    stages: Stages = []
    truth = np.random.default_rng(1).uniform(-1, 1, (4, 3, 32, 48)).astype(np.float32)
    holdout = stream_of(portrait, slice(2, 6), truth=truth)
    out = tmp_path_factory.mktemp("portrait") / "portrait.warp"
    bundle = compiled(
        portrait.module,
        stream_of(portrait),
        out,
        TRAINED,
        holdout=holdout,
        progress=lambda *stage: stages.append(stage),
    )
    torch.set_num_threads(threads)
    return Compiled(bundle, holdout, stages)


def test_the_bundle_says_what_it_is(portrait: Any, portrait_bundle: Compiled) -> None:
    manifest = Bundle.open(portrait_bundle.path).manifest
    assert manifest.name == "portrait"
    assert manifest.fps == 25.0
    assert manifest.image_output == "image"
    roles = {record.spec.name: (record.role, record.spec.dtype, record.spec.shape) for record in manifest.inputs}
    assert roles == {
        "condition": ("generator", "float32", (1, 6, 32, 48)),
        "pose": ("generator", "float32", (1, 5)),
        "person": ("generator", "int64", (1,)),
        "atlas": ("motion", "float32", (1, 3, 24, 24)),
    }
    assert [(spec.name, spec.shape) for spec in manifest.outputs] == [
        ("image", (1, 3, 32, 48)),
        ("matte", (1, 1, 32, 48)),
    ]
    assert [record.name for record in manifest.exits] == ["whole", "plain", "warp"]
    assert manifest.exits[0].cost_ratio == 1.0
    assert manifest.created["options"] == {"why": "test"}
    training = manifest.created["training"]
    assert (training["steps"], training["seed"], training["batch"]) == (5, 3, 2)
    assert training["adapter"] == SMALL.to_record()
    assert manifest.calibration is not None
    assert set(manifest.calibration["exits"]) == {"plain", "warp", "frozen"}
    assert set(manifest.calibration["truth"]["exits"]["warp"]) == {"1", "2"}
    # Files of one machine's paths have no place in what is shipped.
    assert b"/tests/" not in b"".join(file.read_bytes() for file in portrait_bundle.path.glob("*.onnx"))
    assert sorted(entry.name for entry in portrait_bundle.path.parent.iterdir()) == ["portrait.warp"]


def test_progress_names_every_stage_and_ends_it(portrait_bundle: Compiled) -> None:
    done = {stage: (now, total) for stage, now, total in portrait_bundle.stages}
    assert list(done) == [
        "tracing the generator",
        "choosing the cut",
        "recording the generator",
        "training the warp adapter",
        "calibrating",
        "writing the bundle",
    ]
    assert all(now == total for now, total in done.values())


def test_at_age_0_the_bundle_is_the_generator(portrait: Any, portrait_bundle: Compiled) -> None:
    stream = stream_of(portrait)
    for t, got in enumerate(answers(portrait_bundle.path, stream, 0)):
        frame = portrait.frame(t)
        expected = run_model(portrait.model, frame, threads=1)
        assert list(got) == list(expected) == ["image", "matte"]
        for name in expected:
            # Bit for bit: the generator's own layers, in two halves.
            np.testing.assert_array_equal(got[name], expected[name])
        with torch.no_grad():
            of_torch = portrait.module(**{n: torch.from_numpy(frame[n]) for n in ("condition", "pose", "person")})
        # The trace's own tolerance: other orders of summation through normalised layers.
        np.testing.assert_allclose(got["image"], of_torch["image"].numpy(), atol=1e-4)


def test_at_age_1_the_warp_exit_answers_from_the_last_frame(portrait: Any, portrait_bundle: Compiled) -> None:
    path, stream = portrait_bundle.path, stream_of(portrait)
    got = answers(path, stream, 1)
    for t in range(1, 6):
        cache = direct(path, "producer", portrait.frame(t - 1))
        feeds = {name: array for name, array in portrait.frame(t).items() if name != "atlas"}
        expected = direct(path, "warp", {**feeds, **cache})
        assert list(got[t]) == ["image", "matte"]
        for name in expected:
            np.testing.assert_array_equal(got[t][name], expected[name])
    # It follows the input: the same cache with another frame's inputs gives another image.
    assert np.abs(got[3]["image"] - got[2]["image"]).max() > 0.01
    # And stays within what the generator was seen to give, over both outputs.
    whole = [run_model(portrait.model, portrait.frame(t)) for t in range(6)]
    low = min(float(array.min()) for frame in whole for array in frame.values())
    high = max(float(array.max()) for frame in whole for array in frame.values())
    values = np.concatenate([frame[name].ravel() for frame in got for name in frame])
    assert low - 1e-6 <= values.min()
    assert values.max() <= high + 1e-6


def test_calibration_is_of_what_the_engine_answers(portrait: Any, portrait_bundle: Compiled) -> None:
    calibration = portrait_bundle.bundle.manifest.calibration
    assert calibration is not None
    holdout = portrait_bundle.holdout
    whole = [frame["image"][0] for frame in answers(portrait_bundle.path, holdout, 0)]
    assert holdout.truth is not None
    # 4 frames and ages 1 and 2: measured on the last two, which both ages reach.
    assert calibration["frames"] == 2
    for age in (1, 2):
        got = [frame["image"][0] for frame in answers(portrait_bundle.path, holdout, age)]
        for reference, record in (
            (whole, calibration["exits"]["warp"]),
            (list(holdout.truth), calibration["truth"]["exits"]["warp"]),
        ):
            expected = np.mean([psnr(got[t], reference[t]) for t in (2, 3)])
            # The manifest rounds to 5 decimals; several threads may add up otherwise than one, 1e-6 of an error of 0.1.
            assert record[str(age)]["psnr_db"]["mean"] == pytest.approx(expected, abs=1e-3)


class Stop:
    """Raises KeyboardInterrupt when a stage has come so far."""

    def __init__(self, stage: str, done: int) -> None:
        self.stage, self.done, self.seen = stage, done, False

    def __call__(self, stage: str, done: int, total: int) -> None:
        if (stage, done) == (self.stage, self.done):
            self.seen = True
            raise KeyboardInterrupt


def test_an_interrupted_compile_is_resumed(
    portrait: Any, portrait_bundle: Compiled, tmp_path: Path, temporary: Path
) -> None:
    out = tmp_path / "new" / "portrait.warp"
    with pytest.raises(KeyboardInterrupt):
        compiled(
            portrait.module,
            stream_of(portrait),
            out,
            TRAINED,
            holdout=portrait_bundle.holdout,
            progress=Stop("training the warp adapter", 5),
        )
    # No bundle and no stray folder: the checkpoint alone, of step 4 of 5.
    (checkpoint,) = out.parent.iterdir()
    assert checkpoint.name == "portrait.checkpoint.safetensors"
    with safe_open(checkpoint, "pt") as file:
        assert (file.metadata() or {})["step"] == "4"
    assert list(temporary.iterdir()) == []

    # Budget and cut are what they were, whatever the options say now.
    options = dataclasses.replace(TRAINED, resume=True, cut="auto", adapter=None)
    stages: Stages = []
    bundle = compiled(
        portrait.module,
        stream_of(portrait),
        out,
        options,
        holdout=portrait_bundle.holdout,
        progress=lambda *stage: stages.append(stage),
    )
    assert [done for stage, done, _ in stages if stage == "training the warp adapter"] == [5]
    assert [entry.name for entry in out.parent.iterdir()] == ["portrait.warp"]
    # The same bundle as from the compile that was never stopped, bit for bit; all but times and the clock.
    one, other = bundle.manifest, portrait_bundle.bundle.manifest
    assert one.files == other.files
    assert one.calibration == other.calibration
    assert one.created["training"] == other.created["training"]


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize(
    ("stage", "done", "options"),
    [
        ("tracing the generator", 0, UNTRAINED),
        ("choosing the cut", 0, UNTRAINED),
        ("recording the generator", 2, TRAINED),
        ("training the warp adapter", 1, TRAINED),
        ("calibrating", 1, UNTRAINED),
        ("writing the bundle", 0, UNTRAINED),
    ],
)
def test_an_interrupt_leaves_no_bundle(
    portrait: Any, tmp_path: Path, temporary: Path, stage: str, done: int, options: CompileOptions
) -> None:
    stop = Stop(stage, done)
    with pytest.raises(KeyboardInterrupt):
        compiled(portrait.module, stream_of(portrait), tmp_path / "p.warp", options, progress=stop)
    assert stop.seen
    left = {entry.name for entry in tmp_path.iterdir()}
    assert left == ({"p.checkpoint.safetensors"} if stage == "training the warp adapter" else set())
    assert list(temporary.iterdir()) == []


@pytest.mark.usefixtures("traced_once")
def test_resume_takes_only_its_own_checkpoint(portrait: Any, tmp_path: Path) -> None:
    out, resume = tmp_path / "p.warp", dataclasses.replace(TRAINED, resume=True)
    first = Stop("training the warp adapter", 1)
    with pytest.raises(ExportError, match=r"^there is no checkpoint '.*p\.checkpoint\.safetensors' to resume from"):
        compiled(portrait.module, stream_of(portrait), out, resume)
    # A leftover of whatever kind is no hindrance to a compile that starts anew.
    checkpoint = tmp_path / "p.checkpoint.safetensors"
    checkpoint.write_bytes(b"leftover")
    with pytest.raises(KeyboardInterrupt):
        compiled(portrait.module, stream_of(portrait), out, TRAINED, progress=first)
    kept = checkpoint.read_bytes()
    # The same frames in another order have the same sums; the checkpoint knows them apart.
    reversed_ = InputStream.from_arrays({name: array[::-1].copy() for name, array in portrait.stream.items()}, fps=25.0)
    with_truth = stream_of(portrait, truth=np.zeros((6, 3, 32, 48), np.float32))
    for stream, options in (
        (reversed_, resume),
        (with_truth, resume),
        (stream_of(portrait), dataclasses.replace(resume, steps=6)),
        (stream_of(portrait), dataclasses.replace(resume, seed=4)),
    ):
        with pytest.raises(ExportError, match=r"^the checkpoint .* belongs to another model, clip or options"):
            compiled(portrait.module, stream, out, options)
    checkpoint.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(ExportError, match=r"^the checkpoint .* cannot be read"):
        compiled(portrait.module, stream_of(portrait), out, resume)
    assert not out.exists()


class Sheet(DeferredNeuralRenderer):
    """The deferred renderer, with its surface declared."""

    surface = Surface("atlas", ("condition", 0, 2), ("condition", 5))


def renderer(kind: type[DeferredNeuralRenderer]) -> DeferredNeuralRenderer:
    torch.manual_seed(2)
    return kind(32, (8, 8, 16), texture_channels=4, texture_size=8).eval()


def square(portrait: Any, *names: str) -> dict[str, np.ndarray]:
    """The portrait's sheet in a square picture."""
    arrays = {"condition": np.ascontiguousarray(portrait.stream["condition"][..., 8:40])}
    atlas = portrait.stream["atlas"].copy()
    atlas[:, 0] = ((atlas[:, 0] + 1) * 24 - 8) / 16 - 1  # x of a picture whose columns 8 to 40 are left
    return {name: {**arrays, "atlas": atlas}[name] for name in ("condition", *names)}


def test_the_renderer_without_its_surface(portrait: Any, tmp_path: Path) -> None:
    stream = InputStream.from_arrays(square(portrait))
    options = CompileOptions(steps=2, max_age=3, adapter=SMALL, train={"batch": 2})
    bundle = compiled(renderer(DeferredNeuralRenderer), stream, tmp_path / "r.warp", options)
    manifest = bundle.manifest
    assert [record.role for record in manifest.inputs] == ["generator"]
    assert "cache.atlas" not in {spec.name for spec in manifest.cache}
    # Its own last quarter, but at least 2 of 6 frames, is held back: age 1 on one frame.
    assert manifest.calibration is not None
    assert manifest.calibration["frames"] == 1
    assert set(manifest.calibration["exits"]["warp"]) == {"1"}
    assert manifest.fps is None
    # The cut was ranked among others, and is one of them.
    tensors = [candidate["tensors"] for candidate in manifest.cut.candidates]
    assert len(tensors) > 1
    assert tensors[0] == list(manifest.cut.tensors)
    for t, got in enumerate(answers(bundle.path, stream, 0)):
        np.testing.assert_array_equal(
            got["image"],
            direct(bundle.path, "generator", {"condition": stream.arrays["condition"][t : t + 1]})["image"],
        )


def test_nothing_is_trained_with_0_steps(portrait: Any, tmp_path: Path) -> None:
    # The stream has the atlas that training would take; without training it is left out.
    frames = square(portrait, "atlas")
    still = {name: np.repeat(array[:1], 3, 0) for name, array in frames.items()}  # and frames that never change
    module = renderer(Sheet)
    path = compiled(module, InputStream.from_arrays(still), tmp_path / "r.warp", CompileOptions(steps=0)).path
    manifest = Bundle.open(path).manifest
    assert [record.spec.name for record in manifest.inputs] == ["condition"]
    assert [record.name for record in manifest.exits] == ["whole", "plain"]
    assert sorted(entry.name for entry in path.iterdir()) == [
        "generator.onnx",
        "manifest.json",
        "plain.onnx",
        "producer.onnx",
        "weights.safetensors",
    ]
    assert manifest.created["training"] == {}
    calibration = json.loads((path / "manifest.json").read_text())["calibration"]
    assert calibration["exits"]["plain"]["1"]["ssim"]["mean"] == 1
    # Plain reuse at age 2: the producer of frame t - 2, the consumer's layers on frame t.
    stream = InputStream.from_arrays(frames)
    for t, got in list(enumerate(answers(path, stream, 2)))[2:]:
        cache = direct(path, "producer", {"condition": frames["condition"][t - 2 : t - 1]})
        expected = direct(path, "plain", {"condition": frames["condition"][t : t + 1], **cache})
        np.testing.assert_array_equal(got["image"], expected["image"])


@pytest.mark.usefixtures("traced_once")
def test_a_module_that_was_training_goes_on_doing_so(portrait: Any, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1))
    module.train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    x = np.random.default_rng(0).uniform(-1, 1, (4, 3, 16, 16)).astype(np.float32)
    compiled(module, InputStream.from_arrays({"input": x}), tmp_path / "m.warp", CompileOptions(steps=0, cut="relu"))
    assert module.training
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


class Points(nn.Module):
    """A generator whose output is no image: eight points."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Linear(16, 8)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.second(torch.relu(self.first(image))))
        return {"points": self.last(x.mean((2, 3)))}


def test_an_output_that_is_no_image(tmp_path: Path) -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (4, 3, 16, 16)).astype(np.float32)
    stream = InputStream.from_arrays({"image": x})
    stages: Stages = []
    with pytest.raises(ExportError, match=r"^output 'points' is float32 \(1, 8\); the warp adapter needs .*--steps 0"):
        compiled(Points(), stream, tmp_path / "p.warp", CompileOptions(steps=2), progress=lambda *s: stages.append(s))
    assert {stage for stage, _, _ in stages} == {"tracing the generator"}  # found out before the cut was searched for
    path = compiled(Points(), stream, tmp_path / "p.warp", CompileOptions(steps=0)).path
    manifest = Bundle.open(path).manifest
    assert (manifest.image_output, manifest.calibration) == (None, None)
    with torch.no_grad():
        expected = Points()(torch.from_numpy(x))["points"].numpy()
    got = np.concatenate([outputs["points"] for outputs in answers(path, stream, 0)])
    # Sums of 16 to 144 products and a mean over 256 pixels, in another order.
    np.testing.assert_allclose(got, expected, atol=1e-5)
    with pytest.raises(InputError, match=r"^the inputs hold a truth, but no output is an image"):
        compiled(Points(), InputStream.from_arrays({"image": x}, truth=x), tmp_path / "q.warp", CompileOptions(steps=0))


@pytest.mark.usefixtures("traced_once")
def test_a_split_model_is_exact_and_calibrated(portrait: Any, tmp_path: Path) -> None:
    arrays = {name: portrait.stream[name] for name in ("condition", "pose", "person")}
    stream = InputStream.from_arrays(arrays)
    bundle = split_model(
        portrait.model, stream, tmp_path / "s.warp", cut="deep", made_from={}, progress=lambda *_: None
    )
    for t, got in enumerate(answers(bundle.path, stream, 0)):
        expected = run_model(portrait.model, portrait.frame(t), threads=1)
        for name in expected:
            np.testing.assert_array_equal(got[name], expected[name])
    assert bundle.manifest.calibration is not None
    assert bundle.manifest.calibration["frames"] == 2  # ages up to 4 of 6 frames
    for wrong, opening in (
        (
            {**arrays, "extra": arrays["pose"]},
            "the inputs hold extra, which it does not take; the model takes condition",
        ),
        ({"condition": arrays["condition"], "person": arrays["person"]}, "the inputs lack pose; the model takes"),
    ):
        with pytest.raises(InputError, match="^" + opening):
            split_model(
                portrait.model,
                InputStream.from_arrays(wrong),
                tmp_path / "t.warp",
                made_from={},
                progress=lambda *_: None,
            )


def test_a_full_disk_leaves_nothing(
    portrait: Any, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, traced_once: None
) -> None:
    write, written = bundle_writing._write, []

    def fail_at_third(target: Path, content: Path | bytes) -> Any:
        written.append(target)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(target, content)

    monkeypatch.setattr(bundle_writing, "_write", fail_at_third)
    with pytest.raises(BundleError, match=r"^the disk is full: bundle .*p\.warp needs [0-9]+ bytes"):
        compiled(portrait.module, stream_of(portrait), tmp_path / "p.warp", UNTRAINED)
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    assert list(tmp_path.iterdir()) == []

    def fail(models: object, folder: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", f"{folder}/weights.safetensors")

    monkeypatch.setattr(bundling, "shared_weights", fail)
    with pytest.raises(BundleError, match=r"^the weights cannot be put together in .*No space left"):
        compiled(portrait.module, stream_of(portrait), tmp_path / "p.warp", UNTRAINED)
    assert list(tmp_path.iterdir()) == list(temporary.iterdir()) == []


def test_what_cannot_be_written_is_refused_before_any_work(portrait: Any, tmp_path: Path) -> None:
    stages: Stages = []
    (tmp_path / "folder.warp").mkdir()
    (tmp_path / "link.warp").symlink_to(tmp_path / "nowhere")
    for name, opening in (
        ("folder.warp", r".*folder\.warp exists already; remove it or choose another name"),
        ("link.warp", r".*link\.warp exists already"),
        ("bundle.onnx", r"a bundle's name ends in \.warp, but '.*bundle\.onnx' was given"),
    ):
        for work in (
            partial(compiled, portrait.module, options=TRAINED),
            partial(split_model, portrait.model, made_from={}),
        ):
            with pytest.raises(BundleError, match="^" + opening):
                work(stream=stream_of(portrait), out=tmp_path / name, progress=lambda *s: stages.append(s))
    assert stages == []


def without(stream: InputStream, name: str) -> InputStream:
    return dataclasses.replace(stream, arrays={k: v for k, v in stream.arrays.items() if k != name})


def changed(stream: InputStream, **arrays: np.ndarray) -> InputStream:
    return dataclasses.replace(stream, arrays={**stream.arrays, **arrays})


@pytest.mark.usefixtures("traced_once")
def test_streams_that_do_not_fit_are_refused(portrait: Any, tmp_path: Path) -> None:
    whole, pose, atlas = stream_of(portrait), portrait.stream["pose"], portrait.stream["atlas"]
    with_truth = dataclasses.replace(whole, truth=np.zeros((6, 3, 16, 16), np.float32))
    one, three = (stream_of(portrait, slice(0, frames)) for frames in (1, 3))
    no_pose, no_atlas = without(whole, "pose"), without(whole, "atlas")
    # What is refused, how the message begins, the inputs, the holdout.
    cases: list[tuple[type[WarpcacheError], str, InputStream, InputStream | None]] = [
        (InputError, r"forward needs input 'pose', which is not given", no_pose, None),
        (InputError, r"forward has no input 'poses'; did you mean pose", changed(whole, poses=pose), None),
        (InputError, r"input 'pose' has dtype float64; convert", changed(whole, pose=pose.astype(np.float64)), None),
        (ExportError, r"the generator fails on the example \(.*\.py:\d+\)", changed(whole, pose=pose[:, :4]), None),
        (
            ExportError,
            r"the generator fails on the example \(.*\.py:\d+\)",
            changed(whole, pose=pose[:, None, :2]),
            None,
        ),
        (ExportError, r"the generator declares a surface, but the inputs hold no array 'atlas'", no_atlas, None),
        (
            InputError,
            r"the atlas 'atlas' has dtype float64; conv",
            changed(whole, atlas=atlas.astype(np.float64)),
            None,
        ),
        (ExportError, r"the atlas 'atlas' has shape \(4, 2, 24, 24\)", changed(whole, atlas=atlas[:, :2]), None),
        (InputError, r"the inputs hold 3 frames; training and calibration need at least 4", three, None),
        (InputError, r"training needs at least 2 frames, the inputs hold 1", one, whole),
        (InputError, r"the holdout lacks 'pose', which the training inputs have", whole, no_pose),
        (InputError, r"the holdout lacks 'pose'", whole, changed(no_pose, other=pose)),
        (InputError, r"holdout array 'pose' is float32 \(4,\) a frame, the", whole, changed(whole, pose=pose[:, :4])),
        (InputError, r"holdout array 'person' is int32", whole, changed(whole, person=np.array([3], np.int32))),
        (InputError, r"the truth is \[3, 16, 16\] a frame, but output 'image' is \[3, 32, 48\]", with_truth, None),
        (InputError, r"the truth is \[3, 16, 16\] a frame", whole, with_truth),
    ]
    for kind, opening, stream, holdout in cases:
        stages: Stages = []
        with pytest.raises(kind, match="^" + opening):
            compiled(
                portrait.module,
                stream,
                tmp_path / "p.warp",
                TRAINED,
                holdout=holdout,
                progress=lambda *s, stages=stages: stages.append(s),
            )
        # Before the cut is searched for, which may take minutes.
        assert {stage for stage, _, _ in stages} <= {"tracing the generator"}, opening
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("frames", [1, 2, 3, 4])
def test_short_streams_are_enough_where_nothing_is_trained(portrait: Any, tmp_path: Path, frames: int) -> None:
    stream = stream_of(portrait, slice(0, frames))
    bundle = compiled(portrait.module, stream, tmp_path / "p.warp", UNTRAINED)
    assert (bundle.manifest.calibration is None) == (frames == 1)
    if frames == 1:
        with pytest.raises(InputError, match=r"^choosing a cut needs at least 2 frames"):
            compiled(portrait.module, stream, tmp_path / "q.warp", dataclasses.replace(UNTRAINED, cut="auto"))


@pytest.mark.usefixtures("traced_once")
def test_cuts_and_budgets_that_cannot_be_had(portrait: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = stream_of(portrait)
    with pytest.raises(InputError, match=r"(?s)^.*'depe'.*deep") as info:
        compiled(portrait.module, stream, tmp_path / "p.warp", dataclasses.replace(TRAINED, cut="depe"))
    assert "Traceback" not in str(info.value)
    # One size to try is enough here; a generator as small as this one is cheaper than any adapter.
    monkeypatch.setattr(adapter_training, "choose_configs", partial(choose_configs, ladder=LADDER[-1:]))
    budget = dataclasses.replace(TRAINED, adapter=None, budget=0.001)
    with pytest.raises(
        ExportError, match=r"^the smallest warp adapter costs .*, over the budget of 0\.1%; (give|comp)"
    ):
        compiled(portrait.module, stream, tmp_path / "p.warp", budget)
    for wrong in ({"budget": 0.0}, {"budget": 1.5}, {"steps": -1}, {"max_age": 0}):
        ((name, value),) = wrong.items()
        with pytest.raises(InputError, match=f"^{name} is {value}; it must be "):
            CompileOptions(**wrong)
    assert list(tmp_path.iterdir()) == []


class Branching(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        if image.mean() > 0:  # THE LINE
            return image
        return -image


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.deep, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        return self.last(torch.relu(self.deep(image)))


def test_generators_that_cannot_be_compiled(tmp_path: Path) -> None:
    lines = Path(__file__).read_text().splitlines()
    line = next(k for k, text in enumerate(lines, 1) if text.endswith("# THE LINE"))
    x = np.random.default_rng(0).uniform(-1, 1, (4, 3, 30, 30)).astype(np.float32)
    stream = InputStream.from_arrays({"image": x})
    with pytest.raises(ExportError, match=rf"^the generator cannot be traced \(.*test_compile\.py:{line}\)"):
        compiled(Branching(), stream, tmp_path / "b.warp", CompileOptions(steps=2))
    with pytest.raises(ExportError, match=r"^the output is 30x30, the warp adapter needs multiples of 4; pad"):
        compiled(Odd(), stream, tmp_path / "o.warp", CompileOptions(steps=2, cut="deep", adapter=SMALL))
    assert list(tmp_path.iterdir()) == []


def test_lpips_trains_the_rgb_output(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(adapter_training, "PerceptualLoss", lambda weights: lambda a, b: (a - b).abs().sum((0, 2, 3)))

    def seen(*channels: int, size: int = 32) -> list[float] | None:
        outputs = tuple((f"o{k}", count) for k, count in enumerate(channels))
        layout = AdapterLayout(size, size, outputs, (), (), ())
        loss = adapter_training.perceptual_loss(Path("weights"), layout)
        if loss is None:
            return None
        a = torch.arange(float(sum(channels)))[None, :, None, None].expand(1, -1, 1, 1)
        return loss(a, torch.zeros_like(a)).tolist()

    assert seen(3) == [0, 1, 2]
    assert seen(1, 3, 3) == [1, 2, 3]
    assert not caplog.records
    assert seen(1, 2) is None
    assert seen(3, size=16) is None
    assert len(caplog.records) == 2  # said, not silently left out
    assert adapter_training.perceptual_loss(None, AdapterLayout(32, 32, (("o", 3),), (), (), ())) is None

"""`warpcache compile` and `split` as a user calls them: what they make, and one sentence for what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from warpcache.cli.main import cli
from warpcache.engine.bundle.bundle import Bundle
from warpcache.export import compile as compile_module
from warpcache.export.adapter import training as adapter_training
from warpcache.export.adapter.distill import Distillation
from warpcache.export.adapter.layout import AdapterConfig
from warpcache.export.compile import CompileOptions
from warpcache.export.graph.trace import trace_generator
from warpcache.tasks.choices import CompileChoice
from warpcache.tasks.compile import compile_files

MODEL = '''
import torch
from torch import nn


class Generator(nn.Module):
    """Two inputs, one image; `deep` is what a cache is worth."""

    def __init__(self):
        super().__init__()
        self.pose = nn.Linear(4, 8)
        self.start = nn.Conv2d(3, 8, 3, padding=1)
        self.deep = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.SiLU()) for _ in range(3)))
        self.last = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, condition, pose):
        x = self.start(condition) + self.pose(pose)[:, :, None, None]
        return torch.tanh(self.last(self.deep(x) + x))


class Filter(nn.Module):
    """An image in, an image out."""

    def __init__(self):
        super().__init__()
        self.deep = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.last = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, picture):
        return torch.tanh(self.last(torch.relu(self.deep(picture))) + picture)


class Branching(Generator):
    def forward(self, condition, pose):
        if pose.sum() > 0:  # this line
            return super().forward(condition, pose)
        return condition


class Spelled(Generator):
    def forward(self, condition, pose):
        return torch.special.bessel_j0(super().forward(condition, pose))


def number():
    return 3


def broken():
    raise RuntimeError("no such day")
'''
SIZE, FRAMES = 32, 6
STEPS_0 = ("--steps", "0", "--cut", "deep")


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="warpcache")


def assert_failed(result: Result, opening: str, folder: Path) -> str:
    """One sentence on stderr that begins with `opening`, exit code 1, and nothing new in the folder."""
    assert result.exit_code == 1, (result.output, result.exception)
    lines = [line for line in result.stderr.splitlines() if not line.endswith(" ...")]  # stages of a progress bar
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith(f"warpcache: {opening}"), lines[0]
    assert "Traceback" not in result.output
    assert not [entry.name for entry in folder.iterdir() if "warp" in entry.name or "checkpoint" in entry.name]
    return lines[0]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder: a module with generators, weights, training and test frames."""
    monkeypatch.chdir(tmp_path)
    # LPIPS of the machine that runs the tests is not the user's.
    monkeypatch.delenv("WARPCACHE_LPIPS", raising=False)
    (tmp_path / "my_models.py").write_text(MODEL)
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    save_file(generator("Generator", 1).state_dict(), tmp_path / "weights.safetensors")
    np.savez(tmp_path / "train.npz", **frames(0), fps=20.0)
    np.savez(tmp_path / "test.npz", **frames(1), truth=frames(2)["condition"])
    return tmp_path


def frames(seed: int) -> dict[str, np.ndarray]:
    """A pattern that slides a pixel a frame, and a pose."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(-1, 1, (3, 12, 12)).astype(np.float32)
    fine = np.kron(coarse, np.ones((1, 4, 4), np.float32))
    return {
        "condition": np.stack([fine[:, t : t + SIZE, t : t + SIZE] for t in range(FRAMES)]),
        "pose": rng.standard_normal((FRAMES, 4)).astype(np.float32),
    }


def generator(name: str, seed: int) -> torch.nn.Module:
    scope: dict[str, Any] = {}
    exec(MODEL, scope)
    torch.manual_seed(seed)
    module: torch.nn.Module = scope[name]().eval()
    return module


def compile_(folder: Path, *options: Any, model: str = "my_models.py:Generator", inputs: str = "train.npz") -> Result:
    return call("compile", model, "--inputs", folder / inputs, "--out", folder / "g.warp", *options)


def test_compile_trains_and_reports(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A generator this small is cheaper than any adapter: the size is given, the rest is as the user has it.
    small = AdapterConfig(width=8, blocks=0, features=8, encoder_width=8)
    monkeypatch.setattr(adapter_training, "choose_configs", lambda *_, **__: (small,))
    result = compile_(
        folder,
        "--weights", folder / "weights.safetensors", "--holdout", folder / "test.npz", "--cut", "deep",
        "--steps", "2", "--max-age", "2", "--seed", "5", "--json", folder / "report.json",
    )  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    assert f"wrote {folder / 'g.warp'}" in result.stdout
    assert sorted(entry.name for entry in folder.iterdir() if entry.name[0] not in "._") == [
        "g.warp", "my_models.py", "report.json", "test.npz", "train.npz", "weights.safetensors"
    ]  # fmt: skip
    manifest = Bundle.open(folder / "g.warp").manifest
    assert [record.name for record in manifest.exits] == ["whole", "plain", "warp"]
    assert manifest.fps == 20.0
    assert manifest.created["options"] == {
        "factory": "my_models.py:Generator", "inputs": "train.npz", "cut": "deep", "budget": 0.1, "steps": 2,
        "max_age": 2, "seed": 5, "lpips": False,
    }  # fmt: skip
    assert (manifest.created["training"]["seed"], manifest.created["training"]["max_age"]) == (5, 2)
    report = json.loads((folder / "report.json").read_text())
    assert (report["schema"], report["command"]) == (1, "compile")
    assert report["rows"]

    # The weights were the file's, not the factory's: at age 0 the bundle is that generator.
    np.savez(folder / "inputs.npz", **frames(3))
    result = call("run", folder / "g.warp", folder / "inputs.npz", "--out", folder / "out.npz", "--age", "0")
    assert result.exit_code == 0, result.output
    with torch.no_grad():
        expected = generator("Generator", 1)(*(torch.from_numpy(array) for array in frames(3).values())).numpy()
    with np.load(folder / "out.npz") as out:
        # Sums of at most 72 products in another order, five layers deep.
        np.testing.assert_allclose(out["image"], expected, atol=1e-5)


def test_compile_without_training_and_weights(folder: Path) -> None:
    result = compile_(folder, *STEPS_0)
    assert result.exit_code == 0, (result.output, result.exception)
    manifest = Bundle.open(folder / "g.warp").manifest
    assert [record.name for record in manifest.exits] == ["whole", "plain"]
    # What stands there is never written over, and is found out before any work.
    before = {entry.name: entry.read_bytes() for entry in (folder / "g.warp").iterdir()}
    for again in (
        compile_(folder, *STEPS_0),
        compile_(folder, *STEPS_0, model="no_such_module:f"),
        call("split", folder / "no.onnx", "--inputs", folder / "train.npz", "--out", folder / "g.warp"),
    ):
        assert again.exit_code == 1
        assert again.stderr.startswith("warpcache: ")
        assert "g.warp' already exists; remove it or choose another --out" in again.stderr
        assert len(again.stderr.splitlines()) == 1
    assert before == {entry.name: entry.read_bytes() for entry in (folder / "g.warp").iterdir()}


def test_frames_of_a_video_are_the_one_input(folder: Path) -> None:
    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        for picture in frames(4)["condition"]:
            pixels = np.ascontiguousarray(((picture + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    # The forward's parameter is called `picture`; a video has no name for its frames.
    result = compile_(folder, *STEPS_0, model="my_models.py:Filter", inputs="clip.mp4")
    assert result.exit_code == 0, (result.output, result.exception)
    manifest = Bundle.open(folder / "g.warp").manifest
    assert [(r.spec.name, r.spec.shape) for r in manifest.inputs] == [("picture", (1, 3, SIZE, SIZE))]
    assert manifest.fps == 10.0


@pytest.mark.parametrize(
    ("model", "opening"),
    [
        ("my_models.py", "'my_models.py' is not of the form MODULE:FACTORY"),
        ("my_model:Generator", "there is no module 'my_model' in "),
        ("my_model.py:Generator", "there is no file my_model.py; give MODULE:FACTORY"),
        ("my_models.py:generator", "my_models.py has no 'generator'; did you mean Generator"),
        ("my_models.py:number", "my_models.py:number returns a int; it must return a torch.nn.Module"),
        ("my_models.py:broken", "my_models.py:broken fails when called without arguments ("),
        ("my_models.py:Branching", "the generator cannot be traced ("),
        ("my_models.py:Spelled", "the generator uses an operator that ONNX does not have"),
    ],
)
def test_generators_that_cannot_be_had(folder: Path, model: str, opening: str) -> None:
    line = assert_failed(compile_(folder, *STEPS_0, model=model), opening, folder)
    if model.endswith("Branching"):
        number = 1 + MODEL.splitlines().index("        if pose.sum() > 0:  # this line")
        assert f"my_models.py:{number})" in line
    if model.endswith("Spelled"):
        assert "bessel_j0" in line


Spoil = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def nan_in_frame_2(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    pose = arrays["pose"].copy()
    pose[2, 1] = np.nan
    return {**arrays, "pose": pose}


@pytest.mark.parametrize(
    ("spoil", "opening"),
    [
        (
            lambda a: {"condition": a["condition"]},
            "forward needs input 'pose', which is not given; given are condition",
        ),
        (
            lambda a: {"conditions": a["condition"], "pose": a["pose"]},
            "forward has no input 'conditions'; did you mean",
        ),
        (lambda a: {**a, "pose": a["pose"].astype(np.float64)}, "input 'pose' has dtype float64; convert it to"),
        (lambda a: {**a, "pose": a["pose"][:, :3]}, "the generator fails on the example ("),
        (lambda a: {**a, "condition": a["condition"][:, 0]}, "the generator fails on the example ("),
        (lambda a: {**a, "pose": a["pose"][:5]}, "inputs 'train.npz': array 'condition' has 6 frames but 'pose' has 5"),
        (nan_in_frame_2, "inputs 'train.npz': array 'pose' holds NaN or Inf, first in frame 2"),
        (lambda a: {k: v[:0] for k, v in a.items()}, "inputs 'train.npz': array 'condition' has no frames"),
        (lambda a: {k: v[:1] for k, v in a.items()}, "the inputs hold 1 frames; training and calibration need"),
        (lambda a: {**a, "truth": a["condition"][:, :, :16]}, "the truth is [3, 16, 32] a frame, but output 'image'"),
        (lambda a: {}, "inputs 'train.npz' holds no input arrays"),
    ],
)
def test_inputs_that_do_not_fit(folder: Path, spoil: Spoil, opening: str) -> None:
    np.savez(folder / "train.npz", **spoil(frames(0)))
    result = call("compile", "my_models.py:Generator", "--inputs", "train.npz", "--out", "g.warp", "--steps", "2")
    assert_failed(result, opening, folder)


def test_files_that_are_no_inputs(folder: Path) -> None:
    (folder / "half.npz").write_bytes((folder / "train.npz").read_bytes()[:3000])
    (folder / "train.txt").write_text("frames")
    for name, opening in (
        ("half.npz", f"inputs {str(folder / 'half.npz')!r} is not an .npz"),
        ("none.npz", f"inputs {str(folder / 'none.npz')!r} do not exist"),
        ("train.txt", f"inputs {str(folder / 'train.txt')!r} must be an .npz or an .mp4"),
    ):
        assert_failed(compile_(folder, *STEPS_0, inputs=name), opening, folder)
        assert_failed(compile_(folder, *STEPS_0, "--holdout", folder / name), opening, folder)
    np.savez(folder / "other.npz", condition=frames(0)["condition"])
    assert_failed(compile_(folder, *STEPS_0, "--holdout", folder / "other.npz"), "the holdout lacks 'pose'", folder)


def test_weights_that_do_not_fit(folder: Path) -> None:
    (folder / "weights.pt").write_bytes(b"\x80\x04.")
    (folder / "half.safetensors").write_bytes((folder / "weights.safetensors").read_bytes()[:500])
    save_file({"start.weight": torch.zeros(8, 3, 3, 3)}, folder / "few.safetensors")
    for name, opening in (
        ("weights.pt", "weights.pt is a pickle, and pickle is never loaded"),
        ("half.safetensors", "half.safetensors is no intact safetensors file"),
        ("few.safetensors", "few.safetensors does not fit the generator; missing: "),
        ("none.safetensors", "there is no weights file "),
    ):
        assert_failed(compile_(folder, *STEPS_0, "--weights", folder / name), opening, folder)


def test_a_cut_that_does_not_exist_lists_the_nearest(folder: Path) -> None:
    result = compile_(folder, "--steps", "0", "--cut", "deeep")
    assert "deep" in assert_failed(result, "", folder).replace("deeep", "")


def test_a_resume_of_nothing(folder: Path) -> None:
    assert_failed(compile_(folder, "--resume", "--steps", "2"), "there is no checkpoint ", folder)


def test_exits_are_handed_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(Exception):
        pass

    asked: dict[str, Any] = {}

    def compile_generator(*_: object, **more: Any) -> None:
        asked.update(more)
        raise Asked

    monkeypatch.setattr(compile_module, "compile_generator", compile_generator)

    def options(**more: Any) -> CompileOptions:
        choice = CompileChoice(
            inputs=folder / "train.npz", cut="deep", budget=0.2, steps=30, out=folder / "g.warp", seed=5, max_age=2,
            **more,
        )  # fmt: skip
        with pytest.raises(Asked):
            compile_files("my_models.py:Generator", choice, progress=lambda *_: None)
        given: CompileOptions = asked["options"]
        return given

    given = options(exits=4, metric="psnr", bank_size=0)
    assert (given.exits, given.promised_metric, given.consumers, given.branches) == (4, "psnr_db", 2, 2)
    assert given.branch_options().bank_size == 0
    assert asked["made_from"]["exits"] == 4
    assert asked["made_from"]["metric"] == "psnr_db"
    # Without them, the record of a bundle is what it was before there were exits.
    assert options().exits is None
    assert "exits" not in asked["made_from"]


@pytest.mark.parametrize(
    ("options", "opening"),
    [
        (
            ("--exits", "2", "--metric", "lpips"),
            "quality cannot be promised in lpips without its weights; give --lpips",
        ),
        (("--exits", "2", "--steps", "0"), "2 exits were asked for with 0 steps, but exits are trained"),
        (("--exits", "2", "--metric", "ms-ssim", "--cut", "deep"), "metric ms-ssim needs images of 161 pixels"),
        (
            ("--exits", "2", "--metric", "psnr", "--cut", "deep"),
            "a promise at ages up to 4 and confidence 0.95 needs 32",
        ),
    ],
)
def test_exits_that_cannot_be(folder: Path, options: tuple[str, ...], opening: str) -> None:
    assert_failed(compile_(folder, *options), opening, folder)


def test_an_interrupt_is_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compile_module, "trace_generator", interrupted)
    assert_failed(compile_(folder, *STEPS_0), "interrupted", folder)


def test_an_interrupted_training_names_its_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    small = AdapterConfig(width=8, blocks=0, features=8, encoder_width=8)
    monkeypatch.setattr(adapter_training, "choose_configs", lambda *_, **__: (small,))
    monkeypatch.setattr(Distillation, "_train_step", interrupted)
    result = compile_(folder, "--steps", "3", "--cut", "deep")
    assert result.exit_code == 1
    assert "the training so far is in" in result.stderr
    assert "--resume" in result.stderr
    assert list(folder.glob("*.checkpoint.safetensors"))
    assert not list(folder.glob("*.warp"))


def test_split_cuts_a_model_of_unknown_sizes(folder: Path) -> None:
    model = trace_generator(generator("Generator", 1), {name: array[:1] for name, array in frames(0).items()})
    # As other exporters write them: the batch is a name.
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.save(model, folder / "g.onnx")

    def split(*options: Any, path: str = "g.onnx", inputs: str = "train.npz") -> Result:
        return call("split", folder / path, "--inputs", folder / inputs, "--out", folder / "g.warp", *options)

    (folder / "half.onnx").write_bytes((folder / "g.onnx").read_bytes()[:700])
    np.savez(folder / "odd.npz", condition=frames(0)["condition"])
    for result, opening in (
        (split(path="none.onnx"), f"the model {str(folder / 'none.onnx')!r} does not exist"),
        (split(path="half.onnx"), f"{str(folder / 'half.onnx')!r} is not a"),
        (split(inputs="odd.npz"), "the inputs lack pose; the model takes condition, pose"),
        (split(inputs="none.npz"), f"inputs {str(folder / 'none.npz')!r} do not exist"),
        (split("--cut", "depe"), ""),
    ):
        assert_failed(result, opening, folder)
    result = split("--cut", "deep", "--json", folder / "s.json")
    assert result.exit_code == 0, (result.output, result.exception)
    assert f"wrote {folder / 'g.warp'}" in result.stdout
    manifest = Bundle.open(folder / "g.warp").manifest
    assert [record.name for record in manifest.exits] == ["whole", "plain"]
    assert manifest.created["options"] == {"model": "g.onnx", "inputs": "train.npz", "cut": "deep"}
    assert json.loads((folder / "s.json").read_text())["command"] == "split"


def test_without_torch_compile_says_what_to_install(folder: Path) -> None:
    # An installation without the extra: the same, but that importing torch fails.
    program = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from warpcache.cli.main import main\n"
        "sys.argv = ['warpcache', 'compile', 'my_models.py:Generator', '--inputs', 'train.npz', '--out', 'g.warp']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == 'warpcache: torch is not installed; compile and split need pip install "warpcache[export]"\n'

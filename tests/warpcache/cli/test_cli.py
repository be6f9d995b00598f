"""The command line: what each command does, its exit codes, and one sentence for everything a user can cause."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner, Result

import warpcache.tasks.bench
from warpcache import __version__
from warpcache.cli.main import cli
from warpcache.engine.errors import WarpcacheError

COMMANDS = ("demo", "compile", "split", "build", "run", "bench", "inspect", "doctor")
FRAMES = 7


def call(*arguments: Any) -> Result:
    """Run the command line in this process; errors that are no `Failure` surface as `Result.exception`."""
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="warpcache")


def assert_failed(result: Result, opening: str) -> None:
    """The command failed with one sentence on stderr that begins with `opening`, and no traceback."""
    assert result.exit_code == 1, result.output
    lines = [line for line in result.stderr.splitlines() if not line.endswith(" ...")]  # stages of a progress bar
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith(f"warpcache: {opening}"), result.stderr
    assert "Traceback" not in result.output


def whole(bundle: Path, x: np.ndarray) -> np.ndarray:
    """What the whole generator answers, by ONNX Runtime alone: [T, 3, H, W]."""
    session = onnxruntime.InferenceSession(bundle / "generator.onnx", providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(["image"], {"x": frame[None]})[0] for frame in x])


@pytest.fixture
def frames() -> np.ndarray:
    """Inputs of the tiny bundle: float32 [7, 3, 16, 16] in [-1, 1]."""
    return np.random.default_rng(3).uniform(-1, 1, (FRAMES, 3, 16, 16)).astype(np.float32)


@pytest.fixture
def inputs(tmp_path: Path, frames: np.ndarray) -> Path:
    path = tmp_path / "inputs.npz"
    np.savez(path, x=frames, fps=50.0)
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0
    assert f"Example:  warpcache {command} " in result.stdout


def test_help_and_version() -> None:
    result = call("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert command in result.stdout
    assert call("--version").stdout == f"warpcache, version {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["run"],
        ["run", "b.warp", "x.npz"],
        ["run", "b.warp", "x.npz", "--out", "y.gif"],
        ["run", "b.warp", "x.npz", "--out", "y.npz", "--policy", "every:0"],
        ["run", "b.warp", "x.npz", "--out", "y.npz", "--policy", "sometimes"],
        ["run", "b.warp", "x.npz", "--out", "y.npz", "--policy", "full", "--age", "1"],
        ["run", "b.warp", "x.npz", "--out", "y.npz", "--age", "-1"],
        ["run", "b.warp", "x.npz", "--out", "y.npz", "--fps", "0"],
        ["demo", "--frames", "0"],
        ["compile", "m:f", "--inputs", "x.npz", "--out", "b.onnx"],
        ["compile", "m:f", "--inputs", "x.npz", "--out", "b.warp", "--budget", "1.5"],
        ["compile", "m:f", "--inputs", "x.npz", "--out", "b.warp", "--steps", "-1"],
        ["bench", "b.warp"],
        ["inspect", "b.warp", "--json"],
    ],
)
def test_wrong_usage_ends_with_2(arguments: list[str]) -> None:
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert "Error: " in result.stderr
    assert "Traceback" not in result.output


def test_run_at_age_0_is_the_generator(tiny_bundle: Path, inputs: Path, frames: np.ndarray, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    result = call("run", tiny_bundle, inputs, "--out", out, "--age", "0")
    assert result.exit_code == 0, result.output
    with np.load(out) as arrays:
        assert list(arrays) == ["image"]
        # Bit for bit: age 0 runs the generator's own layers, split in two.
        np.testing.assert_array_equal(arrays["image"], whole(tiny_bundle, frames))


def test_run_in_lockstep_uses_the_cache_of_that_age(
    tiny_bundle: Path, inputs: Path, frames: np.ndarray, tmp_path: Path
) -> None:
    out, report = tmp_path / "out.npz", tmp_path / "run.json"
    result = call("run", tiny_bundle, inputs, "--out", out, "--age", "2", "--json", report)
    assert result.exit_code == 0, result.output
    image = whole(tiny_bundle, frames)
    with np.load(out) as arrays:
        for t in range(2, FRAMES):
            # The tiny warp exit answers y_s + 0.1 x_t; one multiplication and one addition in float32.
            np.testing.assert_allclose(arrays["image"][t], image[t - 2] + np.float32(0.1) * frames[t], atol=1e-6)
    document = json.loads(report.read_text())
    assert (document["schema"], document["command"]) == (1, "run")
    assert document["rows"][0]["age"]["max"] == 2


def test_run_writes_a_video(tiny_bundle: Path, inputs: Path, tmp_path: Path) -> None:
    from warpcache.media.video import read_video

    out = tmp_path / "new" / "out.mp4"
    result = call("run", tiny_bundle, inputs, "--out", out, "--policy", "every:3")
    assert result.exit_code == 0, result.output
    video = read_video(out)
    assert video.frames.shape == (FRAMES, 3, 16, 16)
    assert video.fps == pytest.approx(50)  # the clip's own
    assert [entry.name for entry in out.parent.iterdir()] == ["out.mp4"]


def test_bench_measures_every_policy(tiny_bundle: Path, tmp_path: Path, frames: np.ndarray) -> None:
    from warpcache.engine.metrics.images import psnr

    image = whole(tiny_bundle, frames)
    inputs, out = tmp_path / "inputs.npz", tmp_path / "bench.json"
    np.savez(inputs, x=frames, truth=np.clip(image, -1, 1))
    policies = ["--policy", "every:2", "--policy", "full", "--age", "1"]
    result = call("bench", tiny_bundle, inputs, *policies, "--json", out)
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text())
    assert document["schema"] == 1
    assert document["command"] == "bench"
    assert document["environment"]["packages"]["warpcache"] == __version__
    rows = {row["policy"]: row for row in document["rows"]}
    assert list(rows) == ["every:2", "full", "lockstep:1"]
    for row in rows.values():
        assert row["frames"] == FRAMES
        latency = row["latency_ms"]
        assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"] <= latency["max"]
        assert row["fps"] > 0
    assert rows["full"]["age"] == {"mean": 0, "max": 0}
    assert rows["full"]["quality"]["psnr_db"] == 100  # identical: the stated cap
    assert rows["full"]["quality"]["flip"] == 0
    assert rows["every:2"]["age"] == {"mean": pytest.approx(3 / FRAMES), "max": 1}
    # At age 0 the frame is exact; at age 1 the answer is y_{t-1} + 0.1 x_t.
    expected = [
        100.0 if t % 2 == 0 else psnr(image[t - 1] + np.float32(0.1) * frames[t], image[t]) for t in range(FRAMES)
    ]
    # Same float32 images but for the last bit of one addition, which moves a PSNR of 20 dB by far less than this.
    assert rows["every:2"]["quality"]["psnr_db"] == pytest.approx(np.mean(expected), abs=1e-3)


def test_bench_takes_the_whole_generator_as_reference_unasked(tiny_bundle: Path, inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    result = call("bench", tiny_bundle, inputs, "--policy", "async", "--fps", "200", "--json", out)
    assert result.exit_code == 0, result.output
    (row,) = json.loads(out.read_text())["rows"]
    assert row["policy"] == "async"
    assert row["quality"]["against"] == "whole generator"
    assert row["quality"]["psnr_db"] > 0


def test_inspect_shows_what_is_in_a_bundle(tiny_bundle: Path) -> None:
    result = call("inspect", tiny_bundle)
    assert result.exit_code == 0, result.output
    for word in ("tiny", "cache.h", "cache.y_s", "plain.onnx", "weights.safetensors", "not calibrated", "10.0%"):
        assert word in result.stdout, word


def test_a_missing_bundle(tmp_path: Path) -> None:
    assert_failed(call("inspect", tmp_path / "none.warp"), "bundle")


def test_an_altered_bundle(make_bundle: Any, inputs: Path, tmp_path: Path) -> None:
    bundle = make_bundle()
    with (bundle / "plain.onnx").open("r+b") as file:
        file.write(b"\0")
    out = tmp_path / "out.npz"
    result = call("run", bundle, inputs, "--out", out)
    assert_failed(result, "bundle")
    assert "plain.onnx" in result.stderr
    assert not out.exists()


def test_missing_and_wrong_inputs(tiny_bundle: Path, frames: np.ndarray, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    result = call("run", tiny_bundle, tmp_path / "none.npz", "--out", out)
    assert result.exit_code == 1
    assert "none.npz" in result.stderr
    for arrays, word in (
        ({"y": frames}, "'x'"),
        ({"x": frames[:, :2]}, "'x'"),
        ({"x": np.where(frames > 0.99, np.float32(np.nan), frames)}, "NaN"),
        ({"x": frames[:0]}, "'x'"),
    ):
        np.savez(tmp_path / "wrong.npz", **arrays)
        result = call("run", tiny_bundle, tmp_path / "wrong.npz", "--out", out)
        assert result.exit_code == 1, result.output
        assert word in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert not out.exists()


def test_an_existing_bundle_is_not_overwritten(make_bundle: Any, inputs: Path) -> None:
    bundle = make_bundle()
    before = (bundle / "manifest.json").read_bytes()
    for command, source in (("compile", "m:f"), ("split", "m.onnx")):
        assert_failed(call(command, source, "--inputs", inputs, "--out", bundle), f"'{bundle}' already exists")
    assert (bundle / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("missing", ["torch", "onnx"])
def test_compile_without_the_export_extra_says_what_to_install(missing: str, inputs: Path, tmp_path: Path) -> None:
    # In a process of its own: None in sys.modules is what makes an import raise ModuleNotFoundError.
    code = f"import sys; sys.modules[{missing!r}] = None; from warpcache.cli.main import main; main()"
    arguments = ["compile", "m:f", "--inputs", inputs, "--out", tmp_path / "b.warp"]
    result = subprocess.run([sys.executable, "-P", "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == (
        f'warpcache: {missing} is not installed; compile and split need pip install "warpcache[export]"\n'
    )


@pytest.mark.parametrize(
    ("error", "opening"),
    [
        (WarpcacheError("first line\nsecond line"), "first line second line"),
        (KeyboardInterrupt(), "interrupted; nothing was written"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out.npz"), "the disk is full while writing 'out.npz'"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "out.npz"), "no permission for 'out.npz'"),
        (MemoryError(), "out of memory"),
    ],
)
def test_what_goes_wrong_is_one_sentence(
    error: BaseException, opening: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(warpcache.tasks.bench, "run_bundle", fail)
    assert_failed(call("run", "b.warp", "x.npz", "--out", tmp_path / "out.npz"), opening)


def test_a_mistake_of_ours_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise TypeError("our bug")

    monkeypatch.setattr(warpcache.tasks.bench, "run_bundle", fail)
    result = call("run", "b.warp", "x.npz", "--out", tmp_path / "out.npz")
    assert isinstance(result.exception, TypeError)


def test_an_interrupted_run_leaves_nothing(
    tiny_bundle: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from warpcache.media.outputs import OutputWriter

    write = OutputWriter.write

    def interrupted(self: OutputWriter, outputs: Any) -> None:
        write(self, outputs)
        if self.frames == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(OutputWriter, "write", interrupted)
    folder = tmp_path / "answers"
    folder.mkdir()
    for name in ("out.npz", "out.mp4"):
        assert_failed(call("run", tiny_bundle, inputs, "--out", folder / name, "--age", "1"), "interrupted")
    assert list(folder.iterdir()) == []


def test_a_place_that_cannot_be_written_is_wrong_usage(tiny_bundle: Path, inputs: Path) -> None:
    result = call("run", tiny_bundle, inputs, "--out", inputs / "out.npz")  # inputs is a file, no folder
    assert result.exit_code == 2
    assert "is no folder" in result.stderr


def test_a_device_is_not_replaced_by_a_file(tiny_bundle: Path, inputs: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    result = call("bench", tiny_bundle, inputs, "--policy", "full", "--json", pipe)
    assert result.exit_code == 2
    assert "is no regular file" in result.stderr
    assert pipe.is_fifo()


def test_every_option_has_help() -> None:
    for name, command in cli.commands.items():
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.name}"


def test_the_examples_of_the_help_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, command in cli.commands.items():
        assert command.epilog is not None
        words = command.epilog.removeprefix("Example:").split()
        assert words[:2] == ["warpcache", name]
        command.make_context(name, words[2:])  # raises UsageError where an option or its value is wrong


def test_run_in_a_terminal_shows_bars_on_stderr_only(tiny_bundle: Path, inputs: Path, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")
    master, slave = pty.openpty()
    process = subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "warpcache",
            "run",
            tiny_bundle,
            inputs,
            "--out",
            tmp_path / "o.npz",
            "--age",
            "1",
        ],
        stdout=subprocess.PIPE,
        stderr=slave,
        env={**os.environ, "TERM": "xterm-256color"},
        check=False,
    )
    os.close(slave)
    drawn = os.read(master, 1 << 16).decode()
    os.close(master)
    assert process.returncode == 0, drawn
    assert "lockstep:1" in drawn
    assert f"{FRAMES}/{FRAMES}" in drawn
    assert b"\x1b" not in process.stdout

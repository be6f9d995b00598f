"""The README: its Python and its commands are run as they stand, its tables and links checked."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from warpcache.cli.main import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language and its text."""

    language: str
    text: str


def blocks() -> list[Block]:
    return [Block(*found) for found in re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)]


def scripts() -> dict[str, str]:
    """The Python blocks by the file name in their first line."""
    found = {}
    for block in blocks():
        if block.language == "python":
            first = block.text.splitlines()[0]
            assert first.startswith("# "), f"a Python block must begin with its file's name, not {first!r}"
            found[first.removeprefix("# ")] = block.text
    return found


GPU_MARK = "  # needs a GPU"
GPU_SCRIPT = "stream_gpu.py"


def console_lines(*, gpu: bool = False) -> Iterator[str]:
    """The lines of the console blocks: those that run anywhere, or those that are marked to need a GPU."""
    for block in blocks():
        if block.language == "console":
            for line in block.text.splitlines():
                if line.endswith(GPU_MARK) == gpu:
                    yield line.removesuffix(GPU_MARK)


def run(*arguments: str, cwd: Path) -> str:
    """Run Python with `arguments` in `cwd`; -P keeps a checkout's warpcache/ from hiding the installed package."""
    result = subprocess.run([sys.executable, "-P", *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{arguments}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The README's example carried out in an empty folder: that folder, and what each line printed."""
    folder = tmp_path_factory.mktemp("readme")
    for name, text in scripts().items():
        (folder / name).write_text(text, encoding="utf-8")
    printed = {}
    for line in console_lines():
        words = shlex.split(line)
        if words[:2] == ["warpcache", "build"]:
            pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
        if words[0] == "pip":
            continue  # the continuous integration does that part, in an environment of its own
        if words[0] == "python":
            printed[line] = run(*words[1:], cwd=folder)
        else:
            assert words[0] == "warpcache", f"the README's console runs {words[0]!r}, which no test knows"
            printed[line] = run("-m", *words, cwd=folder)
    return folder, printed


def test_the_example_makes_a_bundle_and_answers(done: tuple[Path, dict[str, str]]) -> None:
    from warpcache.engine.bundle.bundle import Bundle
    from warpcache.media.video import read_video

    folder, _ = done
    manifest = Bundle.open(folder / "mine.warp").manifest
    assert [spec.name for spec in manifest.generator_inputs] == ["condition"]
    assert {record.name for record in manifest.exits} == {"whole", "plain", "warp"}
    assert manifest.calibration is not None
    rows = json.loads((folder / "bench.json").read_text())["rows"]
    assert [row["policy"] for row in rows] == ["full", "every:4", "async"]
    assert 1 <= len(read_video(folder / "answer.mp4").frames) <= 32  # a live stream may drop frames


def test_the_python_example_streams(done: tuple[Path, dict[str, str]]) -> None:
    folder, _ = done
    *lines, statistics = run("stream.py", cwd=folder).strip().splitlines()
    answered = [re.fullmatch(r"(\d+) (\d+) (whole|plain|warp) \d+\.\d\d ms", line) for line in lines]
    assert all(answered), lines
    indices = [int(found[1]) for found in answered if found is not None]
    assert indices == sorted(set(indices))
    # Not all 32, nor frame 0 for certain: frames come at 30 a second, and the newest wins where cores are busy.
    assert set() < set(indices) <= set(range(32))
    assert statistics.startswith("SessionStatistics(")


def test_a_quality_is_kept(done: tuple[Path, dict[str, str]]) -> None:
    from warpcache.engine.bundle.bundle import Bundle
    from warpcache.engine.promise.calibration import PromiseRecord

    folder, printed = done
    record = PromiseRecord.of(Bundle.open(folder / "exits.warp").manifest)
    assert record is not None
    assert record.metric == "psnr_db"
    assert {"warp", "branch1"} == set(record.exits)
    said = {words.split()[1]: text for words, text in printed.items() if "exits.warp" in words}
    assert "Pareto front" in said["inspect"]
    assert "Pareto front" in (folder / "report.html").read_text(encoding="utf-8")
    assert "PSNR >= 50 dB, promised" in said["run"]
    assert "async routed" in said["bench"]
    *lines, sums = run("keep_quality.py", cwd=folder).strip().splitlines()
    assert lines
    for line in lines:
        # Whether a frame makes its deadline is this machine's affair; an inexact exit always has its prediction.
        assert re.fullmatch(
            r"\d+ ((whole|plain) None|(warp|branch1) \d+\.\d+) (None|cheaper exit|older cache)", line
        ), line
    assert re.fullmatch(r"\d+ degraded; \d+ of \d+ audits missed; \d+ drifts", sums)


def test_the_python_example_runs_without_torch(done: tuple[Path, dict[str, str]]) -> None:
    folder, _ = done
    code = "import sys, runpy; sys.modules.update(torch=None, onnx=None); runpy.run_path('stream.py')"
    assert run("-c", code, cwd=folder)


def test_the_bundle_is_converted_and_carried_away(done: tuple[Path, dict[str, str]]) -> None:
    from warpcache.engine.bundle.bundle import Bundle
    from warpcache.engine.tensorrt.engines import precision_of

    folder, _ = done
    for path in (folder / "mine.fp16.warp", folder / "edge" / "mine.fp16.warp"):
        bundle = Bundle.open(path)
        assert precision_of(bundle) == "fp16"
        assert set(bundle.manifest.created["precision"]["parity"]) == {"whole", "plain", "warp"}
    assert len(list((folder / "edge" / "engines").glob("*.engine"))) == 4


def test_what_needs_a_gpu_runs_on_one_and_says_so_without(done: tuple[Path, dict[str, str]]) -> None:
    folder, _ = done
    commands = [["-m", *shlex.split(line)] for line in console_lines(gpu=True)]
    assert commands
    for arguments in (*commands, [GPU_SCRIPT]):
        result = subprocess.run(
            [sys.executable, "-P", *arguments], cwd=folder, capture_output=True, text=True, check=False
        )
        if result.returncode != 0:
            # There is no GPU here, or none that TensorRT-RTX builds for (it has no code for data centres' newest).
            last = result.stderr.splitlines()[-1]
            refusals = ("no NVIDIA driver was found", "starting the CUDA driver failed", "has no code for")
            assert any(refusal in last for refusal in refusals), result.stderr
            assert last.startswith("warpcache: ") or arguments == [GPU_SCRIPT], result.stderr


def test_the_example_is_short() -> None:
    for name, text in scripts().items():
        assert len(text.splitlines()) <= 22, f"{name} has grown"


def test_the_two_commands_are_those_of_the_continuous_integration() -> None:
    assert '    pip install ".[cpu]" && warpcache demo\n' in README
    test_command = 'pip install -c constraints.txt ".[cpu,test]" && pytest'
    assert f"    {test_command}\n" in README
    install, test = test_command.split(" && ")
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert test in lines
    assert install.replace("pip install", "pip install --quiet") in lines


def test_the_command_table_names_every_command_and_no_option_that_is_not_there() -> None:
    rows = re.findall(r"^\| `warpcache (\w+)([^`]*)` \|", README, re.MULTILINE)
    assert {name for name, _ in rows} == set(cli.commands)
    for name, usage in rows:
        known = {text for p in cli.commands[name].params if isinstance(p, click.Option) for text in p.opts}
        assert set(re.findall(r"--[a-z-]+", usage)) <= known, name


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    for target in targets:
        if "://" not in target:
            assert (ROOT / target).exists(), target

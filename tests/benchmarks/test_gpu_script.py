"""The script for a GPU machine, where there is none: it goes on, records every step, says what is wrong, and fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "on_gpu.sh"


def run(out: Path, *, steps: str, **variables: str) -> subprocess.CompletedProcess[str]:
    # Neither a GPU of this machine nor an interpreter's path that is set here: the script finds the checkout itself.
    surroundings = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    surroundings |= {"PYTHON": sys.executable, "SCALE": "tiny", "STEPS": steps, "CUDA_VISIBLE_DEVICES": ""} | variables
    return subprocess.run(
        ["bash", str(SCRIPT), str(out)], capture_output=True, text=True, check=False, env=surroundings, cwd=out.parent
    )


def recorded(out: Path) -> list[list[str]]:
    return [line.split("\t") for line in (out / "steps.tsv").read_text().splitlines()]


def stand_in(folder: Path, arguments: str, does: str) -> str:
    """An interpreter that does something else where it is called with these arguments; else it is this one."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\ncase "$*" in "{arguments}"*) {does} ;; esac\nexec "{sys.executable}" "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_without_a_gpu_it_ends_with_one_table_and_fails(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(out, steps="gpu_kernels gpu_engine latency_demo")
    assert result.returncode == 1, result.stdout + result.stderr
    assert [(name, status) for name, status, *_ in recorded(out)] == [
        ("gpu_kernels", "failed"),
        ("gpu_engine", "failed"),
        ("latency_demo", "failed"),
    ]
    assert recorded(out)[0][3] == "exit code 1: 0 of 5 parts ran; not: copy, image, change, warp, rasterizer"
    table = result.stdout[result.stdout.index("On no GPU (cuda:0)") :]
    assert "no executor ran the demo on cuda:0" in table
    assert "NOT RUN" in table
    assert result.stdout.splitlines()[-1] == "0 reached, 0 missed, 5 failed or not run"
    assert {path.name for path in out.iterdir()} == {"on_gpu.log", "steps.tsv", "gpu_kernels.json", "gpu_engine.json"}
    # The log holds all of it, the table included.
    assert "measuring: rasterizer" in (out / "on_gpu.log").read_text()
    assert "failed or not run" in (out / "on_gpu.log").read_text()


def test_a_step_that_ends_well_is_recorded_and_its_work_is_found_again(tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    result = run(out, steps="clip", WORK=str(work))
    assert result.returncode == 0, result.stdout + result.stderr
    assert [(name, status, note) for name, status, _, note in recorded(out)] == [("clip", "ok", "")]
    assert (work / "clip-64-16.npz").exists()
    # Found there by a later call, it is not made again.
    again = run(out, steps="clip", WORK=str(work))
    assert again.returncode == 0
    assert recorded(out) == []


@pytest.mark.parametrize(
    ("last", "status"),
    [("8 passed, 3 skipped in 1.00s", "ok"), ("261 skipped, 9 deselected in 1.00s", "failed"), ("", "failed")],
)
def test_tests_that_are_all_skipped_show_nothing(tmp_path: Path, last: str, status: str) -> None:
    python = tmp_path / "python"
    # Stands for an interpreter whose pytest ends well and says `last`.
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *-m\\ pytest*) echo "{last}"; exit;; esac\nexec "{sys.executable}" "$@"\n'
    )
    python.chmod(0o755)
    result = run(tmp_path / "out", steps="pytest", PYTHON=str(python))
    assert result.returncode == (0 if status == "ok" else 1)
    ((name, said, _, note),) = recorded(tmp_path / "out")
    assert (name, said) == ("pytest", status)
    assert note == (last if status == "ok" else f"exit code 1: {last}")


def test_what_it_makes_for_itself_is_removed(tmp_path: Path) -> None:
    assert run(tmp_path / "out", steps="", TMPDIR=str(tmp_path)).returncode == 0
    assert list(tmp_path.glob("tmp.*")) == []  # what mktemp makes


def test_no_step_begins_when_the_time_is_up(tmp_path: Path) -> None:
    result = run(tmp_path / "out", steps="gpu_kernels", LIMIT_S="1")
    assert result.returncode == 1
    assert recorded(tmp_path / "out") == [["gpu_kernels", "failed", "0", "no time was left of 1 s"]]


def test_a_step_that_hangs_is_ended(tmp_path: Path) -> None:
    slow = tmp_path / "python"
    # Stands for an interpreter whose benchmark never ends; the summary is by the real one.
    slow.write_text(
        f'#!/bin/sh\ncase "$*" in *benchmarks.gpu_kernels*) exec sleep 600;; esac\nexec "{sys.executable}" "$@"\n'
    )
    slow.chmod(0o755)
    result = run(tmp_path / "out", steps="gpu_kernels", STEP_S="1", PYTHON=str(slow))
    assert result.returncode == 1
    ((name, status, _, note),) = recorded(tmp_path / "out")
    assert (name, status, note) == ("gpu_kernels", "failed", "it took longer than 1 s")


@pytest.mark.parametrize(
    ("steps", "variables", "said"),
    [("", {"SCALE": "huge"}, "SCALE is 'huge'; choose full or tiny"), ("clip train", {}, "STEPS names 'train'; there")],
)
def test_what_it_does_not_know_is_refused(tmp_path: Path, steps: str, variables: dict[str, str], said: str) -> None:
    result = run(tmp_path / "out", steps=steps, **variables)
    assert result.returncode == 2
    assert said in result.stderr


def test_nothing_of_a_gpu_is_needed_to_read_it() -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0

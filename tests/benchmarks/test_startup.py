"""The start-up benchmark on the tiny bundle: what it measures, and that a failing child is no figure."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from benchmarks import startup
from benchmarks.startup import STAGES, measure_start, summarise


def test_a_run_times_every_stage_in_a_fresh_process(tiny_bundle: Path) -> None:
    sample = measure_start(tiny_bundle, "async")
    assert list(sample) == [*STAGES, "interpreter"]
    assert all(seconds > 0 for seconds in sample.values())


def test_a_child_that_fails_is_reported_by_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(click.ClickException, match=r"^the child process failed: .*BundleError"):
        measure_start(tmp_path / "none.warp", "async")


def test_the_promise_is_on_the_median_of_the_sums() -> None:
    runs = [dict.fromkeys((*STAGES, "interpreter"), seconds) for seconds in (0.1, 0.2, 0.9)]
    promised, slowest, *rest = summarise(runs)
    assert promised.value == pytest.approx(
        0.8
    )  # four stages of the middle run; the interpreter's own is not among them
    assert promised.reached is True
    assert slowest.value == pytest.approx(3.6)
    assert [figure.name for figure in rest] == [*STAGES, "interpreter"]


def test_the_command_writes_figures_and_samples(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "startup.json"
    arguments = ["--bundle", str(tiny_bundle), "--runs", "1", "--json", str(path)]
    result = CliRunner().invoke(startup.main, arguments)
    assert result.exit_code == 0, result.output
    assert "import + open to the first frame" in result.output
    document = json.loads(path.read_text())
    assert (document["schema"], document["command"]) == (1, "startup")
    assert document["figures"][0]["target"] == 1.0
    assert len(document["samples_s"]) == 1

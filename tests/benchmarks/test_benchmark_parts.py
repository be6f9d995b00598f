"""What the GPU benchmarks share: parts that fail alone, streams on a known clock, memory readings, the summary."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from benchmarks import gpu_summary, parts
from benchmarks.gpu_summary import read_rows, running_backend
from benchmarks.measuring import Figure
from benchmarks.memory_growth import watch_memory
from benchmarks.parts import Measured, Part, device_title, percentile_figures, run_parts, show_parts, write_parts
from benchmarks.streams import stream
from warpcache.engine.errors import BackendError


def raises(error: BaseException) -> Callable[[], Measured]:
    def measure() -> Measured:
        raise error

    return measure


# Parts


def test_a_part_that_fails_ends_alone_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    done = run_parts(
        {
            "ours": raises(BackendError("the executor\nrefuses; take another")),
            "theirs": raises(ZeroDivisionError("division by zero")),
            "fine": lambda: Measured([Figure("a", 1.0, 2.0)]),
        }
    )
    assert [part.name for part in done] == ["ours", "theirs", "fine"]
    assert [part.error for part in done] == [
        "the executor refuses; take another",
        "ZeroDivisionError: division by zero",
        None,
    ]
    # A sentence of ours needs no origin; what a library threw keeps it, in the record and on stderr.
    assert done[0].traceback is None
    assert "raise error" in str(done[1].traceback)
    assert "raise error" in capsys.readouterr().err
    assert done[2].measured.figures[0].reached is True


def test_an_interrupt_ends_all_parts() -> None:
    with pytest.raises(KeyboardInterrupt):
        run_parts({"first": raises(KeyboardInterrupt()), "second": Measured})


def test_the_table_shows_every_figure_and_what_did_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    some = Measured(
        [Figure("speed", 0.5, 0.7, at_least=True), Figure("time", 1.0, 2.0, "ms"), Figure("size", 3.0, None, "KiB")],
        notes=["install warpcache[gpu]"],
    )
    show_parts("On a thing", [Part("good", some, None, 1.0), Part("bad", Measured(), "no driver", 0.0)])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "On a thing"
    shown = "\n".join(lines)
    assert "\ngood speed 0.5 >= 0.7 MISSED\n" in shown
    assert "\ngood time 1 ms <= 2 ms reached\n" in shown
    assert "\ngood size 3 KiB\n" in shown
    # Brackets are no markup.
    assert "install warpcache[gpu]" in shown
    assert "\nbad no driver NOT RUN" in shown


def test_the_record_holds_device_errors_and_no_nan(tmp_path: Path) -> None:
    measured = Measured([Figure("a", float("nan"), 1.0)], details={"samples": [1.5, float("inf")]})
    device = {"device": "cuda:0", "name": "Some GPU"}
    write_parts(tmp_path / "sub" / "x.json", "x", device, [Part("p", measured, "why", 1.0)], more=3)
    document = json.loads((tmp_path / "sub" / "x.json").read_text())
    assert (document["schema"], document["command"], document["more"]) == (1, "x", 3)
    assert document["device"]["name"] == "Some GPU"
    assert "numpy" in document["environment"]["packages"]
    (part,) = document["parts"]
    assert part["error"] == "why"
    assert part["figures"][0]["value"] is None
    assert part["details"] == {"samples": [1.5, None]}


@pytest.mark.parametrize(("error", "code"), [(None, 0), ("why", 1)])
def test_the_exit_code_says_whether_all_ran(error: str | None, code: int) -> None:
    @click.command()
    @click.pass_context
    def command(context: click.Context) -> None:
        parts.finish(context, [Part("one", Measured(), None, 0.0), Part("two", Measured(), error, 0.0)])

    result = CliRunner().invoke(command)
    assert result.exit_code == code
    assert result.output.strip() == ("2 of 2 parts ran" if error is None else "1 of 2 parts ran; not: two")


def test_percentiles_are_those_of_the_samples() -> None:
    figures = percentile_figures("host", [float(value) for value in range(101)], unit="us", target_p50=50)
    assert [(figure.name, figure.value, figure.target) for figure in figures] == [
        ("host, p50", 50.0, 50),
        ("host, p95", 95.0, None),
        ("host, p99", 99.0, None),
    ]


def test_a_driver_in_software_is_called_so_in_every_title() -> None:
    record = {"device": "cuda:0", "name": "Software CUDA 0", "architecture": "sm_90", "driver": None, "cuda": "13.0"}
    assert "no figure here is a GPU's" in device_title(record)
    assert device_title({**record, "name": "NVIDIA H200", "driver": "580.1"}) == (
        "NVIDIA H200 (cuda:0, sm_90, driver 580.1, CUDA 13.0)"
    )
    assert device_title({"device": "cuda:0", "name": None}) == "no GPU (cuda:0)"


# Streams on a known clock


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.seconds += seconds


class KnownAnswer:
    def __init__(self, index: int) -> None:
        self.age, self.route, self.latency_ms = index % 3, "warp" if index else "plain", 1.0 + index


class KnownSession:
    """Takes 4 ms for every frame."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.submitted: list[Any] = []
        self.at: list[float] = []

    def submit(self, inputs: Any) -> None:
        self.at.append(self.clock.seconds)
        self.submitted.append(inputs)
        self.clock.seconds += 0.001

    def frames(self) -> Iterator[KnownAnswer]:
        while True:
            self.clock.seconds += 0.003
            yield KnownAnswer(len(self.submitted) - 1)


def run(count: int, **options: Any) -> tuple[Any, KnownSession, Clock]:
    clock = Clock()
    session = KnownSession(clock)
    frames: Any = ["first", "second", "third"]
    found = stream(session, frames, count, clock=clock, sleep=clock.sleep, **options)  # type: ignore[arg-type]
    return found, session, clock


def test_warm_up_is_answered_and_not_counted() -> None:
    found, session, clock = run(4, warmup=2)
    assert len(session.submitted) == 6
    assert not clock.slept
    assert found.latency_ms == [3.0, 4.0, 5.0, 6.0]
    # The clock is a sum of floats near 100: it is off by some 1e-14 s a step.
    assert found.answer_ms == pytest.approx([4.0] * 4, abs=1e-9)
    assert found.ages == [2, 0, 1, 2]
    assert found.routes == {"warp": 4}
    # Every counted frame's inputs are another's than the one before.
    assert session.submitted[2:] == ["first", "second", "third", "first"]


def test_a_paced_frame_is_handed_in_when_it_is_due() -> None:
    _, session, clock = run(3, warmup=1, fps=100)
    assert session.at == pytest.approx([100.0, 100.01, 100.02, 100.03], abs=1e-9)
    assert clock.slept == pytest.approx([0.006] * 3, abs=1e-9)


def test_a_late_frame_is_handed_in_at_once() -> None:
    _, session, clock = run(3, warmup=0, fps=1000)
    assert session.at == pytest.approx([100.0, 100.004, 100.008], abs=1e-9)
    assert not clock.slept


def test_the_tail_is_p99_over_the_median() -> None:
    found, *_ = run(101, warmup=0)
    # Latencies 1 to 101: the median is 51, p99 is 100.
    assert found.tail == pytest.approx(100 / 51)
    record = found.to_record()
    assert record["routes"] == {"plain": 1, "warp": 100}
    assert (record["age_max"], len(record["latency_ms"])) == (2, 101)


# Memory


def test_growth_is_counted_from_the_end_of_the_warm_up() -> None:
    answered = 0

    def answer() -> None:
        nonlocal answered
        answered += 1

    def read() -> tuple[int, int]:
        # The GPU's memory grows while it warms up only, the host's by 10 bytes a frame for ever.
        return min(answered, 5) * 1000, 1_000_000 + 10 * answered

    growth = watch_memory(answer, read, frames=100, warmup=7)
    assert answered == 107
    assert (growth.frames[0], growth.frames[-1]) == (0, 100)
    assert growth.device_bytes == 0
    assert growth.host_bytes == 1000
    assert growth.host_bytes_a_frame == pytest.approx(10.0)
    assert growth.to_record()["frames"] == list(growth.frames)


def test_growth_of_few_frames() -> None:
    growth = watch_memory(lambda: None, lambda: (3, 4), frames=2, warmup=0)
    assert growth.frames == (0, 1, 2)
    assert growth.host_bytes_a_frame == 0


def test_what_the_process_takes_is_read() -> None:
    # In a process of its own: in this one other tests' threads give memory back meanwhile.
    code = """
import numpy as np
from benchmarks.memory_growth import resident_bytes

before = resident_bytes()
held = np.ones(64 * 2**20, np.uint8)
print((resident_bytes() - before) / held.nbytes)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert 0.9 <= float(result.stdout) <= 1.5


# Summary


def written(folder: Path) -> Path:
    folder.mkdir()
    (folder / "steps.tsv").write_text(
        "doctor\tok\t3\t\nbuild_time\tleft out\t0\tTensorRT-RTX is not installed\npytest\tok\t9\t8 passed\n"
        "gpu_engine\tfailed\t7\texit code 1: 1 of 2 parts ran\n"
    )
    device = {"device": "cuda:0", "name": "Some GPU", "architecture": "sm_90", "driver": "1", "cuda": "13.0"}
    good = Measured(
        [Figure("tail", 1.1, 1.2), Figure("shown nowhere", 5.0, None)],
        details={"async": {"backend": "onnxruntime"}},
    )
    failed = [Part(name, Measured(), "no such bundle", 0.0) for name in ("parity", "memory")]
    write_parts(folder / "gpu_engine.json", "gpu_engine", device, [Part("producers", good, None, 1.0), *failed])
    copy = Measured([Figure("copy", 4000.0, None, "GB/s")])
    slow = Measured([Figure("ratio", 0.5, 0.7, at_least=True)], notes=["a note"])
    write_parts(
        folder / "gpu_kernels.json", "gpu_kernels", device, [Part("copy", copy, None, 1), Part("warp", slow, None, 1)]
    )
    rows = [{"contender": "torch", "p50_ms": 2.0, "p99_ms": 3.0, "ratio": 1.0}]
    (folder / "latency_demo.json").write_text(json.dumps({"device": "cuda:0", "rows": rows}))
    return folder


def test_the_summary_holds_steps_promises_and_latencies(tmp_path: Path) -> None:
    rows = [(row.where, row.what, row.measured, row.verdict) for row in read_rows(written(tmp_path / "out"))]
    assert rows == [
        ("step doctor", "ok", "3 s", ""),
        ("step build_time", "left out: TensorRT-RTX is not installed", "0 s", ""),
        ("step pytest", "ok: 8 passed", "9 s", ""),
        ("step gpu_engine", "failed: exit code 1: 1 of 2 parts ran", "7 s", "FAILED"),
        ("gpu_kernels copy", "copy", "4000 GB/s", ""),
        ("gpu_kernels warp", "ratio", "0.5", "MISSED"),
        ("gpu_kernels warp", "a note", "", ""),
        # One row for all parts that failed alike.
        ("gpu_engine parity, memory", "no such bundle", "", "NOT RUN"),
        ("gpu_engine producers", "tail", "1.1", "reached"),
        ("latency_demo", "torch on cuda:0, p50 / p99; 1.000 of the first's p50", "2.000 / 3.000 ms", ""),
    ]


def test_the_summary_names_the_gpu_and_counts(tmp_path: Path) -> None:
    result = CliRunner().invoke(gpu_summary.main, [str(written(tmp_path / "out"))])
    assert result.exit_code == 1
    assert result.output.startswith("On Some GPU (cuda:0, sm_90, driver 1, CUDA 13.0)")
    assert result.output.splitlines()[-1] == "1 reached, 1 missed, 2 failed or not run"


def test_a_missed_figure_is_no_failure(tmp_path: Path) -> None:
    folder = written(tmp_path / "out")
    (folder / "gpu_engine.json").unlink()
    (folder / "steps.tsv").write_text("gpu_kernels\tok\t3\t\n")
    result = CliRunner().invoke(gpu_summary.main, [str(folder)])
    assert result.exit_code == 0
    assert result.output.splitlines()[-1] == "0 reached, 1 missed, 0 failed or not run"


def test_what_cannot_be_read_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "gpu_kernels.json").write_text("{")
    (tmp_path / "latency_demo.json").write_text("{}")
    rows = read_rows(tmp_path)
    assert [(row.where, row.verdict) for row in rows] == [
        ("steps", "FAILED"),
        ("gpu_kernels", "FAILED"),
        ("latency_demo", "FAILED"),
    ]
    assert rows[0].what.startswith("steps.tsv is missing")
    assert rows[1].what.startswith("gpu_kernels.json cannot be read: JSONDecodeError")
    assert rows[2].what.startswith("latency_demo.json cannot be read: KeyError")


def test_the_executor_that_ran_is_found(tmp_path: Path) -> None:
    folder = written(tmp_path / "out")
    assert running_backend(folder) == "onnxruntime"
    result = CliRunner().invoke(gpu_summary.main, [str(folder), "--backend"])
    assert (result.exit_code, result.output) == (0, "onnxruntime\n")
    (folder / "gpu_engine.json").write_text("{}")
    assert running_backend(folder) is None
    assert CliRunner().invoke(gpu_summary.main, [str(folder), "--backend"]).exit_code == 1

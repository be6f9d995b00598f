"""The latency benchmark's arithmetic on contenders whose times are known, and its refusals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from benchmarks.latency import compare, main


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Known:
    """Answers with its input plus `error`, and takes the times of a list, over and over."""

    def __init__(self, name: str, clock: Clock, times_ms: list[float], error: float) -> None:
        self.name = name
        self._clock = clock
        self._times_ms = times_ms
        self._error = error
        self.calls = 0

    def answer(self, frame: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        self._clock.seconds += self._times_ms[self.calls % len(self._times_ms)] / 1e3
        self.calls += 1
        return frame["x"] + np.float32(self._error)


def test_percentiles_ratio_and_quality_are_those_of_the_samples() -> None:
    clock = Clock()
    slow = Known("slow", clock, [10.0], 0.0)
    fast = Known("fast", clock, [1.0, 2.0, 3.0, 4.0], 0.2)
    arrays = {"x": np.random.default_rng(0).uniform(-0.5, 0.5, (8, 3, 4, 4)).astype(np.float32)}
    rows = compare([slow, fast], arrays, frames=8, blocks=2, reference=arrays["x"], warmup=4, clock=clock)
    assert [row["contender"] for row in rows] == ["slow", "fast"]
    assert rows[0]["ratio"] == 1.0
    # Times are sums of a clock that counts seconds: 1e-9 ms is far above the rounding of such sums.
    assert rows[1]["samples_ms"] == pytest.approx([1, 2, 3, 4] * 4, abs=1e-3)
    assert rows[1]["p50_ms"] == pytest.approx(2.5, abs=1e-9)
    assert rows[1]["ratio"] == pytest.approx(0.25, abs=1e-9)
    assert rows[1]["worst_ms"] == pytest.approx(4.0, abs=1e-9)
    # A constant error of 0.2 on a range of 2: 20 log10(2 / 0.2) dB, up to float32's rounding of the sums.
    assert rows[1]["psnr_db"] == pytest.approx(20.0, abs=1e-3)
    assert rows[0]["psnr_db"] > 90
    assert (slow.calls, fast.calls) == (24, 24)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["demo", "--against", "caffe"], "choose some of torch"),
        (["demo", "--against", "torch"], "name it by --generator"),
        (["demo", "--against", "tensorrt"], "tensorrt runs on a GPU only"),
        (["demo", "--against", "tensorrt-rtx"], "tensorrt-rtx runs on a GPU only"),
        (["demo", "--device", "gpu"], "unknown device 'gpu'"),
        (["demo", "--policy", "often"], "policy 'often'"),
        (["demo", "--frames", "8", "--against", "torch", "--generator", "no_such_module:make"], "'no_such_module'"),
        (["no.warp", "--inputs", "x.npz"], "no.warp"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(arguments: list[str], sentence: str) -> None:
    # What click does not turn into an exit would be a traceback.
    result = CliRunner().invoke(main, arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in (1, 2)
    assert sentence in result.output


def test_a_bundle_against_its_own_generator(tiny_bundle: Path, tmp_path: Path) -> None:
    clip, out = tmp_path / "clip.npz", tmp_path / "latency.json"
    np.savez(clip, x=np.random.default_rng(2).uniform(-1, 1, (8, 3, 16, 16)).astype(np.float32))
    arguments = [str(tiny_bundle), "--inputs", str(clip), "--frames", "8", "--blocks", "1", "--threads", "1"]
    result = CliRunner().invoke(main, [*arguments, "--policy", "every:2", "--json", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text())
    assert [row["contender"] for row in document["rows"]] == ["onnxruntime", "warpcache every:2"]
    whole, cut = document["rows"]
    # The whole generator against itself is exact; from aged caches it is not.
    assert whole["psnr_db"] > 90
    assert cut["psnr_db"] < whole["psnr_db"]
    assert len(cut["samples_ms"]) == 8

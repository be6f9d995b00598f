"""What the benchmarks measure with: figures and their targets, turns, bare modules, answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from benchmarks.measuring import BareModule, Figure, answers, interleaved_ms, means, print_figures, ratio_of_medians
from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.metrics.images import psnr
from warpcache.engine.schedule.policy import Policy


@pytest.mark.parametrize(
    ("figure", "reached"),
    [
        (Figure("at most", 0.1, 0.1), True),
        (Figure("at most", 0.11, 0.1), False),
        (Figure("better", 0.11, 0.1, at_least=True), True),
        (Figure("no better", 0.1, 0.1, at_least=True), False),
        (Figure("not promised", 5.0, None), None),
    ],
)
def test_figures_know_whether_they_are_reached(figure: Figure, reached: bool | None) -> None:
    assert figure.reached is reached
    record = figure.to_record()
    assert (record["value"], record["reached"]) == (figure.value, reached)


def test_a_missed_figure_is_printed_as_missed(capsys: pytest.CaptureFixture[str]) -> None:
    figures = [Figure("latency", 0.2, 0.1), Figure("quality", 1.0, 2.0, "dB"), Figure("size", 3.0, None, "MB")]
    print_figures("clip: figures", figures)
    lines = capsys.readouterr().out.splitlines()
    rows = {name: next(line for line in lines if name in line) for name in ("latency", "quality", "size")}
    assert "MISSED" in rows["latency"]
    assert "reached" in rows["quality"]
    assert "2 dB" in rows["quality"]
    assert "MISSED" not in rows["size"]
    assert "reached" not in rows["size"]


def test_calls_are_timed_in_turns() -> None:
    called: list[str] = []
    times = interleaved_ms(
        {"whole": lambda: called.append("whole"), "warp": lambda: called.append("warp")}, 3, warmup=2
    )
    assert called == ["whole", "warp"] * 5  # so that a noisy machine hits both alike
    assert {name: len(values) for name, values in times.items()} == {"whole": 3, "warp": 3}
    assert min(min(values) for values in times.values()) >= 0
    assert ratio_of_medians({"whole": [8.0, 10.0, 90.0], "warp": [1.0, 2.0, 1.0], "plain": [5.0]}) == 0.1
    assert ratio_of_medians({"whole": [8.0, 10.0, 90.0], "plain": [5.0]}, of="plain") == 0.5


def test_a_bare_module_is_onnx_runtime_alone(tiny_bundle: Path) -> None:
    x = np.random.default_rng(1).uniform(-1, 1, (1, 3, 16, 16)).astype(np.float32)
    session = onnxruntime.InferenceSession(tiny_bundle / "generator.onnx", providers=["CPUExecutionProvider"])
    module = BareModule(Bundle.open(tiny_bundle), "generator", threads=1)
    got = module.run({"x": x, "something else": x})
    assert list(got) == ["image"]
    np.testing.assert_array_equal(got["image"], session.run(["image"], {"x": x})[0])


def test_answers_and_their_quality(tiny_bundle: Path) -> None:
    x = np.random.default_rng(2).uniform(-1, 1, (5, 3, 16, 16)).astype(np.float32)
    bundle = Bundle.open(tiny_bundle)
    module = BareModule(bundle, "generator", threads=1)
    whole = np.concatenate([module.run({"x": frame[None]})["image"] for frame in x])
    images = answers(bundle, {"x": x}, policy=Policy.lockstep(1))
    assert sorted(images) == [0, 1, 2, 3, 4]
    got = np.stack([images[t] for t in range(5)]).reshape(whole.shape)
    # The tiny warp exit answers y_s + 0.1 x_t: one multiplication and one addition in float32.
    np.testing.assert_allclose(got[1:], whole[:-1] + np.float32(0.1) * x[1:], atol=1e-6)
    measured = means(got, whole, ["psnr_db", "ssim"], None)
    assert list(measured) == ["psnr_db", "ssim"]
    assert measured["psnr_db"] == pytest.approx(
        np.mean([min(psnr(a, b), 100.0) for a, b in zip(got, whole, strict=True)])
    )

"""Quality promises on the command line: run and bench keep one, inspect shows one, wrong ones are one sentence."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner, Result

import warpcache.engine.routing.plan
import warpcache.tasks.compile
from warpcache.cli.main import cli
from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.bundle.write import write_bundle
from warpcache.engine.metrics.images import psnr
from warpcache.engine.promise.calibration import Calibration, PromiseRecord, Quality
from warpcache.engine.routing.exit_costs import ExitCosts
from warpcache.engine.telemetry import SessionStatistics
from warpcache.report.promise_tables import rule_sentences
from warpcache.report.routed import Routed, routed_lines, within_of
from warpcache.tasks.choices import CompileChoice
from warpcache.tasks.quality_choice import QualityChoice

FRAMES = 8
# Tenths of predicted scores: -9 is PSNR 39 dB, -4 is 17 dB. Only warp is expected to keep 30 dB; the first frame, whose
# cache is its own, is answered by plain, exactly.
STEERS = {"warp2": -0.2, "warp": -0.9, "branch1": -0.4}


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="warpcache")


def assert_failed(result: Result, opening: str) -> str:
    """The command failed with one sentence on stderr that begins with `opening`, and no traceback."""
    assert result.exit_code == 1, result.output
    lines = [line for line in result.stderr.splitlines() if not line.endswith(" ...")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith(f"warpcache: {opening}"), result.stderr
    return lines[0]


def whole(bundle: Path, x: np.ndarray) -> np.ndarray:
    """What the whole generator answers, by ONNX Runtime alone: [T, 3, H, W]."""
    session = onnxruntime.InferenceSession(bundle / "generator.onnx", providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(["image"], {"x": frame[None]})[0] for frame in x])


@pytest.fixture
def save(tmp_path: Path, steered: Callable[..., np.ndarray]) -> Callable[..., tuple[Path, np.ndarray]]:
    """A function that writes inputs that steer the routed bundle; gives the file and the frames."""

    def make(**values: object) -> tuple[Path, np.ndarray]:
        x = steered(FRAMES, **{**STEERS, **values})
        np.savez(tmp_path / "inputs.npz", x=x)
        return tmp_path / "inputs.npz", x

    return make


@pytest.fixture
def fixed_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exits cost what is written here, whatever else this machine does: they are too small to be told apart by time."""
    costs = {"whole": 1.0, "plain": 0.5, "branch1": 0.3, "warp": 0.1, "warp2": 0.05}

    def measured(run: Callable[[str], None], exits: tuple[str, ...], clock: Callable[[], float]) -> dict[str, float]:
        return {name: costs[name] for name in exits}

    monkeypatch.setattr(warpcache.engine.routing.plan, "measure_exit_costs", measured)
    monkeypatch.setattr(ExitCosts, "observe", lambda self, name, ms: None)


@pytest.fixture(scope="session")
def promised(tmp_path_factory: pytest.TempPathFactory, make_routed: Callable[..., Path]) -> Path:
    """The routed bundle with what a compile adds for people: thresholds, predictor errors, all counts."""
    source = Bundle.open(make_routed())
    assert source.manifest.calibration is not None
    record = source.manifest.calibration["promise"]
    entries = [
        {"threshold": t, "confidence": 0.95, "age": age, "coverage": 0.9625, "saved": saved, "shares": shares}
        for t, age, saved, shares in (
            (30.0, 0, 0.412, {"branch1": 0.61, "whole": 0.39}),
            (30.0, 1, 0.874, {"warp2": 0.75, "warp": 0.2, "whole": 0.05}),
            (40.0, 1, 0.123, {"warp": 0.13, "whole": 0.87}),
        )
    ]
    macs = {**record["macs"], "branch1": 2.5e6, "whole": 1e7, "predictor": 1234.0, "predictor_cold": 999.0}
    promise = {**record, "thresholds": entries, "predictor": {"error": {"warp": 0.1, "warp2": 0.2}}, "macs": macs}
    manifest = dataclasses.replace(source.manifest, calibration={"promise": promise}, files={})
    files = {path.name: path for path in source.path.iterdir() if path.name != "manifest.json"}
    return write_bundle(tmp_path_factory.mktemp("promised") / "promised.warp", manifest, files).path


# What is wrong with the options is found while they are parsed.


@pytest.mark.parametrize("command", [["run", "b.warp", "x.npz", "--out", "y.npz"], ["bench", "b.warp", "x.npz"]])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--quality", "sharpness=0.1"], "metric 'sharpness'; choose one of: lpips, flip, psnr, ms-ssim"),
        (["--quality", "lpips"], "quality 'lpips' is not of the form METRIC=THRESHOLD"),
        (["--quality", "lpips=soft"], "quality 'lpips=soft' is not of the form METRIC=THRESHOLD"),
        (["--quality", "lpips=0"], "a threshold of lpips is a finite number above 0"),
        (["--quality", "flip=1.5"], "a threshold of flip is a number above 0 and at most 1"),
        (["--quality", "ms-ssim=1"], "a threshold of ms-ssim is a number between 0 and 1"),
        (["--quality", "psnr=inf"], "a threshold of psnr is a number of decibels"),
        (["--quality", "psnr=30", "--confidence", "1"], "confidence 1.0 is not a number between 0 and 1"),
        (["--quality", "psnr=30", "--confidence", "0"], "confidence 0.0 is not a number between 0 and 1"),
        (["--quality", "psnr=30", "--confidence", "nan"], "confidence nan is not a number between 0 and 1"),
        (["--quality", "psnr=30", "--deadline-ms", "0"], "0.0 is not in the range"),
        (["--quality", "psnr=30", "--audit-every", "-1"], "-1 is not in the range"),
        (["--quality", "psnr=30", "--exit", "warp"], "--quality chooses an exit for every frame"),
        (["--confidence", "0.9"], "--confidence goes with a quality to keep"),
        (["--deadline-ms", "11.1"], "--deadline-ms goes with a quality to keep"),
        (["--audit-every", "0"], "--audit-every goes with a quality to keep"),
    ],
)
def test_wrong_usage(command: list[str], options: list[str], words: str) -> None:
    result = call(*command, *options)
    assert result.exit_code == 2, result.output
    assert "Error: " in result.stderr
    assert words in " ".join(result.stderr.split()), result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--exits", "0"], "0 is not in the range"),
        (["--exits", "2", "--metric", "ssim"], "metric 'ssim'; choose one of: lpips, flip, psnr, ms-ssim"),
        (["--metric", "flip"], "--metric is for exits that a quality is promised with"),
        (["--bank", "0"], "--bank is for exits that a quality is promised with"),
        (["--exits", "2", "--bank", "-1"], "-1 is not in the range"),
    ],
)
def test_wrong_usage_of_compile(options: list[str], words: str) -> None:
    result = call("compile", "m:f", "--inputs", "x.npz", "--out", "b.warp", *options)
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.stderr.split()), result.stderr


def test_compile_hands_on_what_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path) -> None:
    asked: dict[str, Any] = {}

    def compile_files(factory: str, choice: CompileChoice, **more: Any) -> Bundle:
        asked.update(vars(choice))
        return Bundle.open(tiny_bundle)

    monkeypatch.setattr(warpcache.tasks.compile, "compile_files", compile_files)
    arguments = ["compile", "m:f", "--inputs", "x.npz", "--out", tmp_path / "b.warp"]
    assert call(*arguments, "--exits", 4, "--metric", "ms-ssim", "--bank", 0).exit_code == 0
    assert (asked["exits"], asked["metric"], asked["bank_size"]) == (4, "ms-ssim", 0)
    assert call(*arguments).exit_code == 0
    assert (asked["exits"], asked["metric"], asked["bank_size"]) == (None, None, None)


def test_compile_for_lpips_without_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WARPCACHE_LPIPS", raising=False)
    result = call(
        "compile", "m:f", "--inputs", "x.npz", "--out", tmp_path / "b.warp", "--exits", 2, "--metric", "lpips"
    )
    assert "--lpips" in assert_failed(result, "quality cannot be promised in lpips without its weights")


# What the bundle cannot do is found before a frame is answered.


@pytest.mark.parametrize("command", ["run", "bench"])
def test_a_quality_that_cannot_be_had(
    command: str,
    tiny_bundle: Path,
    routed_bundle: Path,
    save: Callable[..., tuple[Path, np.ndarray]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WARPCACHE_LPIPS", raising=False)
    inputs, _ = save()
    out = tmp_path / "out.npz"
    more = ["--out", out] if command == "run" else ["--policy", "every:2"]

    def ask(bundle: Path, *options: Any) -> Result:
        return call(command, bundle, inputs, *more, *options)

    said = assert_failed(ask(tiny_bundle, "--quality", "flip=0.1"), f"bundle {tiny_bundle} has no quality promise")
    assert "--exits" in said
    said = assert_failed(ask(routed_bundle, "--quality", "flip=0.1"), "the bundle is calibrated for psnr")
    assert "--metric flip" in said
    said = assert_failed(ask(routed_bundle, "--quality", "lpips=0.1"), "the quality is to be kept in LPIPS")
    assert "--lpips PATH" in said
    assert ("--audit-every 0" in said) == (command == "run")  # a benchmark measures it in any case
    said = assert_failed(ask(routed_bundle, "--quality", "psnr=99"), "psnr=99 at confidence 0.95 cannot be promised")
    assert "the best that can be promised" in said
    assert_failed(ask(routed_bundle, "--quality", "psnr=30", "--confidence", "0.9999"), "confidence 0.9999 cannot be")
    said = assert_failed(
        ask(routed_bundle, "--quality", "psnr=30", "--deadline-ms", "0.00001"), "deadline_ms is 1e-05, but the cheapest"
    )
    assert re.search(r"exit, '\w+', takes \S+ ms on cpu/onnxruntime", said)
    assert not out.exists()


# Frames that keep a quality.


@pytest.mark.usefixtures("fixed_costs")
def test_run_routes_every_frame(
    routed_bundle: Path, save: Callable[..., tuple[Path, np.ndarray]], tmp_path: Path
) -> None:
    inputs, x = save()
    out, report = tmp_path / "out.npz", tmp_path / "run.json"
    options = ["--age", 1, "--quality", "psnr=30", "--confidence", 0.9, "--audit-every", 1, "--json", report]
    result = call("run", routed_bundle, inputs, "--out", out, *options)
    assert result.exit_code == 0, result.output
    image = whole(routed_bundle, x)
    # warp answers y_s + 0.1 x_t, and the inputs do not change; the first frame is exact.
    expected = image + np.float32(0.1) * x
    expected[0] = image[0]
    with np.load(out) as arrays:
        np.testing.assert_allclose(arrays["image"], expected, atol=1e-6)  # one addition in float32
    (row,) = json.loads(report.read_text())["rows"]
    assert row["routes"] == {"plain": 1, "warp": FRAMES - 1}
    promise = row["promise"]
    assert (promise["metric"], promise["threshold"], promise["confidence"]) == ("psnr_db", 30.0, 0.9)
    # Every predicted score is -9 (10 times a float32 pixel of -0.9), which is so many decibels.
    assert promise["predicted_mean"] == pytest.approx(9 / (np.log(10) / 10), rel=1e-5)
    assert promise["audits"] > 0
    assert (promise["audit_misses"], promise["degraded"], promise["non_finite"]) == (0, {}, 0)
    assert promise["router_us"]["max"] > 0
    assert "within" not in row  # quality is not measured here
    text = " ".join(result.stdout.split())
    for words in (
        "answered by",
        "warp 87.5%",
        "plain 12.5%",
        "PSNR >= 30 dB, promised 90%",
        "predicted PSNR, mean 39.09",
        "degraded frames 0",
        "NaN replaced 0",
        "margin tightened by, spreads",
        "Routed for PSNR at least 30 dB on 90 % of the frames",
    ):
        assert words in text, (words, result.stdout)


@pytest.mark.usefixtures("fixed_costs")
def test_run_says_what_audits_found(
    routed_bundle: Path, save: Callable[..., tuple[Path, np.ndarray]], tmp_path: Path
) -> None:
    # warp is predicted to keep 38 dB with ease and does not: y + 0.1 x is off by a mean square of (0.05 x)^2.
    inputs, x = save(warp=-1.5)
    image = whole(routed_bundle, x)
    assert psnr(image[0] + np.float32(0.1) * x[0], image[0]) < 38
    report = tmp_path / "run.json"
    options = ["--age", 1, "--quality", "psnr=38", "--audit-every", 1, "--json", report]
    result = call("run", routed_bundle, inputs, "--out", tmp_path / "out.npz", *options)
    assert result.exit_code == 0, result.output
    promise = json.loads(report.read_text())["rows"][0]["promise"]
    assert promise["audit_misses"] >= 1
    assert promise["tightening"] > 0
    assert f"audits, misses {promise['audits']}, {promise['audit_misses']}" in " ".join(result.stdout.split())


@pytest.mark.usefixtures("fixed_costs")
def test_nan_from_an_exit_never_comes_out(
    routed_bundle: Path, save: Callable[..., tuple[Path, np.ndarray]], tmp_path: Path
) -> None:
    inputs, x = save(nan_warp=-2.0)
    out, report = tmp_path / "out.npz", tmp_path / "run.json"
    result = call(
        "run",
        routed_bundle,
        inputs,
        "--out",
        out,
        "--age",
        1,
        "--quality",
        "psnr=30",
        "--audit-every",
        0,
        "--json",
        report,
    )
    assert result.exit_code == 0, result.output
    with np.load(out) as arrays:
        np.testing.assert_array_equal(arrays["image"], whole(routed_bundle, x))  # the next exit that is allowed
    (row,) = json.loads(report.read_text())["rows"]
    assert (row["promise"]["non_finite"], row["routes"]) == (FRAMES - 1, {"plain": 1, "whole": FRAMES - 1})
    assert f"NaN replaced {FRAMES - 1}" in " ".join(result.stdout.split())


@pytest.mark.usefixtures("fixed_costs")
def test_bench_has_a_routed_row_beside_every_fixed_one(
    routed_bundle: Path, save: Callable[..., tuple[Path, np.ndarray]], tmp_path: Path
) -> None:
    inputs, x = save(branch1=-0.95)
    report = tmp_path / "bench.json"
    options = ["--policy", "full", "--age", 1, "--quality", "psnr=38", "--json", report, "--audit-every", 0]
    result = call("bench", routed_bundle, inputs, *options)
    assert result.exit_code == 0, result.output
    rows = json.loads(report.read_text())["rows"]
    assert [(row["policy"], "promise" in row) for row in rows] == [
        ("full", False),
        ("full", True),
        ("lockstep:1", False),
        ("lockstep:1", True),
    ]
    # Without a cache the branch is all there is beside the whole generator: FIANCEE's setting.
    assert rows[1]["routes"] == {"branch1": FRAMES}
    image = whole(routed_bundle, x)
    kept = psnr(np.float32(0.99) * image[0], image[0]) >= 38
    assert kept  # 0.99 of an image is off by at most 0.005 on [0, 1]: 46 dB or more
    for row in rows[:2]:
        assert row["within"] == {"metric": "psnr_db", "threshold": 38.0, "kept": FRAMES, "frames": FRAMES, "share": 1.0}
    # The fixed lockstep answers all but its first frame by warp, which keeps no 38 dB here.
    assert rows[2]["within"]["kept"] == 1
    assert rows[2]["routes"] == {"plain": 1, "warp": FRAMES - 1}
    text = " ".join(result.stdout.split())
    for words in ("full routed", "lockstep:1 routed", "PSNR >= 38 dB, measured 100.0% 100.0% 12.5%"):
        assert words in text, (words, result.stdout)


# The parts behind it.


def test_frames_within_a_threshold() -> None:
    assert within_of(Quality("lpips", 0.1), [0.05, 0.1, 0.11]).to_record()["share"] == pytest.approx(2 / 3)
    assert within_of(Quality("psnr", 30), [29.9, 30.0, 45.0]).kept == 2


def test_what_a_deadline_cost_is_counted_by_how() -> None:
    class Frame:
        def __init__(self, degraded: str | None, predicted: float | None) -> None:
            self.degraded, self.predicted = degraded, predicted

    frames: list[Any] = [Frame(None, 0.02), Frame("cheaper exit", 0.2), Frame(None, None), Frame("older cache", 0.14)]
    choice = QualityChoice(Quality("lpips", 0.1), deadline_ms=11.1)
    statistics = SessionStatistics(frames=4, degraded=3, drifts=2, tightening=0.75)
    routed = Routed.of(choice.quality, frames, statistics, deadline_ms=choice.deadline_ms, audit_every=30)
    record = routed.to_record()
    assert record["degraded"] == {"cheaper exit": 1, "older cache": 1, "dropped": 1}  # no frame tells of a dropped one
    assert record["predicted_mean"] == pytest.approx(0.12)
    lines = {
        label: values
        for _, label, values in routed_lines(
            [{"routes": {"warp": 4}, "frames": 4, "promise": record}, {"routes": {"whole": 2}, "frames": 2}]
        )
    }
    assert lines["degraded frames"] == ("1 cheaper exit, 1 dropped, 1 older cache", "–")
    assert lines["deadline, ms"] == ("11.1", "–")
    assert lines["drifts noticed"] == ("2", "–")
    assert lines["margin tightened by, spreads"] == ("0.75", "–")
    assert lines["warp"] == ("100.0%", "–")
    assert str(choice) == "LPIPS at most 0.1 on 95 % of the frames"


# What a bundle says of its promise.


def test_inspect_shows_the_promise(promised: Path) -> None:
    best = Calibration.read(Bundle.open(promised)).best(0.95)
    result = call("inspect", promised)
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    for words in (
        "Quality promise in PSNR by conformal risk control: 1600 samples of 400 frames",
        "made 2026-01-01T00:00:00Z",
        f"strictest threshold that can be promised for 95% of the frames is PSNR {best:.4g} dB",
        "warp 1.11, warp2 1.22",  # e^0.1, e^0.2
        "(predictor_cold) predictor_cold - 999 0.01%",
        "branch1 branch1 30.0% 2.5 M 25.00%",
        "Exits by cost and by PSNR, dB against the whole generator",
        "Pareto front, cache 1 frame old",
        "Pareto front, no cache",
        "PSNR: higher is better",
        "What each threshold gives",
        ">= 30 dB 0.95 none 96.2% 41.2% - - 61.0% 39.0%",
        "1 96.2% 87.4% 75.0% 20.0% - 5.0%",
        ">= 40 dB 0.95 1 96.2% 12.3% - 13.0% - 87.0%",
    ):
        assert words in text, (words, result.stdout)


def test_a_promise_of_consumers_alone_speaks_of_no_frames_without_a_cache(promised: Path) -> None:
    bundle = Bundle.open(promised)
    record = PromiseRecord.of(bundle.manifest)
    assert record is not None
    calibration = Calibration.read(bundle)
    assert "frames old and none, made" in rule_sentences(record, calibration)[0]
    assert "frames old, made" in rule_sentences(dataclasses.replace(record, cold_exits=()), calibration)[0]


def test_inspect_of_a_bundle_without_a_promise(tiny_bundle: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    result = call("inspect", tiny_bundle, "--report", report)
    assert result.exit_code == 0, result.output
    assert "no quality promise; compile with --exits" in result.stdout
    assert "Pareto" not in result.stdout
    html = report.read_text(encoding="utf-8")
    assert "no quality promise; compile with --exits" in html
    assert "<svg" not in html


def test_inspect_where_no_threshold_was_tried(routed_bundle: Path, tmp_path: Path) -> None:
    result = call("inspect", routed_bundle, "--report", tmp_path / "r.html")
    assert result.exit_code == 0, result.output
    assert "Pareto front" in result.stdout
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    for text in (result.stdout, html):
        assert "What each threshold gives" not in text
        assert "Saved by threshold" not in text


def test_a_promise_that_is_damaged_is_one_sentence(promised: Path, tmp_path: Path) -> None:
    manifest = json.loads((promised / "manifest.json").read_text())
    manifest["calibration"]["promise"]["ages"] = [3, 2]
    damaged = tmp_path / "damaged.warp"
    damaged.mkdir()
    for path in promised.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    assert_failed(call("inspect", damaged), "manifest.json: key 'calibration.promise.ages' must be")


def test_inspect_writes_a_page_that_stands_alone(promised: Path, tmp_path: Path) -> None:
    report = tmp_path / "new" / "report.html"
    result = call("inspect", promised, "--report", report)
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith(f"wrote {report}\n")
    html = report.read_text(encoding="utf-8")
    assert not re.search(r"(https?:)?//[a-z]", html, re.IGNORECASE)
    assert not re.search(r"<(script|link|iframe|img|object)\b", html)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', html)) | set(re.findall(r"url\(#([^)]*)\)", html)) <= set(ids)
    assert not re.search(r"#0[1-3a]0[0-9a-f]0[0-9]", html), "a stand-in colour was left in a chart"
    charts = re.findall(r"<h3>([^<]*)</h3>", html)
    assert charts == ["Pareto front", "Pareto front by computation", "Saved by threshold"]
    for words in (
        "conformal risk control",
        "What each threshold gives",
        "87.4%",
        "cache 3 frames old",
        "weights.safetensors",
    ):
        assert words in html
    # The same bundle gives the same page.
    again = tmp_path / "again.html"
    call("inspect", promised, "--report", again)
    assert again.read_bytes() == report.read_bytes()


def test_a_page_ends_in_html(promised: Path, tmp_path: Path) -> None:
    result = call("inspect", promised, "--report", tmp_path / "report.txt")
    assert result.exit_code == 2
    assert "must end in .html" in result.stderr

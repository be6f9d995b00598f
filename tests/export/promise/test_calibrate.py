"""Calibration against the same figures computed one frame at a time with the torch generator."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from warpcache.engine.metrics.images import flip, psnr, ssim
from warpcache.export.cut.split import split
from warpcache.export.graph.index import GraphIndex
from warpcache.export.promise.calibrate import FROZEN, MAX_FRAMES, CalibrationTerms, calibrate

FRAMES = 6
AGES = (1, 2, 3)
# Images of ONNX Runtime and torch differ by up to 1e-5; at an error of 0.1 that is 20 log10(1 + 1e-4) = 1e-3 dB, and
# the manifest's figures are rounded to 5 decimals.
PSNR_TOLERANCE = 2e-3
SSIM_TOLERANCE = 1e-4


def silent(stage: str, done: int, total: int) -> None:
    """Report to nobody."""


@pytest.fixture(scope="module")
def case(portrait: Any) -> dict[str, Any]:
    """The portrait cut at its deep features and its style vector, and its images by torch."""
    index = GraphIndex(portrait.model)
    names = [index.module_outputs(path)[0] for path in ("deep", "style")]
    images = []
    for t in range(FRAMES):
        frame = portrait.frame(t)
        with torch.no_grad():
            out = portrait.module(**{n: torch.from_numpy(frame[n]) for n in ("condition", "pose", "person")})
        images.append(out["image"][0].numpy())
    return {"parts": split(portrait.model, names), "images": np.stack(images)}


def stale(portrait: Any, t: int, s: int) -> np.ndarray:
    """The torch generator on frame t, with the deep features and the style of frame s put in their places."""
    kept: dict[str, torch.Tensor] = {}
    module = portrait.module

    def inputs(k: int) -> dict[str, torch.Tensor]:
        return {n: torch.from_numpy(portrait.frame(k)[n]) for n in ("condition", "pose", "person")}

    with torch.no_grad():
        hooks = [
            module.get_submodule(p).register_forward_hook(lambda _, __, out, p=p: kept.__setitem__(p, out))
            for p in ("deep", "style")
        ]
        module(**inputs(s))
        for hook in hooks:
            hook.remove()
        hooks = [
            module.get_submodule(p).register_forward_hook(lambda _, __, ___, p=p: kept[p]) for p in ("deep", "style")
        ]
        out = module(**inputs(t))["image"][0].numpy()
        for hook in hooks:
            hook.remove()
    return out


def run(portrait: Any, case: dict[str, Any], **more: Any) -> dict[str, Any] | None:
    options: dict[str, Any] = {
        "arrays": {name: portrait.stream[name] for name in ("condition", "pose", "person")},
        "image_output": "image",
        "max_age": 3,
        "progress": silent,
        **more,
    }
    arrays, progress = options.pop("arrays"), options.pop("progress")
    parts, terms = case["parts"], CalibrationTerms(**options)
    return calibrate(portrait.model, parts.producer, {"plain": parts.plain}, arrays, terms, progress=progress)


def assert_summary(record: dict[str, float], values: list[float], tolerance: float) -> None:
    """Mean and quantiles as a sorted list gives them."""
    assert set(record) == {"mean", "p05", "p50", "p95"}
    assert record["mean"] == pytest.approx(sum(values) / len(values), abs=tolerance)
    ordered = sorted(values)
    for name, share in (("p05", 0.05), ("p50", 0.5), ("p95", 0.95)):
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        expected = ordered[low] + (place - low) * (ordered[high] - ordered[low])
        assert record[name] == pytest.approx(expected, abs=tolerance)


def test_figures_are_those_of_a_straightforward_loop(portrait: Any, case: dict[str, Any]) -> None:
    told: list[tuple[str, int, int]] = []
    record = run(portrait, case, progress=lambda *report: told.append(report))
    assert record is not None
    images = case["images"]
    # Every age on the same frames: those that even the oldest cache reaches.
    targets = [3, 4, 5]
    assert (record["frames"], record["against"]) == (3, "whole generator")
    assert record["metrics"][:2] == ["psnr_db", "ssim"]
    assert record["truth"] is None
    assert set(record["exits"]) == {"plain", FROZEN}
    for age in AGES:
        for exit_name, answers in (
            ("plain", [stale(portrait, t, t - age) for t in targets]),
            (FROZEN, [images[t - age] for t in targets]),
        ):
            measured = record["exits"][exit_name][str(age)]
            assert set(measured) == set(record["metrics"])
            truth = [images[t] for t in targets]
            pairs = list(zip(answers, truth, strict=True))
            assert_summary(measured["psnr_db"], [psnr(a, b) for a, b in pairs], PSNR_TOLERANCE)
            assert_summary(measured["ssim"], [ssim(a, b) for a, b in pairs], SSIM_TOLERANCE)
            assert_summary(measured["flip"], [flip(a, b) for a, b in pairs], SSIM_TOLERANCE)
    # What was measured tells the exits and the ages apart, or the comparison above would say little.
    plain, frozen = (record["exits"][name] for name in ("plain", FROZEN))
    assert plain["1"]["psnr_db"]["mean"] != frozen["1"]["psnr_db"]["mean"]
    assert frozen["1"]["psnr_db"]["mean"] > frozen["3"]["psnr_db"]["mean"] + 0.1
    assert told == [("calibrating", k, 6) for k in range(1, 7)]


def test_truth_is_measured_beside(portrait: Any, case: dict[str, Any]) -> None:
    images = case["images"]
    rng = np.random.default_rng(2)
    truth = np.clip(images + rng.normal(0, 0.1, images.shape), -1, 1).astype(np.float32)
    with_truth, without = run(portrait, case, truth=truth), run(portrait, case)
    assert with_truth is not None
    assert without is not None
    assert {**with_truth, "truth": None} == without
    of_truth = with_truth["truth"]["exits"]
    assert set(of_truth) == {"whole", "plain", FROZEN}
    assert set(of_truth["whole"]) == {"0"}
    targets = [3, 4, 5]
    assert_summary(of_truth["whole"]["0"]["psnr_db"], [psnr(images[t], truth[t]) for t in targets], PSNR_TOLERANCE)
    for age in AGES:
        assert_summary(
            of_truth["plain"][str(age)]["psnr_db"],
            [psnr(stale(portrait, t, t - age), truth[t]) for t in targets],
            PSNR_TOLERANCE,
        )
        assert_summary(
            of_truth[FROZEN][str(age)]["psnr_db"], [psnr(images[t - age], truth[t]) for t in targets], PSNR_TOLERANCE
        )


def test_short_streams(portrait: Any, case: dict[str, Any]) -> None:
    def first(frames: int) -> dict[str, np.ndarray]:
        stream = {name: portrait.stream[name] for name in ("condition", "pose", "person")}
        return {name: array if len(array) == 1 else array[:frames] for name, array in stream.items()}

    assert run(portrait, case, arrays=first(1)) is None
    two = run(portrait, case, arrays=first(2))
    assert two is not None
    assert two["frames"] == 1
    assert set(two["exits"]["plain"]) == {"1"}
    three = run(portrait, case, arrays=first(3), max_age=9)
    assert three is not None
    assert set(three["exits"][FROZEN]) == {"1", "2"}


def test_frames_that_never_change_are_as_good_as_the_metric_goes(portrait: Any, case: dict[str, Any]) -> None:
    stream = {name: portrait.stream[name] for name in ("condition", "pose", "person")}
    still = {name: array if len(array) == 1 else np.repeat(array[:1], 4, 0) for name, array in stream.items()}
    record = run(portrait, case, arrays=still)
    assert record is not None
    for name in ("plain", FROZEN):
        # The same frame again, bit for bit: finite all the same, as JSON knows no infinity.
        values = record["exits"][name]["2"]["psnr_db"]
        assert len(set(values.values())) == 1
        assert np.isfinite(values["mean"])
        assert values["mean"] >= 60


def test_long_streams_are_measured_on_frames_all_over_them() -> None:
    # image_t = x_t, and an exit that answers with the cache: both exits show frame t - age.
    size, frames = 16, 4 * MAX_FRAMES
    shape = (1, 3, size, size)

    def model(source: str, target: str) -> onnx.ModelProto:
        node = helper.make_node("Identity", [source], [target])
        infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in (source, target)]
        graph = helper.make_graph([node], "g", infos[:1], infos[1:])
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)

    # Each frame is flat and a step of 1 / frames brighter, so that PSNR says how many frames lie between two.
    values = np.arange(frames, dtype=np.float32) / frames
    x = np.broadcast_to(values[:, None, None, None], (frames, *shape[1:])).copy()
    whole, producer, plain = model("x", "image"), model("x", "cache.x"), model("cache.x", "image")
    record = calibrate(whole, producer, {"plain": plain}, {"x": x}, CalibrationTerms("image", 2), progress=silent)
    assert record is not None
    assert record["frames"] == MAX_FRAMES
    for age in (1, 2):
        expected = -20 * np.log10(age / frames / 2)
        for name in ("plain", FROZEN):
            values_db = record["exits"][name][str(age)]["psnr_db"]
            # Differences of float32 values below 1 by 1/256: exact but for the rounding to 5 decimals.
            assert values_db["p05"] == pytest.approx(expected, abs=1e-4)
            assert values_db["p95"] == pytest.approx(expected, abs=1e-4)

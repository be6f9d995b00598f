"""The quality promise as it is made: exits as measured, blocks as cut, predictions as the exported graphs give them."""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from warpcache.engine.errors import ExportError, InputError
from warpcache.engine.metrics.images import psnr
from warpcache.engine.metrics.lpips import Lpips
from warpcache.engine.promise.calibration import Calibration, Quality, from_score, to_score
from warpcache.engine.spec import AGE_INPUT
from warpcache.export.adapter.layout import AdapterLayout, ImageInput, VectorInput
from warpcache.export.frames.streams import frame_at
from warpcache.export.graph.macs import count_macs
from warpcache.export.graph.run import run_model
from warpcache.export.promise.exit_quality import ExitModels, Measured, PromiseTerms, measure_exits, reads_cache
from warpcache.export.promise.predictor import CACHE_THUMBNAIL, thumbnail_graph
from warpcache.export.promise.predictor_fit import PromiseFrames
from warpcache.export.promise.promise import Promise, PromiseOptions, cross_validated, make_promise, split_blocks

SIDE = 20
LAYOUT = AdapterLayout(
    height=SIDE,
    width=SIDE,
    outputs=(("image", 3),),
    images=(ImageInput("x", 3, SIDE, SIDE),),
    vectors=(VectorInput("pose", (1, 2)),),
    taps=(),
)
AT = datetime(2026, 11, 20, 12, tzinfo=UTC)


def quiet(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def painter(noise: float = 0.0, output: str = "image") -> ModelProto:
    """image = tanh(conv(x) + mean(pose)); `noise` makes another, worse generator of it."""
    rng = np.random.default_rng(1)
    weight = rng.normal(0, 0.25, (3, 3, 3, 3)).astype(np.float32)
    weight += noise * np.random.default_rng(2).normal(size=weight.shape).astype(np.float32)
    return _model(
        [
            helper.make_node("Conv", ["x", "weight"], ["c"], pads=[1, 1, 1, 1]),
            helper.make_node("ReduceMean", ["pose", "axis"], ["p"], keepdims=1),
            helper.make_node("Add", ["c", "p"], ["s"]),
            helper.make_node("Tanh", ["s"], [output]),
        ],
        {"x": (1, 3, SIDE, SIDE), "pose": (1, 2)},
        output,
        {"weight": weight, "axis": np.array([1], np.int64)},
    )


def frozen(gain: float = 1.0) -> ModelProto:
    """A consumer that shows the cached image again, dimmed."""
    return _model(
        [helper.make_node("Mul", ["cache.image", "gain"], ["image"])],
        {"cache.image": (1, 3, SIDE, SIDE)},
        "image",
        {"gain": np.array(gain, np.float32)},
    )


def stream(seed: int, frames: int) -> dict[str, np.ndarray]:
    """A pattern that wanders, now fast, now slow."""
    rng = np.random.default_rng(seed)
    place = np.cumsum(0.25 * rng.uniform(0, 1, frames) * (1 + np.sin(np.arange(frames) / 5)))
    y, x = np.meshgrid(np.arange(SIDE) / 4, np.arange(SIDE) / 4, indexing="ij")
    images = [np.stack([np.sin(x + p), np.cos(y - 2 * p), np.sin(x * y / 6 + p)]) for p in place]
    pose = np.stack([np.sin(place), np.cos(3 * place)], 1)
    return {"x": np.array(images, np.float32), "pose": pose.astype(np.float32)}


def promise(**changed: Any) -> Promise:
    """A promise in PSNR of a consumer and a branch, the branch given first."""
    given: dict[str, Any] = {
        "exits": {"branch1": painter(0.02), "warp": frozen()},
        "train": stream(0, 30),
        "held": stream(1, 66),
        "metric": "psnr",
        "options": PromiseOptions(train_frames=20, steps=20),
    } | changed
    models = ExitModels(
        given["exits"],
        painter(),
        painter(output="cache.image"),
        "image",
        plain=frozen(0.5),
        costs={"warp": 0.1, "branch1": 0.5},
    )
    frames, terms = PromiseFrames(given["train"], given["held"]), PromiseTerms(given["metric"], (1, 2))
    return make_promise(models, LAYOUT, frames, terms, options=given["options"], at=AT, progress=quiet)


def measured_exits(
    exits: dict[str, ModelProto], arrays: dict[str, np.ndarray], frames: list[int], terms: PromiseTerms, **more: Any
) -> Measured:
    """Exits of the painter, measured."""
    models = ExitModels(exits, painter(), painter(output="cache.image"), "image")
    return measure_exits(models, arrays, frames, terms, **{"progress": quiet} | more)


@pytest.fixture(scope="module")
def made() -> Promise:
    """The promise that most tests look at."""
    return promise()


def test_measured_scores_are_those_of_the_answers() -> None:
    arrays = stream(3, 12)
    exits = {"warp": frozen(0.9), "branch1": painter(0.05)}
    told: list[tuple[str, int, int]] = []
    measured = measured_exits(
        exits,
        arrays,
        [7, 1, 3, 7],
        PromiseTerms("psnr", (2, 1, 5)),
        progress=lambda *event: told.append(event),
        stage="testing",
    )
    assert measured.exits == ("warp", "branch1")
    assert list(zip(measured.frame.tolist(), measured.age.tolist(), strict=True)) == [
        *((1, 0), (1, 1)),
        *((3, 0), (3, 1), (3, 2)),
        *((7, 0), (7, 1), (7, 2), (7, 5)),
    ]
    assert told == [("testing", 1, 3), ("testing", 2, 3), ("testing", 3, 3)]
    for t, age, scores in zip(measured.frame.tolist(), measured.age.tolist(), measured.scores, strict=True):
        whole = run_model(painter(), frame_at(arrays, t))["image"]
        alone = run_model(painter(0.05), frame_at(arrays, t))["image"]
        assert scores[1] == pytest.approx(float(to_score("psnr", psnr(alone, whole))), rel=1e-6)
        if age == 0:
            assert np.isnan(scores[0])
        else:
            shown = 0.9 * run_model(painter(), frame_at(arrays, t - age))["image"]
            # 0.9 times in NumPy and in the graph: the last bit of float32, of errors a hundred times that.
            assert scores[0] == pytest.approx(float(to_score("psnr", psnr(shown, whole))), rel=1e-4)


def test_lpips_is_measured_as_the_metric_does() -> None:
    lpips = Lpips(_random_lpips())
    arrays = stream(3, 4)
    measured = measured_exits({"warp": frozen()}, arrays, [3], PromiseTerms("lpips", (2,), lpips))
    images = [run_model(painter(), frame_at(arrays, t))["image"] for t in (1, 3)]
    assert measured.scores.tolist() == [[pytest.approx(float(np.log(lpips(images[0], images[1])[0])), rel=1e-6)]]


def test_consumers_alone_have_no_rows_without_a_cache() -> None:
    def ages(exits: dict[str, ModelProto]) -> list[int]:
        return measured_exits(exits, stream(3, 5), [4], PromiseTerms("psnr", (1, 2))).age.tolist()

    assert ages({"warp": frozen()}) == [1, 2]
    assert ages({"branch1": painter(0.1)}) == [0]
    assert reads_cache(frozen())
    assert not reads_cache(painter())


def test_what_cannot_be_measured_is_refused() -> None:
    def measure(exits: dict[str, ModelProto], metric: str) -> Measured:
        return measured_exits(exits, stream(3, 3), [2], PromiseTerms(metric, (1,)))

    with pytest.raises(ExportError, match="exit 'warp' gives NaN or Inf for frame 2; leave it out"):
        measure({"warp": frozen(float("nan"))}, "psnr")
    with pytest.raises(InputError, match="ms_ssim cannot be measured on images of 20x20 and 3 channels"):
        measure({"warp": frozen()}, "ms-ssim")
    with pytest.raises(InputError, match="no quality can be promised in metric 'ssim'"):
        measure({"warp": frozen()}, "ssim")


@pytest.mark.parametrize(("frames", "oldest"), [(10, 4), (6, 0), (89, 4), (210, 4), (4000, 6)])
def test_blocks_part_the_stream(frames: int, oldest: int) -> None:
    fitted, calibrated = split_blocks(frames, oldest, 480)
    together = sorted(np.concatenate([*fitted, *calibrated]).tolist())
    assert len(together) == len(set(together)) <= 480 + 12
    assert together[0] == oldest
    assert together[-1] < frames
    if frames <= 480:
        assert together == list(range(oldest, frames))
    spent = sum(map(len, fitted)) / len(together)
    # A third, but for blocks at the end that make no whole three.
    assert 1 / 6 <= spent <= 0.45
    assert all(np.all(np.diff(block) == 1) for block in (*fitted, *calibrated))
    # Every block that is fitted to lies between two that are calibrated on, but where the stream ends.
    assert min(map(np.min, calibrated)) < min(map(np.min, fitted))


def test_a_held_back_part_that_is_too_short_is_refused() -> None:
    with pytest.raises(InputError, match="a quality promise at ages up to 4 needs 10 held-back frames at least"):
        split_blocks(9, 4, 480)
    with pytest.raises(InputError, match="a quality promise at ages up to 2 needs 8 held-back frames at least"):
        promise(held=stream(1, 7))


def test_options_are_checked() -> None:
    with pytest.raises(InputError, match="train_frames is 1; it must be 2 or more"):
        PromiseOptions(train_frames=1)
    with pytest.raises(InputError, match="held_frames is 5; it must be 6 or more"):
        PromiseOptions(held_frames=5)
    with pytest.raises(InputError, match="steps is -1; it must be 0 or more"):
        PromiseOptions(steps=-1)


def test_nothing_to_promise_is_refused() -> None:
    with pytest.raises(ExportError, match="no exit but the exact ones was given"):
        promise(exits={})
    with pytest.raises(InputError, match="no quality can be promised in metric 'mse'"):
        promise(metric="mse")


def test_the_record_says_what_was_calibrated(made: Promise) -> None:
    record, calibration = made.record, _calibration(made)
    assert list(record) == [
        *("method", "metric", "exits", "cold_exits", "ages", "samples", "frames", "at", "file", "macs", "predictor"),
        "thresholds",
    ]
    assert record["metric"] == "psnr_db"
    # Those that read the cache come first, however they were given.
    assert record["exits"] == ["warp", "branch1"]
    assert record["cold_exits"] == ["branch1"]
    assert record["ages"] == [1, 2]
    assert record["at"] == "2026-11-20T12:00:00Z"
    assert record["samples"] == len(calibration.age) == 3 * record["frames"]
    assert record["frames"] == len(set(calibration.frame.tolist())) == _calibrated_frames()
    assert set(record["macs"]) == {"whole", "plain", "warp", "branch1", "predictor", "predictor_cold"}
    assert record["macs"]["whole"] == 3 * 27 * SIDE * SIDE
    assert made.predictor is not None
    assert record["macs"]["predictor"] == count_macs(made.predictor)
    errors = np.abs(calibration.predicted - calibration.measured)
    for column, name in enumerate(record["exits"]):
        assert record["predictor"]["error"][name] == pytest.approx(np.nanmedian(errors[:, column]), abs=1e-4)


def test_what_is_calibrated_is_what_the_graphs_give(made: Promise) -> None:
    calibration, held = _calibration(made), stream(1, 66)
    assert made.predictor is not None
    assert made.predictor_cold is not None
    for age in (0, 1, 2):
        row = int(np.flatnonzero(calibration.age == age)[7])
        t = int(calibration.frame[row])
        feeds = frame_at(held, t)
        if age:
            feeds |= run_model(thumbnail_graph(LAYOUT), frame_at(held, t - age))
            feeds |= {AGE_INPUT: np.full((1, 1), age, np.float32)}
            assert CACHE_THUMBNAIL in feeds
        given = run_model(made.predictor if age else made.predictor_cold, feeds)
        first = 0 if age else 1
        np.testing.assert_array_equal(calibration.predicted[row, first:], given["predicted"][0])
        np.testing.assert_array_equal(calibration.spread[row, first:], given["spread"][0])
        assert np.isnan(calibration.measured[row, :first]).all()
        assert np.isnan(calibration.predicted[row, :first]).all()
        alone = run_model(painter(0.02), frame_at(held, t))["image"]
        whole = run_model(painter(), frame_at(held, t))["image"]
        assert from_score("psnr", calibration.measured[row, 1]) == pytest.approx(psnr(alone, whole), rel=1e-5)


def test_predictions_follow_the_frames(made: Promise) -> None:
    """On frames that nothing was fitted to, predicted scores go with measured ones at every age."""
    calibration = _calibration(made)
    for age in (1, 2):
        rows = calibration.age == age
        assert np.corrcoef(calibration.predicted[rows, 0], calibration.measured[rows, 0])[0, 1] > 0.7
        # One frame further back, or forth, and nothing would go with anything: the motion is fast and slow in turns.
        assert np.corrcoef(calibration.predicted[rows, 0], np.roll(calibration.measured[rows, 0], 9))[0, 1] < 0.6


def test_a_rule_can_be_made_of_it(made: Promise) -> None:
    calibration = _calibration(made)
    rule = calibration.rule(Quality("psnr", 20.0, 0.9))
    assert set(rule.margins) == {0, 1, 2}
    assert made.record["thresholds"], "no threshold was found that can be promised"
    for outcome in made.record["thresholds"]:
        assert outcome["confidence"] == 0.95
        assert 0.0 <= outcome["coverage"] <= 1.0
        assert sum(outcome["shares"].values()) == pytest.approx(1.0, abs=1e-3)


def test_the_same_frames_make_the_same_promise(made: Promise) -> None:
    again = promise()
    assert again.calibration == made.calibration
    assert again.record == made.record
    for one, other in ((again.predictor, made.predictor), (again.predictor_cold, made.predictor_cold)):
        assert one is not None
        assert other is not None
        assert [_bytes(t) for t in one.graph.initializer] == [_bytes(t) for t in other.graph.initializer]


def test_each_predictor_is_there_where_it_has_exits() -> None:
    small: dict[str, Any] = {"held": stream(1, 12), "options": PromiseOptions(train_frames=4, steps=0)}
    warm = promise(exits={"warp": frozen()}, **small)
    assert warm.predictor_cold is None
    assert warm.predictor is not None
    assert warm.record["cold_exits"] == []
    assert set(_calibration(warm).age.tolist()) == {1, 2}
    cold = promise(exits={"branch1": painter(0.02)}, **small)
    assert cold.predictor is None
    assert cold.predictor_cold is not None
    assert cold.record["ages"] == []
    assert set(_calibration(cold).age.tolist()) == {0}


def test_outcomes_come_from_the_half_that_made_no_margin() -> None:
    """Halves that differ: the margin of the easy one is none at all, and loses frames of the treacherous one."""
    frames = np.concatenate([np.arange(0, 40), np.arange(50, 90)])
    kind = np.arange(80) % 5
    second = frames >= 50
    # Of five frames three are good, one is bad and known to be; one is good, or in the second half worse than it looks.
    measured = np.where((kind == 3) | ((kind == 4) & second), 0.5, 0.005)
    predicted = np.where(kind == 3, 0.5, np.where(kind == 4, 0.008, 0.005))
    calibration = Calibration(
        "lpips",
        ("warp",),
        (),
        (1,),
        np.log(predicted)[:, None].astype(np.float32),
        np.full((80, 1), 0.1, np.float32),
        np.log(measured)[:, None].astype(np.float32),
        np.ones(80, np.int32),
        frames.astype(np.int32),
    )
    found = {outcome["threshold"]: outcome for outcome in cross_validated(calibration, {"warp": 0.2})}
    assert set(found) == {0.01, 0.02, 0.05, 0.1}
    for outcome in found.values():
        # First half's margin on the second: 4 in 5 are answered, 1 in 5 lost. The other way: 3 in 5, none lost.
        assert outcome["age"] == 1
        assert outcome["coverage"] == pytest.approx((0.8 + 1.0) / 2)
        assert outcome["shares"] == {"warp": pytest.approx((0.8 + 0.6) / 2), "whole": pytest.approx((0.2 + 0.4) / 2)}
        assert outcome["saved"] == pytest.approx(0.8 * 0.7)


def test_one_run_of_frames_has_no_halves(made: Promise) -> None:
    calibration = _calibration(made)
    first = calibration.frame <= calibration.frame.min() + 3
    arrays = {name: getattr(calibration, name)[first] for name in ("predicted", "spread", "measured", "age", "frame")}
    assert cross_validated(dataclasses.replace(calibration, **arrays), {"warp": 0.1, "branch1": 0.2}) == []


def _calibrated_frames() -> int:
    return sum(map(len, split_blocks(66, 2, 480)[1]))


def _calibration(made: Promise) -> Calibration:
    arrays = np.load(io.BytesIO(made.calibration))
    keys = ("metric", "exits", "cold_exits", "ages")
    return Calibration(**{key: made.record[key] for key in keys}, **{name: arrays[name] for name in arrays.files})


def _bytes(tensor: TensorProto) -> bytes:
    return numpy_helper.to_array(tensor).tobytes()


def _model(
    nodes: list[onnx.NodeProto], inputs: dict[str, tuple[int, ...]], output: str, weights: dict[str, np.ndarray]
) -> ModelProto:
    value: Callable[..., onnx.ValueInfoProto] = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "test",
        [value(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [value(output, TensorProto.FLOAT, (1, 3, SIDE, SIDE))],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    for node, number in zip(graph.node, itertools.count(), strict=False):
        node.name = f"n{number}"
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _random_lpips() -> dict[str, np.ndarray]:
    """Weights of the right shapes; distances of them are positive, and mean nothing."""
    from warpcache.engine.metrics.lpips import _expected_shapes

    rng = np.random.default_rng(7)
    made = {}
    for name, shape in _expected_shapes().items():
        array = rng.normal(0, 1 / np.sqrt(np.prod(shape[1:])), shape) if len(shape) == 4 else np.zeros(shape)
        made[name] = np.abs(array).astype(np.float32) if name.startswith("lin") else array.astype(np.float32)
    return made

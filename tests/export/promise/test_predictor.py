"""The predictor: its numbers against plain references, its graphs against its modules, its fit on planted truths."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto

from warpcache.engine.errors import ExportError
from warpcache.engine.spec import AGE_INPUT
from warpcache.export.adapter.layout import AdapterLayout, ImageInput, VectorInput
from warpcache.export.frames.surface import Surface
from warpcache.export.graph.index import GraphIndex
from warpcache.export.graph.run import open_session, run_model, run_session
from warpcache.export.promise.exit_quality import Measured
from warpcache.export.promise.predictor import (
    BRANCH_DRIFT,
    CACHE_THUMBNAIL,
    LEAST_SPREAD,
    Features,
    Head,
    Predictor,
    Thumbnail,
    ThumbnailScale,
    cold_graph,
    thumbnail_graph,
    warm_graph,
)
from warpcache.export.promise.predictor_fit import PromiseFrames, _ridge, fit_predictor

SURFACE = Surface("atlas", ("condition", 0, 2), ("condition", 5))
LAYOUT = AdapterLayout(
    height=32,
    width=48,
    outputs=(("image", 3),),
    images=(ImageInput("condition", 6, 32, 48),),
    vectors=(VectorInput("pose", (1, 5)),),
    taps=(),
    surface=SURFACE,
    atlas_size=(12, 12),
)
FRAMES = 60
# Sums of at most 512 float32 numbers of size 1, taken in another order.
ROUNDING = 1e-5


def smooth(rng: np.random.Generator, frames: int, count: int, speed: float = 0.3) -> NDArray[np.float64]:
    """Numbers that wander without leaving [-1, 1], [frames, count]."""
    phase = np.cumsum(rng.uniform(0.2, 1.8, (frames, count)) * speed, axis=0)
    wandering: NDArray[np.float64] = np.sin(phase + rng.uniform(0, 6, count))
    return wandering


def stream(seed: int, frames: int = FRAMES) -> dict[str, np.ndarray]:
    """A sheet that slides over a small image; UV, mask and atlas belong together, the other channels wander."""
    rng = np.random.default_rng(seed)
    shift = 0.2 * smooth(rng, frames, 2)  # in grid_sample units
    y, x = np.meshgrid((np.arange(32) + 0.5) / 16 - 1, (np.arange(48) + 0.5) / 24 - 1, indexing="ij")
    v, u = np.meshgrid((np.arange(12) + 0.5) / 12, (np.arange(12) + 0.5) / 12, indexing="ij")
    condition = np.zeros((frames, 6, 32, 48), np.float32)
    atlas = np.ones((frames, 3, 12, 12), np.float32)
    levels = smooth(rng, frames, 3)
    for t in range(frames):
        # The sheet spans [-0.5, 0.5] of the picture around its shift.
        sheet_u, sheet_v = x - shift[t, 0] + 0.5, y - shift[t, 1] + 0.5
        inside = (sheet_u > 0) & (sheet_u < 1) & (sheet_v > 0) & (sheet_v < 1)
        condition[t, 0], condition[t, 1], condition[t, 5] = sheet_u * inside, sheet_v * inside, inside
        condition[t, 2:5] = levels[t][:, None, None] * np.cos(3 * x)
        atlas[t, 0], atlas[t, 1] = u - 0.5 + shift[t, 0], v - 0.5 + shift[t, 1]
    return {"condition": condition, "pose": smooth(rng, frames, 5).astype(np.float32), "atlas": atlas}


def frame(arrays: dict[str, np.ndarray], t: int) -> dict[str, np.ndarray]:
    """One frame of a stream."""
    return {name: array[t : t + 1] for name, array in arrays.items()}


def plain_thumbnail(layout: AdapterLayout, inputs: dict[str, np.ndarray]) -> NDArray[np.float64]:
    """The thumbnail with loops and slices, in float64."""
    numbers: list[float] = []
    for image in layout.images:
        down, across = math.ceil(image.height / 32), math.ceil(image.width / 32)
        for channel in inputs[image.name][0].astype(np.float64):
            picked = channel[down // 2 :: down, across // 2 :: across]
            rows, columns = math.ceil(picked.shape[0] / 8), math.ceil(picked.shape[1] / 8)
            for top in range(0, picked.shape[0], rows):
                for left in range(0, picked.shape[1], columns):
                    numbers.append(float(picked[top : top + rows, left : left + columns].mean()))
    for vector in layout.vectors:
        flat = inputs[vector.name].astype(np.float64).ravel()
        length = math.ceil(len(flat) / 512)
        numbers += [float(flat[k : k + length].mean()) for k in range(0, len(flat), length)]
    return np.array(numbers)


def planted(arrays: dict[str, np.ndarray], frames: range, offset: float = 0.0, branch: float = 0.5) -> Measured:
    """Exits whose scores are known: a consumer's grows with age and motion, a branch's with the pose."""
    place = arrays["atlas"][:, :2].mean((2, 3)).astype(np.float64)
    rows = []
    for t in frames:
        hard = branch * arrays["pose"][t, 0] + offset - 3.0
        rows.append((t, 0, np.nan, hard))
        for age in (1, 2, 3):
            if age <= t:
                moved = np.linalg.norm(place[t] - place[t - age])
                rows.append((t, age, np.log(moved + 0.01) + 0.3 * np.log(age) + offset, hard))
    table = np.array(rows)
    return Measured(("warp", "branch1"), table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2:])


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A predictor of planted scores with its graphs, and the streams it was fitted to."""

    predictor: Predictor
    warm: ModelProto
    cold: ModelProto
    train: dict[str, np.ndarray]
    held: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def fitted() -> Fitted:
    """Unseen frames are 0.7 worse than training frames."""
    train, held = stream(0), stream(1)
    unseen = planted(held, range(3, 30), offset=0.7)
    predictor = fit_predictor(
        LAYOUT, PromiseFrames(train, held), planted(train, range(FRAMES)), unseen, blocks=3, steps=50
    )
    return Fitted(predictor, warm_graph(predictor), cold_graph(predictor), train, held)


def warm_feeds(held: dict[str, np.ndarray], t: int, age: int) -> dict[str, np.ndarray]:
    """What the graph ``predictor`` takes for frame t and a cache that is `age` frames old."""
    then = frame(held, t - age)
    return {
        **{name: array for name, array in frame(held, t).items() if name != "atlas"},
        CACHE_THUMBNAIL: plain_thumbnail(LAYOUT, then).astype(np.float32)[None],
        "cache.atlas": then["atlas"],
        AGE_INPUT: np.full((1, 1), age, np.float32),
    }


@pytest.mark.parametrize(
    ("images", "vectors"),
    [
        ([(6, 128, 128)], [(1, 5)]),
        ([(3, 5, 7), (2, 33, 100)], []),
        ([(1, 40, 9)], [(1,), (1, 1300), (1, 4, 150)]),
        ([], [(1, 512)]),
    ],
)
def test_thumbnails_are_picked_averaged_and_flattened(images: list[Any], vectors: list[Any]) -> None:
    layout = AdapterLayout(
        height=8,
        width=8,
        outputs=(("image", 3),),
        images=tuple(ImageInput(f"image{k}", *size) for k, size in enumerate(images)),
        vectors=tuple(VectorInput(f"vector{k}", size) for k, size in enumerate(vectors)),
        taps=(),
    )
    rng = np.random.default_rng(3)
    inputs = {i.name: rng.normal(size=(1, i.channels, i.height, i.width)).astype(np.float32) for i in layout.images}
    inputs |= {v.name: rng.normal(size=v.shape).astype(np.float32) for v in layout.vectors}
    made = Thumbnail(layout)({name: torch.from_numpy(array) for name, array in inputs.items()})
    expected = plain_thumbnail(layout, inputs)
    assert made.dtype == torch.float32
    assert made.shape == (1, len(expected))
    np.testing.assert_allclose(made[0].numpy(), expected, atol=ROUNDING)
    assert len(Thumbnail(layout).groups()) == len(expected)


def test_the_thumbnail_is_a_graph() -> None:
    graph = thumbnail_graph(LAYOUT)
    assert set(GraphIndex(graph).inputs) == {"condition", "pose"}
    inputs = frame(stream(3, 5), 4)
    made = run_model(graph, inputs)[CACHE_THUMBNAIL]
    expected = plain_thumbnail(LAYOUT, inputs)
    assert made.dtype == np.float32
    assert made.shape == (1, len(expected)) == GraphIndex(graph).specs[CACHE_THUMBNAIL].shape
    np.testing.assert_allclose(made[0], expected, atol=ROUNDING)


def test_thumbnails_of_integers_and_switches() -> None:
    layout = dataclasses.replace(
        LAYOUT,
        images=(ImageInput("mask", 1, 4, 4, torch.bool),),
        vectors=(VectorInput("person", (1,), torch.int64),),
        surface=None,
    )
    mask = np.eye(4, dtype=bool)[None, None]
    made = run_model(thumbnail_graph(layout), {"mask": mask, "person": np.array([7], np.int64)})[CACHE_THUMBNAIL]
    np.testing.assert_array_equal(made[0], [*np.eye(4).ravel(), 7.0])


def test_motion_of_a_sliding_sheet_is_its_shift() -> None:
    held = stream(2)
    features = Features(LAYOUT, _unit_scale())
    t, s = 20, 14
    picked = features.thumbnail.pick({"condition": torch.from_numpy(held["condition"][t : t + 1])})
    atlas = torch.from_numpy(held["atlas"][s : s + 1])
    mean, largest, square, within, hidden = features._motion(picked, atlas, SURFACE)[0].tolist()
    shift = held["atlas"][s, :2, 0, 0].astype(np.float64) - held["atlas"][t, :2, 0, 0]
    length = float(np.hypot(*shift))
    # 0.001 is added to the share of the picture that the sheet covers, up to 0.25, against a division by 0: 1 % or so.
    assert mean == pytest.approx(length, rel=0.02, abs=2e-3)
    # Clipped at the rim, too (see below): one cell in twelve a side, by a fifth of this long way at the most.
    assert square == pytest.approx(length**2, rel=0.04, abs=1e-5)
    # At the sheet's rim UV lies within half a texel of its border, where sampling is clipped: up to 1/24 more or less.
    assert math.sqrt(largest) == pytest.approx(length, abs=2 / 24)
    assert within < 0.02 * length**2 + 1e-4
    assert hidden == pytest.approx(1e-3, abs=5e-3)


def test_hidden_surface_counts() -> None:
    held = stream(2)
    features = Features(LAYOUT, _unit_scale())
    picked = features.thumbnail.pick({"condition": torch.from_numpy(held["condition"][20:21])})
    atlas = torch.from_numpy(held["atlas"][20:21].copy())
    atlas[:, 2, :, :6] = 0.0
    hidden = float(features._motion(picked, atlas, SURFACE)[0, 4])
    # Half the sheet; it is 12 to 13 of the 24 picked columns wide, so one column is 8 %.
    assert hidden == pytest.approx(0.5, abs=0.1)


def test_novelty_is_the_distance_to_the_nearest_known_frame() -> None:
    rng = np.random.default_rng(5)
    size = len(Thumbnail(LAYOUT).groups())
    basis = np.linalg.qr(rng.normal(size=(size, 4)))[0].astype(np.float32)
    centres = rng.normal(size=(7, 4)).astype(np.float32)
    mean, deviation = rng.normal(size=size).astype(np.float32), rng.uniform(0.5, 2, size).astype(np.float32)
    features = Features(LAYOUT, ThumbnailScale(mean, deviation, basis, centres, 2, novelty=2.5))
    thumbnails = rng.normal(size=(6, size)).astype(np.float32) * 3
    pose, novelty = features.cold(torch.from_numpy(thumbnails))
    standard = np.clip((thumbnails.astype(np.float64) - mean) / deviation, -6, 6)
    # In the whole space, where the centres are points on the span of the basis.
    known = centres.astype(np.float64) @ basis.T
    distances = np.linalg.norm(standard[:, None] - known[None], axis=2).min(1)
    # Squares of size 10^3 cancel to the smallest one: float32's 6e-8 of that, halved by the root.
    np.testing.assert_allclose(novelty[:, 0].numpy(), distances / 2.5, rtol=1e-4)
    np.testing.assert_allclose(pose.numpy(), (standard @ basis)[:, :2], atol=1e-4)


def test_change_is_the_mean_difference_in_deviations() -> None:
    rng = np.random.default_rng(6)
    scale = _unit_scale()
    deviation = rng.uniform(0.1, 2, len(scale.mean)).astype(np.float32)
    features = Features(dataclasses.replace(LAYOUT, surface=None), dataclasses.replace(scale, deviation=deviation))
    a, b = rng.normal(size=(2, 1, len(deviation))).astype(np.float32)
    _, change = features.warm(torch.from_numpy(a), torch.from_numpy(b), {}, None, torch.ones(1, 1))
    expected = np.minimum(np.abs(a - b) / deviation, 6.0).mean()
    assert float(change) == pytest.approx(float(expected), rel=1e-5)


def test_a_fit_finds_planted_scores(fitted: Fitted) -> None:
    warm, cold, held = open_session(fitted.warm), open_session(fitted.cold), fitted.held
    truth = planted(held, range(33, 60), offset=0.7)
    for column, name in enumerate(truth.exits):
        rows = [r for r in range(len(truth.frame)) if not np.isnan(truth.scores[r, column])][::4]
        predicted = []
        for row in rows:
            t, age = int(truth.frame[row]), int(truth.age[row])
            given = run_session(warm, warm_feeds(held, t, age)) if age else run_session(cold, frame(held, t))
            predicted.append(float(given["predicted"][0, column if age else 0]))
        scores = truth.scores[rows, column]
        left = 1 - np.square(predicted - scores).sum() / np.square(scores - scores.mean()).sum()
        # Explained variance on frames that nothing was fitted to; shuffled scores give less than 0 (see below).
        assert left > 0.6, f"{name}: {left}"
        assert abs(np.mean(predicted - scores)) < 0.35, f"{name}: the offset of 0.7 of unseen frames was not learnt"


def test_a_fit_to_noise_explains_nothing(fitted: Fitted) -> None:
    """The measure of the test above can fail: with shuffled scores nothing is left of it."""
    train, held = fitted.train, fitted.held
    rng = np.random.default_rng(9)

    def shuffled(measured: Measured) -> Measured:
        order = rng.permutation(len(measured.frame))
        scores = np.where(np.isnan(measured.scores), np.nan, np.nan_to_num(measured.scores, nan=-3.0)[order])
        return dataclasses.replace(measured, scores=scores)

    predictor = fit_predictor(
        LAYOUT,
        PromiseFrames(train, held),
        shuffled(planted(train, range(FRAMES))),
        shuffled(planted(held, range(3, 30))),
        blocks=3,
        steps=50,
    )
    assert predictor.branches is not None
    assert not predictor.branches.deep
    truth = planted(held, range(33, 60))
    pose, _ = predictor.features.cold(torch.from_numpy(_thumbnails_of(held)))
    predicted = predictor.branches(pose)[0].detach().numpy()[33:, 0]
    scores = truth.scores[truth.age == 0, 1]
    assert 1 - np.square(predicted - scores).sum() / np.square(scores - scores.mean()).sum() < 0.2


def test_graphs_give_what_the_modules_give(fitted: Fitted) -> None:
    predictor, held = fitted.predictor, fitted.held
    t, age = 40, 3
    feeds = warm_feeds(held, t, age)
    with torch.no_grad():
        inputs = {name: torch.from_numpy(feeds[name]) for name in ("condition", "pose")}
        cached, atlas = (torch.from_numpy(feeds[name]) for name in (CACHE_THUMBNAIL, "cache.atlas"))
        expected = predictor.warm(inputs, cached, atlas, torch.full((1, 1), float(age)))
    index = GraphIndex(fitted.warm)
    assert set(index.inputs) == {AGE_INPUT, CACHE_THUMBNAIL, "cache.atlas", "condition", "pose"}
    assert [(name, index.specs[name].shape) for name in index.outputs] == [
        ("predicted", (1, 2)),
        ("spread", (1, 2)),
        ("novelty", (1, 1)),
        ("change", (1, 1)),
    ]
    given = run_model(fitted.warm, feeds)
    for name, value in zip(index.outputs, expected, strict=True):
        assert given[name].dtype == np.float32
        # Scores of size 5 from float32 sums.
        np.testing.assert_allclose(given[name], value.numpy(), atol=1e-4, rtol=1e-4)
    assert (given["spread"] > LEAST_SPREAD).all()
    assert given["spread"][0, 1] > BRANCH_DRIFT  # the branch's column


def test_a_branch_is_predicted_alike_with_and_without_a_cache(fitted: Fitted) -> None:
    cold, warm, held = fitted.cold, fitted.warm, fitted.held
    assert set(GraphIndex(cold).inputs) == {"condition", "pose"}
    for t, age in ((10, 1), (40, 3), (59, 2)):
        alone, cached = run_model(cold, frame(held, t)), run_model(warm, warm_feeds(held, t, age))
        assert list(alone) == ["predicted", "spread", "novelty"]
        for name in ("predicted", "spread"):
            np.testing.assert_allclose(alone[name], cached[name][:, 1:], rtol=1e-5)
        np.testing.assert_allclose(alone["novelty"], cached["novelty"], rtol=1e-5)


def test_held_back_frames_set_what_is_novel_and_what_is_another_scene(fitted: Fitted) -> None:
    train, held = fitted.train, fitted.held
    features = fitted.predictor.features
    thumbnails = torch.from_numpy(_thumbnails_of(held))
    assert float(features.cold(thumbnails)[1].max()) == pytest.approx(1 / 1.5, rel=1e-5)
    # 60 frames and 256 places: every training frame is stored, and a stored one is no news.
    assert float(features.cold(torch.from_numpy(_thumbnails_of(train)))[1].max()) < 0.3
    other = {name: array.copy() for name, array in frame(held, 40).items()}
    other["condition"][:, 2:5] = 4.0
    strange = run_model(fitted.warm, warm_feeds(held, 40, 1) | {"condition": other["condition"]})
    assert strange["novelty"].item() > 1.0
    assert strange["change"].item() > 1.0
    assert run_model(fitted.warm, warm_feeds(held, 40, 1))["change"].item() < 1.0


def test_the_same_frames_give_the_same_predictor(fitted: Fitted) -> None:
    train, held = fitted.train, fitted.held
    unseen = planted(held, range(3, 30), offset=0.7)
    again = fit_predictor(LAYOUT, PromiseFrames(train, held), planted(train, range(FRAMES)), unseen, blocks=3, steps=50)
    for name, value in fitted.predictor.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_the_network_is_kept_where_it_helps() -> None:
    """A score that no linear function of the features follows: 2 |pose|."""
    train, held = stream(0, 150), stream(1, 40)

    def bent(arrays: dict[str, np.ndarray], frames: range) -> Measured:
        scores = 2.0 * np.abs(arrays["pose"][frames.start : frames.stop, :1].astype(np.float64))
        return Measured(("branch1",), np.array(frames), np.zeros(len(frames), np.int64), scores)

    def error(steps: int) -> tuple[float, bool]:
        layout = dataclasses.replace(LAYOUT, images=(), surface=None)
        one = fit_predictor(
            layout, PromiseFrames(train, held), bent(train, range(150)), bent(held, range(20)), blocks=2, steps=steps
        )
        assert one.branches is not None
        assert one.consumers is None
        with torch.no_grad():
            predicted = one.cold({"pose": torch.from_numpy(held["pose"][20:])})[0].numpy()
        return float(np.abs(predicted - bent(held, range(20, 40)).scores).mean()), one.branches.deep

    (linear, without), (bended, deep) = error(0), error(300)
    assert not without
    assert deep
    assert bended < 0.75 * linear


def test_a_stream_that_stands_still_is_predicted_too() -> None:
    still = {name: np.repeat(array[:1], 12, 0) for name, array in stream(0).items()}
    one = fit_predictor(
        LAYOUT, PromiseFrames(still, still), planted(still, range(12)), planted(still, range(3, 9)), blocks=2, steps=5
    )
    given = run_model(warm_graph(one), warm_feeds(still, 10, 2))
    assert all(np.isfinite(value).all() for value in given.values())
    assert given["novelty"].item() < 1.0
    assert given["change"].item() < 1.0


def test_an_array_of_one_frame_serves_every_frame() -> None:
    constant = {name: array[:1] if name == "pose" else array for name, array in stream(0, 20).items()}
    repeated = constant | {"pose": np.repeat(constant["pose"], 20, 0)}
    models = [
        fit_predictor(
            LAYOUT,
            PromiseFrames(a, a),
            planted(repeated, range(20)),
            planted(repeated, range(3, 12)),
            blocks=3,
            steps=0,
        )
        for a in (constant, repeated)
    ]
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name


def test_ridge_solves_the_normal_equations_and_foresees_without_the_fold() -> None:
    rng = np.random.default_rng(11)
    features, fold = rng.normal(size=(60, 4)), np.arange(60) // 12
    targets = features @ rng.normal(size=(4, 1)) + 2.0 + 0.1 * rng.normal(size=(60, 1))
    weights, offset, foreseen = _ridge(features, targets, fold, (0.1,))

    def solve(rows: NDArray[np.bool_]) -> NDArray[np.float64]:
        # With the offset as a column that is not held back.
        design = np.column_stack([features[rows], np.ones(rows.sum())])
        held_back = np.diag([0.1 * rows.sum()] * 4 + [0.0])
        solved: NDArray[np.float64] = np.linalg.solve(design.T @ design + held_back, design.T @ targets[rows])
        return solved

    whole = solve(np.ones(60, bool))
    np.testing.assert_allclose(np.append(weights[:, 0], offset), whole[:, 0], rtol=1e-8)
    part = solve(fold != 2)
    np.testing.assert_allclose(foreseen[fold == 2], features[fold == 2] @ part[:4] + part[4], rtol=1e-8)


def test_ridge_is_weak_where_there_is_a_signal_and_strong_where_there_is_none() -> None:
    rng = np.random.default_rng(12)
    features, fold = rng.normal(size=(60, 10)), np.arange(60) // 10
    truth = rng.normal(size=(10, 1))
    targets = np.concatenate([features @ truth, rng.normal(size=(60, 1))], 1)
    weights, _, _ = _ridge(features, targets, fold, (0.01, 1000.0))
    np.testing.assert_allclose(weights[:, :1], truth, rtol=0.2, atol=0.05)
    assert np.abs(weights[:, 1]).max() < 0.01
    alone, offset, _ = _ridge(features, targets, np.zeros(60, np.int64), (0.01, 1000.0))
    assert np.abs(alone).max() < 0.01
    np.testing.assert_allclose(offset, targets.mean(0), atol=0.01)


def test_spreads_stay_within_a_factor_e() -> None:
    head = Head(np.zeros(3, np.float32), np.ones(3, np.float32), 1)
    with torch.no_grad():
        head.spread.weight.fill_(50.0)
        head.spread.bias.fill_(math.log(0.3))
        spread = head(torch.tensor([[6.0, 6.0, 6.0], [-6.0, -6.0, -6.0], [0.0, 0.0, 0.0]]))[1][:, 0] - LEAST_SPREAD
    np.testing.assert_allclose(spread.numpy(), [0.3 * math.e, 0.3 / math.e, 0.3], rtol=1e-5)


def test_a_fit_refuses_what_it_cannot_use() -> None:
    arrays = stream(0, 12)
    good = planted(arrays, range(12))
    other = dataclasses.replace(good, exits=("warp", "branch2"))
    with pytest.raises(ExportError, match="exits warp, branch1 were measured on training frames and warp, branch2"):
        fit_predictor(LAYOUT, PromiseFrames(arrays, arrays), good, other, blocks=2)
    turned = dataclasses.replace(good, exits=("branch1", "warp"), scores=good.scores[:, ::-1])
    with pytest.raises(ExportError, match="exits branch1, warp must be ordered"):
        fit_predictor(LAYOUT, PromiseFrames(arrays, arrays), turned, turned, blocks=2)
    cold = dataclasses.replace(good, frame=good.frame[:1], age=good.age[:1], scores=good.scores[:1])
    with pytest.raises(ExportError, match="no exit was measured on some frames"):
        fit_predictor(LAYOUT, PromiseFrames(arrays, arrays), good, cold, blocks=2)


def _unit_scale() -> ThumbnailScale:
    size = len(Thumbnail(LAYOUT).groups())
    zeros, ones = np.zeros(size, np.float32), np.ones(size, np.float32)
    return ThumbnailScale(zeros, ones, np.eye(size, 2, dtype=np.float32), np.zeros((1, 2), np.float32), 2)


def _thumbnails_of(arrays: dict[str, np.ndarray]) -> NDArray[np.float32]:
    frames = len(arrays["condition"])
    return np.stack([plain_thumbnail(LAYOUT, frame(arrays, t)) for t in range(frames)]).astype(np.float32)

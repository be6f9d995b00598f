"""Parity against float32 by independent formulas, and the search for what has to be kept."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from warpcache.engine.bundle.manifest import Cut, ExitRecord, InputRecord, Manifest, module_record
from warpcache.engine.metrics.images import flip
from warpcache.engine.spec import TensorSpec
from warpcache.export.graph.surgery import normalise
from warpcache.export.precision.casting import cast_model
from warpcache.export.precision.parity import ExitParity, Parity, fewest_kept

RNG = np.random.default_rng(2)
FRAMES = RNG.uniform(-1, 1, (7, 3, 8, 8)).astype(np.float32)
EXITS = {"whole": "generator", "plain": "plain", "warp": "warp"}
X, HIDDEN, IMAGE = (TensorSpec(name, "float32", (1, 3, 8, 8)) for name in ("x", "cache.h", "image"))


def model(nodes: list[tuple[str, list[str], str]], inputs: list[str], output: str, **values: float) -> ModelProto:
    graph = helper.make_graph(
        [helper.make_node(op, reads, [made], name=made) for op, reads, made in nodes],
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 3, 8, 8)) for name in inputs],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, (1, 3, 8, 8))],
        [numpy_helper.from_array(np.array(value, np.float32), name) for name, value in values.items()],
    )
    return normalise(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def models(scale: float = 0.7) -> dict[str, ModelProto]:
    """generator: image = 0.7 x; producer: cache.h = x; plain: 0.7 cache.h; warp: 0.7 cache.h + 0.1 x."""
    return {
        "generator": model([("Mul", ["x", "a"], "image")], ["x"], "image", a=scale),
        "producer": model([("Identity", ["x"], "cache.h")], ["x"], "cache.h"),
        "plain": model([("Mul", ["cache.h", "a"], "image")], ["cache.h"], "image", a=scale),
        "warp": model(
            [("Mul", ["cache.h", "a"], "m"), ("Mul", ["x", "b"], "n"), ("Add", ["m", "n"], "image")],
            ["cache.h", "x"],
            "image",
            a=scale,
            b=0.1,
        ),
    }


def manifest(image_output: str | None = "image") -> Manifest:
    ends = {
        "generator": ((X,), (IMAGE,)),
        "producer": ((X,), (HIDDEN,)),
        "plain": ((HIDDEN,), (IMAGE,)),
        "warp": ((HIDDEN, X), (IMAGE,)),
    }
    return Manifest(
        name="parity",
        created={},
        inputs=(InputRecord(X),),
        outputs=(IMAGE,),
        image_output=image_output,
        fps=None,
        cut=Cut(("h",)),
        cache=(HIDDEN,),
        modules={name: module_record(name, *specs) for name, specs in ends.items()},
        exits=tuple(ExitRecord(name, (module,), 1.0) for name, module in EXITS.items()),
        calibration=None,
    )


def halved(graphs: dict[str, ModelProto]) -> dict[str, ModelProto]:
    return {name: cast_model(graph, "float16", io={"cache.h": "float16"}).model for name, graph in graphs.items()}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak 2, as images are in [-1, 1]."""
    return 10 * math.log10(4 / np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))


def half(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16)


def test_every_exit_is_measured_through_producer_and_cache() -> None:
    parity = Parity(models(), manifest(), {"x": FRAMES}, sources=3, age=2)
    assert parity.sources == [0, 2, 4]
    measured = parity.measure(halved(models()), flip=True)
    a, b = np.float16(0.7), np.float16(0.1)
    x, low = FRAMES, half(FRAMES)
    pairs = {
        "whole": [(t, t) for t in (0, 2, 4, 6)],
        "plain": [(0, 0), (2, 0), (2, 2), (4, 2), (4, 4), (6, 4)],
        "warp": [(2, 0), (4, 2), (6, 4)],
    }
    # NumPy's float16 rounds after every operation, as the converted graphs do.
    ours = {
        "whole": lambda t, s: low[t] * a,
        "plain": lambda t, s: low[s] * a,
        "warp": lambda t, s: low[s] * a + low[t] * b,
    }
    exact = {
        "whole": lambda t, s: x[t] * np.float32(0.7),
        "plain": lambda t, s: x[s] * np.float32(0.7),
        "warp": lambda t, s: x[s] * np.float32(0.7) + x[t] * np.float32(0.1),
    }
    for name, exit_parity in measured.items():
        answers = [(ours[name](t, s).astype(np.float32), exact[name](t, s)) for t, s in pairs[name]]
        assert exit_parity.psnr_db == pytest.approx([psnr(*answer) for answer in answers], abs=1e-6)
        assert exit_parity.max_error == pytest.approx(max(np.abs(p - q).max() for p, q in answers), rel=1e-6)
        assert exit_parity.flip == pytest.approx(np.mean([flip(p, q) for p, q in answers]), rel=1e-6)
        assert exit_parity.nan == 0
        record = exit_parity.to_record()
        assert record["frames"] == len(pairs[name])
        assert record["psnr_db"]["worst"] == pytest.approx(min(psnr(*answer) for answer in answers), abs=1e-3)
        assert record["psnr_db"]["mean"] == pytest.approx(np.mean([psnr(*answer) for answer in answers]), abs=1e-3)


def test_nan_and_overflow_are_counted_and_no_exit_holds_with_them() -> None:
    parity = Parity(models(), manifest(), {"x": FRAMES[:3]}, sources=1, age=1)
    graphs = halved(models())
    # Infinity times zero where x is 0 or so; finite elsewhere: 1e5 cannot be a constant of float16, 6e4 twice can.
    graphs["warp"] = cast_model(
        model(
            [("Mul", ["cache.h", "up"], "m"), ("Mul", ["m", "up"], "n"), ("Mul", ["n", "down"], "image")],
            ["cache.h", "x"],
            "image",
            up=6e4,
            down=1e-4,
        ),
        "float16",
        io={"cache.h": "float16"},
    ).model
    measured = parity.measure(graphs, flip=True)
    with np.errstate(over="ignore"):
        expected = half(FRAMES[0]) * np.float16(6e4) * np.float16(6e4) * np.float16(1e-4)
    assert measured["warp"].nan == np.count_nonzero(~np.isfinite(expected)) > 0
    assert measured["warp"].psnr_db == (0.0,)
    assert measured["warp"].flip is None
    assert not measured["warp"].holds(1)
    assert math.isfinite(measured["warp"].max_error)
    assert measured["whole"].holds(60)


def test_a_search_leaves_an_exit_at_the_first_answer_that_falls_short() -> None:
    parity = Parity(models(), manifest(), {"x": FRAMES}, sources=3, age=2)
    wrong = halved(models(scale=0.5))
    measured = parity.measure(wrong, ["plain"], floor_db=45)
    assert list(measured) == ["plain"]
    assert len(measured["plain"].psnr_db) == 1
    assert not measured["plain"].holds(45)
    assert len(parity.measure(wrong, ["plain"], floor_db=5)["plain"].psnr_db) == 6
    assert len(parity.measure(wrong, ["plain"], answers=2)["plain"].psnr_db) == 2


def test_one_frame_is_enough_and_an_output_that_is_no_image_is_measured_by_its_range() -> None:
    parity = Parity(models(), manifest(None), {"x": FRAMES[:1]})
    measured = parity.measure(halved(models()), flip=True)
    assert [len(p.psnr_db) for p in measured.values()] == [1, 1, 1]
    assert measured["plain"].flip is None
    exact = {"plain": FRAMES[:1] * np.float32(0.7), "warp": FRAMES[:1] * np.float32(0.7) + FRAMES[:1] * np.float32(0.1)}
    peak = max(float(np.ptp(array)) for array in exact.values())
    error = (half(FRAMES[:1]) * np.float16(0.7)).astype(np.float64) - exact["plain"]
    assert measured["plain"].psnr_db[0] == pytest.approx(10 * math.log10(peak**2 / np.mean(error**2)), abs=1e-4)


def test_what_holds() -> None:
    assert ExitParity((50.0, 45.0), None, 0.1, 0).holds(45)
    assert not ExitParity((50.0, 44.9), None, 0.1, 0).holds(45)
    assert not ExitParity((50.0, 45.0), None, 0.1, 1).holds(45)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_search_finds_exactly_what_is_needed(data: st.DataObject) -> None:
    groups = list(range(data.draw(st.integers(1, 60))))
    needed = set(data.draw(st.lists(st.sampled_from(groups), max_size=6)))
    trials = 0

    def holds(kept: Sequence[int]) -> bool:
        nonlocal trials
        trials += 1
        assert len(set(kept)) == len(kept)
        return needed <= set(kept)

    assert set(fewest_kept(groups, holds)) == needed
    assert trials <= 1 + len(needed) * (math.ceil(math.log2(len(groups) + 1)) + 1)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_what_the_search_finds_holds_and_nothing_of_it_can_be_left_out(data: st.DataObject) -> None:
    """Where errors add up there are many answers: any that is enough, and not more than enough."""
    harm = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=30))
    limit = data.draw(st.integers(0, 40))

    def holds(kept: Sequence[int]) -> bool:
        return sum(harm) - sum(harm[k] for k in kept) <= limit

    found = fewest_kept(range(len(harm)), holds)
    assert holds(found)
    assert not any(holds([k for k in found if k != one]) for one in found)


@given(st.integers(0, 30), st.sets(st.integers(0, 31), min_size=1, max_size=5))
def test_a_search_out_of_trials_gives_what_is_known_to_hold(allowed: int, needed: set[int]) -> None:
    left = allowed

    def holds(kept: Sequence[int]) -> bool:
        nonlocal left
        if not left:
            raise TimeoutError
        left -= 1
        return needed <= set(kept)

    assert needed <= set(fewest_kept(range(32), holds))

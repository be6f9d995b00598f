"""What every device and backend keeps of a routed session: routes, answers, what replaces NaN, audits, and memory.

Each frame's input steers the predictor (`make_routed_bundle`). What exits cost, which on a device differs from run to
run, is told the engine here, so that every device has to take the same routes.
"""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from warpcache.engine.engine import Engine
from warpcache.engine.errors import BackendError
from warpcache.engine.promise.calibration import Quality
from warpcache.engine.routing import plan as routing_plan
from warpcache.engine.routing.exit_costs import ExitCosts
from warpcache.engine.session.frame import Frame
from warpcache.engine.spec import Array

QUALITY = Quality("psnr_db", 30.0, confidence=0.9)
# Pixels that are a tenth of a score: 30 dB is one of -6.9, and spreads are 0.5.
GOOD, BAD = -0.95, -0.2
# See test_device_contract: sums of 27 products in another order, twice in a row, and at most times 0.99 after that.
TOLERANCE = 5e-5
# What the predictor expects in dB: float32 scores, which a GPU adds up alike.
PREDICTED = 1e-4

COSTS = {"warp2": 0.5, "warp": 1.0, "branch1": 3.0, "plain": 5.0, "whole": 10.0}

AHEAD = ("warp2", "warp", "branch1", None, "warp", "warp2", None, "branch1", "branch1", "warp2")
"""By frame the exit that alone is eligible; None: no one."""


@pytest.fixture(autouse=True)
def fixed_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every exit is run when costs are measured, and costs what `COSTS` says, then and later."""

    def measured(run: Callable[[str], None], exits: Iterable[str], clock: Any) -> dict[str, float]:
        names = list(exits)
        for name in names:
            run(name)
        return {name: COSTS[name] for name in names}

    monkeypatch.setattr(routing_plan, "measure_exit_costs", measured)
    monkeypatch.setattr(ExitCosts, "observe", lambda self, exit_name, ms: None)


@pytest.fixture
def inputs(steered: Callable[..., Array]) -> dict[str, Array]:
    """Frames that differ a little, steered as `AHEAD` says."""
    told = {name: [GOOD if wanted == name else BAD for wanted in AHEAD] for name in ("warp2", "warp", "branch1")}
    x = steered(len(AHEAD), **told)
    x[:, :, 8:] += np.random.default_rng(5).uniform(-0.02, 0.02, x[:, :, 8:].shape).astype(np.float32)
    return {"x": x}


def rendered(engine: Engine, inputs: dict[str, Array], get: Callable[[Any], Array]) -> tuple[list[Frame], list[Array]]:
    frames, images = [], []
    for frame in engine.session().render(inputs):
        frames.append(frame)
        images.append(get(frame.outputs["image"]))
    return frames, images


_cpu: dict[tuple[Any, ...], tuple[list[Frame], list[Array]]] = {}


def on_the_cpu(bundle: Path, inputs: dict[str, Array], **options: Any) -> tuple[list[Frame], list[Array]]:
    """What the CPU answers; rendered once for all devices."""
    key = (bundle, inputs["x"].tobytes(), *sorted(options.items()))
    if key not in _cpu:
        with Engine(bundle, threads=1, quality=QUALITY, **options) as engine:
            _cpu[key] = rendered(engine, inputs, np.array)
    return _cpu[key]


def assert_alike(found: tuple[list[Frame], list[Array]], expected: tuple[list[Frame], list[Array]]) -> None:
    for one, two in zip(found[0], expected[0], strict=True):
        assert (one.index, one.route, one.age, one.degraded) == (two.index, two.route, two.age, two.degraded)
        assert one.predicted == (None if two.predicted is None else pytest.approx(two.predicted, abs=PREDICTED))
    np.testing.assert_allclose(np.stack(found[1]), np.stack(expected[1]), rtol=0, atol=TOLERANCE)


POLICIES: dict[str, dict[str, Any]] = {
    "lockstep 0": {"age": 0},
    "lockstep 1": {"age": 1},
    "every:3": {"policy": "every:3"},
    "full": {"policy": "full"},
}


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_routes_and_answers_are_those_of_the_cpu(
    rig: Any, routed_bundle: Path, inputs: dict[str, Array], policy: str
) -> None:
    expected = on_the_cpu(routed_bundle, inputs, audit_every=0, **POLICIES[policy])
    with rig.engine(routed_bundle, quality=QUALITY, audit_every=0, **POLICIES[policy]) as engine:
        found = rendered(engine, inputs, rig.get)
    assert_alike(found, expected)
    routes = [frame.route for frame in found[0]]
    if policy == "lockstep 1":
        # Frame 0 has its own cache, so that the plain exit is exact; where nothing is eligible the whole answers.
        assert routes == ["plain", *(name or "whole" for name in AHEAD[1:])]
    if policy == "full":
        assert set(routes) == {"branch1", "whole"}


def test_the_predictor_is_told_how_old_the_cache_is(
    rig: Any, routed_bundle: Path, steered: Callable[..., Array]
) -> None:
    x = steered(7, warp2=GOOD, warp=BAD, branch1=BAD)
    with rig.engine(routed_bundle, quality=QUALITY, audit_every=0, policy="every:4") as engine:
        frames = [frame for frame in engine.session().render({"x": x}) if frame.route == "warp2"]
    assert {frame.age for frame in frames} >= {1, 2}
    for frame in frames:
        # A score rises by 0.1 a frame from -9.5 at age 1, and one unit is 10 / ln 10 dB.
        assert frame.predicted == pytest.approx((9.5 - 0.1 * (frame.age - 1)) * 10 / np.log(10), abs=1e-3)


@pytest.mark.parametrize("outputs", ["host", "device"])
def test_an_answer_that_is_not_finite_is_never_given_out(
    rig: Any, routed_bundle: Path, steered: Callable[..., Array], outputs: str
) -> None:
    options: dict[str, Any] = {"quality": QUALITY, "audit_every": 0, "age": 1}
    if outputs == "device":
        if rig.name.startswith("cpu"):
            pytest.skip("only a GPU has memory of its own for answers")
        options["cuda"] = {"outputs": "device"}
    # At frames 2 and 4 the exit that alone is eligible gives NaN, at frame 6 the whole generator does too.
    switch = [-2.0 if index in (2, 4, 6) else 0.0 for index in range(8)]
    whole = [-2.0 if index == 6 else 0.0 for index in range(8)]
    x = steered(8, warp2=BAD, warp=GOOD, branch1=BAD, nan_warp=switch, nan_whole=whole)
    with rig.engine(routed_bundle, **options) as engine:
        session = engine.session()
        reader = session.render({"x": x})
        routes = []

        def take(count: int) -> None:
            for frame in itertools.islice(reader, count):
                routes.append((frame.index, frame.route))
                assert np.isfinite(rig.get(frame.outputs["image"])).all()

        take(6)
        with pytest.raises(BackendError, match=r"^frame 6 cannot be answered: every exit, the whole generator too"):
            next(reader)
        take(2)
        assert session.statistics.non_finite == 4
    assert routes == [(0, "plain"), (1, "warp"), (2, "whole"), (3, "warp"), (4, "whole"), (5, "warp"), (7, "warp")]


def test_a_predictor_that_gives_nan_leaves_the_exact_exits(
    rig: Any, routed_bundle: Path, steered: Callable[..., Array]
) -> None:
    x = steered(4, warp2=GOOD, warp=GOOD, branch1=GOOD, predictor=[0.0, -2.0, 0.0, -2.0])
    with rig.engine(routed_bundle, quality=QUALITY, audit_every=0, age=1) as engine:
        session = engine.session()
        routes = [frame.route for frame in session.render({"x": x})]
        assert session.statistics.predictor_failures == 2
    assert [route == "whole" for route in routes] == [False, True, False, True]


@pytest.mark.parametrize("policy", ["lockstep", "every:2", "async"])
def test_audits_find_what_the_predictor_does_not(
    rig: Any, routed_bundle: Path, steered: Callable[..., Array], policy: str
) -> None:
    """`warp2` shows the last image again, of a picture that is another one every frame, and is said to be good."""
    x = steered(24, warp2=GOOD, warp=BAD, branch1=BAD)
    x[:, :, 1:] = np.random.default_rng(9).uniform(-0.5, 0.5, x[:, :, 1:].shape)
    options = {"age": 1} if policy == "lockstep" else {"policy": policy}

    def found(engine: Engine) -> tuple[list[str], Any]:
        session = engine.session()
        routes = []
        for frame in session.render({"x": x}):
            routes.append(frame.route)
            if policy != "lockstep":
                # Where they are not waited for, an audit runs beside frames; here it ends before the next.
                engine.synchronize()
        return routes, session.statistics

    with rig.engine(routed_bundle, quality=QUALITY, audit_every=2, **options) as engine:
        routes, statistics = found(engine)
    assert statistics.audits >= 6
    assert statistics.audit_misses >= 2
    assert statistics.tightening > 0
    # The margin follows until the exit is eligible no more.
    assert "warp2" in routes[:6]
    assert "warp2" not in routes[-6:]
    if policy == "lockstep":
        with Engine(routed_bundle, threads=1, quality=QUALITY, audit_every=2, age=1) as engine:
            expected_routes, expected = found(engine)
        assert routes == expected_routes
        for name in ("audits", "audit_misses", "drifts", "non_finite"):
            assert getattr(statistics, name) == getattr(expected, name), name
        assert statistics.tightening == pytest.approx(expected.tightening, rel=1e-6)


def test_good_answers_pass_their_audits(rig: Any, routed_bundle: Path, steered: Callable[..., Array]) -> None:
    # A picture that stays: the last image is the whole generator's answer to every frame.
    x = steered(16, warp2=GOOD, warp=BAD, branch1=BAD)
    with rig.engine(routed_bundle, quality=QUALITY, audit_every=2, age=1) as engine:
        session = engine.session()
        routes = [frame.route for frame in session.render({"x": x})]
        assert set(routes[1:]) == {"warp2"}
        assert session.statistics.audits >= 4
        assert (session.statistics.audit_misses, session.statistics.tightening) == (0, 0.0)


def test_two_routed_sessions_on_one_engine_do_not_meet(rig: Any, routed_bundle: Path, inputs: dict[str, Array]) -> None:
    backwards = {"x": np.ascontiguousarray(inputs["x"][::-1])}
    options: dict[str, Any] = {"audit_every": 2, "age": 1}
    expected, expected_back = (on_the_cpu(routed_bundle, given, **options) for given in (inputs, backwards))
    with rig.engine(routed_bundle, quality=QUALITY, **options) as engine:
        one, two = engine.session(), engine.session()
        first: tuple[list[Frame], list[Array]] = ([], [])
        second: tuple[list[Frame], list[Array]] = ([], [])
        for a, b in zip(one.render(inputs), two.render(backwards), strict=True):
            for (frames, images), frame in ((first, a), (second, b)):
                frames.append(frame)
                images.append(rig.get(frame.outputs["image"]))
    assert_alike(first, expected)
    assert_alike(second, expected_back)


def test_a_routed_frame_takes_no_memory(rig: Any, routed_bundle: Path, steered: Callable[..., Array]) -> None:
    told = {name: [GOOD if k % 4 == place else BAD for k in range(130)] for place, name in enumerate(("warp2", "warp"))}
    x = steered(130, branch1=BAD, nan_warp=[-2.0 if k % 8 == 5 else 0.0 for k in range(130)], **told)
    tracemalloc.start()
    try:
        with rig.engine(routed_bundle, quality=QUALITY, audit_every=3, age=1) as engine:
            session = engine.session()
            reader = session.render({"x": x})
            # Until the log of recent audits, which has an end, has grown to it.
            for _ in range(90):
                next(reader)
            counted = session.statistics
            before = rig.taken_bytes()
            for _ in range(30):
                next(reader)
            after = rig.taken_bytes()
            statistics = session.statistics
    finally:
        tracemalloc.stop()
    assert statistics.audits > counted.audits
    assert statistics.non_finite > counted.non_finite
    # As in test_no_memory_is_taken_per_frame: less than one image.
    assert after - before < 3072, (before, after)


def test_an_engine_may_be_closed_while_an_audit_runs(rig: Any, routed_bundle: Path, inputs: dict[str, Array]) -> None:
    for _ in range(3):
        with rig.engine(routed_bundle, quality=QUALITY, audit_every=1, policy="full") as engine:
            reader = engine.session().render(inputs)
            next(reader)
            last = next(reader)
        assert np.isfinite(rig.get(last.outputs["image"])).all()

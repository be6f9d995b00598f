"""Engines and sessions that keep a quality, on a bundle whose predictor says what the frame's input tells it to.

Costs are the test's own: measuring gives `COSTS`, and while running every exit takes its cost of a clock that moves for
nothing else. Producers and audits are held by latches, so nothing sleeps; waits have a limit, `PATIENCE`, only so that
a broken engine fails a test instead of hanging it.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hooked import Hooked

from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.bundle.roles import Role
from warpcache.engine.device.module import ModuleFile, Site
from warpcache.engine.device.stream import InlineStream
from warpcache.engine.engine import Engine
from warpcache.engine.errors import BackendError, ClosedError, InputError
from warpcache.engine.onnxruntime.backend import OnnxRuntimeBackend
from warpcache.engine.onnxruntime.cpu import OnnxRuntimeModule
from warpcache.engine.promise.calibration import Quality
from warpcache.engine.routing import plan as routing_plan
from warpcache.engine.session.frame import Frame
from warpcache.engine.session.session import Session

PATIENCE = 30.0
COSTS = {"warp2": 0.5, "warp": 1.0, "branch1": 3.0, "plain": 5.0, "whole": 10.0}
MODULES = {"whole": "generator"}
# A mean squared error of 1e-3, a score of -6.9. Tenths of scores, as the bundle is steered: far on either side of it.
QUALITY = Quality("psnr", 30.0)
GOOD, BAD = -0.95, -0.3

Steered = Callable[..., np.ndarray]


class ManualClock:
    """Time that passes only when somebody waits for it, or a test says so."""

    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time

    def wait(self, condition: threading.Condition, seconds: float | None) -> None:
        if seconds is None:
            assert condition.wait(PATIENCE), "nothing happens any more"
        else:
            self.time += seconds


class Gate:
    """Holds calls until it is opened, and says when one has come."""

    def __init__(self) -> None:
        self.reached = threading.Semaphore(0)
        self._open = threading.Event()

    def open(self) -> None:
        self._open.set()

    def wait_for_call(self) -> None:
        assert self.reached.acquire(timeout=PATIENCE), "nobody called"

    def __call__(self) -> None:
        self.reached.release()
        assert self._open.wait(PATIENCE), "the gate was never opened"


class Backend:
    """ONNX Runtime on a clock of its own: an exit takes what it costs; further hooks run before chosen modules."""

    name = "custom"

    def __init__(self, costs: Mapping[str, float] = COSTS, **hooks: Callable[[], object]) -> None:
        self.clock = ManualClock()
        self.costs = dict(costs)
        self.hooks = hooks
        self.loaded: list[str] = []
        self.cores: dict[str, set[int]] = {}
        self.threads: dict[str, int] = {}

    def prepare(self, *what: object) -> None:
        """Nothing is to be prepared."""

    def load(self, file: ModuleFile, site: Site) -> Hooked:
        name = file.name
        self.loaded.append(name)
        self.threads[name] = site.threads
        if hasattr(os, "sched_getaffinity"):
            self.cores[name] = set(os.sched_getaffinity(0))
        module = OnnxRuntimeBackend().load(file, site)
        exit_ = "whole" if name == "generator" else name

        def hook() -> None:
            self.clock.time += self.costs.get(exit_, 0.0) / 1e3
            if name in self.hooks:
                self.hooks[name]()

        return Hooked(module, hook)


@pytest.fixture(autouse=True)
def costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring runs every exit once and finds `COSTS`."""

    def measure(run: Callable[[str], None], exits: Iterable[str], clock: object, rounds: int = 5) -> dict[str, float]:
        for name in exits:
            run(name)
        return {name: COSTS[name] for name in exits}

    monkeypatch.setattr(routing_plan, "measure_exit_costs", measure)


def engine_of(bundle: Path, backend: Backend | None = None, **options: Any) -> Engine:
    backend = Backend() if backend is None else backend
    return Engine(bundle, backend=backend, **({"quality": QUALITY, "audit_every": 0} | options))


def routes_of(frames: Iterable[Frame]) -> list[str]:
    return [frame.route for frame in frames]


def whole(path: Path, x: np.ndarray) -> np.ndarray:
    """The generator's own output for every frame, without engine or session."""
    record = Bundle.open(path).manifest.modules["generator"]
    module = OnnxRuntimeModule(
        path / record.file, name="reference", inputs=record.inputs, outputs=record.outputs, threads=1, spinning=False
    )
    images = np.empty_like(x)
    for frame in range(len(x)):
        module.enqueue(
            {"x": np.ascontiguousarray(x[frame : frame + 1]), "image": images[frame : frame + 1]}, InlineStream()
        ).wait()
    module.close()
    return images


# What answers


def test_every_frame_is_answered_by_its_cheapest_exit(routed_bundle: Path, steered: Steered) -> None:
    x = steered(
        5,
        warp2=[GOOD, GOOD, BAD, BAD, BAD],
        warp=[GOOD, GOOD, GOOD, BAD, BAD],
        branch1=[GOOD, GOOD, GOOD, GOOD, BAD],
    )
    backend = Backend()
    with engine_of(routed_bundle, backend, age=1) as engine:
        session = engine.session(clock=backend.clock)
        frames = list(session.render({"x": x}))
        statistics = session.statistics
    # Frame 0 is its own cache: the branch, predicted without one, is cheaper than the exact plain exit.
    assert routes_of(frames) == ["branch1", "warp2", "warp", "branch1", "whole"]
    assert [frame.age for frame in frames] == [0, 1, 1, 0, 0]
    assert [frame.refreshed for frame in frames] == [True, False, False, False, True]
    # Steered to -0.95: a score of -9.5, which is 9.5 * 10 / ln 10 dB. Both are float32, of 24 bits.
    expected = 95.0 / np.log(10.0)
    for frame in frames[:4]:
        assert frame.predicted == pytest.approx(expected, rel=2.0**-22)
    assert frames[4].predicted is None
    reference = whole(routed_bundle, x)
    np.testing.assert_array_equal(frames[4].outputs["image"], reference[4:])
    # 0.99 times the generator: one rounding of each, of values up to 1.
    np.testing.assert_allclose(frames[3].outputs["image"], 0.99 * reference[3:4], rtol=0, atol=2.0**-23)
    assert statistics.routes == {"branch1": 2, "warp2": 1, "warp": 1, "whole": 1}
    assert (statistics.predictor.count, statistics.router.count) == (5, 5)
    assert (statistics.degraded, statistics.dropped, statistics.non_finite) == (0, 0, 0)


def test_async_waits_for_no_first_cache(routed_bundle: Path, steered: Steered) -> None:
    gate = Gate()
    x = steered(4, warp2=GOOD, branch1=GOOD)
    backend = Backend(producer=gate)
    with engine_of(routed_bundle, backend) as engine:
        reader = engine.session(clock=backend.clock).render({"x": x})
        # The producer is held: without a cache branches answer, and nobody waits.
        assert [(frame.route, frame.refreshed) for frame in (next(reader), next(reader))] == [("branch1", False)] * 2
        gate.open()
        for _ in range(2):
            engine.synchronize()
        frame = next(reader)
        assert (frame.route, frame.age) == ("warp2", 1)


def test_full_answers_by_exits_that_need_no_cache(routed_bundle: Path, steered: Steered) -> None:
    backend = Backend()
    with engine_of(routed_bundle, backend, policy="full") as engine:
        assert sorted(backend.loaded) == ["branch1", "generator", "predictor_cold"]
        x = steered(3, branch1=[GOOD, BAD, GOOD])
        assert routes_of(engine.session(clock=backend.clock).render({"x": x})) == ["branch1", "whole", "branch1"]


def test_everything_that_may_be_chosen_is_loaded_with_the_engine(routed_bundle: Path) -> None:
    exits = ["branch1", "generator", "plain", "warp", "warp2"]
    for options, more in (({}, []), ({"audit_every": 5}, ["auditor"])):
        backend = Backend()
        with engine_of(routed_bundle, backend, **options) as engine:
            assert sorted(backend.loaded) == sorted([*exits, "predictor", "predictor_cold", "producer", *more])
            assert engine.exit_costs == COSTS


def test_a_bundle_with_a_promise_runs_without_a_quality_as_any_other(routed_bundle: Path, steered: Steered) -> None:
    backend = Backend()
    with Engine(routed_bundle, age=1, backend=backend) as engine:
        assert sorted(backend.loaded) == ["plain", "producer", "warp"]
        frames = list(engine.session().render({"x": steered(3)}))
        assert engine.exit_costs == {}
    assert [(frame.route, frame.predicted, frame.degraded) for frame in frames] == [
        ("plain", None, None),
        ("warp", None, None),
        ("warp", None, None),
    ]


def test_any_exit_may_be_fixed(routed_bundle: Path, steered: Steered) -> None:
    with Engine(routed_bundle, age=1, exit="warp2", threads=1) as engine:
        frames = list(engine.session().render({"x": steered(3)}))
    assert routes_of(frames) == ["plain", "warp2", "warp2"]
    np.testing.assert_array_equal(frames[1].outputs["image"], frames[0].outputs["image"])


@pytest.mark.parametrize("exit_", ["warp2", "warp", "branch1"])
def test_nan_never_reaches_the_caller(routed_bundle: Path, steered: Steered, exit_: str) -> None:
    others = {name: BAD for name in ("warp2", "warp", "branch1") if name != exit_}
    x = steered(4, **others, **{exit_: GOOD, f"nan_{exit_}": [0, -2, -2, 0]})
    backend = Backend()
    with engine_of(routed_bundle, backend, age=1) as engine:
        session = engine.session(clock=backend.clock)
        frames = list(session.render({"x": x}))
    assert routes_of(frames)[1:] == ["whole", "whole", exit_]
    np.testing.assert_array_equal(frames[1].outputs["image"], whole(routed_bundle, x)[1:2])
    assert session.statistics.non_finite == 2


def test_where_every_exit_gives_nan_the_frame_fails_and_the_session_goes_on(
    routed_bundle: Path, steered: Steered
) -> None:
    x = steered(3, warp2=GOOD, nan_warp2=[0, -2, 0], nan_whole=[0, -2, 0])
    backend = Backend()
    with engine_of(routed_bundle, backend, age=1) as engine:
        session = engine.session(clock=backend.clock)
        reader = session.render({"x": x})
        next(reader)
        with pytest.raises(BackendError, match=r"^frame 1 cannot be answered: every exit"):
            next(reader)
        assert next(reader).index == 2
        assert (session.statistics.failed, session.statistics.non_finite) == (1, 2)


def test_a_predictor_that_gives_nan_costs_no_frame(routed_bundle: Path, steered: Steered) -> None:
    x = steered(4, warp2=GOOD, predictor=[0, -2, -2, 0])
    backend = Backend()
    with engine_of(routed_bundle, backend, age=1) as engine:
        session = engine.session(clock=backend.clock)
        assert routes_of(session.render({"x": x}))[1:] == ["whole", "whole", "warp2"]
        assert session.statistics.predictor_failures == 2


def test_a_predictor_that_is_interrupted_interrupts(routed_bundle: Path, steered: Steered) -> None:
    calls = iter([KeyboardInterrupt, None, None])

    def interrupt() -> None:
        if (error := next(calls)) is not None:
            raise error

    backend = Backend(predictor=interrupt)
    with engine_of(routed_bundle, backend, age=1) as engine:
        reader = engine.session(clock=backend.clock).render({"x": steered(3, warp2=GOOD)})
        assert next(reader).index == 0
        with pytest.raises(KeyboardInterrupt):
            next(reader)
        assert next(reader).index == 2


# Scenes


def test_a_cut_forces_a_refresh(routed_bundle: Path, steered: Steered) -> None:
    x = steered(8, warp2=GOOD, branch1=BAD)
    # `change` is 4 times the difference of means: 0.6 brighter is another scene. The first row steers and stays.
    x[3:, :, 1:] += 0.6
    backend = Backend()
    with engine_of(routed_bundle, backend, policy="every:100") as engine:
        session = engine.session(clock=backend.clock)
        frames = list(session.render({"x": x}))
        statistics = session.statistics
    # The first frame of the new scene finds out; the next one has a cache of its own, and the rest goes on from there.
    # No cached answer is of the old scene, although the policy would keep its cache for 100 frames.
    assert routes_of(frames) == ["plain", "warp2", "warp2", "whole", "plain", "warp2", "warp2", "warp2"]
    assert [frame.age for frame in frames] == [0, 1, 2, 0, 0, 1, 2, 3]
    assert (statistics.scene_cuts, statistics.producer_runs) == (1, 2)


def test_after_a_cut_lockstep_starts_from_the_scenes_first_frame(routed_bundle: Path, steered: Steered) -> None:
    x = steered(8, warp2=GOOD, branch1=BAD)
    x[3:, :, 1:] += 0.6
    backend = Backend()
    with engine_of(routed_bundle, backend, age=2) as engine:
        frames = list(engine.session(clock=backend.clock).render({"x": x}))
    assert [frame.age for frame in frames] == [0, 1, 2, 0, 1, 2, 2, 2]
    assert routes_of(frames)[3:5] == ["whole", "warp2"]
    images = whole(routed_bundle, x)
    # warp2 shows the cached image again, so it says which cache it was.
    for frame, cached in ((4, 3), (5, 3), (6, 4)):
        np.testing.assert_array_equal(frames[frame].outputs["image"][0], images[cached])


# Deadlines


def test_a_deadline_degrades_in_the_stated_order(routed_bundle: Path, steered: Steered) -> None:
    x = steered(6, warp2=BAD, warp=[BAD] * 4 + [GOOD] * 2, branch1=GOOD)
    backend = Backend()
    gate = Gate()
    gate.open()
    backend.hooks["predictor"] = lambda: gate.reached.release()
    with engine_of(routed_bundle, backend, age=1, deadline_ms=4.0) as engine:
        session = engine.session(clock=backend.clock)
        reader = session.render({"x": x})
        frames = [next(reader) for _ in range(2)]
        # The predictor takes so long that the branch, the only exit that keeps the quality, would be late ...
        backend.costs["predictor"] = 2.0
        frames.append(next(reader))
        # ... then so long that nothing would be in time: frame 3 gets no answer, and frame 4 is next.
        backend.costs["predictor"] = 3.9
        backend.hooks["predictor"] = lambda: backend.costs.update(predictor=0.0)
        frames.extend(reader)
        statistics = session.statistics
    assert [(frame.index, frame.route, frame.degraded) for frame in frames] == [
        (0, "branch1", None),
        (1, "branch1", None),
        (2, "warp2", "cheaper exit"),
        (4, "warp", None),
        (5, "warp", None),
    ]
    assert (statistics.frames, statistics.dropped, statistics.degraded, statistics.late) == (5, 1, 2, 0)


def test_a_frame_that_is_answered_late_counts(routed_bundle: Path, steered: Steered) -> None:
    backend = Backend()
    with engine_of(routed_bundle, backend, age=1, deadline_ms=4.0) as engine:
        session = engine.session(clock=backend.clock)
        reader = session.render({"x": steered(2, warp2=GOOD, branch1=GOOD)})
        next(reader)
        backend.costs["warp2"] = 30.0
        assert next(reader).degraded is None  # nobody knew before
        assert session.statistics.late == 1


def test_an_old_cache_serves_where_time_is_short(routed_bundle: Path, steered: Steered) -> None:
    fails = iter([False] + [True] * 20)

    def produce() -> None:
        if next(fails):
            raise BackendError("no memory left")

    x = steered(7, warp2=GOOD, branch1=GOOD)
    backend = Backend(producer=produce)
    with engine_of(routed_bundle, backend, policy="every:1", deadline_ms=2.0) as engine:
        frames = list(engine.session(clock=backend.clock).render({"x": x}))
    # Caches are calibrated to an age of 3, and the branch, which would need none, takes 3 ms.
    assert [(frame.index, frame.age, frame.degraded) for frame in frames if frame.index >= 1] == [
        (1, 1, None),
        (2, 2, None),
        (3, 3, None),
        *((index, index, "older cache") for index in (4, 5, 6)),
    ]


# A frame's own quality and deadline


def test_a_frame_may_have_its_own_quality_and_deadline(routed_bundle: Path, steered: Steered) -> None:
    x = steered(5, warp2=-0.8, branch1=-1.15)
    backend = Backend()
    better = Quality("psnr", 45.0)
    asked: list[dict[str, Any]] = [{}, {}, {"quality": better}, {"quality": better, "deadline_ms": 2.0}, {}]
    with engine_of(routed_bundle, backend, age=1) as engine:
        session = engine.session(clock=backend.clock)
        frames = []
        for frame, own in enumerate(asked):
            session.submit({"x": x[frame : frame + 1]}, **own)
            if frame == len(asked) - 1:
                session.finish()
            frames.append(next(session.frames()))
    # 45 dB is a score of -10.4, which only the branch is said to keep; in 2 ms it does not get there.
    assert routes_of(frames)[1:] == ["warp2", "branch1", "warp2", "warp2"]
    assert [frame.degraded for frame in frames] == [None, None, None, "cheaper exit", None]


@pytest.mark.parametrize(
    ("own", "opening"),
    [
        ({"quality": "psnr=30"}, "quality is 'psnr=30'; give a Quality, for example"),
        ({"quality": Quality("lpips", 0.1)}, "the bundle is calibrated for psnr, so nothing can be promised in lpips"),
        ({"quality": Quality("psnr", 99.0)}, "psnr=99 at confidence 0.95 cannot be promised"),
        ({"deadline_ms": -1.0}, "deadline_ms is -1.0; give a positive finite number"),
        ({"deadline_ms": True}, "deadline_ms is True; give a positive finite number"),
    ],
)
def test_what_a_frame_cannot_have_is_refused_at_submit(
    routed_bundle: Path, steered: Steered, own: dict[str, Any], opening: str
) -> None:
    with engine_of(routed_bundle, age=1) as engine:
        session = engine.session()
        with pytest.raises(InputError) as caught:
            session.submit({"x": steered(1)}, **own)
        assert str(caught.value).startswith(opening)
        assert session.submit({"x": steered(1)}) == 0
        assert session.statistics.rejected == 1


def test_without_a_quality_frames_have_none(tiny_bundle: Path, steered: Steered) -> None:
    with Engine(tiny_bundle, age=1, threads=1) as engine:
        session = engine.session()
        with pytest.raises(InputError, match=r"^a frame came with a quality, but the engine has none"):
            session.submit({"x": steered(1)}, quality=QUALITY)
        with pytest.raises(InputError, match=r"^a frame came with a deadline, but the engine has no quality"):
            session.submit({"x": steered(1)}, deadline_ms=5.0)


# Audits


def shifted(steered: Steered, frames: int) -> np.ndarray:
    """Frames that the predictor calls easy and that move so much that showing the last one again is far off."""
    x = steered(frames, warp2=GOOD, warp=BAD, branch1=BAD)
    # Moved around within the picture, so that no mean changes: it is the same scene.
    for frame in range(frames):
        x[frame, :, 1:] = np.roll(x[frame, :, 1:], frame, axis=-1)
    return x


def run_shifted(bundle: Path, x: np.ndarray) -> tuple[list[str], Session]:
    backend = Backend()
    with engine_of(bundle, backend, age=1, audit_every=2) as engine:
        session = engine.session(clock=backend.clock)
        return routes_of(session.render({"x": x})), session


def test_audits_that_miss_by_far_tighten_the_rule_at_once(routed_bundle: Path, steered: Steered) -> None:
    routes, session = run_shifted(routed_bundle, shifted(steered, 60))
    statistics = session.statistics
    assert routes[1] == "warp2"
    assert set(routes[-40:]) == {"whole"}, "the rule did not follow"
    assert statistics.audits > 20
    assert statistics.audit_misses >= 1
    # A prediction of -9.5 is 5.2 spreads below the threshold's -6.9, and was trusted; now it is not.
    assert statistics.tightening > 4.0


@pytest.mark.parametrize(("mean_square", "misses"), [(1.2e-3, True), (0.7e-3, False)])
def test_audits_that_contradict_the_predictor_say_so_once(
    routed_bundle: Path, steered: Steered, caplog: pytest.LogCaptureFixture, mean_square: float, misses: bool
) -> None:
    x = steered(60, warp2=GOOD, warp=BAD, branch1=BAD)
    # To and fro by so little that the last frame shown again is about the threshold of 1e-3, within a spread: a miss
    # by a fifth, or none at all. Either way the predictor, which expects e**-9.5 = 7e-5, is wrong by spreads.
    pattern = np.random.default_rng(1).uniform(-0.1, 0.1, x.shape[1:]).astype(np.float32)
    pattern[:, :1] = 0.0
    still = whole(routed_bundle, x[:1])
    error = np.mean((whole(routed_bundle, x[:1] + 2 * pattern) - still) ** 2) / 4  # on [0, 1]
    x += np.float32(np.sqrt(mean_square / error)) * pattern * np.where(np.arange(60) % 2, 1, -1)[:, None, None, None]
    with caplog.at_level(logging.WARNING):
        routes, session = run_shifted(routed_bundle, x)
    statistics = session.statistics
    assert set(routes[1:4]) == {"warp2"}
    assert statistics.drifts == 1
    assert (statistics.audit_misses > 0) == misses
    warnings = [record.getMessage() for record in caplog.records if "worse than promised" in record.getMessage()]
    assert len(warnings) == 1


def test_lockstep_with_audits_repeats_itself(routed_bundle: Path, steered: Steered) -> None:
    x = shifted(steered, 40)
    (first, one), (second, other) = (run_shifted(routed_bundle, x) for _ in range(2))
    assert first == second
    assert one.statistics.audits == other.statistics.audits
    assert one.statistics.tightening == other.statistics.tightening


def test_what_frames_of_another_confidence_miss_is_not_asked_of_the_others(
    routed_bundle: Path, steered: Steered
) -> None:
    odd = np.arange(60) % 2 == 1
    x = steered(60, warp2=np.where(odd, GOOD, BAD), warp=BAD, branch1=np.where(odd, BAD, GOOD))
    for frame in range(60):
        x[frame, :, 1:] = np.roll(x[frame, :, 1:], frame, axis=-1)
    backend = Backend()
    # The odd frames miss by far, as half of them may; the even ones keep what they were promised.
    own = Quality("psnr", 30.0, confidence=0.5)
    with engine_of(routed_bundle, backend, age=1, audit_every=2) as engine:
        session = engine.session(clock=backend.clock)
        routes = []
        for frame in range(60):
            session.submit({"x": x[frame : frame + 1]}, quality=own if odd[frame] else None)
            if frame == 59:
                session.finish()
            routes.append(next(session.frames()).route)
    assert set(routes[::2]) == {"branch1"}
    assert routes[1] == "warp2"
    assert set(routes[-19::2]) == {"whole"}, "those that miss are followed all the same"


def test_an_interrupt_while_an_audit_is_queued_does_not_hold_up_the_next_frame(
    routed_bundle: Path, steered: Steered
) -> None:
    backend = Backend()
    with engine_of(routed_bundle, backend, age=1, audit_every=1) as engine:
        session = engine.session(clock=backend.clock)
        reader = session.render({"x": steered(6, warp2=GOOD, branch1=GOOD)})
        next(reader)
        workspace: Any = session._parts.workspace
        lane = workspace.lane

        def interrupt(role: Role, index: int = 0) -> Any:
            if role is Role.WHOLE:
                raise KeyboardInterrupt
            return lane(role, index)

        workspace.lane = interrupt
        with pytest.raises(KeyboardInterrupt):
            next(reader)
        workspace.lane = lane
        left: list[Frame] = []
        # On a thread, so that a broken engine fails the test instead of hanging it.
        rest = threading.Thread(target=lambda: left.extend(reader), daemon=True)
        rest.start()
        rest.join(PATIENCE)
        assert [frame.index for frame in left] == [1, 2, 3, 4, 5]
        assert session.statistics.audits == 5, "audits go on"


def test_audits_that_keep_the_promise_change_nothing(routed_bundle: Path, steered: Steered) -> None:
    backend = Backend()
    with engine_of(routed_bundle, backend, age=1, audit_every=2) as engine:
        session = engine.session(clock=backend.clock)
        # Frames that stay the same: the last one shown again is the generator's answer.
        routes = routes_of(session.render({"x": steered(30, warp2=GOOD, branch1=GOOD)}))
        statistics = session.statistics
    assert set(routes[1:]) == {"warp2"}
    assert statistics.audits == 15
    assert (statistics.audit_misses, statistics.tightening, statistics.drifts) == (0, 0.0, 0)


def test_two_sessions_share_no_audits(routed_bundle: Path, steered: Steered) -> None:
    quiet, moved = steered(40, warp2=GOOD, branch1=GOOD), shifted(steered, 40)
    backend = Backend()
    with engine_of(routed_bundle, backend, age=1, audit_every=2) as engine:
        alone = engine.session(clock=backend.clock)
        expected = routes_of(alone.render({"x": quiet}))
    backend = Backend()
    with engine_of(routed_bundle, backend, age=1, audit_every=2) as engine:
        sessions = [engine.session(clock=backend.clock) for _ in range(2)]
        readers = [session.render({"x": x}) for session, x in zip(sessions, (quiet, moved), strict=True)]
        pairs = [tuple(next(reader).route for reader in readers) for _ in range(40)]
    assert [route for route, _ in pairs] == expected
    assert sessions[0].statistics.tightening == 0.0
    assert sessions[1].statistics.tightening > 3.0


def test_an_audit_that_takes_long_holds_up_no_frame(routed_bundle: Path, steered: Steered) -> None:
    gate = Gate()
    backend = Backend(auditor=gate)
    x = steered(40, branch1=GOOD)
    with engine_of(routed_bundle, backend, policy="full", audit_every=2) as engine:
        session = engine.session(clock=backend.clock)
        reader = session.render({"x": x})
        for _ in range(20):
            next(reader)
        gate.wait_for_call()
        # One is under way and was never joined by another; frames were answered all the same.
        assert not gate.reached.acquire(blocking=False)
        assert session.statistics.audits == 0
        gate.open()
        engine.synchronize()
        assert session.statistics.audits == 1
        assert len(list(reader)) == 20
        engine.synchronize()
        assert session.statistics.audits > 1


def test_the_caller_may_change_what_is_being_audited(routed_bundle: Path, steered: Steered) -> None:
    gate = Gate()
    backend = Backend(auditor=gate)
    with engine_of(routed_bundle, backend, policy="full", audit_every=1) as engine:
        session = engine.session(clock=backend.clock)
        x = steered(2, branch1=GOOD)
        reader = session.render({"x": x})
        frame = next(reader)
        frame.outputs["image"][:] = 9.0
        next(reader)
        gate.wait_for_call()
        x[:] = 0.25
        gate.open()
        engine.synchronize()
        # Compared as it was answered: 0.99 of the generator's image is within 30 dB, what is there now is not.
        assert (session.statistics.audits, session.statistics.audit_misses) == (1, 0)


def test_an_auditor_that_fails_is_counted_and_costs_no_frame(
    routed_bundle: Path, steered: Steered, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise BackendError("no memory left")

    backend = Backend(auditor=fail)
    with (
        caplog.at_level(logging.WARNING, "warpcache.engine.routing.audits"),
        engine_of(routed_bundle, backend, age=1, audit_every=3) as engine,
    ):
        session = engine.session(clock=backend.clock)
        assert len(list(session.render({"x": steered(12, warp2=GOOD, branch1=GOOD)}))) == 12
        statistics = session.statistics
    assert (statistics.audits, statistics.audit_failures) == (0, 4)
    (record,) = caplog.records
    assert record.getMessage().startswith("the audit of frame ")


def test_a_generator_that_gives_nan_to_an_audit_is_a_failed_audit(routed_bundle: Path, steered: Steered) -> None:
    backend = Backend()
    with engine_of(routed_bundle, backend, age=1, audit_every=1) as engine:
        session = engine.session(clock=backend.clock)
        x = steered(4, warp2=GOOD, branch1=GOOD, nan_whole=-2)
        assert len(list(session.render({"x": x}))) == 4
    assert (session.statistics.audit_failures, session.statistics.audit_misses) == (4, 0)


def test_degraded_answers_are_not_audited(routed_bundle: Path, steered: Steered) -> None:
    backend = Backend()
    with engine_of(routed_bundle, backend, age=1, deadline_ms=2.0, audit_every=1) as engine:
        session = engine.session(clock=backend.clock)
        frames = list(session.render({"x": steered(5, warp2=BAD, warp=BAD, branch1=GOOD)}))
    assert {frame.degraded for frame in frames[1:]} == {"cheaper exit"}
    assert session.statistics.audits == 0


def test_exact_answers_count_as_audits_without_a_run(routed_bundle: Path, steered: Steered) -> None:
    ran: list[str] = []
    backend = Backend(auditor=lambda: ran.append("auditor"))
    with engine_of(routed_bundle, backend, age=1, audit_every=1) as engine:
        session = engine.session(clock=backend.clock)
        list(session.render({"x": steered(5, warp2=BAD, warp=BAD, branch1=BAD)}))
    assert (session.statistics.audits, ran) == (5, [])


@pytest.mark.parametrize("policy", [{"age": 1}, {"policy": "full"}, {"policy": "async"}])
def test_closing_while_an_audit_runs_waits_for_nobody_and_loses_no_thread(
    routed_bundle: Path, steered: Steered, policy: dict[str, Any]
) -> None:
    gate = Gate()
    backend = Backend(auditor=gate)
    engine = engine_of(routed_bundle, backend, audit_every=1, **policy)
    session = engine.session(clock=backend.clock)
    errors: list[BaseException] = []

    def read() -> None:
        try:
            list(session.render({"x": steered(50, warp2=GOOD, branch1=GOOD)}))
        except ClosedError as exc:
            errors.append(exc)

    reader = threading.Thread(target=read)
    reader.start()
    gate.wait_for_call()
    session.close()
    reader.join(PATIENCE)
    assert not reader.is_alive()
    assert len(errors) <= 1  # none where the clip had ended
    closer = threading.Thread(target=engine.close)
    closer.start()
    gate.open()
    closer.join(PATIENCE)
    assert not closer.is_alive()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("warpcache-")]
    assert session.statistics.audit_failures == 0


def test_the_auditor_stays_off_the_consumers_cores(routed_bundle: Path) -> None:
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system does not say on which cores a thread may run")
    for options in ({"policy": "async"}, {"policy": "full"}, {"policy": "every:4"}):
        backend = Backend()
        with engine_of(routed_bundle, backend, audit_every=5, **options):
            consumer, auditor = backend.cores["branch1"], backend.cores["auditor"]
        if len(os.sched_getaffinity(0)) > 1:
            assert not consumer & auditor
        assert backend.threads["branch1"] == len(consumer)
        assert backend.threads["auditor"] == len(auditor)


# Engines


@pytest.mark.parametrize(
    ("options", "opening"),
    [
        ({"quality": "psnr=30"}, "quality is 'psnr=30'; give a Quality, for example Quality('lpips', 0.1"),
        ({"quality": Quality("lpips", 0.1)}, "the bundle is calibrated for psnr, so nothing can be promised in lpips"),
        ({"quality": Quality("psnr", 99.0)}, "psnr=99 at confidence 0.95 cannot be promised"),
        (
            {"quality": Quality("psnr", 30.0, 0.9999)},
            "confidence 0.9999 cannot be promised from 400 calibration frames",
        ),
        ({"deadline_ms": 0.0}, "deadline_ms is 0.0; give a positive finite number of milliseconds"),
        ({"deadline_ms": float("nan")}, "deadline_ms is nan; give a positive finite number of milliseconds"),
        ({"deadline_ms": float("inf")}, "deadline_ms is inf; give a positive finite number of milliseconds"),
        ({"deadline_ms": "11"}, "deadline_ms is '11'; give a positive finite number of milliseconds"),
        ({"deadline_ms": 0.3}, "deadline_ms is 0.3, but the cheapest exit, 'warp2', takes 0.5 ms on cpu/custom"),
        ({"deadline_ms": 11.1, "quality": None}, "deadline_ms is 11.1 and there is no quality to weigh against it"),
        ({"exit": "warp"}, "exit 'warp' and quality psnr=30 exclude each other: the quality chooses"),
        ({"on_stale": "raise"}, "on_stale='raise' and a quality exclude each other"),
        ({"audit_every": -1}, "audit_every is -1; give a number of frames, or 0 for no audits"),
        ({"audit_every": 1.5}, "audit_every is 1.5; give a number of frames, or 0 for no audits"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_the_first_frame(
    routed_bundle: Path, options: dict[str, Any], opening: str
) -> None:
    with pytest.raises(InputError) as caught:
        engine_of(routed_bundle, **options)
    assert str(caught.value).startswith(opening)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("warpcache-")]


def test_a_bundle_without_a_promise_keeps_no_quality(tiny_bundle: Path) -> None:
    with pytest.raises(
        InputError, match=r"^bundle .*tiny.warp has no quality promise, so no quality can be asked of it"
    ):
        engine_of(tiny_bundle)


def test_without_an_exit_that_needs_no_cache_full_keeps_no_quality(
    make_routed: Callable[..., Path], steered: Steered
) -> None:
    bundle = make_routed(branch=False)
    with pytest.raises(
        InputError, match=r"^policy 'full' makes no cache, and bundle 'routed' has no exit but the whole"
    ):
        engine_of(bundle, policy="full")
    # With a cache its consumers answer, and without one the whole generator.
    backend = Backend()
    with engine_of(bundle, backend, policy="every:9") as engine:
        frames = list(engine.session(clock=backend.clock).render({"x": steered(6, warp2=GOOD)}))
    assert routes_of(frames) == ["plain", "warp2", "warp2", "warp2", "whole", "whole"]


def test_audits_in_lpips_ask_for_its_weights(
    make_routed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, steered: Steered, tmp_path: Path
) -> None:
    monkeypatch.delenv("WARPCACHE_LPIPS", raising=False)
    bundle = make_routed(metric="lpips")
    quality = Quality("lpips", 1e-3)
    with pytest.raises(InputError) as caught:
        engine_of(bundle, quality=quality, audit_every=30)
    message = str(caught.value)
    assert message.startswith("audits compare in LPIPS, whose weights are nowhere named")
    for way_out in ("lpips=", "--lpips", "WARPCACHE_LPIPS", "audit_every=0"):
        assert way_out in message
    with pytest.raises(InputError, match=r"absent\.safetensors"):
        engine_of(bundle, quality=quality, audit_every=30, lpips=tmp_path / "absent.safetensors")
    # Without audits nothing is measured, and none are needed.
    backend = Backend()
    with engine_of(bundle, backend, age=1, quality=quality) as engine:
        assert routes_of(engine.session(clock=backend.clock).render({"x": steered(2, warp2=GOOD)}))[1] == "warp2"


def test_measuring_costs_runs_every_exit_and_leaves_nothing_behind(
    routed_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real measurement, of a device whose exits cannot be slower than their order says."""
    monkeypatch.undo()
    ran: list[str] = []
    backend = Backend(**{name: (lambda name=name: ran.append(name)) for name in ("warp2", "branch1", "generator")})
    with engine_of(routed_bundle, backend) as engine:
        assert set(engine.exit_costs) == set(COSTS)
        assert all(ms > 0 for ms in engine.exit_costs.values())
        assert set(ran) == {"warp2", "branch1", "generator"}
        ran.clear()
        assert engine.session().statistics.frames == 0
        assert ran == []

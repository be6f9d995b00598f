"""Engine and session on a tiny bundle: what answers which frame, and what happens when something goes wrong.

Producers are held and let go by a latch (`Gate`), time is the test's own (`ManualClock`): nothing sleeps. Waits have a
limit, `PATIENCE`, only so that a broken engine fails a test instead of hanging it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from hooked import Hooked

from warpcache.engine.bundle.bundle import Bundle, Cut, ExitRecord, FileRecord, InputRecord, Manifest
from warpcache.engine.bundle.manifest import module_record
from warpcache.engine.device.module import Module, ModuleFile, Site
from warpcache.engine.device.stream import Event, InlineStream, Stream
from warpcache.engine.engine import Engine
from warpcache.engine.errors import BackendError, ClosedError, DeadlineError, InputError
from warpcache.engine.onnxruntime.backend import OnnxRuntimeBackend
from warpcache.engine.onnxruntime.cpu import OnnxRuntimeModule
from warpcache.engine.session.frame import Frame
from warpcache.engine.session.session import Session
from warpcache.engine.spec import Array, TensorSpec

PATIENCE = 30.0
# image = y_s + 0.1 * x in float32: two roundings of values below 2, each at most 2**-24 relative.
WARP_TOLERANCE = 4 * 2.0**-24


def stream_of(frames: int, seed: int = 0) -> dict[str, Array]:
    return {"x": np.random.default_rng(seed).uniform(-1, 1, (frames, 3, 16, 16)).astype(np.float32)}


def whole(path: Path, inputs: Mapping[str, Array]) -> list[Array]:
    """The generator's own output for every frame, without engine or session."""
    manifest = Bundle.open(path).manifest
    record = manifest.modules["generator"]
    module = OnnxRuntimeModule(
        path / record.file, name="reference", inputs=record.inputs, outputs=record.outputs, threads=1, spinning=False
    )
    images = []
    for frame in range(len(inputs["x"])):
        image = np.empty((1, 3, 16, 16), np.float32)
        module.enqueue({"x": inputs["x"][frame : frame + 1], "image": image}, InlineStream()).wait()
        images.append(image)
    module.close()
    return images


class Gate:
    """Holds module calls until they are let through, one by one or all."""

    def __init__(self) -> None:
        self._permits = threading.Semaphore(0)
        self._open = False

    def let_through(self, calls: int = 1) -> None:
        self._permits.release(calls)

    def open(self) -> None:
        self._open = True
        self._permits.release()

    def pass_through(self) -> None:
        if not self._open and not self._permits.acquire(timeout=PATIENCE):
            raise AssertionError("the gate was never opened")
        if self._open:
            self._permits.release()


class Hooks:
    """A backend: ONNX Runtime with a hook before the calls of chosen modules; notes what was loaded, and how."""

    name = "custom"

    def __init__(self, **hooks: Callable[[], None]) -> None:
        self.hooks = hooks
        self.loaded: list[str] = []
        self.threads: dict[str, int] = {}

    def prepare(self, *what: object) -> None:
        """Nothing is to be prepared."""

    def load(self, file: ModuleFile, site: Site) -> Module:
        self.loaded.append(file.name)
        self.threads[file.name] = site.threads
        module = OnnxRuntimeBackend().load(file, site)
        return Hooked(module, self.hooks[file.name]) if file.name in self.hooks else module


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


def fail(message: str = "no memory left") -> None:
    raise BackendError(message)


def producers_settled(engine: Engine) -> None:
    """Wait until the producer that runs and the one that its end starts have ended and have been heard."""
    for _ in range(2):
        engine.synchronize()


def ages(frames: Iterator[Frame]) -> list[int]:
    return [frame.age for frame in frames]


# What answers


def test_full_gives_the_generators_output(tiny_bundle: Path) -> None:
    inputs = stream_of(4)
    with Engine(tiny_bundle, policy="full", threads=1) as engine:
        frames = list(engine.session().render(inputs))
    assert [(frame.index, frame.route, frame.age, frame.refreshed) for frame in frames] == [
        (index, "whole", 0, True) for index in range(4)
    ]
    for frame, image in zip(frames, whole(tiny_bundle, inputs), strict=True):
        np.testing.assert_array_equal(frame.outputs["image"], image)


def test_lockstep_at_age_0_is_the_generator_bit_for_bit(tiny_bundle: Path) -> None:
    inputs = stream_of(4)
    with Engine(tiny_bundle, age=0, threads=1) as engine:
        frames = list(engine.session().render(inputs))
    assert [(frame.route, frame.age) for frame in frames] == [("plain", 0)] * 4
    for frame, image in zip(frames, whole(tiny_bundle, inputs), strict=True):
        np.testing.assert_array_equal(frame.outputs["image"], image)


@pytest.mark.parametrize("age", [1, 3])
def test_lockstep_answers_from_the_cache_of_age_frames_ago(tiny_bundle: Path, age: int) -> None:
    inputs = stream_of(6)
    images = whole(tiny_bundle, inputs)
    with Engine(tiny_bundle, age=age, threads=1) as engine:
        frames = list(engine.session().render(inputs))
    assert [frame.age for frame in frames] == [min(index, age) for index in range(6)]
    for index, frame in enumerate(frames[1:], start=1):
        assert frame.route == "warp"
        expected = images[max(0, index - age)] + 0.1 * inputs["x"][index : index + 1]
        np.testing.assert_allclose(frame.outputs["image"], expected, rtol=0, atol=WARP_TOLERANCE)


def test_the_plain_exit_can_be_asked_for(tiny_bundle: Path) -> None:
    inputs = stream_of(3)
    images = whole(tiny_bundle, inputs)
    with Engine(tiny_bundle, age=1, exit="plain", threads=1) as engine:
        frames = list(engine.session().render(inputs))
    assert [frame.route for frame in frames] == ["plain"] * 3
    # The tiny bundle's plain exit takes nothing of the new frame: it is the old image again.
    for frame, image in zip(frames[1:], images, strict=False):
        np.testing.assert_array_equal(frame.outputs["image"], image)


def test_every_n_refreshes_every_n_frames(tiny_bundle: Path) -> None:
    inputs = stream_of(7)
    images = whole(tiny_bundle, inputs)
    with Engine(tiny_bundle, policy="every:3", threads=1) as engine:
        session = engine.session()
        frames = list(session.render(inputs))
        statistics = session.statistics
    assert [frame.age for frame in frames] == [0, 1, 2, 0, 1, 2, 0]
    for index in (0, 3, 6):
        np.testing.assert_array_equal(frames[index].outputs["image"], images[index])
    assert (statistics.frames, statistics.refreshes, statistics.producer_runs) == (7, 3, 3)
    assert statistics.routes == {"plain": 3, "warp": 4}
    assert (statistics.age_mean, statistics.age_max) == (6 / 7, 2)
    assert statistics.latency_ms.count == 7


def test_async_answers_from_the_newest_cache_while_the_producer_works(tiny_bundle: Path) -> None:
    gate = Gate()
    gate.let_through()
    inputs = stream_of(8)
    images = whole(tiny_bundle, inputs)
    with Engine(tiny_bundle, backend=Hooks(producer=gate.pass_through)) as engine:
        session = engine.session()
        reader = session.render(inputs)
        first = next(reader)
        assert (first.route, first.age, first.refreshed) == ("plain", 0, True)
        # The producer of frame 1 is held: frames go on with the cache of frame 0.
        held = [next(reader) for _ in range(3)]
        assert [(frame.age, frame.refreshed) for frame in held] == [(1, False), (2, False), (3, False)]
        gate.open()
        producers_settled(engine)
        fresh = next(reader)
        # The producer of frame 1 was followed by one of frame 3, the newest there was then.
        assert fresh.index == 4
        assert fresh.age == 1
        expected = images[3] + 0.1 * inputs["x"][4:5]
        np.testing.assert_allclose(fresh.outputs["image"], expected, rtol=0, atol=WARP_TOLERANCE)
        producers_settled(engine)
        assert (session.statistics.producer_runs, session.statistics.producer_failures) == (4, 0)


def test_several_producers_run_at_once(tiny_bundle: Path) -> None:
    inside = threading.Semaphore(0)
    gate = Gate()

    def hold() -> None:
        inside.release()
        gate.pass_through()

    with Engine(tiny_bundle, producers=2, backend=Hooks(producer=hold)) as engine:
        session = engine.session()
        session.submit({"x": stream_of(1)["x"]})
        session.submit({"x": stream_of(1)["x"]})
        # Both producers have started although neither has ended.
        assert inside.acquire(timeout=PATIENCE)
        assert inside.acquire(timeout=PATIENCE)
        gate.open()
        session.finish()
        assert [frame.index for frame in session.frames()] == [1]


# Sessions


def test_two_sessions_on_one_engine_equal_two_engines(tiny_bundle: Path) -> None:
    first, second = stream_of(6, seed=1), stream_of(6, seed=2)
    with Engine(tiny_bundle, age=2, threads=1) as shared:
        one, other = shared.session().render(first), shared.session().render(second)
        mixed = [(next(one), next(other)) for _ in range(6)]
    for inputs, shared_frames in zip((first, second), zip(*mixed, strict=True), strict=True):
        with Engine(tiny_bundle, age=2, threads=1) as alone:
            for frame, expected in zip(shared_frames, alone.session().render(inputs), strict=True):
                assert frame.age == expected.age
                np.testing.assert_array_equal(frame.outputs["image"], expected.outputs["image"])


def test_sessions_in_two_threads_take_turns(tiny_bundle: Path) -> None:
    streams = [stream_of(30, seed=seed) for seed in (1, 2)]
    answers: list[list[Frame]] = [[], []]
    with Engine(tiny_bundle, age=0, threads=1) as engine:
        sessions = [engine.session(), engine.session()]

        def render(which: int) -> None:
            answers[which].extend(sessions[which].render(streams[which]))

        threads = [threading.Thread(target=render, args=(which,)) for which in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    for inputs, frames in zip(streams, answers, strict=True):
        for frame, image in zip(frames, whole(tiny_bundle, inputs), strict=True):
            np.testing.assert_array_equal(frame.outputs["image"], image)


def test_outputs_belong_to_the_caller(tiny_bundle: Path) -> None:
    with Engine(tiny_bundle, age=1, threads=1) as engine:
        frames = list(engine.session().render(stream_of(4)))
        kept = [frame.outputs["image"].copy() for frame in frames]
        frames[1].outputs["image"][:] = 9.0
        list(engine.session().render(stream_of(4, seed=5)))
    for index in (0, 2, 3):
        np.testing.assert_array_equal(frames[index].outputs["image"], kept[index])


def test_a_session_goes_on_from_one_stream_to_the_next(tiny_bundle: Path) -> None:
    with Engine(tiny_bundle, age=1, threads=1) as engine:
        session = engine.session()
        assert [(frame.index, frame.age) for frame in session.render(stream_of(2))] == [(0, 0), (1, 1)]
        assert [(frame.index, frame.age) for frame in session.render(stream_of(2))] == [(2, 1), (3, 1)]


def test_an_abandoned_iterator_does_no_harm(tiny_bundle: Path) -> None:
    for options in ({"policy": "every:2"}, {"policy": "async"}, {"age": 1}):
        with Engine(tiny_bundle, threads=1, **options) as engine:  # type: ignore[arg-type]
            session = engine.session()
            next(session.render(stream_of(5)))
            assert [frame.index for frame in session.render(stream_of(3))] == [1, 2, 3]


# Submitting from another thread


def test_lockstep_drops_nothing_and_submit_waits_for_room(tiny_bundle: Path) -> None:
    inputs = stream_of(40)
    images = whole(tiny_bundle, inputs)
    with Engine(tiny_bundle, age=1, threads=1) as engine:
        session = engine.session()

        def feed() -> None:
            for index in range(40):
                session.submit({"x": inputs["x"][index : index + 1]})
            session.finish()

        feeder = threading.Thread(target=feed)
        feeder.start()
        frames = list(session.frames())
        feeder.join(PATIENCE)
    assert [frame.index for frame in frames] == list(range(40))
    for index, frame in enumerate(frames[1:], start=1):
        expected = images[index - 1] + 0.1 * inputs["x"][index : index + 1]
        np.testing.assert_allclose(frame.outputs["image"], expected, rtol=0, atol=WARP_TOLERANCE)


def test_a_live_submit_never_waits_and_the_newest_wins(tiny_bundle: Path) -> None:
    gate = Gate()
    answered: list[Frame] = []
    with Engine(tiny_bundle, policy="full", backend=Hooks(generator=gate.pass_through)) as engine:
        session = engine.session()
        reader = threading.Thread(target=lambda: answered.extend(session.frames()))
        reader.start()
        inputs = stream_of(30)
        # The generator is held in the first frame; this would hang if submit waited for it.
        indices = [session.submit({"x": inputs["x"][index : index + 1]}) for index in range(30)]
        session.finish()
        gate.open()
        reader.join(PATIENCE)
        statistics = session.statistics
    assert indices == list(range(30))
    assert [frame.index for frame in answered] == [0, 29]
    assert (statistics.frames, statistics.dropped) == (2, 28)
    np.testing.assert_array_equal(answered[1].outputs["image"], whole(tiny_bundle, {"x": inputs["x"][29:]})[0])


def test_async_from_two_threads_answers_in_order_and_loses_nothing(tiny_bundle: Path) -> None:
    with Engine(tiny_bundle) as engine:
        session = engine.session()
        inputs = stream_of(200)

        def feed() -> None:
            for index in range(200):
                session.submit({"x": inputs["x"][index : index + 1]})
            session.finish()

        feeder = threading.Thread(target=feed)
        feeder.start()
        indices = [frame.index for frame in session.frames()]
        feeder.join(PATIENCE)
        statistics = session.statistics
    assert indices == sorted(set(indices))
    assert indices[-1] == 199
    assert statistics.frames == len(indices)
    assert statistics.frames + statistics.dropped == 200


def test_the_caller_may_reuse_what_it_submitted(tiny_bundle: Path) -> None:
    inputs = stream_of(1)
    image = whole(tiny_bundle, inputs)[0]
    with Engine(tiny_bundle, age=0, threads=1) as engine:
        session = engine.session()
        session.submit(inputs)
        inputs["x"][:] = 7.0
        session.finish()
        (frame,) = session.frames()
    np.testing.assert_array_equal(frame.outputs["image"], image)


def test_submit_with_a_timeout_says_that_nobody_reads(tiny_bundle: Path) -> None:
    with Engine(tiny_bundle, age=0, threads=1) as engine:
        session = engine.session(clock=ManualClock())
        # The queue holds eight, and one more frame is in hand.
        for _ in range(9):
            session.submit(stream_of(1), timeout=2.0)
        with pytest.raises(DeadlineError, match=r"^the session's queue stayed full for 2\.0 s; read frames\(\)"):
            session.submit(stream_of(1), timeout=2.0)


def test_frames_ends_when_the_session_is_closed_from_another_thread(tiny_bundle: Path) -> None:
    answered: list[int] = []
    first = threading.Event()
    with Engine(tiny_bundle, age=0, threads=1) as engine:
        session = engine.session()

        def read() -> None:
            for frame in session.frames():
                answered.append(frame.index)
                first.set()

        reader = threading.Thread(target=read)
        reader.start()
        session.submit(stream_of(1))
        assert first.wait(PATIENCE)
        session.close()
        reader.join(PATIENCE)
        assert not reader.is_alive()
    assert answered == [0]


def test_only_one_thread_may_read(tiny_bundle: Path) -> None:
    gate, inside = Gate(), threading.Event()

    def hold() -> None:
        inside.set()
        gate.pass_through()

    with Engine(tiny_bundle, policy="full", backend=Hooks(generator=hold)) as engine:
        session = engine.session()
        reader = threading.Thread(target=lambda: list(session.render(stream_of(1))))
        reader.start()
        assert inside.wait(PATIENCE)
        with pytest.raises(InputError, match=r"^two threads read from one session"):
            next(session.frames())
        gate.open()
        reader.join(PATIENCE)


# Pacing, by a clock that only moves when somebody waits


def test_paced_frames_arrive_at_the_frame_rate(tiny_bundle: Path) -> None:
    clock = ManualClock()
    with Engine(tiny_bundle, policy="full", threads=1) as engine:
        session = engine.session(clock=clock)
        times = [(frame.index, clock.time - 100.0) for frame in session.render(stream_of(4), fps=20)]
    assert times == [(index, pytest.approx(index * 0.05)) for index in range(4)]
    assert (session.statistics.dropped, session.statistics.late) == (0, 0)


def test_a_live_stream_that_is_too_fast_drops_frames_and_counts_late_ones(tiny_bundle: Path) -> None:
    clock = ManualClock()

    def work() -> None:
        clock.time += 0.125

    with Engine(tiny_bundle, policy="full", backend=Hooks(generator=work)) as engine:
        session = engine.session(clock=clock)
        frames = list(session.render(stream_of(7), fps=20))
        statistics = session.statistics
    # Frames are due every 50 ms and take 125 ms: at 125 ms frame 2 is the newest, at 250 ms frame 5, at 375 ms frame 6.
    assert [frame.index for frame in frames] == [0, 2, 5, 6]
    assert [frame.latency_ms for frame in frames] == pytest.approx([125, 150, 125, 200])
    assert (statistics.frames, statistics.dropped, statistics.late) == (4, 3, 4)
    assert statistics.stages_ms["queue_wait"].max == pytest.approx(75)


def test_a_slow_reader_gets_the_newest_frame(tiny_bundle: Path) -> None:
    clock = ManualClock()
    with Engine(tiny_bundle, policy="full", threads=1) as engine:
        reader = engine.session(clock=clock).render(stream_of(10), fps=20)
        assert next(reader).index == 0
        clock.time += 0.22
        assert next(reader).index == 4


def test_paced_lockstep_drops_nothing(tiny_bundle: Path) -> None:
    clock = ManualClock()

    def work() -> None:
        clock.time += 0.125

    with Engine(tiny_bundle, age=1, backend=Hooks(producer=work)) as engine:
        frames = list(engine.session(clock=clock).render(stream_of(30), fps=20))
    assert [frame.index for frame in frames] == list(range(30))
    assert ages(iter(frames)) == [0] + [1] * 29


# Failures


def test_a_producer_that_fails_is_counted_and_the_last_cache_serves_on(
    tiny_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls = iter([None, fail, fail, fail, fail, fail])

    def sometimes() -> None:
        if (action := next(calls)) is not None:
            action()

    with (
        caplog.at_level(logging.WARNING, "warpcache.engine.session.runner"),
        Engine(tiny_bundle, max_age=2, backend=Hooks(producer=sometimes)) as engine,
    ):
        session = engine.session()
        frames = []
        for frame in session.render(stream_of(5)):
            frames.append(frame)
            producers_settled(engine)
        statistics = session.statistics
    assert [(frame.route, frame.age) for frame in frames] == [
        ("plain", 0),
        ("warp", 1),
        ("warp", 2),
        ("whole", 0),
        ("whole", 0),
    ]
    assert statistics.producer_runs == 1
    assert statistics.producer_failures == 4
    assert statistics.last_producer_error == "BackendError: no memory left"
    # Logged once, with its traceback; what follows is only counted.
    (record,) = caplog.records
    assert record.getMessage().startswith("a producer failed on frame 1; the session goes on with what it has")
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], BackendError)


@pytest.mark.parametrize("options", [{"policy": "async"}, {"policy": "every:2"}, {"age": 0}, {"age": 2}])
def test_a_producer_that_always_fails_leaves_the_whole_generator(tiny_bundle: Path, options: dict[str, object]) -> None:
    inputs = stream_of(4)
    backend = Hooks(producer=fail)
    with Engine(tiny_bundle, threads=1, backend=backend, **options) as engine:  # type: ignore[arg-type]
        assert "generator" not in backend.loaded
        frames = list(engine.session().render(inputs))
    assert [frame.route for frame in frames] == ["whole"] * 4
    for frame, image in zip(frames, whole(tiny_bundle, inputs), strict=True):
        np.testing.assert_array_equal(frame.outputs["image"], image)


def test_without_a_young_cache_a_frame_fails_if_so_chosen_and_the_session_goes_on(tiny_bundle: Path) -> None:
    calls = iter([None, fail, None])

    def sometimes() -> None:
        if (action := next(calls)) is not None:
            action()

    with Engine(
        tiny_bundle, policy="every:1", on_stale="raise", max_age=0, backend=Hooks(producer=sometimes)
    ) as engine:
        session = engine.session()
        reader = session.render(stream_of(3))
        assert next(reader).index == 0
        with pytest.raises(DeadlineError, match=r"^frame 1 cannot be answered: the newest cache is 1 frames old"):
            next(reader)
        assert next(reader).index == 2
        assert (session.statistics.frames, session.statistics.failed) == (2, 1)


def test_an_exit_that_fails_raises_for_its_frame_only(tiny_bundle: Path) -> None:
    calls = iter([None, fail, None])

    def sometimes() -> None:
        if (action := next(calls)) is not None:
            action()

    with Engine(tiny_bundle, policy="full", backend=Hooks(generator=sometimes)) as engine:
        session = engine.session()
        reader = session.render(stream_of(3))
        assert next(reader).index == 0
        with pytest.raises(BackendError, match=r"^no memory left"):
            next(reader)
        assert [frame.index for frame in reader] == [2]
        assert (session.statistics.frames, session.statistics.failed) == (2, 1)


@pytest.mark.parametrize(("options", "module"), [({"policy": "full"}, "generator"), ({"age": 0}, "producer")])
def test_an_interrupt_reaches_the_caller_and_the_session_can_go_on(
    tiny_bundle: Path, options: dict[str, object], module: str
) -> None:
    calls = iter([True, False, False])

    def interrupt() -> None:
        if next(calls):
            raise KeyboardInterrupt

    with Engine(tiny_bundle, backend=Hooks(**{module: interrupt}), **options) as engine:  # type: ignore[arg-type]
        session = engine.session()
        reader = session.render(stream_of(2))
        with pytest.raises(KeyboardInterrupt):
            next(reader)
        assert next(reader).route in ("whole", "plain")


def test_a_bug_on_a_producers_thread_reaches_the_reader(tiny_bundle: Path) -> None:
    gate = Gate()
    with Engine(tiny_bundle, backend=Hooks(producer=gate.pass_through)) as engine:
        session = engine.session()
        session.submit(stream_of(1))

        def broken_step(event: object) -> list[object]:
            raise RuntimeError("seeded bug")

        session._parts.scheduler.step = broken_step  # type: ignore[assignment, method-assign]
        gate.open()
        with pytest.raises(RuntimeError, match=r"^seeded bug"):
            next(session.frames())


# Inputs


@pytest.mark.parametrize(
    ("inputs", "opening"),
    [
        ({}, "input 'x' is missing; the inputs given are none"),
        ({"X1": np.zeros((2, 3, 16, 16), np.float32)}, "unexpected input 'X1'; the bundle takes 'x'"),
        ({"xx": np.zeros((2, 3, 16, 16), np.float32)}, "unexpected input 'xx'; did you mean 'x'?"),
        ({"x": [[1.0]]}, "input 'x' is a list; give a NumPy array"),
        ({"x": np.zeros((2, 3, 16, 16))}, "input 'x' has dtype float64, expected float32"),
        ({"x": np.zeros((2, 3, 16), np.float32)}, "input 'x' has shape (2, 3, 16), expected (time, 3, 16, 16)"),
        ({"x": np.zeros((2, 3, 16, 8), np.float32)}, "input 'x' has shape (2, 3, 16, 8), expected (time, 3, 16, 16)"),
        ({"x": np.zeros((), np.float32)}, "input 'x' has shape (), expected (time, 3, 16, 16)"),
        ({"x": np.zeros((0, 3, 16, 16), np.float32)}, "input 'x' is empty; give at least one frame"),
        ({"x": np.full((1, 3, 16, 16), np.nan, np.float32)}, "input 'x' holds NaN or Inf"),
    ],
)
def test_a_stream_of_the_wrong_form_is_refused_before_anything_runs(
    tiny_bundle: Path, inputs: dict[str, Array], opening: str
) -> None:
    with Engine(tiny_bundle, policy="full", threads=1) as engine:
        session = engine.session()
        with pytest.raises(InputError) as caught:
            session.render(inputs)
        assert str(caught.value).startswith(opening)
        assert session.statistics.frames == 0
        assert len(list(session.render(stream_of(1)))) == 1


@pytest.mark.parametrize("fps", [None, 25.0])
def test_a_frame_with_nan_is_refused_and_the_next_is_answered(tiny_bundle: Path, fps: float | None) -> None:
    inputs = stream_of(4)
    inputs["x"][1, 2, 3, 4] = np.inf
    with Engine(tiny_bundle, age=1, threads=1) as engine:
        session = engine.session(clock=ManualClock())
        reader = session.render(inputs, fps=fps)
        assert next(reader).index == 0
        with pytest.raises(InputError, match=r"^frame 1: input 'x' holds NaN or Inf"):
            next(reader)
        # The frame before the gap stands in for the one that is missing.
        assert [(frame.index, frame.age) for frame in reader] == [(2, 2), (3, 1)]
        assert session.statistics.rejected == 1


def test_values_are_not_looked_at_where_validation_is_off(tiny_bundle: Path) -> None:
    inputs = stream_of(1)
    inputs["x"][0, 0, 0, 0] = np.nan
    with Engine(tiny_bundle, policy="full", threads=1, validate=False) as engine:
        (frame,) = engine.session().render(inputs)
    assert np.isnan(frame.outputs["image"]).any()


def test_a_frame_that_is_refused_at_submit_uses_up_no_index(tiny_bundle: Path) -> None:
    with Engine(tiny_bundle, policy="full", threads=1) as engine:
        session = engine.session()
        with pytest.raises(InputError, match=r"^input 'x' has shape \(2, 3, 16, 16\), expected \(1, 3, 16, 16\)"):
            session.submit(stream_of(2))
        with pytest.raises(InputError, match=r"^unexpected input 'y'"):
            session.submit({"y": stream_of(1)["x"]})
        assert session.submit(stream_of(1)) == 0
        assert session.statistics.rejected == 2


@pytest.mark.parametrize("fps", [0.0, -30.0, float("nan"), float("inf")])
def test_a_frame_rate_that_is_none_is_refused(tiny_bundle: Path, fps: float) -> None:
    with (
        Engine(tiny_bundle, policy="full", threads=1) as engine,
        pytest.raises(InputError, match=rf"^fps is {fps}; give a positive number"),
    ):
        engine.session().render(stream_of(1), fps=fps)


class Arithmetic:
    """A module in NumPy: y = x + 10 * style, the atlas ignored; the cache holds y."""

    capturable = False

    def __init__(self, file: ModuleFile) -> None:
        self.name, self.inputs, self.outputs = file.name, file.inputs, file.outputs

    def enqueue(self, bindings: Mapping[str, Array], stream: Stream) -> Event:
        assert set(bindings) == {spec.name for spec in (*self.inputs, *self.outputs)}
        given = dict(bindings)

        def work() -> None:
            if self.name in ("generator", "producer"):
                given[self.outputs[0].name][:] = given["x"] + 10 * given["style"]
            elif self.name == "plain":
                given["y"][:] = given["cache.y"]
            else:
                given["y"][:] = given["cache.y"] + 100 * given["atlas"][:, :2]

        return stream.submit(work)

    def launch(self, bindings: Mapping[str, Array], stream: Stream) -> None:
        self.enqueue(bindings, stream)

    def close(self) -> None:
        """Nothing to release."""


class InNumPy:
    """The backend of such modules."""

    name = "arithmetic"

    def prepare(self, *what: object) -> None:
        """Nothing is to be prepared."""

    def load(self, file: ModuleFile, site: Site) -> Module:
        return Arithmetic(file)


@pytest.fixture
def several_inputs(tmp_path: Path) -> Bundle:
    """A bundle with an input that may stay the same, and motion; its files are never read."""
    x, style = TensorSpec("x", "int64", (1, 2)), TensorSpec("style", "int64", (1, 1))
    atlas = TensorSpec("atlas", "int64", (1, 3))
    y, cache = TensorSpec("y", "int64", (1, 2)), TensorSpec("cache.y", "int64", (1, 2))
    modules = {
        "generator": module_record("generator", (x, style), (y,), file="m.onnx"),
        "producer": module_record("producer", (x, style), (cache,), file="m.onnx"),
        "plain": module_record("plain", (cache,), (y,), file="m.onnx"),
        "warp": module_record("warp", (cache, atlas), (y,), file="m.onnx"),
    }
    manifest = Manifest(
        name="several",
        created={},
        inputs=(InputRecord(x), InputRecord(style), InputRecord(atlas, "motion")),
        outputs=(y,),
        image_output=None,
        fps=None,
        cut=Cut(("h",)),
        cache=(cache,),
        modules=modules,
        exits=(
            ExitRecord("whole", ("generator",), 1.0),
            ExitRecord("plain", ("plain",), 0.5),
            ExitRecord("warp", ("warp",), 0.1),
        ),
        calibration=None,
        files={"m.onnx": FileRecord(1, "0" * 64)},
    )
    manifest.check()
    return Bundle(tmp_path, manifest)


def test_an_input_of_one_frame_serves_every_frame(several_inputs: Bundle) -> None:
    x, style = np.arange(8).reshape(4, 2), np.array([[3]])
    atlas = np.arange(12).reshape(4, 3)
    with Engine(several_inputs, age=1, backend=InNumPy()) as engine:
        frames = list(engine.session().render({"x": x, "style": style, "atlas": atlas}))
    expected = [x[0] + 30] + [x[t - 1] + 30 + 100 * atlas[t, :2] for t in (1, 2, 3)]
    np.testing.assert_array_equal(np.concatenate([frame.outputs["y"] for frame in frames]), expected)


def test_inputs_of_any_memory_layout_are_taken(several_inputs: Bundle) -> None:
    x = np.asfortranarray(np.arange(8).reshape(4, 2))[::-1]
    with Engine(several_inputs, policy="full", backend=InNumPy()) as engine:
        frames = list(engine.session().render({"x": x, "style": np.array([[0]])}))
    np.testing.assert_array_equal(np.concatenate([frame.outputs["y"] for frame in frames]), x)


def test_motion_is_asked_for_only_where_a_module_takes_it(several_inputs: Bundle) -> None:
    inputs = {"x": np.zeros((3, 2), np.int64), "style": np.zeros((3, 1), np.int64)}
    for options in ({"policy": "full"}, {"age": 0}, {"policy": "every:2", "exit": "plain"}):
        with Engine(several_inputs, backend=InNumPy(), **options) as engine:  # type: ignore[arg-type]
            assert len(list(engine.session().render(inputs))) == 3
    with (
        Engine(several_inputs, backend=InNumPy()) as engine,
        pytest.raises(InputError, match=r"^input 'atlas' is missing; the inputs given are 'x', 'style'"),
    ):
        engine.session().render(inputs)


def test_inputs_of_unequal_length_are_refused(several_inputs: Bundle) -> None:
    inputs = {"x": np.zeros((3, 2), np.int64), "style": np.zeros((4, 1), np.int64)}
    with (
        Engine(several_inputs, policy="full", backend=InNumPy()) as engine,
        pytest.raises(InputError, match=r"^input 'style' has 4 frames and 'x' has 3; give equally many"),
    ):
        engine.session().render(inputs)


# Engine


@pytest.mark.parametrize(
    ("options", "modules"),
    [
        ({"policy": "full"}, ["generator"]),
        ({"policy": "every:4"}, ["producer", "plain", "warp"]),
        ({"policy": "every:1"}, ["producer", "plain"]),
        ({"age": 0}, ["producer", "plain"]),
        ({"age": 2, "exit": "plain"}, ["producer", "plain"]),
        ({}, ["producer", "plain", "warp"]),
        ({"max_age": 5}, ["producer", "plain", "warp", "generator"]),
        ({"max_age": 5, "on_stale": "raise"}, ["producer", "plain", "warp"]),
        ({"producers": 2}, ["producer", "producer", "plain", "warp"]),
    ],
)
def test_only_what_the_policy_needs_is_loaded(
    tiny_bundle: Path, options: dict[str, object], modules: list[str]
) -> None:
    backend = Hooks()
    with Engine(tiny_bundle, backend=backend, **options):  # type: ignore[arg-type]
        assert sorted(backend.loaded) == sorted(modules)


def test_in_the_foreground_every_module_has_all_threads(tiny_bundle: Path) -> None:
    for options in ({"policy": "full"}, {"policy": "every:2"}, {"age": 1}):
        backend = Hooks()
        with Engine(tiny_bundle, threads=1, backend=backend, **options):  # type: ignore[arg-type]
            assert set(backend.threads.values()) == {1}


@pytest.mark.parametrize(
    ("options", "opening"),
    [
        ({"policy": "sliced"}, "policy 'sliced' is not available"),
        ({"policy": "full", "age": 1}, "policy 'full' and age 1 exclude each other"),
        ({"exit": "whole"}, "exit 'whole' reads no cache; choose another"),
        ({"max_age": -1}, "max_age -1 is negative"),
        ({"on_stale": "panic"}, "unknown on_stale 'panic'"),
        ({"producers": 0}, "producers is 0; give 1 or more"),
        ({"age": 4, "max_age": 2}, "policy 'lockstep:4' plans for ages up to 4, above max_age 2"),
        ({"policy": "every:4", "max_age": 2}, "policy 'every:4' plans for ages up to 3, above max_age 2"),
        ({"threads": 0}, "cores is 0, but this process may use"),
    ],
)
def test_wrong_options_are_refused(tiny_bundle: Path, options: dict[str, object], opening: str) -> None:
    with pytest.raises(InputError) as caught:
        Engine(tiny_bundle, **options)  # type: ignore[arg-type]
    assert str(caught.value).startswith(opening)


def test_an_exit_that_the_bundle_lacks_is_refused(several_inputs: Bundle) -> None:
    manifest = several_inputs.manifest
    bare = Bundle(several_inputs.path, manifest.__class__(**{**vars(manifest), "exits": manifest.exits[:2]}))
    with pytest.raises(InputError, match=r"^bundle 'several' has no exit 'warp'"):
        Engine(bare, exit="warp", backend=InNumPy())
    with Engine(bare, age=1, backend=InNumPy()) as engine:
        inputs = {"x": np.arange(4).reshape(2, 2), "style": np.array([[0]])}
        assert [frame.route for frame in engine.session().render(inputs)] == ["plain", "plain"]


def test_closing_twice_is_safe_and_later_calls_say_so(tiny_bundle: Path) -> None:
    engine = Engine(tiny_bundle, threads=1)
    session, idle = engine.session(), engine.session()
    idle.close()
    idle.close()
    with pytest.raises(ClosedError, match=r"^the session is closed"):
        idle.submit(stream_of(1))
    reader = session.render(stream_of(3))
    next(reader)
    engine.close()
    engine.close()
    with pytest.raises(ClosedError, match=r"^the session was closed while it rendered"):
        next(reader)
    with pytest.raises(ClosedError, match=r"^the session is closed"):
        session.render(stream_of(1))
    with pytest.raises(ClosedError, match=r"^the session is closed"):
        session.frames()
    with pytest.raises(ClosedError, match=r"^the engine is closed"):
        engine.session()


def test_a_finished_session_answers_what_it_has_and_takes_no_more(tiny_bundle: Path) -> None:
    with Engine(tiny_bundle, age=0, threads=1) as engine:
        session = engine.session()
        session.submit(stream_of(1))
        session.finish()
        session.finish()
        with pytest.raises(ClosedError, match=r"^the session is finished and takes no more input"):
            session.submit(stream_of(1))
        assert [frame.index for frame in session.frames()] == [0]
        assert list(session.frames()) == []


def test_closing_while_a_producer_works_waits_for_it_and_loses_no_thread(tiny_bundle: Path) -> None:
    gate, inside = Gate(), threading.Event()

    def hold() -> None:
        inside.set()
        gate.pass_through()

    engine = Engine(tiny_bundle, backend=Hooks(producer=hold))
    session = engine.session()
    session.submit(stream_of(1))
    assert inside.wait(PATIENCE)
    session.close()
    closer = threading.Thread(target=engine.close)
    closer.start()
    gate.open()
    closer.join(PATIENCE)
    assert not closer.is_alive()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("warpcache-producer")]
    assert session.statistics.producer_failures == 0


def test_an_engine_that_cannot_load_leaves_nothing_behind(tiny_bundle: Path) -> None:
    closed: list[str] = []

    class Refusing(Hooks):
        def load(self, file: ModuleFile, site: Site) -> Module:
            name = file.name
            if name == "warp":
                raise BackendError("module 'warp' was refused")
            module = super().load(file, site)
            original = module.close
            module.close = lambda: (closed.append(name), original())[1]  # type: ignore[method-assign]
            return module

    with pytest.raises(BackendError, match=r"^module 'warp' was refused"):
        Engine(tiny_bundle, backend=Refusing())
    assert sorted(closed) == ["plain", "producer"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("warpcache-producer")]


def test_a_session_is_a_context_manager(tiny_bundle: Path) -> None:
    with Engine(tiny_bundle, policy="full", threads=1) as engine:
        with engine.session() as session:
            assert isinstance(session, Session)
            next(session.render(stream_of(1)))
        with pytest.raises(ClosedError):
            session.submit(stream_of(1))

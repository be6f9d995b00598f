"""What every device and backend keeps: order, events, memory, errors, closing, and sessions that do not meet."""

from __future__ import annotations

import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.errors import ClosedError, InputError
from warpcache.engine.spec import Array

FRAMES = 7
# The reference runs the same graphs in float32 on ONNX Runtime. The doubles run just that; a GPU sums the 27 products
# of a 3x3x3 convolution in another order and with fused operations: 27 * 2**-24 of sums below 8, twice in a row.
TOLERANCE = 5e-5


@pytest.fixture
def frames() -> dict[str, Array]:
    return {"x": np.random.default_rng(3).uniform(-1, 1, (FRAMES, 3, 16, 16)).astype(np.float32)}


def rendered(session: Any, inputs: dict[str, Array], get: Any) -> list[Array]:
    return [get(frame.outputs["image"]) for frame in session.render(inputs)]


def close_to(found: list[Array], expected: list[Array]) -> bool:
    return len(found) == len(expected) and all(
        np.allclose(one, two, rtol=0, atol=TOLERANCE) for one, two in zip(found, expected, strict=True)
    )


@pytest.fixture
def expected(tiny_bundle: Path, frames: dict[str, Array]) -> dict[str, list[Array]]:
    """The answers of a plain engine on the CPU, by policy."""
    from warpcache.engine.engine import Engine

    answers = {}
    for name, options in POLICIES.items():
        with Engine(tiny_bundle, threads=1, **options) as engine:
            answers[name] = rendered(engine.session(), frames, np.array)
    return answers


POLICIES: dict[str, dict[str, Any]] = {
    "full": {"policy": "full"},
    "every:3": {"policy": "every:3"},
    "every:2 plain": {"policy": "every:2", "exit": "plain"},
    "lockstep 0": {"age": 0},
    "lockstep 2": {"age": 2},
}


# Modules


def test_work_runs_in_the_order_it_was_given(rig: Any, tiny_bundle: Path) -> None:
    module = rig.module(tiny_bundle, "warp")
    stream = rig.stream()
    first, second = np.float32(0.25), np.float32(-0.5)
    still = rig.put(np.zeros((1, 3, 16, 16), np.float32))
    a = rig.put(np.full((1, 3, 16, 16), first))
    b = rig.put(np.full((1, 3, 16, 16), second))
    middle, end = rig.put(np.zeros((1, 3, 16, 16), np.float32)), rig.put(np.zeros((1, 3, 16, 16), np.float32))
    # image = y_s + 0.1 x: the second call reads what the first has written, so the sum of both is there only in order.
    module.enqueue({"x": a, "cache.y_s": still, "image": middle}, stream)
    event = module.enqueue({"x": b, "cache.y_s": middle, "image": end}, stream)
    assert event.wait()
    assert event.done
    assert event.error is None
    tenth = np.float32(0.1)
    np.testing.assert_allclose(rig.get(end), np.full((1, 3, 16, 16), tenth * first + tenth * second), atol=1e-7)
    stream.synchronize()
    module.close()


@pytest.mark.parametrize("wrong", ["missing", "unknown", "dtype", "shape", "strided", "kind"])
def test_a_binding_that_does_not_fit_is_refused_and_nothing_runs(rig: Any, tiny_bundle: Path, wrong: str) -> None:
    module = rig.module(tiny_bundle, "warp")
    specs = {spec.name: spec for spec in (*module.inputs, *module.outputs)}
    bindings = {name: rig.put(np.zeros(spec.shape, spec.dtype)) for name, spec in specs.items()}
    bindings["image"] = rig.put(np.full(specs["image"].shape, 9, np.float32))
    good = dict(bindings)
    match wrong:
        case "missing":
            del bindings["x"]
        case "unknown":
            bindings["y"] = bindings["x"]
        case "dtype":
            bindings["x"] = rig.put(np.zeros(specs["x"].shape, np.float16))
        case "shape":
            bindings["x"] = rig.put(np.zeros((1, 3, 16, 15), np.float32))
        case "strided":
            bindings["x"] = rig.strided(specs["x"])
        case "kind":
            bindings["x"] = [0.0]
    with pytest.raises(InputError, match="module 'warp'"):
        module.enqueue(bindings, rig.stream()).wait()
    rig.stream().synchronize()
    assert (rig.get(good["image"]) == 9).all()
    # The module is none the worse for it.
    assert module.enqueue(good, rig.stream()).wait()
    rig.stream().synchronize()
    assert (rig.get(good["image"]) == 0).all()
    module.close()


def test_outputs_that_share_memory_are_refused(rig: Any, tiny_bundle: Path) -> None:
    module = rig.module(tiny_bundle, "warp")
    shared = rig.put(np.zeros((1, 3, 16, 16), np.float32))
    with pytest.raises(InputError, match="share memory"):
        module.enqueue(
            {"x": rig.put(np.zeros((1, 3, 16, 16), np.float32)), "cache.y_s": shared, "image": shared}, rig.stream()
        ).wait()
    module.close()


def test_a_closed_module_says_so(rig: Any, tiny_bundle: Path) -> None:
    module = rig.module(tiny_bundle, "warp")
    bindings = {spec.name: rig.put(np.zeros(spec.shape, spec.dtype)) for spec in (*module.inputs, *module.outputs)}
    module.enqueue(bindings, rig.stream()).wait()
    module.close()
    module.close()
    with pytest.raises(ClosedError, match="module 'warp' is closed"):
        module.enqueue(bindings, rig.stream()).wait()


def test_a_module_says_what_it_takes_and_gives(rig: Any, tiny_bundle: Path) -> None:
    record = Bundle.open(tiny_bundle).manifest.modules["producer"]
    module = rig.module(tiny_bundle, "producer")
    assert (module.name, module.inputs, module.outputs) == ("producer", record.inputs, record.outputs)
    module.close()


# Engines


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_answers_as_on_the_cpu(
    rig: Any, tiny_bundle: Path, frames: dict[str, Array], expected: dict[str, list[Array]], policy: str
) -> None:
    with rig.engine(tiny_bundle, **POLICIES[policy]) as engine:
        assert close_to(rendered(engine.session(), frames, rig.get), expected[policy])


def test_async_answers_every_frame_from_a_cache_that_is_whole(
    rig: Any, tiny_bundle: Path, frames: dict[str, Array], expected: dict[str, list[Array]]
) -> None:
    with rig.engine(tiny_bundle, exit="plain", producers=2) as engine:
        session = engine.session()
        for frame in session.render(frames):
            # The plain exit gives exactly the generator's picture of the frame that the cache is of.
            origin = expected["full"][frame.index - frame.age]
            assert close_to([rig.get(frame.outputs["image"])], [origin]), (frame.index, frame.age)
        engine.synchronize()
        assert session.statistics.producer_failures == 0
        assert session.statistics.frames == FRAMES


def test_two_sessions_on_one_engine_equal_two_engines(
    rig: Any, tiny_bundle: Path, frames: dict[str, Array], expected: dict[str, list[Array]]
) -> None:
    backwards = {"x": np.ascontiguousarray(frames["x"][::-1])}
    with rig.engine(tiny_bundle, age=2) as alone:
        reversed_alone = rendered(alone.session(), backwards, rig.get)
    with rig.engine(tiny_bundle, age=2) as engine:
        one, two = engine.session(), engine.session()
        first, second = [], []
        for a, b in zip(one.render(frames), two.render(backwards), strict=True):
            first.append(rig.get(a.outputs["image"]))
            second.append(rig.get(b.outputs["image"]))
    assert close_to(first, expected["lockstep 2"])
    assert close_to(second, reversed_alone)
    assert not close_to(first, second)


def test_sessions_may_be_driven_from_several_threads(
    rig: Any, tiny_bundle: Path, frames: dict[str, Array], expected: dict[str, list[Array]]
) -> None:
    answers: dict[int, list[Array]] = {}

    with rig.engine(tiny_bundle, policy="every:3") as engine:

        def work(index: int) -> None:
            with engine.session() as session:
                answers[index] = rendered(session, frames, rig.get)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(answers) == [0, 1, 2]
    assert all(close_to(answer, expected["every:3"]) for answer in answers.values())


def test_answers_stay_the_callers(
    rig: Any, tiny_bundle: Path, frames: dict[str, Array], expected: dict[str, list[Array]]
) -> None:
    with rig.engine(tiny_bundle, policy="full") as engine:
        kept = [frame.outputs["image"] for frame in engine.session().render(frames)]
        # Read only now: no later frame may have been written into an earlier one's memory.
        assert close_to([rig.get(image) for image in kept], expected["full"])
    assert close_to([rig.get(image) for image in kept], expected["full"])


def test_submitted_frames_may_be_changed_at_once(
    rig: Any, tiny_bundle: Path, frames: dict[str, Array], expected: dict[str, list[Array]]
) -> None:
    with rig.engine(tiny_bundle, age=0) as engine:
        session = engine.session()
        mine = np.empty((1, 3, 16, 16), np.float32)
        answers = []
        reader = session.frames()
        for index in range(FRAMES):
            mine[:] = frames["x"][index : index + 1]
            session.submit({"x": mine})
            mine[:] = np.nan
            answers.append(rig.get(next(reader).outputs["image"]))
    assert close_to(answers, expected["full"])


def test_no_memory_is_taken_per_frame(rig: Any, tiny_bundle: Path) -> None:
    inputs = {"x": np.random.default_rng(1).uniform(-1, 1, (60, 3, 16, 16)).astype(np.float32)}
    tracemalloc.start()
    try:
        with rig.engine(tiny_bundle, age=1) as engine:
            reader = engine.session().render(inputs)
            for _ in range(20):
                next(reader)
            before = rig.taken_bytes()
            for _ in range(30):
                next(reader)
            after = rig.taken_bytes()
    finally:
        tracemalloc.stop()
    # One image more is 3072 bytes; Python's own bookkeeping (histograms, integers) moves by less than one in 30 frames.
    assert after - before < 3072, (before, after)


def test_closing_twice_and_using_what_is_closed(rig: Any, tiny_bundle: Path, frames: dict[str, Array]) -> None:
    engine = rig.engine(tiny_bundle, age=1)
    session = engine.session()
    reader = session.render(frames)
    next(reader)
    session.close()
    session.close()
    with pytest.raises(ClosedError, match="the session was closed"):
        next(reader)
    engine.close()
    engine.close()
    with pytest.raises(ClosedError, match="the engine is closed"):
        engine.session()


def test_an_engine_may_be_closed_while_producers_run(rig: Any, tiny_bundle: Path, frames: dict[str, Array]) -> None:
    for _ in range(3):
        with rig.engine(tiny_bundle, producers=2) as engine:
            reader = engine.session().render(frames)
            next(reader)
            last = next(reader)
        # What it answered outlives it.
        assert np.isfinite(rig.get(last.outputs["image"])).all()


@pytest.mark.parametrize("bad", ["nan", "dtype", "shape", "name"])
def test_wrong_inputs_are_refused_and_the_session_goes_on(
    rig: Any, tiny_bundle: Path, frames: dict[str, Array], expected: dict[str, list[Array]], bad: str
) -> None:
    good = frames["x"][:1]
    wrong = {
        "nan": {"x": np.full_like(good, np.nan)},
        "dtype": {"x": good.astype(np.float64)},
        "shape": {"x": good[:, :, :8]},
        "name": {"y": good},
    }[bad]
    with rig.engine(tiny_bundle, age=0) as engine:
        session = engine.session()
        with pytest.raises(InputError, match="input"):
            session.submit(wrong)
        session.submit({"x": good})
        frame = next(session.frames())
        assert close_to([rig.get(frame.outputs["image"])], expected["full"][:1])
        assert session.statistics.rejected == 1

"""Generators that carry state from frame to frame, on every device: each policy agrees with the generator's own loop.

On the CPU the answers are the loop's bit for bit. On the driver in software modules run by ONNX Runtime too, so the
same holds there; on hardware fp32 results differ by the executor's order of summation.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stateful import Loop, first_values, frames_of, make_stateful_bundle

from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.engine import Engine
from warpcache.engine.errors import BundleError, InputError
from warpcache.engine.promise.calibration import Quality

FRAMES = 9


@pytest.fixture(scope="session")
def stateful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stateful bundle; read it only."""
    return make_stateful_bundle(tmp_path_factory.mktemp("stateful"))


@pytest.fixture(scope="session")
def loop(stateful: Path) -> Loop:
    """What it must agree with."""
    return Loop(stateful)


def check(rig: Any, answer: Any, expected: np.ndarray) -> None:
    got = rig.get(answer)
    if rig.name.startswith("cuda"):
        # tanh of sums of 27 to 36 products of values below 1: some ulp each way.
        np.testing.assert_allclose(got, expected, atol=2e-5)
    else:
        np.testing.assert_array_equal(got, expected)


def test_full_is_the_loop(rig: Any, stateful: Path, loop: Loop) -> None:
    x = frames_of(FRAMES)
    with rig.engine(stateful, policy="full") as engine:
        for frame, expected in zip(engine.session().render({"x": x}), loop.images(x), strict=True):
            check(rig, frame.outputs["image"], expected)


@pytest.mark.parametrize("exit_", ["plain", "warp"])
@pytest.mark.parametrize("age", [0, 1, 3])
def test_lockstep_reads_the_caches_of_the_loop(rig: Any, stateful: Path, loop: Loop, age: int, exit_: str) -> None:
    x = frames_of(FRAMES)
    plain, aged = loop.aged(x, 0, "plain"), loop.aged(x, age, exit_)
    with rig.engine(stateful, age=age, exit=exit_) as engine:
        session = engine.session()
        frames = list(session.render({"x": x}))
    assert [frame.age for frame in frames] == [min(age, t) for t in range(FRAMES)]
    for t, frame in enumerate(frames):
        check(rig, frame.outputs["image"], plain[t] if frame.age == 0 else aged[t])
    assert session.statistics.producer_runs == FRAMES - max(0, age - 1) if age else FRAMES


@pytest.mark.parametrize("policy", ["every:1", "every:4", "async"])
def test_the_producer_runs_on_every_frame_in_order(rig: Any, stateful: Path, loop: Loop, policy: str) -> None:
    x = frames_of(FRAMES)
    with rig.engine(stateful, policy=policy, exit="plain") as engine:
        session = engine.session()
        frames = list(session.render({"x": x}))
        engine.synchronize()
    for t, frame in enumerate(frames):
        # Whatever the age came to, the cache is the one that the loop has there.
        check(rig, frame.outputs["image"], loop.aged(x[: t + 1], frame.age, "plain")[t])
    assert max(frame.age for frame in frames) <= (0 if policy == "every:1" else 8)


def test_sessions_have_a_state_each(rig: Any, stateful: Path, loop: Loop) -> None:
    one, other = frames_of(FRAMES), frames_of(FRAMES, seed=1)
    with rig.engine(stateful, policy="full") as engine:
        first, second = engine.session().render({"x": one}), engine.session().render({"x": other})
        for expected, different in zip(loop.images(one), loop.images(other), strict=True):
            check(rig, next(first).outputs["image"], expected)
            check(rig, next(second).outputs["image"], different)


@pytest.mark.parametrize(
    "options", [{"policy": "full"}, {"age": 0}, {"age": 2, "exit": "plain"}, {"policy": "every:2"}]
)
def test_reset_starts_afresh(rig: Any, stateful: Path, loop: Loop, options: dict[str, Any]) -> None:
    x = frames_of(5)
    with rig.engine(stateful, **options) as engine:
        session = engine.session()
        before = [rig.get(frame.outputs["image"]) for frame in session.render({"x": x})]
        session.reset()
        again = [rig.get(frame.outputs["image"]) for frame in session.render({"x": x})]
    for one, other in zip(before, again, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("policy", ["full", "every:3"])
def test_a_dropped_answer_is_no_dropped_state(rig: Any, stateful: Path, loop: Loop, policy: str) -> None:
    x = frames_of(6)
    with rig.engine(stateful, policy=policy, exit="plain" if policy != "full" else None) as engine:
        session = engine.session()
        for frame in x:
            session.submit({"x": frame[None]})
        session.finish()
        answered = list(session.frames())
    # The first one was taken up when it came; of those that waited the newest won.
    assert [frame.index for frame in answered] == [0, 5]
    assert session.statistics.dropped == 4
    assert answered[1].age <= (0 if policy == "full" else 2)
    check(rig, answered[1].outputs["image"], loop.aged(x, answered[1].age, "plain")[5])


def test_what_does_not_go_with_state_is_refused(stateful: Path) -> None:
    with pytest.raises(InputError, match=r"^bundle 'stateful' carries state, and a quality chooses between exits"):
        Engine(stateful, quality=Quality("psnr", 30.0))
    with pytest.raises(InputError, match=r"^2 producers were asked for, but the generator carries state"):
        Engine(stateful, producers=2)
    with Engine(stateful) as engine, pytest.raises(InputError, match=r"^unexpected input 'h'; the bundle takes 'x'"):
        engine.session().submit({"x": frames_of(1), "h": first_values()["h"]})


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "file 'state.npz' does not hold the first value of state 'h'"),
        (
            {"h": np.zeros((1, 4, 16, 8), np.float32)},
            r"the first value of state 'h' is float32 \[1, 4, 16, 8\]",
        ),
        (
            {"h": np.zeros((1, 4, 16, 16))},
            r"the first value of state 'h' is float64 \[1, 4, 16, 16\]",
        ),
        (None, "file 'state.npz' does not hold the first value of state 'h'"),
    ],
)
def test_a_first_value_that_does_not_fit_is_refused(tmp_path: Path, arrays: Any, message: str) -> None:
    buffer = BytesIO()
    if arrays is not None:
        np.savez(buffer, **arrays)
    bundle = make_stateful_bundle(tmp_path, initial=buffer.getvalue())
    with pytest.raises(BundleError, match=rf"^bundle .*stateful.warp: {message}"):
        Engine(bundle)


def test_the_manifest_keeps_state_to_the_session(stateful: Path) -> None:
    manifest = Bundle.open(stateful).manifest
    assert [spec.name for spec in manifest.generator_inputs] == ["x"]
    assert [spec.name for spec in manifest.outputs] == ["image"]
    assert [(record.input.name, record.output, record.initial) for record in manifest.state] == [
        ("h", "h_next", "state.npz"),
        ("n", "n_next", None),
    ]

"""A routed session on a GPU: which streams it waits for, what it copies, and what is loaded for it.

Everything runs on the driver in software; what every device has to keep, the contract's tests say.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from tests_software_tensorrt import software_flavour  # type: ignore[import-not-found]

from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.bundle.roles import Role
from warpcache.engine.cuda.device import CudaDevice, CudaStream
from warpcache.engine.cuda.finite import FiniteCheck, finite_on_host
from warpcache.engine.cuda.options import CudaOptions
from warpcache.engine.device.module import ModuleFile, Site
from warpcache.engine.engine import Engine
from warpcache.engine.errors import BackendError, ClosedError, WarpcacheError
from warpcache.engine.promise.calibration import Quality
from warpcache.engine.routing import plan as routing_plan
from warpcache.engine.routing.exit_costs import ExitCosts
from warpcache.engine.spec import AGE_SPEC, Array, TensorSpec
from warpcache.engine.tensorrt.backend import TensorRtBackend
from warpcache.kernels.array import DeviceArray
from warpcache.kernels.driver import check, load
from warpcache.kernels.finite import FiniteKernel

SHAPE = (1, 3, 16, 16)
X, THUMBNAIL = TensorSpec("x", "float32", SHAPE), "cache.thumbnail"
QUALITY = Quality("psnr_db", 30.0, confidence=0.9)
GOOD, BAD = -0.95, -0.2


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(autouse=True)
def fixed_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What exits cost here must not choose among modules of some microseconds: a branch is cheaper than the whole."""
    monkeypatch.setattr(
        routing_plan, "measure_exit_costs", lambda run, exits, clock: {name: 10.0 - (name != "whole") for name in exits}
    )
    monkeypatch.setattr(ExitCosts, "observe", lambda self, exit_name, ms: None)


@pytest.fixture
def make_engine(software_cuda: Any, routed_bundle: Path, engines: Path) -> Callable[..., Engine]:
    """An engine with a quality on the software GPU, with TensorRT's double."""

    def make(*, cuda: dict[str, Any] | None = None, backend: Any = None, **options: Any) -> Engine:
        chosen = TensorRtBackend(software_flavour(), engine_cache=engines) if backend is None else backend
        return Engine(
            routed_bundle,
            device="cuda:0",
            backend=chosen,
            cuda=CudaOptions(debug=True, **(cuda or {})),
            **{"quality": QUALITY, "audit_every": 1, **options},
        )

    return make


def images(count: int, seed: int = 0) -> Array:
    x = np.random.default_rng(seed).uniform(-0.5, 0.5, (count, *SHAPE[1:])).astype(np.float32)
    x[:, 0, 0, :12] = BAD
    return x


def on_the_cpu(bundle: Path, module: str, feeds: dict[str, Array]) -> dict[str, Array]:
    opened = Bundle.open(bundle)
    record = opened.manifest.modules[module]
    session = onnxruntime.InferenceSession(opened.file(record.file), providers=["CPUExecutionProvider"])
    names = [spec.name for spec in record.outputs]
    given = {value.name: feeds[value.name] for value in session.get_inputs()}
    return dict(zip(names, session.run(names, given), strict=True))


class Wrapping:
    """A backend that shows every module that it loads to a function, which may give back another."""

    name = "wrapped"

    def __init__(self, inner: TensorRtBackend, wrap: Callable[[Any, CudaStream], Any]) -> None:
        self._inner = inner
        self._wrap = wrap

    def prepare(self, *arguments: Any) -> None:
        self._inner.prepare(*arguments)

    def load(self, module: ModuleFile, site: Site) -> Any:
        return self._wrap(self._inner.load(module, site), site.stream)


# What is loaded


def test_predictors_run_on_the_consumers_stream_and_the_auditor_on_its_own(
    make_engine: Callable[..., Engine], engines: Path, software_cuda: Any
) -> None:
    for policy in ("full", "every:2", "async"):
        loaded: list[tuple[str, CudaStream]] = []

        def note(module: Any, stream: CudaStream, *, into: list[tuple[str, CudaStream]] = loaded) -> Any:
            into.append((module.name, stream))
            return module

        inner = TensorRtBackend(software_flavour(), engine_cache=engines)
        with make_engine(policy=policy, backend=Wrapping(inner, note)) as engine:
            consumer = engine._placement._stream  # type: ignore[attr-defined]
            by_name = {name: stream for name, stream in loaded if stream is consumer}
            assert ("predictor" in by_name) == (policy != "full")
            assert "predictor_cold" in by_name
            # Once as an exit, once to audit: a module has its activation memory for one stream alone.
            generators = [stream for name, stream in loaded if name == "generator"]
            assert len(generators) == 2
            assert generators[0] is consumer
            auditor = generators[1]
            assert auditor.name == "warpcache-auditor"
            assert auditor not in [stream for name, stream in loaded if name != "generator"]
            # CUDA's priorities: the lower the number, the earlier.
            cuda = load()
            ours, theirs = (check(cuda.cuStreamGetPriority(s.stream), "asking") for s in (consumer, auditor))
            assert ours < theirs


def test_what_nobody_routes_loads_none_of_it(make_engine: Callable[..., Engine], engines: Path) -> None:
    loaded: list[str] = []

    def note(module: Any, stream: CudaStream) -> Any:
        loaded.append(module.name)
        return module

    inner = TensorRtBackend(software_flavour(), engine_cache=engines)
    options = {"quality": None, "cuda": {"outputs": "device"}, "backend": Wrapping(inner, note)}
    with make_engine(policy="full", **options) as engine:
        assert loaded == ["generator"]
        assert engine._placement._kernel is None  # type: ignore[attr-defined]
        with engine.session() as session, CudaDevice(0) as device, pytest.raises(WarpcacheError, match="nobody routed"):
            session._parts.workspace.finite({"image": device.upload(images(1))})
    loaded.clear()
    with make_engine(policy="full", audit_every=0, backend=Wrapping(inner, note)):
        assert sorted(loaded) == ["branch1", "generator", "predictor_cold"]


def test_every_lane_has_its_graphs(make_engine: Callable[..., Engine]) -> None:
    with make_engine(age=1) as engine, engine.session() as session:
        slots = engine._new_scheduler().slots
        # One a slot: producer, plain, warp, warp2, predictor; one each: branch1, whole, cold predictor, auditor.
        assert session.statistics.graphs == 5 * slots + 4
    with make_engine(age=1, cuda={"graphs": "off"}) as engine, engine.session() as session:
        assert session.statistics.graphs == 0


# What a frame waits for


def test_frames_go_on_while_an_audit_is_held(make_engine: Callable[..., Engine], software_cuda: Any) -> None:
    with make_engine(policy="full") as engine:
        session = engine.session()
        auditor = engine._placement._placed.modules.auditor.stream.cuda  # type: ignore[attr-defined]
        x = images(6)
        x[:, 0, 0, 2] = GOOD  # branch1, which needs an audit
        reader = session.render({"x": x})
        with software_cuda.held(auditor):
            routes = [next(reader).route for _ in range(4)]
            assert routes == ["branch1"] * 4
            assert session.statistics.audits == 0
            software_cuda.wait_for_work(auditor)
        engine.synchronize()
        assert session.statistics.audits == 1
        # The next is due when the last has ended.
        next(reader)
        next(reader)
        engine.synchronize()
        assert session.statistics.audits == 2
        assert session.statistics.audit_misses == 0


def test_a_prediction_waits_for_nothing_that_runs_elsewhere(
    make_engine: Callable[..., Engine], routed_bundle: Path, software_cuda: Any
) -> None:
    with make_engine(policy="async") as engine, engine.session() as session:
        workspace: Any = session._parts.workspace
        x = images(3)
        first, second = ({"x": workspace.take_input(X, frame[None], finite=True, keep=True)} for frame in x[:2])
        workspace.lane(Role.PRODUCER, 0).enqueue(first, 0, {}).wait()
        producer, auditor = workspace.lane(Role.PRODUCER, 0)._stream, workspace.lane(Role.WHOLE)._stream
        age = workspace.take_input(AGE_SPEC, np.full((1, 1), 3, np.float32), finite=False, keep=True)
        prediction, cold = (
            workspace.lane(Role.PREDICTOR).take_outputs(),
            workspace.lane(Role.PREDICTOR_COLD).take_outputs(),
        )
        with software_cuda.held(producer), software_cuda.held(auditor):
            busy = workspace.lane(Role.PRODUCER, 0).enqueue(second, 1, {})
            audit = workspace.lane(Role.WHOLE).enqueue(first, None, workspace.lane(Role.WHOLE).take_outputs())
            workspace.lane(Role.PREDICTOR).enqueue({**second, "age": age}, 0, prediction).wait()
            workspace.lane(Role.PREDICTOR_COLD).enqueue(second, None, cold).wait()
            assert not busy.done
            assert not audit.done
        busy.wait()
        audit.wait()
        thumbnail = on_the_cpu(routed_bundle, "producer", {"x": x[:1]})[THUMBNAIL]
        feeds = {"x": x[1:2], THUMBNAIL: thumbnail, "age": np.full((1, 1), 3, np.float32)}
        for found, module in ((prediction, "predictor"), (cold, "predictor_cold")):
            # The double of TensorRT is ONNX Runtime, and so is the reference.
            for name, value in on_the_cpu(routed_bundle, module, feeds).items():
                np.testing.assert_array_equal(found[name], value, err_msg=name)
        # The workspace's own, the same every time.
        assert workspace.lane(Role.PREDICTOR).take_outputs() is prediction


def test_a_frame_is_copied_to_the_gpu_once_for_predictor_and_exit(
    make_engine: Callable[..., Engine], software_cuda: Any
) -> None:
    with make_engine(policy="full", audit_every=0) as engine, engine.session() as session:
        workspace: Any = session._parts.workspace
        given = {"x": workspace.take_input(X, images(1), finite=True, keep=True)}
        prediction, outputs = (
            workspace.lane(Role.PREDICTOR_COLD).take_outputs(),
            workspace.exit("branch1").take_outputs(),
        )
        before = software_cuda.count("copies")
        workspace.lane(Role.PREDICTOR_COLD).enqueue(given, None, prediction).wait()
        # The image there, three numbers back.
        assert software_cuda.count("copies") - before == 1 + 3
        workspace.exit("branch1").enqueue(given, None, outputs).wait()
        assert software_cuda.count("copies") - before == 4 + 1


def test_ages_take_no_memory(make_engine: Callable[..., Engine], software_cuda: Any) -> None:
    with make_engine(age=1, audit_every=0) as engine, engine.session() as session:
        before = software_cuda.count("pinned_bytes"), software_cuda.count("allocations")
        held = [
            session._parts.workspace.take_input(AGE_SPEC, np.full((1, 1), age, np.float32), finite=False, keep=True)
            for age in range(256)
        ]
        assert (software_cuda.count("pinned_bytes"), software_cuda.count("allocations")) == before
        assert [float(item.array[0, 0]) for item in held] == list(range(256))
        del held


# What is not finite


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int64"])
def test_large_numbers_are_finite_and_their_sum_need_not_be(dtype: str) -> None:
    largest = np.iinfo(dtype).max if dtype == "int64" else np.finfo(dtype).max
    array = np.full((2, 3, 40), largest, dtype)
    assert finite_on_host(array)
    if dtype != "int64":
        for value in (np.nan, np.inf, -np.inf):
            array[1, 2, 3] = value
            assert not finite_on_host(array)
        array[0, 0, 0] = np.inf  # beside -inf, which is left from above
        assert not finite_on_host(array)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_an_answer_on_the_gpu_is_looked_at_there(software_cuda: Any, dtype: str) -> None:
    with CudaDevice(0) as device:
        kernel = FiniteKernel(device.context)
        finite = FiniteCheck(device, kernel)
        picture = images(1).astype(dtype)
        good, score = device.upload(picture), device.upload(np.full((2, 5), 7, np.int64))
        picture[0, 2, 15, 15] = np.nan
        bad = device.upload(picture)
        before = {what: software_cuda.count(what) for what in ("copies", "allocations", "device_bytes")}
        assert finite.finite([good, score])
        assert not finite.finite([score, bad])
        assert finite.finite([good])
        after = {what: software_cuda.count(what) for what in before}
        # One number a look, and no image.
        assert after == before | {"copies": before["copies"] + 3}
        finite.close()
        finite.close()
        kernel.close()


def test_a_look_waits_for_no_other_stream(make_engine: Callable[..., Engine], software_cuda: Any) -> None:
    with make_engine(policy="full", cuda={"outputs": "device"}) as engine, engine.session() as session:
        workspace: Any = session._parts.workspace
        with CudaDevice(0) as device:
            answer = {"image": device.upload(images(1))}
            placement: Any = engine._placement
            with (
                software_cuda.held(placement._stream),
                software_cuda.held(placement._placed.modules.auditor.stream.cuda),
            ):
                assert workspace.finite(answer)
        workspace.close()
        with pytest.raises(ClosedError, match="the session is closed"):
            workspace.finite(answer)


# Audits


@pytest.mark.parametrize("outputs", ["host", "device"])
@pytest.mark.parametrize("graphs", ["on", "off"])
def test_what_is_kept_for_an_audit_is_no_longer_the_callers(
    make_engine: Callable[..., Engine], routed_bundle: Path, software_cuda: Any, outputs: str, graphs: str
) -> None:
    """Borrowed inputs and lent answers are written anew while the audit waits; it is of what they were."""
    x = images(2)
    with (
        make_engine(policy="full", cuda={"outputs": outputs, "graphs": graphs}) as engine,
        engine.session() as session,
        CudaDevice(0) as device,
    ):
        workspace: Any = session._parts.workspace
        mine = device.upload(x[:1])
        given = {"x": workspace.take_input(X, workspace.adopt(X, mine), finite=True, keep=True)}
        answer = workspace.exit("branch1").take_outputs()
        workspace.exit("branch1").enqueue(given, None, answer).wait()
        kept, picture = workspace.keep_for_audit(given, answer["image"])
        expected = on_the_cpu(routed_bundle, "branch1", {"x": x[:1]})["image"]
        for pointer, size_bytes in ((mine.pointer, mine.size_bytes), *written_anew(answer["image"])):
            check(load().cuMemsetD8(pointer, 0x3D, size_bytes), "writing anew")
            check(load().cuStreamSynchronize(0), "writing anew")
        audited = workspace.lane(Role.WHOLE).take_outputs()
        workspace.lane(Role.WHOLE).enqueue(kept, None, audited).wait()
        np.testing.assert_array_equal(picture, expected)
        assert picture.dtype == np.float32
        np.testing.assert_array_equal(audited["image"], on_the_cpu(routed_bundle, "generator", {"x": x[:1]})["image"])
        # The next audit, of inputs from the host, is of those.
        given = {"x": workspace.take_input(X, x[1:], finite=True, keep=True)}
        kept, _ = workspace.keep_for_audit(given, answer["image"])
        workspace.lane(Role.WHOLE).enqueue(kept, None, audited).wait()
        np.testing.assert_array_equal(audited["image"], on_the_cpu(routed_bundle, "generator", {"x": x[1:]})["image"])


def written_anew(answer: Any) -> list[tuple[int, int]]:
    """Where an answer lies, if that is on the GPU; one on the host is overwritten here."""
    if isinstance(answer, DeviceArray):
        return [(answer.pointer, answer.size_bytes)]
    answer.fill(7)
    return []


def test_a_borrowed_input_may_change_hands_between_host_and_gpu(
    make_engine: Callable[..., Engine], routed_bundle: Path, software_cuda: Any
) -> None:
    """An input that stays is copied for one audit only; a borrowed one between two of them takes its place."""
    x = images(2)
    with make_engine(policy="full") as engine, engine.session() as session, CudaDevice(0) as device:
        workspace: Any = session._parts.workspace
        stays = {"x": workspace.take_input(X, x[:1], finite=True, keep=True)}
        mine = device.upload(x[1:])
        borrowed = {"x": workspace.take_input(X, workspace.adopt(X, mine), finite=True, keep=True)}
        audited = workspace.lane(Role.WHOLE).take_outputs()
        for given, frame in ((stays, x[:1]), (borrowed, x[1:]), (stays, x[:1])):
            kept, _ = workspace.keep_for_audit(given, np.zeros(SHAPE, np.float32))
            workspace.lane(Role.WHOLE).enqueue(kept, None, audited).wait()
            expected = on_the_cpu(routed_bundle, "generator", {"x": frame})["image"]
            np.testing.assert_array_equal(audited["image"], expected)


def test_what_an_owner_has_queued_is_kept_when_it_is_there(
    make_engine: Callable[..., Engine], routed_bundle: Path, software_cuda: Any
) -> None:
    """The generator may take an input that the exit which answered has not waited for."""
    software_cuda.configure(lazy=1)  # nothing runs that nobody waits for
    x = images(1)
    with make_engine(policy="full") as engine, engine.session() as session, CudaDevice(0) as device:
        workspace: Any = session._parts.workspace
        owner, mine, source = device.stream("owner"), device.allocate(X), device.upload(x)
        code = load().cuMemcpyDtoDAsync(mine.pointer, source.pointer, mine.size_bytes, owner.stream)
        check(code, "drawing")
        lent = DeviceArray(mine.pointer, SHAPE, "float32", device=0, stream=owner.handle, owner=mine)
        given = {"x": workspace.take_input(X, workspace.adopt(X, lent), finite=True, keep=True)}
        kept, _ = workspace.keep_for_audit(given, np.zeros(SHAPE, np.float32))
        audited = workspace.lane(Role.WHOLE).take_outputs()
        workspace.lane(Role.WHOLE).enqueue(kept, None, audited).wait()
        np.testing.assert_array_equal(audited["image"], on_the_cpu(routed_bundle, "generator", {"x": x})["image"])


def test_a_session_is_closed_after_the_audit_that_runs(
    make_engine: Callable[..., Engine], software_cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make_engine(policy="full") as engine:
        session = engine.session()
        workspace: Any = session._parts.workspace
        stream: Any = engine._placement._placed.modules.auditor.stream  # type: ignore[attr-defined]
        given = {"x": workspace.take_input(X, images(1), finite=True, keep=True)}
        kept, _ = workspace.keep_for_audit(given, np.zeros(SHAPE, np.float32))
        wait = stream.synchronize

        def release_and_wait() -> None:
            # Held until somebody waits: memory that was given back before would be used by the work afterwards.
            software_cuda.release(stream.cuda)
            wait()

        monkeypatch.setattr(stream, "synchronize", release_and_wait)
        software_cuda.hold(stream.cuda)
        audit = workspace.lane(Role.WHOLE).enqueue(kept, None, workspace.lane(Role.WHOLE).take_outputs())
        session.close()
        assert audit.done
        assert audit.error is None


@pytest.mark.leaves_cuda_behind  # pytest keeps the warning's traceback, and with it the session, until the test is over
def test_an_auditor_that_fails_does_not_disturb_frames(
    make_engine: Callable[..., Engine], engines: Path, software_cuda: Any
) -> None:
    class Failing:
        capturable = False

        def __init__(self, inner: Any) -> None:
            self._inner = inner
            self.name, self.inputs, self.outputs = inner.name, inner.inputs, inner.outputs
            self.runs = 0

        def launch(self, bindings: Any, stream: CudaStream) -> None:
            self.runs += 1
            if self.runs > 2:  # the first are those of the sessions' opening: of the one that is timed, and of ours
                raise BackendError("the auditor is out of order")
            self._inner.launch(bindings, stream)

        def close(self) -> None:
            self._inner.close()

    def wrap(module: Any, stream: CudaStream) -> Any:
        return Failing(module) if stream.name == "warpcache-auditor" else module

    x = images(4)
    x[:, 0, 0, 2] = GOOD
    inner = TensorRtBackend(software_flavour(), engine_cache=engines)
    with make_engine(policy="full", backend=Wrapping(inner, wrap)) as engine:
        session = engine.session()
        frames = []
        for frame in session.render({"x": x}):
            frames.append(frame.route)
            engine.synchronize()
        assert frames == ["branch1"] * 4
        assert session.statistics.audits == 0


def test_a_routed_session_gives_everything_back(make_engine: Callable[..., Engine], software_cuda: Any) -> None:
    x = images(6)
    x[:, 0, 0, :3] = GOOD
    with make_engine(policy="async", cuda={"outputs": "device"}) as engine:
        with engine.session() as session:
            list(session.render({"x": x}))
        del session
        before = software_cuda.live()
        with engine.session() as session:
            list(session.render({"x": x}))
        assert not software_cuda.left_since(before)

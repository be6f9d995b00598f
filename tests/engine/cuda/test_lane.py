"""Frames through an engine on a GPU: what is copied and what is not, graphs, peers, and what goes wrong there.

Everything runs on the driver in software; that the same holds on hardware, the device contract's tests say.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests_software_tensorrt import software_flavour  # type: ignore[import-not-found]

from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.bundle.roles import Role
from warpcache.engine.cuda.buffers import HostInput, StaticInputs
from warpcache.engine.cuda.device import CudaDevice, CudaStream
from warpcache.engine.cuda.graph import CudaGraph
from warpcache.engine.cuda.options import CudaOptions, parse_device
from warpcache.engine.device.module import ModuleFile, Site
from warpcache.engine.engine import Engine
from warpcache.engine.errors import BackendError, ClosedError, DeviceError, InputError
from warpcache.engine.spec import Array, TensorSpec
from warpcache.engine.tensorrt.backend import TensorRtBackend
from warpcache.kernels.array import DeviceArray
from warpcache.kernels.driver import check, load

SHAPE = (1, 3, 16, 16)
X = TensorSpec("x", "float32", SHAPE)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture
def make_engine(software_cuda: Any, tiny_bundle: Path, engines: Path) -> Callable[..., Engine]:
    """An engine on the software GPU, with TensorRT's double."""

    def make(*, cuda: dict[str, Any] | None = None, backend: Any = None, **options: Any) -> Engine:
        chosen = TensorRtBackend(software_flavour(), engine_cache=engines) if backend is None else backend
        return Engine(
            tiny_bundle, device="cuda:0", backend=chosen, cuda=CudaOptions(debug=True, **(cuda or {})), **options
        )

    return make


def images(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).uniform(-1, 1, (count, *SHAPE[1:])).astype(np.float32)


def on_the_cpu(bundle: Path, x: Array, **options: Any) -> list[Array]:
    with Engine(bundle, threads=1, **options) as engine:
        return [np.array(frame.outputs["image"]) for frame in engine.session().render({"x": x})]


class Foreign:
    """Somebody's array on the GPU that speaks `__cuda_array_interface__` only, as PyCUDA's do."""

    def __init__(self, array: DeviceArray) -> None:
        self._array = array
        self.__cuda_array_interface__ = array.__cuda_array_interface__


class Dlpack:
    """Somebody's array on the GPU that speaks DLPack only."""

    def __init__(self, array: DeviceArray) -> None:
        self.__dlpack__ = array.__dlpack__
        self.__dlpack_device__ = array.__dlpack_device__


class Wrapping:
    """A backend of which a test replaces one thing."""

    name = "wrapped"

    def __init__(self, inner: TensorRtBackend, wrap: Callable[[Any], Any]) -> None:
        self._inner = inner
        self._wrap = wrap

    def prepare(self, *arguments: Any) -> None:
        self._inner.prepare(*arguments)

    def load(self, module: ModuleFile, site: Site) -> Any:
        return self._wrap(self._inner.load(module, site))


class Wrapped:
    """A module that is another one but for what a test says."""

    capturable = True

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.name, self.inputs, self.outputs = inner.name, inner.inputs, inner.outputs

    def launch(self, bindings: Any, stream: CudaStream) -> None:
        self._inner.launch(bindings, stream)

    def enqueue(self, bindings: Any, stream: CudaStream) -> Any:
        return stream.submit(lambda: self.launch(bindings, stream))

    def close(self) -> None:
        self._inner.close()


# Graphs


def test_one_graph_an_exit_and_slot(make_engine: Callable[..., Engine]) -> None:
    with make_engine(age=1) as engine, engine.session() as session:
        slots = engine._new_scheduler().slots
        # Producer, plain and warp have one a slot; the whole generator, loaded as a fallback, reads none.
        assert session.statistics.graphs == 3 * slots + 1
    with make_engine(age=1, cuda={"graphs": "off"}) as engine, engine.session() as session:
        assert session.statistics.graphs == 0


def test_a_frame_is_one_replay_and_takes_no_memory(make_engine: Callable[..., Engine], software_cuda: Any) -> None:
    with make_engine(policy="full") as engine:
        session = engine.session()
        reader = session.render({"x": images(12)})
        before = {what: software_cuda.count(what) for what in ("allocations", "graph_launches", "events_created")}
        for _ in range(5):
            next(reader)
        assert software_cuda.count("graph_launches") - before["graph_launches"] == 5
        assert software_cuda.count("allocations") == before["allocations"]
        assert software_cuda.count("events_created") == before["events_created"]


def test_an_empty_graph_is_refused(make_engine: Callable[..., Engine], engines: Path, software_cuda: Any) -> None:
    class Elsewhere(Wrapped):
        """Issues to a stream of its own, as an executor does that ignores the stream it is given."""

        def launch(self, bindings: Any, stream: CudaStream) -> None:
            other = stream.device.stream("elsewhere")
            self._inner.launch(bindings, other)
            if not capturing(stream):
                other.synchronize()

    inner = TensorRtBackend(software_flavour(), engine_cache=engines)
    with (
        make_engine(policy="full", backend=Wrapping(inner, Elsewhere), cuda={"graphs": "on"}) as engine,
        pytest.raises(BackendError, match=r"the graph of module 'generator' is empty: .* use graphs='auto'"),
    ):
        engine.session()


def test_without_a_graph_where_the_backend_cannot_be_captured(
    make_engine: Callable[..., Engine], engines: Path, tiny_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Waits(Wrapped):
        """Waits for the GPU in the middle, which no capture allows."""

        def launch(self, bindings: Any, stream: CudaStream) -> None:
            self._inner.launch(bindings, stream)
            stream.synchronize()

    x = images(3)
    inner = TensorRtBackend(software_flavour(), engine_cache=engines)
    with (
        caplog.at_level(logging.WARNING, "warpcache.engine.cuda.lane"),
        make_engine(policy="full", backend=Wrapping(inner, Waits), cuda={"graphs": "auto"}) as engine,
    ):
        session = engine.session()
        answers = [np.array(frame.outputs["image"]) for frame in session.render({"x": x})]
        assert session.statistics.graphs == 0
    np.testing.assert_array_equal(answers, on_the_cpu(tiny_bundle, x, policy="full"))
    told = [record for record in caplog.records if "is issued call by call, without a graph" in record.getMessage()]
    assert len(told) == 1


def test_a_module_that_says_it_cannot_be_captured_is_believed(
    make_engine: Callable[..., Engine], engines: Path
) -> None:
    class Uncapturable(Wrapped):
        capturable = False

    inner = TensorRtBackend(software_flavour(), engine_cache=engines)
    with make_engine(policy="full", backend=Wrapping(inner, Uncapturable), cuda={"graphs": "auto"}) as engine:
        assert engine.session().statistics.graphs == 0
    with (
        make_engine(policy="full", backend=Wrapping(inner, Uncapturable), cuda={"graphs": "on"}) as engine,
        pytest.raises(BackendError, match="module 'generator' cannot be captured by its backend; use graphs='auto'"),
    ):
        engine.session()


def test_a_capture_that_fails_leaves_the_stream_usable(software_cuda: Any) -> None:
    with CudaDevice(0) as device:
        stream = device.stream("s")
        target = device.allocate(TensorSpec("t", "uint8", (4,)))

        def fails() -> None:
            raise ValueError("in the middle")

        with pytest.raises(ValueError, match="in the middle"):
            CudaGraph.capture(stream, fails, name="broken")
        graph = CudaGraph.capture(stream, lambda: fill(stream, target, 7), name="fill")
        assert graph.nodes == 1
        assert device.download(target).tolist() == [0, 0, 0, 0]
        graph.launch(stream)
        stream.synchronize()
        assert device.download(target).tolist() == [7, 7, 7, 7]
        graph.close()
        graph.close()
        with pytest.raises(DeviceError, match="the graph of fill is closed"):
            graph.launch(stream)


def test_other_threads_neither_break_nor_enter_a_capture(software_cuda: Any) -> None:
    with CudaDevice(0) as device:
        stream, other = device.stream("captured"), device.stream("other")
        target = device.allocate(TensorSpec("t", "uint8", (4,)))
        problems: list[BaseException] = []

        def meanwhile() -> None:
            try:
                theirs = device.allocate(TensorSpec("theirs", "uint8", (4,)))  # waits, which no capture allows
                fill(other, theirs, 1)
                other.synchronize()
            except BaseException as exc:
                problems.append(exc)

        def work() -> None:
            fill(stream, target, 5)
            thread = threading.Thread(target=meanwhile)
            thread.start()
            thread.join()

        graph = CudaGraph.capture(stream, work, name="fill")
        assert not problems
        assert graph.nodes == 1


def test_pythons_collector_does_not_come_into_a_capture(software_cuda: Any) -> None:
    """What it frees may be device memory, and freeing that on the capturing thread spoils the capture."""
    with CudaDevice(0) as device:
        stream = device.stream("captured")
        target = device.allocate(TensorSpec("t", "uint8", (4,)))
        held = [device.allocate(TensorSpec("garbage", "uint8", (4,)))]

        def work() -> None:
            fill(stream, target, 5)
            cycle: list[Any] = [held.pop()]
            cycle.append(cycle)
            del cycle
            _ = [[] for _ in range(1000)]  # far more objects than the collector lets pass

        thresholds = gc.get_threshold()
        gc.set_threshold(10, 1, 1)
        try:
            graph = CudaGraph.capture(stream, work, name="fill")
        finally:
            gc.set_threshold(*thresholds)
        assert graph.nodes == 1
        assert gc.isenabled()
        gc.collect()


def test_the_collector_stays_out_until_the_last_of_several_captures_has_ended(software_cuda: Any) -> None:
    """Engines on several GPUs open their sessions at the same time, and the collector is the process's."""
    with CudaDevice(0) as device, CudaDevice(1) as other:
        ours, theirs = device.stream("ours"), other.stream("theirs")
        target, second = device.allocate(TensorSpec("t", "uint8", (4,))), other.allocate(TensorSpec("t", "uint8", (4,)))
        inside, go_on = threading.Event(), threading.Event()

        def long_work() -> None:
            fill(theirs, second, 5)
            inside.set()
            assert go_on.wait(30)

        graphs: list[CudaGraph] = []
        thread = threading.Thread(target=lambda: graphs.append(CudaGraph.capture(theirs, long_work, name="theirs")))

        def work() -> None:
            fill(ours, target, 5)
            thread.start()
            assert inside.wait(30)

        graphs.append(CudaGraph.capture(ours, work, name="ours"))
        assert not gc.isenabled()
        go_on.set()
        thread.join()
        assert gc.isenabled()
        assert [graph.nodes for graph in graphs] == [1, 1]


def test_debugging_finds_a_buffer_that_has_moved(make_engine: Callable[..., Engine], software_cuda: Any) -> None:
    with make_engine(policy="full") as engine, CudaDevice(0) as device:
        session = engine.session()
        lane = session._parts.workspace.exit("whole")
        lane._bindings[None]["x"] = device.upload(images(1))  # type: ignore[attr-defined]
        session.submit({"x": images(1)})
        with pytest.raises(DeviceError, match=r"the buffers of module 'generator' are not those it was captured with"):
            next(session.frames())


# Events between streams. An engine also waits on the host, so these drive a session's lanes themselves.


@contextlib.contextmanager
def lanes(engine: Engine) -> Iterator[tuple[Any, Any, list[dict[str, Any]], dict[str, Array]]]:
    """A producer's lane, the plain exit's, the inputs of two frames, and memory for an answer; slot 0 is of frame 0."""
    with engine, engine.session() as session:
        workspace: Any = session._parts.workspace
        given = [{"x": workspace.take_input(X, frame[None], finite=True, keep=True)} for frame in images(2)]
        producer, plain = workspace.lane(Role.PRODUCER, 0), workspace.exit("plain")
        producer.enqueue(given[0], 0, {}).wait()
        yield producer, plain, given, workspace.exit("plain").take_outputs()


def test_an_exit_waits_on_the_gpu_for_the_cache_it_reads(
    make_engine: Callable[..., Engine], tiny_bundle: Path, software_cuda: Any
) -> None:
    old, new = on_the_cpu(tiny_bundle, images(2), policy="full")
    with lanes(make_engine(exit="plain")) as (producer, plain, given, outputs):
        with software_cuda.held(producer._stream):
            producer._stream.call(lambda: producer._issue(given[1], 0, {}))
            answered = plain.enqueue(given[1], 0, outputs)
            assert not answered.done
        answered.wait()
        np.testing.assert_array_equal(outputs["image"], new)
    assert not np.array_equal(old, new)


def test_a_producer_waits_on_the_gpu_for_who_still_reads_the_slot(
    make_engine: Callable[..., Engine], tiny_bundle: Path, software_cuda: Any
) -> None:
    old, _ = on_the_cpu(tiny_bundle, images(2), policy="full")
    with lanes(make_engine(exit="plain")) as (producer, plain, given, outputs):
        # Nothing runs that nobody waits for: the producer is waited for first, and must bring the reader to its end.
        software_cuda.configure(lazy=1)
        answered = plain.enqueue(given[1], 0, outputs)
        producer._stream.call(lambda: producer._issue(given[1], 0, {}))
        producer._stream.synchronize()
        answered.wait()
        np.testing.assert_array_equal(outputs["image"], old)


def test_an_input_that_stays_the_same_is_copied_once(software_cuda: Any) -> None:
    with CudaDevice(0) as device:
        stream = device.stream("s")
        inputs = StaticInputs(device, [X])
        pinned = device.allocate_pinned(X)
        source = HostInput(pinned, pinned.__array_interface__["data"][0])
        before = software_cuda.count("copies")
        for _ in range(3):
            inputs.fill("x", source, stream)
        stream.synchronize()
        assert software_cuda.count("copies") - before == 1
        inputs.fill("x", HostInput(pinned, source.pointer), stream)  # another frame, if in the same memory
        stream.synchronize()
        assert software_cuda.count("copies") - before == 2
        del inputs, source, pinned


# What goes in and out


def test_arrays_on_the_gpu_are_taken_where_they_are(
    make_engine: Callable[..., Engine], tiny_bundle: Path, software_cuda: Any
) -> None:
    x = images(4)
    expected = on_the_cpu(tiny_bundle, x, age=1)
    with make_engine(age=1) as engine, CudaDevice(0) as device:
        mine = device.upload(x)
        answers = [np.array(frame.outputs["image"]) for frame in engine.session().render({"x": mine})]
        np.testing.assert_array_equal(answers, expected)
        again = [np.array(frame.outputs["image"]) for frame in engine.session().render({"x": Foreign(mine)})]
        np.testing.assert_array_equal(again, expected)


def test_without_graphs_the_callers_memory_is_bound_itself(
    make_engine: Callable[..., Engine], engines: Path, software_cuda: Any
) -> None:
    seen: list[dict[str, int]] = []

    class Watched(Wrapped):
        def launch(self, bindings: Any, stream: CudaStream) -> None:
            seen.append({name: array.pointer for name, array in bindings.items()})
            self._inner.launch(bindings, stream)

    inner = TensorRtBackend(software_flavour(), engine_cache=engines)
    options = {"graphs": "off", "outputs": "device"}
    with (
        make_engine(policy="full", backend=Wrapping(inner, Watched), cuda=options) as engine,
        CudaDevice(0) as device,
    ):
        session = engine.session()
        mine = device.upload(images(1))
        copies = software_cuda.count("copies")
        session.submit({"x": mine})
        frame = next(session.frames())
        assert seen[-1] == {"x": mine.pointer, "image": frame.outputs["image"].pointer}
        assert software_cuda.count("copies") == copies


def test_memory_that_is_not_aligned_is_copied_where_it_would_be_bound(
    make_engine: Callable[..., Engine], tiny_bundle: Path, software_cuda: Any
) -> None:
    x = images(1)
    with make_engine(policy="full", cuda={"graphs": "off"}) as engine, CudaDevice(0) as device:
        wide = device.upload(np.concatenate([np.zeros(1, np.float32), x.ravel()]))
        odd = DeviceArray(wide.pointer + 4, SHAPE, "float32", device=0, owner=wide)
        session = engine.session()
        session.submit({"x": odd})
        np.testing.assert_array_equal(
            [next(session.frames()).outputs["image"]], on_the_cpu(tiny_bundle, x, policy="full")
        )


def test_answers_on_the_gpu_are_lent_by_dlpack(
    make_engine: Callable[..., Engine], tiny_bundle: Path, software_cuda: Any
) -> None:
    x = images(5)
    expected = on_the_cpu(tiny_bundle, x, age=1)
    with make_engine(age=1, cuda={"outputs": "device"}) as engine, CudaDevice(0) as device:
        kept = [frame.outputs["image"] for frame in engine.session().render({"x": x})]
        assert all(array.__dlpack_device__() == (2, 0) for array in kept)
        # Each is its caller's alone: no later frame was written into an earlier one's memory.
        np.testing.assert_array_equal([device.download(array) for array in kept], expected)
        borrowed = [DeviceArray.borrow(lent(array), device=0, stream=0) for lent in (Foreign, Dlpack) for array in kept]
        assert [array.pointer for array in borrowed] == 2 * [array.pointer for array in kept]
        assert {(array.shape, array.dtype.name) for array in borrowed} == {(SHAPE, "float32")}
        pointers = {array.pointer for array in kept}
        del kept, borrowed
        # Let go of, the same memory serves again.
        assert next(iter(engine.session().render({"x": x}))).outputs["image"].shape == SHAPE
        assert len(pointers) == 5


@pytest.mark.parametrize("protocol", [Foreign, Dlpack, lambda array: array], ids=["interface", "dlpack", "ours"])
def test_an_array_waits_for_what_its_owner_has_queued(
    make_engine: Callable[..., Engine], software_cuda: Any, protocol: Any
) -> None:
    """An owner's kernel may still be writing when the array is handed in; its stream says when it is done."""
    software_cuda.configure(lazy=1)  # nothing runs that nobody waits for
    with make_engine(policy="full") as engine, CudaDevice(0) as device:
        owner = device.stream("owner")
        mine = device.allocate(TensorSpec("x", "float32", SHAPE))
        value = np.full(SHAPE, 0.5, np.float32)
        source = device.upload(value)
        session = engine.session()
        with software_cuda.held(owner):
            copy_code = load().cuMemcpyDtoDAsync(mine.pointer, source.pointer, mine.size_bytes, owner.stream)
            check(copy_code, "copying")
            lent = DeviceArray(mine.pointer, SHAPE, "float32", device=0, stream=owner.handle)
            session.submit({"x": protocol(lent)})
        # Had the copy to the graph's buffer not waited for the owner's, the answer would be that of zeros.
        with_owner = np.array(next(session.frames()).outputs["image"])
        session.submit({"x": value})
        np.testing.assert_array_equal(with_owner, next(session.frames()).outputs["image"])


@pytest.mark.parametrize("graphs", ["on", "off"])
def test_an_array_that_is_written_anew_is_read_anew(
    make_engine: Callable[..., Engine], tiny_bundle: Path, software_cuda: Any, graphs: str
) -> None:
    """A renderer draws every frame into the same array: the object handed in is the same, what is in it is not."""
    x = images(3)
    with make_engine(policy="full", cuda={"graphs": graphs}) as engine, CudaDevice(0) as device:
        mine = device.allocate(X)
        session = engine.session()
        answers = []
        for frame in x:
            check(load().cuMemcpyHtoD(mine.pointer, frame.ctypes.data, frame.nbytes), "drawing")
            check(load().cuStreamSynchronize(0), "drawing")
            session.submit({"x": mine})
            answers.append(np.array(next(session.frames()).outputs["image"]))
    np.testing.assert_array_equal(answers, on_the_cpu(tiny_bundle, x, policy="full"))


@pytest.mark.parametrize("wrong", ["device", "dtype", "shape", "strided", "host", "list"])
def test_arrays_that_do_not_fit_are_refused(make_engine: Callable[..., Engine], software_cuda: Any, wrong: str) -> None:
    with make_engine(policy="full") as engine, CudaDevice(0) as device, CudaDevice(1) as other:
        session = engine.session()
        array: Any
        match wrong:
            case "device":
                array, sentence = other.upload(images(1)), "input 'x' is on cuda:1, expected cuda:0; move it"
            case "dtype":
                array = device.upload(images(1).astype(np.float16))
                sentence = "input 'x' has dtype float16, expected float32; convert it first"
            case "shape":
                array, sentence = device.upload(images(2)), r"input 'x' has shape \(2, 3, 16, 16\), expected"
            case "strided":
                wide = device.upload(images(2))
                array = DeviceArray(wide.pointer, SHAPE, "float32", device=0, strides=(1536, 512, 32, 2), owner=wide)
                sentence = "input 'x' is not contiguous on the GPU; make it contiguous"
            case "host":
                torch = pytest.importorskip("torch")
                array, sentence = torch.zeros(SHAPE), "input 'x' is on the CPU, expected a GPU's memory"
            case _:
                array, sentence = [[0.0]], "input 'x' is of type list, which offers neither DLPack nor"
        with pytest.raises(InputError, match=sentence):
            session.submit({"x": array})
        session.submit({"x": images(1)})
        assert next(session.frames()).index == 0


def test_what_a_frame_waits_for_goes_first(make_engine: Callable[..., Engine], software_cuda: Any) -> None:
    cuda = load()
    with make_engine() as engine:
        placement: Any = engine._placement
        consumer, producer = placement._stream, placement._placed.modules.producers[0].stream.cuda
        # CUDA's priorities: the lower the number, the earlier.
        assert check(cuda.cuStreamGetPriority(consumer.stream), "asking") < check(
            cuda.cuStreamGetPriority(producer.stream), "asking"
        )
        for stream in (consumer, producer):
            # What others put on the default stream must not hold ours up.
            assert check(cuda.cuStreamGetFlags(stream.stream), "asking") == int(
                cuda.CUstream_flags.CU_STREAM_NON_BLOCKING
            )


def test_sessions_open_in_turn_with_frames(make_engine: Callable[..., Engine], engines: Path) -> None:
    """A capture of one session must not see what another issues to the consumer's stream, nor share its activations."""
    unlocked: list[str] = []
    opened: list[Engine] = []

    class Watched(Wrapped):
        def launch(self, bindings: Any, stream: CudaStream) -> None:
            if not opened[0]._turn.locked():
                unlocked.append(self.name)
            self._inner.launch(bindings, stream)

    inner = TensorRtBackend(software_flavour(), engine_cache=engines)
    with make_engine(age=1, backend=Wrapping(inner, Watched), cuda={"graphs": "off"}) as engine:
        opened.append(engine)
        list(engine.session().render({"x": images(3)}))
    assert not unlocked


# Producers beside and elsewhere


def test_frames_go_on_while_a_producer_is_held(
    make_engine: Callable[..., Engine], tiny_bundle: Path, software_cuda: Any
) -> None:
    x = images(5)
    whole = on_the_cpu(tiny_bundle, x, policy="full")
    with make_engine(exit="plain") as engine:
        session = engine.session()
        reader = session.render({"x": x})
        first = next(reader)
        assert (first.route, first.age) == ("plain", 0)
        engine.synchronize()
        stream = engine._placement._placed.modules.producers[0].stream.cuda  # type: ignore[attr-defined]
        with software_cuda.held(stream):
            ages = []
            for _ in range(3):
                frame = next(reader)
                ages.append(frame.age)
                np.testing.assert_array_equal(frame.outputs["image"], whole[frame.index - frame.age])
        # The cache of frame 1 at best was made before the producer was held.
        assert ages in ([1, 2, 3], [0, 1, 2], [1, 1, 2])
        engine.synchronize()
        assert session.statistics.producer_failures == 0


def test_producers_on_another_gpu_hand_their_caches_over(
    make_engine: Callable[..., Engine], tiny_bundle: Path, software_cuda: Any
) -> None:
    x = images(8)
    whole = on_the_cpu(tiny_bundle, x, policy="full")
    with make_engine(exit="plain", cuda={"producer_devices": ("cuda:1", "cuda:0")}) as engine:
        session = engine.session()
        for frame in session.render({"x": x}):
            np.testing.assert_array_equal(frame.outputs["image"], whole[frame.index - frame.age])
            engine.synchronize()
        assert session.statistics.producer_runs >= 2
        assert session.statistics.producer_failures == 0


def test_a_frame_on_the_gpu_reaches_a_producer_on_another(
    make_engine: Callable[..., Engine], tiny_bundle: Path, software_cuda: Any
) -> None:
    software_cuda.configure(peer_access=0)
    x = images(4)
    whole = on_the_cpu(tiny_bundle, x, policy="full")
    with make_engine(exit="plain", cuda={"producer_devices": ("cuda:1",)}) as engine, CudaDevice(0) as device:
        mine = device.upload(x)
        for frame in engine.session().render({"x": mine}):
            np.testing.assert_array_equal(frame.outputs["image"], whole[frame.index - frame.age])
            engine.synchronize()


@pytest.mark.leaves_cuda_behind  # pytest keeps the warning's traceback, and with it the session, until the test is over
def test_a_producer_that_fails_is_counted_and_frames_go_on(
    make_engine: Callable[..., Engine], engines: Path, software_cuda: Any
) -> None:
    calls = 0

    class Failing(Wrapped):
        capturable = False

        def launch(self, bindings: Any, stream: CudaStream) -> None:
            nonlocal calls
            calls += self.name == "producer"
            # The first runs are those of the session's opening, and the first frame's.
            if self.name == "producer" and calls > 4:
                raise BackendError("the producer is out of order")
            self._inner.launch(bindings, stream)

    inner = TensorRtBackend(software_flavour(), engine_cache=engines)
    with make_engine(backend=Wrapping(inner, Failing)) as engine:
        session = engine.session()
        frames = []
        for frame in session.render({"x": images(4)}):
            frames.append(frame)
            engine.synchronize()
        assert len(frames) == 4
        assert session.statistics.producer_failures >= 1
        assert session.statistics.last_producer_error == "BackendError: the producer is out of order"


# Loading, and what goes wrong there


def test_everything_that_may_run_is_loaded_with_the_engine(make_engine: Callable[..., Engine], engines: Path) -> None:
    loaded: list[str] = []

    def note(module: Any) -> Any:
        loaded.append(module.name)
        return module

    inner = TensorRtBackend(software_flavour(), engine_cache=engines)
    with make_engine(backend=Wrapping(inner, note)):
        assert sorted(loaded) == ["generator", "plain", "producer", "warp"]
    loaded.clear()
    # Without the whole generator as a way out it is not needed.
    with make_engine(on_stale="raise", backend=Wrapping(inner, note)):
        assert sorted(loaded) == ["plain", "producer", "warp"]


def test_modules_are_closed_where_loading_stops_half_way(make_engine: Callable[..., Engine], engines: Path) -> None:
    closed: list[str] = []
    loaded: list[str] = []

    class Noted(Wrapped):
        def close(self) -> None:
            closed.append(self.name)
            super().close()

    def second_fails(module: Any) -> Any:
        loaded.append(module.name)
        if len(loaded) == 2:
            module.close()
            raise BackendError("no room for a second producer")
        return Noted(module)

    inner = TensorRtBackend(software_flavour(), engine_cache=engines)
    with pytest.raises(BackendError, match="no room for a second producer"):
        make_engine(producers=2, backend=Wrapping(inner, second_fails))
    assert closed == ["producer"]


def test_too_little_memory_is_said_in_numbers(make_engine: Callable[..., Engine], software_cuda: Any) -> None:
    software_cuda.configure(memory=30_000)
    sentence = r"cuda:0 has no room for .*: \d+\.\d KiB were asked for, \d+\.\d KiB of 29\.3 KiB are free"
    with pytest.raises(DeviceError, match=sentence), make_engine(age=1) as engine:
        engine.session()


def test_a_gpu_that_is_not_there(tiny_bundle: Path, software_cuda: Any) -> None:
    with pytest.raises(DeviceError, match="there is no GPU cuda:7; there are: cuda:0, cuda:1"):
        Engine(tiny_bundle, device="cuda:7", backend=TensorRtBackend(software_flavour()))


def test_a_session_gives_everything_back(make_engine: Callable[..., Engine], software_cuda: Any) -> None:
    with make_engine() as engine:
        with engine.session() as session:
            list(session.render({"x": images(2)}))
        del session
        before = software_cuda.live()
        with engine.session() as session:
            list(session.render({"x": images(2)}))
        # Closed is enough, whoever still refers to the session; an answer that somebody holds stays his.
        assert not software_cuda.left_since(before)
        kept = engine.session()
        answer = next(kept.render({"x": images(1)})).outputs["image"]
        before = software_cuda.live()
        kept.close()
        assert software_cuda.live()["pinned_blocks"] < before["pinned_blocks"]
        assert np.isfinite(answer).all()


def test_modules_are_closed_after_their_work_and_before_their_stream(
    make_engine: Callable[..., Engine], engines: Path, software_cuda: Any
) -> None:
    """Executors hold handles of libraries that look at their stream when they are given back."""
    seen: list[tuple[str, str]] = []

    class Watched(Wrapped):
        def launch(self, bindings: Any, stream: CudaStream) -> None:
            self.stream = stream
            super().launch(bindings, stream)

        def close(self) -> None:
            super().close()
            (code,) = load().cuStreamQuery(self.stream.stream)
            with pytest.raises(ClosedError):
                self.stream.require_open()
            seen.append((self.name, code.name))

    inner = TensorRtBackend(software_flavour(), engine_cache=engines)
    with make_engine(policy="async", backend=Wrapping(inner, Watched)) as engine:
        list(engine.session().render({"x": images(3)}))
    assert sorted(seen) == [(name, "CUDA_SUCCESS") for name in ("generator", "plain", "producer", "warp")]


def test_what_is_missing_is_not_built_where_that_was_asked(
    make_engine: Callable[..., Engine], tmp_path: Path, software_cuda: Any
) -> None:
    backend = TensorRtBackend(software_flavour(), engine_cache=tmp_path / "none", build=False)
    with pytest.raises(BackendError, match=r"holds no TensorRT-RTX .* engine of .*; build them with `warpcache build"):
        make_engine(backend=backend)


# Options


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"device": "gpu"}, "unknown device 'gpu'; choose 'cpu' or 'cuda:N'"),
        ({"device": "cuda:x"}, "unknown device 'cuda:x'"),
        ({"backend": "tensorrt"}, "backend 'tensorrt' does not run on the CPU; choose device='cuda:0'"),
        ({"backend": "tflite"}, "backend 'tflite' does not run on the CPU; choose 'onnxruntime'"),
        ({"device": "cuda:0", "backend": "tflite"}, "unknown backend 'tflite'; choose one of 'onnxruntime'"),
        ({"cuda": CudaOptions()}, "options for a GPU were given for device 'cpu'"),
        ({"device": "cuda:0", "threads": 2}, "threads are the CPU's, but the device is 'cuda:0'"),
    ],
)
def test_options_that_make_no_sense(tiny_bundle: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        Engine(tiny_bundle, **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"graphs": "maybe"}, "unknown graphs 'maybe'; choose 'auto', 'on' or 'off'"),
        ({"outputs": "gpu"}, "unknown outputs 'gpu'; choose 'host' or 'device'"),
        ({"producer_devices": "cuda:1"}, "producer_devices is 'cuda:1'; give several names"),
        ({"producer_devices": ("cpu",)}, "a producer cannot run on 'cpu' beside a consumer on a GPU"),
        ({"producer_devices": ("cuda:a",)}, "unknown device 'cuda:a'"),
    ],
)
def test_cuda_options_are_checked_when_they_are_made(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        CudaOptions(**options)


def test_producer_devices_go_with_async_only(make_engine: Callable[..., Engine]) -> None:
    with pytest.raises(InputError, match="producer_devices goes with policy 'async', but the policy is 'every:3'"):
        make_engine(policy="every:3", cuda={"producer_devices": ("cuda:1",)})


def test_devices_by_name() -> None:
    assert [parse_device(name) for name in ("cpu", "cuda", "cuda:0", "cuda:12")] == [None, 0, 0, 12]


def capturing(stream: CudaStream) -> bool:
    cuda = load()
    status = check(cuda.cuStreamIsCapturing(stream.stream), "asking")
    return bool(status != cuda.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE)


def fill(stream: CudaStream, array: DeviceArray, value: int) -> None:
    check(load().cuMemsetD8Async(array.pointer, value, array.size_bytes, stream.stream), "filling")


def test_the_bundle_says_which_files_its_modules_are(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    file = ModuleFile.of(bundle, "warp")
    assert (file.name, file.path) == ("warp", bundle.file("warp.onnx"))
    assert file.inputs == bundle.manifest.modules["warp"].inputs

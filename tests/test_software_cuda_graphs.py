"""Stream capture and graphs of the software driver, against what CUDA's documentation says of them."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from software_cuda.raw import BYTES, RawGpu, code, numbers, ok, raw_gpu

gpu = raw_gpu

GLOBAL, THREAD_LOCAL, RELAXED = range(3)


def begin(gpu: RawGpu, stream: int, mode: int = THREAD_LOCAL) -> None:
    ok(gpu.cuda.cuStreamBeginCapture(stream, gpu.cuda.CUstreamCaptureMode(mode)))


def end(gpu: RawGpu, stream: int) -> Any:
    graph = ok(gpu.cuda.cuStreamEndCapture(stream))
    executable = ok(gpu.cuda.cuGraphInstantiate(graph, 0))
    ok(gpu.cuda.cuGraphDestroy(graph))
    return executable


def in_thread(work: Callable[[], Any]) -> Any:
    """What `work` returns on another thread."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


class Log:
    """Host functions that write down their numbers."""

    def __init__(self, gpu: RawGpu) -> None:
        self.seen: list[int] = []
        self._function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda number: self.seen.append(number or 0))
        # Not the bindings' own: they free what they wrap around the function when it has run, and a graph's runs again.
        self._launch = gpu.software.library.cuLaunchHostFunc
        self._launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]

    def issue(self, stream: int, number: int) -> None:
        assert self._launch(stream, ctypes.cast(self._function, ctypes.c_void_p), number) == 0


class TestReplay:
    def test_nothing_runs_until_the_graph_is_launched(self, gpu: RawGpu) -> None:
        stream, source, pointer = gpu.stream(), gpu.pinned(numbers()), gpu.alloc()
        begin(gpu, stream)
        ok(gpu.cuda.cuMemcpyHtoDAsync(pointer, source.ctypes.data, BYTES, stream))
        ok(gpu.cuda.cuMemsetD32Async(pointer, 0, 4, stream))
        assert ok(gpu.cuda.cuStreamIsCapturing(stream)) == gpu.cuda.CUstreamCaptureStatus(1)
        executable = end(gpu, stream)
        ok(gpu.cuda.cuStreamSynchronize(stream))
        assert np.isnan(gpu.read(pointer)).all()
        launches = gpu.software.count("graph_launches")
        for start in (10, 20):
            # What a copy reads is looked at when it is replayed.
            source[:] = numbers(start)
            ok(gpu.cuda.cuGraphLaunch(executable, stream))
            ok(gpu.cuda.cuStreamSynchronize(stream))
            assert np.array_equal(gpu.read(pointer), np.where(np.arange(16) < 4, 0, numbers(start)))
        assert gpu.software.count("graph_launches") == launches + 2
        ok(gpu.cuda.cuGraphExecDestroy(executable))

    def test_nodes(self, gpu: RawGpu) -> None:
        stream, pointer = gpu.stream(), gpu.alloc()
        begin(gpu, stream)
        ok(gpu.cuda.cuMemsetD8Async(pointer, 0, BYTES, stream))
        ok(gpu.cuda.cuMemcpyDtoDAsync(pointer, pointer + 32, 32, stream))
        graph = ok(gpu.cuda.cuStreamEndCapture(stream))
        nodes, count = ok(gpu.cuda.cuGraphGetNodes(graph, 2))
        assert count == 2
        kinds = [ok(gpu.cuda.cuGraphNodeGetType(node)).name for node in nodes]
        assert kinds == ["CU_GRAPH_NODE_TYPE_MEMSET", "CU_GRAPH_NODE_TYPE_MEMCPY"]
        params = ok(gpu.cuda.cuGraphMemcpyNodeGetParams(nodes[1]))
        assert (int(params.dstDevice), int(params.srcDevice), params.WidthInBytes) == (pointer, pointer + 32, 32)
        ok(gpu.cuda.cuGraphDestroy(graph))

    def test_an_empty_capture_is_a_graph_without_nodes(self, gpu: RawGpu) -> None:
        stream = gpu.stream()
        begin(gpu, stream)
        graph = ok(gpu.cuda.cuStreamEndCapture(stream))
        assert ok(gpu.cuda.cuGraphGetNodes(graph))[1] == 0
        ok(gpu.cuda.cuGraphDestroy(graph))

    def test_forks_join_and_run_in_any_order_that_their_events_allow(self, gpu: RawGpu) -> None:
        first, second, log = gpu.stream(), gpu.stream(), Log(gpu)
        forked, joined = gpu.event(), gpu.event()
        begin(gpu, first)
        log.issue(first, 1)
        ok(gpu.cuda.cuEventRecord(forked, first))
        ok(gpu.cuda.cuStreamWaitEvent(second, forked, 0))
        log.issue(first, 2)
        log.issue(second, 3)
        ok(gpu.cuda.cuEventRecord(joined, second))
        ok(gpu.cuda.cuStreamWaitEvent(first, joined, 0))
        log.issue(first, 4)
        executable = end(gpu, first)
        ok(gpu.cuda.cuGraphLaunch(executable, first))
        ok(gpu.cuda.cuStreamSynchronize(first))
        # Nothing orders 2 and 3: who relies on the order in which they were issued finds the other one here.
        assert log.seen == [1, 3, 2, 4]
        # The second stream has left the capture.
        ok(gpu.cuda.cuStreamSynchronize(second))
        ok(gpu.cuda.cuGraphExecDestroy(executable))

    def test_a_graph_does_not_overlap_with_itself(self, gpu: RawGpu) -> None:
        slow, quick, log = gpu.stream(), gpu.stream(), Log(gpu)
        begin(gpu, slow)
        log.issue(slow, 1)
        executable = end(gpu, slow)
        with gpu.software.held(slow):
            ok(gpu.cuda.cuGraphLaunch(executable, slow))
            ok(gpu.cuda.cuGraphLaunch(executable, quick))
            # Destroyed while it is queued: the launches go on.
            ok(gpu.cuda.cuGraphExecDestroy(executable))
            assert code(gpu.cuda.cuStreamQuery(quick)) == "CUDA_ERROR_NOT_READY"
        ok(gpu.cuda.cuStreamSynchronize(quick))
        assert log.seen == [1, 1]
        assert code(gpu.cuda.cuGraphLaunch(executable, slow)) == "CUDA_ERROR_INVALID_VALUE"

    def test_memory_of_a_graph_must_stay(self, gpu: RawGpu) -> None:
        stream, pointer = gpu.stream(), ok(gpu.cuda.cuMemAlloc(BYTES))
        begin(gpu, stream)
        ok(gpu.cuda.cuMemsetD8Async(pointer, 0, BYTES, stream))
        executable = end(gpu, stream)
        ok(gpu.cuda.cuMemFree(pointer))
        ok(gpu.cuda.cuGraphLaunch(executable, stream))
        assert code(gpu.cuda.cuStreamSynchronize(stream)) == "CUDA_ERROR_ILLEGAL_ADDRESS"
        assert gpu.software.reports() == ["a memset used memory that had been freed"]
        ok(gpu.cuda.cuGraphExecDestroy(executable))


class TestWhatACaptureForbids:
    @pytest.mark.parametrize(
        "call",
        [
            pytest.param(lambda g, _: g.cuda.cuMemAlloc(4), id="allocating"),
            pytest.param(lambda g, _: g.cuda.cuMemHostAlloc(4, 0), id="allocating pinned"),
            pytest.param(lambda g, _: g.cuda.cuMemsetD8(g.first, 0, 4), id="a synchronous memset"),
            pytest.param(lambda g, _: g.cuda.cuMemcpyHtoD(g.first, numbers().ctypes.data, 4), id="a synchronous copy"),
            pytest.param(lambda g, _: g.cuda.cuCtxSynchronize(), id="waiting for everything"),
            pytest.param(lambda g, stream: g.cuda.cuStreamSynchronize(stream), id="waiting for the stream"),
            pytest.param(lambda g, stream: g.cuda.cuStreamQuery(stream), id="asking for the stream"),
            pytest.param(lambda g, _: g.cuda.cuEventQuery(g.recorded), id="asking for an event"),
        ],
    )
    def test_unsafe_calls_spoil_it(self, gpu: Any, call: Callable[[Any, int], Any]) -> None:
        stream, gpu.first, gpu.recorded = gpu.stream(), gpu.alloc(), gpu.event()
        ok(gpu.cuda.cuEventRecord(gpu.recorded, gpu.stream()))
        begin(gpu, stream)
        assert code(call(gpu, stream)) == "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
        spoilt = gpu.cuda.cuMemsetD8Async(gpu.first, 0, 4, stream)
        assert code(spoilt) == "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"
        assert code(gpu.cuda.cuStreamEndCapture(stream)) == "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"
        # The stream is as before.
        ok(gpu.cuda.cuMemsetD8Async(gpu.first, 0, 4, stream))
        ok(gpu.cuda.cuStreamSynchronize(stream))

    @pytest.mark.parametrize(
        ("mode", "own", "others", "others_relaxed"),
        [(GLOBAL, True, True, False), (THREAD_LOCAL, True, False, False), (RELAXED, False, False, False)],
    )
    def test_whose_calls_are_unsafe(
        self, gpu: RawGpu, mode: int, own: bool, others: bool, others_relaxed: bool
    ) -> None:
        def allocate(relaxed: bool) -> bool:
            gpu.context.make_current()
            if relaxed:
                ok(gpu.cuda.cuThreadExchangeStreamCaptureMode(gpu.cuda.CUstreamCaptureMode(RELAXED)))
            result = gpu.cuda.cuMemAlloc(4)
            if code(result) == "CUDA_SUCCESS":
                ok(gpu.cuda.cuMemFree(result[1]))
                return False
            assert code(result) == "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
            return True

        stream = gpu.stream()
        for refused, work in (
            (others_relaxed, lambda: in_thread(lambda: allocate(True))),
            (others, lambda: in_thread(lambda: allocate(False))),
            (own, lambda: allocate(False)),
        ):
            begin(gpu, stream, mode)
            assert work() is refused
            result = gpu.cuda.cuStreamEndCapture(stream)
            assert code(result) == ("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED" if refused else "CUDA_SUCCESS")
            if not refused:
                ok(gpu.cuda.cuGraphDestroy(result[1]))

    def test_an_event_of_a_capture_cannot_be_asked(self, gpu: RawGpu) -> None:
        stream, event = gpu.stream(), gpu.event()
        begin(gpu, stream, RELAXED)
        ok(gpu.cuda.cuEventRecord(event, stream))
        assert code(gpu.cuda.cuEventQuery(event)) == "CUDA_ERROR_CAPTURED_EVENT"
        assert code(gpu.cuda.cuStreamEndCapture(stream)) == "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"
        assert code(gpu.cuda.cuEventSynchronize(event)) == "CUDA_ERROR_CAPTURED_EVENT"
        ok(gpu.cuda.cuEventRecord(event, stream))
        ok(gpu.cuda.cuEventSynchronize(event))

    def test_work_outside_cannot_be_waited_for(self, gpu: RawGpu) -> None:
        stream, event = gpu.stream(), gpu.event()
        ok(gpu.cuda.cuEventRecord(event, gpu.stream()))
        begin(gpu, stream)
        assert code(gpu.cuda.cuStreamWaitEvent(stream, event, 0)) == "CUDA_ERROR_STREAM_CAPTURE_ISOLATION"
        assert code(gpu.cuda.cuStreamEndCapture(stream)) == "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"

    def test_a_fork_must_be_joined(self, gpu: RawGpu) -> None:
        first, second, event, pointer = gpu.stream(), gpu.stream(), gpu.event(), gpu.alloc()
        begin(gpu, first)
        ok(gpu.cuda.cuEventRecord(event, first))
        ok(gpu.cuda.cuStreamWaitEvent(second, event, 0))
        ok(gpu.cuda.cuMemsetD8Async(pointer, 0, 4, second))
        assert code(gpu.cuda.cuStreamEndCapture(first)) == "CUDA_ERROR_STREAM_CAPTURE_UNJOINED"
        for stream in (first, second):
            ok(gpu.cuda.cuStreamSynchronize(stream))

    def test_it_ends_on_the_stream_it_began_on(self, gpu: RawGpu) -> None:
        first, second, event = gpu.stream(), gpu.stream(), gpu.event()
        begin(gpu, first)
        ok(gpu.cuda.cuEventRecord(event, first))
        ok(gpu.cuda.cuStreamWaitEvent(second, event, 0))
        assert code(gpu.cuda.cuStreamEndCapture(second)) == "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED"
        assert code(gpu.cuda.cuStreamEndCapture(first)) == "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"

    def test_it_ends_on_the_thread_it_began_on(self, gpu: RawGpu) -> None:
        def end_here() -> str:
            gpu.context.make_current()
            return code(gpu.cuda.cuStreamEndCapture(stream))

        stream = gpu.stream()
        begin(gpu, stream)
        assert in_thread(end_here) == "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD"
        ok(gpu.cuda.cuGraphDestroy(ok(gpu.cuda.cuStreamEndCapture(stream))))

    def test_two_captures_do_not_merge(self, gpu: RawGpu) -> None:
        first, second, event = gpu.stream(), gpu.stream(), gpu.event()
        begin(gpu, first)
        begin(gpu, second)
        ok(gpu.cuda.cuEventRecord(event, first))
        assert code(gpu.cuda.cuStreamWaitEvent(second, event, 0)) == "CUDA_ERROR_STREAM_CAPTURE_MERGE"
        for stream in (first, second):
            assert code(gpu.cuda.cuStreamEndCapture(stream)) == "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"

    @pytest.mark.parametrize(("flags", "said"), [(0, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT"), (1, "CUDA_SUCCESS")])
    def test_the_default_stream_beside_a_capture(self, gpu: RawGpu, flags: int, said: str) -> None:
        stream, pointer = gpu.stream(flags), gpu.alloc()
        begin(gpu, stream)
        assert code(gpu.cuda.cuMemsetD8Async(pointer, 0, 4, 0)) == said
        graph = gpu.cuda.cuStreamEndCapture(stream)
        if flags:
            ok(gpu.cuda.cuGraphDestroy(ok(graph)))
        assert code(gpu.cuda.cuStreamBeginCapture(0, gpu.cuda.CUstreamCaptureMode(RELAXED))) == (
            "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
        )

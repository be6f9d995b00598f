"""The software driver itself: memory, streams, events and devices as CUDA has them; graphs and kernels are beside."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from software_cuda.raw import BYTES, COUNT, code, numbers, ok, raw_gpu

from warpcache.engine.cuda.device import CudaDevice
from warpcache.engine.errors import ClosedError, DeviceError, InputError
from warpcache.engine.spec import TensorSpec
from warpcache.kernels import driver
from warpcache.kernels.array import DeviceArray
from warpcache.kernels.driver import Context

gpu = raw_gpu


class TestMemory:
    def test_fresh_memory_is_not_zero(self, gpu: Any) -> None:
        assert np.isnan(gpu.read(gpu.alloc())).all()

    def test_counts_what_is_there(self, gpu: Any) -> None:
        before = gpu.software.live()
        made = gpu.software.count("allocations")
        first = ok(gpu.cuda.cuMemAlloc(1000))
        second = ok(gpu.cuda.cuMemHostAlloc(24, 0))
        assert gpu.software.count("device_bytes") - before["device_bytes"] == 1000
        assert gpu.software.count("pinned_bytes") - before["pinned_bytes"] == 24
        assert gpu.software.count("allocations") - made == 2
        ok(gpu.cuda.cuMemFree(first))
        ok(gpu.cuda.cuMemFreeHost(second))
        assert gpu.software.live() == before

    def test_memory_ends(self, gpu: Any) -> None:
        gpu.software.configure(memory=gpu.software.count("device_bytes") + 1000)
        assert ok(gpu.cuda.cuMemGetInfo())[0] == 1000
        assert code(gpu.cuda.cuMemAlloc(1001)) == "CUDA_ERROR_OUT_OF_MEMORY"
        gpu.alloc(1000)
        assert code(gpu.cuda.cuMemAlloc(1)) == "CUDA_ERROR_OUT_OF_MEMORY"

    def test_copies_there_and_back(self, gpu: Any) -> None:
        there, elsewhere = gpu.alloc(), gpu.alloc()
        ok(gpu.cuda.cuMemcpyHtoD(there, numbers().ctypes.data, BYTES))
        ok(gpu.cuda.cuMemcpyDtoD(elsewhere + 8, there, BYTES - 8))
        assert np.array_equal(gpu.read(elsewhere)[2:], numbers()[:-2])

    @pytest.mark.parametrize("rows", [1, 5])
    def test_copies_rectangles(self, gpu: Any, rows: int) -> None:
        host = np.arange(rows * 7, dtype=np.float32).reshape(rows, 7)
        pointer = gpu.alloc(rows * 32)
        request = gpu.cuda.CUDA_MEMCPY2D()
        request.srcMemoryType = gpu.cuda.CUmemorytype.CU_MEMORYTYPE_HOST
        request.dstMemoryType = gpu.cuda.CUmemorytype.CU_MEMORYTYPE_DEVICE
        request.srcHost, request.srcPitch, request.srcXInBytes = host.ctypes.data, 28, 4
        request.dstDevice, request.dstPitch = pointer, 32
        request.WidthInBytes, request.Height = 20, rows
        stream = gpu.stream()
        ok(gpu.cuda.cuMemcpy2DAsync(request, stream))
        ok(gpu.cuda.cuStreamSynchronize(stream))
        assert np.array_equal(gpu.read(pointer, rows * 8).reshape(rows, 8)[:, :5], host[:, 1:6])

    @pytest.mark.parametrize(
        "call",
        [
            pytest.param(lambda g: g.cuda.cuMemsetD8(numbers().ctypes.data, 0, 4), id="host as device"),
            pytest.param(lambda g: g.cuda.cuMemcpyHtoD(g.alloc(), g.alloc(), 4), id="device as host"),
            pytest.param(lambda g: g.cuda.cuMemcpyHtoD(g.alloc() + 1, numbers().ctypes.data, BYTES), id="past the end"),
            pytest.param(lambda g: g.cuda.cuMemcpyHtoD(0, numbers().ctypes.data, 4), id="null"),
            pytest.param(lambda g: g.cuda.cuMemcpyDtoH(numbers().ctypes.data, g.alloc() - 8, 4), id="before the start"),
            pytest.param(lambda g: g.cuda.cuMemsetD8(g.alloc(), 0, BYTES + 1), id="memset past the end"),
            pytest.param(lambda g: g.cuda.cuMemsetD32(g.alloc() + 2, 0, 1), id="memset not aligned"),
            pytest.param(lambda g: g.cuda.cuMemFree(g.alloc() + 4), id="free in the middle"),
            pytest.param(lambda g: g.cuda.cuMemFree(g.pinned(numbers()).ctypes.data), id="pinned freed as device"),
            pytest.param(lambda g: g.cuda.cuMemAlloc(0), id="nothing"),
        ],
    )  # fmt: skip
    def test_refuses_addresses_that_are_not_there(self, gpu: Any, call: Callable[[Any], Any]) -> None:
        assert code(call(gpu)) == "CUDA_ERROR_INVALID_VALUE"
        ok(gpu.cuda.cuCtxSynchronize())  # and the context goes on

    def test_freed_memory_is_found_in_a_call(self, gpu: Any) -> None:
        pointer = ok(gpu.cuda.cuMemAlloc(BYTES))
        ok(gpu.cuda.cuMemFree(pointer))
        assert code(gpu.cuda.cuMemcpyHtoD(pointer, numbers().ctypes.data, 4)) == "CUDA_ERROR_INVALID_VALUE"
        assert code(gpu.cuda.cuMemFree(pointer)) == "CUDA_ERROR_INVALID_VALUE"

    def test_memory_freed_under_queued_work_loses_the_context(self, gpu: Any) -> None:
        stream, pointer = gpu.stream(), ok(gpu.cuda.cuMemAlloc(BYTES))
        with gpu.software.held(stream):
            ok(gpu.cuda.cuMemsetD8Async(pointer, 0, BYTES, stream))
            ok(gpu.cuda.cuMemFree(pointer))
        assert code(gpu.cuda.cuStreamSynchronize(stream)) == "CUDA_ERROR_ILLEGAL_ADDRESS"
        assert code(gpu.cuda.cuMemAlloc(4)) == "CUDA_ERROR_ILLEGAL_ADDRESS"
        assert gpu.software.reports() == ["a memset used memory that had been freed"]

    def test_writing_past_the_end_is_found_when_the_block_is_freed(self, gpu: Any) -> None:
        pointer = ok(gpu.cuda.cuMemAlloc(10))
        ctypes.memset(int(pointer) + 10, 0, 1)
        ok(gpu.cuda.cuMemFree(pointer))
        assert gpu.software.reports() == ["a device block of 10 bytes was written past its end"]

    def test_what_is_said_of_pointers(self, gpu: Any) -> None:
        which = gpu.cuda.CUpointer_attribute
        device, pinned = gpu.alloc(), gpu.pinned(numbers()).ctypes.data
        for pointer, kind in ((device, 2), (pinned, 1)):
            assert int(ok(gpu.cuda.cuPointerGetAttribute(which.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, pointer + 4))) == kind
            assert ok(gpu.cuda.cuPointerGetAttribute(which.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, pointer)) == 0
        assert int(ok(gpu.cuda.cuMemGetAddressRange(device + 5))[0]) == device
        unknown = gpu.cuda.cuPointerGetAttribute(which.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, numbers().ctypes.data)
        assert code(unknown) == "CUDA_ERROR_INVALID_VALUE"


class TestHostAndDevice:
    """Which calls wait, and when memory is read: CUDA's "API synchronization behavior"."""

    def test_pinned_memory_is_read_when_the_stream_gets_there(self, gpu: Any) -> None:
        stream, pointer, source = gpu.stream(), gpu.alloc(), gpu.pinned(numbers())
        with gpu.software.held(stream):
            ok(gpu.cuda.cuMemcpyHtoDAsync(pointer, source.ctypes.data, BYTES, stream))
            source[:] = -1
        ok(gpu.cuda.cuStreamSynchronize(stream))
        assert np.array_equal(gpu.read(pointer), np.full(COUNT, -1.0))

    def test_pageable_memory_is_read_at_once(self, gpu: Any) -> None:
        stream, pointer, source = gpu.stream(), gpu.alloc(), numbers()
        with gpu.software.held(stream):
            ok(gpu.cuda.cuMemcpyHtoDAsync(pointer, source.ctypes.data, BYTES, stream))
            source[:] = -1
        ok(gpu.cuda.cuStreamSynchronize(stream))
        assert np.array_equal(gpu.read(pointer), numbers())

    def test_copies_to_pinned_memory_do_not_wait_and_to_pageable_memory_they_do(self, gpu: Any) -> None:
        stream, pointer, target = gpu.stream(), gpu.alloc(), gpu.pinned(numbers())
        pageable = numbers()
        # With no patience at all, a call that waits says so at once.
        gpu.software.configure(patience_s=0)
        with gpu.software.held(stream):
            assert code(gpu.cuda.cuMemcpyDtoHAsync(target.ctypes.data, pointer, BYTES, stream)) == "CUDA_SUCCESS"
            waits = gpu.cuda.cuMemcpyDtoHAsync(pageable.ctypes.data, pointer, BYTES, stream)
            assert code(waits) == "CUDA_ERROR_LAUNCH_TIMEOUT"
            assert gpu.software.pending(stream) == 2
        assert len(gpu.software.reports()) == 1
        gpu.software.configure(patience_s=60)
        ok(gpu.cuda.cuStreamSynchronize(stream))

    def test_a_memset_does_not_wait_nor_do_nonblocking_streams_for_it(self, gpu: Any) -> None:
        pointer, stream = gpu.alloc(), gpu.stream()
        with gpu.software.held(0):
            ok(gpu.cuda.cuMemsetD8(pointer, 0, BYTES))
            ok(gpu.cuda.cuMemcpyHtoDAsync(pointer, numbers().ctypes.data, BYTES, stream))
            ok(gpu.cuda.cuStreamSynchronize(stream))
        # The memset came last: what the stream had written is gone.
        assert np.array_equal(gpu.read(pointer), np.zeros(COUNT))

    def test_blocking_streams_and_the_default_stream_wait_for_each_other(self, gpu: Any) -> None:
        pointer, stream = gpu.alloc(), gpu.stream(flags=0)
        with gpu.software.held(0):
            ok(gpu.cuda.cuMemsetD8(pointer, 0, BYTES))
            ok(gpu.cuda.cuMemcpyHtoDAsync(pointer, numbers().ctypes.data, BYTES, stream))
            assert code(gpu.cuda.cuStreamQuery(stream)) == "CUDA_ERROR_NOT_READY"
        assert np.array_equal(gpu.read(pointer), numbers())

    def test_a_synchronous_copy_from_pageable_memory_may_end_later(self, gpu: Any) -> None:
        gpu.software.configure(lazy=1)
        pointer, stream, target = gpu.alloc(), gpu.stream(), gpu.pinned(numbers(100))
        ok(gpu.cuda.cuMemcpyHtoD(pointer, numbers().ctypes.data, BYTES))
        ok(gpu.cuda.cuMemcpyDtoHAsync(target.ctypes.data, pointer, BYTES, stream))
        ok(gpu.cuda.cuStreamSynchronize(stream))
        # It has been staged, and nobody has waited for the default stream.
        assert np.isnan(target).all()
        ok(gpu.cuda.cuStreamSynchronize(0))
        assert np.array_equal(gpu.read(pointer), numbers())

    def test_lazy_work_runs_only_for_who_waits(self, gpu: Any) -> None:
        gpu.software.configure(lazy=1)
        first, second, other = gpu.stream(), gpu.stream(), gpu.stream()
        event, pointer = gpu.event(), gpu.alloc()
        ok(gpu.cuda.cuMemsetD32Async(pointer, 0, 4, first))
        ok(gpu.cuda.cuEventRecord(event, first))
        ok(gpu.cuda.cuMemsetD32Async(pointer, 0, 8, first))
        ok(gpu.cuda.cuStreamWaitEvent(second, event, 0))
        ok(gpu.cuda.cuStreamSynchronize(other))
        assert gpu.software.pending(first) == 3
        ok(gpu.cuda.cuStreamSynchronize(second))
        # What the event stands for has run, what came after it has not.
        assert gpu.software.pending(first) == 1
        ok(gpu.cuda.cuCtxSynchronize())
        assert np.array_equal(gpu.read(pointer)[:8], np.zeros(8))


class TestStreamsAndEvents:
    def test_the_host_goes_on_and_a_stream_keeps_its_order(self, gpu: Any) -> None:
        stream, pointer = gpu.stream(), gpu.alloc()
        with gpu.software.held(stream):
            for value in (1, 2, 3):
                ok(gpu.cuda.cuMemsetD8Async(pointer, value, BYTES, stream))
            assert code(gpu.cuda.cuStreamQuery(stream)) == "CUDA_ERROR_NOT_READY"
            assert gpu.software.pending(stream) == 3
        ok(gpu.cuda.cuStreamSynchronize(stream))
        assert np.array_equal(gpu.read(pointer).view(np.uint8), np.full(BYTES, 3))
        assert code(gpu.cuda.cuStreamQuery(stream)) == "CUDA_SUCCESS"

    def test_a_stream_waits_for_an_event_of_another(self, gpu: Any) -> None:
        producer, consumer, event = gpu.stream(), gpu.stream(), gpu.event()
        source, target = gpu.alloc(), gpu.alloc()
        with gpu.software.held(producer):
            ok(gpu.cuda.cuMemcpyHtoDAsync(source, numbers().ctypes.data, BYTES, producer))
            ok(gpu.cuda.cuEventRecord(event, producer))
            ok(gpu.cuda.cuStreamWaitEvent(consumer, event, 0))
            ok(gpu.cuda.cuMemcpyDtoDAsync(target, source, BYTES, consumer))
            assert code(gpu.cuda.cuEventQuery(event)) == "CUDA_ERROR_NOT_READY"
            assert code(gpu.cuda.cuStreamQuery(consumer)) == "CUDA_ERROR_NOT_READY"
        ok(gpu.cuda.cuStreamSynchronize(consumer))
        assert code(gpu.cuda.cuEventQuery(event)) == "CUDA_SUCCESS"
        assert np.array_equal(gpu.read(target), numbers())

    def test_waiting_means_the_record_of_that_moment(self, gpu: Any) -> None:
        slow, quick, consumer, event = gpu.stream(), gpu.stream(), gpu.stream(), gpu.event()
        ok(gpu.cuda.cuEventSynchronize(event))
        with gpu.software.held(slow):
            ok(gpu.cuda.cuStreamWaitEvent(consumer, event, 0))  # never recorded: nothing to wait for
            ok(gpu.cuda.cuStreamSynchronize(consumer))
            ok(gpu.cuda.cuEventRecord(event, slow))
            ok(gpu.cuda.cuStreamWaitEvent(consumer, event, 0))
            ok(gpu.cuda.cuEventRecord(event, quick))
            ok(gpu.cuda.cuEventSynchronize(event))  # the event means the quick stream now
            assert code(gpu.cuda.cuStreamQuery(consumer)) == "CUDA_ERROR_NOT_READY"
        ok(gpu.cuda.cuStreamSynchronize(consumer))

    def test_time_between_events(self, gpu: Any) -> None:
        stream, start, end = gpu.stream(), gpu.event(flags=0), gpu.event(flags=0)
        untimed = gpu.event()
        assert code(gpu.cuda.cuEventElapsedTime(start, end)) == "CUDA_ERROR_INVALID_HANDLE"
        ok(gpu.cuda.cuEventRecord(start, stream))
        ok(gpu.cuda.cuEventRecord(untimed, stream))
        with gpu.software.held(stream):
            ok(gpu.cuda.cuEventRecord(end, stream))
            assert code(gpu.cuda.cuEventElapsedTime(start, end)) == "CUDA_ERROR_NOT_READY"
        ok(gpu.cuda.cuEventSynchronize(end))
        assert ok(gpu.cuda.cuEventElapsedTime(start, end)) > 0
        assert code(gpu.cuda.cuEventElapsedTime(untimed, end)) == "CUDA_ERROR_INVALID_HANDLE"

    def test_a_destroyed_stream_finishes_its_work_and_takes_no_more(self, gpu: Any) -> None:
        stream, pointer, event = ok(gpu.cuda.cuStreamCreate(1)), gpu.alloc(), gpu.event()
        gpu.software.hold(int(stream))
        ok(gpu.cuda.cuMemsetD8Async(pointer, 0, BYTES, stream))
        ok(gpu.cuda.cuEventRecord(event, stream))
        ok(gpu.cuda.cuStreamDestroy(stream))
        ok(gpu.cuda.cuEventSynchronize(event))
        assert np.array_equal(gpu.read(pointer), np.zeros(COUNT))
        assert code(gpu.cuda.cuStreamSynchronize(stream)) == "CUDA_ERROR_INVALID_HANDLE"
        assert code(gpu.cuda.cuStreamDestroy(stream)) == "CUDA_ERROR_INVALID_HANDLE"

    def test_host_functions_run_in_order_and_may_not_call_cuda(self, gpu: Any) -> None:
        stream, seen = gpu.stream(), []

        @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        def function(number: int | None) -> None:
            seen.append((number, threading.current_thread(), code(gpu.cuda.cuMemGetInfo())))

        address = gpu.cuda.CUhostFn(ctypes.cast(function, ctypes.c_void_p).value)
        with gpu.software.held(stream):
            for number in (1, 2):
                ok(gpu.cuda.cuLaunchHostFunc(stream, address, number))
            assert seen == []
        ok(gpu.cuda.cuStreamSynchronize(stream))
        assert [(number, said) for number, _, said in seen] == [(n, "CUDA_ERROR_NOT_PERMITTED") for n in (1, 2)]
        assert threading.current_thread() not in [thread for _, thread, _ in seen]

    def test_priorities_are_clamped(self, gpu: Any) -> None:
        least, greatest = ok(gpu.cuda.cuCtxGetStreamPriorityRange())
        assert greatest < least == 0
        for asked, got in ((greatest, greatest), (greatest - 7, greatest), (3, 0)):
            stream = ok(gpu.cuda.cuStreamCreateWithPriority(1, asked))
            assert ok(gpu.cuda.cuStreamGetPriority(stream)) == got
            ok(gpu.cuda.cuStreamDestroy(stream))

    def test_a_thread_has_a_context_of_its_own(self, gpu: Any) -> None:
        said: list[str] = []
        thread = threading.Thread(target=lambda: said.append(code(gpu.cuda.cuMemGetInfo())))
        thread.start()
        thread.join()
        assert said == ["CUDA_ERROR_INVALID_CONTEXT"]


class TestDevices:
    def test_peer_copies_and_streams_of_other_devices(self, gpu: Any) -> None:
        there = Context(1)
        here_pointer = gpu.upload(numbers())
        event = gpu.event()
        there.make_current()
        pointer, stream = ok(gpu.cuda.cuMemAlloc(BYTES)), ok(gpu.cuda.cuStreamCreate(1))
        contexts = [ok(gpu.cuda.cuDevicePrimaryCtxRetain(ordinal)) for ordinal in (0, 1)]
        swapped = gpu.cuda.cuMemcpyPeerAsync(pointer, contexts[0], here_pointer, contexts[1], BYTES, stream)
        assert code(swapped) == "CUDA_ERROR_INVALID_VALUE"
        ok(gpu.cuda.cuMemcpyPeerAsync(pointer, contexts[1], here_pointer, contexts[0], BYTES, stream))
        assert code(gpu.cuda.cuEventRecord(event, stream)) == "CUDA_ERROR_INVALID_HANDLE"
        ok(gpu.cuda.cuStreamSynchronize(stream))
        assert np.array_equal(gpu.read(int(pointer)), numbers())
        ok(gpu.cuda.cuStreamDestroy(stream))
        ok(gpu.cuda.cuMemFree(pointer))
        for ordinal in (0, 1):
            ok(gpu.cuda.cuDevicePrimaryCtxRelease(ordinal))
        gpu.context.make_current()
        there.close()

    def test_peer_access(self, gpu: Any) -> None:
        # A device that no other test has used: contexts are shared by the whole process.
        gpu.software.configure(devices=3, peer_access=0)
        peer = ok(gpu.cuda.cuDevicePrimaryCtxRetain(2))
        assert ok(gpu.cuda.cuDeviceCanAccessPeer(0, 2)) == 0
        assert code(gpu.cuda.cuCtxEnablePeerAccess(peer, 0)) == "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED"
        gpu.software.configure(devices=3, peer_access=1)
        assert ok(gpu.cuda.cuDeviceCanAccessPeer(0, 2)) == 1
        ok(gpu.cuda.cuCtxEnablePeerAccess(peer, 0))
        assert code(gpu.cuda.cuCtxEnablePeerAccess(peer, 0)) == "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED"
        ok(gpu.cuda.cuCtxDisablePeerAccess(peer))
        ok(gpu.cuda.cuDevicePrimaryCtxRelease(2))

    def test_a_context_ends_with_its_last_user_and_takes_its_memory(self, software_cuda: Any) -> None:
        software_cuda.configure(devices=4)
        cuda = driver.load()
        context = Context(3)
        context.make_current()
        pointer = ok(cuda.cuMemAlloc(BYTES))
        context.close()
        assert code(cuda.cuMemFree(pointer)) == "CUDA_ERROR_CONTEXT_IS_DESTROYED"

    @pytest.mark.parametrize(
        ("machine", "message"),
        [
            ({"devices": 0}, "starting the CUDA driver failed: the driver sees no GPU"),
            ({"init_error": 803}, "starting the CUDA driver failed: the driver's user-mode library and kernel module"),
            ({"driver_version": 11080}, r"the NVIDIA driver speaks CUDA 11\.8, older than 12\.0"),
        ],
    )
    def test_machines_that_do_not_serve(self, software_cuda: Any, machine: dict[str, int], message: str) -> None:
        software_cuda.configure(**machine)
        with pytest.raises(DeviceError, match=f"^{message}"):
            driver.load()
        software_cuda.reset()
        assert driver.device_count() == 2

    @pytest.mark.usefixtures("no_cuda_driver")
    def test_a_machine_without_a_driver(self) -> None:
        with pytest.raises(DeviceError, match=r"^no NVIDIA driver was found"):
            driver.load()

    def test_every_error_here_has_a_name_and_a_meaning(self, gpu: Any) -> None:
        for name in (
            "CUDA_ERROR_OUT_OF_MEMORY",
            "CUDA_ERROR_STREAM_CAPTURE_UNJOINED",
            "CUDA_ERROR_CONTEXT_IS_DESTROYED",
        ):
            number = getattr(gpu.cuda.CUresult, name)
            assert ok(gpu.cuda.cuGetErrorName(number)).decode() == name
            assert ok(gpu.cuda.cuGetErrorString(number))


class Foreign:
    """Somebody else's array: the interface and nothing of ours."""

    def __init__(self, array: DeviceArray, stream: int | None) -> None:
        self._array = array
        self._stream = stream

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {**self._array.__cuda_array_interface__, "stream": self._stream}


class TestCudaDevice:
    """engine/cuda/device.py in full, both as work runs at once and as late as it may."""

    @pytest.mark.parametrize("lazy", [0, 1])
    def test_from_open_to_close(self, software_cuda: Any, lazy: int) -> None:
        software_cuda.configure(lazy=lazy)
        gc.collect()
        before, references = software_cuda.live(), software_cuda.count("context_references")
        self._use_a_device()
        gc.collect()
        assert software_cuda.live() == before
        assert software_cuda.count("context_references") == references

    def _use_a_device(self) -> None:
        spec = TensorSpec("a", "float32", (4, 4))
        image = numbers().reshape(4, 4)
        cuda = driver.load()
        with CudaDevice(0) as device:
            assert device.architecture == "sm_90"
            stream, worker = device.stream("consumer"), device.worker_stream("producer")
            array = device.upload(image)
            assert np.array_equal(device.download(array), image)
            zeroed, pinned = device.allocate(spec), device.allocate_pinned(spec)
            assert np.array_equal(device.download(zeroed), np.zeros((4, 4)))
            produced = worker.submit(
                lambda: ok(cuda.cuMemcpyDtoDAsync(zeroed.pointer, array.pointer, BYTES, worker.cuda.stream))
            )
            assert produced.wait()
            written = device.event()
            written.record(worker.cuda)
            stream.wait_for(written)
            stream.call(lambda: ok(cuda.cuMemcpyDtoHAsync(pinned.ctypes.data, zeroed.pointer, BYTES, stream.stream)))
            stream.synchronize()
            assert np.array_equal(pinned, image)
        device.close()
        with pytest.raises(ClosedError, match=r"^stream 'consumer' is closed"):
            stream.submit(lambda: None)

    def test_no_room(self, software_cuda: Any) -> None:
        software_cuda.configure(memory=2**20)
        with CudaDevice(1) as device, pytest.raises(DeviceError, match=r"^cuda:1 has no room for the cache: 2\.0 MiB"):
            device.memory(2**21, "the cache")

    def test_borrowing_orders_our_stream_after_the_owner(self, software_cuda: Any) -> None:
        with CudaDevice(0) as device:
            owners, ours = device.stream("owner"), device.stream("ours")
            array = device.upload(numbers())
            assert DeviceArray.borrow(array, device=0, stream=ours.handle) is array
            with software_cuda.held(owners):
                ok(driver.load().cuMemsetD8Async(array.pointer, 0, BYTES, owners.stream))
                borrowed = DeviceArray.borrow(Foreign(array, owners.handle), device=0, stream=ours.handle)
                assert software_cuda.pending(ours) == 1
            ours.synchronize()
            assert software_cuda.pending(owners) == 0
            assert (borrowed.pointer, borrowed.shape, borrowed.dtype) == (array.pointer, (COUNT,), np.dtype("float32"))
            with pytest.raises(InputError, match=r"^array is on cuda:0, expected cuda:1"):
                DeviceArray.borrow(Foreign(array, None), device=1, stream=ours.handle)

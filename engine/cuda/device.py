"""One GPU as a device: memory that is taken once, streams by priority, and events between them.

A `CudaStream` is issued to from the calling thread, which never waits; a `CudaWorkerStream` has a host thread of its
own that issues its work and sleeps until the GPU has done it, which is how somebody hears of a producer's end.
"""

from __future__ import annotations

import logging
import math
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from ...kernels.array import DeviceArray
from ...kernels.driver import Context, check, load
from ..device.stream import CpuStream, Event
from ..errors import ClosedError, DeviceError
from ..spec import Array, TensorSpec
from .memory import DeviceMemory, PinnedMemory, _quietly

__all__ = ["CudaDevice", "CudaEvent", "CudaStream", "CudaWorkerStream"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class CudaEvent:
    """A point in a CUDA stream's work, recorded again and again (it behaves as `Event` where somebody waits for it).

    Args:
        device: The GPU.
        blocking: Whether a host thread that waits sleeps, and leaves its core to others, rather than spins.
        timing: Whether it takes the time (`elapsed_ms`), which costs a little on the device.
    """

    def __init__(self, device: CudaDevice, *, blocking: bool = False, timing: bool = False) -> None:
        self._cuda = load()
        self._context = device.context
        flags = 0
        if blocking:
            flags |= int(self._cuda.CUevent_flags.CU_EVENT_BLOCKING_SYNC)
        if not timing:
            flags |= int(self._cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING)
        device.context.make_current()
        self.handle = check(self._cuda.cuEventCreate(flags), "creating an event")
        self._release = weakref.finalize(self, _destroy_event, device.context, self.handle)
        self._release.atexit = False

    @property
    def done(self) -> bool:
        """Whether the work before the point has ended; True before the first `record`."""
        (code,) = self._cuda.cuEventQuery(self.handle)
        return bool(code != self._cuda.CUresult.CUDA_ERROR_NOT_READY)

    @property
    def error(self) -> BaseException | None:
        """What the GPU reports of the work before the point."""
        (code,) = self._cuda.cuEventQuery(self.handle)
        if code in (self._cuda.CUresult.CUDA_SUCCESS, self._cuda.CUresult.CUDA_ERROR_NOT_READY):
            return None
        try:
            check((code,), "the work on the GPU")
        except DeviceError as exc:
            return exc
        return None

    def record(self, stream: CudaStream) -> None:
        """Move the point to the end of what `stream` has been given so far."""
        check(self._cuda.cuEventRecord(self.handle, stream.handle), f"recording an event on {stream.name}")

    def wait(self, timeout: float | None = None) -> bool:
        """Block the calling thread until the work before the point has ended.

        Args:
            timeout: Only None: CUDA cannot wait for a limited time. For anything else ask `done`.

        Raises:
            DeviceError: If the work failed on the GPU.
        """
        if timeout is not None:
            raise DeviceError("a CUDA event cannot be waited for with a timeout; ask `done` instead")
        check(self._cuda.cuEventSynchronize(self.handle), "the work on the GPU")
        return True

    def elapsed_ms(self, since: CudaEvent) -> float:
        """Device time from `since` to this point, both done and both made with `timing`."""
        return float(check(self._cuda.cuEventElapsedTime(since.handle, self.handle), "taking the time"))

    def close(self) -> None:
        """Give the event back; safe to call twice."""
        self._release()


class CudaStream:
    """An in-order queue of work on one GPU.

    Args:
        device: The GPU.
        name: What messages call it.
        priority: ``"high"`` for what a frame waits for, ``"low"`` for what runs ahead of time.
    """

    def __init__(self, device: CudaDevice, name: str, *, priority: str) -> None:
        self._cuda = load()
        self.device = device
        self.name = name
        self._closed = False
        device.context.make_current()
        least, greatest = check(self._cuda.cuCtxGetStreamPriorityRange(), "asking for stream priorities")
        # Non-blocking: what others in the process put on the default stream must not order itself with ours.
        flags = int(self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)
        self.stream = check(
            self._cuda.cuStreamCreateWithPriority(flags, greatest if priority == "high" else least),
            f"creating stream {name!r}",
        )
        self.handle = int(self.stream)
        self._release = weakref.finalize(self, _destroy_stream, device.context, self.stream)
        self._release.atexit = False
        self._event = CudaEvent(device)

    def submit(self, work: Callable[[], Any]) -> Event:
        """Issue `work` now, on the calling thread, and return an event that is done when the GPU has done it.

        The event is the stream's own and moves on with the next `submit`: whoever needs a point of his own records a
        `CudaEvent`.
        """
        self.require_open()
        self.device.context.make_current()
        try:
            work()
            self._event.record(self)
        except Exception as exc:
            failed = Event()
            failed.set(exc)
            return failed
        return self._event  # type: ignore[return-value]  # waits like an Event; nobody adds callbacks to it

    def call(self, work: Callable[[], T]) -> T:
        """Run `work` on the calling thread with this GPU current, and return its result."""
        self.require_open()
        self.device.context.make_current()
        return work()

    def wait_for(self, event: CudaEvent) -> None:
        """Let later work on this stream wait, on the GPU, for `event`; the host does not."""
        check(self._cuda.cuStreamWaitEvent(self.stream, event.handle, 0), f"ordering stream {self.name!r}")

    def synchronize(self) -> None:
        """Block until everything submitted so far has ended.

        Raises:
            DeviceError: If work failed on the GPU.
        """
        self.device.context.make_current()
        check(self._cuda.cuStreamSynchronize(self.stream), f"waiting for stream {self.name!r}")

    def require_open(self) -> None:
        """Raise `ClosedError` where the stream is closed."""
        if self._closed:
            raise ClosedError(f"stream {self.name!r} is closed; open a new one")

    def stop(self) -> None:
        """Refuse new work and wait for what is queued; the driver's stream stays until `close`. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        try:
            self.synchronize()
        except DeviceError:
            # The work's own event has said it; a lost context must not keep the rest from being closed.
            logger.warning("stream %r ended with an error", self.name, exc_info=True)

    def close(self) -> None:
        """`stop`, and give the stream back; safe to call twice. Executors that were told of it must be closed."""
        self.stop()
        self._event.close()
        self._release()


class CudaWorkerStream:
    """A CUDA stream with a host thread: work is issued there, in order, and its event is done when the GPU is.

    Args:
        device: The GPU.
        name: Name of the stream and its thread.
    """

    def __init__(self, device: CudaDevice, name: str) -> None:
        self.name = name
        self.device = device
        self.cuda = CudaStream(device, name, priority="low")
        self._thread = CpuStream(name)
        self._end = CudaEvent(device, blocking=True)

    def submit(self, work: Callable[[], Any]) -> Event:
        """Queue `work`, which issues to `cuda`; the event returned is done when the GPU has done it."""
        return self._thread.submit(lambda: self._run(work))

    def call(self, work: Callable[[], T]) -> T:
        """Run `work` on the stream's thread, with the GPU current, and return its result."""
        return self._thread.call(lambda: self.cuda.call(work))

    def synchronize(self) -> None:
        """Block until everything submitted so far has ended."""
        self._thread.synchronize()

    def stop(self) -> None:
        """See `CudaStream.stop`; the thread ends, too."""
        self._thread.close()
        self.cuda.stop()

    def close(self) -> None:
        """`stop`, and give the stream back; safe to call twice."""
        self.stop()
        self.cuda.close()
        self._end.close()

    def _run(self, work: Callable[[], Any]) -> None:
        self.device.context.make_current()
        try:
            work()
        finally:
            # Where `work` failed half-way, what it did issue still uses its buffers.
            self._end.record(self.cuda)
            self._end.wait()


class CudaDevice:
    """One GPU: where memory comes from and streams run. Several may stand for the same GPU.

    Args:
        ordinal: The GPU's number, as CUDA_VISIBLE_DEVICES counts.

    Raises:
        DeviceError: If cuda-python, the driver or the GPU is missing, or the driver is too old.
    """

    def __init__(self, ordinal: int = 0) -> None:
        self.context = Context(ordinal)
        self.ordinal = ordinal
        self.name = f"cuda:{ordinal}"
        self._lock = threading.Lock()
        self._closed = False
        self._streams: weakref.WeakSet[CudaStream | CudaWorkerStream] = weakref.WeakSet()

    @property
    def architecture(self) -> str:
        """E.g. ``sm_89``."""
        return self.context.architecture

    def stream(self, name: str, *, priority: str = "high") -> CudaStream:
        """A stream that the calling thread issues to; the device closes it at the latest with itself."""
        self._require_open()
        stream = CudaStream(self, name, priority=priority)
        self._streams.add(stream)
        return stream

    def worker_stream(self, name: str) -> CudaWorkerStream:
        """A low-priority stream with a host thread; the device closes it at the latest with itself."""
        self._require_open()
        stream = CudaWorkerStream(self, name)
        self._streams.add(stream)
        return stream

    def event(self, *, blocking: bool = False, timing: bool = False) -> CudaEvent:
        """See `CudaEvent`."""
        self._require_open()
        return CudaEvent(self, blocking=blocking, timing=timing)

    def memory(self, size_bytes: int, what: str) -> DeviceMemory:
        """A block of the GPU's memory; `what` it is for is said if there is no room.

        Raises:
            DeviceError: If there is no room; the message says how much was asked for and how much is free.
        """
        self._require_open()
        return DeviceMemory(self.context, size_bytes, what)

    def allocate(self, spec: TensorSpec) -> DeviceArray:
        """An array of `spec` in the GPU's memory, zeroed; it owns its memory."""
        memory = self.memory(spec.size_bytes, f"{spec.name!r}")
        cuda = load()
        check(cuda.cuMemsetD8(memory.pointer, 0, max(1, spec.size_bytes)), f"zeroing {spec.name!r}")
        # It runs on the default stream, which ours do not wait for: what they write must not be zeroed afterwards.
        check(cuda.cuStreamSynchronize(0), f"zeroing {spec.name!r}")
        return DeviceArray(memory.pointer, spec.shape, spec.dtype, device=self.ordinal, owner=memory)

    def allocate_pinned(self, spec: TensorSpec) -> Array:
        """An array of `spec` in pinned host memory, zeroed; it owns its memory."""
        self._require_open()
        array = PinnedMemory(self.context, spec.size_bytes).array(spec)
        array.fill(0)
        return array

    def upload(self, array: Array) -> DeviceArray:
        """A copy of a host array in new memory, complete when this returns; for tests and constants, not for frames."""
        spec = TensorSpec("upload", str(array.dtype), tuple(array.shape))
        held = np.ascontiguousarray(array)
        target = self.allocate(spec)
        cuda = load()
        check(cuda.cuMemcpyHtoD(target.pointer, held.ctypes.data, held.nbytes), "copying to the GPU")
        # From pageable memory the call may return while the last part is still on its way.
        check(cuda.cuStreamSynchronize(0), "copying to the GPU")
        return target

    def download(self, array: DeviceArray) -> Array:
        """A host copy of a contiguous array, complete when this returns; for tests and tools, not for frames.

        What streams still write is not waited for: synchronise them first.
        """
        if not array.contiguous:
            raise DeviceError(f"{array} is not contiguous; copy it on the GPU first")
        self.context.make_current()
        result = np.empty(array.shape, array.dtype)
        if math.prod(array.shape):
            check(load().cuMemcpyDtoH(result.ctypes.data, array.pointer, result.nbytes), "copying from the GPU")
        return result

    def stop(self) -> None:
        """Let every stream refuse new work, and wait for what is queued; safe to call twice."""
        for stream in list(self._streams):
            stream.stop()

    def close(self) -> None:
        """Close every stream after its queued work, and leave the GPU; safe to call twice.

        Memory that is still referred to is given back when it is forgotten.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for stream in list(self._streams):
            stream.close()

    def __enter__(self) -> CudaDevice:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the device {self.name} is closed; make a new CudaDevice")


# The context is kept by what it made: memory may outlive the device object, e.g. in an answer that a caller holds.
# At the end of the process nothing is given back (`atexit`): a producer's thread may still be issuing to a stream, and
# executors are taken down after us, which end with their stream; the driver takes everything back itself.


def _destroy_event(context: Context, handle: Any) -> None:
    _quietly(context, lambda cuda: cuda.cuEventDestroy(handle), "an event")


def _destroy_stream(context: Context, handle: Any) -> None:
    _quietly(context, lambda cuda: cuda.cuStreamDestroy(handle), "a stream")

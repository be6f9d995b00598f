"""A CUDA graph: work that was issued to a stream once and is replayed with a single call."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

from ...kernels.driver import Context, check, load
from ..errors import DeviceError
from .device import CudaStream

__all__ = ["CudaGraph"]


class CudaGraph:
    """Captured work, ready to be replayed on the same buffers. Made by `capture`.

    Attributes:
        name: What messages call it.
        nodes: How many operations it holds; never 0.
    """

    def __init__(self, name: str, nodes: int, executable: Any, context: Context) -> None:
        self.name = name
        self.nodes = nodes
        self._cuda = load()
        self._executable = executable
        self._release = weakref.finalize(self, _destroy, context, executable)
        self._release.atexit = False

    @classmethod
    def capture(cls, stream: CudaStream, work: Callable[[], Any], *, name: str) -> CudaGraph:
        """Capture what `work` issues to `stream`; nothing of it runs.

        Everything that `work` touches must have been used once before (lazy loading, handles and workspaces of
        libraries are not allowed in a capture), and must keep its address as long as the graph is replayed.

        Args:
            stream: Where `work` issues to.
            work: Issues the work; it neither waits nor allocates.
            name: What messages call the graph.

        Raises:
            DeviceError: If something that cannot be captured was done, or nothing was issued to the stream: then the
                work went elsewhere, and replaying would answer with old pictures.
        """
        cuda = load()
        stream.require_open()
        stream.device.context.make_current()
        # Thread-local: what other threads do in the meantime (a producer's, torch's) neither breaks nor enters it.
        mode = cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        with _collector_away:
            check(cuda.cuStreamBeginCapture(stream.stream, mode), f"starting the capture of {name}")
            try:
                work()
            except BaseException:
                # The stream must leave the capture, whatever became of it; what is to be said is what `work` raised.
                _, graph = cuda.cuStreamEndCapture(stream.stream)
                if graph is not None and int(graph) != 0:
                    cuda.cuGraphDestroy(graph)
                raise
            graph = check(cuda.cuStreamEndCapture(stream.stream), f"ending the capture of {name}")
        try:
            _, nodes = check(cuda.cuGraphGetNodes(graph), f"counting the nodes of {name}")
            if nodes == 0:
                raise DeviceError(
                    f"the graph of {name} is empty: its work went to another stream than {stream.name!r}; "
                    "use graphs='off' with this backend"
                )
            executable = check(cuda.cuGraphInstantiate(graph, 0), f"instantiating the graph of {name}")
        finally:
            check(cuda.cuGraphDestroy(graph), f"releasing the capture of {name}")
        captured = cls(name, int(nodes), executable, stream.device.context)
        check(cuda.cuGraphUpload(executable, stream.stream), f"uploading the graph of {name}")
        return captured

    def launch(self, stream: CudaStream) -> None:
        """Replay on `stream`, in order; does not block.

        Raises:
            DeviceError: If the graph is closed, or the driver refuses.
        """
        if self._executable is None:
            raise DeviceError(f"the graph of {self.name} is closed; open a new session")
        check(self._cuda.cuGraphLaunch(self._executable, stream.stream), self.name)

    def close(self) -> None:
        """Give the graph back after its last replay has ended; safe to call twice."""
        self._executable = None
        self._release()


class _CollectorAway:
    """Keeps Python's collector away inside the ``with``, on several threads at a time: what it frees on a capturing
    thread could be device memory, which no capture allows, and the collector comes when it likes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._enabled = False

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._enabled = gc.isenabled()
                gc.disable()
            self._inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._enabled:
                gc.enable()


# The collector is the process's, and engines on several GPUs may open sessions at the same time.
_collector_away = _CollectorAway()


def _destroy(context: Context, executable: Any) -> None:
    # One that is being replayed is freed when that has ended.
    with context.briefly_current():
        load().cuGraphExecDestroy(executable)

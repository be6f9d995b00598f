"""ONNX Runtime's CUDA provider as a backend: modules on our stream and the caller's device memory.

For developers: ONNX Runtime runs a graph on the CPU, with a line on stderr, wherever its CUDA provider cannot be
loaded. That is refused here twice: by ``session.disable_cpu_ep_fallback``, and by asking what was granted.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import logging
import re
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...kernels.array import DeviceArray
from ...kernels.driver import size_text
from ..cuda.device import CudaDevice, CudaStream
from ..device.bindings import DeviceBindings
from ..device.stream import Event
from ..errors import BackendError, ClosedError, DeviceError, InputError
from ..spec import TensorSpec
from .session import BoundBuffers, check_graph, create_session, first_line, import_onnxruntime

__all__ = ["PROVIDER", "OnnxRuntimeCudaModule", "provider_options"]

logger = logging.getLogger(__name__)

PROVIDER = "CUDAExecutionProvider"

# Kernels and workspaces are chosen in the first run, and what the arena takes is known after the second.
_WARM_UP_RUNS = 2
_REQUESTED_SIZE = re.compile(r"requested buffer of size (\d+)")
_OUT_OF_MEMORY = ("out of memory", "Failed to allocate memory", "ALLOC_FAILED")


class OnnxRuntimeCudaModule:
    """One ONNX graph on one stream of one GPU (a `warpcache.engine.device.module.Module`).

    It is run twice on scratch memory when it is loaded: what can fail on this GPU fails then, and its memory is taken.

    Args:
        path: The ``.onnx`` file; external data is looked for beside it.
        name: What messages call it.
        inputs: What the graph must take.
        outputs: What the graph must give.
        device: The GPU.
        stream: The stream that every call must be made on: ONNX Runtime ties a session to one.

    Attributes:
        capturable: Whether `launch` may be captured into a graph.

    Raises:
        BackendError: If ONNX Runtime is missing, has no CUDA provider or cannot load it, or refuses the graph, or part
            of it cannot run on the GPU, or its inputs and outputs are others.
        DeviceError: If the GPU has no room for it.
        InputError: If `stream` is of another GPU.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        name: str,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        device: CudaDevice,
        stream: CudaStream,
    ) -> None:
        if stream.device.ordinal != device.ordinal:
            raise InputError(
                f"module {name!r} was given stream {stream.name!r} of {stream.device.name}, but runs on {device.name}"
            )
        self.name = name
        self.inputs = inputs
        self.outputs = outputs
        self._device = device
        # Held, so that the session never outlives the stream it issues to.
        self._stream = stream
        self._lock = threading.Lock()
        ort = import_onnxruntime()
        _require_provider(ort, name)
        device.context.make_current()
        self._session: Any
        try:
            self._session, self.capturable = _load(ort, Path(path), name, device, stream)
        except BackendError as exc:
            raise self._explained(exc) from exc.__cause__
        check_graph(self._session, name, inputs, outputs)
        self._buffers = BoundBuffers(self._session, name, inputs, outputs, device="cuda", ordinal=device.ordinal)
        self._bindings = DeviceBindings(name, self._buffers.slots, ordinal=device.ordinal)
        self._run_options = _run_options(ort)
        try:
            self._warm_up()
        except BaseException:
            self.close()
            raise

    def launch(self, bindings: Mapping[str, DeviceArray], stream: CudaStream) -> None:
        """Issue one run to `stream` (see `Module.launch`).

        Raises:
            InputError: If a binding does not fit, or `stream` is not the one the module was loaded for.
            BackendError: If ONNX Runtime refuses, or a run on the GPU has failed before.
            ClosedError: If the module is closed.
        """
        self._issue(self._check_bindings(bindings, stream))

    def enqueue(self, bindings: Mapping[str, DeviceArray], stream: CudaStream) -> Event:
        """`launch`, and an event that is done when the outputs are written."""
        arrays = self._check_bindings(bindings, stream)
        return stream.submit(lambda: self._issue(arrays))

    def close(self) -> None:
        """Release the graph and its memory; safe to call twice. Work that runs must have ended."""
        with self._lock:
            if self._session is None:
                return
            # What the session holds of CUDA's libraries is given back on the GPU that is current.
            self._device.context.make_current()
            self._session = self._buffers.binding = None
            self._buffers.forget()

    def _check_bindings(self, bindings: Mapping[str, DeviceArray], stream: CudaStream) -> list[DeviceArray]:
        """The arrays in the order of the slots; this runs once a frame and is kept short."""
        if self._session is None:
            raise ClosedError(f"module {self.name!r} is closed; load it again")
        if stream.handle != self._stream.handle:
            raise InputError(
                f"module {self.name!r} was loaded for stream {self._stream.name!r} and cannot run on "
                f"{stream.name!r}; load it once more for that stream"
            )
        return self._bindings.arrays(bindings)

    def _issue(self, arrays: list[DeviceArray]) -> None:
        # Two sessions' threads take turns: one set of bound buffers.
        with self._lock:
            if self._session is None:
                raise ClosedError(f"module {self.name!r} is closed; load it again")
            changed = False
            for slot, array in zip(self._buffers.slots, arrays, strict=True):
                if slot.bound is None or array.pointer != slot.address:
                    self._buffers.bind(slot, array, array.pointer)
                    changed = True
            if changed:
                self._buffers.check_overlap()
            try:
                self._session.run_with_iobinding(self._buffers.binding, self._run_options)
            # ONNX Runtime's exceptions share no base class but this one.
            except Exception as exc:
                failed = BackendError(f"module {self.name!r} failed in ONNX Runtime: {first_line(exc)}")
                raise self._explained(failed) from exc

    def _warm_up(self) -> None:
        """Run on scratch memory, which is given back at the end."""
        scratch = {spec.name: self._device.allocate(spec) for spec in (*self.inputs, *self.outputs)}
        for _ in range(_WARM_UP_RUNS):
            self.launch(scratch, self._stream)
        try:
            self._stream.synchronize()
        except DeviceError as exc:
            raise DeviceError(f"module {self.name!r} failed in its first run: {exc}") from exc
        self._buffers.forget()

    def _explained(self, error: BackendError) -> BackendError:
        """`error`, or where it tells of memory, that with how much was asked for and how much there is."""
        text = str(error)
        if not any(sign in text for sign in _OUT_OF_MEMORY):
            return error
        asked = _REQUESTED_SIZE.search(text)
        wanted = f"; {size_text(int(asked[1]))} more were asked for" if asked else ""
        with contextlib.suppress(DeviceError):
            free, total = self._device.context.memory
            wanted += f"; {size_text(free)} of {size_text(total)} are free"
        return DeviceError(
            f"{self._device.name} has no room for module {self.name!r}{wanted}; close other programs, lower the number "
            f"of producers, or take a smaller model ({text})"
        )


def provider_options(device: CudaDevice, stream: CudaStream, *, capturable: bool) -> dict[str, str]:
    """What the CUDA provider is told, by the names of its documentation.

    https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html#configuration-options
    """
    return {
        "device_id": str(device.ordinal),
        "user_compute_stream": str(stream.handle),
        # Copies are ordered with the kernels; on streams of their own they race (the documentation says so).
        "do_copy_in_default_stream": "1",
        # Every module has an arena of its own and fixed shapes: powers of two would waste up to half of each.
        "arena_extend_strategy": "kSameAsRequested",
        # Chosen by cuDNN's rules, not by timing: a convolution has the same kernel, and so the same rounding, in the
        # producer and in the whole generator, and in every process.
        "cudnn_conv_algo_search": "HEURISTIC",
        # TF32 keeps 10 bits of the mantissa. An fp32 bundle is what other precisions are held against, and gives on a
        # GPU what it gives on the CPU but for the order of sums; who wants speed takes a bundle in fp16.
        "use_tf32": "0",
        # Not to capture graphs itself (see _run_options), but for what this changes besides: host buffers of a kernel
        # are then freed after a wait on the stream, which a capture of ours refuses with an error. Without it they are
        # freed by a callback on the stream, which a captured graph would call again at every replay.
        "enable_cuda_graph": "1" if capturable else "0",
    }


def _load(ort: Any, path: Path, name: str, device: CudaDevice, stream: CudaStream) -> tuple[Any, bool]:
    """The session, and whether its runs may be captured."""
    options = ort.SessionOptions()
    # Nothing runs on the CPU: one thread, the caller's.
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # The plan of memory that is made from the first run would take one large block in the second, and a third
    # allocation must not happen in a capture.
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    # Weights are taken exactly, outside the arena, which then holds activations only.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    error: BackendError | None = None
    for capturable in (True, False):
        provider = PROVIDER, provider_options(device, stream, capturable=capturable)
        try:
            session = create_session(ort, path, name, options, provider)
        except BackendError as exc:
            error = error or exc
            cause = _load_error(ort)
            if cause is not None:
                raise BackendError(
                    f"module {name!r}: ONNX Runtime's CUDA provider cannot be loaded ({cause}); install what it needs "
                    'with pip install "onnxruntime-gpu[cuda,cudnn]"'
                ) from exc
            continue
        if not capturable:
            # Graphs with branches or loops cannot be captured, and are refused with enable_cuda_graph.
            logger.info("module %r cannot be captured into a CUDA graph: %s", name, error)
        logger.info("loaded module %r from %s on %s", name, path.name, device.name)
        return session, capturable
    assert error is not None
    raise error


def _run_options(ort: Any) -> Any:
    options = ort.RunOptions()
    # Run returns when the work is issued; ours is the stream, and ours the events on it.
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    # Never a graph of ONNX Runtime's own, which would be captured in global mode and break on other threads' calls.
    options.add_run_config_entry("gpu_graph_id", "-1")
    return options


def _require_provider(ort: Any, name: str) -> None:
    available = ort.get_available_providers()
    if PROVIDER not in available:
        raise BackendError(
            f"module {name!r} was asked to run on a GPU, but the installed ONNX Runtime {ort.__version__} is a build "
            "without CUDA; uninstall onnxruntime, then install onnxruntime-gpu with "
            'pip install "warpcache[gpu]" (they exclude each other)'
        )
    _preload_libraries()


@functools.cache
def _preload_libraries() -> None:
    """Open CUDA's and cuDNN's libraries where pip has put them: the provider looks for them on the system only."""
    preload = getattr(import_onnxruntime(), "preload_dlls", None)
    if preload is None:  # ONNX Runtime before 1.21
        return
    said = io.StringIO()
    # It prints what it does not find, which may be found on the system all the same.
    with contextlib.redirect_stdout(said):
        preload()
    for line in said.getvalue().splitlines():
        logger.debug("ONNX Runtime: %s", line)


def _load_error(ort: Any) -> str | None:
    """Why the provider's library does not open, or None if it does.

    Only after ONNX Runtime has tried itself: the library must not be opened before its host is set up.
    """
    folder = Path(ort.__file__).parent / "capi"
    windows = sys.platform == "win32"
    library = folder / ("onnxruntime_providers_cuda.dll" if windows else "libonnxruntime_providers_cuda.so")
    if not library.is_file():
        return None
    try:
        ctypes.CDLL(str(library))
    except OSError as exc:
        return first_line(exc)
    return None

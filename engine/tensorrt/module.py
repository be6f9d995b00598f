"""A TensorRT engine as a module on a GPU: the caller's buffers, our activation memory, nothing taken while it runs."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...kernels.array import DeviceArray
from ..cuda.device import CudaDevice, CudaStream
from ..cuda.memory import DeviceMemory
from ..device.bindings import DeviceBindings, ports_of, refuse_overlap
from ..device.stream import Event
from ..errors import BackendError, ClosedError
from ..spec import TensorSpec
from .flavour import Flavour, deferred_interrupt
from .io import IoTensor, check_io, dtype_name, last_said
from .runtime_cache import RuntimeCacheFile

__all__ = ["TensorRtModule"]

logger = logging.getLogger(__name__)

# TensorRT asks for it of every tensor and of its activation memory; what CUDA allocates is aligned so.
_ALIGNMENT = 256
# How an engine of TensorRT-RTX begins; one of full TensorRT begins otherwise.
_RTX_MAGIC = b"vtrt"


class TensorRtModule:
    """One engine, loaded on one GPU (a `warpcache.engine.device.module.Module`).

    Runs on one stream at a time: activation memory belongs to the module. A run on another stream than the last is
    ordered after it on the GPU.

    Args:
        engine: What `build_engine` gave; not needed any more when this returns.
        name: What messages call the module.
        inputs: What the engine must take.
        outputs: What the engine must give.
        flavour: The library that built it.
        device: The GPU.
        runtime_cache: File in which TensorRT-RTX keeps the kernels it compiled for this GPU; one for every engine. None
            compiles them anew; full TensorRT has none.

    Raises:
        BackendError: If the engine is of the other flavour, of another version, for another GPU or damaged, or its
            inputs and outputs are others.
        DeviceError: If the GPU has no room for the activations.
    """

    def __init__(
        self,
        engine: bytes,
        *,
        name: str,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        flavour: Flavour,
        device: CudaDevice,
        runtime_cache: Path | None = None,
    ) -> None:
        self.name = name
        self.inputs = inputs
        self.outputs = outputs
        self._flavour = flavour
        self._log = flavour.log
        self._device = device
        self._lock = threading.Lock()
        self._ports = ports_of(inputs, outputs)
        self._bindings = DeviceBindings(name, self._ports, ordinal=device.ordinal, alignment=_ALIGNMENT)
        self._bound: list[int] | None = None
        self._stream: weakref.ref[CudaStream] | None = None
        self._order: Any = None
        self._cache_file: RuntimeCacheFile | None = None
        self._cache: Any = None
        self._context: Any = None
        device.context.make_current()
        with self._log.collect() as said, deferred_interrupt():
            # Each must outlive what is made from it, in this order.
            self._runtime = self._make_runtime(said)
            self._check_engine(engine, said)
            self._engine = self._load(engine, said)
            self._check_io()
            context = self._make_context(runtime_cache, said)
            self._set_shapes(context, said)
            self._memory = self._give_memory(context)
        self._context = context
        logger.info(
            "loaded module %r with %s %s on %s: %.1f MB, %.1f MB for activations",
            name,
            flavour.title,
            flavour.version,
            device.name,
            len(engine) / 1e6,
            self._memory.size_bytes / 1e6,
        )

    @property
    def capturable(self) -> bool:
        """Whether `launch` may be captured into a graph, after one run on the same buffers."""
        with self._lock:
            context = self._require_context()
            ask = getattr(context, "is_stream_capturable", None)
            if ask is None:
                # Full TensorRT cannot be asked: what it cannot capture, the capture reports.
                return True
            stream = None if self._stream is None else self._stream()
            if stream is not None:
                return bool(ask(stream.handle))
            probe = self._device.stream(f"{self.name} probe")
            try:
                return bool(ask(probe.handle))
            finally:
                probe.close()

    def launch(self, bindings: Mapping[str, DeviceArray], stream: CudaStream) -> None:
        """Issue one run to `stream` and nothing else (see `Module.launch`).

        Raises:
            InputError: If a binding does not fit. Nothing was issued.
            BackendError: If TensorRT refuses.
            ClosedError: If the module is closed.
        """
        addresses = [array.pointer for array in self._bindings.arrays(bindings)]
        with self._lock:
            context = self._require_context()
            if self._stream is None or self._stream() is not stream:
                self._follow(stream)
            if addresses != self._bound:
                self._bind(context, addresses)
            errors = self._log.errors
            if not context.execute_async_v3(stream.handle):
                raise BackendError(
                    f"module {self.name!r} failed in {self._flavour.title}: {last_said(self._log.since(errors))}"
                )

    def enqueue(self, bindings: Mapping[str, DeviceArray], stream: CudaStream) -> Event:
        """`launch`, and an event that is done when the outputs are written (see `Module.enqueue`)."""
        # Checked before, so that what does not fit is raised here and not by the event.
        self._bindings.arrays(bindings)
        return stream.submit(lambda: self.launch(bindings, stream))

    def save_runtime_cache(self) -> None:
        """Write what TensorRT-RTX has compiled so far to the runtime cache's file; `close` does it too."""
        with self._lock:
            self._save()

    def close(self) -> None:
        """Release the engine and its memory; safe to call twice. Work that runs must have ended."""
        with self._lock:
            if self._context is None:
                return
            self._device.context.make_current()
            self._save()
            self._context = self._cache = self._engine = self._runtime = None
            self._memory.close()
            if self._order is not None:
                self._order.close()

    # Loading

    def _make_runtime(self, said: Iterable[str]) -> Any:
        try:
            return self._flavour.module.Runtime(self._flavour.trt_logger)
        # The bindings answer a library that gives no runtime with a TypeError.
        except (TypeError, RuntimeError) as exc:
            raise BackendError(
                f"{self._flavour.title} gives no runtime ({last_said(said, exc)}); `warpcache doctor` says what is here"
            ) from exc

    def _check_engine(self, engine: bytes, said: Iterable[str]) -> None:
        """Refuse what the library would refuse later, or not well."""
        title = self._flavour.title
        if (engine[: len(_RTX_MAGIC)] == _RTX_MAGIC) != (self._flavour.name == "tensorrt-rtx"):
            built_by = "TensorRT" if self._flavour.name == "tensorrt-rtx" else "TensorRT-RTX"
            raise BackendError(
                f"the engine of module {self.name!r} is none of {title}, perhaps one of {built_by}; build it for the "
                f"backend {self._flavour.name!r}"
            )
        trt = self._flavour.module
        if not hasattr(self._runtime, "get_engine_validity"):
            return
        validity, diagnostics = self._runtime.get_engine_validity(engine)
        if validity == trt.EngineValidity.SUBOPTIMAL:
            logger.warning("the engine of module %r serves %s, but not at its best", self.name, self._device.name)
        if validity == trt.EngineValidity.INVALID:
            raise BackendError(f"the engine of module {self.name!r} does not serve: {self._reasons(diagnostics, said)}")

    def _reasons(self, diagnostics: int, said: Iterable[str]) -> str:
        """The bits of the library's `EngineInvalidityDiagnostics` as sentences."""
        device, title = self._device, self._flavour.title
        here = f"{title} {self._flavour.version}"
        free, total = device.context.memory
        if device.architecture in self._flavour.targets:
            foreign = f"build it with the target {device.architecture}"
        else:
            foreign = f"{title} does not serve that GPU, so take another backend"
        sentences = {
            "VERSION_MISMATCH": f"it is of another version than {here}, which is here; build it again",
            "UNSUPPORTED_CC": f"it was not built for {device.name} ({device.architecture}); {foreign}",
            "OLD_CUDA_DRIVER": "the NVIDIA driver is too old for it; update the driver",
            "OLD_CUDA_RUNTIME": f"the CUDA runtime is too old for it; install {title} again",
            "INSUFFICIENT_GPU_MEMORY": (
                f"{device.name} has too little memory for it, {free >> 20} of {total >> 20} MiB are free; close other "
                "programs or take a smaller model"
            ),
            "MALFORMED_ENGINE": "it is damaged, or no engine; build it again",
            "CUDA_ERROR": "CUDA does not work here; `warpcache doctor` says what is wrong",
        }
        bits = self._flavour.module.EngineInvalidityDiagnostics
        found = [text for bit, text in sentences.items() if int(diagnostics) & int(getattr(bits, bit))]
        return " and ".join(found) or f"{last_said(said)}; build it again"

    def _load(self, engine: bytes, said: Iterable[str]) -> Any:
        loaded = self._runtime.deserialize_cuda_engine(engine)
        if loaded is None:
            free, total = self._device.context.memory
            raise BackendError(
                f"the engine of module {self.name!r} ({len(engine) / 2**20:.1f} MiB) is refused by "
                f"{self._flavour.title} {self._flavour.version} on {self._device.name}, which has {free >> 20} of "
                f"{total >> 20} MiB free: {last_said(said)}; build it again on this machine"
            )
        return loaded

    def _check_io(self) -> None:
        trt, engine = self._flavour.module, self._engine
        found: dict[str, dict[str, IoTensor]] = {"input": {}, "output": {}}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            kind = "input" if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else "output"
            found[kind][name] = IoTensor(
                dtype_name(engine.get_tensor_dtype(name)),
                tuple(int(extent) for extent in engine.get_tensor_shape(name)),
                engine.get_tensor_location(name) != trt.TensorLocation.DEVICE,
            )
        for kind, specs in (("input", self.inputs), ("output", self.outputs)):
            where = f"the engine of module {self.name!r}"
            check_io(where, kind, specs, found[kind], remedy="it is another module's: build it again")

    def _make_context(self, runtime_cache: Path | None, said: Iterable[str]) -> Any:
        trt, engine = self._flavour.module, self._engine
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(trt, "CudaGraphStrategy"):
            context = engine.create_execution_context(strategy)
        else:
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            # Graphs are captured around it; one of its own inside would be a second.
            config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
            # Kernels for the shapes at hand are compiled at the first run, before any frame is answered; lazily, the
            # first frames would run others, and a capture would keep them.
            kernels = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = kernels
            if runtime_cache is not None:
                self._open_cache(config, RuntimeCacheFile(runtime_cache))
            context = engine.create_execution_context(config)
        if context is None:
            raise BackendError(
                f"module {self.name!r}: {self._flavour.title} makes no execution context: {last_said(said)}; "
                "close other programs that use the GPU, or build the engine again"
            )
        return context

    def _open_cache(self, config: Any, file: RuntimeCacheFile) -> None:
        cache = config.create_runtime_cache()
        content = file.read()
        if content is not None and not cache.deserialize(content):
            file.discard("is of another GPU, driver or version")
        if config.set_runtime_cache(cache):
            self._cache, self._cache_file = cache, file
        else:
            logger.warning("module %r: %s takes no runtime cache", self.name, self._flavour.title)

    def _set_shapes(self, context: Any, said: Iterable[str]) -> None:
        """Fix the open extents of a dynamic engine to those of the specs, for good."""
        dynamic = [spec for spec in self.inputs if -1 in tuple(self._engine.get_tensor_shape(spec.name))]
        for spec in dynamic:
            if not context.set_input_shape(spec.name, spec.shape):
                raise BackendError(
                    f"module {self.name!r}: the engine does not serve input {spec.name!r} of shape {list(spec.shape)}: "
                    f"{last_said(said)}; build it with a profile that takes that in"
                )
        if not dynamic:
            return
        for spec in self.outputs:
            shape = tuple(int(extent) for extent in context.get_tensor_shape(spec.name))
            if shape != spec.shape:
                raise BackendError(
                    f"module {self.name!r}: for these inputs the engine's output {spec.name!r} is {list(shape)}, but "
                    f"{list(spec.shape)} was announced; compile the bundle again"
                )

    def _give_memory(self, context: Any) -> DeviceMemory:
        size_bytes = int(context.update_device_memory_size_for_shapes())
        memory = self._device.memory(size_bytes, f"the activations of module {self.name!r}")
        context.set_device_memory(memory.pointer, size_bytes)
        return memory

    # Running

    def _require_context(self) -> Any:
        if self._context is None:
            raise ClosedError(f"module {self.name!r} is closed; load it again")
        return self._context

    def _bind(self, context: Any, addresses: list[int]) -> None:
        refuse_overlap(self.name, self._ports, addresses)
        old = self._bound or [0] * len(addresses)
        # Left unbound until all is well: nothing may run on half of the new buffers.
        self._bound = None
        for slot, before, address in zip(self._ports, old, addresses, strict=True):
            if address != before and not context.set_tensor_address(slot.name, address):
                raise BackendError(
                    f"module {self.name!r}: {self._flavour.title} refused the buffer of {slot.name!r}; build the "
                    "engine again"
                )
        self._bound = addresses

    def _follow(self, stream: CudaStream) -> None:
        """Order `stream` after what the last one was given: the two would share activation memory."""
        last = None if self._stream is None else self._stream()
        self._stream = weakref.ref(stream)
        if last is None:
            return
        try:
            last.require_open()
        except ClosedError:
            # Its work was waited for.
            return
        if self._order is None:
            self._order = self._device.event()
        self._order.record(last)
        stream.wait_for(self._order)

    def _save(self) -> None:
        if self._cache is None or self._cache_file is None:
            return
        content = self._cache.serialize()
        if content is not None:
            self._cache_file.write(bytes(content))

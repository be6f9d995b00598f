"""TensorRT-RTX's Python surface in software: what this project calls of it, with ONNX Runtime on the CPU behind.

It runs on the CUDA driver in software, where an address on the device is an address on the host. An engine holds its
whole model; a run is a host function on the stream, so it is asynchronous, can be captured, and is replayed with the
addresses it was issued with. It refuses what the real one refuses: unaligned memory, missing addresses, engines for
another GPU. `faults` makes it fail on purpose. `tests_software_tensorrt_full` is the other flavour.

The classes carry no more public names than the project uses: test_tensorrt_api holds them against the real bindings.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import hashlib
import itertools
import json
import math
import struct
import sys
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime

from warpcache.engine.tensorrt.flavour import Flavour, FlavourName

__version__ = "1.7.0.0"
MAGIC = b"vtrt"


def software_flavour(name: FlavourName = "tensorrt-rtx") -> Flavour:
    """The double of one of the two libraries, as the project loads it."""
    if name == "tensorrt-rtx":
        return Flavour.of(sys.modules[__name__], name)
    import tests_software_tensorrt_full

    return Flavour.of(tests_software_tensorrt_full, name)


@dataclass
class Faults:
    """What goes wrong on purpose; every field is as harmless as it starts."""

    diagnostics: int = 0  # bits of EngineInvalidityDiagnostics that every engine is found to have
    suboptimal: bool = False
    refuses_engine: str = ""  # what is logged as deserialising fails
    refuses_context: str = ""
    refuses_run: str = ""
    refuses_address: str = ""  # the tensor
    refuses_build: str = ""
    no_builder: bool = False
    no_runtime: bool = False
    refused_operators: set[str] = field(default_factory=set)
    uncapturable: bool = False
    activation_bytes: int = 1000


faults = Faults()
failures: list[str] = []
"""What went wrong in a host function, where nothing can be raised."""


@contextlib.contextmanager
def failing(**wrong: Any) -> Iterator[Faults]:
    """Let things go wrong inside the ``with``."""
    before = {name: getattr(faults, name) for name in wrong}
    for name, value in wrong.items():
        setattr(faults, name, value)
    try:
        yield faults
    finally:
        for name, value in before.items():
            setattr(faults, name, value)


class DataType(enum.IntEnum):
    FLOAT = 0
    HALF = 1
    INT8 = 2
    INT32 = 3
    BOOL = 4
    UINT8 = 5
    BF16 = 7
    INT64 = 8


_ONNX_TYPES = {
    onnx.TensorProto.FLOAT: DataType.FLOAT,
    onnx.TensorProto.FLOAT16: DataType.HALF,
    onnx.TensorProto.INT8: DataType.INT8,
    onnx.TensorProto.INT32: DataType.INT32,
    onnx.TensorProto.BOOL: DataType.BOOL,
    onnx.TensorProto.UINT8: DataType.UINT8,
    onnx.TensorProto.BFLOAT16: DataType.BF16,
    onnx.TensorProto.INT64: DataType.INT64,
}
_NUMPY = {
    DataType.FLOAT: "float32",
    DataType.HALF: "float16",
    DataType.INT8: "int8",
    DataType.INT32: "int32",
    DataType.BOOL: "bool",
    DataType.UINT8: "uint8",
    DataType.INT64: "int64",
}


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 0


class BuilderFlag(enum.IntEnum):
    TF32 = 0
    REQUIRE_USER_ALLOCATION = 1


class MemoryPoolType(enum.IntEnum):
    WORKSPACE = 0


class ComputeCapability(enum.IntEnum):
    NONE = 0
    CURRENT = 1
    SM75 = 75
    SM80 = 80
    SM86 = 86
    SM89 = 89
    SM90 = 90  # what the GPUs of the driver in software are; the real one has none
    SM120 = 120
    SM121 = 121


class TensorIOMode(enum.IntEnum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class TensorLocation(enum.IntEnum):
    DEVICE = 0
    HOST = 1


class ExecutionContextAllocationStrategy(enum.IntEnum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class CudaGraphStrategy(enum.IntEnum):
    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class DynamicShapesKernelSpecializationStrategy(enum.IntEnum):
    LAZY = 0
    EAGER = 1
    NONE = 2


class EngineValidity(enum.IntEnum):
    VALID = 0
    SUBOPTIMAL = 1
    INVALID = 2


class EngineInvalidityDiagnostics(enum.IntEnum):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    OLD_CUDA_DRIVER = 4
    OLD_CUDA_RUNTIME = 8
    INSUFFICIENT_GPU_MEMORY = 16
    MALFORMED_ENGINE = 32
    CUDA_ERROR = 64


class ILogger:
    class Severity(enum.IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3
        VERBOSE = 4

    def __init__(self) -> None:
        self._made = True

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


class IProgressMonitor:
    def __init__(self) -> None:
        self._made = True

    def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
        raise NotImplementedError

    def step_complete(self, phase_name: str, step: int) -> bool:
        raise NotImplementedError

    def phase_finish(self, phase_name: str) -> None:
        raise NotImplementedError


def _require_made(base: Any, kind: type) -> None:
    """The real bindings crash where a subclass did not call its base's `__init__`; here it is an error."""
    if not isinstance(base, kind) or not getattr(base, "_made", False):
        raise TypeError(f"{type(base).__name__} is no {kind.__name__}, or its base was not initialised")


# Building


# Slots, because the real objects take no attribute that they do not know, and because a class then shows its own.


class ITensor:
    __slots__ = ("_dims", "dtype", "is_shape_tensor", "name", "shape")

    def __init__(self, value: onnx.ValueInfoProto) -> None:
        kind = value.type.tensor_type
        self.name = value.name
        self.dtype = _ONNX_TYPES[kind.elem_type]
        # A dimension without a fixed extent is -1, with its name kept aside.
        self.shape = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim)
        self.is_shape_tensor = False
        self._dims = [dim.dim_param for dim in kind.shape.dim]


class INetworkDefinition:
    def __init__(self) -> None:
        self._model: onnx.ModelProto | None = None
        self._inputs: list[ITensor] = []
        self._outputs: list[ITensor] = []

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    def get_input(self, index: int) -> ITensor:
        return self._inputs[index]

    def get_output(self, index: int) -> ITensor:
        return self._outputs[index]


class ParserError:
    def __init__(self, desc: str, index: int = -1, node: onnx.NodeProto | None = None) -> None:
        self._desc = desc
        self._index = index
        self._node = node

    def desc(self) -> str:
        return self._desc

    def node(self) -> int:
        return self._index

    def node_name(self) -> str:
        return "" if self._node is None else self._node.name

    def node_operator(self) -> str:
        return "" if self._node is None else self._node.op_type


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        _require_made(logger, ILogger)
        self._network = network
        self._errors: list[ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def parse_from_file(self, model: str) -> bool:
        try:
            parsed = onnx.load(model)
            onnx.checker.check_model(parsed)
        except Exception as exc:
            self._errors.append(ParserError(str(exc)))
            return False
        for index, node in enumerate(parsed.graph.node):
            if node.op_type in faults.refused_operators:
                self._errors.append(ParserError("Plugin not found.", index, node))
        # What the loader read of other files is in the model now, and no longer theirs.
        for tensor in parsed.graph.initializer:
            del tensor.external_data[:]
            tensor.data_location = onnx.TensorProto.DEFAULT
        self._network._model = parsed
        self._network._inputs = [ITensor(value) for value in parsed.graph.input]
        self._network._outputs = [ITensor(value) for value in parsed.graph.output]
        return not self._errors


class IOptimizationProfile:
    def __init__(self) -> None:
        self._shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

    def set_shape(self, input: str, min: Sequence[int], opt: Sequence[int], max: Sequence[int]) -> None:
        self._shapes[input] = (tuple(min), tuple(opt), tuple(max))


class IBuilderConfig:
    """Without what only TensorRT-RTX has; `_RtxBuilderConfig` adds it."""

    __slots__ = (
        *("builder_optimization_level", "max_aux_streams", "progress_monitor"),
        *("_capabilities", "_flags", "_pools", "_profiles"),
    )

    def __init__(self) -> None:
        self.max_aux_streams = -1
        self.builder_optimization_level = 3
        self.progress_monitor: IProgressMonitor | None = None
        self._flags = {BuilderFlag.TF32}
        self._pools: dict[Any, int] = {}
        self._capabilities: list[Any] = []
        self._profiles: list[IOptimizationProfile] = []

    def set_flag(self, flag: Any) -> None:
        self._flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(flag)

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._pools[pool] = pool_size

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1


class _RtxBuilderConfig(IBuilderConfig):
    __slots__ = ()

    @property
    def num_compute_capabilities(self) -> int:
        return len(self._capabilities)

    @num_compute_capabilities.setter
    def num_compute_capabilities(self, count: int) -> None:
        self._capabilities = [ComputeCapability.NONE] * count

    def set_compute_capability(self, compute_capability: Any, index: int) -> bool:
        if not 0 <= index < len(self._capabilities):
            return False
        self._capabilities[index] = compute_capability
        return True


class Builder:
    _magic = MAGIC
    _version = __version__
    _config: type[IBuilderConfig] = _RtxBuilderConfig

    def __init__(self, logger: ILogger) -> None:
        _require_made(logger, ILogger)
        if faults.no_builder:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._logger = logger

    def create_network(self, flags: int) -> INetworkDefinition:
        if flags != 1 << int(NetworkDefinitionCreationFlag.STRONGLY_TYPED):
            raise AssertionError("networks are strongly typed, and nothing else")
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return type(self)._config()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
        wrong = faults.refuses_build
        profile = config._profiles[0]._shapes if config._profiles else {}
        if any(-1 in tensor.shape and tensor.name not in profile for tensor in network._inputs):
            wrong = "Network has dynamic or shape inputs, but no optimization profile has been defined."
        if ComputeCapability.NONE in config._capabilities:
            wrong = "a compute capability was left out"
        monitor = config.progress_monitor
        if monitor is not None:
            _require_made(monitor, IProgressMonitor)
            monitor.phase_start("Building engine", "", 1)
            if not monitor.step_complete("Building engine", 0):
                wrong = "Build canceled by user"
            monitor.phase_finish("Building engine")
        if wrong:
            self._logger.log(ILogger.Severity.ERROR, f"IBuilder::buildSerializedNetwork: {wrong}")
            return None
        assert network._model is not None
        header = {
            "version": self._version,
            "targets": [int(capability) for capability in config._capabilities],
            "flags": sorted(int(flag) for flag in config._flags),
            "level": config.builder_optimization_level,
            "pools": {str(int(pool)): size for pool, size in config._pools.items()},
            "profile": profile,
        }
        return _sealed(self._magic, header, network._model.SerializeToString(deterministic=True))


def _sealed(magic: bytes, header: dict[str, Any], model: bytes) -> bytes:
    packed = json.dumps(header, sort_keys=True).encode()
    body = struct.pack("<I", len(packed)) + packed + model
    return magic + hashlib.sha256(body).digest() + body


def _opened(magic: bytes, engine: bytes) -> tuple[dict[str, Any], bytes] | None:
    """Header and model of an engine; None if it is none, or torn."""
    body = engine[36:]
    if engine[:4] != magic or engine[4:36] != hashlib.sha256(body).digest():
        return None
    (length,) = struct.unpack_from("<I", body)
    return json.loads(body[4 : 4 + length]), body[4 + length :]


# Running


class IRuntimeCache:
    def __init__(self) -> None:
        self._kernels: set[str] = set()

    def serialize(self) -> bytes:
        return json.dumps({"version": __version__, "kernels": sorted(self._kernels)}).encode()

    def deserialize(self, blob: bytes) -> bool:
        try:
            content = json.loads(blob)
        except ValueError:
            return False
        if content["version"] != __version__:
            return False
        self._kernels |= set(content["kernels"])
        return True


class IRuntimeConfig:
    __slots__ = ("_cache", "_strategy", "cuda_graph_strategy", "dynamic_shapes_kernel_specialization_strategy")

    def __init__(self) -> None:
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
        self._strategy = ExecutionContextAllocationStrategy.STATIC
        self._cache: IRuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self._strategy = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self._cache = cache
        return True


class IExecutionContext:
    """Without what only TensorRT-RTX has; `_RtxContext` adds it."""

    def __init__(self, engine: ICudaEngine, strategy: Any, cache: IRuntimeCache | None) -> None:
        self._engine = engine
        self._user_managed = strategy == ExecutionContextAllocationStrategy.USER_MANAGED
        self._cache = cache
        self._shapes = {tensor.name: tensor.shape for tensor in (*engine._inputs, *engine._outputs)}
        self._addresses: dict[str, int] = {}
        self._memory = (0, 0)
        self._runs: dict[tuple[tuple[str, int], ...], int] = {}

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        low, _, high = self._engine._profile.get(name, ((), (), ()))
        fits = len(low) == len(shape) and all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
        if not fits:
            self._engine._complain(f"setInputShape: {tuple(shape)} does not satisfy any optimization profiles")
            return False
        self._shapes[name] = tuple(shape)
        named = {}
        for tensor in self._engine._inputs:
            named.update(zip(tensor._dims, self._shapes[tensor.name], strict=True))
        for tensor in self._engine._outputs:
            self._shapes[tensor.name] = tuple(
                named.get(dim, -1) if extent == -1 else extent
                for extent, dim in zip(tensor.shape, tensor._dims, strict=True)
            )
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def update_device_memory_size_for_shapes(self) -> int:
        return faults.activation_bytes

    def set_device_memory(self, memory: int, size: int) -> None:
        if not self._user_managed or memory % 256 or size < faults.activation_bytes:
            raise AssertionError(f"set_device_memory({memory:#x}, {size}): unaligned, too little, or not asked for")
        self._memory = (memory, size)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._shapes or memory % 256 or name == faults.refuses_address:
            return False
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        wrong = faults.refuses_run
        if -1 in itertools.chain(*self._shapes.values()):
            wrong = "not all shapes are specified"
        if set(self._addresses) != set(self._shapes):
            wrong = "not all addresses are set"
        if self._user_managed and not self._memory[0]:
            wrong = "no device memory was given"
        if wrong:
            self._engine._complain(f"IExecutionContext::enqueueV3: {wrong}")
            return False
        # The addresses are those of now, in a graph too: what is bound later does not change what was issued.
        addresses = tuple(sorted(self._addresses.items()))
        key = self._runs.get(addresses)
        if key is None:
            key = self._runs[addresses] = next(_keys)
            _issued[key] = (weakref.ref(self), addresses)
        if self._cache is not None:
            self._cache._kernels.add(self._engine._name)
        return _launch_host_function(stream_handle, key)

    def _run(self, addresses: dict[str, int]) -> None:
        """On a thread of the driver: read, compute and write, with the activations in use from beginning to end."""
        mark = np.uint64(id(addresses))
        activations = _view(self._memory[0], np.dtype("uint64"), (self._memory[1] // 8,))
        activations[:] = mark
        binding = self._engine._session.io_binding()
        outputs = {}
        for tensor in self._engine._inputs:
            dtype, shape = np.dtype(_NUMPY[tensor.dtype]), self._shapes[tensor.name]
            binding.bind_input(tensor.name, "cpu", 0, dtype.type, shape, addresses[tensor.name])
        for tensor in self._engine._outputs:
            dtype, shape = np.dtype(_NUMPY[tensor.dtype]), self._shapes[tensor.name]
            binding.bind_output(tensor.name, "cpu", 0, dtype.type, shape, addresses[tensor.name])
            outputs[tensor.name] = _view(addresses[tensor.name], dtype, shape)
        self._engine._session.run_with_iobinding(binding)
        if not (activations == mark).all():
            failures.append("two runs used the same activation memory at once")
            for output in outputs.values():
                output.view(np.uint8)[...] = 0xFF


class _RtxContext(IExecutionContext):
    def is_stream_capturable(self, stream: int) -> bool:
        if not isinstance(stream, int):
            raise TypeError("a stream's handle is an integer")
        return self._engine._user_allocation and not faults.uncapturable


class ICudaEngine:
    """Without what only TensorRT-RTX has; `_RtxEngine` adds it."""

    def __init__(self, logger: ILogger, header: dict[str, Any], model: bytes) -> None:
        self._logger = logger
        self._user_allocation = int(BuilderFlag.REQUIRE_USER_ALLOCATION) in header["flags"]
        self._profile = {name: tuple(map(tuple, shapes)) for name, shapes in header["profile"].items()}
        graph = onnx.ModelProto.FromString(model).graph
        self._name = graph.name
        self._inputs = [ITensor(value) for value in graph.input]
        self._outputs = [ITensor(value) for value in graph.output]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    @property
    def num_io_tensors(self) -> int:
        return len(self._inputs) + len(self._outputs)

    def get_tensor_name(self, index: int) -> str:
        return (self._inputs + self._outputs)[index].name

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if self._tensor(name) in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return self._tensor(name).dtype

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.HOST if self._tensor(name).is_shape_tensor else TensorLocation.DEVICE

    def create_execution_context(self, strategy: Any) -> IExecutionContext | None:
        if faults.refuses_context:
            self._complain(f"createExecutionContext: {faults.refuses_context}")
            return None
        return self._made(strategy)

    def _made(self, strategy: Any) -> IExecutionContext:
        return IExecutionContext(self, strategy, None)

    def _tensor(self, name: str) -> ITensor:
        return next(tensor for tensor in (*self._inputs, *self._outputs) if tensor.name == name)

    def _complain(self, text: str) -> None:
        self._logger.log(ILogger.Severity.ERROR, text)


class _RtxEngine(ICudaEngine):
    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def _made(self, strategy: Any) -> IExecutionContext:
        if not isinstance(strategy, IRuntimeConfig):
            return _RtxContext(self, strategy, None)
        if strategy.cuda_graph_strategy != CudaGraphStrategy.DISABLED:
            raise AssertionError("a graph of the library's own inside a captured one")
        return _RtxContext(self, strategy._strategy, strategy._cache)


class PlainRuntime:
    """Without what only TensorRT-RTX has; `Runtime` adds it."""

    _magic = MAGIC
    _version = __version__
    _engine: type[ICudaEngine] = ICudaEngine

    def __init__(self, logger: ILogger) -> None:
        _require_made(logger, ILogger)
        if faults.no_runtime:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        opened = _opened(self._magic, serialized_engine)
        wrong = faults.refuses_engine
        if opened is None:
            wrong = "Serialization assertion failed"
        elif opened[0]["version"] != self._version:
            wrong = f"The engine plan file is not compatible with this version of TensorRT, expecting {self._version}"
        if opened is None or wrong:
            self._logger.log(ILogger.Severity.ERROR, f"IRuntime::deserializeCudaEngine: {wrong}")
            return None
        return type(self)._engine(self._logger, *opened)


class Runtime(PlainRuntime):
    _engine = _RtxEngine

    def get_engine_validity(self, buffer: bytes) -> tuple[EngineValidity, int]:
        bits = faults.diagnostics
        opened = _opened(self._magic, buffer)
        if opened is None:
            bits |= EngineInvalidityDiagnostics.MALFORMED_ENGINE
        else:
            if opened[0]["version"] != self._version:
                bits |= EngineInvalidityDiagnostics.VERSION_MISMATCH
            if opened[0]["targets"] and _current_capability() not in opened[0]["targets"]:
                bits |= EngineInvalidityDiagnostics.UNSUPPORTED_CC
        if bits:
            return EngineValidity.INVALID, int(bits)
        return (EngineValidity.SUBOPTIMAL if faults.suboptimal else EngineValidity.VALID), 0


SURFACE: tuple[type, ...] = (
    *(DataType, NetworkDefinitionCreationFlag, BuilderFlag, MemoryPoolType, ComputeCapability, TensorIOMode),
    *(TensorLocation, ExecutionContextAllocationStrategy, CudaGraphStrategy),
    *(DynamicShapesKernelSpecializationStrategy, EngineValidity, EngineInvalidityDiagnostics),
    *(ILogger, IProgressMonitor, ITensor, INetworkDefinition, ParserError, OnnxParser, IOptimizationProfile),
    *(_RtxBuilderConfig, Builder, IRuntimeCache, IRuntimeConfig, _RtxContext, _RtxEngine, Runtime),
)
"""Every class that doubles one of the library's, under the library's name of it or as `REAL_NAMES` says."""

REAL_NAMES: dict[type, str] = {
    _RtxBuilderConfig: "IBuilderConfig",
    _RtxContext: "IExecutionContext",
    _RtxEngine: "ICudaEngine",
}


# The driver

_keys = itertools.count(1)
_issued: dict[int, tuple[weakref.ref[IExecutionContext], tuple[tuple[str, int], ...]]] = {}


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _host_function(key: int) -> None:
    reference, addresses = _issued[key]
    context = reference()
    if context is None:
        failures.append("a run began after its execution context was destroyed")
        return
    try:
        context._run(dict(addresses))
    except Exception as exc:
        failures.append(f"{type(exc).__name__}: {exc}")


def _launch_host_function(stream: int, key: int) -> bool:
    """Past the bindings: theirs give the function's data free after its first run, and a graph runs it again."""
    from cuda.bindings._internal.driver import _inspect_function_pointer

    address = _inspect_function_pointer("__cuLaunchHostFunc")
    launch = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(address)
    return launch(stream, ctypes.cast(_host_function, ctypes.c_void_p), key) == 0


def _current_capability() -> int:
    from cuda.bindings import driver

    names = ("COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR")
    _, device = driver.cuCtxGetDevice()
    attributes = [getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}") for name in names]
    (_, major), (_, minor) = (driver.cuDeviceGetAttribute(attribute, device) for attribute in attributes)
    return 10 * major + minor


def _view(address: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Any:
    size = math.prod(shape) * dtype.itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype).reshape(shape)

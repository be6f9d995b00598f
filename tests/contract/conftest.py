"""The rigs of the device contract: every device and backend that the suite runs on.

On the CPU: ONNX Runtime. On a GPU, by pairs that are asked for: ONNX Runtime's CUDA provider and both flavours of
TensorRT, where hardware and libraries are there (marked `gpu`). Without a GPU the same lanes, streams, events and
graphs run on the driver in software, eagerly and as late as allowed, with TensorRT's runtime doubled.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from warpcache.engine.bundle.bundle import Bundle
from warpcache.engine.cuda.device import CudaDevice
from warpcache.engine.cuda.options import CudaOptions
from warpcache.engine.device.module import ModuleFile, Site
from warpcache.engine.device.stream import CpuStream, InlineStream
from warpcache.engine.engine import Engine
from warpcache.engine.errors import BackendError
from warpcache.engine.onnxruntime.cpu import OnnxRuntimeModule
from warpcache.engine.spec import Array, TensorSpec

RIGS = [
    "cpu-onnxruntime",
    "software-cuda",
    "software-cuda-no-graphs",
    "software-cuda-lazy",
    pytest.param("cuda-onnxruntime", marks=pytest.mark.gpu),
    pytest.param("cuda-tensorrt", marks=pytest.mark.gpu),
    pytest.param("cuda-tensorrt-rtx", marks=pytest.mark.gpu),
]


class CpuRig:
    """ONNX Runtime on the CPU."""

    name = "cpu-onnxruntime"

    def engine(self, path: Path, **options: Any) -> Engine:
        return Engine(path, threads=1, **options)

    def module(self, path: Path, name: str) -> Any:
        file = ModuleFile.of(Bundle.open(path), name)
        return OnnxRuntimeModule(
            file.path, name=name, inputs=file.inputs, outputs=file.outputs, threads=1, spinning=False
        )

    def stream(self) -> Any:
        return CpuStream("contract")

    def foreground_stream(self) -> Any:
        return InlineStream()

    def put(self, array: Array) -> Any:
        return array.copy()

    def get(self, array: Any) -> Array:
        return np.array(array)

    def taken_bytes(self) -> int:
        """Memory that Python and NumPy hold."""
        return tracemalloc.get_traced_memory()[0]

    def strided(self, spec: TensorSpec) -> Any:
        """An array of the right dtype and shape that is not contiguous."""
        *rest, last = spec.shape
        return np.zeros((*rest, 2 * last), spec.dtype)[..., ::2]

    def close(self) -> None:
        pass


class CudaRig:
    """A GPU, or the driver in software."""

    def __init__(
        self,
        name: str,
        backend: Any,
        folder: Path,
        *,
        options: Mapping[str, Any],
        taken_bytes: Callable[[], int],
    ) -> None:
        self.name = name
        self._backend = backend
        self._cache = folder / "engines"
        self._options = dict(options)
        self._taken_bytes = taken_bytes
        self._device: CudaDevice | None = None
        self._open = ExitStack()

    @property
    def device(self) -> CudaDevice:
        if self._device is None:
            self._device = self._open.enter_context(CudaDevice(0))
        return self._device

    def engine(self, path: Path, *, cuda: Mapping[str, Any] | None = None, **options: Any) -> Engine:
        merged = {"engine_cache": self._cache, "debug": True, **self._options, **(cuda or {})}
        return Engine(path, device="cuda:0", backend=self.backend(), cuda=CudaOptions(**merged), **options)

    def backend(self) -> Any:
        return self._backend() if callable(self._backend) else self._backend

    def module(self, path: Path, name: str) -> Any:
        from warpcache.engine.backends import choose_backend

        bundle = Bundle.open(path)
        backend = self.backend()
        if isinstance(backend, str):
            backend = choose_backend(backend, CudaOptions(engine_cache=self._cache))
        backend.prepare(bundle, [name], [self.device])
        self._stream = self.device.stream("contract")
        return self._stream.call(lambda: backend.load(ModuleFile.of(bundle, name), Site(self._stream)))

    def stream(self) -> Any:
        return self._stream

    foreground_stream = stream

    def put(self, array: Array) -> Any:
        return self.device.upload(array)

    def get(self, array: Any) -> Array:
        return np.array(array) if isinstance(array, np.ndarray) else self.device.download(array)

    def taken_bytes(self) -> int:
        return self._taken_bytes()

    def strided(self, spec: TensorSpec) -> Any:
        from warpcache.kernels.array import DeviceArray

        *rest, last = spec.shape
        wide = self.device.allocate(TensorSpec("wide", spec.dtype, (*rest, 2 * last)))
        strides = tuple(2 * stride for stride in DeviceArray(0, spec.shape, spec.dtype, device=0).strides)
        return DeviceArray(wide.pointer, spec.shape, spec.dtype, device=0, strides=strides, owner=wide)

    def close(self) -> None:
        self._open.close()


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines are built once for the whole suite, as users build them once."""
    return tmp_path_factory.mktemp("contract")


@pytest.fixture(params=RIGS)
def rig(request: pytest.FixtureRequest, engines: Path) -> Iterator[CpuRig | CudaRig]:
    """One device and backend after the other."""
    name: str = request.param
    made: CpuRig | CudaRig
    if name == "cpu-onnxruntime":
        made = CpuRig()
    elif name.startswith("software-cuda"):
        software = request.getfixturevalue("software_cuda")
        made = _software_rig(name, software, engines)
    else:
        made = _hardware_rig(name, engines)
    yield made
    made.close()


def _software_rig(name: str, software: Any, folder: Path) -> CudaRig:
    from tests_software_tensorrt import software_flavour  # type: ignore[import-not-found]

    from warpcache.engine.tensorrt.backend import TensorRtBackend

    options = {"graphs": "off"} if name.endswith("no-graphs") else {"graphs": "on"}
    if name.endswith("lazy"):
        # Work runs as late as CUDA's rules allow: what was not waited for has not happened.
        software.configure(lazy=1)
    return CudaRig(
        name,
        lambda: TensorRtBackend(software_flavour(), engine_cache=folder / "engines"),
        folder,
        options=options,
        taken_bytes=lambda: software.count("device_bytes") + software.count("pinned_bytes"),
    )


def _hardware_rig(name: str, folder: Path) -> CudaRig:
    from warpcache.engine.backends import choose_backend
    from warpcache.engine.errors import DeviceError
    from warpcache.kernels.driver import Context

    backend = name.removeprefix("cuda-")
    try:
        context = Context(0)
    except DeviceError as exc:
        pytest.skip(f"no GPU: {exc}")
    if context.name.startswith("Software CUDA"):
        pytest.skip("no GPU: this process runs on the driver in software")
    if backend == "onnxruntime" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("the installed onnxruntime has no CUDA provider; install onnxruntime-gpu")
    try:
        choose_backend(backend, CudaOptions())
    except BackendError as exc:
        pytest.skip(f"{backend}: {exc}")
    if backend == "tensorrt-rtx":
        from warpcache.engine.tensorrt.flavour import Flavour

        if context.architecture not in Flavour.load("tensorrt-rtx").targets:
            pytest.skip(f"TensorRT-RTX has no code for {context.name} ({context.architecture})")

    def taken() -> int:
        free, total = context.memory
        return total - free

    return CudaRig(name, backend, folder, options={"graphs": "auto"}, taken_bytes=taken)

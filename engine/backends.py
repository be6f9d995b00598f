"""What executes modules on a GPU, by name: ONNX Runtime's CUDA provider, or a TensorRT."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from .bundle.bundle import Bundle
from .cuda.device import CudaDevice, CudaStream
from .cuda.options import CUDA_BACKENDS, CudaOptions
from .cuda.placement import CudaBackend, ModuleFile
from .device.module import CudaModule
from .errors import InputError
from .onnxruntime.cuda import OnnxRuntimeCudaModule
from .tensorrt.engine_cache import EngineCache, default_folder
from .tensorrt.engines import build_engines
from .tensorrt.flavour import CURRENT, Flavour
from .tensorrt.module import TensorRtModule

__all__ = ["OnnxRuntimeCudaBackend", "TensorRtBackend", "choose_backend"]

logger = logging.getLogger(__name__)


def choose_backend(name: str, options: CudaOptions) -> CudaBackend:
    """The backend that users call `name`.

    Raises:
        InputError: If there is none of that name.
        BackendError: If its library is missing.
    """
    if name == "onnxruntime":
        return OnnxRuntimeCudaBackend()
    if name == "tensorrt" or name == "tensorrt-rtx":
        return TensorRtBackend(Flavour.load(name), engine_cache=options.engine_cache, build=options.build)
    raise InputError(f"unknown backend {name!r}; choose one of {', '.join(map(repr, CUDA_BACKENDS))}")


class OnnxRuntimeCudaBackend:
    """ONNX Runtime's CUDA provider: nothing is built, every graph is loaded as it is."""

    name = "onnxruntime"

    def prepare(self, bundle: Bundle, modules: Sequence[str], devices: Sequence[CudaDevice]) -> None:
        """Nothing is to be prepared."""

    def load(self, module: ModuleFile, *, device: CudaDevice, stream: CudaStream) -> CudaModule:
        """Load one graph for one stream."""
        return OnnxRuntimeCudaModule(
            module.path, name=module.name, inputs=module.inputs, outputs=module.outputs, device=device, stream=stream
        )


class TensorRtBackend:
    """TensorRT in either flavour, with engines from the engine cache.

    Args:
        flavour: Which TensorRT.
        engine_cache: Folder of built engines; None for `default_folder` of the bundle.
        build: Build engines that are missing, when they are prepared; False raises instead.
    """

    def __init__(self, flavour: Flavour, *, engine_cache: Path | None = None, build: bool = True) -> None:
        self.name: str = flavour.name
        self._flavour = flavour
        self._folder = engine_cache
        self._build = build
        self._engines: dict[tuple[str, str], bytes] = {}
        self._runtime_caches: dict[tuple[str, str], Path] = {}

    def prepare(self, bundle: Bundle, modules: Sequence[str], devices: Sequence[CudaDevice]) -> None:
        """Find or build the engines of `modules` for the GPUs of `devices`."""
        cache = EngineCache(default_folder(bundle.path) if self._folder is None else self._folder)
        for architecture, device in {device.architecture: device for device in devices}.items():
            # Full TensorRT builds for the current GPU only, so a second architecture is built with that GPU current.
            device.context.make_current()
            for built in build_engines(
                bundle,
                flavour=self._flavour,
                targets=(CURRENT,),
                device=device.ordinal,
                cache=cache,
                modules=modules,
                build=self._build,
            ):
                self._engines[architecture, built.module] = built.engine
                self._runtime_caches[architecture, built.module] = cache.folder / (
                    f"{built.digest}-{architecture}.runtime"
                )
                logger.info("engine of %r for %s: %s", built.module, architecture, "found" if built.reused else "built")

    def load(self, module: ModuleFile, *, device: CudaDevice, stream: CudaStream) -> CudaModule:
        """Load one engine; `prepare` has seen to it that it is there."""
        key = device.architecture, module.name
        return TensorRtModule(
            self._engines[key],
            name=module.name,
            inputs=module.inputs,
            outputs=module.outputs,
            flavour=self._flavour,
            device=device,
            runtime_cache=self._runtime_caches[key],
        )

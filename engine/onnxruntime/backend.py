"""ONNX Runtime by name."""

from __future__ import annotations

from collections.abc import Sequence

from ..bundle.bundle import Bundle
from ..cuda.backend import CudaModule, ModuleFile
from ..cuda.device import CudaDevice, CudaStream
from .cuda import OnnxRuntimeCudaModule

__all__ = ["OnnxRuntimeCudaBackend"]


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

"""ONNX Runtime as a backend, on the CPU and through its CUDA provider."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..bundle.bundle import Bundle
from ..device.module import Module, ModuleFile, Site

__all__ = ["OnnxRuntimeBackend"]


class OnnxRuntimeBackend:
    """Nothing is built; every graph is loaded as it is, for the device of the stream that it is going to run on."""

    name = "onnxruntime"

    def prepare(self, bundle: Bundle, modules: Sequence[str], devices: Sequence[Any]) -> None:
        """Nothing is to be prepared."""

    def load(self, module: ModuleFile, site: Site) -> Module:
        """Load one graph for one stream."""
        # ONNX Runtime, and CUDA, are imported only where a module is loaded.
        device = getattr(site.stream, "device", None)
        if device is not None:
            from .cuda import OnnxRuntimeCudaModule

            return OnnxRuntimeCudaModule(
                module.path,
                name=module.name,
                inputs=module.inputs,
                outputs=module.outputs,
                device=device,
                stream=site.stream,
            )
        from .cpu import OnnxRuntimeModule

        return OnnxRuntimeModule(
            module.path,
            name=module.name,
            inputs=module.inputs,
            outputs=module.outputs,
            threads=site.threads,
            spinning=site.spinning,
        )

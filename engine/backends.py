"""What executes modules, by name: ONNX Runtime, or a TensorRT."""

from __future__ import annotations

from .cuda.options import CUDA_BACKENDS, CudaOptions
from .device.module import Backend
from .errors import InputError
from .onnxruntime.backend import OnnxRuntimeBackend

__all__ = ["choose_backend"]


def choose_backend(name: str, options: CudaOptions | None) -> Backend:
    """The backend that users call `name`.

    Args:
        name: ``onnxruntime``, ``tensorrt`` or ``tensorrt-rtx``.
        options: What was said of the GPU; None on the CPU.

    Raises:
        InputError: If there is none of that name, or it does not run on the CPU.
        BackendError: If its library is missing.
    """
    if name == "onnxruntime":
        return OnnxRuntimeBackend()
    if options is None:
        known = "choose device='cuda:0'" if name in CUDA_BACKENDS else "choose 'onnxruntime'"
        raise InputError(f"backend {name!r} does not run on the CPU; {known}")
    if name in CUDA_BACKENDS:
        # TensorRT and CUDA are imported only where they are asked for.
        from .tensorrt.backend import TensorRtBackend
        from .tensorrt.flavour import Flavour

        return TensorRtBackend(Flavour.load(name), engine_cache=options.engine_cache, build=options.build)
    raise InputError(f"unknown backend {name!r}; choose one of {', '.join(map(repr, CUDA_BACKENDS))}")

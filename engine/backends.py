"""What executes modules on a GPU, by name: ONNX Runtime's CUDA provider, or a TensorRT."""

from __future__ import annotations

import logging

from .cuda.backend import CudaBackend
from .cuda.options import CUDA_BACKENDS, CudaOptions
from .errors import InputError
from .onnxruntime.backend import OnnxRuntimeCudaBackend
from .tensorrt.backend import TensorRtBackend
from .tensorrt.flavour import Flavour

__all__ = ["choose_backend"]

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

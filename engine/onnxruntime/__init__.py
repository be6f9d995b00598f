"""ONNX Runtime as an executor, on the CPU and through its CUDA provider.

Imports `device`, and `cuda` for the provider; inside this folder ``import onnxruntime`` is absolute and means the
library. Another executor gets a folder of its own beside this one and a line in `backends`.
"""

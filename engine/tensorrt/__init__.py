"""TensorRT in both flavours as an executor: engines built in processes of their own, and their cache.

Imports `cuda`, `device`, `bundle` and `files`; inside this folder ``import tensorrt`` is absolute and means the
library. What differs between the flavours goes into `flavour`, and nowhere else.
"""

"""GPUs as devices: streams, events, memory, graphs, and lanes that copy in, run or replay, and copy out.

Imports `device`, `bundle` and `kernels`; CUDA itself is loaded on first use. What runs on a GPU and is no executor
goes here; executors have folders of their own.
"""

"""An ONNX graph as a PyTorch module that can be trained: operators, batching, fused chains.

Imports `graph`. A missing operator is one function in `operators`, or in `image_operators` where it moves pixels.
"""

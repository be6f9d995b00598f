"""Compile time: trace, cut, adapter, calibration. Imports torch and onnx."""

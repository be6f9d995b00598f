"""ONNX graphs: trace, index, surgery, runs, profiles and counts.

Imports nothing of the other folders. What holds of any graph goes here; what belongs to a cut, a branch or a
precision goes there.
"""

"""A synthetic head that speaks and turns: shape, hair, paint, light and motion, rendered in NumPy.

Imports the rasteriser beside it and the kernels' references; no torch. Another part of the head goes into a file of
its own and into `head`.
"""

from __future__ import annotations

from .head import HeadMotion, HeadParameters, SyntheticHead

__all__ = ["HeadMotion", "HeadParameters", "SyntheticHead"]

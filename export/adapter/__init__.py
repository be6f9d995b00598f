"""The trained part at the cut: cache encoder and warp consumers, recorded, distilled, and written as graphs.

Imports `graph`, `frames` and `training`. Another network that reads the cache goes beside `network`, with its graph
in `graphs`. `Surface` is handed on, because users' model files
import it from here.
"""

from __future__ import annotations

from ..frames.surface import Surface

__all__ = ["Surface"]

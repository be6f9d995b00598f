"""A heavy image generator, answered at a shallow network's latency."""

from __future__ import annotations

from pathlib import Path

# In a checkout that is not installed, the sibling folders are the subpackages (see setup.py).
_root = Path(__file__).resolve().parent.parent
if (_root / "setup.py").is_file():
    __path__.append(str(_root))

__version__ = "0.1.0"

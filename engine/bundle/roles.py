"""What the parts of a bundle are for: the roles of its modules and the names of its exits."""

from __future__ import annotations

__all__ = ["Route"]

Route = str
"""An exit's name: ``whole``, ``plain``, ``warp``, ``warp2``, ``branch1``, ..."""

"""Words and widths that tables and pages share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

if TYPE_CHECKING:
    from ..engine.bundle.manifest import Manifest

__all__ = ["NO_PROMISE", "created_text", "size_text"]

# On a pipe there is no terminal to ask for its width; a table broken at 80 columns is hard to read and to search.
PIPE_WIDTH = 120


def created_text(manifest: Manifest) -> str:
    """A bundle's size and frame rate, and by what and when it was made."""
    created = ", ".join(str(manifest.created[key]) for key in ("by", "at") if key in manifest.created)
    fps = f", {manifest.fps:g} frames per second" if manifest.fps is not None else ""
    total = sum(record.size_bytes for record in manifest.files.values())
    return f"{size_text(total)}{fps} ({created})"


def size_text(size_bytes: float) -> str:
    """A size in bytes, short: 1 MB is 1,000,000 bytes."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.3g} {unit}"
    return f"{size_bytes:.0f} B"


NO_PROMISE = "no quality promise; compile with --exits"

"""The kernels that TensorRT-RTX compiled for one GPU, kept in a file between runs.

The library checks what it reads against GPU, driver and version, but is not asked to read what is torn: the file holds
the hash of its content. A cache is worth some seconds of start-up, so nothing here raises; what is wrong is logged.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from pathlib import Path

from ..files.atomic import written_beside

__all__ = ["RuntimeCacheFile"]

logger = logging.getLogger(__name__)

_MAGIC = b"warpcache.runtime.1\n"
_HASH_BYTES = 32


class RuntimeCacheFile:
    """One file; the folder must be one that nobody else may write to.

    Args:
        path: Where it is, or is going to be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held: bytes | None = None

    def read(self) -> bytes | None:
        """What was saved; None if there is nothing. A file that is damaged or another program's is removed."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as exc:
            logger.warning("the runtime cache %s cannot be read (%s); kernels are compiled again", self.path, exc)
            return None
        content = data[len(_MAGIC) + _HASH_BYTES :]
        if data[: len(_MAGIC) + _HASH_BYTES] != _MAGIC + hashlib.sha256(content).digest():
            self.discard("is damaged or no runtime cache")
            return None
        self._held = content
        return content

    def discard(self, reason: str) -> None:
        """Remove the file, because of what `reason` says of it."""
        logger.warning("the runtime cache %s %s; it is removed, and kernels are compiled again", self.path, reason)
        self._held = None
        with contextlib.suppress(OSError):
            self.path.unlink()

    def write(self, content: bytes) -> None:
        """Save, beside and renamed, unless the file holds just that."""
        if content == self._held:
            return
        try:
            with written_beside(self.path) as temporary:
                temporary.write_bytes(_MAGIC + hashlib.sha256(content).digest() + content)
        except OSError as exc:
            logger.warning("the runtime cache %s cannot be written (%s); the next start compiles again", self.path, exc)
            return
        self._held = content

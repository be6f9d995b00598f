"""Writing a file so that it is whole or not there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ..engine.errors import InputError
from ..engine.files import atomic

__all__ = ["explain_write_error", "written_beside"]


@contextlib.contextmanager
def written_beside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path in the folder of `path`; at the end it takes the place of `path` in one step.

    Whatever goes wrong in the block, an interrupt included, the unfinished file is removed and what stood at `path`
    still stands. Missing parent folders are made.

    Args:
        path: The file to write.

    Yields:
        Path of an empty file to write into; its name ends in that of `path`, so that suffixes keep their meaning.

    Raises:
        InputError: If the file cannot be written: full disk, no permission, a folder in the way.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"cannot write {str(path)!r}: it is a folder; give the name of a file")
    try:
        with atomic.written_beside(path) as temporary:
            yield temporary
    except OSError as error:
        raise explain_write_error(path, error) from error


def explain_write_error(path: Path, error: OSError) -> InputError:
    """The one sentence for an operating system's refusal to write `path`."""
    if atomic.disk_is_full(error):
        return InputError(f"cannot write {str(path)!r}: the disk is full; free some space, nothing was left behind")
    reason = os.strerror(error.errno) if error.errno is not None and error.errno > 0 else str(error)
    return InputError(f"cannot write {str(path)!r}: {reason}; choose another place, nothing was left behind")

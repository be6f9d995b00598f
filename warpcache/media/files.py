"""Writing a file so that it is whole or not there."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from ..engine.errors import InputError

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
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, so that the rename never crosses file systems.
        candidate = path.parent / f".partial-{secrets.token_hex(6)}-{path.name}"
        # Not tempfile: its files are readable by their owner alone, and the finished file should be like any other.
        candidate.touch(exist_ok=False)
        temporary = candidate
        yield temporary
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise explain_write_error(path, error) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()


def explain_write_error(path: Path, error: OSError) -> InputError:
    """The one sentence for an operating system's refusal to write `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputError(f"cannot write {str(path)!r}: the disk is full; free some space, nothing was left behind")
    reason = os.strerror(error.errno) if error.errno is not None and error.errno > 0 else str(error)
    return InputError(f"cannot write {str(path)!r}: {reason}; choose another place, nothing was left behind")

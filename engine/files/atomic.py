"""Files and folders that are whole or not there: written beside their place, and renamed at the end.

What the system refuses comes as its `OSError`; the words are the caller's, who knows what was being written.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

__all__ = ["PARTIAL", "disk_is_full", "folder_beside", "written_beside"]

PARTIAL = ".partial-"
"""How the name of what is unfinished begins; a process that is killed leaves it behind."""


@contextlib.contextmanager
def written_beside(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Give a temporary file in the folder of `path`; at the end it takes the place of `path` in one step.

    Whatever goes wrong, an interrupt included, the unfinished file is removed and what stood at `path` still stands.
    Missing parent folders are made.

    Args:
        path: The file to write.
        durable: Return only when it is on the disk, so that it outlives a loss of power.

    Yields:
        Path of an empty file to write into; its name ends in that of `path`, so that suffixes keep their meaning.

    Raises:
        OSError: If it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _name_beside(path)
    try:
        # Not tempfile: its files are readable by their owner alone, and the finished file should be like any other.
        temporary.touch(exist_ok=False)
        yield temporary
        if durable:
            with temporary.open("rb+") as file:  # Windows syncs only what is open for writing
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    if durable:
        _sync_parent(path)


@contextlib.contextmanager
def folder_beside(path: Path, *, replace: bool = False, durable: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `path`; at the end it takes that place.

    Whatever goes wrong, an interrupt included, the unfinished folder is removed and what stood at `path` still stands.
    Missing parent folders are made.

    Args:
        path: The folder to write.
        replace: Take the place of what stands at `path` by the end; otherwise a full folder there is an error.
        durable: Sync the folder's entries before, and its parent's after it is moved. Syncing the files in it is the
            caller's part.

    Yields:
        Path of an empty folder to write into.

    Raises:
        OSError: If it cannot be written or moved.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _name_beside(path)
    try:
        temporary.mkdir()
        yield temporary
        if durable:
            _sync_folder(temporary)
        if replace and os.path.lexists(path):
            _replace_folder(temporary, path)
        else:
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if durable:
        _sync_parent(path)


def disk_is_full(error: OSError) -> bool:
    """Whether the system refused for want of room: on the disk, or in the user's share of it."""
    return error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


def _name_beside(path: Path) -> Path:
    """In the same folder, so that the rename never crosses file systems and is one step."""
    return path.parent / f"{PARTIAL}{secrets.token_hex(6)}-{path.name}"


def _replace_folder(temporary: Path, path: Path) -> None:
    """A folder cannot be renamed over a full one: the old one steps aside, and back if the second step fails."""
    aside = _name_beside(path)
    try:
        path.rename(aside)
        temporary.rename(path)
    except BaseException:
        if aside.exists() and not path.exists():
            aside.rename(path)
        raise
    finally:
        # The old one may be removed only where the new one, or it itself, stands at `path`.
        if path.exists():
            shutil.rmtree(aside, ignore_errors=True)


def _sync_parent(path: Path) -> None:
    # What was renamed stands; that this may not yet be on the disk is no reason to call it unwritten.
    with contextlib.suppress(OSError):
        _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    """Make a folder's entries durable, where it can be done: not on Windows, and not on every network file system."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)

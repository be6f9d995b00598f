"""A lock between processes that dies with the process that holds it."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["FileLock"]

logger = logging.getLogger(__name__)

# What flock says where a file system (some network ones) knows no locks.
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_REFUSED = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,  # a file where the folder is to be
    errno.ENOENT,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}


class FileLock:
    """Lets one holder in at a time, among the processes and threads that lock the same file.

    It is the operating system's lock on an open file, not the file's being there: what a killed process leaves behind
    blocks nobody. The file itself stays, since removing it would let two in. The thread that holds it may take it
    again through the same object.

    Args:
        path: The file; it and its folder are made when they are missing.
        waiting_for: What the log says another process is doing, e.g. ``"building engines"``.
    """

    def __init__(self, path: Path, *, waiting_for: str) -> None:
        self.path = path
        self._waiting_for = waiting_for
        self._turn = threading.RLock()
        self._depth = 0
        self._held = False

    @contextlib.contextmanager
    def __call__(self) -> Iterator[bool]:
        """Hold the lock for the block; a second taker waits, and can be interrupted while it does.

        Yields:
            Whether the lock is really held: not where the folder is read-only or its file system knows no locks. That
            is no error: there nothing can be written, or writing is safe but may be done twice.
        """
        with self._turn:
            descriptor: int | None = None
            try:
                if self._depth == 0:
                    descriptor = self._open()
                    self._held = descriptor is not None and self._acquire(descriptor)
                self._depth += 1
                try:
                    yield self._held
                finally:
                    self._depth -= 1
            finally:
                if descriptor is not None:
                    # Unlocked by name: a process that was forked meanwhile has the same open file, and keeps it.
                    if self._held:
                        self._held = False
                        _unlock(descriptor)
                    os.close(descriptor)

    def _open(self) -> int | None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        except OSError as exc:
            if exc.errno not in _REFUSED:
                raise
            logger.debug("no lock at %s: %s", self.path, exc)
            return None

    def _acquire(self, descriptor: int) -> bool:
        try:
            if not _lock(descriptor, wait=False):
                logger.info("another process is %s (%s is locked); waiting for it", self._waiting_for, self.path)
                _lock(descriptor, wait=True)
        except OSError as exc:
            if exc.errno not in _UNSUPPORTED:
                raise
            logger.info("%s cannot be locked (%s); two processes may do the same work twice", self.path, exc.strerror)
            return False
        return True


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int, *, wait: bool) -> bool:
        """Lock the first byte; Windows cannot wait for it without end, so it is asked for again and again."""
        while True:
            try:
                os.lseek(descriptor, 0, os.SEEK_SET)
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
                return True
            except OSError as exc:
                if exc.errno not in (errno.EACCES, errno.EDEADLOCK):
                    raise
                if not wait:
                    return False
                time.sleep(0.1)

    def _unlock(descriptor: int) -> None:
        os.lseek(descriptor, 0, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _lock(descriptor: int, *, wait: bool) -> bool:
        # flock, not lockf: the latter is per process, so two threads would both get in.
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True

    def _unlock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)

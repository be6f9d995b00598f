"""Bundles written: beside their place, verified, and renamed, so that one is whole or not there."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import BundleError
from .bundle import _BLOCK_BYTES, MANIFEST, MAX_MANIFEST_BYTES, SUFFIX, Bundle, _explained, _verify
from .manifest import FILE_NAME, FileRecord, Manifest

__all__ = ["write_bundle"]


def write_bundle(
    path: str | Path, manifest: Manifest, files: Mapping[str, Path | bytes], *, overwrite: bool = False
) -> Bundle:
    """Write a bundle beside its place, verify it, and rename it there.

    Whatever goes wrong, an interrupt included, the unfinished folder is removed and what stood at `path` still stands.
    Missing parent folders are made.

    Args:
        path: Where it is to be; the name ends in ``.warp``.
        manifest: Everything but `Manifest.files`, which is filled in here.
        files: Content by file name, as bytes or as the path of a file that is copied.
        overwrite: Replace a bundle that stands at `path`; anything there that is not a bundle is refused all the same.

    Returns:
        The bundle, opened from its final place.

    Raises:
        BundleError: If the name is wrong, something is in the way, manifest and files do not fit, or the disk is full.
    """
    path = Path(path)
    if path.suffix != SUFFIX or path.name == SUFFIX:
        raise BundleError(f"a bundle's name ends in {SUFFIX}, but {str(path)!r} was given; call it e.g. 'head{SUFFIX}'")
    _check_in_the_way(path, overwrite)
    for name in files:
        if FILE_NAME.fullmatch(name) is None:
            raise BundleError(
                f"a bundle cannot hold a file called {name!r}; use a plain name.onnx, .npz or .safetensors"
            )
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, so that the rename never crosses file systems and is one step.
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        records = {name: _write(temporary / name, content) for name, content in files.items()}
        manifest = dataclasses.replace(manifest, files=records)
        text = manifest.to_json().encode()
        if len(text) > MAX_MANIFEST_BYTES:
            raise BundleError(f"the manifest of {path} takes {len(text)} bytes, over the limit of {MAX_MANIFEST_BYTES}")
        _write(temporary / MANIFEST, text)
        # mkdtemp makes a private folder; a bundle is as readable as anything else its owner writes.
        temporary.chmod(0o777 & ~_umask())
        _sync_folder(temporary)
        with _explained(path):
            _verify(temporary)
        _move_into_place(temporary, path, overwrite)
        temporary = None
        # The bundle stands; that the rename may not yet be on the disk is no reason to call it unwritten.
        with contextlib.suppress(OSError):
            _sync_folder(path.parent)
    except OSError as exc:
        raise _write_error(path, files, exc) from exc
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return Bundle(path, manifest)


def _write(target: Path, content: Path | bytes) -> FileRecord:
    """Write one file in blocks, on to the disk, and return what was written."""
    digest = hashlib.sha256()
    size_bytes = 0
    with target.open("xb") as file:
        for block in _blocks(content):
            digest.update(block)
            size_bytes += len(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(size_bytes, digest.hexdigest())


def _blocks(content: Path | bytes) -> Iterator[bytes]:
    if isinstance(content, bytes | bytearray | memoryview):
        yield bytes(content)
        return
    with content.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            yield block


def _check_in_the_way(path: Path, overwrite: bool) -> None:
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise BundleError(f"{path} exists already; remove it, choose another name, or ask for overwriting")
    if path.is_symlink() or not (path / MANIFEST).is_file():
        raise BundleError(f"{path} exists and is not a bundle; it is not overwritten, remove it or choose another name")


def _move_into_place(temporary: Path, path: Path, overwrite: bool) -> None:
    _check_in_the_way(path, overwrite)
    if not os.path.lexists(path):
        temporary.rename(path)
        return
    # A folder cannot be renamed over a full one: the old one steps aside, and comes back if the second step fails.
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    try:
        path.rename(aside / path.name)
        temporary.rename(path)
    except BaseException:
        if (aside / path.name).exists() and not path.exists():
            (aside / path.name).rename(path)
        raise
    finally:
        # The old bundle may be removed only where the new one, or it itself, stands at `path`.
        if path.exists():
            shutil.rmtree(aside, ignore_errors=True)


def _write_error(path: Path, files: Mapping[str, Path | bytes], exc: OSError) -> BundleError:
    if exc.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        needed = sum(_size_of(content) for content in files.values())
        free: Any = "an unknown number of"
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(path.parent).free
        return BundleError(
            f"the disk is full: bundle {path} needs {needed} bytes and its manifest, {free} are free; "
            "nothing was written, make room and try again"
        )
    return BundleError(f"bundle {path} cannot be written: {exc}; nothing was written")


def _size_of(content: Path | bytes) -> int:
    if isinstance(content, Path):
        with contextlib.suppress(OSError):
            return content.stat().st_size
        return 0
    return len(content)


def _umask() -> int:
    # There is no way to read it but to set it.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


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

"""Bundles written: beside their place, verified, and renamed, so that one is whole or not there."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import BundleError
from ..files.atomic import disk_is_full, folder_beside
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
    try:
        with folder_beside(path, replace=overwrite, durable=True) as folder:
            records = {name: _write(folder / name, content) for name, content in files.items()}
            manifest = dataclasses.replace(manifest, files=records)
            text = manifest.to_json().encode()
            if len(text) > MAX_MANIFEST_BYTES:
                raise BundleError(
                    f"the manifest of {path} takes {len(text)} bytes, over the limit of {MAX_MANIFEST_BYTES}"
                )
            _write(folder / MANIFEST, text)
            with _explained(path):
                _verify(folder)
            _check_in_the_way(path, overwrite)
    except OSError as exc:
        raise _write_error(path, files, exc) from exc
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


def _write_error(path: Path, files: Mapping[str, Path | bytes], exc: OSError) -> BundleError:
    if disk_is_full(exc):
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

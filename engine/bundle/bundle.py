"""Bundles: the folder that is shipped, opened with nothing trusted and written so that it is whole or not there.

`Bundle.open` compares every byte of the folder with the manifest before anything of it is executed. The manifest
itself is not signed: who can write the folder can write a consistent manifest too, so that a bundle is as trustworthy
as where it comes from; what is ruled out is damage, stray files, links, and paths that leave the folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import stat
import zipfile
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import BundleError
from ..spec import Array
from .external_data import external_tensors
from .manifest import FORMAT, KINDS, Cut, ExitRecord, FileRecord, InputRecord, Manifest, ModuleRecord

__all__ = ["FORMAT", "Bundle", "Cut", "ExitRecord", "FileRecord", "InputRecord", "Manifest", "ModuleRecord"]

MANIFEST = "manifest.json"
SUFFIX = ".warp"
MAX_MANIFEST_BYTES = 8 * 2**20
_BLOCK_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A verified bundle on disk.

    Attributes:
        path: Its folder.
        manifest: What it says about itself; the files were compared with it when it was opened.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Verify a bundle: its manifest, then the folder's entries, then size and hash of every file.

        Reads every file once, in blocks. `path` itself may be a link; nothing in the folder may.

        Raises:
            BundleError: If anything is missing, superfluous, altered, of an unknown version or absurd; the message
                names the file.
        """
        path = Path(path)
        with _explained(path):
            return cls(path, _verify(path))

    def file(self, name: str) -> Path:
        """The path of one of the bundle's files.

        Raises:
            BundleError: If the manifest lists no such file.
        """
        if name not in self.manifest.files:
            raise BundleError(
                f"bundle {self.path} has no file {name!r}; it has: {', '.join(sorted(self.manifest.files))}"
            )
        return self.path / name

    def first_state(self) -> dict[str, Array]:
        """The first frame's value of every state tensor, by the name it is read by; C-contiguous.

        Raises:
            BundleError: If the file does not hold it in the state's dtype and shape.
        """
        found: dict[str, Array] = {}
        for record in self.manifest.state:
            spec = record.input
            if record.initial is None:
                found[spec.name] = np.zeros(spec.shape, spec.dtype)
                continue
            try:
                with np.load(self.file(record.initial), allow_pickle=False) as arrays:
                    array = arrays[spec.name]
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as exc:
                raise BundleError(
                    f"bundle {self.path}: file {record.initial!r} does not hold the first value of state {spec.name!r} "
                    f"({exc}); compile the bundle again"
                ) from exc
            if array.shape != spec.shape or array.dtype != spec.dtype:
                raise BundleError(
                    f"bundle {self.path}: the first value of state {spec.name!r} is {array.dtype} {list(array.shape)}, "
                    f"but the state is {spec.dtype} {list(spec.shape)}; compile the bundle again"
                )
            found[spec.name] = np.ascontiguousarray(array)
        return found


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Put the bundle's path before a message, and turn what the file system raises into a BundleError."""
    try:
        yield
    except BundleError as exc:
        raise BundleError(f"bundle {path}: {exc}") from exc.__cause__
    except OSError as exc:
        raise BundleError(f"bundle {path} cannot be read: {exc}") from exc


def _verify(folder: Path) -> Manifest:
    manifest = Manifest.from_json(_read_manifest(folder))
    _check_entries(folder, manifest)
    for name, record in manifest.files.items():
        _check_content(folder, name, record, manifest.files)
    return manifest


def _read_manifest(path: Path) -> bytes:
    if not path.is_dir():
        raise BundleError("there is no such folder" if not path.exists() else "it is not a folder")
    try:
        with _open_regular(path / MANIFEST) as file:
            # One byte more than allowed, whatever stat said: the limit holds for a file that grows meanwhile too.
            content: bytes = file.read(MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        raise BundleError(f"{MANIFEST} is missing; this is not a bundle, or an incomplete copy of one") from None
    if len(content) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{MANIFEST} is larger than {MAX_MANIFEST_BYTES} bytes")
    return content


def _check_entries(path: Path, manifest: Manifest) -> None:
    found = set()
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_symlink():
                raise BundleError(f"{entry.name!r} is a symbolic link; a bundle holds only files of its own")
            if entry.is_dir(follow_symlinks=False):
                raise BundleError(f"{entry.name!r} is a folder; the files of a bundle lie directly in it")
            if entry.name == MANIFEST:
                continue
            if entry.name not in manifest.files:
                raise BundleError(
                    f"file {entry.name!r} is not listed in {MANIFEST}; remove it or copy the bundle again"
                )
            found.add(entry.name)
    for name in manifest.files:
        if name not in found:
            raise BundleError(f"file {name!r} is missing; copy the bundle again")
    for name, module in manifest.modules.items():
        if module.file not in manifest.files:
            raise BundleError(f"{MANIFEST}: module {name!r} refers to {module.file!r}, which files does not list")
        suffix = KINDS[module.kind]
        if not module.file.endswith(suffix):
            raise BundleError(f"{MANIFEST}: module {name!r} refers to {module.file!r}, which is no {suffix} file")


def _check_content(path: Path, name: str, record: FileRecord, files: Mapping[str, FileRecord]) -> None:
    with _open_regular(path / name) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        # Size first: an oversized file is refused without reading it.
        if size_bytes != record.size_bytes:
            raise BundleError(
                f"file {name!r} has {size_bytes} bytes, {MANIFEST} says {record.size_bytes}; copy the bundle again"
            )
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != record.sha256:
            raise BundleError(
                f"file {name!r} has been altered: its SHA-256 is {digest}, {MANIFEST} says {record.sha256}; "
                "copy the bundle again"
            )
        if name.endswith(".onnx"):
            _check_references(file, name, files)


def _check_references(file: BinaryIO, name: str, files: Mapping[str, FileRecord]) -> None:
    """A graph may read only the bundle's own files, and only what is in them."""
    try:
        tensors = external_tensors(file)
    except BundleError as exc:
        raise BundleError(f"file {name!r} is refused: {exc}") from exc.__cause__
    for tensor in tensors:
        if tensor.location not in files:
            raise BundleError(
                f"file {name!r} reads {tensor.location!r} for its tensor {tensor.name!r}, "
                "which is not a file of the bundle; compile the bundle again"
            )
        end = tensor.offset + (tensor.size_bytes or 0)
        if end > files[tensor.location].size_bytes:
            raise BundleError(
                f"file {name!r} reads bytes {tensor.offset} to {end} of {tensor.location!r} for its tensor "
                f"{tensor.name!r}, but that has {files[tensor.location].size_bytes}; compile the bundle again"
            )


def _open_regular(path: Path) -> BufferedReader:
    """Open a file that is no link, pipe or device, without waiting for a writer at a pipe's other end."""
    if path.is_symlink():
        raise BundleError(f"{path.name!r} is a symbolic link; a bundle holds only files of its own")
    # Windows knows neither flag; there the check above is all there is.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    file = os.fdopen(os.open(path, flags), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise BundleError(f"{path.name!r} is not a regular file")
    return file

"""Built engines on disk, found again by everything they were built from; what does not match is never loaded.

A file is named ``<digest>-<target>+<target>.engine`` and holds a magic word, a header (what the engine was built from,
how large it is, its hash), the header's own hash, and the engine. Both hashes are checked at every read. They say that
a file is whole and is what was asked for, not who made it: the folder must be one that nobody else may write to.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...kernels.compiler import cache_folder
from ..bundle.graph_digest import graph_digest
from ..errors import BackendError, InputError
from ..files.atomic import PARTIAL, disk_is_full, written_beside
from ..files.lock import FileLock
from ..spec import TensorSpec

__all__ = ["EngineCache", "EngineKey", "default_folder", "graph_digest"]

logger = logging.getLogger(__name__)

_SCHEMA = 1
_MAGIC = b"warpcache.engine"
_HASH_BYTES = 32
_MAX_HEADER_BYTES = 1 << 20
_SUFFIX = ".engine"
_TARGET = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")
_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class EngineKey:
    """Everything an engine depends on.

    Attributes:
        graph: `graph_digest` of the graph it is built from.
        inputs: The graph's inputs; their order does not matter, they are bound by name.
        outputs: The graph's outputs.
        precision: What the bundle's graphs were written in, e.g. ``"fp16"``.
        flavour: Which library builds and runs it: ``"tensorrt"`` or ``"tensorrt-rtx"``.
        version: That library's full version; engines are of no use to another.
        targets: The GPUs it is for, e.g. ``("sm_86", "sm_89")``; kept sorted and without repeats.
        options: Everything else the builder was told, by name; kept sorted.

    Raises:
        InputError: If `graph` is no hash, a text is empty, or a target cannot be part of a file's name.
    """

    graph: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    precision: str
    flavour: str
    version: str
    targets: tuple[str, ...]
    options: Mapping[str, str]

    def __post_init__(self) -> None:
        if not _HEX_DIGEST.fullmatch(self.graph):
            raise InputError(f"{self.graph!r} is no graph's hash; take it from graph_digest()")
        for what in ("precision", "flavour", "version"):
            if not getattr(self, what):
                raise InputError(f"the engine's {what} is empty; an engine without it could not be told from others")
        targets = tuple(sorted(set(self.targets)))
        if isinstance(self.targets, str) or not targets:
            raise InputError(f"the engine's targets are {self.targets!r}; name at least one, e.g. ('sm_89',)")
        for target in targets:
            if not _TARGET.fullmatch(target):
                raise InputError(f"the engine's target {target!r} is no name of a GPU architecture, such as 'sm_89'")
        for name, value in self.options.items():
            if not isinstance(name, str) or not isinstance(value, str):
                raise InputError(f"the engine's option {name!r} is {value!r}; options are texts")
        object.__setattr__(self, "inputs", tuple(self.inputs))
        object.__setattr__(self, "outputs", tuple(self.outputs))
        object.__setattr__(self, "targets", targets)
        object.__setattr__(self, "options", MappingProxyType(dict(sorted(self.options.items()))))

    def __hash__(self) -> int:
        return hash((self.digest, self.targets))

    @cached_property
    def digest(self) -> str:
        """Hash of everything but the targets, 64 hexadecimal digits: a file may serve more targets than are asked."""
        record = self.to_record()
        del record["targets"]
        return hashlib.sha256(_canonical({"schema": _SCHEMA, **record})).hexdigest()

    @property
    def file_name(self) -> str:
        """Name of the file that `EngineCache.store` writes."""
        return f"{self.digest}-{'+'.join(self.targets)}{_SUFFIX}"

    def to_record(self) -> dict[str, Any]:
        """The key as JSON-ready values, the same for equal keys."""
        return {
            "graph": self.graph,
            "inputs": _specs(self.inputs),
            "outputs": _specs(self.outputs),
            "precision": self.precision,
            "flavour": self.flavour,
            "version": self.version,
            "targets": list(self.targets),
            "options": dict(self.options),
        }


class EngineCache:
    """A folder of built engines, shared by any number of processes.

    Args:
        folder: Where the files lie; made when the first is written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        # One lock for the folder: builds of one machine would only disturb each other's timing of kernels.
        self._lock = FileLock(self.folder / ".lock", waiting_for="building engines")

    def find(self, key: EngineKey) -> bytes | None:
        """The engine for `key`, or None.

        A file serves if it was built from the same and its targets include all of the key's. A file under the right
        name that is torn, altered or of something else is removed, which is logged; one of a schema that this version
        does not know is left alone. Neither is ever returned.
        """
        for path in self._candidates(key):
            try:
                return _read(path, key)
            except _UnknownSchema as exc:
                logger.info("the engine %s is not used: %s", path, exc)
            except _Unusable as exc:
                self._discard(path, exc)
            except FileNotFoundError:
                pass  # somebody replaced or removed it meanwhile
            except OSError as exc:
                logger.warning("the engine %s cannot be read (%s); it is built again", path, exc.strerror or exc)
        return None

    def missing(self, keys: Iterable[EngineKey]) -> list[EngineKey]:
        """Those of `keys` for which `find` has nothing, in order and without repeats.

        To build several in one go: ``with cache.locked(): ...`` around `missing`, the build, and a `store` for each.
        """
        return [key for key in dict.fromkeys(keys) if self.find(key) is None]

    def store(self, key: EngineKey, engine: bytes) -> Path:
        """Write an engine: beside its place, on to the disk, then renamed.

        Returns:
            The file.

        Raises:
            BackendError: If the engine is empty.
            InputError: If it cannot be written: full disk, no permission. Nothing is left behind.
        """
        if not engine:
            raise BackendError("an empty engine was to be stored; the builder gave nothing, build it again")
        path = self.folder / key.file_name
        with self.locked() as held:
            try:
                if held:
                    # Whoever writes holds the lock: what is unfinished now is from a process that was killed.
                    for stale in self.folder.glob(f"{PARTIAL}*{_SUFFIX}"):
                        stale.unlink(missing_ok=True)
                with written_beside(path, durable=True) as temporary, temporary.open("wb") as file:
                    file.writelines(_file_parts(key, engine))
            except OSError as exc:
                raise _explain(path, len(engine), exc) from exc
        logger.info("stored an engine of %d bytes as %s", len(engine), path)
        return path

    def get_or_build(self, key: EngineKey, build: Callable[[], bytes]) -> tuple[bytes, bool]:
        """The engine for `key`, built if it is not there; two processes that ask at once build it once.

        Args:
            key: What is wanted.
            build: Makes the engine; called with the lock held. What it raises passes through: nothing is left behind,
                and the next process gets its turn.

        Returns:
            The engine, and whether it was built now. An engine that was built is returned also where it cannot be
            stored; that is a warning.

        Raises:
            BackendError: If `build` gives an empty engine.
        """
        engine = self.find(key)
        if engine is not None:
            return engine, False
        with self.locked():
            # Somebody else may have built it while we waited for the lock.
            engine = self.find(key)
            if engine is not None:
                return engine, False
            engine = build()
            try:
                self.store(key, engine)
            except InputError as exc:
                logger.warning("%s; the engine serves this process only", exc)
            return engine, True

    @contextlib.contextmanager
    def locked(self) -> Iterator[bool]:
        """Keep other processes and threads from building in this folder; may be nested on one `EngineCache`.

        Yields:
            Whether the lock is held; not in a read-only folder or on a file system without locks, which is no error.
        """
        with self._lock() as held:
            yield held

    def _candidates(self, key: EngineKey) -> list[Path]:
        """Files that by their names could serve `key`, those with the fewest targets first."""
        wanted = set(key.targets)
        found = []
        try:
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    targets = _targets_of(entry.name, key.digest)
                    if targets is not None and wanted <= set(targets):
                        found.append((len(targets), entry.name))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as exc:
            logger.warning("the engine cache %s cannot be read (%s)", self.folder, exc.strerror or exc)
            return []
        return [self.folder / name for _, name in sorted(found)]

    def _discard(self, path: Path, reason: _Unusable) -> None:
        try:
            # Not if somebody has put another file there since it was read.
            if reason.identity is None or _identity(path.lstat()) == reason.identity:
                path.unlink()
            logger.warning("the engine %s was removed: %s; it is built again", path, reason)
        except OSError as exc:
            logger.warning("the engine %s is not used: %s; it cannot be removed (%s)", path, reason, exc.strerror)


def default_folder(bundle_path: str | Path | None = None) -> Path:
    """Where the engines of a bundle are kept; without a bundle, where those of all are that bring no folder along.

    ``engines/`` beside the bundle where that folder is there (a deployment), else ``engines`` in the cache folder:
    WARPCACHE_CACHE, or that of the user.

    Raises:
        InputError: If the user has no home folder and nothing else is set.
    """
    if bundle_path is not None and (beside := Path(bundle_path).absolute().parent / "engines").is_dir():
        return beside
    try:
        return cache_folder().absolute() / "engines"
    except RuntimeError as exc:
        raise InputError(
            "there is no home folder to keep engines in; set WARPCACHE_CACHE to a folder that can be written"
        ) from exc


class _Unusable(Exception):
    """A file under an engine's name that is not that engine; `identity` says which file it was."""

    identity: tuple[int, int] | None = None


class _UnknownSchema(_Unusable):
    """A whole file of a form that this version does not know."""


def _file_parts(key: EngineKey, engine: bytes) -> Iterator[bytes]:
    header = _canonical(
        {
            "schema": _SCHEMA,
            "key": key.to_record(),
            "engine": {"size_bytes": len(engine), "sha256": hashlib.sha256(engine).hexdigest()},
        }
    )
    yield _MAGIC + len(header).to_bytes(4, "little")
    yield header
    yield hashlib.sha256(header).digest()
    yield engine


def _read(path: Path, key: EngineKey) -> bytes:
    # Without waiting for a writer at a pipe's other end, should there be one under that name.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    with os.fdopen(os.open(path, flags), "rb") as file:
        status = os.fstat(file.fileno())
        try:
            if not stat.S_ISREG(status.st_mode):
                raise _Unusable("it is no regular file")
            expected = _check_header(file.read(len(_MAGIC) + 4), file, path, key)
            size_bytes = status.st_size - file.tell()
            if size_bytes != expected["size_bytes"]:
                raise _Unusable(f"it holds {size_bytes} bytes of engine, its header says {expected['size_bytes']}")
            engine: bytes = file.read(size_bytes)
            if hashlib.sha256(engine).hexdigest() != expected["sha256"]:
                raise _Unusable("its engine has been altered")
        except _Unusable as exc:
            exc.identity = _identity(status)
            raise
    return engine


def _check_header(start: bytes, file: Any, path: Path, key: EngineKey) -> dict[str, Any]:
    """What the header says of the engine, once the header is known to be whole and that of `key`."""
    if start[: len(_MAGIC)] != _MAGIC or len(start) != len(_MAGIC) + 4:
        raise _Unusable("it is no engine of this cache")
    size_bytes = int.from_bytes(start[len(_MAGIC) :], "little")
    if size_bytes > _MAX_HEADER_BYTES:
        raise _Unusable("its header is damaged")
    header = file.read(size_bytes)
    if hashlib.sha256(header).digest() != file.read(_HASH_BYTES):
        raise _Unusable("its header is damaged")
    # What follows was written by some version of this program, or forged: then it fails one of the comparisons.
    try:
        content = json.loads(header)
        schema = content["schema"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise _Unusable("its header is damaged") from None
    if schema != _SCHEMA:
        raise _UnknownSchema(f"its schema is {schema!r}, this version knows {_SCHEMA}; it is built again")
    record = {**key.to_record(), "targets": _targets_of(path.name, key.digest)}
    expected = content.get("engine")
    if content.get("key") != record:
        raise _Unusable("it was built from something else than its name says")
    if not isinstance(expected, dict) or not isinstance(expected.get("size_bytes"), int) or expected["size_bytes"] < 1:
        raise _Unusable("its header is damaged")
    return expected


def _targets_of(name: str, digest: str) -> list[str] | None:
    """The targets in a file's name, if it is an engine's of that digest."""
    if not (name.startswith(f"{digest}-") and name.endswith(_SUFFIX)):
        return None
    return name[len(digest) + 1 : -len(_SUFFIX)].split("+")


def _specs(specs: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
    return [
        {"name": spec.name, "dtype": spec.dtype, "shape": [int(extent) for extent in spec.shape]}
        for spec in sorted(specs, key=lambda spec: spec.name)
    ]


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _explain(path: Path, size_bytes: int, exc: OSError) -> InputError:
    if disk_is_full(exc):
        return InputError(
            f"the engine {path.name} of {size_bytes} bytes cannot be stored: the disk of {path.parent} is full; "
            "make room, or set WARPCACHE_CACHE to another folder"
        )
    return InputError(
        f"the engine {path.name} cannot be stored in {path.parent}: {exc.strerror or exc}; "
        "set WARPCACHE_CACHE to a folder that can be written"
    )

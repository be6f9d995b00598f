"""CUDA C++ to machine code (cubin) by NVRTC, kept on disk: no GPU, driver or toolkit is needed to compile.

Machine code rather than PTX: a driver loads it as it is, so the first frame waits for no compiler in the driver, and an
NVRTC newer than the driver does no harm.

The cache is our own and not `cuda.core.utils.FileStreamProgramCache`: that one gives back whatever its file holds, and
its key needs NVRTC, which a deployed machine may do without.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .driver import first_line
from .errors import BackendError

__all__ = ["ARCHITECTURES", "cache_folder", "cached_cubin", "compile_cubin"]

logger = logging.getLogger(__name__)

ARCHITECTURES = (
    "sm_75",  # Turing
    "sm_80",  # A100
    "sm_86",  # GeForce 30, A10
    "sm_87",  # Jetson Orin
    "sm_89",  # GeForce 40, L4
    "sm_90",  # Hopper
    "sm_100",  # B200
    "sm_103",  # B300
    "sm_110",  # Jetson Thor
    "sm_120",  # GeForce 50
    "sm_121",  # DGX Spark
)
"""The GPUs that every kernel is compiled for in the tests; others that NVRTC knows serve as well."""

_NO_DEFINES: Mapping[str, str | int] = MappingProxyType({})
_MAGIC = b"warpcache cubin 1\n"
_ELF = b"\x7fELF"
# Multiplications and additions are not contracted: results are the NumPy references' to the bit on every GPU, and
# kernels that wait for memory lose nothing.
_OPTIONS = "c++17 -fmad=false"


def compile_cubin(
    source: str, arch: str, *, name: str = "kernel.cu", defines: Mapping[str, str | int] = _NO_DEFINES
) -> bytes:
    """Compile CUDA C++ (17) for one GPU architecture.

    CUDA's own headers (``cuda_fp16.h`` and others) can be included. Multiply and add are not fused.

    Args:
        source: The text of a ``.cu`` file.
        arch: As `ARCHITECTURES` has them, e.g. ``"sm_89"``.
        name: What the compiler's messages call the source.
        defines: Preprocessor macros.

    Returns:
        The cubin, an ELF file.

    Raises:
        BackendError: If cuda-python, NVRTC or a header is missing (the message names the package), the architecture is
            unknown to this NVRTC, or the source does not compile (the message holds the compiler's log).
    """
    core = _cuda_core()
    # Without an architecture NVRTC would be told the GPU's, and there may be none here.
    number = _number(arch)
    supported = _supported_architectures()
    if number not in supported:
        major, minor = _nvrtc_version()
        raise BackendError(
            f"NVRTC {major}.{minor} cannot compile for {arch}; it knows "
            f"{', '.join(f'sm_{known}' for known in supported)}; take one of these, "
            "or install an nvidia-cuda-nvrtc as new as the GPU"
        )
    include = _header_directory()
    options = core.ProgramOptions(
        name=name,
        std="c++17",
        arch=arch,
        fma=False,
        include_path=include,
        define_macro=[(key, str(value)) for key, value in sorted(defines.items())] or None,
    )
    try:
        code: bytes = bytes(core.Program(source, "c++", options).compile("cubin").code)
    # cuda.core's NVRTCError derives from Exception alone and is not public, so it cannot be named here.
    except Exception as exc:
        log = str(exc).strip()
        if include is None and "could not open source file" in log:
            raise BackendError(
                f"{name} needs CUDA's headers, and none were found; install them with "
                f"pip install nvidia-cuda-runtime, or set CUDA_HOME to a toolkit\n{log}"
            ) from exc
        raise BackendError(f"{name} does not compile for {arch}; correct what the compiler names\n{log}") from exc
    return code


def cached_cubin(
    source: str,
    arch: str,
    *,
    name: str = "kernel.cu",
    defines: Mapping[str, str | int] = _NO_DEFINES,
    folder: Path | None = None,
) -> bytes:
    """As `compile_cubin`, from the cache on disk where it has the same source, architecture and macros.

    An entry that another NVRTC compiled, or with other headers, is compiled again; where NVRTC is not installed it is
    taken, so that a cache filled elsewhere (`folder`, `WARPCACHE_CACHE`) is all that a deployed machine needs. A torn,
    altered or foreign file is compiled again and replaced. Processes that compile the same at the same time do not hurt
    each other.

    Args:
        source: The text of a ``.cu`` file.
        arch: As `ARCHITECTURES` has them.
        name: What the compiler's messages call the source.
        defines: Preprocessor macros.
        folder: Where the entries lie; None for ``kernels/`` in `cache_folder`.

    Raises:
        BackendError: As `compile_cubin`. A folder that cannot be written is a warning in the log, not an error.
    """
    entry = (cache_folder() / "kernels" if folder is None else folder) / _entry_name(source, arch, name, defines)
    found = _read_entry(entry)
    try:
        compiler = _compiler_version()
    except BackendError:
        if found is None:
            raise
        return found[1]
    if found is not None and found[0] == compiler:
        return found[1]
    code = compile_cubin(source, arch, name=name, defines=defines)
    try:
        _write_entry(entry, compiler, code)
    except OSError as exc:
        logger.warning("the compiled kernel %s is not kept: %s; set WARPCACHE_CACHE to a folder of yours", name, exc)
    return code


def cache_folder() -> Path:
    """Where what can be made again is kept: `WARPCACHE_CACHE`, else ``warpcache`` in the user's cache folder."""
    named = os.environ.get("WARPCACHE_CACHE")
    if named:
        return Path(named)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
        return (Path(base) if base else Path.home() / "AppData" / "Local") / "warpcache"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "warpcache"


def _entry_name(source: str, arch: str, name: str, defines: Mapping[str, str | int]) -> str:
    """Covers all that reaches the compiler but the compiler itself and its headers, which the entry records."""
    digest = hashlib.sha256()
    parts = [_OPTIONS, arch, source, *(f"{key}={value}" for key, value in sorted(defines.items()))]
    for part in parts:
        raw = part.encode()
        # The length first: otherwise the end of one part could stand for the start of the next.
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return f"{Path(name).stem}.{arch}.{digest.hexdigest()[:32]}.cubin"


def _read_entry(path: Path) -> tuple[str, bytes] | None:
    """The compiler's version and the cubin of a whole entry, else None."""
    try:
        raw = path.read_bytes()
    except OSError:
        return None
    if not raw.startswith(_MAGIC):
        return None
    header, _, code = raw[len(_MAGIC) :].partition(b"\n")
    compiler, _, checksum = header.decode("ascii", "replace").partition(" ")
    if not code.startswith(_ELF) or hashlib.sha256(code).hexdigest() != checksum:
        return None
    return compiler, code


def _write_entry(path: Path, compiler: str, code: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(prefix=f".{path.stem}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_MAGIC + f"{compiler} {hashlib.sha256(code).hexdigest()}\n".encode("ascii") + code)
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise


def _number(arch: str) -> int:
    prefix, _, digits = arch.partition("_")
    if prefix != "sm" or not digits.isdecimal():
        raise BackendError(f"{arch!r} is no GPU architecture; write it as the compute capability 8.9 is written: sm_89")
    return int(digits)


@functools.cache
def _cuda_core() -> Any:
    try:
        return importlib.import_module("cuda.core")
    except ImportError as exc:
        raise BackendError(
            f'cuda-python cannot be imported ({exc}); install it with pip install "warpcache[cuda]"'
        ) from exc


@functools.cache
def _nvrtc() -> Any:
    try:
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
        nvrtc.nvrtcVersion()
    except ImportError as exc:
        raise BackendError(
            f'cuda-python cannot be imported ({exc}); install it with pip install "warpcache[cuda]"'
        ) from exc
    # cuda-bindings raises RuntimeError, cuda-pathfinder its own error, which is one.
    except RuntimeError as exc:
        raise BackendError(
            f"NVRTC, CUDA's run-time compiler, was not found ({first_line(exc)}); install it with "
            'pip install "nvidia-cuda-nvrtc==13.0.*"'
        ) from exc
    return nvrtc


def _nvrtc_version() -> tuple[int, int]:
    code, major, minor = _nvrtc().nvrtcVersion()
    if code != 0:
        raise BackendError(f"NVRTC does not say its version ({code.name}); install nvidia-cuda-nvrtc again")
    return int(major), int(minor)


@functools.cache
def _compiler_version() -> str:
    """NVRTC's version and that of CUDA's headers, which are packages of their own; "13.0+13000"."""
    major, minor = _nvrtc_version()
    include = _header_directory()
    headers = "none"
    if include is not None:
        with contextlib.suppress(OSError):
            stated = re.search(r"#define CUDA_VERSION (\d+)", Path(include, "cuda.h").read_text("utf-8", "replace"))
            headers = stated.group(1) if stated else "unknown"
    return f"{major}.{minor}+{headers}"


def _supported_architectures() -> tuple[int, ...]:
    code, numbers = _nvrtc().nvrtcGetSupportedArchs()
    if code != 0:
        raise BackendError(f"NVRTC does not say what it can compile for ({code.name}); install nvidia-cuda-nvrtc again")
    return tuple(int(number) for number in numbers)


def _header_directory() -> str | None:
    """CUDA's headers: those of the nvidia-cuda-runtime package, conda's, or a toolkit's (CUDA_HOME)."""
    found: str | None = importlib.import_module("cuda.pathfinder").find_nvidia_header_directory("cudart")
    return found

"""Compile the software driver, and kernels for the host, into a cache folder: each is built once for its content."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

__all__ = ["BuildError", "build_driver", "build_kernels", "compiler", "host_source"]

HERE = Path(__file__).resolve().parent
DRIVER_PARTS = ("device", "control", "memory", "stream", "capture", "kernels", "executor")
# -O1: twice as fast to compile as -O2, and most of the way to its speed.
# No contraction: what a test compares with NumPy must not depend on whether the host has fused multiply-add.
# No fortification: its longjmp refuses to leave one fibre's stack for another's.
FLAGS = (
    "-std=c++17",
    "-O1",
    "-g1",
    "-fPIC",
    "-pthread",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-U_FORTIFY_SOURCE",
)
# In kernels an index that leaves its array stops the thread (so does one of a shared array), and a local array that is
# written past its end is found when the function returns.
KERNEL_FLAGS = (
    "-fsanitize=bounds",
    "-fsanitize-undefined-trap-on-error",
    "-fstack-protector-strong",
    "-Wno-unknown-pragmas",
)


class BuildError(Exception):
    """There is no compiler, no header, or the compiler refused; the message holds its log."""


def compiler() -> str:
    """The C++ compiler: CXX, or the first of c++, g++, clang++ on the path.

    Raises:
        BuildError: If there is none.
    """
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        found = name and shutil.which(name)
        if found:
            return found
    raise BuildError("no C++ compiler is on the path (CXX, c++, g++ or clang++)")


def build_driver() -> Path:
    """The path of libcuda.so.1, compiled if this very source has not been yet (about 8 s on two cores).

    Raises:
        BuildError: If it cannot be compiled here.
    """
    parts = [HERE / f"{part}.cpp" for part in DRIVER_PARTS]
    headers = [HERE / name for name in ("state.h", "executor.h", "kernel_abi.h", "served.inc")]
    folder = _folder("driver", [path.read_bytes() for path in (*parts, *headers)])
    # The name is what dlopen("libcuda.so.1") finds it by once it is loaded.
    target = folder / "libcuda.so.1"
    with _alone_in(folder), tempfile.TemporaryDirectory(dir=folder) as scratch:
        if target.exists():
            return target
        objects = [Path(scratch) / f"{part.stem}.o" for part in parts]
        flags = ["-Wall", "-Wextra", "-isystem", str(_cuda_headers())]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(
                lambda pair: _run([*FLAGS, *flags, "-c", str(pair[0]), "-o", str(pair[1])]),
                zip(parts, objects, strict=True),
            ):
                pass
        built = Path(scratch) / "libcuda.so.1"
        _run([*FLAGS, "-shared", "-Wl,-soname,libcuda.so.1", *map(str, objects), "-o", str(built), "-ldl"])
        # Renamed when it is whole: a run that is ended leaves none that is half written.
        built.replace(target)
    return target


def build_kernels(source: str, name: str, *, include: Sequence[Path] = ()) -> Path:
    """Compile CUDA C++ for the host.

    Args:
        source: Text of a `.cu` file.
        name: What the compiler's messages call it.
        include: Folders of the headers (`.cuh`, `.h`) that it includes with quotes.

    Returns:
        A shared object for `swcuda_add_kernels`.

    Raises:
        BuildError: If it cannot be compiled; the message holds the compiler's log.
    """
    headers = {
        path.name: host_source(path.read_text(), str(path), table=False)
        for folder in include
        for path in sorted([*folder.glob("*.cuh"), *folder.glob("*.h")])
    }
    generated = host_source(source, name)
    shims = [
        HERE / "host_kernels.h",
        HERE / "kernel_abi.h",
        *sorted((HERE / "include").rglob("*.*")),
        HERE / "include/nv/target",
    ]
    key = [path.read_bytes() for path in shims if path.is_file()]
    folder = _folder("kernels", [generated.encode(), *(text.encode() for text in headers.values()), *key])
    target = folder / "kernels.so"
    with _alone_in(folder), tempfile.TemporaryDirectory(dir=folder) as scratch:
        if target.exists():
            return target
        for header, text in headers.items():
            (Path(scratch) / header).write_text(text)
        unit = Path(scratch) / "kernels.cpp"
        unit.write_text(generated)
        built = Path(scratch) / "kernels.so"
        includes = ["-I", str(HERE), "-I", str(HERE / "include"), "-isystem", str(_cuda_headers())]
        _run([*FLAGS, *KERNEL_FLAGS, *includes, "-shared", str(unit), "-o", str(built)])
        built.replace(target)
    return target


def host_source(source: str, name: str, *, table: bool = True) -> str:
    """CUDA C++ with shared memory made ordinary, and a table of its kernels (not templates) behind it.

    Line numbers stay those of `source`.
    """
    kernels = _kernels(_without_comments(source))
    text = _EXTERN_SHARED.sub(r"\1* \2 = static_cast<\1*>(swk_lane->shared);", source)
    text = _SHARED.sub(_shared_variables, text)
    lines = ['#include "host_kernels.h"' if table else "", f'#line 1 "{name}"', text]
    if table:
        entries = "".join(f"    SWK_KERNEL({kernel}, ({bound or 1024}))\n" for kernel, bound in kernels)
        lines.append(
            f'extern "C" swk::Table swk_table() {{\n    static const swk::Kernel kernels[] = {{\n{entries}'
            "        {nullptr, nullptr, 0, nullptr, nullptr, 0}};\n    return kernels;\n}"
        )
    return "\n".join(lines) + "\n"


_ALIGN = r"(?:(?:__align__|alignas)\s*\(\s*\w+\s*\)\s*)?"
_TYPE = (
    r"((?:(?:const|unsigned|signed|volatile|struct)\s+)*[A-Za-z_][\w:]*(?:<[^;<>]*>)?"
    r"(?:\s+(?:int|long|char|short))*\s*\**)"
)
_EXTERN_SHARED = re.compile(rf"\bextern\s+__shared__\s+{_ALIGN}{_TYPE}\s*\b(\w+)\s*\[\s*\]\s*;")
_SHARED = re.compile(rf"\b__shared__\s+{_ALIGN}{_TYPE}\s*\b(\w+\s*(?:\[[^;]*\])?(?:\s*,\s*\w+\s*(?:\[[^;]*\])?)*)\s*;")
_BOUNDS = r"(?:__launch_bounds__\s*\((?P<{0}>[^()]*(?:\([^()]*\)[^()]*)*)\)\s*)?"
_KERNEL = re.compile(
    rf"(?P<template>template\s*<[^;{{}}]*>\s*)?(?:extern\s+\"C\"\s+)?\b__global__\s+{_BOUNDS.format('before')}void\s+"
    rf"{_BOUNDS.format('after')}(?P<name>\w+)\s*\("
)


def _kernels(source: str) -> list[tuple[str, str | None]]:
    """Name and bound on the threads of a block, as an expression, of every kernel that is no template."""
    found: dict[str, str | None] = {}
    for match in _KERNEL.finditer(source):
        if not match["template"]:
            bound = match["before"] or match["after"]
            # __launch_bounds__(threads, blocks): the first argument alone, commas in brackets left alone.
            first = re.match(r"(?:[^,(]|\([^()]*\))*", bound or "")
            found.setdefault(match["name"], first.group(0).strip() if first else None)
    return list(found.items())


def _shared_variables(match: re.Match[str]) -> str:
    base = match.group(1)
    parts = []
    for variable in re.split(r",(?![^\[]*\])", match.group(2)):
        name, _, extents = variable.strip().partition("[")
        name = name.strip()
        extents = f"[{extents}" if extents else ""
        parts.append(
            f"typedef {base} swk_type_{name}{extents}; static char swk_key_{name}; swk_type_{name}& {name} = "
            f"*static_cast<swk_type_{name}*>(swk_shared(&swk_key_{name}, sizeof(swk_type_{name})));"
        )
    return " ".join(parts)


def _without_comments(source: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", " ", source, flags=re.S)


def _cuda_headers() -> Path:
    """Where cuda.h and cuda_fp16.h are: the nvidia-cuda-runtime package, or a toolkit."""
    try:
        distribution = metadata.distribution("nvidia-cuda-runtime")
    except metadata.PackageNotFoundError:
        pass
    else:
        for file in distribution.files or ():
            if file.name == "cuda.h":
                return Path(str(distribution.locate_file(file))).parent
    for root in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if root and (Path(root) / "include" / "cuda.h").is_file():
            return Path(root) / "include"
    raise BuildError('cuda.h was not found; install it with pip install "nvidia-cuda-runtime==13.0.*"')


def _folder(what: str, contents: list[bytes]) -> Path:
    digest = hashlib.sha256(f"{compiler()} {_compiler_version()} {FLAGS} {KERNEL_FLAGS} {sys.platform}".encode())
    for content in contents:
        digest.update(len(content).to_bytes(8, "little") + content)
    root = Path(tempfile.gettempdir()) / f"warpcache-software-cuda-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    # What lies there is loaded into this process: a folder that somebody else may write to is none to trust.
    status = root.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise BuildError(f"{root} belongs to somebody else or can be written by others; remove it")
    folder = root / f"{what}-{digest.hexdigest()[:32]}"
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Waits while another process builds in `folder`, so that of several test processes one alone compiles."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def _compiler_version() -> str:
    return subprocess.run(
        [compiler(), "-dumpfullversion", "-dumpversion"], capture_output=True, text=True
    ).stdout.strip()


def _run(arguments: Sequence[str]) -> None:
    done = subprocess.run([compiler(), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{compiler()} failed:\n{done.stderr[-8000:]}")

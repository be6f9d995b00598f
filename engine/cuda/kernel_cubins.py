"""Our kernels, compiled ahead for named GPUs, where a machine without NVRTC is going to look for them."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterable
from pathlib import Path

from ... import kernels
from ...kernels.compiler import cached_cubin

__all__ = ["compile_kernels", "kernel_sources"]


def kernel_sources() -> tuple[str, ...]:
    """Names of the kernels' source files."""
    folder = importlib.resources.files(kernels)
    return tuple(sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".cu")))


def compile_kernels(targets: Iterable[str], cache: Path) -> None:
    """Compile every kernel for every target into a cache folder.

    Args:
        targets: GPU architectures, e.g. ``"sm_89"``.
        cache: What `WARPCACHE_CACHE` is going to name on the machine that runs them.

    Raises:
        BackendError: If NVRTC is missing or does not know a target.
    """
    folder = importlib.resources.files(kernels)
    for name in kernel_sources():
        source = (folder / name).read_text("utf-8")
        for target in targets:
            # As `KernelLibrary` asks for it: no macros.
            cached_cubin(source, target, name=name, folder=cache / "kernels")

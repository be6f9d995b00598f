"""What GPUs and their driver call themselves: for records of measurements, and for people."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...kernels.driver import Context, cuda_text, cuda_version

__all__ = ["driver_version", "gpu_facts"]

_KERNEL_MODULE = Path("/proc/driver/nvidia/version")


def gpu_facts(ordinals: Iterable[int]) -> dict[str, Any]:
    """The GPUs of these numbers, and the driver that they have in common.

    Returns:
        JSON-ready: ``{"driver": "580.65.06" or None, "cuda": "13.0", "gpus": {"cuda:0": {"name", "architecture",
        "memory_bytes"}}}``; ``cuda`` is the newest that the driver speaks.

    Raises:
        DeviceError: If there is no driver, or no such GPU.
    """
    gpus = {}
    for ordinal in dict.fromkeys(ordinals):
        context = Context(ordinal)
        try:
            gpus[str(context)] = {
                "name": context.name,
                "architecture": context.architecture,
                "memory_bytes": context.memory[1],
            }
        finally:
            context.close()
    return {"driver": driver_version(), "cuda": cuda_text(cuda_version()), "gpus": gpus}


def driver_version() -> str | None:
    """The version of the driver's kernel module, e.g. ``580.65.06``; None where nothing says it."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", _KERNEL_MODULE.read_text("ascii", "replace"))
        if found is not None:
            return found[1]
    except OSError:
        pass
    try:
        nvml = importlib.import_module("cuda.bindings.nvml")
        nvml.init_v2()
        try:
            return str(nvml.system_get_driver_version())
        finally:
            nvml.shutdown()
    # The library is missing (RuntimeError), refuses (an exception class of its own), or the bindings are older.
    except Exception:
        return None

"""Records of what was measured, as JSON: with the machine and the versions that it was measured with."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..media.files import written_beside

__all__ = ["SCHEMA", "environment", "write_json"]

SCHEMA = 1
"""Version of the JSON that `write_json` writes."""

_PACKAGES = (
    "warpcache",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-python",
    "av",
    "flip-evaluator",
)


def environment() -> dict[str, Any]:
    """Machine and versions, as every record carries them.

    Returns:
        ``{"cpu", "cores", "usable_cores", "os", "python", "packages": {name: version}}``; packages that are not
        installed are left out.
    """
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": packages,
    }


def write_json(
    path: str | os.PathLike[str],
    command: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    facts: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write ``{"schema": 1, "command", "environment", "rows"}``, whole or not at all.

    NaN and infinity, which JSON does not know, are written as null.

    Args:
        path: The file.
        command: The command that measured, as it was given.
        rows: JSON-ready records, e.g. from `row`.
        facts: What the environment says besides, e.g. of the GPUs (`DeviceChoice.facts`).
        more: Further keys of the document.

    Raises:
        InputError: If the file cannot be written.
    """
    surroundings = {**environment(), **(facts or {})}
    document = {"schema": SCHEMA, "command": command, "environment": surroundings, "rows": list(rows), **(more or {})}
    text = json.dumps(_json_ready(document), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    with written_beside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _json_ready(value: Any) -> Any:
    """The value with NumPy numbers as Python's and NaN and infinity as None."""
    if isinstance(value, Mapping):
        return {str(key): _json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_ready(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _cpu_name() -> str:
    """The processor's model: Linux keeps it in a file, elsewhere `platform` knows as much as there is to know."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()

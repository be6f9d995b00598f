"""What a machine has, each thing looked at in a process of its own: what crashes or hangs there harms nobody here.

``python -m warpcache.engine.probes NAME`` is that process; it prints one line of JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import io
import json
import mmap
import os
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import WarpcacheError

__all__ = ["PROBES", "Probed", "needed_libraries", "probe"]

_MARK = "warpcache-probe:"
_ELF = b"\x7fELF"
_CUDNN = "libcudnn.so.9"
_KERNEL = '#include <cuda_fp16.h>\nextern "C" __global__ void probe(__half* x) { x[0] = __float2half(1.0f); }\n'


@dataclass(frozen=True)
class Probed:
    """What a probe found.

    Attributes:
        facts: JSON-ready, by name; empty where it failed.
        error: What went wrong, one sentence; None where nothing did.
        missing: Whether what it looked for is not installed, rather than broken.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    missing: bool = False


def probe(name: str, *, timeout_s: float = 60.0) -> Probed:
    """Look at one of `PROBES` in a process of its own; never raises for what it meets there, and never hangs.

    Args:
        name: Which.
        timeout_s: Seconds until the process is given up.
    """
    package = Path(__file__).resolve().parent.parent
    # Installed or a bare checkout: where this file's package is found, it is found there too.
    top = package.parent if (package / "__init__.py").is_file() else package
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(top)]))
    command = [sys.executable, "-P", "-m", f"{__name__.rpartition('.')[0]}.probes", name]
    try:
        # Files, not pipes: a process that a stuck driver does not let die may keep a pipe open for good.
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env={**os.environ, "PYTHONPATH": path}
            )
            try:
                code = process.wait(timeout_s)
            except BaseException as exc:
                process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1.0)
                if not isinstance(exc, subprocess.TimeoutExpired):
                    raise
                return Probed(error=f"it did not answer within {timeout_s:g} s")
            out.seek(0)
            err.seek(0)
            return _understood(out.read().decode("utf-8", "replace"), err.read().decode("utf-8", "replace"), code)
    except OSError as exc:
        return Probed(error=f"no process could be started to look at it: {exc.strerror or exc}")


def needed_libraries(path: Path) -> list[str]:
    """The shared libraries that an ELF library (64 bit, little-endian) asks for by name, read without loading it.

    Source: System V ABI, chapters 4 and 5: program headers, the dynamic section's DT_NEEDED and DT_STRTAB.

    Raises:
        ValueError: If it is no such file.
    """
    with path.open("rb") as file:
        try:
            # Only the pages that are looked at are read: such a library may have hundreds of megabytes.
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _needed(data)
        except (struct.error, IndexError, ValueError) as exc:
            raise ValueError(f"{path.name} is no 64-bit ELF library") from exc


def _needed(data: mmap.mmap) -> list[str]:
    if data[:6] != _ELF + b"\x02\x01":
        raise ValueError("no ELF64")
    (table,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    segments = [struct.unpack_from("<IIQQQQQQ", data, table + index * size) for index in range(count)]
    loaded = [(virtual, offset, length) for kind, _, offset, virtual, _, length, _, _ in segments if kind == 1]
    (start, length), *_ = [(offset, length) for kind, _, offset, _, _, length, _, _ in segments if kind == 2]
    entries = [struct.unpack_from("<qQ", data, start + position) for position in range(0, length - 15, 16)]
    (names,) = (value for tag, value in entries if tag == 5)
    (strings,) = (names - virtual + offset for virtual, offset, size in loaded if virtual <= names < virtual + size)
    found = []
    for tag, value in entries:
        if tag == 1:
            first = strings + value
            found.append(data[first : data.find(b"\0", first)].decode())
    return found


def _understood(out: str, err: str, code: int) -> Probed:
    for line in reversed(out.splitlines()):
        if line.startswith(_MARK):
            try:
                answer = json.loads(line[len(_MARK) :])
                return Probed(answer["facts"], answer["error"], answer["missing"])
            except (ValueError, TypeError, KeyError):
                break
    last = (err.strip().splitlines() or [""])[-1]
    if code < 0:
        with contextlib.suppress(ValueError):
            return Probed(error=f"it crashed ({signal.Signals(-code).name}){': ' + last if last else ''}")
    return Probed(error=f"it ended with code {code}{': ' + last if last else ''}")


# -- what runs in the process


class _Missing(Exception):
    """What was looked for is not installed."""


def _onnxruntime() -> dict[str, Any]:
    from .onnxruntime.session import import_onnxruntime

    if importlib.util.find_spec("onnxruntime") is None:
        raise _Missing("ONNX Runtime is not installed")
    ort = import_onnxruntime()
    facts: dict[str, Any] = {
        "version": str(ort.__version__),
        "providers": list(ort.get_available_providers()),
        "cuda": None,
        "missing_libraries": [],
        "cudnn": None,
    }
    with contextlib.suppress(ImportError, AttributeError):
        info = importlib.import_module("onnxruntime.capi.build_and_package_info")
        facts["cuda"] = str(info.cuda_version) or None
    library = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    if library.is_file():
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        facts["missing_libraries"] = [name for name in needed_libraries(library) if not _opens(name)]
        # Opened at run time, so it is not among what the library names.
        facts["cudnn"] = _opens(_CUDNN)
    return facts


def _driver() -> dict[str, Any]:
    from ..kernels import driver

    try:
        importlib.import_module("cuda.bindings.driver")
    except ModuleNotFoundError as exc:
        raise _Missing("cuda-python is not installed") from exc
    facts: dict[str, Any] = {"cuda": None, "driver": None, "error": None, "found": False, "gpus": []}
    with contextlib.suppress(Exception):
        from .cuda.gpu_facts import driver_version

        facts["driver"] = driver_version()
    try:
        cuda = driver.load()
        facts["found"] = True
        facts["cuda"] = int(driver.check(cuda.cuDriverGetVersion(), "asking the driver for its version"))
        count = driver.device_count()
    except WarpcacheError as exc:
        facts["error"] = str(exc)
        facts["found"] = facts["found"] or _opens("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        return facts
    for ordinal in range(count):
        gpu: dict[str, Any] = {"device": f"cuda:{ordinal}", "error": None}
        try:
            context = driver.Context(ordinal)
            try:
                gpu |= {"name": context.name, "architecture": context.architecture}
                gpu["free_bytes"], gpu["total_bytes"] = context.memory
            finally:
                context.close()
        except WarpcacheError as exc:
            gpu["error"] = str(exc)
        facts["gpus"].append(gpu)
    return facts


def _nvrtc() -> dict[str, Any]:
    from ..kernels.compiler import compile_cubin

    try:
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
    except ModuleNotFoundError as exc:
        raise _Missing("cuda-python is not installed") from exc
    # The real thing: with NVRTC and CUDA's headers found, this compiles.
    compile_cubin(_KERNEL, "sm_90", name="probe.cu")
    _, major, minor = nvrtc.nvrtcVersion()
    return {"version": [int(major), int(minor)]}


def _tensorrt() -> dict[str, Any]:
    return _flavour("tensorrt")


def _tensorrt_rtx() -> dict[str, Any]:
    return _flavour("tensorrt-rtx")


def _flavour(name: Any) -> dict[str, Any]:
    from .tensorrt.flavour import Flavour

    if importlib.util.find_spec(name.replace("-", "_")) is None:
        raise _Missing("it is not installed")
    flavour = Flavour.load(name)
    return {"version": flavour.version, "ahead_of_time": flavour.ahead_of_time, "targets": list(flavour.targets)}


PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    "onnxruntime": _onnxruntime,
    "driver": _driver,
    "nvrtc": _nvrtc,
    "tensorrt": _tensorrt,
    "tensorrt-rtx": _tensorrt_rtx,
}
"""What can be looked at, by name."""


def _opens(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _main(name: str) -> None:
    answer: dict[str, Any] = {"facts": {}, "error": None, "missing": False}
    # What libraries print is not the answer.
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            answer["facts"] = PROBES[name]()
        except _Missing as exc:
            answer |= {"error": str(exc), "missing": True}
        except WarpcacheError as exc:
            answer["error"] = (str(exc).splitlines() or [""])[0]
        except Exception as exc:
            answer["error"] = (str(exc).strip() or type(exc).__name__).splitlines()[0]
    print(_MARK + json.dumps(answer), flush=True)


if __name__ == "__main__":
    _main(sys.argv[1])

"""What a machine has, each thing looked at in a process of its own: what crashes or hangs there harms nobody here.

``python -m warpcache.engine.probes NAME`` is that process; it prints one line of JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import io
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import WarpcacheError

__all__ = ["PROBES", "Probed", "missing_libraries", "probe"]

_MARK = "warpcache-probe:"
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


def missing_libraries(path: Path) -> list[str]:
    """The shared libraries that a library needs and that are neither found nor loaded already; nothing of it is run.

    Source: ld.so(8), LD_TRACE_LOADED_OBJECTS.

    Raises:
        ValueError: If the dynamic loader cannot read it.
    """
    loader = next(Path("/").glob(f"lib*/ld-linux-{platform.machine().replace('_', '-')}.so.*"))
    # As ldd does it: with --list the loader stops at the first that is missing.
    environment = {**os.environ, "LD_TRACE_LOADED_OBJECTS": "1"}
    listed = subprocess.run([loader, path], env=environment, capture_output=True, text=True, check=False)
    if listed.returncode:
        raise ValueError(f"{path.name} cannot be read by the dynamic loader: {listed.stderr.strip()}")
    lost = re.findall(r"^\s*(\S+) => not found$", listed.stdout, re.MULTILINE)
    return [name for name in lost if not _opens(name)]


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
        facts["missing_libraries"] = missing_libraries(library)
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
        driver.load()
        facts["found"] = True
        facts["cuda"] = driver.cuda_version()
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
    "tensorrt": functools.partial(_flavour, "tensorrt"),
    "tensorrt-rtx": functools.partial(_flavour, "tensorrt-rtx"),
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

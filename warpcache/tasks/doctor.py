"""What is on this machine, what fits together, and what to do about the rest; nothing that is broken stops it."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from .. import __version__
from ..engine.probes import PROBES, Probed, probe

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Facts", "Finding", "Pair", "Report", "diagnose", "examine", "gather", "print_report"]

Status = Literal["ok", "missing", "problem", "note"]
Version = tuple[int, int]
Seen = TypeVar("Seen")

_STYLES = {"ok": "green", "missing": "yellow", "problem": "bold red", "note": "cyan"}
_ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino")
_ONE_ONNXRUNTIME = 'install one of "warpcache[cpu]" or "warpcache[gpu]" (they exclude each other)'
_OLDEST_ONNXRUNTIME = (1, 23)
_CUDA_PROVIDER = "CUDAExecutionProvider"
_DRIVER_LIBRARIES = {"libcuda.so.1"}
_TITLES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
# TensorRT and our kernels start with Turing.
_OLDEST_GPU = 75


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for.

    Attributes:
        name: What it is.
        status: ``"ok"``; ``"missing"``, which is fine where it is not needed; ``"problem"``; ``"note"``, worth knowing.
        found: What is there.
        advice: What to do about it, one sentence; empty where there is nothing to do.
    """

    name: str
    status: Status
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Pair:
    """Whether a bundle can run on a device by a backend here, as far as can be seen without running one.

    Attributes:
        device: ``"cpu"`` or ``"cuda:N"``; ``"cuda"`` stands for the GPU that is not there.
        backend: ``"onnxruntime"``, ``"tensorrt"`` or ``"tensorrt-rtx"``.
        works: Whether it can.
        reason: Why not, one sentence; empty where it can.
    """

    device: str
    backend: str
    works: bool
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        findings: One thing after the other.
        pairs: Every device with every backend.
    """

    findings: tuple[Finding, ...]
    pairs: tuple[Pair, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return {
            "warpcache": __version__,
            "findings": [asdict(finding) for finding in self.findings],
            "pairs": [asdict(pair) for pair in self.pairs],
        }


@dataclass(frozen=True)
class Facts:
    """What was seen, before anything is made of it.

    Attributes:
        system: The operating system and Python, for people.
        cores: Cores that this process may use.
        packages: Versions of the installed distributions, by lower-case name.
        probed: What the probes of `engine.probes` found, by name.
        torch_cuda: The CUDA that torch is built for; None for the CPU, or where there is no torch.
        cache: ``{"folder", "exists", "writable", "engines", "size_bytes"}`` of the engine cache, or ``{"error"}``.
    """

    system: str
    cores: int
    packages: Mapping[str, str]
    probed: Mapping[str, Probed]
    torch_cuda: str | None = None
    cache: Mapping[str, Any] = field(default_factory=dict)


def examine() -> Report:
    """Look at this machine; takes some seconds, and raises nothing because something is broken."""
    return diagnose(gather())


def gather() -> Facts:
    """See what is here; libraries that could crash or hang are looked at in processes of their own."""
    with ThreadPoolExecutor(len(PROBES)) as pool:
        probed = dict(zip(PROBES, pool.map(probe, PROBES), strict=True))
    return Facts(
        system=f"{platform.system()} {platform.release()} ({platform.machine()}), Python {platform.python_version()}",
        cores=_guarded(_cores, 0),
        packages=_guarded(_packages, {}),
        probed=probed,
        torch_cuda=_guarded(_torch_cuda, None),
        cache=_guarded(_cache, {"error": "its folder cannot be looked at"}),
    )


def diagnose(facts: Facts) -> Report:
    """Say what `facts` mean."""
    return Report(tuple(_findings(facts)), tuple(_pairs(facts)))


def print_report(report: Report, *, console: Console | None = None) -> None:
    """Print `report` to `console` (default: stdout)."""
    from rich.console import Console
    from rich.text import Text

    from ..report.bundle_tables import plain_table
    from ..report.words import PIPE_WIDTH

    out = console or Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    table = plain_table("What is here", "", "what", "found", "what to do")
    for finding in report.findings:
        # As text: "warpcache[gpu]" is no markup.
        cells = (finding.name, finding.found, finding.advice)
        table.add_row(Text(finding.status, style=_STYLES[finding.status]), *map(Text, cells))
    out.print(table)
    table = plain_table("What can run here (looked at, not run)", "device", "backend", "", "why not")
    for pair in report.pairs:
        word = Text("yes", style="green") if pair.works else Text("no", style="yellow")
        table.add_row(Text(pair.device), Text(pair.backend), word, Text(pair.reason))
    out.print(table)


# -- what is seen


def _guarded(look: Callable[[], Seen], otherwise: Seen) -> Seen:
    """What `look` sees; a broken environment raises in many ways, and none of them is the doctor's end."""
    try:
        return look()
    except Exception:
        return otherwise


def _cores() -> int:
    from ..engine.device.affinity import available_cores

    return len(available_cores())


def _packages() -> dict[str, str]:
    from importlib.metadata import distributions

    found: dict[str, str] = {}
    for distribution in distributions():
        name = distribution.metadata["Name"]
        if name:
            # The first on the path is the one that is imported.
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution.version)
    return found


def _torch_cuda() -> str | None:
    """Read from torch's version file: importing it takes seconds and memory."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return found[1] if found else None


def _cache() -> dict[str, Any]:
    from ..engine.tensorrt.engine_cache import default_folder

    folder = default_folder()
    sizes = [path.stat().st_size for path in folder.glob("*.engine")] if folder.is_dir() else []
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return {
        "folder": str(folder),
        "exists": folder.is_dir(),
        "writable": there.is_dir() and os.access(there, os.W_OK | os.X_OK),
        "engines": len(sizes),
        "size_bytes": sum(sizes),
    }


# -- what it means


def _findings(facts: Facts) -> list[Finding]:
    found = [
        Finding("system", "ok", f"{facts.system}, {facts.cores} core{'s' if facts.cores != 1 else ''}"),
        Finding("NumPy", "ok", facts.packages.get("numpy", "unknown version")),
        _onnxruntime(facts),
    ]
    provider = _provider(facts)
    if provider is not None:
        found.append(provider)
    found += [_cuda_python(facts), _driver(facts), *_gpus(facts), _nvrtc(facts)]
    found += [_tensorrt(facts, name) for name in ("tensorrt", "tensorrt-rtx")]
    found += [_torch(facts), *_arrays(facts), _engine_cache(facts)]
    return found


def _onnxruntime(facts: Facts) -> Finding:
    name = "ONNX Runtime"
    installed = [f"{package} {facts.packages[package]}" for package in _ONNXRUNTIMES if package in facts.packages]
    if len(installed) > 1:
        names = " ".join(package for package in _ONNXRUNTIMES if package in facts.packages)
        return Finding(
            name,
            "problem",
            f"{' and '.join(installed)} unpack into the same folder",
            f"pip uninstall -y {names}, then {_ONE_ONNXRUNTIME}",
        )
    probed = facts.probed["onnxruntime"]
    if probed.missing:
        return Finding(name, "problem", "not installed", _ONE_ONNXRUNTIME)
    if probed.error is not None:
        return Finding(name, "problem", f"cannot be used: {probed.error}", f"install it again: {_ONE_ONNXRUNTIME}")
    version = str(probed.facts["version"])
    cuda = f" for CUDA {probed.facts['cuda']}" if _CUDA_PROVIDER in probed.facts["providers"] else " for the CPU"
    what = f"{installed[0] if installed else version}{cuda}"
    if (_version(version) or _OLDEST_ONNXRUNTIME) < _OLDEST_ONNXRUNTIME:
        return Finding(name, "problem", f"{what} is older than {_dotted(_OLDEST_ONNXRUNTIME)}", "update it")
    return Finding(name, "ok", what)


def _provider(facts: Facts) -> Finding | None:
    """ONNX Runtime's CUDA provider; None where there is no ONNX Runtime to have one."""
    name = "ONNX Runtime on GPUs"
    probed = facts.probed["onnxruntime"]
    if probed.error is not None:
        return None
    if _CUDA_PROVIDER not in probed.facts["providers"]:
        return Finding(
            name,
            "missing",
            "this ONNX Runtime is a build without CUDA",
            'on a machine with a GPU: pip uninstall -y onnxruntime, then pip install "warpcache[gpu]"',
        )
    reason = _provider_problem(facts)
    if reason is not None:
        return Finding(name, "problem", *reason)
    return Finding(name, "ok", f"CUDA provider for CUDA {probed.facts['cuda']}, its libraries and cuDNN are found")


def _provider_problem(facts: Facts) -> tuple[str, str] | None:
    """Why ONNX Runtime's CUDA provider cannot work beside this driver, and what to do; None where nothing shows."""
    probed = facts.probed["onnxruntime"].facts
    missing = [library for library in probed["missing_libraries"] if library not in _DRIVER_LIBRARIES]
    remedy = 'pip install "onnxruntime-gpu[cuda,cudnn]"'
    if missing:
        return f"its CUDA provider needs {', '.join(missing)}, which cannot be found", remedy
    if probed["cudnn"] is False:
        return "its CUDA provider needs cuDNN 9, which cannot be found", remedy
    built, driver = _version(probed["cuda"]), _driver_cuda(facts)
    if built is not None and driver is not None and built[0] > driver[0]:
        return (
            f"its CUDA provider is built for CUDA {_dotted(built)}, the driver speaks {_dotted(driver)}",
            f"update the NVIDIA driver to one of CUDA {built[0]}",
        )
    return None


def _cuda_python(facts: Facts) -> Finding:
    version = facts.packages.get("cuda-python") or facts.packages.get("cuda-bindings")
    if version is None:
        return Finding("cuda-python", "missing", "not installed", 'for GPUs: pip install "warpcache[cuda]"')
    if facts.probed["driver"].missing:
        return Finding(
            "cuda-python", "problem", f"{version} has no bindings", 'install it again: pip install "warpcache[cuda]"'
        )
    return Finding("cuda-python", "ok", version)


def _driver(facts: Facts) -> Finding:
    name = "NVIDIA driver"
    probed = facts.probed["driver"]
    if probed.error is not None and not probed.missing:
        return Finding(name, "problem", f"cannot be asked: {probed.error}", "check nvidia-smi, or restart the machine")
    if probed.missing:
        return Finding(name, "note", "cannot be asked without cuda-python", 'for GPUs: pip install "warpcache[cuda]"')
    seen = probed.facts
    if not seen["found"]:
        return Finding(name, "missing", "not installed", "for a GPU install its driver; without one the CPU does all")
    if seen["error"] is not None:
        what, _, remedy = str(seen["error"]).partition("; ")
        return Finding(name, "problem", what, remedy)
    cuda = _driver_cuda(facts)
    what = f"{seen['driver'] or 'version unknown'}, CUDA {_dotted(cuda) if cuda else 'unknown'}"
    nvrtc = _nvrtc_version(facts)
    if cuda is not None and nvrtc is not None and nvrtc[0] > cuda[0]:
        return Finding(
            name,
            "problem",
            f"{what}: older than the installed CUDA {_dotted(nvrtc)} packages, whose code it refuses",
            # Older packages are no way out: cuda-python of that CUDA lacks what is used here.
            f"update the driver to one of CUDA {nvrtc[0]}",
        )
    return Finding(name, "ok", what)


def _gpus(facts: Facts) -> list[Finding]:
    from ..report.words import size_text

    seen = facts.probed["driver"].facts
    if not seen or seen["error"] is not None:
        return []
    if not seen["gpus"]:
        return [Finding("GPUs", "missing", "the driver shows none", "check nvidia-smi and CUDA_VISIBLE_DEVICES")]
    found = []
    for gpu in seen["gpus"]:
        if gpu["error"] is not None:
            what, _, remedy = str(gpu["error"]).partition("; ")
            found.append(Finding(gpu["device"], "problem", what, remedy))
            continue
        what = (
            f"{gpu['name']}, {gpu['architecture']}, {size_text(gpu['free_bytes'])} of "
            f"{size_text(gpu['total_bytes'])} are free"
        )
        if _number(gpu["architecture"]) < _OLDEST_GPU:
            found.append(Finding(gpu["device"], "problem", what, f"take a GPU of sm_{_OLDEST_GPU} or newer"))
        else:
            found.append(Finding(gpu["device"], "ok", what))
    return found


def _nvrtc(facts: Facts) -> Finding:
    name = "NVRTC and headers"
    probed = facts.probed["nvrtc"]
    remedy = 'pip install "warpcache[cuda]"'
    if probed.missing:
        return Finding(name, "missing", "cannot be asked without cuda-python", f"for GPUs: {remedy}")
    if probed.error is not None:
        package = "nvidia-cuda-nvrtc"
        status: Status = "problem" if package in facts.packages else "missing"
        what, _, advice = probed.error.partition("; ")
        return Finding(name, status, what, advice or f"to compile kernels: {remedy}")
    nvrtc, driver = _nvrtc_version(facts), _driver_cuda(facts)
    what = f"{_dotted(nvrtc) if nvrtc else 'unknown version'}, compiles kernels"
    if nvrtc is not None and driver is not None and nvrtc[0] == driver[0] and nvrtc > driver:
        return Finding(
            name,
            "note",
            f"{what}; newer than the driver's CUDA {_dotted(driver)}, which refuses its PTX but not the machine code "
            "that is made here",
            f'for other programs that hand PTX to the driver: pip install "nvidia-cuda-nvrtc=={_dotted(driver)}.*"',
        )
    return Finding(name, "ok", what)


def _tensorrt(facts: Facts, name: str) -> Finding:
    title = _TITLES[name]
    probed = facts.probed[name]
    if probed.missing:
        return Finding(title, "missing", "not installed", f'to use it: pip install "warpcache[{name}]"')
    if probed.error is not None:
        what, _, advice = probed.error.partition("; ")
        return Finding(title, "problem", what, advice or f'install it again: pip install "warpcache[{name}]"')
    what = str(probed.facts["version"])
    problem = _flavour_problem(facts, name)
    if problem is not None:
        return Finding(title, "problem", f"{what} {problem}", "update the NVIDIA driver")
    if not probed.facts["ahead_of_time"]:
        return Finding(title, "ok", f"{what}, builds for the GPU that is here")
    targets = probed.facts["targets"]
    what += f", builds anywhere for {', '.join(targets)}"
    refused = [
        f"{gpu['device']} ({gpu['architecture']})" for gpu in _usable(facts) if gpu["architecture"] not in targets
    ]
    if refused:
        return Finding(
            title,
            "note",
            f"{what}, and has no code for {', '.join(refused)}",
            "take 'tensorrt' or 'onnxruntime' there; building for other GPUs works",
        )
    return Finding(title, "ok", what)


def _flavour_problem(facts: Facts, name: str) -> str | None:
    """What keeps a TensorRT from working with this driver; the CUDA it is built for is in its packages' names."""
    driver = _driver_cuda(facts)
    matches = [re.fullmatch(rf"{name}-cu(\d+)(-libs)?", package) for package in facts.packages]
    built = max((int(match[1]) for match in matches if match), default=None)
    if driver is None or built is None or built <= driver[0]:
        return None
    return f"is built for CUDA {built}, the driver speaks {_dotted(driver)}"


def _torch(facts: Facts) -> Finding:
    version = facts.packages.get("torch")
    if version is None:
        return Finding("torch", "missing", "not installed", 'only compile needs it: pip install "warpcache[export]"')
    if facts.torch_cuda is None:
        if _usable(facts):
            return Finding(
                "torch", "note", f"{version} for the CPU", "to lend GPU tensors install a build of torch for CUDA"
            )
        return Finding("torch", "ok", f"{version} for the CPU")
    driver, built = _driver_cuda(facts), _version(facts.torch_cuda)
    what = f"{version} for CUDA {facts.torch_cuda}"
    if driver is not None and built is not None and built[0] > driver[0]:
        return Finding(
            "torch",
            "problem",
            f"{what}, the driver speaks {_dotted(driver)}",
            "update the driver, or take another torch",
        )
    return Finding("torch", "ok", f"{what}, its GPU tensors are taken by DLPack")


def _arrays(facts: Facts) -> list[Finding]:
    """The other libraries whose arrays on a GPU are taken without a copy; none is needed."""
    found = []
    for title, pattern in (("CuPy", r"cupy(-cuda(\d+)x)?"), ("PyCUDA", r"pycuda()()")):
        matches = [
            (match, version) for name, version in facts.packages.items() if (match := re.fullmatch(pattern, name))
        ]
        if not matches:
            continue
        shown = " and ".join(f"{match[0]} {version}" for match, version in matches)
        driver = _driver_cuda(facts)
        built = [int(match[2]) for match, _ in matches if match[2]]
        if len(matches) > 1:
            found.append(Finding(title, "problem", f"{shown} are both installed", "uninstall all but one"))
        elif built and driver is not None and built[0] > driver[0]:
            found.append(
                Finding(title, "problem", f"{shown}, the driver speaks {_dotted(driver)}", "update the driver")
            )
        else:
            found.append(Finding(title, "ok", f"{shown}, its arrays are taken without a copy"))
    return found


def _engine_cache(facts: Facts) -> Finding:
    from ..report.words import size_text

    name, cache = "engine cache", facts.cache
    if "folder" not in cache:
        return Finding(name, "problem", cache.get("error", "unknown"), "set WARPCACHE_CACHE to a folder of yours")
    count = cache["engines"]
    what = (
        f"{cache['folder']}: {count} engine{'s' if count != 1 else ''}, {size_text(cache['size_bytes'])}"
        if cache["exists"]
        else f"{cache['folder']}, which the first build makes"
    )
    if not cache["writable"]:
        return Finding(name, "problem", f"{what}, cannot be written", "set WARPCACHE_CACHE to a folder of yours")
    return Finding(name, "ok", what)


def _pairs(facts: Facts) -> list[Pair]:
    probed = facts.probed["onnxruntime"]
    reason = "" if probed.error is None else f"ONNX Runtime: {probed.error}"
    pairs = [Pair("cpu", "onnxruntime", not reason, reason)]
    pairs += [Pair("cpu", name, False, f"{title} runs on GPUs only") for name, title in _TITLES.items()]
    gpus = facts.probed["driver"].facts.get("gpus") or [{"device": "cuda"}]
    for gpu in gpus:
        for backend, why in (
            ("onnxruntime", _why_not_onnxruntime),
            ("tensorrt", _why_not_tensorrt),
            ("tensorrt-rtx", _why_not_tensorrt_rtx),
        ):
            reason = _why_no_gpu(facts, gpu) or why(facts, gpu)
            pairs.append(Pair(gpu["device"], backend, not reason, reason))
    return pairs


def _why_no_gpu(facts: Facts, gpu: Mapping[str, Any]) -> str:
    if facts.probed["driver"].missing:
        return "cuda-python is not installed"
    seen = facts.probed["driver"].facts
    if not seen or seen["error"] is not None:
        return f"NVIDIA driver: {_driver(facts).found}"
    if "architecture" not in gpu:
        return str(gpu.get("error") or "the driver shows no GPU").partition("; ")[0]
    if _number(gpu["architecture"]) < _OLDEST_GPU:
        return f"{gpu['name']} ({gpu['architecture']}) is older than sm_{_OLDEST_GPU}"
    return ""


def _why_not_onnxruntime(facts: Facts, gpu: Mapping[str, Any]) -> str:
    probed = facts.probed["onnxruntime"]
    if probed.error is not None:
        return f"ONNX Runtime: {probed.error}"
    if _CUDA_PROVIDER not in probed.facts["providers"]:
        return "the installed ONNX Runtime is a build without CUDA"
    problem = _provider_problem(facts)
    return "" if problem is None else f"ONNX Runtime: {problem[0]}"


def _why_not_tensorrt(facts: Facts, gpu: Mapping[str, Any]) -> str:
    return _why_not_flavour(facts, "tensorrt")


def _why_not_tensorrt_rtx(facts: Facts, gpu: Mapping[str, Any]) -> str:
    reason = _why_not_flavour(facts, "tensorrt-rtx")
    if not reason and gpu["architecture"] not in facts.probed["tensorrt-rtx"].facts["targets"]:
        version = facts.probed["tensorrt-rtx"].facts["version"]
        return f"TensorRT-RTX {version} has no code for {gpu['architecture']}"
    return reason


def _why_not_flavour(facts: Facts, name: str) -> str:
    probed = facts.probed[name]
    if probed.missing:
        return f"{_TITLES[name]} is not installed"
    if probed.error is not None:
        return probed.error.partition("; ")[0]
    problem = _flavour_problem(facts, name)
    return "" if problem is None else f"{_TITLES[name]} {probed.facts['version']} {problem}"


def _usable(facts: Facts) -> list[Mapping[str, Any]]:
    """The GPUs that answered."""
    return [gpu for gpu in facts.probed["driver"].facts.get("gpus", ()) if gpu["error"] is None]


def _driver_cuda(facts: Facts) -> Version | None:
    """The newest CUDA that the driver speaks."""
    number = facts.probed["driver"].facts.get("cuda")
    return None if number is None else (number // 1000, number % 1000 // 10)


def _nvrtc_version(facts: Facts) -> Version | None:
    number = facts.probed["nvrtc"].facts.get("version")
    if number is not None:
        return number[0], number[1]
    # Where it could not compile, the package says what it is.
    return _version(facts.packages.get("nvidia-cuda-nvrtc"))


def _version(text: str | None) -> Version | None:
    found = re.match(r"(\d+)\.(\d+)", text or "")
    return None if found is None else (int(found[1]), int(found[2]))


def _dotted(version: Version) -> str:
    return f"{version[0]}.{version[1]}"


def _number(architecture: str) -> int:
    return int(architecture.removeprefix("sm_"))

"""What is on this machine, what fits together, and what to do about the rest; nothing that is broken stops it."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from .. import __version__
from ..engine.probes import PROBES, Probed, probe

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Facts", "Finding", "Pair", "Report", "diagnose", "examine", "gather", "print_report"]

Status = Literal["ok", "missing", "problem", "note"]
Seen = TypeVar("Seen")

_TITLES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
# TensorRT and our kernels start with Turing.
_OLDEST_GPU = 75
_CUDA_PROVIDER = "CUDAExecutionProvider"
_ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino")
_ONE_ONNXRUNTIME = 'install one of "warpcache[cpu]" or "warpcache[gpu]" (they exclude each other)'
_INSTALL_CUDA = 'pip install "warpcache[cuda]"'


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
    findings = tuple(_findings(facts))
    return Report(findings, tuple(_pairs(facts, {finding.name: finding for finding in findings})))


def print_report(report: Report, *, console: Console | None = None) -> None:
    """Print `report` to `console` (default: stdout)."""
    from ..report.tables import Cell, Column, Sheet, print_sheet, terminal

    tones = {"ok": "good", "missing": "bad", "problem": "problem", "note": "note"}
    found = [[Cell(f.status, tones[f.status]), f.name, f.found, f.advice] for f in report.findings]
    pairs = [
        [p.device, p.backend, Cell("yes", "good") if p.works else Cell("no", "bad"), p.reason] for p in report.pairs
    ]
    out = terminal(console)
    for title, headings, rows in (
        ("What is here", ("", "what", "found", "what to do"), found),
        ("What can run here (looked at, not run)", ("device", "backend", "", "why not"), pairs),
    ):
        print_sheet(Sheet(title, [Column(heading) for heading in headings], rows), out)


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


class _Version(NamedTuple):
    major: int
    minor: int = 0

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


def _first(name: str, *cases: tuple[object, Status, str, str]) -> Finding:
    """The finding `name`: the first of these cases (condition, status, found, advice) whose condition holds."""
    return next(Finding(name, status, found, advice) for holds, status, found, advice in cases if holds)


def _findings(facts: Facts) -> Iterator[Finding]:
    yield Finding("system", "ok", f"{facts.system}, {_counted(facts.cores, 'core')}")
    yield Finding("NumPy", "ok", facts.packages.get("numpy", "unknown version"))
    yield from _onnxruntime(facts)
    yield from _gpus(facts)
    for name, title in _TITLES.items():
        yield _tensorrt(facts, name, title)
    yield from _arrays(facts)
    yield _engine_cache(facts.cache)


def _onnxruntime(facts: Facts) -> Iterator[Finding]:
    probed, oldest = facts.probed["onnxruntime"], _Version(1, 23)
    seen = probed.facts
    provider, missing = _CUDA_PROVIDER in seen.get("providers", ()), seen.get("missing_libraries", ())
    installed = {name: f"{name} {facts.packages[name]}" for name in _ONNXRUNTIMES if name in facts.packages}
    both, remove = " and ".join(installed.values()), f"pip uninstall -y {' '.join(installed)}"
    what = next(iter(installed.values()), str(seen.get("version")))
    what += f" for CUDA {seen['cuda']}" if provider else " for the CPU"
    yield _first(
        "ONNX Runtime",
        (len(installed) > 1, "problem", f"{both} unpack into the same folder", f"{remove}, then {_ONE_ONNXRUNTIME}"),
        (probed.missing, "problem", "not installed", _ONE_ONNXRUNTIME),
        (probed.error, "problem", f"cannot be used: {probed.error}", f"install it again: {_ONE_ONNXRUNTIME}"),
        ((_version(seen.get("version")) or oldest) < oldest, "problem", f"{what} is older than {oldest}", "update it"),
        (True, "ok", what, ""),
    )
    if probed.error is not None:
        return
    # The driver's own library is the driver's matter.
    libraries = ", ".join(name for name in missing if name != "libcuda.so.1") or "cuDNN 9"
    built, driver = _version(seen["cuda"]), _driver_cuda(facts)
    yield _first(
        "ONNX Runtime on GPUs",
        (
            not provider,
            "missing",
            "this ONNX Runtime is a build without CUDA",
            'on a machine with a GPU: pip uninstall -y onnxruntime, then pip install "warpcache[gpu]"',
        ),
        (
            libraries != "cuDNN 9" or seen["cudnn"] is False,
            "problem",
            f"its CUDA provider needs {libraries}, which cannot be found",
            'pip install "onnxruntime-gpu[cuda,cudnn]"',
        ),
        (
            _too_new(built, driver),
            "problem",
            f"its CUDA provider is built for CUDA {built}, the driver speaks {driver}",
            f"update the NVIDIA driver to one of CUDA {built and built.major}",
        ),
        (True, "ok", f"CUDA provider for CUDA {seen['cuda']}, its libraries and cuDNN are found", ""),
    )


def _gpus(facts: Facts) -> Iterator[Finding]:
    """The GPUs, and what is needed to use any."""
    from ..report.words import size_text

    bindings = facts.packages.get("cuda-python") or facts.packages.get("cuda-bindings")
    probed, nvrtc = facts.probed["driver"], facts.probed["nvrtc"]
    seen, driver, compiler = probed.facts, _driver_cuda(facts), _nvrtc_version(facts)
    without = "cannot be asked without cuda-python", f"for GPUs: {_INSTALL_CUDA}"
    yield _first(
        "cuda-python",
        (bindings is None, "missing", "not installed", f"for GPUs: {_INSTALL_CUDA}"),
        (probed.missing, "problem", f"{bindings} has no bindings", f"install it again: {_INSTALL_CUDA}"),
        (True, "ok", str(bindings), ""),
    )
    no_driver = "for a GPU install its driver; without one the CPU does all"
    what = f"{seen.get('driver') or 'version unknown'}, CUDA {driver or 'unknown'}"
    yield _first(
        "NVIDIA driver",
        (probed.missing, "note", *without),
        (probed.error, "problem", f"cannot be asked: {probed.error}", "check nvidia-smi, or restart the machine"),
        (not seen.get("found"), "missing", "not installed", no_driver),
        (seen.get("error"), "problem", *_split(seen.get("error"))),
        (
            _too_new(compiler, driver),
            "problem",
            f"{what}: older than the installed CUDA {compiler} packages, whose code it refuses",
            # Older packages are no way out: cuda-python of that CUDA lacks what is used here.
            f"update the driver to one of CUDA {compiler and compiler.major}",
        ),
        (True, "ok", what, ""),
    )
    if seen and seen["error"] is None and not seen["gpus"]:
        yield Finding("GPUs", "missing", "the driver shows none", "check nvidia-smi and CUDA_VISIBLE_DEVICES")
    for gpu in seen.get("gpus", ()) if seen.get("error") is None else ():
        if gpu["error"] is not None:
            yield Finding(gpu["device"], "problem", *_split(gpu["error"]))
            continue
        room = f"{size_text(gpu['free_bytes'])} of {size_text(gpu['total_bytes'])} are free"
        what = f"{gpu['name']}, {gpu['architecture']}, {room}"
        yield _first(
            gpu["device"],
            (_too_old(gpu), "problem", what, f"take a GPU of sm_{_OLDEST_GPU} or newer"),
            (True, "ok", what, ""),
        )
    what = f"{compiler or 'unknown version'}, compiles kernels"
    yield _first(
        "NVRTC and headers",
        (nvrtc.missing, "missing", *without),
        (
            nvrtc.error,
            "problem" if "nvidia-cuda-nvrtc" in facts.packages else "missing",
            *_split(nvrtc.error, f"to compile kernels: {_INSTALL_CUDA}"),
        ),
        (
            compiler and driver and compiler.major == driver.major and compiler > driver,
            "note",
            f"{what}; newer than the driver's CUDA {driver}, which refuses its PTX but not the machine code that is "
            "made here",
            f'for other programs that hand PTX to the driver: pip install "nvidia-cuda-nvrtc=={driver}.*"',
        ),
        (True, "ok", what, ""),
    )


def _tensorrt(facts: Facts, name: str, title: str) -> Finding:
    install, probed = f'pip install "warpcache[{name}]"', facts.probed[name]
    # The CUDA that it is built for is in its packages' names.
    built, driver = _built_for(facts, rf"{name}-cu(\d+)(?:-libs)?"), _driver_cuda(facts)
    version, targets = probed.facts.get("version"), probed.facts.get("targets", ())
    what = f"{version}, builds anywhere for {', '.join(targets)}"
    refused = [f"{g['device']} ({g['architecture']})" for g in _usable(facts) if g["architecture"] not in targets]
    speaks = f"{version} is built for CUDA {built and built.major}, the driver speaks {driver}"
    elsewhere = "take 'tensorrt' or 'onnxruntime' there; building for other GPUs works"
    return _first(
        title,
        (probed.missing, "missing", "not installed", f"to use it: {install}"),
        (probed.error, "problem", *_split(probed.error, f"install it again: {install}")),
        (_too_new(built, driver), "problem", speaks, "update the NVIDIA driver"),
        (not probed.facts.get("ahead_of_time"), "ok", f"{version}, builds for the GPU that is here", ""),
        (refused, "note", f"{what}, and has no code for {', '.join(refused)}", elsewhere),
        (True, "ok", what, ""),
    )


def _arrays(facts: Facts) -> Iterator[Finding]:
    """The libraries whose arrays on a GPU are taken without a copy."""
    torch, cuda, driver = facts.packages.get("torch"), facts.torch_cuda, _driver_cuda(facts)
    without, what, speaks = f"{torch} for the CPU", f"{torch} for CUDA {cuda}", f", the driver speaks {driver}"
    refused = _too_new(_version(cuda), driver)
    yield _first(
        "torch",
        (torch is None, "missing", "not installed", 'only compile needs it: pip install "warpcache[export]"'),
        (not cuda and _usable(facts), "note", without, "to lend GPU tensors install a build of torch for CUDA"),
        (not cuda, "ok", without, ""),
        (refused, "problem", f"{what}{speaks}", "update the driver, or take another torch"),
        (True, "ok", f"{what}, its GPU tensors are taken by DLPack", ""),
    )
    # None of these is needed.
    for title, pattern in (("CuPy", r"cupy(?:-cuda(\d+)x)?"), ("PyCUDA", r"pycuda()")):
        found = [f"{name} {version}" for name, version in facts.packages.items() if re.fullmatch(pattern, name)]
        what = " and ".join(found)
        if found:
            yield _first(
                title,
                (len(found) > 1, "problem", f"{what} are both installed", "uninstall all but one"),
                (_too_new(_built_for(facts, pattern), driver), "problem", f"{what}{speaks}", "update the driver"),
                (True, "ok", f"{what}, its arrays are taken without a copy", ""),
            )


def _engine_cache(cache: Mapping[str, Any]) -> Finding:
    from ..report.words import size_text

    what, elsewhere = f"{cache.get('folder')}, which the first build makes", "set WARPCACHE_CACHE to a folder of yours"
    if cache.get("exists"):
        what = f"{cache['folder']}: {_counted(cache['engines'], 'engine')}, {size_text(cache['size_bytes'])}"
    return _first(
        "engine cache",
        ("folder" not in cache, "problem", cache.get("error", "unknown"), elsewhere),
        (not cache.get("writable"), "problem", f"{what}, cannot be written", elsewhere),
        (True, "ok", what, ""),
    )


def _pairs(facts: Facts, findings: Mapping[str, Finding]) -> Iterator[Pair]:
    error = facts.probed["onnxruntime"].error
    reason = "" if error is None else f"ONNX Runtime: {error}"
    yield Pair("cpu", "onnxruntime", not reason, reason)
    for name, title in _TITLES.items():
        yield Pair("cpu", name, False, f"{title} runs on GPUs only")
    for gpu in facts.probed["driver"].facts.get("gpus") or [{"device": "cuda"}]:
        for backend in ("onnxruntime", *_TITLES):
            why_not = _why_not_onnxruntime if backend == "onnxruntime" else _why_not_tensorrt
            reason = _why_no_gpu(facts, findings, gpu) or why_not(facts, findings, gpu, backend)
            yield Pair(gpu["device"], backend, not reason, reason)


def _why_no_gpu(facts: Facts, findings: Mapping[str, Finding], gpu: Mapping[str, Any]) -> str:
    driver = facts.probed["driver"]
    if driver.missing:
        return "cuda-python is not installed"
    if not driver.facts or driver.facts["error"] is not None:
        return f"NVIDIA driver: {findings['NVIDIA driver'].found}"
    if "architecture" not in gpu:
        return str(gpu.get("error") or "the driver shows no GPU").partition("; ")[0]
    return f"{gpu['name']} ({gpu['architecture']}) is older than sm_{_OLDEST_GPU}" if _too_old(gpu) else ""


def _why_not_onnxruntime(facts: Facts, findings: Mapping[str, Finding], gpu: Mapping[str, Any], backend: str) -> str:
    error, provider = facts.probed[backend].error, findings.get("ONNX Runtime on GPUs")
    if provider is None:
        return f"ONNX Runtime: {error}"
    if provider.status == "missing":
        return "the installed ONNX Runtime is a build without CUDA"
    return "" if provider.status == "ok" else f"ONNX Runtime: {provider.found}"


def _why_not_tensorrt(facts: Facts, findings: Mapping[str, Finding], gpu: Mapping[str, Any], backend: str) -> str:
    probed, title = facts.probed[backend], _TITLES[backend]
    finding = findings[title]
    if finding.status == "missing":
        return f"{title} is not installed"
    if finding.status == "problem":
        return finding.found if probed.error is not None else f"{title} {finding.found}"
    if probed.facts["ahead_of_time"] and gpu["architecture"] not in probed.facts["targets"]:
        return f"{title} {probed.facts['version']} has no code for {gpu['architecture']}"
    return ""


def _split(error: str | None, remedy: str = "") -> tuple[str, str]:
    """What an error's sentence says is wrong, and what to do: what it says itself, or `remedy`."""
    what, _, advice = (error or "").partition("; ")
    return what, advice or remedy


def _version(text: str | None) -> _Version | None:
    found = re.match(r"(\d+)\.(\d+)", text or "")
    return None if found is None else _Version(int(found[1]), int(found[2]))


def _usable(facts: Facts) -> list[Mapping[str, Any]]:
    """The GPUs that answered."""
    return [gpu for gpu in facts.probed["driver"].facts.get("gpus", ()) if gpu["error"] is None]


def _driver_cuda(facts: Facts) -> _Version | None:
    """The newest CUDA that the driver speaks."""
    number = facts.probed["driver"].facts.get("cuda")
    return None if number is None else _Version(number // 1000, number % 1000 // 10)


def _nvrtc_version(facts: Facts) -> _Version | None:
    number = facts.probed["nvrtc"].facts.get("version")
    # Where it could not compile, the package says what it is.
    return _Version(*number) if number is not None else _version(facts.packages.get("nvidia-cuda-nvrtc"))


def _built_for(facts: Facts, pattern: str) -> _Version | None:
    """The newest CUDA that packages are built for, by the group of `pattern` in their names."""
    matches = [re.fullmatch(pattern, name) for name in facts.packages]
    return max((_Version(int(match[1])) for match in matches if match and match[1]), default=None)


def _too_new(built: _Version | None, driver: _Version | None) -> bool:
    """Whether the driver refuses what is built for this CUDA, as far as both are known."""
    return built is not None and driver is not None and built.major > driver.major


def _too_old(gpu: Mapping[str, Any]) -> bool:
    return int(gpu["architecture"].removeprefix("sm_")) < _OLDEST_GPU


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' if count != 1 else ''}"

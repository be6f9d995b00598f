"""The doctor: what it makes of machines that are made up here, and of the one that runs the tests."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import types
from typing import Any

import pytest
from rich.console import Console

from warpcache.engine.probes import PROBES, Probed
from warpcache.tasks import doctor
from warpcache.tasks.doctor import Facts, Finding, Pair, Report, diagnose, examine, print_report

GB = 10**9
MISSING = Probed(error="it is not installed", missing=True)
RTX_TARGETS = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121"]
RTX = Probed({"version": "1.7.1.116", "ahead_of_time": True, "targets": RTX_TARGETS})
TENSORRT = Probed({"version": "10.13.0", "ahead_of_time": False, "targets": []})
NO_DRIVER = Probed(
    {
        "cuda": None,
        "driver": None,
        "found": False,
        "error": "no NVIDIA driver was found (libcuda.so.1); install the driver of this machine's GPU",
        "gpus": [],
    }
)


def onnxruntime(*providers: str, **changes: Any) -> Probed:
    facts = {"version": "1.31.1", "cuda": None, "missing_libraries": [], "cudnn": None} | changes
    return Probed({**facts, "providers": [*providers, "CPUExecutionProvider"]})


def driver(cuda: int = 13000, *gpus: tuple[str, str], **changes: Any) -> Probed:
    seen = [
        {
            "device": f"cuda:{index}",
            "error": None,
            "name": name,
            "architecture": architecture,
            "free_bytes": 3 * GB,
            "total_bytes": 4 * GB,
        }
        for index, (name, architecture) in enumerate(gpus)
    ]
    return Probed({"cuda": cuda, "driver": "580.65.06", "error": None, "found": True, "gpus": seen} | changes)


ON_GPU = onnxruntime("CUDAExecutionProvider", cuda="13.0", cudnn=True)
H200 = ("NVIDIA H200", "sm_90")
RTX4090 = ("NVIDIA GeForce RTX 4090", "sm_89")


def machine(*, packages: dict[str, str] | None = None, **probed: Probed) -> Facts:
    """A machine with everything for its GPU; `probed` by probe, with _ for -."""
    found = {
        "onnxruntime": ON_GPU,
        "driver": driver(13000, RTX4090),
        "nvrtc": Probed({"version": [13, 0]}),
        "tensorrt": TENSORRT,
        "tensorrt-rtx": RTX,
    } | {name.replace("_", "-"): value for name, value in probed.items()}
    installed = (
        {"numpy": "2.4.6", "onnxruntime-gpu": "1.31.1", "cuda-python": "13.4.4"} if packages is None else packages
    )
    cache = {"folder": "/c/engines", "exists": True, "writable": True, "engines": 2, "size_bytes": 3_000_000}
    return Facts("Linux 6.1 (x86_64), Python 3.11.7", 8, installed, found, cache=cache)


def finding(facts: Facts, name: str) -> Finding:
    (found,) = (found for found in diagnose(facts).findings if found.name == name)
    return found


def pair(facts: Facts, device: str, backend: str) -> Pair:
    (found,) = (p for p in diagnose(facts).pairs if (p.device, p.backend) == (device, backend))
    return found


def test_a_machine_with_everything_has_nothing_to_do():
    report = diagnose(machine())
    assert {found.status for found in report.findings} <= {"ok", "missing"}
    assert [found.name for found in report.findings if found.status == "missing"] == ["torch"]
    assert [(p.device, p.backend) for p in report.pairs if p.works] == [
        ("cpu", "onnxruntime"),
        ("cuda:0", "onnxruntime"),
        ("cuda:0", "tensorrt"),
        ("cuda:0", "tensorrt-rtx"),
    ]
    assert finding(machine(), "cuda:0").found == "NVIDIA GeForce RTX 4090, sm_89, 3 GB of 4 GB are free"
    assert finding(machine(), "engine cache").found == "/c/engines: 2 engines, 3 MB"


def test_no_driver():
    facts = machine(driver=NO_DRIVER)
    assert finding(facts, "NVIDIA driver") == Finding(
        "NVIDIA driver", "missing", "not installed", "for a GPU install its driver; without one the CPU does all"
    )
    assert pair(facts, "cpu", "onnxruntime").works
    for backend in ("onnxruntime", "tensorrt", "tensorrt-rtx"):
        assert pair(facts, "cuda", backend) == Pair("cuda", backend, False, "NVIDIA driver: not installed")


def test_a_driver_that_is_too_old_for_anything():
    sentence = "the NVIDIA driver speaks CUDA 11.4, older than 12.0; update the driver"
    facts = machine(driver=driver(11040, error=sentence))
    assert finding(facts, "NVIDIA driver") == Finding(
        "NVIDIA driver", "problem", "the NVIDIA driver speaks CUDA 11.4, older than 12.0", "update the driver"
    )
    assert not pair(facts, "cuda", "tensorrt").works


def test_a_driver_that_is_older_than_the_installed_cuda():
    """CUDA 12's driver under CUDA 13's packages: nothing that those make or are built for runs."""
    packages = {"onnxruntime-gpu": "1.31.1", "cuda-python": "13.4.4", "tensorrt-rtx-cu13": "1.7.1.116"}
    facts = machine(driver=driver(12040, RTX4090), packages=packages)
    found = finding(facts, "NVIDIA driver")
    assert found.status == "problem"
    assert found.found == "580.65.06, CUDA 12.4: older than the installed CUDA 13.0 packages, whose code it refuses"
    # No package of the older CUDA is named: there is no nvidia-cuda-nvrtc of 12, and cuda-python has to be 13.4.
    assert found.advice == "update the driver to one of CUDA 13"
    assert pair(facts, "cuda:0", "onnxruntime").reason == (
        "ONNX Runtime: its CUDA provider is built for CUDA 13.0, the driver speaks 12.4"
    )
    assert pair(facts, "cuda:0", "tensorrt-rtx").reason == (
        "TensorRT-RTX 1.7.1.116 is built for CUDA 13, the driver speaks 12.4"
    )
    assert finding(facts, "TensorRT-RTX").status == "problem"
    # Of full TensorRT nothing says what it is built for.
    assert pair(facts, "cuda:0", "tensorrt").works


def test_an_nvrtc_that_is_newer_than_the_driver_within_a_major_is_the_ptx_trap():
    facts = machine(nvrtc=Probed({"version": [13, 5]}))
    found = finding(facts, "NVRTC and headers")
    assert found.status == "note"
    assert found.found.startswith(
        "13.5, compiles kernels; newer than the driver's CUDA 13.0, which refuses its PTX but"
    )
    assert '"nvidia-cuda-nvrtc==13.0.*"' in found.advice
    assert finding(facts, "NVIDIA driver").status == "ok"
    assert finding(machine(nvrtc=Probed({"version": [12, 9]})), "NVRTC and headers").status == "ok"


def test_rtx_on_a_hopper_gpu():
    facts = machine(driver=driver(13000, H200, RTX4090))
    found = finding(facts, "TensorRT-RTX")
    assert found.status == "note"
    assert found.found.endswith("and has no code for cuda:0 (sm_90)")
    assert pair(facts, "cuda:0", "tensorrt-rtx") == Pair(
        "cuda:0", "tensorrt-rtx", False, "TensorRT-RTX 1.7.1.116 has no code for sm_90"
    )
    assert pair(facts, "cuda:0", "tensorrt").works
    assert pair(facts, "cuda:0", "onnxruntime").works
    assert pair(facts, "cuda:1", "tensorrt-rtx").works


def test_both_onnx_runtimes():
    facts = machine(packages={"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.30.0"})
    assert finding(facts, "ONNX Runtime") == Finding(
        "ONNX Runtime",
        "problem",
        "onnxruntime 1.31.1 and onnxruntime-gpu 1.30.0 unpack into the same folder",
        'pip uninstall -y onnxruntime onnxruntime-gpu, then install one of "warpcache[cpu]" or "warpcache[gpu]" '
        "(they exclude each other)",
    )


@pytest.mark.parametrize(
    ("probed", "status", "found", "works"),
    [
        (MISSING, "problem", "not installed", False),
        (Probed(error="it crashed (SIGSEGV)"), "problem", "cannot be used: it crashed (SIGSEGV)", False),
        (onnxruntime(version="1.22.0"), "problem", "1.22.0 for the CPU is older than 1.23", True),
        (onnxruntime(), "ok", "1.31.1 for the CPU", True),
    ],
)
def test_onnx_runtime_in_other_states(probed, status, found, works):
    facts = machine(onnxruntime=probed, packages={})
    assert (finding(facts, "ONNX Runtime").status, finding(facts, "ONNX Runtime").found) == (status, found)
    assert pair(facts, "cpu", "onnxruntime").works == works
    assert not pair(facts, "cuda:0", "onnxruntime").works


def test_the_cpu_build_beside_a_gpu():
    facts = machine(onnxruntime=onnxruntime())
    found = finding(facts, "ONNX Runtime on GPUs")
    assert (found.status, found.found) == ("missing", "this ONNX Runtime is a build without CUDA")
    assert pair(facts, "cuda:0", "onnxruntime").reason == "the installed ONNX Runtime is a build without CUDA"


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"missing_libraries": ["libcublas.so.13", "libcuda.so.1"]}, "needs libcublas.so.13, which cannot be found"),
        ({"cudnn": False}, "needs cuDNN 9, which cannot be found"),
    ],
)
def test_what_the_cuda_provider_needs_is_named(changes, found):
    probed = onnxruntime("CUDAExecutionProvider", **{"cuda": "13.0", "cudnn": True} | changes)
    facts = machine(onnxruntime=probed)
    assert finding(facts, "ONNX Runtime on GPUs") == Finding(
        "ONNX Runtime on GPUs", "problem", f"its CUDA provider {found}", 'pip install "onnxruntime-gpu[cuda,cudnn]"'
    )
    assert pair(facts, "cuda:0", "onnxruntime").reason == f"ONNX Runtime: its CUDA provider {found}"
    assert pair(facts, "cpu", "onnxruntime").works


def test_a_missing_driver_library_is_the_drivers_matter():
    probed = onnxruntime("CUDAExecutionProvider", cuda="13.0", cudnn=True, missing_libraries=["libcuda.so.1"])
    assert finding(machine(onnxruntime=probed, driver=NO_DRIVER), "ONNX Runtime on GPUs").status == "ok"


def test_without_cuda_python():
    facts = machine(driver=MISSING, nvrtc=MISSING, packages={"onnxruntime": "1.31.1"}, onnxruntime=onnxruntime())
    assert finding(facts, "cuda-python").status == "missing"
    assert finding(facts, "NVIDIA driver").status == "note"
    assert finding(facts, "NVRTC and headers").status == "missing"
    assert pair(facts, "cpu", "onnxruntime").works
    assert pair(facts, "cuda", "tensorrt-rtx").reason == "cuda-python is not installed"


def test_a_gpu_that_does_not_answer_and_one_that_is_too_old():
    seen = driver(13000, RTX4090, ("Tesla P100", "sm_60"))
    seen.facts["gpus"][0] = {"device": "cuda:0", "error": "making a context on cuda:0 failed: used up; close others"}
    facts = machine(driver=seen)
    assert finding(facts, "cuda:0") == Finding(
        "cuda:0", "problem", "making a context on cuda:0 failed: used up", "close others"
    )
    assert finding(facts, "cuda:1").status == "problem"
    assert pair(facts, "cuda:0", "tensorrt").reason == "making a context on cuda:0 failed: used up"
    assert pair(facts, "cuda:1", "onnxruntime").reason == "Tesla P100 (sm_60) is older than sm_75"


def test_a_driver_that_shows_no_gpu():
    facts = machine(driver=driver(13000))
    assert finding(facts, "GPUs").advice == "check nvidia-smi and CUDA_VISIBLE_DEVICES"
    assert pair(facts, "cuda", "onnxruntime").reason == "the driver shows no GPU"


def test_a_driver_that_hangs():
    facts = machine(driver=Probed(error="it did not answer within 60 s"))
    assert finding(facts, "NVIDIA driver").found == "cannot be asked: it did not answer within 60 s"
    assert not pair(facts, "cuda", "onnxruntime").works


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_a_broken_tensorrt(name):
    error = "it is installed but cannot be loaded (libnvinfer.so.10); install it again"
    facts = machine(**{name.replace("-", "_"): Probed(error=error)})
    found = finding(facts, {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}[name])
    assert (found.status, found.advice) == ("problem", "install it again")
    assert pair(facts, "cuda:0", name).reason == "it is installed but cannot be loaded (libnvinfer.so.10)"


def test_nvrtc_without_headers_is_a_problem_and_without_itself_is_missing():
    error = "probe.cu needs CUDA's headers, and none were found; install them with pip install nvidia-cuda-runtime"
    facts = machine(nvrtc=Probed(error=error), packages={"nvidia-cuda-nvrtc": "13.0.88"})
    assert finding(facts, "NVRTC and headers") == Finding(
        "NVRTC and headers",
        "problem",
        "probe.cu needs CUDA's headers, and none were found",
        "install them with pip install nvidia-cuda-runtime",
    )
    assert finding(machine(nvrtc=Probed(error="NVRTC is missing")), "NVRTC and headers").status == "missing"


@pytest.mark.parametrize(
    ("torch_cuda", "cuda", "status", "found"),
    [
        (None, 13000, "note", "2.13.0 for the CPU"),
        ("13.0", 13000, "ok", "2.13.0 for CUDA 13.0, its GPU tensors are taken by DLPack"),
        ("12.8", 13000, "ok", "2.13.0 for CUDA 12.8, its GPU tensors are taken by DLPack"),
        ("13.0", 12040, "problem", "2.13.0 for CUDA 13.0, the driver speaks 12.4"),
    ],
)
def test_torch_beside_a_gpu(torch_cuda, cuda, status, found):
    facts = machine(driver=driver(cuda, RTX4090), packages={"torch": "2.13.0"})
    facts = dataclasses.replace(facts, torch_cuda=torch_cuda)
    assert (finding(facts, "torch").status, finding(facts, "torch").found) == (status, found)


def test_other_libraries_arrays():
    facts = machine(packages={"cupy-cuda13x": "14.0", "pycuda": "2026.1"})
    assert finding(facts, "CuPy").found == "cupy-cuda13x 14.0, its arrays are taken without a copy"
    assert finding(facts, "PyCUDA").found == "pycuda 2026.1, its arrays are taken without a copy"
    facts = machine(packages={"cupy-cuda13x": "14.0"}, driver=driver(12040, RTX4090))
    assert finding(facts, "CuPy").status == "problem"
    facts = machine(packages={"cupy-cuda13x": "14.0", "cupy-cuda12x": "14.0"})
    assert finding(facts, "CuPy").advice == "uninstall all but one"


def test_an_engine_cache_that_cannot_be_written_or_is_not_there():
    facts = machine()
    facts = dataclasses.replace(facts, cache={**facts.cache, "writable": False})
    assert finding(facts, "engine cache").advice == "set WARPCACHE_CACHE to a folder of yours"
    facts = dataclasses.replace(facts, cache={**facts.cache, "writable": True, "exists": False})
    assert finding(facts, "engine cache").found == "/c/engines, which the first build makes"
    facts = dataclasses.replace(facts, cache={"error": "its folder cannot be looked at"})
    assert finding(facts, "engine cache").status == "problem"


@pytest.mark.parametrize("error", [None, "it crashed (SIGABRT)"])
def test_nothing_at_all_still_gives_a_report(error):
    probed = {name: Probed(error=error or "it is not installed", missing=error is None) for name in PROBES}
    report = diagnose(Facts("Windows 11, Python 3.12", 0, {}, probed))
    assert not any(pair.works for pair in report.pairs)
    assert all(pair.reason for pair in report.pairs)
    json.dumps(report.to_json())


def every_report() -> list[Report]:
    return [
        diagnose(facts)
        for facts in (
            machine(),
            machine(driver=NO_DRIVER),
            machine(driver=driver(12040, H200), packages={"tensorrt-cu13": "11.4"}),
            machine(onnxruntime=onnxruntime("CUDAExecutionProvider", cuda="13.0", cudnn=False)),
        )
    ]


@pytest.mark.parametrize("report", every_report())
def test_every_no_has_a_reason_and_every_problem_an_advice(report):
    for p in report.pairs:
        assert p.works == (not p.reason)
    for found in report.findings:
        assert found.found
        assert found.advice or found.status == "ok"
        assert "\n" not in found.found + found.advice


def printed(report: Report) -> str:
    out = io.StringIO()
    print_report(report, console=Console(file=out, width=200))
    return out.getvalue()


def test_it_is_printed_with_brackets_and_all():
    text = printed(diagnose(machine(onnxruntime=MISSING, packages={}, driver=driver(13000, H200))))
    assert 'install one of "warpcache[cpu]" or "warpcache[gpu]"' in text
    assert "TensorRT-RTX 1.7.1.116 has no code for sm_90" in text
    assert "NVIDIA H200, sm_90" in text


def test_json_is_what_was_found():
    report = diagnose(machine())
    record = json.loads(json.dumps(report.to_json()))
    assert record["findings"][0] == {
        "name": "system",
        "status": "ok",
        "found": "Linux 6.1 (x86_64), Python 3.11.7, 8 cores",
        "advice": "",
    }
    assert {"device": "cpu", "backend": "onnxruntime", "works": True, "reason": ""} in record["pairs"]


def test_a_broken_environment_does_not_stop_it(monkeypatch):
    """Metadata that raise, a home folder that is not there: what cannot be seen is left out."""

    def broken(*_: object) -> Any:
        raise RuntimeError("broken")

    for name in ("_packages", "_torch_cuda", "_cache", "_cores"):
        monkeypatch.setattr(doctor, name, broken)
    monkeypatch.setattr(doctor, "probe", lambda name: Probed(error="no process could be started to look at it"))
    report = examine()
    assert finding_of(report, "engine cache").status == "problem"
    assert not any(pair.works for pair in report.pairs)


def finding_of(report: Report, name: str) -> Finding:
    (found,) = (found for found in report.findings if found.name == name)
    return found


def test_torchs_cuda_is_read_without_importing_it(tmp_path, monkeypatch):
    (tmp_path / "version.py").write_text("__version__ = '2.13.0'\ncuda: Optional[str] = '13.0'\nhip = None\n")
    spec = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: spec)
    assert doctor._torch_cuda() == "13.0"
    (tmp_path / "version.py").write_text("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n")
    assert doctor._torch_cuda() is None


def test_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("WARPCACHE_CACHE", str(tmp_path))
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "x.engine").write_bytes(bytes(1500))
    report = examine()
    import onnxruntime

    assert onnxruntime.__version__ in finding_of(report, "ONNX Runtime").found
    assert finding_of(report, "engine cache").found == f"{tmp_path / 'engines'}: 1 engine, 1.5 kB"
    assert next(p for p in report.pairs if p.device == "cpu" and p.backend == "onnxruntime").works
    driver_found = finding_of(report, "NVIDIA driver")
    if os.path.exists("/dev/nvidiactl"):
        assert driver_found.status in ("ok", "problem")
    else:
        assert driver_found.status in ("missing", "note")
        assert not any(p.works for p in report.pairs if p.device != "cpu")
    assert "What can run here" in printed(report)

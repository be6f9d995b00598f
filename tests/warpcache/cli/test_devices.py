"""The command line on devices: what is refused without a GPU, and frames answered on a GPU in software."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner, Result

from warpcache.cli.main import cli
from warpcache.engine.errors import DeviceError
from warpcache.report.policies import write_report
from warpcache.report.results import PolicyResult, ReportData
from warpcache.tasks.device_choice import DeviceChoice

FRAMES = 6
# One convolution of 72 products and one of 72: float32 rounds each to 6e-8 of values below 4; the same ONNX Runtime
# kernels run behind the software TensorRT, fused differently at most.
TOLERANCE = 1e-5


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="warpcache")


def assert_failed(result: Result, opening: str) -> str:
    assert result.exit_code == 1, result.output
    lines = [line for line in result.stderr.splitlines() if not line.endswith(" ...")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith(f"warpcache: {opening}"), result.stderr
    return lines[0]


def whole(bundle: Path, x: np.ndarray) -> np.ndarray:
    """What the whole generator answers, by ONNX Runtime alone: [T, 3, H, W]."""
    session = onnxruntime.InferenceSession(bundle / "generator.onnx", providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(["image"], {"x": frame[None]})[0] for frame in x])


@pytest.fixture
def frames() -> np.ndarray:
    """Inputs of the tiny bundle: float32 [6, 3, 16, 16] in [-1, 1]."""
    return np.random.default_rng(3).uniform(-1, 1, (FRAMES, 3, 16, 16)).astype(np.float32)


@pytest.fixture
def inputs(tmp_path: Path, frames: np.ndarray) -> Path:
    path = tmp_path / "inputs.npz"
    np.savez(path, x=frames)
    return path


@pytest.fixture
def software_rtx(software_cuda: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A GPU in software with TensorRT-RTX's double on it, and a cache of engines of its own."""
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", importlib.import_module("tests_software_tensorrt"))
    monkeypatch.setenv("WARPCACHE_CACHE", str(tmp_path / "cache"))
    # An architecture that TensorRT-RTX builds for.
    software_cuda.configure(compute_major=8, compute_minor=9)
    return software_cuda


ON_GPU = ("--device", "cuda:0", "--backend", "tensorrt-rtx")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--device", "gpu"], "unknown device 'gpu'; choose 'cpu' or 'cuda:N'"),
        (["--device", "cuda:x"], "unknown device 'cuda:x'"),
        (["--backend", "openvino"], "'openvino' is not one of"),
        (["--graphs", "maybe"], "'maybe' is not one of"),
        (["--producer-device", "gpu1"], "unknown device 'gpu1'"),
        (["--graphs", "on"], "--graphs is for a GPU, but the device is the CPU"),
        (["--producer-device", "cuda:1"], "--producer-device is for a GPU, but the device is the CPU"),
    ],
)
@pytest.mark.parametrize("command", ["run", "bench"])
def test_what_is_no_device_is_wrong_usage(command: str, options: list[str], word: str) -> None:
    out = ["--out", "y.npz"] if command == "run" else []
    result = call(command, "b.warp", "x.npz", *out, *options)
    assert result.exit_code == 2, result.output
    assert word in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("options", "opening"),
    [
        (["--backend", "tensorrt-rtx"], "backend 'tensorrt-rtx' does not run on the CPU; choose device='cuda:0'"),
        (["--device", "cuda:0", "--threads", "2"], "threads are the CPU's, but the device is 'cuda:0'"),
        (["--device", "cuda:0", "--producer-device", "cpu"], "a producer cannot run on 'cpu'"),
    ],
)
def test_options_that_exclude_each_other(
    options: list[str], opening: str, tiny_bundle: Path, inputs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.npz"
    assert_failed(call("run", tiny_bundle, inputs, "--out", out, *options), opening)
    assert_failed(call("bench", tiny_bundle, inputs, "--policy", "async", *options), opening)
    assert not out.exists()


@pytest.mark.usefixtures("no_cuda_driver")
@pytest.mark.parametrize("command", ["run", "bench", "demo"])
def test_without_a_gpu_one_sentence_names_the_doctor(
    command: str, tiny_bundle: Path, inputs: Path, tmp_path: Path
) -> None:
    what = {
        "run": [tiny_bundle, inputs, "--out", tmp_path / "out.npz"],
        "bench": [tiny_bundle, inputs],
        "demo": ["--frames", "2", "--out", tmp_path / "demo"],
    }[command]
    said = assert_failed(call(command, *what, "--device", "cuda:0"), "no NVIDIA driver was found")
    assert said.endswith("`warpcache doctor` says what is here")
    assert [path.name for path in tmp_path.iterdir()] == ["inputs.npz"]


def test_the_cpu_is_named_where_it_ran(tiny_bundle: Path, inputs: Path, tmp_path: Path) -> None:
    report = tmp_path / "bench.json"
    result = call("bench", tiny_bundle, inputs, "--policy", "full", "--age", "1", "--json", report)
    assert result.exit_code == 0, result.output
    document = json.loads(report.read_text())
    assert [(row["device"], row["backend"], row["graphs"]) for row in document["rows"]] == [
        ("cpu", "onnxruntime", 0)
    ] * 2
    assert not {"gpus", "driver", "cuda"} & set(document["environment"])
    assert re.search(r"^ +device +cpu +cpu *$", result.stdout, re.MULTILINE)
    assert "CUDA graphs" not in result.stdout


@pytest.mark.parametrize("graphs", ["auto", "off"])
def test_run_on_a_gpu_in_software_is_run_on_the_cpu(
    graphs: str, software_rtx: Any, tiny_bundle: Path, inputs: Path, frames: np.ndarray, tmp_path: Path
) -> None:
    out, report = tmp_path / "out.npz", tmp_path / "run.json"
    common = ["run", tiny_bundle, inputs, "--out", out, "--age", "2"]
    result = call(*common, *ON_GPU, "--graphs", graphs, "--json", report)
    assert result.exit_code == 0, result.output
    image = whole(tiny_bundle, frames)
    with np.load(out) as arrays:
        np.testing.assert_allclose(arrays["image"][0], image[0], atol=TOLERANCE)
        for t in range(2, FRAMES):
            # The tiny warp exit answers y_s + 0.1 x_t.
            expected = image[t - 2] + np.float32(0.1) * frames[t]
            np.testing.assert_allclose(arrays["image"][t], expected, atol=TOLERANCE)
    document = json.loads(report.read_text())
    (row,) = document["rows"]
    assert (row["device"], row["backend"]) == ("cuda:0", "tensorrt-rtx")
    assert (row["graphs"] > 0) == (graphs == "auto")
    environment = document["environment"]
    assert environment["cuda"] == "13.0"  # what software CUDA says it speaks
    assert list(environment["gpus"]) == ["cuda:0"]
    assert environment["gpus"]["cuda:0"]["architecture"] == "sm_89"
    assert environment["gpus"]["cuda:0"]["name"].startswith("Software CUDA")
    assert environment["gpus"]["cuda:0"]["memory_bytes"] == 2**30
    for word in ("cuda:0", "tensorrt-rtx", "CUDA graphs"):
        assert word in result.stdout, word


def test_bench_on_two_gpus_in_software(software_rtx: Any, tiny_bundle: Path, inputs: Path, tmp_path: Path) -> None:
    report = tmp_path / "bench.json"
    result = call(
        *("bench", tiny_bundle, inputs, *ON_GPU, "--producer-device", "cuda:1"),
        *("--policy", "async", "--fps", "100", "--json", report),
    )
    # The whole generator, which quality is measured against, has no producer that could be on another GPU.
    assert result.exit_code == 0, result.output
    document = json.loads(report.read_text())
    assert sorted(document["environment"]["gpus"]) == ["cuda:0", "cuda:1"]
    (row,) = document["rows"]
    assert (row["policy"], row["device"], row["quality"]["against"]) == ("async", "cuda:0", "whole generator")
    alone = call("bench", tiny_bundle, inputs, *ON_GPU, "--producer-device", "cuda:1", "--policy", "every:2")
    assert_failed(alone, "producer_devices goes with policy 'async', but the policy is 'every:2'")


def test_engines_built_ahead_are_the_ones_that_run(
    software_rtx: Any, tiny_bundle: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = call("build", tiny_bundle, "--backend", "tensorrt-rtx")
    assert built.exit_code == 0, built.output
    assert "for sm_89 (the GPU that is here)" in built.stdout

    import warpcache.engine.tensorrt.engines

    def must_not(*arguments: Any, **options: Any) -> None:
        raise AssertionError("an engine was built that should have been found")

    monkeypatch.setattr(warpcache.engine.tensorrt.engines, "build_engines_isolated", must_not)
    result = call("run", tiny_bundle, inputs, "--out", tmp_path / "out.npz", "--age", "1", *ON_GPU)
    assert result.exit_code == 0, result.output


def test_a_gpu_that_the_library_has_no_code_for_is_named(
    software_rtx: Any, tiny_bundle: Path, inputs: Path, tmp_path: Path
) -> None:
    """As TensorRT-RTX on a Hopper: what does not help there, as naming another target, is not said."""
    software_rtx.configure(compute_major=7, compute_minor=0)
    said = assert_failed(
        call("run", tiny_bundle, inputs, "--out", tmp_path / "out.npz", "--age", "1", *ON_GPU),
        "TensorRT-RTX 1.",
    )
    assert "has no code for cuda:0 (Software CUDA 0, sm_70); it knows sm_75" in said
    assert said.endswith("take 'tensorrt' or 'onnxruntime' on this GPU")


def test_the_page_names_the_gpu(tmp_path: Path) -> None:
    facts = {
        "driver": "580.65.06",
        "cuda": "13.0",
        "gpus": {"cuda:0": {"name": "Some GPU", "architecture": "sm_89", "memory_bytes": 1}},
    }
    result = PolicyResult("full", [1.0], [0], ["whole"], 30.0, placement="cuda:0/tensorrt-rtx", graphs=3)
    write_report(tmp_path / "page.html", ReportData("title", "caption", [result], environment=facts))
    page = (tmp_path / "page.html").read_text()
    for word in ("Some GPU (sm_89)", "580.65.06", "tensorrt-rtx", "cuda:0"):
        assert word in page, word


@pytest.mark.usefixtures("no_cuda_driver")
def test_facts_are_asked_of_gpus_only() -> None:
    assert DeviceChoice().facts() == {}
    with pytest.raises(DeviceError, match="no NVIDIA driver was found"):
        DeviceChoice(device="cuda:0").facts()


def test_the_driver_s_version_is_read_where_linux_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from warpcache.engine.cuda import gpu_facts

    for text in (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:15:08 UTC 2025\nGCC version: 12",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder@U22)",
    ):
        (tmp_path / "version").write_text(text)
        monkeypatch.setattr(gpu_facts, "_KERNEL_MODULE", tmp_path / "version")
        assert gpu_facts.driver_version() == "580.65.06"


@pytest.mark.gpu
def test_run_on_the_gpu_that_is_here(tiny_bundle: Path, inputs: Path, frames: np.ndarray, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    environment = {**os.environ, "WARPCACHE_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-P", "-m", "warpcache", "run", tiny_bundle, inputs, "--out", out, "--age", "0"]
    result = subprocess.run(
        [*command, "--device", "cuda:0"], capture_output=True, text=True, check=False, env=environment
    )
    if "no NVIDIA driver was found" in result.stderr or "CUDA provider" in result.stderr:
        pytest.skip(result.stderr.splitlines()[-1])
    assert result.returncode == 0, result.stderr
    with np.load(out) as arrays:
        # TF32 on the GPU: 10 bits of mantissa, 72 products of values below 1.
        np.testing.assert_allclose(arrays["image"], whole(tiny_bundle, frames), atol=5e-3)


def test_doctor_prints_for_people_and_for_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    import warpcache.tasks.doctor as doctor

    finding = doctor.Finding("NVIDIA driver", "missing", "not installed", "install the driver")
    report = doctor.Report(findings=(finding,), pairs=(doctor.Pair("cuda", "tensorrt", False, "no driver"),))
    # What it looks at takes seconds and is tested where it is written.
    monkeypatch.setattr(doctor, "examine", lambda: report)
    shown, printed = call("doctor"), call("doctor", "--json")
    assert (shown.exit_code, printed.exit_code) == (0, 0)
    for word in ("NVIDIA driver", "not installed", "install the driver", "tensorrt"):
        assert word in shown.stdout, word
    assert json.loads(printed.stdout) == report.to_json()

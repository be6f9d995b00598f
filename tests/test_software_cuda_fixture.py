"""The fixtures of software CUDA: what they refuse, what they turn back, and how a process comes to have a driver."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from software_cuda import build, fixture

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="software CUDA is built on Linux only")

TESTS = Path(__file__).resolve().parent

CONFTEST = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from software_cuda.fixture import no_cuda_driver, software_cuda, software_cuda_driver

def pytest_configure(config):
    config.addinivalue_line("markers", "leaves_cuda_behind: x")
"""

CASES = """
import ctypes
import pytest
from cuda.bindings import driver as cuda
from warpcache.kernels import driver

kept = []

def context():
    # Never given back: a context that ends takes everything in it along, and then nothing is left behind.
    cuda.cuCtxSetCurrent(cuda.cuDevicePrimaryCtxRetain(0)[1])

@pytest.fixture(scope="module")
def longer(software_cuda_driver):
    context()
    return int(cuda.cuMemAlloc(64)[1])

def test_before_it_is_loaded():
    with pytest.raises(driver.DeviceError, match="^no NVIDIA driver was found"):
        driver.load()

def test_clean(software_cuda):
    assert driver.device_count() == 2
    context()
    assert cuda.cuMemFree(cuda.cuMemAlloc(4)[1])[0] == 0
    software_cuda.configure(compute_major=8, compute_minor=6)
    assert driver.Context(0).architecture == "sm_86"

def test_what_was_turned_is_turned_back(software_cuda):
    assert driver.Context(0).architecture == "sm_90"

def test_leaves_memory(software_cuda):
    context()
    kept.append(cuda.cuMemAlloc(100)[1])

def test_is_not_blamed_for_what_others_left(software_cuda):
    pass

def test_leaves_a_stream(software_cuda):
    context()
    kept.append(cuda.cuStreamCreate(1)[1])

@pytest.mark.leaves_cuda_behind
def test_may_leave_an_event(software_cuda):
    context()
    kept.append(cuda.cuEventCreate(0)[1])

def test_writes_past_the_end(software_cuda):
    context()
    pointer = cuda.cuMemAlloc(10)[1]
    ctypes.memset(int(pointer) + 10, 0, 1)
    cuda.cuMemFree(pointer)

def test_garbage_is_no_leak(software_cuda):
    from warpcache.engine.cuda.device import CudaDevice
    device = CudaDevice(0)
    memory = device.memory(100, "a test")
    memory.itself = memory

def test_a_hold_that_is_forgotten(software_cuda):
    context()
    stream = cuda.cuStreamCreate(1)[1]
    event = cuda.cuEventCreate(0)[1]
    software_cuda.hold(int(stream))
    cuda.cuEventRecord(event, stream)
    cuda.cuStreamDestroy(stream)
    cuda.cuEventDestroy(event)

def test_uses_what_lives_longer(longer, software_cuda):
    assert cuda.cuMemsetD8(longer, 0, 64)[0] == 0

def test_loses_its_context(longer, software_cuda):
    software_cuda.hold(0)
    context()
    pointer = cuda.cuMemAlloc(4)[1]
    cuda.cuMemsetD8(pointer, 0, 4)
    cuda.cuMemFree(pointer)
    software_cuda.release(0)
    assert cuda.cuCtxSynchronize()[0].name == "CUDA_ERROR_ILLEGAL_ADDRESS"
    assert len(software_cuda.reports()) == 1

def test_goes_on_after_it(software_cuda):
    context()
    assert cuda.cuMemFree(cuda.cuMemAlloc(4)[1])[0] == 0

def test_without_a_driver_again(no_cuda_driver):
    with pytest.raises(driver.DeviceError, match="^no NVIDIA driver was found"):
        driver.load()

def test_and_with_one(software_cuda):
    assert driver.device_count() == 2
"""

# How each ends; a leak is found when the test has passed.
ENDS = {
    "test_leaves_memory": "the test left on the software GPU: {'device_blocks': 1, 'device_bytes': 100}",
    "test_leaves_a_stream": "the test left on the software GPU: {'streams': 1}",
    "test_writes_past_the_end": "software CUDA reports: a device block of 10 bytes was written past its end",
}


def test_tests_give_back_what_they_took(software_cuda_driver: fixture.SoftwareCuda, tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_cases.py").write_text(CASES)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-rA"]
    run = subprocess.run([*command, "--tb=line", str(tmp_path)], cwd=tmp_path, capture_output=True, text=True)
    summary = run.stdout[run.stdout.index("short test summary info") :]
    names = re.findall(r"^def (test_\w+)", CASES, re.MULTILINE)
    for name in names:
        assert f"PASSED test_cases.py::{name}\n" in summary
        assert (f"ERROR test_cases.py::{name} - Failed: " in summary) == (name in ENDS)
    for message in ENDS.values():
        assert message in run.stdout
    assert f"{len(names)} passed" in run.stdout
    assert f"{len(ENDS)} errors" in run.stdout


def test_a_real_driver_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fixture, "_has_real_driver", lambda: True)
    with pytest.raises(fixture.SoftwareCudaUnavailable, match=r"^an NVIDIA driver is installed here"):
        fixture.SoftwareCuda()


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.BuildError, match=r"^no C\+\+ compiler is on the path"):
        build.build_driver()


def test_a_folder_that_others_can_write_is_not_trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    try:
        build.compiler()
    except build.BuildError as exc:
        pytest.skip(str(exc))
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path))
    build.build_kernels('extern "C" __global__ void selftest_nothing() {}', "nothing.cu")
    (folder,) = tmp_path.iterdir()
    folder.chmod(0o777)
    with pytest.raises(build.BuildError, match=r"belongs to somebody else or can be written by others; remove it$"):
        build.build_kernels('extern "C" __global__ void selftest_nothing() {}', "nothing.cu")


@pytest.mark.parametrize("wrong", ["configure", "count", "hold", "pending"])
def test_names_that_are_not_there(software_cuda: Any, wrong: str) -> None:
    calls = {
        "configure": (KeyError, lambda: software_cuda.configure(colour=1)),
        "count": (KeyError, lambda: software_cuda.count("colours")),
        "hold": (ValueError, lambda: software_cuda.hold(12345)),
        "pending": (ValueError, lambda: software_cuda.pending(12345)),
    }
    error, call = calls[wrong]
    with pytest.raises(error):
        call()

"""Which TensorRT is here: the real library's facts, and a sentence for every one that does not serve."""

from __future__ import annotations

import logging
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tests_software_tensorrt import software_flavour

from warpcache.engine.errors import BackendError, DeviceError
from warpcache.engine.tensorrt import flavour as tensorrt_flavour
from warpcache.engine.tensorrt.flavour import CURRENT, Flavour


def fake(version: str = "10.13.0", **names: Any) -> Any:
    return SimpleNamespace(__name__="fake", __version__=version, Builder=object, Runtime=object, **names)


def test_tensorrt_rtx_builds_for_the_gpus_that_it_names():
    flavour = Flavour.load("tensorrt-rtx")
    assert flavour.ahead_of_time
    assert set(flavour.targets) >= {"sm_75", "sm_80", "sm_86", "sm_89", "sm_120"}
    assert list(flavour.targets) == sorted(flavour.targets, key=lambda target: int(target[3:]))
    assert flavour.version.startswith("1.")
    assert flavour.title == "TensorRT-RTX"


def test_importing_the_package_imports_no_tensorrt():
    code = (
        "import sys, warpcache.engine.tensorrt.module, warpcache.engine.tensorrt.builder; "
        "sys.exit(any(name.startswith('tensorrt') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


def test_targets_are_sorted_by_number_and_kept_once():
    flavour = software_flavour()
    assert flavour.resolve(("sm_120", "sm_86", "sm_120", "sm_89")) == ("sm_86", "sm_89", "sm_120")


def test_an_unknown_target_is_refused_with_those_that_are_known():
    flavour = Flavour.load("tensorrt-rtx")
    with pytest.raises(
        BackendError, match=r"^TensorRT-RTX 1\..* does not build for 'sm_61'; it knows sm_75, .*current"
    ):
        flavour.resolve(("sm_86", "sm_61"))


def test_no_target_is_refused():
    with pytest.raises(BackendError, match=r"^TensorRT-RTX was given no GPU to build for; name sm_75, .*current"):
        software_flavour().resolve(())


def test_full_tensorrt_builds_for_the_gpu_that_is_here_only():
    with pytest.raises(
        BackendError, match=r"^TensorRT builds for the GPU that is here only, not for 'sm_61'; build on"
    ):
        software_flavour("tensorrt").resolve(("sm_61",))


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_current_without_a_gpu_says_what_is_missing(name, monkeypatch):
    def missing(ordinal: int) -> None:
        raise DeviceError("no NVIDIA driver was found; install it")

    # Patched, because another test may have loaded the driver in software, and there may be a GPU.
    monkeypatch.setattr(tensorrt_flavour, "Context", missing)
    with pytest.raises(
        DeviceError, match=r"^TensorRT.* cannot build for the GPU that is here: no NVIDIA driver was fou"
    ):
        software_flavour(name).resolve((CURRENT,))


class FakeContext:
    """A GPU of the architecture given."""

    name = "a GPU"

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture
        self.closed = False

    def close(self) -> None:
        self.closed = True

    def __str__(self) -> str:
        return "cuda:1"


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_current_is_the_gpu_asked_for_and_leaves_its_context(name, monkeypatch):
    opened: list[tuple[int, FakeContext]] = []

    def context(ordinal: int) -> FakeContext:
        opened.append((ordinal, FakeContext("sm_89")))
        return opened[-1][1]

    monkeypatch.setattr(tensorrt_flavour, "Context", context)
    flavour = software_flavour(name)
    assert flavour.resolve((CURRENT,), device=1) == ("sm_89",)
    # A resolved target is taken again: it is what an engine's key holds.
    assert flavour.resolve(flavour.resolve((CURRENT,), device=1), device=1) == ("sm_89",)
    assert [ordinal for ordinal, _ in opened] == [1] * len(opened)
    assert all(context.closed for _, context in opened)


def test_current_on_a_gpu_that_the_library_does_not_serve(monkeypatch):
    monkeypatch.setattr(tensorrt_flavour, "Context", lambda ordinal: FakeContext("sm_90"))
    with pytest.raises(
        BackendError, match=r"^TensorRT-RTX 1.* has no code for cuda:1 \(a GPU, sm_90\); it knows sm_75"
    ):
        Flavour.load("tensorrt-rtx").resolve((CURRENT,))


# Libraries that do not serve


def test_an_unknown_flavour_is_refused():
    with pytest.raises(BackendError, match=r"^there is no TensorRT flavour 'trt'; take one of tensorrt, tensorrt-rtx"):
        Flavour.load("trt")


@pytest.fixture
def importing(monkeypatch):
    """Let the import of a module name end in what the test wants."""
    outcomes: dict[str, Any] = {}

    def import_module(name: str) -> ModuleType:
        outcome = outcomes[name]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(tensorrt_flavour.importlib, "import_module", import_module)
    return outcomes


def test_a_missing_library_is_named_with_its_pip_command(importing, monkeypatch):
    importing["tensorrt"] = ModuleNotFoundError("No module named 'tensorrt'", name="tensorrt")
    monkeypatch.setattr(tensorrt_flavour.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        BackendError, match=r'^TensorRT is not installed; install it with pip install "warpcache\[tensorrt\]"$'
    ):
        Flavour.load("tensorrt")


def test_a_missing_library_is_named_with_the_other_that_is_there(importing, monkeypatch):
    importing["tensorrt"] = ModuleNotFoundError("No module named 'tensorrt'", name="tensorrt")
    monkeypatch.setattr(tensorrt_flavour.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(BackendError, match=r"^TensorRT is not installed; .*take the backend 'tensorrt-rtx', which is"):
        Flavour.load("tensorrt")


def test_a_library_that_needs_another_module_says_which(importing):
    importing["tensorrt"] = ModuleNotFoundError("No module named 'tensorrt_libs'", name="tensorrt_libs")
    with pytest.raises(
        BackendError, match=r"^TensorRT cannot be imported, because it needs 'tensorrt_libs'; install it"
    ):
        Flavour.load("tensorrt")


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError])
def test_a_library_that_does_not_load_says_why(importing, error):
    importing["tensorrt"] = error("libnvinfer.so.10: cannot open shared object file\nmore")
    with pytest.raises(
        BackendError, match=r"^TensorRT is installed but cannot be loaded \(libnvinfer.so.10: .*file\); "
    ):
        Flavour.load("tensorrt")


@pytest.mark.parametrize(
    ("name", "module", "beginning"),
    [
        ("tensorrt", fake("8.6.1"), r"^TensorRT 8.6.1 is too old, 10.3 is the oldest that serves; update it with pip"),
        ("tensorrt", fake("10.2.9"), r"^TensorRT 10.2.9 is too old"),
        ("tensorrt", fake("12.0.0"), r"^TensorRT 12.0.0 is newer than this release knows \(before 12.0\); install an"),
        ("tensorrt-rtx", fake("1.6.0", ComputeCapability=object), r"^TensorRT-RTX 1.6.0 is too old, 1.7 is"),
        ("tensorrt-rtx", fake("2.0.0", ComputeCapability=object), r"^TensorRT-RTX 2.0.0 is newer"),
        ("tensorrt", fake("1.7.0", ComputeCapability=object), r"^the module 'fake' is TensorRT-RTX, not TensorRT; ask"),
        (
            "tensorrt-rtx",
            fake("10.13.0"),
            r"^the module 'fake' is TensorRT, not TensorRT-RTX; ask for the backend 'tens",
        ),
        (
            "tensorrt",
            SimpleNamespace(),
            r"^the installed TensorRT is incomplete \(version unknown, no builder or runti",
        ),
        ("tensorrt", fake(""), r"^the installed TensorRT is incomplete"),
    ],
)
def test_a_library_that_does_not_serve_is_refused(name, module, beginning):
    with pytest.raises(BackendError, match=beginning):
        Flavour.of(module, name)


@pytest.mark.parametrize("version", ["10.3.0", "10.16.1.11", "11.4.0.106"])
def test_tensorrt_10_and_11_serve(version):
    flavour = Flavour.of(fake(version), "tensorrt")
    assert (flavour.version, flavour.ahead_of_time, flavour.targets) == (version, False, ())


# What a library says


def test_errors_become_lines_for_messages_and_the_rest_is_logged(caplog):
    flavour = software_flavour()
    severity = flavour.module.ILogger.Severity
    with caplog.at_level(logging.DEBUG), flavour.log.collect() as said:
        flavour.trt_logger.log(severity.ERROR, "it broke")
        flavour.trt_logger.log(severity.INTERNAL_ERROR, "badly")
        flavour.trt_logger.log(severity.WARNING, "careful")
        flavour.trt_logger.log(severity.VERBOSE, "chatter")
    assert list(said) == ["it broke", "badly"]
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("DEBUG", "TensorRT-RTX: it broke"),
        ("DEBUG", "TensorRT-RTX: badly"),
        ("WARNING", "TensorRT-RTX: careful"),
    ]


def test_an_error_that_nobody_collects_is_a_warning_and_can_be_asked_for(caplog):
    flavour = software_flavour()
    before = flavour.log.errors
    flavour.trt_logger.log(flavour.module.ILogger.Severity.ERROR, "it broke")
    assert flavour.log.since(before) == ["it broke"]
    assert flavour.log.since(flavour.log.errors) == []
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_the_library_is_given_one_logger_for_good():
    assert software_flavour().trt_logger is software_flavour().trt_logger
    assert software_flavour().log is not software_flavour("tensorrt").log

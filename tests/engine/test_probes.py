"""Looking at a machine from processes of their own: what is there, and what crashes, hangs and lies."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from warpcache.engine.probes import PROBES, Probed, missing_libraries, probe


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that puts a package `onnxruntime` of this source before the installed one, for child processes."""

    def make(source: str) -> None:
        (tmp_path / "onnxruntime.py").write_text(source, encoding="utf-8")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return make


def test_what_is_installed_is_seen():
    import onnxruntime

    found = probe("onnxruntime")
    assert found.error is None
    assert found.facts["version"] == onnxruntime.__version__
    assert found.facts["providers"] == onnxruntime.get_available_providers()


def test_nvrtc_is_tried_for_real():
    pytest.importorskip("cuda.bindings.nvrtc")
    found = probe("nvrtc")
    assert found.error is None, found.error
    assert found.facts["version"] >= [12, 0]


def test_a_crash_ends_the_process_and_not_this_one(fake):
    fake("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    found = probe("onnxruntime")
    assert found.error is not None
    assert found.error.startswith("it crashed (SIGSEGV)")
    assert not found.missing


def test_an_exit_and_its_last_words_are_reported(fake):
    fake("import os, sys\nsys.stderr.write('first\\nlast words\\n')\nsys.stderr.flush()\nos._exit(3)\n")
    assert probe("onnxruntime") == Probed(error="it ended with code 3: last words")


def test_what_hangs_is_given_up(fake):
    # However long the process takes to come to it, it never answers.
    fake("import threading\nthreading.Event().wait()\n")
    assert probe("onnxruntime", timeout_s=0.5) == Probed(error="it did not answer within 0.5 s")


def test_what_a_library_prints_is_not_the_answer(fake):
    fake(
        "print('warpcache-probe:nonsense')\n__version__ = '9.9'\nInferenceSession = object\n"
        "get_available_providers = lambda: ['CPUExecutionProvider']\n"
        "import os\nos.write(1, b'warpcache-probe:[]\\n')\n__file__ = '/nowhere/onnxruntime/__init__.py'\n"
    )
    found = probe("onnxruntime")
    assert found.error is None
    assert found.facts["version"] == "9.9"


@pytest.mark.parametrize(
    ("source", "error"),
    [
        (
            "raise ImportError('libfoo.so: cannot open\\nmore')",
            "ONNX Runtime cannot be imported: libfoo.so: cannot open",
        ),
        ("raise ValueError('odd')", "odd"),
        ("", "the installed ONNX Runtime is incomplete"),
    ],
)
def test_a_broken_package_is_one_sentence(fake, source, error):
    fake(source)
    found = probe("onnxruntime")
    assert found.error is not None
    assert found.error.startswith(error)
    assert "\n" not in found.error


def test_without_cuda_python_it_is_missing_and_not_broken(tmp_path, monkeypatch):
    hide = (
        "import sys\n"
        "class Hider:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('cuda.bindings.driver', 'cuda.bindings.nvrtc'):\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Hider())\n"
    )
    (tmp_path / "sitecustomize.py").write_text(hide, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in ("driver", "nvrtc"):
        assert probe(name).missing, name


def test_a_process_that_cannot_be_started_is_said(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert probe("driver").error == "no process could be started to look at it: No such file or directory"


def test_every_probe_answers_or_says_why_not():
    # What a machine has is its own; that each ends and is understood is not.
    for name in PROBES:
        found = probe(name)
        assert found.error is None or not found.error.startswith(("it crashed", "it ended")), (name, found)
        assert bool(found.facts) == (found.error is None)


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="needs g++ and Linux's loader")
def test_every_library_that_another_needs_and_that_is_not_there_is_named(tmp_path):
    source = tmp_path / "empty.cpp"
    source.write_text("", encoding="utf-8")
    shared = ["g++", "-shared", "-nostdlib", "-Wl,--no-as-needed", source, "-L", tmp_path]
    lost, linked = [tmp_path / "liblost.so", tmp_path / "libgone.so"], tmp_path / "liblinked.so"
    for path in lost:
        subprocess.run([*shared, f"-Wl,-soname,{path.name}.7", "-o", path], check=True)
    subprocess.run([*shared, "-o", linked, "-llost", "-lgone", "-lm"], check=True)
    assert missing_libraries(lost[0]) == []
    assert missing_libraries(linked) == ["liblost.so.7", "libgone.so.7"]
    # What was loaded by its path serves whoever asks for its name.
    ctypes.CDLL(str(lost[0]))
    assert missing_libraries(linked) == ["libgone.so.7"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's loader")
@pytest.mark.parametrize(
    "content", [b"", b"MZ not ELF at all" * 10, b"\x7fELF\x02\x01" + bytes(58), b"\x7fELF\x02\x01"]
)
def test_what_is_no_library_is_refused(tmp_path, content):
    path = tmp_path / "libx.so"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^libx\.so cannot be read by the dynamic loader: "):
        missing_libraries(path)

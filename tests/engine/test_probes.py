"""Looking at a machine from processes of their own: what is there, and what crashes, hangs and lies."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from warpcache.engine.probes import PROBES, Probed, needed_libraries, probe


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


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="needs g++ and ELF")
def test_needed_libraries_are_those_that_a_library_was_linked_with(tmp_path):
    plain, linked = tmp_path / "libplain.so", tmp_path / "liblinked.so"
    source = tmp_path / "empty.cpp"
    source.write_text("", encoding="utf-8")
    subprocess.run(["g++", "-shared", "-nostdlib", "-o", plain, source], check=True)
    subprocess.run(
        ["g++", "-shared", "-nostdlib", "-Wl,--no-as-needed", "-o", linked, source, "-L", tmp_path, "-lplain", "-lm"],
        check=True,
    )
    assert needed_libraries(plain) == []
    assert needed_libraries(linked) == ["libplain.so", "libm.so.6"]


@pytest.mark.parametrize(
    "content", [b"", b"MZ not ELF at all" * 10, b"\x7fELF\x02\x01" + bytes(58), b"\x7fELF\x02\x01"]
)
def test_what_is_no_elf_library_is_refused(tmp_path, content):
    path = tmp_path / "libx.so"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^libx\.so is no 64-bit ELF library"):
        needed_libraries(path)

"""The file of compiled kernels: kept whole or not at all, and never the reason for an error."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from warpcache.engine.tensorrt.runtime_cache import RuntimeCacheFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "engines" / "warp.runtime"


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("content", [b"", b"kernels", bytes(100_000)])
def test_what_was_written_is_read_by_the_next_process(path, content, caplog):
    RuntimeCacheFile(path).write(content)
    assert RuntimeCacheFile(path).read() == content
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert warnings(caplog) == []


def test_nothing_there_is_nothing_read(path, caplog):
    assert RuntimeCacheFile(path).read() is None
    assert warnings(caplog) == []


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-1], lambda data: data + b"\0", lambda data: b"x" + data[1:], lambda data: b"", bytes.upper],
    ids=["torn", "longer", "foreign", "empty", "altered"],
)
def test_a_damaged_file_is_removed_with_a_warning(path, damage, caplog):
    RuntimeCacheFile(path).write(b"kernels")
    path.write_bytes(damage(path.read_bytes()))
    assert RuntimeCacheFile(path).read() is None
    assert not path.exists()
    assert warnings(caplog) == [
        f"the runtime cache {path} is damaged or no runtime cache; it is removed, and kernels are compiled again"
    ]


def test_a_discarded_file_is_gone_and_written_again(path, caplog):
    file = RuntimeCacheFile(path)
    file.write(b"kernels")
    file.discard("is of another GPU")
    assert not path.exists()
    file.write(b"kernels")
    assert RuntimeCacheFile(path).read() == b"kernels"
    assert len(warnings(caplog)) == 1


def test_what_is_there_already_is_not_written_again(path):
    file = RuntimeCacheFile(path)
    file.write(b"kernels")
    path.unlink()
    file.write(b"kernels")
    assert not path.exists()
    file.write(b"more kernels")
    assert path.exists()


def test_a_folder_that_cannot_be_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    file = RuntimeCacheFile(tmp_path / "file" / "warp.runtime")
    file.write(b"kernels")
    assert warnings(caplog)[0].startswith(f"the runtime cache {file.path} cannot be written (")
    assert file.read() is None
    assert warnings(caplog)[1].startswith(f"the runtime cache {file.path} cannot be read (")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(path, monkeypatch, caplog):
    file = RuntimeCacheFile(path)
    file.write(b"old")

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as opened:
            opened.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    file.write(b"new")
    monkeypatch.undo()
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert RuntimeCacheFile(path).read() == b"old"
    assert "No space left on device" in warnings(caplog)[0]

"""Files and folders written beside their place: whole or not there, whatever goes wrong."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from warpcache.engine.files.atomic import disk_is_full, folder_beside, written_beside


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_takes_its_place_at_the_end(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "deep" / "er" / "a.txt"
    for text in ("first", "second"):
        with written_beside(path, durable=durable) as temporary:
            assert temporary.parent == path.parent
            assert temporary.suffix == ".txt"
            temporary.write_text(text)
        assert path.read_text() == text
    assert names(path.parent) == ["a.txt"]


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_what_is_written_is_as_readable_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with written_beside(tmp_path / "file"), folder_beside(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("file", "folder")] == [0o640, 0o750]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_whatever_stops_the_writing_leaves_what_stood(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "a.txt").write_text("old")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "inside").write_text("old")

    def stop() -> None:
        with folder_beside(tmp_path / "b", replace=True) as folder, written_beside(tmp_path / "a.txt") as temporary:
            (folder / "inside").write_text("half of")
            temporary.write_text("half of")
            raise error

    with pytest.raises(type(error)):
        stop()
    assert names(tmp_path) == ["a.txt", "b"]
    assert (tmp_path / "a.txt").read_text() == (tmp_path / "b" / "inside").read_text() == "old"


@pytest.mark.parametrize("step", ["the file", "its folder"])
def test_a_durable_file_is_synced_before_it_is_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    synced = []

    def fsync(descriptor: int) -> None:
        synced.append(names(tmp_path))
        if len(synced) == ("the file", "its folder").index(step) + 1:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    path = tmp_path / "a.txt"
    if step == "the file":
        with pytest.raises(OSError, match="Input/output"), written_beside(path, durable=True):
            pass
        assert names(tmp_path) == []
    else:  # the file stands, so it is written
        with written_beside(path, durable=True) as temporary:
            pass
        assert names(tmp_path) == ["a.txt"]
        assert synced == [[temporary.name], ["a.txt"]]


@pytest.mark.parametrize("durable", [False, True])
def test_a_full_folder_is_replaced_only_where_asked(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "deep" / "b"
    for replace, text in ((False, "first"), (True, "second")):
        with folder_beside(path, replace=replace, durable=durable) as folder:
            (folder / "inside").write_text(text)
        assert (path / "inside").read_text() == text
    with pytest.raises(OSError), folder_beside(path, durable=durable):  # noqa: PT011 - systems differ
        pass
    assert (path / "inside").read_text() == "second"
    assert names(path.parent) == ["b"]


def test_want_of_room_is_told_from_other_errors() -> None:
    assert [disk_is_full(OSError(code, "")) for code in (errno.ENOSPC, errno.EACCES)] == [True, False]
    assert not disk_is_full(OSError("no number"))

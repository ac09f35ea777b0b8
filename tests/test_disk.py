"""Folders on every kind of disk: that cannot be forced, that are links, that cannot be renamed."""

import errno
import fcntl
import os
import stat
from pathlib import Path

import pytest

from atma import replacing
from atma.data.staging import staged
from atma.disk import destination, lock, sync
from atma.folders import json_writer, write_folder
from atma.sweep.files import create_once


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def refusing(monkeypatch, number: int, folders: bool) -> None:
    """`os.fsync` refuses every folder, or every file."""
    real = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode) == folders:
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES])
def test_a_folder_that_cannot_be_forced_to_the_disk_is_written_all_the_same(tmp_path, monkeypatch, number):
    refusing(monkeypatch, number, folders=True)
    sync(tmp_path)
    write_folder(tmp_path / "model", {"a.json": json_writer({})})
    with staged(tmp_path / "data") as folder:
        (folder / "x").write_text("x")
    assert create_once(tmp_path / "one.json", {})
    assert names(tmp_path) == ["data", "model", "one.json"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSPC])
def test_a_file_that_cannot_be_forced_to_the_disk_is_an_error(tmp_path, monkeypatch, number):
    (tmp_path / "file").write_text("x")
    refusing(monkeypatch, number, folders=False)
    with pytest.raises(OSError, match=os.strerror(number)):
        sync(tmp_path / "file")


def test_a_disk_that_fails_on_a_folder_is_an_error(tmp_path, monkeypatch):
    refusing(monkeypatch, errno.EIO, folders=True)
    with pytest.raises(OSError, match="Input/output error"):
        sync(tmp_path)


def fill(out: Path, text: str) -> None:
    with staged(out) as folder:
        (folder / "new").write_text(text)


def save(out: Path, text: str) -> None:
    write_folder(out, {"new": lambda path: path.write_text(text)})


@pytest.mark.parametrize("write", [fill, save])
@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_filled_where_it_points_as_often_as_one_likes(tmp_path, write, there):
    link, target = tmp_path / "link", tmp_path / "big" / "target"
    target.parent.mkdir()
    if there:
        target.mkdir()
    link.symlink_to(Path("big") / "target")
    for text in ("first", "second"):
        write(link, text)
        assert link.is_symlink() and (target / "new").read_text() == text
    assert names(tmp_path) == ["big", "link"] and names(target.parent) == ["target"]


def test_only_a_link_itself_is_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert destination(tmp_path / "link") == tmp_path / "elsewhere"
    assert destination(tmp_path / "link" / "model") == tmp_path / "link" / "model"


@pytest.fixture
def volume(tmp_path, monkeypatch):
    """A folder that cannot be renamed, with what a fresh volume holds and an older content."""
    folder = tmp_path / "volume"
    (folder / "lost+found").mkdir(parents=True)
    (folder / "old").write_text("old")
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path == folder:
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    return folder


@pytest.mark.parametrize("write", [fill, save])
def test_a_folder_that_cannot_be_renamed_has_its_content_exchanged(volume, write):
    for text in ("first", "second"):
        write(volume, text)
        assert (volume / "new").read_text() == text and "old" not in names(volume)
        assert names(volume.parent) == ["volume"]
        assert [name for name in names(volume) if name.startswith(".")] == []
        assert "lost+found" in names(volume)


def test_the_folder_we_stand_in_is_filled_and_stays(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    fill(Path("."), "new")
    assert Path("new").read_text() == "new" and names(tmp_path) == ["here"]


@pytest.mark.parametrize("stop", range(1, 7))
def test_a_crash_at_any_rename_of_an_exchange_leaves_the_old_content_or_the_new(volume, monkeypatch, stop):
    before, count, real = {"old", "older", "lost+found"}, 0, Path.rename
    (volume / "older").write_text("old")

    class Crash(BaseException):
        """Not an error that is caught and undone."""

    def rename(path: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == stop:
            raise Crash
        return real(path, target)

    staging = replacing.staging_place(volume, "staging")
    staging.mkdir()
    (staging / "new").write_text("new")
    monkeypatch.setattr(Path, "rename", rename)
    crashed = False
    try:
        replacing.swap(staging, volume)
    except Crash:
        crashed = True
    replacing.recover_folder(volume)
    left = set(names(volume)) - {".atma.new"}
    assert left == (before if crashed else {"new", "lost+found"})


def test_a_lock_is_held_by_one_and_passes_on_when_it_is_let_go(tmp_path):
    first, second = (os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT) for _ in range(2))
    assert lock(first) is True and lock(second) is False
    os.close(first)
    assert lock(second) is True
    os.close(second)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_disk_without_locks_is_told_apart_from_a_lock_that_is_held(tmp_path, monkeypatch, number):
    def flock(handle: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert lock(0) is None

"""Replacing a folder by one that was filled beside it, so that a stop at any moment leaves the old one or the new one.

Two renames do it. A folder that cannot be renamed (the root of a volume, the folder we stand in, one in a folder that
we may not write) keeps its place, and its content is exchanged: the old moves into `.atma.away` inside, which becomes
`.atma.old` once all is in it, then the new moves in. Whoever looks next after a crash moves the old content back.
"""

import contextlib
import os
import re
import shutil
from pathlib import Path

from atma.disk import LOST, destination, sync

_AWAY, _OLD, _NEW, _UNFINISHED = ".atma.away", ".atma.old", ".atma.new", ".atma.unfinished"
OURS = {_AWAY, _OLD, _NEW, _UNFINISHED, LOST}
"""Names that are no content of a folder."""


def staging_place(folder: Path, suffix: str) -> Path:
    """The path, on the disk of `folder` (a `destination`), where what will replace it is to be filled."""
    return folder / _NEW if stays(folder) else folder.parent / f".{folder.name}.{suffix}"


def unfinished_place(folder: Path) -> Path:
    """Where what will become `folder` (a `destination`) gathers, to outlive the process that gathers it."""
    return folder / _UNFINISHED if stays(folder) else folder.parent / f".{folder.name}.unfinished"


def swap(staging: Path, folder: Path) -> None:
    """Put the filled `staging`, from `staging_place`, in the place of `folder`. OSError: the old one is there again."""
    if staging == folder / _NEW:
        _exchange(staging, folder)
        return
    old = _beside(folder)
    _remove(old)
    if folder.exists():
        folder.rename(old)
    try:
        staging.rename(folder)
    except OSError:
        recover_folder(folder)
        raise
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder: str | Path) -> None:
    """Put back the old content if a crash fell between the renames that replace it."""
    folder = destination(folder)
    old = _beside(folder)
    if old.exists() and not folder.exists():
        old.rename(folder)
    if (folder / _OLD).is_dir():
        _clear(folder)
        (folder / _OLD).rename(folder / _AWAY)
    if (folder / _AWAY).is_dir():
        _move(folder / _AWAY, folder)
        (folder / _AWAY).rmdir()


def stays(folder: Path) -> bool:
    """Whether a folder is there that cannot be renamed, or should not be."""
    if not folder.is_dir():
        return False
    fixed = _is_mount(folder) or (folder / LOST).exists() or not os.access(folder.parent, os.W_OK | os.X_OK)
    return fixed or folder.resolve() == Path.cwd()


def _exchange(staging: Path, folder: Path) -> None:
    recover_folder(folder)
    (folder / _AWAY).mkdir()
    try:
        _move(folder, folder / _AWAY)
        (folder / _AWAY).rename(folder / _OLD)
        _move(staging, folder)
        staging.rmdir()
    except OSError:
        recover_folder(folder)
        raise
    sync(folder)
    (folder / _OLD).rename(staging)
    shutil.rmtree(staging, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    for entry in list(source.iterdir()):
        if entry.name not in OURS:
            entry.rename(target / entry.name)


def _clear(folder: Path) -> None:
    for entry in list(folder.iterdir()):
        if entry.name in OURS:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _is_mount(folder: Path) -> bool:
    """Also of a folder of the same disk that is mounted there, which `os.path.ismount` takes for a plain one."""
    if os.path.ismount(folder):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    points = (re.sub(rb"\\(\d{3})", lambda found: bytes([int(found[1], 8)]), line.split()[4]) for line in lines)
    return os.fsencode(folder.resolve()) in points


def _beside(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.old"


def _remove(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)

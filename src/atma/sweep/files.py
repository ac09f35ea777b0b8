"""Files that are whole or not there, on local disks and on shared ones: made by exactly one of many, or replaced.

A file is written under a name of its own and forced to the disk. A hard link then gives it its name, which exactly one
process can do, or a rename puts it in the place of an older one.
"""

import contextlib
import errno
import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atma.disk import sync

ABANDONED_SECONDS = 3600.0
_UNNAMED = ".new-"


def create_once(path: Path, values: dict[str, Any]) -> bool:
    """Make a JSON file unless one is there. True for exactly one of all that try, on any machine.

    OSError where the disk refuses, or its file system has no hard links.
    """
    with _written(path, values) as new:
        try:
            os.link(new, path)
        except FileExistsError:
            # A network file system may repeat a request whose answer was lost: the link is then our own.
            return _same(new, path)
        except PermissionError as error:
            raise OSError(error.errno, "its file system makes no hard links; put the sweep elsewhere", path) from error
        sync(path.parent)
        return True


def replace(path: Path, values: dict[str, Any]) -> None:
    """Put a JSON file in the place of an older one; a reader sees either, whole."""
    with _written(path, values) as new:
        new.replace(path)


def content(path: Path) -> bytes | None:
    """The bytes of a file, None where there is none; one that another machine replaced meanwhile is read again."""
    for last in (False, False, True):
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if last or error.errno != errno.ESTALE:
                raise
    return None


def read(path: Path) -> dict[str, Any] | None:
    """The JSON object of a file, None where there is none. ValueError names a file that holds something else."""
    found = content(path)
    if found is None:
        return None
    try:
        values = json.loads(found)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON, damaged: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a JSON object")
    return values


def disk_time(folder: Path) -> float:
    """What time it is by the clock of the disk that holds `folder`, which is that of every mtime there."""
    probe = folder / f"{_UNNAMED}{uuid.uuid4().hex}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def remove_abandoned(folder: Path) -> None:
    """Remove what processes that were killed while they wrote left in `folder`, an hour old by the disk's clock."""
    now = disk_time(folder)
    for home, _, names in os.walk(folder):  # and not rglob, which fails where a folder vanishes meanwhile
        for path in (Path(home, name) for name in names if name.startswith(_UNNAMED)):
            with contextlib.suppress(FileNotFoundError):
                if now - path.stat().st_mtime > ABANDONED_SECONDS:
                    path.unlink()


def utc() -> str:
    """The present time for people to read: no decision rests on it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@contextmanager
def _written(path: Path, values: dict[str, Any]) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.parent / f"{_UNNAMED}{uuid.uuid4().hex}"
    try:
        with new.open("w", encoding="utf-8") as file:
            file.write(json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        yield new
    finally:
        new.unlink(missing_ok=True)


def _same(a: Path, b: Path) -> bool:
    try:
        return os.path.samefile(a, b)
    except FileNotFoundError:
        return False

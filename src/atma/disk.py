"""What disks and file systems do differently, in one place: forcing to the disk, locks, links, fresh volumes."""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOST = "lost+found"
"""What a fresh volume holds: no content."""
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES, errno.EPERM, errno.ENOSYS)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF)


def sync(path: Path) -> None:
    """Force a file to the disk; or a folder's list of names, where its file system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno in _NO_FOLDER_SYNC and path.is_dir():
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC or not path.is_dir():
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(handle)


def lock(handle: int, seconds: float = 0.0) -> bool | None:
    """Lock an open file or folder for this process alone, trying for so long: True; False where another holds it; None
    where the file system has no locks. A lock ends with its process, however that ends."""
    until = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return None
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EINTR):
                raise
        if time.monotonic() >= until:
            return False
        time.sleep(0.1)


@contextmanager
def locked(handle: int, seconds: float) -> Iterator[None]:
    """Hold the lock of an open file or folder; without it once `seconds` have passed, or where there are no locks."""
    held = lock(handle, seconds)
    try:
        yield
    finally:
        if held:
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)


def destination(folder: str | Path) -> Path:
    """Where a folder to be written lies: where a link points, be it there or not; any other path absolute."""
    path = Path(os.path.abspath(folder))
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def content(folder: Path) -> list[str]:
    """The names in a folder that mean something, neither hidden nor `lost+found`; none where there is no folder."""
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(".") and entry.name != LOST)

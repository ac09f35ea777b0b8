"""A folder that appears whole or not at all: filled beside its final place, forced to the disk, then renamed.

Whatever stops the filling (a full disk, an error, an interrupt), the folder that was there before stays as it is and
the half-made one is removed. One left by a process that was killed is removed by the next that makes the same folder.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from atma.disk import destination, sync
from atma.replacing import recover_folder, staging_place, swap


@contextmanager
def staged(folder: str | Path) -> Iterator[Path]:
    """Give an empty folder to fill; on success it replaces `folder`, on any error it is removed.

    An OSError, such as a full disk, names `folder` and says that nothing was changed.
    """
    folder = destination(folder)
    staging = staging_place(folder, f"staging-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        recover_folder(folder)
        _remove_abandoned(folder)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        yield staging
        for path in staging.iterdir():
            sync(path)
        sync(staging)
        swap(staging, folder)
    except OSError as error:
        raise OSError(f"{folder}: not made, and nothing changed: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    for path in folder.parent.glob(f".{folder.name}.staging-*"):
        process = path.name.rpartition("-")[2]
        if process.isdigit() and not _alive(int(process)):
            shutil.rmtree(path)


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

"""Compiling the kernels and keeping them: where, whose files are trusted, and when a failed build is tried again.

A compiled library is code, so it is loaded only from a folder of this user (or root) that nobody else can write, from
a plain file of the same kind whose SHA-256 stands in the file beside it. What is loaded are the very bytes that were
checked. Everything is opened through its folder: who can write a parent can make us build again, and no more.
"""

import contextlib
import hashlib
import os
import platform
import re
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from atma.disk import locked, sync
from atma.ops.native import levels

SOURCES = Path(__file__).parent
FLAGS = (*levels.FLAGS, "-march=native", "-shared")
BUILD_SECONDS = 1200
RETRY_SECONDS = 3600
"""A build that failed is tried again after this time; at once where the reason was a passing one."""
_PASSING = re.compile(
    r"no space left|quota exceeded|cannot allocate|out of memory|memory exhausted|bad_alloc|killed|bus error|"
    r"terminated with signal|resource temporarily|too many open files|input/output error|read-only file system|"
    r"stale file handle|text file busy",
    re.IGNORECASE,
)
_MOST_BYTES = 1 << 28


class Untrusted(OSError):
    """A file or folder that is not to be loaded from; the text says why."""


class Failed(OSError):
    """There is no library to be had, wherever it is kept; the text says why."""


def tell(text: str) -> None:
    """One line on stderr."""
    print(f"atma: {text}", file=sys.stderr, flush=True)


def key(compiler: str) -> str:
    """What a library depends on, in 16 digits: these sources, this compiler and this processor. OSError."""
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=60, check=True).stdout
    parts = [file.read_bytes() for file in (*sources(), *sorted(SOURCES.glob("*.h")))]
    return hashlib.sha256(b"\0".join([*parts, version, " ".join(FLAGS).encode(), _processor()])).hexdigest()[:16]


def sources() -> list[Path]:
    return sorted(SOURCES.glob("*.cpp"))


def places() -> Iterator[Path]:
    """Folders to keep a library in, the usual one first; the last is for this process alone. OSError: there is none."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # a relative one is to be ignored, says the specification of these folders
        cache = os.path.expanduser("~/.cache") if os.environ.get("HOME", "?") else ""
    if os.path.isabs(cache):
        yield Path(cache) / "atma"
    yield Path(tempfile.gettempdir()) / f"atma-{os.getuid()}"
    with tempfile.TemporaryDirectory(prefix="atma-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def read(library: Path) -> bytes:
    """The bytes of a library that may be loaded. `Untrusted` says why another may not; OSError: it cannot be read."""
    with opened(library.parent) as folder:
        found = _trusted_bytes(folder, library)
        try:
            expected = _trusted_bytes(folder, hash_of(library)).decode("ascii", "replace").strip()
        except FileNotFoundError:
            raise Untrusted(f"{library}: no hash beside it") from None
    if hashlib.sha256(found).hexdigest() != expected:
        raise Untrusted(f"{library}: damaged: its contents differ from the hash beside it")
    return found


def hash_of(library: Path) -> Path:
    return library.with_suffix(".sha256")


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[int]:
    """A handle on a folder that only this user or root can write. `Untrusted` names what is wrong with another."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except NotADirectoryError:
        raise Untrusted(f"{folder}: {'a link' if folder.is_symlink() else 'a file'}, not a folder") from None
    try:
        _check(os.fstat(handle), folder)
        yield handle
    finally:
        os.close(handle)


def make_private(folder: Path) -> None:
    """Make a folder and its missing parents, each for this user alone whatever the umask."""
    if folder.parent != folder and not folder.parent.exists():
        make_private(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(0o700)


def build(compiler: str, library: Path) -> None:
    """Compile into `library`, unless another process has just done so. `Failed`: now or not long ago; `OSError`: its
    folder cannot be used."""
    make_private(library.parent)
    with opened(library.parent) as folder, locked(folder, 2 * BUILD_SECONDS):
        with contextlib.suppress(OSError):
            read(library)
            return
        require_due(library)
        tell("compiling the CPU kernels for this processor; this happens once, and takes about a minute")
        begun = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=".building-", dir=library.parent) as staging:
            made = Path(staging) / library.name
            failure = _compiled(compiler, made)
            if failure is not None:
                give_up(library, failure, passing=bool(_PASSING.search(failure.partition("\n")[2])))
            _publish(made, library)
        tell(f"compiled in {time.monotonic() - begun:.0f} s: {library}")


def require_due(library: Path) -> None:
    """`Failed` while it is too early to try again what failed before."""
    log = _log_of(library)
    with contextlib.suppress(FileNotFoundError):
        left = RETRY_SECONDS - (time.time() - log.stat().st_mtime)
        if 0 < left <= RETRY_SECONDS:
            raise Failed(f"it failed before, see {log}; it is tried again in {left / 60:.0f} minutes, or remove that")


def give_up(library: Path, failure: str, passing: bool = False) -> None:
    """Raise `Failed`; unless the reason is a passing one, leave a note that keeps the next processes from trying."""
    if passing:
        told = next(line for line in failure.splitlines()[1:] if _PASSING.search(line))
        raise Failed(f"{told.strip()} (the next command tries again)")
    log = _log_of(library)
    log.unlink(missing_ok=True)
    with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(failure)
    raise Failed(f"see {log}")


def _compiled(compiler: str, made: Path) -> str | None:
    """Compile; None, or in lines what the compiler was asked and said. After a passing failure it is not asked for a
    library without OpenMP, which would be kept."""
    said = ""
    for extra in (["-fopenmp"], []):
        command = [compiler, *FLAGS, f'-DATMA_BUILD="{made.stem}"', *extra, *map(str, sources()), "-o", str(made)]
        try:
            result = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=BUILD_SECONDS,
                env={**os.environ, "TMPDIR": str(made.parent)},
            )
        except subprocess.TimeoutExpired:
            return f"{' '.join(command)}\nthe compiler timed out after {BUILD_SECONDS} s\n"
        if result.returncode == 0 and made.is_file():
            return None
        said = f"{' '.join(command)}\n{result.stdout}{result.stderr}"
        if result.returncode < 0 or result.returncode > 128:
            return f"{said}\nthe compiler was killed, status {result.returncode}\n"
        if _PASSING.search(result.stderr):
            return said
    return said


def _publish(made: Path, library: Path) -> None:
    """Give a compiled library its name, and its hash a file beside it; forced to the disk before either is named."""
    beside = made.with_suffix(".sha256")
    beside.write_text(hashlib.sha256(made.read_bytes()).hexdigest() + "\n", encoding="ascii")
    for path, mode, final in ((made, 0o700, library), (beside, 0o600, hash_of(library))):
        path.chmod(mode)
        sync(path)
        path.replace(final)
    sync(library.parent)
    _log_of(library).unlink(missing_ok=True)


def _log_of(library: Path) -> Path:
    return library.with_suffix(".log")


def _trusted_bytes(folder: int, path: Path) -> bytes:
    """The contents of a plain file of `folder` that only this user or root can write."""
    if stat.S_ISLNK(os.stat(path.name, dir_fd=folder, follow_symlinks=False).st_mode):
        raise Untrusted(f"{path}: a link")
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    with open(os.open(path.name, flags, dir_fd=folder), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_size > _MOST_BYTES:
            raise Untrusted(f"{path}: not a plain file of a plausible size")
        _check(found, path)
        return file.read()


def _check(found: os.stat_result, path: Path) -> None:
    if found.st_uid not in (os.getuid(), 0):
        raise Untrusted(f"{path}: belongs to user {found.st_uid}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Untrusted(f"{path}: others can write it (mend: chmod go-w)")


def _processor() -> bytes:
    """What decides the instructions of -march=native: the machine, and on Linux the processor's flags."""
    return f"{platform.machine()} {platform.processor()} {' '.join(sorted(levels.processor_flags()))}".encode()

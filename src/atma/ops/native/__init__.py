"""The compiled CPU kernels: built once a machine with its own C++ compiler, kept in the user's cache, never required.

Sources are the .cpp files here, in plain C++ with vector extensions; nothing of PyTorch is compiled in, so a build
takes seconds and serves every version of it. Without a compiler, after a failed build, or with ATMA_NATIVE=off,
operations take their PyTorch path; `status` says why.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

SOURCES = Path(__file__).parent
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fPIC",
    "-shared",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
)
DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}

_kernels: dict[tuple[str, torch.dtype | None], Callable[..., None]] = {}


class Call(NamedTuple):
    """A kernel and the packed Problem it was given."""

    kernel: Callable[..., None]
    arguments: bytes


class _Log(threading.local):
    calls: list[Call] | None = None


_log = _Log()


class Status(NamedTuple):
    """The loaded library, or None; and in words where it is or why it is not there."""

    library: ctypes.CDLL | None
    reason: str


@functools.cache
def status() -> Status:
    """Build what is not built yet, and load it. The same answer for the whole process."""
    if os.environ.get("ATMA_NATIVE", "").lower() in ("0", "off", "no"):
        return Status(None, "switched off by ATMA_NATIVE")
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)
    if compiler is None:
        return Status(None, "no C++ compiler found (c++, g++ or clang++, or the one that CXX names)")
    try:
        return _load(_built(compiler))
    except (OSError, subprocess.SubprocessError) as error:
        return Status(None, f"the build failed: {error}")


def available(*dtypes: torch.dtype) -> bool:
    """Whether the kernels are there and take these dtypes."""
    return all(dtype in DTYPES for dtype in dtypes) and status().library is not None


def call(name: str, dtype: torch.dtype | None, arguments: Sequence[int]) -> None:
    """Run the kernel `name` for `dtype` (None: it has one form) on sizes, strides and addresses in the order of its
    Problem. ValueError if the library is not there."""
    kernel = _kernels.get((name, dtype))
    if kernel is None:
        library, reason = status()
        if library is None:
            raise ValueError(f"the native backend is not available: {reason}")
        kernel = _kernels[name, dtype] = getattr(library, name if dtype is None else f"{name}_{DTYPES[dtype]}")
        kernel.restype = None
    packed = struct.pack(f"{len(arguments)}q", *arguments)
    kernel(packed)
    if _log.calls is not None:
        _log.calls.append(Call(kernel, packed))


@contextlib.contextmanager
def logged() -> Iterator[list[Call]]:
    """Note every call that this thread makes inside."""
    _log.calls = calls = []
    try:
        yield calls
    finally:
        _log.calls = None


def logging() -> bool:
    """Whether this thread's calls are being noted."""
    return _log.calls is not None


def _built(compiler: str) -> Path:
    """Path of the library for these sources, this compiler and this processor, built if it is not there. OSError."""
    files = sorted(SOURCES.glob("*.cpp"))
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=60, check=True).stdout
    parts = [file.read_bytes() for file in (*files, SOURCES / "simd.h")]
    key = hashlib.sha256(b"\0".join([*parts, version, " ".join(FLAGS).encode(), _processor()])).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "atma"
    library, log = cache / f"native-{key}.so", cache / f"native-{key}.log"
    if library.is_file():
        return library
    if log.is_file():
        raise OSError(f"an earlier build failed, see {log}; remove it to try again")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        made = Path(folder) / library.name
        for extra in (["-fopenmp"], []):
            command = [compiler, *FLAGS, *extra, *map(str, files), "-o", str(made)]
            result = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if result.returncode == 0:
                made.replace(library)
                return library
    log.write_text(f"{' '.join(command)}\n{result.stdout}{result.stderr}", encoding="utf-8")
    raise OSError(f"see {log}")


def _load(path: Path) -> Status:
    library = ctypes.CDLL(str(path))
    library.vector_bytes.restype = library.threaded.restype = ctypes.c_int64
    threads = "" if library.threaded() else ", one thread (the compiler has no OpenMP)"
    return Status(library, f"{path}, {8 * library.vector_bytes()}-bit vectors{threads}")


def _processor() -> bytes:
    """What decides the instructions of -march=native: the machine, and on Linux the processor's flags."""
    flags = ""
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}".encode()


__all__ = ["DTYPES", "Call", "Status", "available", "call", "logged", "logging", "status"]

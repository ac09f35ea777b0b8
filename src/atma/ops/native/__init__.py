"""The compiled CPU kernels: those of the wheel, or built once a machine with its own C++ compiler; never required.

Sources are the .cpp files here, in plain C++ with vector extensions; nothing of PyTorch is compiled in, so a library
serves every version of it. Where there is none, operations take their PyTorch path; `status` says why.

| ATMA_NATIVE | what is taken |
| --- | --- |
| not set, `auto` | the wheel's library for this processor's instruction level; where there is none, one compiled here |
| `compile` | one compiled for this very processor, at first use; kept (`build` says where, and what is trusted) |
| `packaged` | the wheel's alone: nothing is ever compiled |
| `require` | as by default, but an error where there is none |
| `off` | none, without a word |
"""

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from atma.ops.native import build, layout, levels
from atma.ops.native.build import tell
from atma.ops.native.layout import addresses

DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}

MODES = ("auto", "compile", "packaged", "require", "off")
_OTHER_WORDS = {"": "auto", "1": "auto", "on": "auto", "yes": "auto", "0": "off", "no": "off"}
_OPENMP = ("libgomp.so.1", "libomp.so", "libiomp5.so")
_packers: dict[tuple[str, torch.dtype | None, str], layout.Packer] = {}


class Call(NamedTuple):
    """A kernel, and its arguments as it was given them."""

    kernel: Callable[..., None]
    arguments: bytes


class _Log(threading.local):
    calls: list[Call] | None = None


_log = _Log()


class Status(NamedTuple):
    """The loaded library, or None; in words where it is or why it is not there; its name, or ""."""

    library: ctypes.CDLL | None
    reason: str
    name: str = ""


@functools.cache
def status() -> Status:
    """Find the library, built first where there is none yet, and load it. The same answer for the whole process, which
    is told on stderr where it is not the usual one.

    ValueError: ATMA_NATIVE is none of its words, or it is "require" and there is none.
    """
    mode = mode_of(os.environ.get("ATMA_NATIVE", ""))
    if mode == "off":
        return Status(None, "switched off by ATMA_NATIVE")
    try:
        found = _found(mode)
    except (OSError, subprocess.SubprocessError) as error:
        found = Status(None, f"the build failed: {error}")
    if found.library is None:
        if mode == "require":
            raise ValueError(f"ATMA_NATIVE=require, and there are no compiled CPU kernels: {found.reason}")
        tell(f"without its compiled CPU kernels, several times slower: {found.reason} (ATMA_NATIVE=off: unsaid)")
    return found


def mode_of(word: str) -> str:
    """One of MODES. ValueError: another word."""
    mode = _OTHER_WORDS.get(word.lower(), word.lower())
    if mode not in MODES:
        raise ValueError(f"ATMA_NATIVE={word}: none of {', '.join(MODES)}")
    return mode


def _found(mode: str) -> Status:
    packaged = levels.packaged() if mode != "compile" else None
    reason = "this installation has no library for this processor"
    if packaged is not None:
        try:
            return _checked(packaged, _with_openmp(packaged), "packaged, ")
        except OSError as error:
            reason = f"the packaged kernels cannot be loaded: {error}"
            if mode != "packaged":
                tell(reason)
    return Status(None, f"{reason}, and ATMA_NATIVE=packaged") if mode == "packaged" else compiled()


def compiled() -> Status:
    """The library for this very processor, from the first place that is to be trusted and can be used. OSError."""
    compiler = find_compiler()
    if compiler is None:
        return Status(None, "no C++ compiler found (c++, g++ or clang++, or the one that CXX names)")
    name, problem = f"native-{build.key(compiler)}.so", ""
    for folder in build.places():
        try:
            found = _kept(compiler, folder / name)
        except build.Failed:
            raise
        except OSError as error:
            problem = problem or str(error)
            continue
        if problem:
            tell(f"compiled kernels are kept in {folder}: {problem}")
        return found
    return Status(None, f"no folder to keep them in: {problem}")


def _kept(compiler: str, library: Path) -> Status:
    """The library of that path, compiled first where it is not there or not what it should be. OSError."""
    if library.is_file():
        try:
            return _load(library)
        except build.Untrusted as error:
            problem = str(error)
        except OSError as error:
            build.require_due(library)
            problem = str(error)
            library.unlink()
        with build.opened(library.parent):
            tell(f"{problem}; it is compiled again")
    build.build(compiler, library)
    try:
        return _load(library)
    except build.Untrusted:
        raise
    except OSError as error:
        build.give_up(library, f"{library} cannot be loaded\n{error}\n")
        raise


def _load(path: Path) -> Status:
    """Load the library of that path, if it is to be trusted. OSError says why not, or why it cannot be loaded."""
    return _checked(path, _opened(path, build.read(path)), "")


def _checked(path: Path, library: ctypes.CDLL, origin: str) -> Status:
    try:
        library.build_name.restype = ctypes.c_char_p
        if library.build_name() != path.stem.encode():
            raise OSError(f"{path}: the library of another build")
        library.vector_bytes.restype = library.threaded.restype = ctypes.c_int64
        threads = "" if library.threaded() else ", one thread (the compiler has no OpenMP)"
        return Status(library, f"{path}, {origin}{8 * library.vector_bytes()}-bit vectors{threads}", path.stem)
    except AttributeError as error:
        raise OSError(f"{path}: not a library of these kernels: {error}") from None


def _with_openmp(path: Path) -> ctypes.CDLL:
    """Load a library that names no OpenMP of its own: PyTorch's is in the process, or beside it, or the system's."""
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        beside = sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*"))
        for one in (*map(str, beside), *_OPENMP):
            with contextlib.suppress(OSError):
                ctypes.CDLL(one, ctypes.RTLD_GLOBAL)
                return ctypes.CDLL(str(path))
        raise error


def _opened(path: Path, content: bytes) -> ctypes.CDLL:
    """Load exactly these bytes where the system can, which nothing that happens to the file touches; else the file."""
    with contextlib.suppress(OSError, AttributeError):
        memory = os.memfd_create("atma-native")
        # Never closed: the loader knows a library by this path, so its number must not be given to another file.
        with open(memory, "wb", closefd=False) as file:
            file.write(content)
        return ctypes.CDLL(f"/proc/self/fd/{memory}")
    return ctypes.CDLL(str(path))


def find_compiler() -> str | None:
    """The C++ compiler that CXX names, or the system's; None: there is none."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)


def name(device: torch.device) -> str:
    """What decides the last bits on a device: on a CPU the library, by its name; elsewhere PyTorch's version."""
    found = status().name if device.type == "cpu" else ""
    return found or f"torch {torch.__version__} on {device.type}"


def available(*dtypes: torch.dtype) -> bool:
    """Whether the kernels are there and take these dtypes."""
    return all(dtype in DTYPES for dtype in dtypes) and status().library is not None


def call(name: str, dtype: torch.dtype | None, fields: str, values: Sequence[int | float]) -> None:
    """Run the kernel `name` for `dtype` (None: it has one form) on the sizes, strides, addresses and numbers `values`.

    fields: the names of the values, in their order, which need not be that of the compiled struct; an array is one name
    and several values. They are checked at the first call with them: ValueError names the field that is wrong, missing
    or surplus, or says that there are not as many values, or that the library is not there.
    """
    found = _packers.get((name, dtype, fields)) or _packer(name, dtype, fields)
    kernel, count, pack, order = found
    if len(values) != count:
        raise ValueError(f"{name} takes {count} values for its fields {fields}, not {len(values)}")
    packed = pack(*values) if order is None else pack(*order(values))
    kernel(packed)
    if _log.calls is not None:
        _log.calls.append(Call(kernel, packed))


def _packer(name: str, dtype: torch.dtype | None, fields: str) -> layout.Packer:
    library, reason, _ = status()
    if library is None:
        raise ValueError(f"the native backend is not available: {reason}")
    symbol = name if dtype is None else f"{name}_{DTYPES[dtype]}"
    found = _packers[name, dtype, fields] = layout.packer(library, symbol, fields.split())
    return found


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


__all__ = [
    "DTYPES",
    "MODES",
    "Call",
    "Status",
    "addresses",
    "available",
    "call",
    "compiled",
    "find_compiler",
    "logged",
    "logging",
    "mode_of",
    "name",
    "status",
    "tell",
]

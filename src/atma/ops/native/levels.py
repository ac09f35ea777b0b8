"""The libraries that a wheel carries, one for each instruction level: which there are, which this processor can run.

A registry has no tag for instruction levels, so one wheel holds the libraries of all. They need neither Python nor
PyTorch's headers, and take OpenMP from the process that loads them, so a level is one file for every Python and torch.
This module imports nothing of the package: `setup.py` loads it by its path to build a wheel.
"""

import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).parent
FOLDER = SOURCES / "lib"
"""Where a wheel has them."""
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fPIC", "-Wno-psabi", "-Wno-unknown-pragmas")
"""Of every build of the kernels, for a level or for one processor."""

_V3 = frozenset(["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"])
_V4 = _V3 | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])


class Level(NamedTuple):
    """An instruction level."""

    name: str
    machines: tuple[str, ...]
    """What `platform.machine()` says of them."""
    flags: tuple[str, ...]
    """For the compiler."""
    needs: frozenset[str] = frozenset()
    """Flags that Linux reports of a processor that can run it."""


LEVELS = (
    Level(
        "x86-64-v4-bf16",
        ("x86_64",),
        ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni"),
        _V4 | {"avx512_bf16", "avx512_vnni"},
    ),
    Level("x86-64-v4", ("x86_64",), ("-march=x86-64-v4",), _V4),
    Level("x86-64-v3", ("x86_64",), ("-march=x86-64-v3",), _V3),
    Level("arm64", ("aarch64", "arm64"), ("-march=armv8-a",)),
)
"""The best first."""


def of_machine(machine: str | None = None) -> list[Level]:
    """The levels of a machine, this one by default."""
    return [level for level in LEVELS if (machine or platform.machine()) in level.machines]


def runnable(flags: frozenset[str] | None = None) -> list[Level]:
    """The levels that this processor can run, the best first. flags: its own by default."""
    able = processor_flags() if flags is None else flags
    return [level for level in of_machine() if level.needs <= able]


def processor_flags() -> frozenset[str]:
    """What Linux reports of this processor; elsewhere nothing."""
    if sys.platform != "linux":
        return frozenset()
    lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    told = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(told.partition(":")[2].split())


def packaged(folder: Path = FOLDER) -> Path | None:
    """The best library of these very sources in the folder that this processor can run."""
    for level in runnable() if folder.is_dir() else ():
        found = sorted(folder.glob(f"native-{level.name}-{source_key()}-*.so"))
        if found:
            return found[0]
    return None


def source_key() -> str:
    """These sources, in 12 digits: a library of others is not taken."""
    files = (*sorted(SOURCES.glob("*.cpp")), *sorted(SOURCES.glob("*.h")))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:12]


def build(compiler: str, levels: Sequence[Level], folder: Path, tell: Callable[[str], None]) -> list[Path]:
    """Compile a library for each level into the folder, in place of the older ones there. OSError says what failed."""
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=60, check=True).stdout
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for level in levels:
        flags = (*FLAGS, *level.flags)
        by = hashlib.sha256(b"\0".join([version, " ".join(flags).encode()])).hexdigest()[:8]
        path = folder / f"native-{level.name}-{source_key()}-{by}.so"
        tell(f"compiling the CPU kernels for {level.name}")
        _compile(compiler, flags, path)
        for other in set(folder.glob(f"native-{level.name}-????????????-????????.so")) - {path}:
            other.unlink()
        made.append(path)
    return made


def _compile(compiler: str, flags: tuple[str, ...], path: Path) -> None:
    """One object of each source, as many at once as there are processors; linked without naming an OpenMP library."""
    threaded = () if sys.platform == "darwin" else ("-fopenmp",)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=path.parent) as staging:

        def compiled(source: Path) -> str:
            made = f"{staging}/{source.stem}.o"
            _run([compiler, *flags, *threaded, f'-DATMA_BUILD="{path.stem}"', "-c", str(source), "-o", made])
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, sorted(SOURCES.glob("*.cpp"))))
        _run([compiler, "-shared", *objects, "-o", f"{staging}/{path.name}"])
        os.chmod(f"{staging}/{path.name}", 0o755)
        os.replace(f"{staging}/{path.name}", path)


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if result.returncode:
        raise OSError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")


__all__ = ["FLAGS", "FOLDER", "LEVELS", "Level", "build", "of_machine", "packaged", "processor_flags", "runnable"]

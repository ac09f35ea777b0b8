"""From `pip install` of a wheel to the first answer, as a newcomer has it: seconds and memory, without a compiler.

    python benchmarks/first_answer.py dist/atma_lm-0.1.0-py3-none-manylinux_2_28_x86_64.whl --torch torch==2.13.0

A new virtual environment gets torch first, whose time is told apart, then the wheel with what else it needs. Then the
packaged model answers twice where no compiler can be found, the first time with no cache, and `import atma` is
measured: the median of nine, less that of bare Python.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", default="torch", help="what pip is asked for first")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(asked.wheel.resolve(), asked.torch, Path(folder))


def measure(wheel: Path, torch: str, folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    python = str(folder / "venv" / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    tell("pip install torch, s", seconds([*pip, torch]))
    tell("pip install the wheel, s", seconds([*pip, str(wheel)]))
    answer = [python, "-m", "atma", "generate", "def read_lines(path):", "--max-tokens", "20"]
    bare = {"PATH": "/nowhere", "HOME": str(folder / "home"), "CXX": "", "ATMA_NATIVE": "packaged"}
    tell("the first answer of 20 tokens, s", seconds(answer, bare))
    tell("the second, s", seconds(answer, bare))
    tell("largest memory of a process so far, MiB", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
    for words in ("import atma", "import atma; atma.load('nano')"):
        taken = statistics.median(seconds([python, "-c", words], bare) for _ in range(9))
        nothing = statistics.median(seconds([python, "-c", ""], bare) for _ in range(9))
        tell(f"{words}, ms beyond bare Python", 1e3 * (taken - nothing))
        tell(f"{words}, MiB", memory(python, words, bare))
    told = subprocess.run(
        [python, "-m", "atma", "info"], env=os.environ | bare, capture_output=True, text=True, check=True
    )
    print(next(line for line in told.stdout.splitlines() if line.startswith("native kernels")))


def seconds(command: list[str], environment: dict[str, str] | None = None) -> float:
    begun = time.perf_counter()
    subprocess.run(command, env=os.environ | (environment or {}), stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begun


def memory(python: str, words: str, environment: dict[str, str]) -> float:
    """The most memory of a process that runs these words."""
    scale = "1024" if sys.platform == "linux" else "1048576"
    told = f"{words}; import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / {scale})"
    ended = subprocess.run(
        [python, "-c", told], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return float(ended.stdout)


def tell(what: str, number: float) -> None:
    print(f"{what:50} {number:8.1f}", flush=True)


if __name__ == "__main__":
    main()

"""What the serving scripts share: the harness of tests/, their options, the first line they print, and a corpus."""

import argparse
import sys
from pathlib import Path

import torch

import atma
from atma.loading import Loaded, load

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # beside a script's own folder, the one that holds tests/

from tests.harness.conversations import Cold, Trace
from tests.harness.invariance import alone, differences, random_requests, speaking, together
from tests.harness.reuse import Repeats, Reuse
from tests.harness.traces import Found, Traces

__all__ = [
    "Cold",
    "Found",
    "Repeats",
    "Reuse",
    "Trace",
    "Traces",
    "alone",
    "begin",
    "differences",
    "option_parser",
    "own_source",
    "random_requests",
    "speaking",
    "together",
]


def option_parser(words: str | None, part: str | None = None) -> argparse.ArgumentParser:
    """With `--model` and `--threads`; its help is `words`, as of `serving.py PART`."""
    made = argparse.ArgumentParser(
        prog=part and f"serving.py {part}", description=words, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", default="nano")
    made.add_argument("--threads", type=int, default=1)
    return made


def begin(options: argparse.Namespace, what: str = "") -> Loaded:
    """The model asked for, on so many threads, after a line that tells them, `what` is measured, and the versions."""
    torch.set_num_threads(options.threads)
    loaded = load(options.model)
    told = [options.model, *([what] if what else []), f"{options.threads} threads"]
    print(", ".join([*told, f"torch {torch.__version__}", f"atma {atma.__version__}"]))
    return loaded


def own_source() -> str:
    """The text of this package's own Python files: a corpus that is always there."""
    sources = sorted(Path(atma.__file__).parent.rglob("*.py"))
    return "\n".join(path.read_text(encoding="utf-8") for path in sources)

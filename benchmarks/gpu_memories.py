"""The scan of neural memories on a GPU: the Triton kernel beside the same scan in PyTorch.

    python benchmarks/gpu_memories.py --out results

Titans (C = 64) and TTT-Linear (C = 16), heads of 64 channels, float32. First both backends are compared with the
definition in float64, gradients included; then they are timed in turn, forward and with backward; MiB are the most that
a training step holds. Results: memories.md and memories.json in --out, $OUT or runs/gpu. Exit status: 0; 2 without a
CUDA device.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from fast_weights import CHECKED, TTT, WIDTH, ours_titans, ours_ttt, titans_text, ttt_text
from torch import Tensor

from atma.bench.machine import settled
from atma.bench.parity import Way, compare
from atma.bench.timing import interleave

BACKENDS = ("gpu", "cpu")
"""The kernel, and PyTorch's scan."""
KINDS = ("forward ms", "with backward ms", "MiB")
HEAD = "| | B | T | forward ms | PyTorch's | with backward ms | PyTorch's | MiB | PyTorch's |"
SYSTEMS: dict[str, tuple[Callable[..., list[Tensor]], Callable]] = {
    "Titans": (titans_text, ours_titans),
    "TTT-Linear": (partial(ttt_text, width=WIDTH), partial(ours_ttt, TTT)),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=os.environ.get("OUT", "runs/gpu"), help="folder of the results")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        told = "needs a CUDA device that PyTorch can use; this machine has none"
        print(f"benchmarks/gpu_memories.py: {told}", file=sys.stderr)
        return 2
    folder, device, rows = Path(options.out), torch.device("cuda"), []
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{HEAD}\n| --- |{' ---: |' * 8}")
    with settled(0):
        for name in SYSTEMS:
            check(name, device)
            for batch in options.batches:
                for length in options.lengths:
                    rows.append(measured(name, batch, length, options, device))
                    print(line(rows[-1]), flush=True)
    table = "\n".join([HEAD, f"| --- |{' ---: |' * 8}", *map(line, rows)])
    (folder / "memories.md").write_text(table + "\n", encoding="utf-8")
    (folder / "memories.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


def check(name: str, device: torch.device) -> None:
    """ValueError unless both backends are the definition, with all gradients."""
    text, ours = SYSTEMS[name]
    given, way = text(2, CHECKED), Way(torch.float32, device, with_gradients=True)
    exact = partial(_called, partial(ours, backend="reference"))
    for backend in BACKENDS:
        compare(f"{name} by {backend}", partial(_called, partial(ours, backend=backend)), exact, given, way)


def _called(function: Callable, tensors: list[Tensor]) -> list[Tensor]:
    return function(*tensors)


def measured(name: str, batch: int, length: int, options: argparse.Namespace, device: torch.device) -> dict:
    """Milliseconds and MiB of either backend."""
    text, ours = SYSTEMS[name]
    given = [x.to(device, torch.float32) for x in text(options.heads, length)]
    tokens = 1, options.heads, length
    given = [x.repeat(batch, *[1] * (x.ndim - 1)) if x.shape[:3] == tokens else x for x in given]
    row: dict = {"system": name, "batch": batch, "length": length}
    for train in (False, True):
        calls = {backend: partial(run, partial(ours, backend=backend), given, train) for backend in BACKENDS}
        found = interleave(calls, options.rounds, device)
        kind = "with backward" if train else "forward"
        row |= {f"{kind} ms, {backend}": 1e3 * found[backend].median for backend in BACKENDS}
    for backend in BACKENDS:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(partial(ours, backend=backend), given, True)
        row[f"MiB, {backend}"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return row


def run(function: Callable, given: list[Tensor], train: bool) -> None:
    """Forward, or forward and backward to every tensor."""
    if not train:
        with torch.no_grad():
            function(*given)
        return
    leaves = [x.detach().requires_grad_() for x in given]
    torch.autograd.grad(function(*leaves)[0].square().mean(), leaves)


def line(row: dict) -> str:
    """A row of the table."""
    numbers = [f"{row[f'{kind}, {backend}']:,.3g}" for kind in KINDS for backend in BACKENDS]
    return f"| {row['system']} | {row['batch']} | {row['length']:,} | {' | '.join(numbers)} |"


if __name__ == "__main__":
    sys.exit(main())

"""What one query and one key for all heads save in a recurrence: its time over that with a query written out by head.

    OMP_NUM_THREADS=1 python benchmarks/shared_queries.py

The rule `add` with a decay for each head and token, as Mamba-2 has it. Both sides take turns in one process, on one
thread, whose own time is taken: other processes do not count. Medians of the ratios; refused where results differ.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from atma.ops import recurrence

SIZES = {"8 heads of 64": (8, 64, 64), "nano": (4, 128, 64), "small": (16, 128, 64)}
"""Heads, K and V; nano and small: those of Mamba-2 in the widths of these presets."""
SHORT = 1024
"""Tokens up to which a sample repeats its call."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--rounds", type=int, default=15)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for name, sizes in SIZES.items():
        for length in asked.lengths:
            tensors = drawn(*sizes, length)
            torch.testing.assert_close(call(tensors, True), call(tensors, False), rtol=1e-4, atol=1e-4)
            ratios = [ratio(run, tensors, asked.rounds, length) for run in (forward, backward)]
            print(f"{name}, {length} tokens: forward {ratios[0]:.2f}, with backward {ratios[1]:.2f}", flush=True)


def drawn(heads: int, width: int, depth: int, length: int) -> list[Tensor]:
    """q and k (1, 1, T, K), v (1, H, T, V), log_decay and beta (1, H, T)."""
    torch.manual_seed(0)
    q, k = F.normalize(torch.randn(2, 1, 1, length, width), dim=-1)
    log_decay = F.logsigmoid(torch.randn(1, heads, length) + 3.9)
    tensors = [q, k, torch.randn(1, heads, length, depth), log_decay, torch.rand(1, heads, length)]
    return [x.requires_grad_() for x in tensors]


def call(tensors: Sequence[Tensor], shared: bool) -> Tensor:
    q, k, v, *gates = tensors
    return recurrence(q if shared else q.expand(-1, v.shape[1], -1, -1), k, v, *gates)[0]


def forward(tensors: Sequence[Tensor], shared: bool) -> None:
    with torch.no_grad():
        call(tensors, shared)


def backward(tensors: Sequence[Tensor], shared: bool) -> None:
    out = call(tensors, shared)
    torch.autograd.grad(out, tensors, torch.ones_like(out))


def ratio(run: Callable[[Sequence[Tensor], bool], None], tensors: Sequence[Tensor], rounds: int, length: int) -> float:
    ratios = []
    for turn in range(rounds + 1):  # the first is not counted
        seconds = {}
        for shared in (turn % 2 == 0, turn % 2 == 1):
            began = time.thread_time()
            for _ in range(max(1, SHORT // length)):
                run(tensors, shared)
            seconds[shared] = time.thread_time() - began
        ratios.append(seconds[True] / seconds[False])
    return statistics.median(ratios[1:])


if __name__ == "__main__":
    main()

"""The causal depthwise convolution beside torch.nn.functional.conv1d with one group a channel.

conv1d gets its own layout, channels before time, padded before timing; parity turns it back.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from atma.bench.attention import runner
from atma.bench.available import ours
from atma.bench.machine import Cost
from atma.bench.parity import Way, compare, draw
from atma.bench.plan import Plan
from atma.bench.rows import Case, Entry, Job
from atma.ops import causal_conv

MODES = ("forward", "forward+backward")
TAPS = 4
ROWS = 32
PEER = "torch conv1d"


def jobs(plan: Plan, device: torch.device, notes: list[str]) -> list[Job]:
    """All cases of the convolution."""
    made = []
    for dtype in plan.dtypes:
        x = torch.zeros(1, 2, plan.channels, dtype=getattr(torch, dtype), device=device)
        backends = ours("conv", dtype, device, notes, partial(_probe, x))
        for length in plan.lengths:
            sizes = {"length": length, "batch": plan.batch, "channels": plan.channels, "taps": TAPS}
            for mode in MODES:
                given = (sizes, dtype, device, backends, mode)
                made.append(Job(partial(_check, *given), partial(_case, *given)))
    return made


def _tensors(sizes: dict[str, int]) -> list[Tensor]:
    x = draw((sizes["batch"], sizes["length"], sizes["channels"]), 0)
    return [x, draw((sizes["channels"], TAPS), 1)]


def _check(sizes: dict[str, int], dtype: str, device: torch.device, backends: list[str], mode: str) -> None:
    tensors, way = _tensors(sizes), Way(getattr(torch, dtype), device, mode != "forward")
    for backend in backends:
        what = f"conv {mode} of the {backend} backend in {dtype} at {sizes['length']} tokens"
        compare(what, _shown(partial(_ours, backend)), _exact, tensors, way)
    compare(f"{PEER} ({mode}, {dtype})", _shown(_turned), _exact, tensors, way.of_peer())


def _case(sizes: dict[str, int], dtype: str, device: torch.device, backends: list[str], mode: str) -> Case:
    x, weight = (x.to(device, getattr(torch, dtype)) for x in _tensors(sizes))
    backward, size = mode != "forward", x.dtype.itemsize
    passes = 5 if backward else 2
    cost = Cost(2 * TAPS * x.numel() * (3 if backward else 1), passes * x.numel() * size)
    entries = [
        Entry(f"atma {backend}", True, runner(partial(_ours, backend), [x, weight], backward), cost)
        for backend in backends
    ]
    padded = F.pad(x.mT, (TAPS - 1, 0)).contiguous()
    entries.append(Entry(PEER, False, runner(_conv1d, [padded, weight.unsqueeze(1)], backward), cost))
    return Case(f"conv {mode}", sizes, dtype, entries)


def _ours(backend: str, x: Tensor, weight: Tensor) -> Sequence[Tensor]:
    return [causal_conv(x, weight, None, None, backend)]


def _conv1d(padded: Tensor, weight: Tensor) -> Sequence[Tensor]:
    return [F.conv1d(padded, weight, groups=weight.shape[0])]


def _turned(x: Tensor, weight: Tensor) -> Sequence[Tensor]:
    return [_conv1d(F.pad(x.mT, (TAPS - 1, 0)), weight.unsqueeze(1))[0].mT]


def _starts(length: int) -> list[int]:
    return sorted({0, max(0, (length - ROWS) // 2), max(0, length - ROWS)})


def _shown(call: Callable[..., Sequence[Tensor]]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    def outputs(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [call(*tensors)[0][:, at : at + ROWS] for at in _starts(tensors[0].shape[1])]

    return outputs


def _exact(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same outputs from calls on each window alone, after the inputs before it."""
    x, weight = tensors
    before = F.pad(x, (0, 0, TAPS - 1, 0))
    return [
        causal_conv(x[:, at : at + ROWS], weight, before[:, at : at + TAPS - 1], None, "reference")
        for at in _starts(x.shape[1])
    ]


def _probe(x: Tensor, backend: str) -> None:
    _ours(backend, x, torch.zeros(x.shape[2], TAPS, dtype=x.dtype, device=x.device))

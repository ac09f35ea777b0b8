"""The soft-capped cross-entropy, a block of tokens at a time, beside torch's on the soft-capped logits all at once."""

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
from atma.ops import softcap_loss
from atma.ops.loss import softcap

MODES = ("forward", "forward+backward")
CAP = 15.0
ROWS = 64
PEER = "torch cross_entropy"
Losses = Callable[..., Sequence[Tensor]]


def jobs(plan: Plan, device: torch.device, notes: list[str]) -> list[Job]:
    """All cases of the loss."""
    made = []
    for dtype in plan.dtypes:
        hidden = torch.zeros(2, plan.channels, dtype=getattr(torch, dtype), device=device)
        backends = ours("loss", dtype, device, notes, partial(_probe, hidden))
        for length in plan.lengths:
            sizes = {"length": length * plan.batch, "channels": plan.channels, "vocabulary": plan.vocabulary}
            for mode in MODES:
                given = (sizes, dtype, device, backends, mode)
                made.append(Job(partial(_check, *given), partial(_case, *given)))
    return made


def _tensors(sizes: dict[str, int]) -> list[Tensor]:
    """hidden, weight with logits of about unit size, bias."""
    width, vocabulary = sizes["channels"], sizes["vocabulary"]
    return [draw((sizes["length"], width), 0), draw((vocabulary, width), 1) * width**-0.5, draw((vocabulary,), 2)]


def _targets(sizes: dict[str, int], device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, sizes["vocabulary"], (sizes["length"],), generator=generator).to(device)


def _check(sizes: dict[str, int], dtype: str, device: torch.device, backends: list[str], mode: str) -> None:
    """Tokens are apart from each other: the first of them are checked in a call on all."""
    tensors, way = _tensors(sizes), Way(getattr(torch, dtype), device, mode != "forward")
    targets = _targets(sizes, torch.device("cpu"))
    exact = _shown(partial(_ours, "reference"), targets, True)
    for backend in backends:
        what = f"loss {mode} of the {backend} backend in {dtype} at {sizes['length']} tokens"
        compare(what, _shown(partial(_ours, backend), targets, False), exact, tensors, way)
    compare(f"{PEER} ({mode}, {dtype})", _shown(_peer, targets, False), exact, tensors, way.of_peer())


def _case(sizes: dict[str, int], dtype: str, device: torch.device, backends: list[str], mode: str) -> Case:
    hidden, weight, bias = _tensors(sizes)
    tensors = [hidden.to(device, getattr(torch, dtype)), weight.to(device, getattr(torch, dtype))]
    tensors.append(bias.to(device, torch.float32))
    targets, backward = _targets(sizes, device), mode != "forward"
    moved = (hidden.numel() + weight.numel()) * tensors[0].dtype.itemsize
    passes = 3 if backward else 1
    cost = Cost(2 * hidden.numel() * sizes["vocabulary"] * passes, moved * passes)
    entries = [
        Entry(f"atma {backend}", True, runner(partial(_ours, backend, targets), tensors, backward), cost)
        for backend in backends
    ]
    entries.append(Entry(PEER, False, runner(partial(_peer, targets), tensors, backward), cost))
    return Case(f"loss {mode}", sizes, dtype, entries)


def _ours(backend: str, targets: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> Sequence[Tensor]:
    return [softcap_loss(hidden, weight, bias, targets, CAP, backend)]


def _peer(targets: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> Sequence[Tensor]:
    logits = softcap(F.linear(hidden, weight).to(bias.dtype) + bias, CAP)
    return [F.cross_entropy(logits, targets, reduction="none")]


def _shown(call: Losses, targets: Tensor, alone: bool) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """The first losses, from a call on all tokens or on those alone."""

    def outputs(tensors: Sequence[Tensor]) -> list[Tensor]:
        hidden, weight, bias = tensors
        rows = ROWS if alone else hidden.shape[0]
        return [call(targets[:rows].to(hidden.device), hidden[:rows], weight, bias)[0][:ROWS]]

    return outputs


def _probe(hidden: Tensor, backend: str) -> None:
    weight = torch.zeros(2, hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
    bias = torch.zeros(2, device=hidden.device)
    _ours(backend, torch.zeros(hidden.shape[0], dtype=torch.long, device=hidden.device), hidden, weight, bias)

"""Linear recurrences beside the public functions of the systems they come from: one kind for each rule and decay.

Operations are those of the recurrence: three products of a matrix and a vector a token; chunked forms do more. Peers
take the same keys, written out for each head before timing unless all share one; they scale queries by 1/√K, which
parity undoes.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from atma.bench.attention import recorded, runner
from atma.bench.available import ours
from atma.bench.machine import Cost
from atma.bench.parity import Way, compare, draw, evaluate
from atma.bench.plan import Plan
from atma.bench.recurrence_peers import Function, peers_of
from atma.bench.rows import Case, Entry, Job
from atma.ops import recurrence
from atma.ops.recurrent import Rule

MODES = ("forward", "forward+backward", "step")
CHECKED = {"forward": 2048, "forward+backward": 192, "step": 1}
"""First tokens that parity is asked of: the reference goes token by token and keeps every memory for its gradient."""


class _Kind(NamedTuple):
    """What a recurrence computes."""

    name: str
    rule: Rule
    by_channel: bool
    weighed: bool
    one_key: bool
    """Whether all heads share their queries and keys, and each has values of its own."""


RECURRENCES = {
    "delta": _Kind("delta", "delta", False, True, False),
    "kda": _Kind("kda", "delta", True, True, False),
    "gla": _Kind("gla", "add", True, False, False),
    "mamba2": _Kind("mamba2", "add", False, True, True),
}


def jobs(name: str, plan: Plan, device: torch.device, notes: list[str]) -> list[Job]:
    """All cases of one of RECURRENCES. The step's time does not depend on length: it is one case."""
    made, kind = [], RECURRENCES[name]
    groups = 1 if kind.one_key else plan.key_value_heads
    sizes = {"batch": plan.batch, "heads": plan.heads, "groups": groups, "width": plan.head_width}
    for dtype in plan.dtypes:
        backends = ours("recurrent", dtype, device, notes, partial(_probe, plan, kind, getattr(torch, dtype), device))
        for mode in MODES:
            for length in plan.lengths if mode != "step" else (1,):
                peers = peers_of(name, mode == "step", length, (dtype, device), notes)
                setting = _Setting(kind, {"length": length} | sizes, dtype, device, backends, peers)
                made.append(Job(partial(setting.check, mode), partial(setting.case, mode)))
    return made


class _Setting:
    """One kind, size and dtype."""

    def __init__(
        self,
        kind: _Kind,
        sizes: dict[str, int],
        dtype: str,
        device: torch.device,
        backends: list[str],
        peers: dict[str, Function],
    ) -> None:
        self.kind, self.sizes, self.dtype, self.device = kind, sizes, dtype, device
        self.backends, self.peers = backends, peers
        self.torch_dtype: torch.dtype = getattr(torch, dtype)

    def tensors(self, mode: str, length: int) -> list[Tensor]:
        """q, k, v, log_decay, beta where there is one, and for a step the memory; float64, queries and keys of length
        1."""
        batch, heads, groups, width = (self.sizes[name] for name in ("batch", "heads", "groups", "width"))
        one = self.kind.one_key
        q = F.normalize(draw((batch, groups if one else heads, length, width), 0), dim=-1)
        k = F.normalize(draw((batch, groups, length, width), 1), dim=-1)
        v = draw((batch, heads if one else groups, length, width), 2)
        log_decay = draw((batch, heads, length, width)[: 4 if self.kind.by_channel else 3], 3)
        made = [q, k, v, F.logsigmoid(log_decay + 3.9)]
        if self.kind.weighed:
            made.append(draw((batch, heads, length), 4).sigmoid())
        return [*made, draw((batch, heads, width, width), 5)] if mode == "step" else made

    def check(self, mode: str) -> None:
        tensors = self.tensors(mode, min(self.sizes["length"], CHECKED[mode]))
        way = Way(self.torch_dtype, self.device, mode == "forward+backward")
        exact = _shown(partial(_ours, self.kind, "reference"))
        for backend in self.backends:
            what = f"{self.kind.name} {mode} of the {backend} backend in {self.dtype}"
            compare(what, _shown(partial(_ours, self.kind, backend)), exact, tensors, way)
        for name, rule in self.peers.items():
            compare(f"{name} ({mode}, {self.dtype})", _translated(self.kind, rule), exact, tensors, way.of_peer())

    def case(self, mode: str) -> Case:
        tensors = [x.to(self.device, self.torch_dtype) for x in self.tensors(mode, self.sizes["length"])]
        if mode == "step":
            tensors[-1] = tensors[-1].float()
        backward, cost = mode == "forward+backward", self.cost(mode)
        entries = [
            Entry(f"atma {backend}", True, runner(partial(_ours, self.kind, backend), tensors, backward), cost)
            for backend in self.backends
        ]
        if mode == "step" and "native" in self.backends:
            replay = recorded(partial(_ours, self.kind, "native"), tensors)
            entries.append(Entry("atma native, recorded", True, replay, cost))
        given = [x.contiguous() for x in _peer_inputs(self.kind, tensors)]
        entries += [Entry(name, False, runner(rule, given, backward), cost) for name, rule in self.peers.items()]
        return Case(f"{self.kind.name} {mode}", self.sizes, self.dtype, entries)

    def cost(self, mode: str) -> Cost:
        batch, heads, groups, length, width = (
            self.sizes[name] for name in ("batch", "heads", "groups", "length", "width")
        )
        operations = 6 * batch * heads * length * width * width
        moved = 2 * batch * length * (heads + groups) * width * self.torch_dtype.itemsize
        if mode == "step":
            return Cost(operations, moved + 2 * 4 * batch * heads * width * width)
        return Cost(operations * 3, moved * 3) if mode == "forward+backward" else Cost(operations, moved)


def _ours(kind: _Kind, backend: str, *tensors: Tensor) -> Sequence[Tensor]:
    """The read, and for a step the memory after it, which may take the place of the one before."""
    q, k, v, log_decay, *rest = tensors
    beta = rest.pop(0) if kind.weighed else None
    read, after = recurrence(q, k, v, log_decay, beta, rest[0] if rest else None, rule=kind.rule, backend=backend)
    return [read, after] if rest else [read]


def _shown(rule: Function) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    return lambda tensors: rule(*(x.clone() for x in tensors))


def _peer_inputs(kind: _Kind, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Ours (B, H, T, ·) as the peers hold them: (B, T, H, ·), a key per head or one, the memory (B, H, K, V)."""
    q, k, v, *rest = tensors
    if not kind.one_key:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    gates = 1 + kind.weighed
    return [*(x.transpose(1, 2) for x in (q, k, v, *rest[:gates])), *(x.mT for x in rest[gates:])]


def _translated(kind: _Kind, rule: Function) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    def outputs(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        read, *after = rule(*_peer_inputs(kind, tensors))
        return [read.transpose(1, 2) * tensors[0].shape[-1] ** 0.5, *(x.mT for x in after)]

    return outputs


def _probe(plan: Plan, kind: _Kind, dtype: torch.dtype, device: torch.device, backend: str) -> None:
    q = torch.zeros(1, plan.heads, 2, plan.head_width, dtype=dtype, device=device)
    rates, beta = q if kind.by_channel else q[..., 0], [q[..., 0]] if kind.weighed else []
    evaluate(lambda given: _ours(kind, backend, *given), [q, q, q, rates, *beta], False)

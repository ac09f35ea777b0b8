"""The gated delta rule beside the functions of Hugging Face's Qwen3-Next (and flash-linear-attention on a GPU).

Operations are those of the recurrence: three products of a matrix and a vector a token; chunked forms do more. Peers
take the same keys, written out for each head before timing; they scale queries by 1/√K, which parity undoes.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from atma.bench.attention import recorded, runner
from atma.bench.available import ours, peer
from atma.bench.machine import Cost
from atma.bench.parity import Way, compare, draw, evaluate
from atma.bench.plan import Plan
from atma.bench.rows import Case, Entry, Job
from atma.ops import gated_delta

MODES = ("forward", "forward+backward", "step")
CHECKED = {"forward": 2048, "forward+backward": 192, "step": 1}
"""First tokens that parity is asked of: the reference goes token by token and keeps every memory for its gradient."""
QWEN = "transformers.models.qwen3_next.modeling_qwen3_next"
Rule = Callable[..., Sequence[Tensor]]


def jobs(plan: Plan, device: torch.device, notes: list[str]) -> list[Job]:
    """All cases of the delta rule. The step's time does not depend on length: it is one case."""
    made = []
    for dtype in plan.dtypes:
        peers = _peers(dtype, device, notes)
        backends = ours("recurrent", dtype, device, notes, partial(_probe, plan, getattr(torch, dtype), device))
        for mode in MODES:
            for length in plan.lengths if mode != "step" else (1,):
                sizes = {"length": length, "batch": plan.batch, "heads": plan.heads, "groups": plan.key_value_heads}
                setting = _Setting(sizes | {"width": plan.head_width}, dtype, device, backends, peers[mode == "step"])
                made.append(Job(partial(setting.check, mode), partial(setting.case, mode)))
    return made


class _Setting:
    """One size and dtype."""

    def __init__(
        self, sizes: dict[str, int], dtype: str, device: torch.device, backends: list[str], peers: dict[str, Rule]
    ) -> None:
        self.sizes, self.dtype, self.device, self.backends, self.peers = sizes, dtype, device, backends, peers
        self.torch_dtype: torch.dtype = getattr(torch, dtype)

    def tensors(self, mode: str, length: int) -> list[Tensor]:
        """q, k, v, log_decay, beta, and for a step the memory; float64, queries and keys of length 1."""
        batch, heads, groups, width = (self.sizes[name] for name in ("batch", "heads", "groups", "width"))
        q = F.normalize(draw((batch, heads, length, width), 0), dim=-1)
        k = F.normalize(draw((batch, groups, length, width), 1), dim=-1)
        v = draw((batch, groups, length, width), 2)
        log_decay, beta = (draw((batch, heads, length), seed) for seed in (3, 4))
        made = [q, k, v, F.logsigmoid(log_decay + 3.9), beta.sigmoid()]
        return [*made, draw((batch, heads, width, width), 5)] if mode == "step" else made

    def check(self, mode: str) -> None:
        tensors = self.tensors(mode, min(self.sizes["length"], CHECKED[mode]))
        way = Way(self.torch_dtype, self.device, mode == "forward+backward")
        exact = _shown(partial(_delta, "reference"))
        for backend in self.backends:
            what = f"delta {mode} of the {backend} backend in {self.dtype}"
            compare(what, _shown(partial(_delta, backend)), exact, tensors, way)
        for name, rule in self.peers.items():
            compare(f"{name} ({mode}, {self.dtype})", _translated(rule), exact, tensors, way.of_peer())

    def case(self, mode: str) -> Case:
        tensors = [x.to(self.device, self.torch_dtype) for x in self.tensors(mode, self.sizes["length"])]
        if mode == "step":
            tensors[-1] = tensors[-1].float()
        backward, cost = mode == "forward+backward", self.cost(mode)
        entries = [
            Entry(f"atma {backend}", True, runner(partial(_delta, backend), tensors, backward), cost)
            for backend in self.backends
        ]
        if mode == "step" and "native" in self.backends:
            replay = recorded(partial(_delta, "native"), tensors)
            entries.append(Entry("atma native, recorded", True, replay, cost))
        given = [x.contiguous() for x in _peer_inputs(tensors)]
        entries += [Entry(name, False, runner(rule, given, backward), cost) for name, rule in self.peers.items()]
        return Case(f"delta {mode}", self.sizes, self.dtype, entries)

    def cost(self, mode: str) -> Cost:
        batch, heads, groups, length, width = (
            self.sizes[name] for name in ("batch", "heads", "groups", "length", "width")
        )
        operations = 6 * batch * heads * length * width * width
        moved = 2 * batch * length * (heads + groups) * width * self.torch_dtype.itemsize
        if mode == "step":
            return Cost(operations, moved + 2 * 4 * batch * heads * width * width)
        return Cost(operations * 3, moved * 3) if mode == "forward+backward" else Cost(operations, moved)


def _delta(backend: str, *tensors: Tensor) -> Sequence[Tensor]:
    """The read, and for a step the memory after it, which may take the place of the one before."""
    q, k, v, log_decay, beta, *held = tensors
    read, after = gated_delta(q, k, v, log_decay, beta, held[0] if held else None, backend=backend)
    return [read, after] if held else [read]


def _shown(rule: Rule) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    return lambda tensors: rule(*(x.clone() for x in tensors))


def _peer_inputs(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Ours (B, H, T, ·) as the peers hold them: (B, T, H, ·), a key per head, the memory (B, H, K, V)."""
    q, k, v, *rest = tensors
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return [*(x.transpose(1, 2) for x in (q, k, v, *rest[:2])), *(x.mT for x in rest[2:])]


def _translated(rule: Rule) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    def outputs(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        read, *after = rule(*_peer_inputs(tensors))
        return [read.transpose(1, 2) * tensors[0].shape[-1] ** 0.5, *(x.mT for x in after)]

    return outputs


def _peers(dtype: str, device: torch.device, notes: list[str]) -> tuple[dict[str, Rule], dict[str, Rule]]:
    """Peers of the chunked form and of the step; flash-linear-attention has no float32."""
    chunked: dict[str, Rule] = {}
    step: dict[str, Rule] = {}
    if (qwen := peer(QWEN, notes)) is not None:
        chunked["transformers chunk"] = partial(_call, qwen.torch_chunk_gated_delta_rule)
        step["transformers recurrent"] = partial(_call, qwen.torch_recurrent_gated_delta_rule)
    if device.type == "cuda" and dtype != "float32" and (fla := peer("fla.ops.gated_delta_rule", notes)) is not None:
        chunked["fla chunk"] = partial(_call, fla.chunk_gated_delta_rule)
        step["fla recurrent"] = partial(_call, fla.fused_recurrent_gated_delta_rule)
    return chunked, step


def _call(rule: Callable, *tensors: Tensor) -> Sequence[Tensor]:
    q, k, v, log_decay, beta, *memory = tensors
    held = memory[0] if memory else None
    read, after = rule(q, k, v, g=log_decay.float(), beta=beta, initial_state=held, output_final_state=held is not None)
    return [read] if held is None else [read, after]


def _probe(plan: Plan, dtype: torch.dtype, device: torch.device, backend: str) -> None:
    q = torch.zeros(1, plan.heads, 2, plan.head_width, dtype=dtype, device=device)
    k, rates = q[:, : plan.key_value_heads], q[..., 0]
    evaluate(lambda given: _delta(backend, *given), [q, k, k, rates, rates], False)

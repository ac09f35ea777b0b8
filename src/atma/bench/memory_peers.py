"""The systems that neural memories come from, as functions of the tensors that `ops.fast_weights` takes.

titans-pytorch is a module: what its projections would give is handed to it as its input. flash-linear-attention's TTT
has a bias beside its matrix, as a second state, which is the last column of W⁰ here.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from atma.bench.available import peer

Function = Callable[..., Sequence[Tensor]]


class _Taken(nn.Module):
    """In the place of a projection: what it would give is part of what comes in."""

    def __init__(self, take: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.take = take

    def forward(self, x: Tensor) -> Tensor:
        return self.take(x)


def titans_peer(chunk: int, notes: list[str]) -> partial | None:
    """titans-pytorch as a function of q, k, v, θ, γ, η, W₁ and W₂, in chunks with one anchor each; or None."""
    titans = peer("titans_pytorch", notes)
    return None if titans is None else partial(_titans_peer, titans, chunk)


def _titans_peer(titans: Any, chunk: int, *given: Tensor) -> Sequence[Tensor]:
    memory = titans_module(titans, given[6], chunk)
    read, state = memory(titans_sequence(*given[:6]), state=titans_start(given))
    last = state.states[0]
    return [read.unflatten(2, (given[0].shape[1], -1)).transpose(1, 2), *_titans_weights(last, given[0].shape[0])]


def titans_start(given: Sequence[Tensor]) -> tuple[Any, ...]:
    """Its state before the first token."""
    rows = given[0].shape[0]
    weights = {f"weights.{i}": w.mT.repeat(rows, 1, 1) for i, w in enumerate((given[7], given[6]))}
    return 0, weights, None, None, None


def _titans_weights(last: Any, rows: int) -> list[Tensor]:
    return [last[name].unflatten(0, (rows, -1)).mT for name in ("weights.1", "weights.0")]


def titans_sequence(q: Tensor, k: Tensor, v: Tensor, step: Tensor, keep: Tensor, momentum: Tensor) -> Tensor:
    """(B, T, …): tokens, and gates as logits. Its mean square has 2/V times our gradient, its decay is 1 − γ."""
    tokens = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], 2)
    gates = step * v.shape[3] / 2, -torch.logit(keep), torch.logit(momentum)
    return torch.cat([tokens, *(x.transpose(1, 2) for x in gates)], 2)


def titans_module(titans: Any, w1: Tensor, chunk: int) -> Any:
    """Its memory of the sizes of W₁, with what comes in for projections, and no norms."""
    heads, width, hidden = w1.shape
    inner = heads * width
    model = titans.MemoryMLP(width, depth=2, expansion_factor=hidden / width)
    plain = {"mem_model_norm_add_residual": False, "adaptive_step_transform": lambda x: x}
    sizes = {"dim_head": width, "heads": heads, "chunk_size": 1, "batch_size": chunk}
    memory = titans.NeuralMemory(dim=inner, model=model, **sizes, **plain)
    for i, name in enumerate(("to_queries", "to_keys", "to_values")):
        setattr(memory, name, _Taken(lambda x, i=i: x[..., i * inner : (i + 1) * inner]))
    at = 3 * inner
    memory.to_adaptive_step = _Taken(lambda x: x[..., at : at + heads].mT.flatten(0, 1))
    memory.to_decay_factor = _Taken(lambda x: x[..., at + heads : at + 2 * heads].mT.flatten(0, 1)[..., None])
    memory.to_momentum = _Taken(lambda x: x[..., at + 2 * heads :].mT.flatten(0, 1)[None, ..., None])
    for name in ("store_norm", "retrieve_norm", "multihead_rmsnorm", "combine_heads", "q_norm", "k_norm"):
        setattr(memory, name, nn.Identity())
    memory.retrieve_gate = None
    return memory


def ttt_peer(notes: list[str]) -> Function | None:
    """The reference of flash-linear-attention as a function of the same tensors, or None."""
    ttt = peer("fla.ops.ttt.naive", notes)
    return None if ttt is None else partial(_ttt_peer, ttt)


def _ttt_peer(ttt: Any, chunk: int, *given: Tensor) -> Sequence[Tensor]:
    """What is read, and weights and bias behind; of W⁰ a column more than keys are wide is the bias."""
    q, k, v, step, initial, gain, shift = given
    width = q.shape[3]
    tokens = [x.transpose(1, 2).clone() for x in (q, k, v)]  # it scales queries in place
    matrix, bias = initial[None, ..., :width].mT, initial[None, ..., width:].mT
    start = {"initial_state": matrix.expand(len(q), -1, -1, -1).float(), "output_final_state": True}
    start |= {"initial_state_bias": bias.expand(len(q), -1, -1, -1).float()} if bias.numel() else {}
    sizes = {"scale": 1.0, "mini_batch_size": chunk}
    eta = step.transpose(1, 2)[..., None]
    read, weights, behind = ttt.chunk_ttt_linear_ref(*tokens, gain, shift, eta, **sizes, **start)
    return [read.transpose(1, 2), torch.cat([weights, behind], 2).mT]

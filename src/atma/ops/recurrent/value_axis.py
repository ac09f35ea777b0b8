"""Decays on the value axis, in chunks: M ← diag(a) M; M ← M + β v kᵀ; out = M q (mixers.md, sections 3.1 and 3.4).

The transpose of (3.4)–(3.5) for the rule `add`. With S = lower-inclusive Q Kᵀ and U = β V a chunk reads
R_p = e^{g_p} ∘ (M q_p) + Σ_s S[p, s] D[p, s] ∘ u_s, D by value channel: it is U that decays on its way to the read, so
forward and gradient of decays.py change places. Of memories only the one before each chunk is kept for the gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from atma.ops.backend import recording
from atma.ops.operator import operator
from atma.ops.recurrent.decays import Channels, chunk_length, for_each_head, in_chunks, joined, shared, weighed
from atma.ops.recurrent.poison import kept_apart


def by_value(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    memory: Tensor,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results of the reference, in chunks; a single token without gradient takes the plain step."""
    if q.shape[2] == 1 and not recording():
        # M ← diag(a) M; M ← M + β v kᵀ; out = M q.
        write = for_each_head(v, q) if beta is None else beta.unsqueeze(-1) * for_each_head(v, q)
        memory = log_decay.exp().mT * memory + write.mT @ for_each_head(k, q)
        return q @ memory.mT, memory
    out, after, _ = _chunked(q, k, v, log_decay, beta, memory, segment_ids)
    return out, after


class _Chunks(NamedTuple):
    q: Tensor  # (B, H, N, C, K), and k likewise
    k: Tensor
    v: Tensor  # (B, H, N, C, V)
    beta: Tensor | None  # (B, H, N, C, 1)
    decays: Channels  # by value channel


def _cut(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None, segment_ids: Tensor | None
) -> _Chunks:
    chunk = chunk_length(q.shape[2], True)
    decays = Channels.of(log_decay, chunk, segment_ids)
    q, k, v = (in_chunks(x, chunk) for x in (q, for_each_head(k, q), for_each_head(v, q)))
    return _Chunks(q, k, v, None if beta is None else in_chunks(beta, chunk).unsqueeze(-1), decays)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    memory: Tensor,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, memory after, and memory before each chunk (B, H, N, V, K)."""
    out, after, before = kept_apart(_run, q, k, v, log_decay, beta, memory, segment_ids)
    return out, after, before


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    memory: Tensor,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    c = _cut(q, k, v, log_decay, beta, segment_ids)
    writes, entry = weighed(c.beta, c.v), c.decays.entry
    added = (c.decays.last * writes).mT @ c.k
    before = torch.empty_like(added)
    for n in range(c.k.shape[2]):
        before[:, :, n] = memory
        # M ← diag(e^{g_C}) M + Σ_s (u_s ∘ e^{g_C − g_s}) k_sᵀ.
        memory = entry[:, :, n, -1, :, None] * memory + added[:, :, n]
    # R = e^g ∘ Q Mᵀ + Σ_s S D u_s.
    scores = c.decays.visible((c.q @ c.k.mT).tril_())
    out = entry * (c.q @ before.mT) + c.decays.read(scores, writes)
    return joined(out, q.shape[2]), memory.contiguous(), before


def _backward(
    grad_out: Tensor,
    grad_after: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    segment_ids: Tensor | None,
    before: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    c, length = _cut(q, k, v, log_decay, beta, segment_ids), q.shape[2]
    grad, entry, last = in_chunks(grad_out, c.q.shape[3]), c.decays.entry, c.decays.last
    writes = weighed(c.beta, c.v)
    entered = entry * grad
    grad_memories, grad_memory = _memory_gradients(entered.mT @ c.q, entry, grad_after)
    # What grad M brings to the writes in the memory after, and the e^g of what was read of the memory before.
    grad_writes = last * (c.k @ grad_memories.mT)
    since, until = entered * (c.q @ before.mT), grad_writes * writes
    since[..., -1, :] += entry[..., -1, :] * (grad_memories * before).sum(-1)
    # Σ_p,s G_p · (S D u_s): read by G, written by U, as S stands for the gradient of ⟨G, U⟩_D.
    scores = (c.q @ c.k.mT).tril_()
    [grad_scores] = c.decays.scores((grad,), writes)
    _, written, rate = c.decays.gradients([scores], [grad_scores], [grad], writes, (since, until))
    grad_writes += written
    grad_q = grad_scores @ c.k + entered @ before
    grad_k = grad_scores.mT @ c.q + (last * writes) @ grad_memories
    grad_beta = q.new_empty(0) if beta is None else joined((c.v * grad_writes).sum(-1), length)
    grad_v = joined(weighed(c.beta, grad_writes), length)
    grads = joined(grad_q, length), shared(joined(grad_k, length), k), shared(grad_v, v), joined(rate, length)
    return *grads, grad_beta, grad_memory.contiguous()


def _memory_gradients(read: Tensor, entry: Tensor, grad_memory: Tensor) -> tuple[Tensor, Tensor]:
    """Of the memory after each chunk, and of the first memory, from what the reads of each chunk bring."""
    after = torch.empty_like(read)
    for n in reversed(range(read.shape[2])):
        after[:, :, n] = grad_memory
        grad_memory = entry[:, :, n, -1, :, None] * grad_memory + read[:, :, n]
    return after, grad_memory


def _shapes(q, k, v, log_decay, beta, memory, segment_ids) -> tuple[Tensor, Tensor, Tensor]:
    chunks = -(-q.shape[2] // chunk_length(q.shape[2], True))
    out, before = q.new_empty(*q.shape[:3], v.shape[3]), memory.new_empty(*q.shape[:2], chunks, *memory.shape[2:])
    return out, memory.new_empty(memory.shape), before


_chunked = operator(
    "atma::recurrence_by_value", _forward, _backward, _shapes, ("out", "after", "before"), {"memory": "grad_after"}
)

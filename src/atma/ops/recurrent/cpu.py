"""The linear recurrence in chunks (mixers.md, section 3.2), with its gradient by hand, and in one step for decoding.

In a chunk of C tokens ⟨x_p, y_s⟩_D is the product of x and y after what decays between s and p (decays.py). With
A = β ∘ strictly-lower ⟨k, k⟩_D and T = (I + A)⁻¹ the writes are U = T β (V − (K ∘ e^g) Mᵀ) by the rule `delta`, and β V
by the rule `add`. Only the memory between chunks is sequential, and of memories only the one before each chunk is kept
for the gradient.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from atma.ops.backend import recording
from atma.ops.operator import operator
from atma.ops.recurrent.decays import (
    Channels,
    Whole,
    chunk_length,
    for_each_head,
    in_chunks,
    joined,
    shared,
    total,
    weighed,
)
from atma.ops.recurrent.poison import kept_apart
from atma.ops.recurrent.value_axis import by_value


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    memory: Tensor,
    segment_ids: Tensor | None,
    rule: str,
) -> tuple[Tensor, Tensor]:
    """Arguments and results of the reference, in chunks; a single token without gradient takes the plain step."""
    if q.shape[2] == 1 and not recording():
        return _step(q, k, v, log_decay, beta, memory, rule)
    out, after, _, _ = _chunked(q, k, v, log_decay, beta, memory, segment_ids, rule)
    return out, after


def _step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, memory: Tensor, rule: str
) -> tuple[Tensor, Tensor]:
    k, v = for_each_head(k, q), for_each_head(v, q)
    # M ← M diag(a); M ← M + β w kᵀ; out = M q.
    if log_decay is not None:
        memory = memory * (log_decay if log_decay.ndim == 4 else log_decay.unsqueeze(-1)).exp()
    write = v - k @ memory.mT if rule == "delta" else v
    memory = memory + weighed(None if beta is None else beta.unsqueeze(-1), write).mT @ k
    return q @ memory.mT, memory


class _Chunks(NamedTuple):
    """The call cut into N chunks, and the decays within them."""

    q: Tensor  # (B, H, N, C, K), and k and v likewise
    k: Tensor
    v: Tensor
    beta: Tensor | None  # (B, H, N, C, 1)
    decays: Whole | Channels
    delta: bool


def _cut(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    segment_ids: Tensor | None,
    rule: str,
) -> _Chunks:
    channels = log_decay is not None and log_decay.ndim == 4
    chunk = chunk_length(q.shape[2], channels)
    rates = q.new_zeros(q.shape[0], 1, q.shape[2]) if log_decay is None else log_decay
    decays = (Channels if channels else Whole).of(rates, chunk, segment_ids)
    q, k, v = (in_chunks(x, chunk) for x in (q, for_each_head(k, q), for_each_head(v, q)))
    beta = None if beta is None else in_chunks(beta, chunk).unsqueeze(-1)
    return _Chunks(q, k, v, beta, decays, rule == "delta")


def _scores(c: _Chunks) -> list[Tensor]:
    """⟨q, k⟩_D, and for the rule delta ⟨k, k⟩_D."""
    return c.decays.scores((c.q, c.k) if c.delta else (c.q,), c.k)


def _solve(c: _Chunks, products: Tensor) -> Tensor:
    """T = (I + A)⁻¹, (B, H, N, C, C) unit lower triangular."""
    # A = β ∘ ⟨k, k⟩_D; the solver reads it strictly below the diagonal and takes ones on it.
    A = weighed(c.beta, products)
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return torch.linalg.solve_triangular(A, identity.expand_as(A), upper=False, unitriangular=True).contiguous()


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    memory: Tensor,
    segment_ids: Tensor | None,
    rule: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, memory after, memory before each chunk (B, H, N, V, K), and T (empty for the rule add)."""
    run = partial(_run, rule=rule)
    out, after, before, inverse = kept_apart(run, q, k, v, log_decay, beta, memory, segment_ids)
    return out, after, before, inverse


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    memory: Tensor,
    segment_ids: Tensor | None,
    rule: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c = _cut(q, k, v, log_decay, beta, segment_ids, rule)
    scores, *products = _scores(c)
    keys, entry = c.decays.last * c.k, c.decays.entry
    before = memory.new_empty(*c.k.shape[:3], *memory.shape[2:])
    if c.delta:
        inverse = _solve(c, products[0])
        # U = T β V − (T β (K ∘ e^g)) Mᵀ: both factors for all chunks at once, as neither knows the memory.
        writes, removed = inverse @ weighed(c.beta, c.v), inverse @ weighed(c.beta, entry * c.k)
    else:
        inverse, writes, removed = q.new_empty(0), weighed(c.beta, c.v), None
    for n in range(c.k.shape[2]):
        before[:, :, n] = memory
        if removed is not None:
            writes[:, :, n] -= removed[:, :, n] @ memory.mT
        # M ← M diag(e^{g_C}) + Σ_s u_s (k_s ∘ e^{g_C − g_s})ᵀ: the only step that waits for the chunk before.
        memory = entry[:, :, n, -1:] * memory + writes[:, :, n].mT @ keys[:, :, n]
    # R = (Q ∘ e^g) Mᵀ + ⟨q, k⟩_D U.
    out = (entry * c.q) @ before.mT + scores @ writes
    return joined(out, q.shape[2]), memory.contiguous(), before, inverse


def _memory_gradients(
    c: _Chunks, grad: Tensor, grad_memory: Tensor, scores: Tensor, removed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The sequential part: gradients of each chunk's writes, of the memory after it, and of the first memory."""
    keys, entry = c.decays.last * c.k, c.decays.entry
    # grad U from the chunk's own reads, and what grad M gains by them, for all chunks at once …
    grad_writes = scores.mT @ grad
    read = grad.mT @ (entry * c.q)
    after = torch.empty_like(read)
    for n in reversed(range(c.k.shape[2])):
        after[:, :, n] = grad_memory
        # … then, chunk after chunk from the last: U lives on in M, and M went into U by the errors.
        grad_writes[:, :, n] += keys[:, :, n] @ grad_memory.mT
        grad_memory = entry[:, :, n, -1:] * grad_memory + read[:, :, n]
        if removed is not None:
            grad_memory = grad_memory - grad_writes[:, :, n].mT @ removed[:, :, n]
    return grad_writes, after, grad_memory


def _backward(
    grad_out: Tensor,
    grad_after: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    segment_ids: Tensor | None,
    rule: str,
    before: Tensor,
    inverse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    c, length = _cut(q, k, v, log_decay, beta, segment_ids, rule), q.shape[2]
    grad, entry, last = in_chunks(grad_out, c.q.shape[3]), c.decays.entry, c.decays.last
    scores, errors, writes, removed = _again(c, before, inverse)
    grad_writes, grad_memories, grad_memory = _memory_gradients(c, grad, grad_after, scores[0], removed)
    # Tᵀ grad U is the gradient of β ∘ errors, as U = T (β ∘ errors).
    grad_writes = inverse.mT @ grad_writes if c.delta else grad_writes
    grad_v, grad_beta = weighed(c.beta, grad_writes), (grad_writes * errors).sum(-1)
    # What M e^g brings to the queries, and grad Mᵀ U to the keys of the memory after.
    grad_q, grad_k = entry * (grad @ before), last * (writes @ grad_memories)
    since, until = c.q * grad_q, c.k * grad_k
    grads, readers = [grad @ writes.mT], [c.q]
    if c.delta:
        # T = (I + A)⁻¹: −Tᵀ grad U Uᵀ is the gradient of A = β ∘ products. The errors took K ∘ e^g from the memory.
        grad_A = (grad_writes @ writes.mT).neg_().tril_(-1)
        grad_beta += (grad_A * scores[1]).sum(-1)
        taken = entry * (grad_v @ before)
        grad_k, since = grad_k - taken, since - c.k * taken
        grads, readers = [*grads, weighed(c.beta, grad_A)], [c.q, c.k]
    # Of log e^{g_C}, by the memory that decays over the chunk.
    since[..., -1, :] += entry[..., -1, :] * (grad_memories * before).sum(-2)
    ends = None if log_decay is None else (since, until)
    read, written, rate = c.decays.gradients(grads, scores, readers, c.k, ends)
    grad_q += read[0]
    grad_k = total((grad_k, written, *read[1:]))
    grad_decay = q.new_empty(0) if log_decay is None else joined(rate, length).view(log_decay.shape)
    grad_beta = q.new_empty(0) if beta is None else joined(grad_beta, length)
    grads_of = joined(grad_q, length), shared(joined(grad_k, length), k), shared(joined(grad_v, length), v)
    return *grads_of, grad_decay, grad_beta, grad_memory.contiguous()


def _again(c: _Chunks, before: Tensor, inverse: Tensor) -> tuple[list[Tensor], Tensor, Tensor, Tensor | None]:
    """Forward again, from the memory before each chunk and T: scores, errors, writes, and what M removes of them."""
    scores = _scores(c)
    if not c.delta:
        return scores, c.v, weighed(c.beta, c.v), None
    # Errors V − (K ∘ e^g) Mᵀ, writes U = T (β ∘ errors).
    entered = c.decays.entry * c.k
    errors = c.v - entered @ before.mT
    return scores, errors, inverse @ weighed(c.beta, errors), inverse @ weighed(c.beta, entered)


def _shapes(q, k, v, log_decay, beta, memory, segment_ids, rule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chunk = chunk_length(q.shape[2], log_decay is not None and log_decay.ndim == 4)
    shape = (*q.shape[:2], -(-q.shape[2] // chunk))
    inverse = q.new_empty(*shape, chunk, chunk) if rule == "delta" else q.new_empty(0)
    out, before = q.new_empty(*q.shape[:3], v.shape[3]), memory.new_empty(*shape, *memory.shape[2:])
    return out, memory.new_empty(memory.shape), before, inverse


_chunked = operator(
    "atma::recurrence", _forward, _backward, _shapes, ("out", "after", "before", "inverse"), {"memory": "grad_after"}
)

__all__ = ["by_value", "recurrence"]

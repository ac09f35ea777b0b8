"""The gated delta rule in chunks (maths.md, section 5), with its gradient by hand, and in one step for decoding.

Within a chunk of C tokens every product of decays is `D[p, s] = γ_{s+1} … γ_p`, the exponential of a sum that starts at
s itself, so that nothing of an earlier document enters, not even by rounding. With A = β ∘ strictly-lower(D ∘ K Kᵀ) and
T = (I + A)⁻¹ the writes are U = T β (V − g ∘ K Mᵀ). Only the memory between chunks is sequential.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from atma.ops.backend import recording
from atma.ops.operator import operator
from atma.ops.recurrent.poison import kept_apart
from atma.ops.segments import begins

CHUNK = 64


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    memory: Tensor,
    segment_ids: Tensor | None,
    rule: str,
) -> tuple[Tensor, Tensor]:
    """Arguments and results of the reference, in chunks; a single token without gradient takes the plain step."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    if q.shape[2] == 1 and not recording():
        return _step(q, k, v, log_decay, beta, memory)
    out, after, _, _ = _chunked(q, k, v, log_decay, beta, memory, segment_ids)
    return out, after


def _step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    # M ← γ M; M ← M + β (v − M k) kᵀ; out = M q.
    memory = memory * log_decay.exp().unsqueeze(-1)
    error = beta.unsqueeze(-1) * (v - k @ memory.mT)
    memory = memory + error.mT @ k
    return q @ memory.mT, memory


class _Chunks(NamedTuple):
    """The call cut into N chunks, and the decays within them. Padding writes nothing and does not decay."""

    q: Tensor  # (B, H, N, C, K), and k and v likewise
    k: Tensor
    v: Tensor
    beta: Tensor  # (B, H, N, C, 1)
    decay: Tensor  # (B, H, N, C, C): D, zero above the diagonal and across documents
    entry: Tensor  # (B, H, N, C, 1): g, decay since before the chunk; zero once a document has begun in it


def _cut(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, segment_ids: Tensor | None) -> _Chunks:
    length = q.shape[2]
    chunk = min(CHUNK, length)
    padding = -length % chunk
    q, k, v = (F.pad(x, (0, 0, 0, padding)).unflatten(2, (-1, chunk)) for x in (q, k, v))
    rates, beta = (F.pad(x, (0, padding)).unflatten(2, (-1, chunk)) for x in (log_decay, beta))
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    # Column s sums log γ from s + 1 on: not a difference of running sums, which cancel and cross documents.
    sums = rates.unsqueeze(-1).masked_fill(~lower.tril(-1), 0).cumsum(-2)
    decay, entry = sums.exp_().mul_(lower), rates.cumsum(-1).exp_()
    if segment_ids is not None:
        # Tokens of one document have seen equally many births; D is 0 between others, g after the first.
        births = F.pad(begins(segment_ids), (0, padding)).unflatten(1, (-1, chunk)).cumsum(-1)[:, None]
        decay.mul_(births.unsqueeze(-1) == births.unsqueeze(-2))
        entry.mul_(births == 0)
    return _Chunks(q, k, v, beta.unsqueeze(-1), decay, entry.unsqueeze(-1))


def _solve(c: _Chunks) -> Tensor:
    """T = (I + A)⁻¹, (B, H, N, C, C) unit lower triangular."""
    # A = β ∘ D ∘ K Kᵀ; the solver reads it strictly below the diagonal and takes ones on it.
    A = (c.k @ c.k.mT).mul_(c.decay).mul_(c.beta)
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return torch.linalg.solve_triangular(A, identity.expand_as(A), upper=False, unitriangular=True).contiguous()


def _forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, memory: Tensor, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, memory after, memory before each chunk (B, H, N, V, K), and T."""
    out, after, before, inverse = kept_apart(_run, q, k, v, log_decay, beta, memory, segment_ids)
    return out, after, before, inverse


def _run(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, memory: Tensor, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c = _cut(q, k, v, log_decay, beta, segment_ids)
    inverse = _solve(c)
    # U = T β V − (T β g K) Mᵀ: both factors for all chunks at once, as neither knows the memory.
    fresh, removed = inverse @ (c.beta * c.v), inverse @ (c.beta * c.entry * c.k)
    # g_C/g_s K: each key by what its write is still worth at the chunk's end.
    keys = c.decay[..., -1, :, None] * c.k
    before, writes = memory.new_empty(*c.k.shape[:3], *memory.shape[2:]), torch.empty_like(c.v)
    for n in range(c.k.shape[2]):
        before[:, :, n] = memory
        writes[:, :, n] = fresh[:, :, n] - removed[:, :, n] @ memory.mT
        # M ← g_C M + Σ_s (g_C/g_s) u_s k_sᵀ: the only step that waits for the chunk before.
        memory = c.entry[:, :, n, -1:] * memory + writes[:, :, n].mT @ keys[:, :, n]
    # R = g ∘ Q Mᵀ + (D ∘ Q Kᵀ) U.
    out = (c.entry * c.q) @ before.mT + ((c.q @ c.k.mT).mul_(c.decay)) @ writes
    return out.flatten(2, 3)[:, :, : q.shape[2]].contiguous(), memory.contiguous(), before, inverse


def _memory_gradients(c: _Chunks, grad: Tensor, grad_memory: Tensor, scores: Tensor, removed: Tensor) -> tuple:
    """The sequential part: gradients of each chunk's writes, of the memory after it, and of the first memory."""
    keys = c.decay[..., -1, :, None] * c.k
    # grad U from the chunk's own reads, and what grad M gains by them, for all chunks at once …
    grad_writes = scores.mT @ grad
    read = (c.entry * grad).mT @ c.q
    after = torch.empty_like(read)
    for n in reversed(range(c.k.shape[2])):
        after[:, :, n] = grad_memory
        # … then, chunk after chunk from the last: U lives on in M, and M went into U by the errors.
        grad_writes[:, :, n] += keys[:, :, n] @ grad_memory.mT
        through = c.entry[:, :, n, -1:] * grad_memory + read[:, :, n]
        grad_memory = through - grad_writes[:, :, n].mT @ removed[:, :, n]
    return grad_writes, after, grad_memory


def _backward(
    grad_out: Tensor,
    grad_after: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    segment_ids: Tensor | None,
    before: Tensor,
    inverse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    length, grad_out, grad_after = q.shape[2], grad_out.contiguous(), grad_after.contiguous()
    c = _cut(q, k, v, log_decay, beta, segment_ids)
    grad = F.pad(grad_out, (0, 0, 0, c.k.shape[2] * c.k.shape[3] - length)).unflatten(2, (-1, c.k.shape[3]))
    held = c.k @ before.mT
    # Forward again, from the memory before each chunk and T: errors V − g ∘ K Mᵀ, writes U = T β errors.
    errors = c.v - c.entry * held
    writes = inverse @ (c.beta * errors)
    products, last = c.k @ c.k.mT, c.decay[..., -1, :, None]
    overlaps = c.q @ c.k.mT
    scores = overlaps * c.decay
    removed = inverse @ (c.beta * c.entry * c.k)
    grad_writes, grad_memories, grad_memory = _memory_gradients(c, grad, grad_after, scores, removed)
    # U = T (β ∘ errors), T = (I + A)⁻¹: Tᵀ grad U is the gradient of β ∘ errors, −Tᵀ grad U Uᵀ that of A.
    grad_solved = inverse.mT @ grad_writes
    grad_error = c.beta * grad_solved
    grad_A = (grad_solved @ writes.mT).neg_().tril_(-1).mul_(c.decay)
    grad_scores = (grad @ writes.mT).mul_(c.decay)
    # What the gradient of the errors brings to K Mᵀ, and U grad M to the keys of the memory after.
    entered = c.entry * grad_error
    carried = writes @ grad_memories
    mixed = c.beta * grad_A
    # Each of q and k by every product it is in; K is on both sides of K Kᵀ.
    grad_q = grad_scores @ c.k + (c.entry * grad) @ before
    grad_k = grad_scores.mT @ c.q + last * carried - entered @ before + mixed @ c.k + mixed.mT @ c.k
    grad_beta = (grad_solved * errors).sum(-1) + (grad_A * products).sum(-1)
    # Of log D[p, s], of log g_p, of log g_C/g_s, and of log g_C by the memory that decays over the chunk.
    within = grad_scores * overlaps + mixed * products
    since = ((c.entry * grad * (c.q @ before.mT)).sum(-1)) - (entered * held).sum(-1)
    to_last = (last * c.k * carried).sum(-1)
    across = c.entry[..., -1, 0] * (grad_memories * before).sum((-1, -2))
    grad_rate = _rate_gradient(within, since, to_last, across)

    def joined(x: Tensor) -> Tensor:
        return x.flatten(2, 3)[:, :, :length].contiguous()

    grads = joined(grad_q), joined(grad_k), joined(grad_error), joined(grad_rate), joined(grad_beta)
    return *grads, grad_memory.contiguous()


def _rate_gradient(within: Tensor, since: Tensor, to_last: Tensor, across: Tensor) -> Tensor:
    """Gradient of each log decay: the sum over every product of decays with it. Sums stay inside a document."""
    within = within.clone()
    within[..., -1, :] += to_last
    since = since.clone()
    since[..., -1] += across
    # log γ_i is in D[p, s] for s < i ≤ p, and in g_p for p ≥ i: sums from the end.
    spanning = within.flip(-2).cumsum(-2).flip(-2).tril(-1).sum(-1)
    return spanning + since.flip(-1).cumsum(-1).flip(-1)


def _shapes(q, k, v, log_decay, beta, memory, segment_ids) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chunk = min(CHUNK, q.shape[2])
    shape = (*q.shape[:2], -(-q.shape[2] // chunk))
    out, after = v.new_empty(v.shape), memory.new_empty(memory.shape)
    return out, after, memory.new_empty(*shape, *memory.shape[2:]), q.new_empty(*shape, chunk, chunk)


_chunked = operator(
    "atma::recurrence", _forward, _backward, _shapes, ("out", "after", "before", "inverse"), {"memory": "grad_after"}
)

"""Streamed attention statistics in blocks: memory linear in T, blocks above the diagonal skipped, backward by hand.

The forward pass keeps, per query, a running maximum M and the sums L = Σ e^(a−M), Q = Σ e^(2(a−M)), S = Σ e^(a−M) v
over the logits a = q·k it has met; a new maximum rescales them. The backward pass computes each block's weights again
from M. M cancels in everything built from the sums, so it is a constant.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from atma.ops.backend import recording

QUERY_BLOCK = 256
BLOCK_SCORES = 1 << 18
"""Scores held at once per key/value head and row: 1 MiB in float32, the size of one core's second-level cache."""
HIDDEN = -1e30
"""A masked logit. Finite, so that a row whose first block is wholly masked gives no NaN; its weight is exactly zero
once the query's own key, which is always visible, has set the maximum."""


def statistics(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, segment_ids: Tensor | None, window: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """S (B, H, T, K), L, Q, M (B, H, T) in q's dtype, for q (B, H, T, K) already scaled; k, v (B, G, S, K)."""
    return (_operation if recording() else _forward)(q, k, v, start, segment_ids, window)


def _blocks(length: int, keys: int, group: int, start: Tensor | None, window: int | None) -> Iterator[tuple]:
    """(first query, last, first key, last, masked): every block that any row may see, keys ascending for each query."""
    low, high = (0, 0) if start is None else (int(start.min()), int(start.max()))
    for i in range(0, length, QUERY_BLOCK):
        i_end = min(i + QUERY_BLOCK, length)
        step = max(256, BLOCK_SCORES // (group * (i_end - i)))
        last = min(high + i_end, keys)
        first = 0 if window is None else max(0, low + i - window + 1)
        for j in range(first, last, step):
            j_end = min(j + step, last)
            beyond_diagonal = j_end - 1 > low + i
            behind_window = window is not None and high + i_end - 1 - j >= window
            yield i, i_end, j, j_end, beyond_diagonal or behind_window


def _mask(
    block: tuple, start: Tensor | None, segment_ids: Tensor | None, window: int | None, q: Tensor
) -> Tensor | None:
    """(B or 1, 1, queries, keys) bool, true where a score is hidden; None where the whole block is visible."""
    i, i_end, j, j_end, masked = block
    hidden = None
    if masked:
        position = torch.arange(i, i_end, device=q.device)[None]
        behind = (position if start is None else start[:, None] + position).unsqueeze(-1)
        behind = behind - torch.arange(j, j_end, device=q.device)
        hidden = behind < 0
        if window is not None:
            hidden |= behind >= window
    if segment_ids is not None:
        other = segment_ids[:, i:i_end, None] != segment_ids[:, None, j:j_end]
        hidden = other if hidden is None else hidden | other
    return None if hidden is None else hidden.unsqueeze(1)


def _flat(x: Tensor, heads: int) -> Tensor:
    """(B, H, T, …) → (B·G, H/G·T, …): the query heads that share a key/value head become rows of one product."""
    return x.reshape(x.shape[0] * heads, -1, *x.shape[3:])


def _scores(q: Tensor, k: Tensor, heads: int, hidden: Tensor | None) -> Tensor:
    """(B·G, rows, keys) logits of one block, hidden ones at HIDDEN."""
    a = torch.bmm(_flat(q, heads), k.reshape(-1, *k.shape[2:]).mT)
    if hidden is not None:
        grid = a.view(q.shape[0], q.shape[1], q.shape[2], -1)
        grid.masked_fill_(hidden, HIDDEN)
    return a


def _forward(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, segment_ids: Tensor | None, window: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    S, M = torch.zeros_like(q), torch.full_like(q[..., 0], HIDDEN)
    L, Q = torch.zeros_like(M), torch.zeros_like(M)
    for block in _blocks(q.shape[2], k.shape[2], group, start, window):
        i, i_end, j, j_end, _ = block
        at = (slice(None), slice(None), slice(i, i_end))
        keys, values = k[:, :, j:j_end].to(q.dtype), v[:, :, j:j_end].to(q.dtype)
        a = _scores(q[at], keys, heads, _mask(block, start, segment_ids, window, q))
        shape = M[at].shape
        before = _flat(M[at], heads)
        top = torch.maximum(before, a.amax(-1))
        p = a.sub_(top.unsqueeze(-1)).exp_()
        alpha = (before - top).exp_().view(shape)
        S[at] = S[at] * alpha.unsqueeze(-1) + torch.bmm(p, values.reshape(-1, *values.shape[2:])).view(S[at].shape)
        L[at] = L[at] * alpha + p.sum(-1).view(shape)
        Q[at] = Q[at] * alpha.square() + torch.linalg.vector_norm(p, dim=-1).square().view(shape)
        M[at] = top.view(shape)
    return S, L, Q, M


def _backward(
    grad_S: Tensor,
    grad_L: Tensor,
    grad_Q: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    M: Tensor,
    start: Tensor | None,
    segment_ids: Tensor | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    grad_q = torch.zeros_like(q)
    grad_k, grad_v = (torch.zeros(x.shape, dtype=q.dtype, device=q.device) for x in (k, v))
    for block in _blocks(q.shape[2], k.shape[2], group, start, window):
        i, i_end, j, j_end, _ = block
        at, held = (slice(None), slice(None), slice(i, i_end)), (slice(None), slice(None), slice(j, j_end))
        keys, values = k[held].to(q.dtype), v[held].to(q.dtype)
        flat_keys, flat_values = keys.reshape(-1, *keys.shape[2:]), values.reshape(-1, *values.shape[2:])
        a = _scores(q[at], keys, heads, _mask(block, start, segment_ids, window, q))
        p = a.sub_(_flat(M[at], heads).unsqueeze(-1)).exp_()
        g_S, g_L, g_Q = (_flat(g[at], heads) for g in (grad_S, grad_L, grad_Q))
        grad_v[held] += torch.bmm(p.mT, g_S).view(keys.shape)
        da = torch.baddbmm(g_L.unsqueeze(-1), g_S, flat_values.mT)
        da.addcmul_(p, g_Q.unsqueeze(-1), value=2).mul_(p)
        grad_q[at] += torch.bmm(da, flat_keys).view(grad_q[at].shape)
        grad_k[held] += torch.bmm(da.mT, _flat(q[at], heads)).view(keys.shape)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


_operation = torch.library.custom_op("atma::attention_statistics", _forward, mutates_args=())
_gradient_operation = torch.library.custom_op("atma::attention_statistics_backward", _backward, mutates_args=())


@_operation.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, segment_ids: Tensor | None, window: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row = q.new_empty(q.shape[:-1])
    return torch.empty_like(q), row, torch.empty_like(row), torch.empty_like(row)


@_gradient_operation.register_fake
def _(grad_S, grad_L, grad_Q, q, k, v, M, start, segment_ids, window):
    return torch.empty_like(q), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    q, k, v, start, segment_ids, ctx.window = inputs
    ctx.save_for_backward(q, k, v, output[3], start, segment_ids)
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(True)


def _gradient(ctx, grad_S: Tensor, grad_L: Tensor, grad_Q: Tensor, _grad_M: Tensor):
    q, k, v, M, start, segment_ids = ctx.saved_tensors
    grads = _gradient_operation(grad_S, grad_L, grad_Q, q, k, v, M, start, segment_ids, ctx.window)
    return *grads, None, None, None


_operation.register_autograd(_gradient, setup_context=_save)

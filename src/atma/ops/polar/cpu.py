"""Streamed attention statistics in blocks: memory linear in T, blocks above the diagonal skipped, backward by hand.

The forward pass keeps, per query, a running maximum M and the sums L = Σ e^(a−M), Q = Σ e^(2(a−M)), S = Σ e^(a−M) v
over the logits a = q·k it has met; a new maximum rescales them. The backward pass computes each block's weights again
from M. M cancels in everything built from the sums, so it is a constant.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from atma.ops.polar.operator import statistics_operator
from atma.ops.polar.poison import kept_apart

QUERY_BLOCK = 256
BLOCK_SCORES = 1 << 18
"""Scores held at once per key/value head and row: 1 MiB in float32, the size of one core's second-level cache."""
HIDDEN = -1e30
"""A masked logit. Finite, so that a row whose first block is wholly masked gives no NaN; its weight is exactly zero
once the query's own key, which is always visible, has set the maximum."""


def statistics(
    q: Tensor, k: Tensor, v: Tensor, scale: Tensor, first: Tensor, last: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The reference's arguments and results."""
    return _operation(q, k, v, scale, first, last)


def _blocks(group: int, first: Tensor, last: Tensor) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Queries, keys and hidden scores of every block that any row may see, keys ascending for each query.

    Hidden scores are (B, 1, queries, keys) bool, or None where every query sees the whole block.
    """
    for i in range(0, first.shape[1], QUERY_BLOCK):
        rows = slice(i, min(i + QUERY_BLOCK, first.shape[1]))
        begins, ends = first[:, rows, None], last[:, rows, None]
        lowest, whole_from, whole_to, highest = (int(x) for x in (*begins.aminmax(), *ends.aminmax()))
        step = max(256, BLOCK_SCORES // (group * (rows.stop - i)))
        for j in range(lowest, highest, step):
            keys = slice(j, min(j + step, highest))
            if j >= whole_from and keys.stop <= whole_to:
                yield rows, keys, None
            else:
                s = torch.arange(j, keys.stop, device=first.device)
                yield rows, keys, ((s < begins) | (s >= ends)).unsqueeze(1)


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


@kept_apart
def _forward(
    q: Tensor, k: Tensor, v: Tensor, scale: Tensor, first: Tensor, last: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    S = torch.zeros(q.shape, dtype=scale.dtype, device=q.device)
    M = torch.full_like(S[..., 0], HIDDEN)
    L, Q = torch.zeros_like(M), torch.zeros_like(M)
    # Blocks of keys ascend for each query, so M only grows.
    for rows, columns, hidden in _blocks(group, first, last):
        keys, values = k[:, :, columns].to(S.dtype), v[:, :, columns].to(S.dtype)
        # a = t q·k/√K: q is scaled, not the scores, which are many times as many.
        a = _scores(q[:, :, rows] * scale[:, :, rows, None], keys, heads, hidden)
        shape = M[:, :, rows].shape
        before = _flat(M[:, :, rows], heads)
        # M_new, p = e^(a − M_new) and α = e^(M_old − M_new).
        top = torch.maximum(before, a.amax(-1))
        p = a.sub_(top.unsqueeze(-1)).exp_()
        alpha = (before - top).exp_().view(shape)
        read = torch.bmm(p, values.reshape(-1, *values.shape[2:]))
        # S and L shrink by α, Q by α²: its terms are squares.
        S[:, :, rows] = S[:, :, rows] * alpha.unsqueeze(-1) + read.view(*shape, -1)
        L[:, :, rows] = L[:, :, rows] * alpha + p.sum(-1).view(shape)
        Q[:, :, rows] = Q[:, :, rows] * alpha.square() + torch.linalg.vector_norm(p, dim=-1).square().view(shape)
        M[:, :, rows] = top.view(shape)
    return S, L, Q, M


def _backward(
    grad_S: Tensor,
    grad_L: Tensor,
    grad_Q: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    M: Tensor,
    first: Tensor,
    last: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    grad_q, grad_k, grad_v = (torch.zeros(x.shape, dtype=M.dtype, device=q.device) for x in (q, k, v))
    for rows, columns, hidden in _blocks(group, first, last):
        queries = q[:, :, rows] * scale[:, :, rows, None]
        keys, values = k[:, :, columns].to(M.dtype), v[:, :, columns].to(M.dtype)
        flat_keys, flat_values = keys.reshape(-1, *keys.shape[2:]), values.reshape(-1, *values.shape[2:])
        a = _scores(queries, keys, heads, hidden)
        # The block's weights again from the final M: nothing of size (T, S) was kept. Hidden ones are e^−1e30 = 0.
        p = a.sub_(_flat(M[:, :, rows], heads).unsqueeze(-1)).exp_()
        g_S, g_L, g_Q = (_flat(g[:, :, rows], heads) for g in (grad_S, grad_L, grad_Q))
        # S = Σ p v: grad v = pᵀ g_S.
        grad_v[:, :, columns] += torch.bmm(p.mT, g_S).view(keys.shape)
        # da = p (g_S·v + g_L + 2 p g_Q), as p = e^a, ∂L/∂p = 1 and ∂Q/∂p = 2p; M is a constant.
        da = torch.baddbmm(g_L.unsqueeze(-1), g_S, flat_values.mT)
        da.addcmul_(p, g_Q.unsqueeze(-1), value=2).mul_(p)
        # grad q of the scaled query; its scale is taken in at the end.
        grad_q[:, :, rows] += torch.bmm(da, flat_keys).view(queries.shape)
        grad_k[:, :, columns] += torch.bmm(da.mT, _flat(queries, heads)).view(keys.shape)
    # a = scale · q·k: the gradient along q for the scale, times the scale for q.
    grad_scale = (grad_q * q).sum(-1)
    return (grad_q * scale.unsqueeze(-1)).to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_scale


_operation = statistics_operator("atma::attention_statistics", _forward, _backward)

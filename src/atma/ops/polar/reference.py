"""The streamed statistics from a materialised (T, S) score matrix: the oracle, differentiable by autograd."""

import torch
from torch import Tensor

from atma.ops.polar.poison import kept_apart


@kept_apart
def statistics(
    q: Tensor, k: Tensor, v: Tensor, scale: Tensor, first: Tensor, last: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """S (B, H, T, K), L, Q, M (B, H, T) over logits a = scale q·k of the visible keys; M, the largest, is constant."""
    group, work = q.shape[1] // k.shape[1], torch.promote_types(q.dtype, torch.float32)
    q, keys, values = q.to(work), *(x.to(work).repeat_interleave(group, 1) for x in (k, v))
    s = torch.arange(k.shape[2], device=q.device)
    seen = (s >= first.unsqueeze(-1)) & (s < last.unsqueeze(-1))
    a = (torch.einsum("bhtk,bhsk->bhts", q, keys) * scale.unsqueeze(-1)).masked_fill(~seen[:, None], -torch.inf)
    M = a.amax(-1).detach()
    p = (a - M.unsqueeze(-1)).exp()
    return torch.einsum("bhts,bhsk->bhtk", p, values), p.sum(-1), p.square().sum(-1), M

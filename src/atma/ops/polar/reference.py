"""The streamed statistics from a materialised (T, S) score matrix: the oracle, differentiable by autograd."""

import torch
from torch import Tensor


def statistics(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, segment_ids: Tensor | None, window: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """S (B, H, T, K), L, Q, M (B, H, T) over logits a = q·k of the visible keys; M, the largest, is a constant."""
    group = q.shape[1] // k.shape[1]
    keys, values = k.to(q.dtype).repeat_interleave(group, 1), v.to(q.dtype).repeat_interleave(group, 1)
    seen = visible(q, k, start, segment_ids, window)[:, None]
    a = torch.einsum("bhtk,bhsk->bhts", q, keys).masked_fill(~seen, -torch.inf)
    M = a.amax(-1).detach()
    p = (a - M.unsqueeze(-1)).exp()
    return torch.einsum("bhts,bhsk->bhtk", p, values), p.sum(-1), p.square().sum(-1), M


def visible(q: Tensor, k: Tensor, start: Tensor | None, segment_ids: Tensor | None, window: int | None) -> Tensor:
    """(B or 1, T, S) bool: which keys each query sees."""
    position = torch.arange(q.shape[2], device=q.device)
    position = position[None] if start is None else start[:, None] + position
    behind = position[:, :, None] - torch.arange(k.shape[2], device=q.device)
    seen = behind >= 0
    if window is not None:
        seen = seen & (behind < window)
    if segment_ids is not None:
        seen = seen & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return seen

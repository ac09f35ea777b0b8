"""The linear recurrence token by token: the oracle, differentiable by autograd."""

import torch
from torch import Tensor


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
    """Arguments of the public function in one dtype throughout, decays on the key axis."""
    # M diag(a): a number for each head, or for each of its key channels.
    rows = None if log_decay is None else log_decay.exp().unsqueeze(-2 if log_decay.ndim == 4 else -1)
    if rows is not None and rows.ndim == 4:
        rows = rows.unsqueeze(-1)
    return _in_turn((q, k, v), rows, beta, memory, segment_ids, rule)


def by_value(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    memory: Tensor,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The rule `add` with decays (B, H, T, V) on the value axis."""
    return _in_turn((q, k, v), log_decay.exp().unsqueeze(-1), beta, memory, segment_ids, "add")


def _in_turn(
    read: tuple[Tensor, Tensor, Tensor],
    decay: Tensor | None,
    beta: Tensor | None,
    memory: Tensor,
    segment_ids: Tensor | None,
    rule: str,
) -> tuple[Tensor, Tensor]:
    """decay (B, H, T, V or 1, K or 1)."""
    q = read[0]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in read[1:])
    reads = []
    for t in range(q.shape[2]):
        if segment_ids is not None and t > 0:
            memory = torch.where((segment_ids[:, t] == segment_ids[:, t - 1])[:, None, None, None], memory, 0.0)
        if decay is not None:
            memory = memory * decay[:, :, t]
        write = v[:, :, t]
        if rule == "delta":
            write = write - torch.einsum("bhvk,bhk->bhv", memory, k[:, :, t])
        if beta is not None:
            write = beta[:, :, t, None] * write
        memory = memory + torch.einsum("bhv,bhk->bhvk", write, k[:, :, t])
        reads.append(torch.einsum("bhvk,bhk->bhv", memory, q[:, :, t]))
    return torch.stack(reads, 2), memory

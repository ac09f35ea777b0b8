"""The gated delta rule token by token: the oracle, differentiable by autograd."""

import torch
from torch import Tensor


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, memory: Tensor, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Arguments of `gated_delta` in one dtype throughout."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    reads = []
    for t in range(q.shape[2]):
        if segment_ids is not None and t > 0:
            memory = torch.where((segment_ids[:, t] == segment_ids[:, t - 1])[:, None, None, None], memory, 0.0)
        memory = memory * log_decay[:, :, t, None, None].exp()
        error = v[:, :, t] - torch.einsum("bhvk,bhk->bhv", memory, k[:, :, t])
        memory = memory + torch.einsum("bhv,bhk->bhvk", beta[:, :, t, None] * error, k[:, :, t])
        reads.append(torch.einsum("bhvk,bhk->bhv", memory, q[:, :, t]))
    return torch.stack(reads, 2), memory

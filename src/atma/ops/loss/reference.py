"""The loss from all logits at once: the oracle, differentiable by autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor

from atma.ops.loss import NOT_SCORED


def losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cap: float) -> Tensor:
    """(N,) nats for hidden (N, D)."""
    work = torch.promote_types(hidden.dtype, torch.float32)
    z = F.linear(hidden.to(work), weight.to(work), None if bias is None else bias.to(work))
    y = cap * z / (z * z + cap * cap).sqrt() if cap else z
    return F.cross_entropy(y, targets, reduction="none", ignore_index=NOT_SCORED)

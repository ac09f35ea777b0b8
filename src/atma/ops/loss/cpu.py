"""The loss in blocks of tokens: no (N, V) tensor in either direction; the backward pass computes the logits again."""

import torch
import torch.nn.functional as F
from torch import Tensor

from atma.ops.loss import asked
from atma.ops.loss.operator import loss_operator, of_bias

BLOCK_LOGITS = 1 << 21
"""Logits held at once: 8 MiB in float32."""


def losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cap: float) -> Tensor:
    """(N,) nats for hidden (N, D)."""
    return _operation(hidden, weight, bias, targets, cap)[0]


def _blocks(hidden: Tensor, weight: Tensor):
    rows = max(16, BLOCK_LOGITS // weight.shape[0])
    return (slice(i, min(i + rows, hidden.shape[0])) for i in range(0, hidden.shape[0], rows))


def _raw(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(n, V) logits before the cap, at least float32."""
    z = F.linear(hidden, weight).to(torch.promote_types(hidden.dtype, torch.float32))
    return z if bias is None else z.add_(bias.to(z.dtype))


def _slope(z: Tensor, cap: float) -> Tensor:
    return z.square().add_(cap * cap).rsqrt_().mul_(cap) if cap else torch.ones_like(z)


@asked.forward
def _forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Losses and log partition sums, both (N,)."""
    work = torch.promote_types(hidden.dtype, torch.float32)
    loss, partition = hidden.new_empty(targets.shape, dtype=work), hidden.new_empty(targets.shape, dtype=work)
    for at in _blocks(hidden, weight):
        z = _raw(hidden[at], weight, bias)
        # y = cap z / √(z² + cap²), in z's place.
        y = z.mul_(_slope(z, cap))
        partition[at] = y.logsumexp(-1)
        # log Σ exp y − y_target.
        loss[at] = partition[at] - y.gather(1, targets[at].unsqueeze(1)).squeeze(1)
    return loss, partition


@asked.backward
def _backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, partition: Tensor, cap: float
) -> tuple[Tensor, Tensor, Tensor]:
    work = partition.dtype
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros(weight.shape, dtype=work, device=weight.device)
    grad_bias = torch.zeros(weight.shape[:1], dtype=work, device=weight.device)
    for at in _blocks(hidden, weight):
        z = _raw(hidden[at], weight, bias)
        # slope = y / z, and dy/dz = slope³.
        slope = _slope(z, cap)
        # softmax(y), from logits computed again and the sums that were kept.
        p = (z.mul_(slope) - partition[at].unsqueeze(1)).exp_()
        # ∂loss/∂y = softmax(y) − [word is the target]; an index tensor in place of a (n, V) table of them.
        p.scatter_add_(1, targets[at].unsqueeze(1), p.new_full((1, 1), -1.0).expand(p.shape[0], 1))
        # ∂loss/∂z, rounded to the compute type before its two products and not before its sum.
        p.mul_(grad[at].unsqueeze(1)).mul_(slope.pow_(3))
        low = p.to(hidden.dtype)
        grad_hidden[at] = low @ weight
        grad_weight += (low.mT @ hidden[at]).to(work)
        grad_bias += p.sum(0)
    return grad_hidden, grad_weight.to(weight.dtype), of_bias(grad_bias, bias, hidden)


_operation = loss_operator("atma::softcap_loss", _forward, _backward)

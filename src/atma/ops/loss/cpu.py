"""The loss in blocks of tokens: no (N, V) tensor in either direction; the backward pass computes the logits again."""

import torch
import torch.nn.functional as F
from torch import Tensor

from atma.ops.backend import recording
from atma.ops.loss import asked

BLOCK_LOGITS = 1 << 21
"""Logits held at once: 8 MiB in float32."""


def losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cap: float) -> Tensor:
    """(N,) nats for hidden (N, D)."""
    return (_operation if recording() else _forward)(hidden, weight, bias, targets, cap)[0]


def _blocks(hidden: Tensor, weight: Tensor):
    rows = max(16, BLOCK_LOGITS // weight.shape[0])
    return (slice(i, min(i + rows, hidden.shape[0])) for i in range(0, hidden.shape[0], rows))


def _raw(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(n, V) logits before the cap, at least float32."""
    z = F.linear(hidden, weight).to(torch.promote_types(hidden.dtype, torch.float32))
    return z if bias is None else z.add_(bias.to(z.dtype))


@asked.forward
def _forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Losses and log partition sums, both (N,)."""
    work = torch.promote_types(hidden.dtype, torch.float32)
    loss, partition = hidden.new_empty(targets.shape, dtype=work), hidden.new_empty(targets.shape, dtype=work)
    for at in _blocks(hidden, weight):
        z = _raw(hidden[at], weight, bias)
        y = z.mul_((z.square().add_(cap * cap)).rsqrt_().mul_(cap))
        partition[at] = y.logsumexp(-1)
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
        slope = z.square().add_(cap * cap).rsqrt_().mul_(cap)
        p = (z.mul_(slope) - partition[at].unsqueeze(1)).exp_()
        p.scatter_add_(1, targets[at].unsqueeze(1), p.new_full((1, 1), -1.0).expand(p.shape[0], 1))
        p.mul_(grad[at].unsqueeze(1)).mul_(slope.pow_(3))
        low = p.to(hidden.dtype)
        grad_hidden[at] = low @ weight
        grad_weight += (low.mT @ hidden[at]).to(work)
        grad_bias += p.sum(0)
    return grad_hidden, grad_weight.to(weight.dtype), grad_bias


_operation = torch.library.custom_op("atma::softcap_loss", _forward, mutates_args=())
_gradient_operation = torch.library.custom_op("atma::softcap_loss_backward", _backward, mutates_args=())


@_operation.register_fake
def _(hidden, weight, bias, targets, cap):
    loss = hidden.new_empty(targets.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
    return loss, torch.empty_like(loss)


@_gradient_operation.register_fake
def _(grad, hidden, weight, bias, targets, partition, cap):
    return torch.empty_like(hidden), torch.empty_like(weight), partition.new_empty(weight.shape[:1])


def _save(ctx, inputs, output) -> None:
    hidden, weight, bias, targets, ctx.cap = inputs
    ctx.save_for_backward(hidden, weight, bias, targets, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx, grad, _grad_partition):
    hidden, weight, bias, targets, partition = ctx.saved_tensors
    grads = _gradient_operation(grad.contiguous(), hidden, weight, bias, targets, partition, ctx.cap)
    return grads[0], grads[1], None if bias is None else grads[2].to(bias.dtype), None, None


_operation.register_autograd(_gradient, setup_context=_save)

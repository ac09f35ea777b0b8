"""The loss as a custom operator: what its backends have in common."""

from collections.abc import Callable

import torch
from torch import Tensor

from atma.ops.operator import operator


def loss_operator(name: str, forward: Callable, backward: Callable) -> Callable[..., tuple[Tensor, Tensor]]:
    """forward(hidden, weight, bias, targets, cap) → losses and log partition sums (N,), the second a constant.

    backward(grad, hidden, weight, bias, targets, partition, cap) → gradients of hidden, weight and bias.
    """
    return operator(name, forward, backward, _shapes, ("loss", "partition"))


def of_bias(grad: Tensor, bias: Tensor | None, hidden: Tensor) -> Tensor:
    """A gradient (V,) as that of the bias is handed back: in its dtype, or empty where there is none."""
    return hidden.new_empty(0) if bias is None else grad.to(bias.dtype)


def _shapes(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    loss = hidden.new_empty(targets.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
    return loss, torch.empty_like(loss)

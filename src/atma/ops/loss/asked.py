"""The loss of the rows that have a target: where most are −100, most of the work is left out."""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

Forward = Callable[[Tensor, Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]


def forward(of_all: Forward) -> Forward:
    """Losses and log partition sums (N,), both 0 where the target is −100; `of_all` sees the other rows."""

    @wraps(of_all)
    def of_asked(hidden, weight, bias, targets, cap):
        rows = _asked(targets)
        if rows is None:
            return of_all(hidden, weight, bias, targets, cap)
        loss, partition = of_all(hidden[rows], weight, bias, targets[rows], cap)
        zeros = loss.new_zeros(targets.shape)
        return zeros.index_copy(0, rows, loss), zeros.index_copy(0, rows, partition)

    return of_asked


def backward(of_all: Backward) -> Backward:
    """Gradients of hidden (N, D), zero where the target is −100, weight and bias."""

    @wraps(of_all)
    def of_asked(grad, hidden, weight, bias, targets, partition, cap):
        rows = _asked(targets)
        if rows is None:
            return of_all(grad, hidden, weight, bias, targets, partition, cap)
        given = grad[rows], hidden[rows], weight, bias, targets[rows], partition[rows], cap
        grad_hidden, grad_weight, grad_bias = of_all(*given)
        return torch.zeros_like(hidden).index_copy_(0, rows, grad_hidden), grad_weight, grad_bias

    return of_asked


def _asked(targets: Tensor) -> Tensor | None:
    """The rows that have a target; None if all have."""
    asked = targets >= 0
    return None if asked.all() else asked.nonzero()[:, 0]

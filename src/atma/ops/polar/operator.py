"""The statistics of attention as a custom operator: what its backends have in common."""

from collections.abc import Callable

import torch
from torch import Tensor

from atma.ops.operator import operator


def statistics_operator(
    name: str, forward: Callable, backward: Callable | None
) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """forward as `statistics_of` says, M a constant.

    backward(grad_S, grad_L, grad_Q, q, k, v, scale, M, first, last) → gradients of q, k, v and scale.
    """
    return operator(name, forward, backward, _shapes, ("S", "L", "Q", "M"))


def _shapes(
    q: Tensor, k: Tensor, v: Tensor, scale: Tensor, first: Tensor, last: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row = scale.new_empty(q.shape[:-1])
    return scale.new_empty(q.shape), row, torch.empty_like(row), torch.empty_like(row)

"""What the backends' custom operators share: shapes without data, and what is kept for the gradient."""

from collections.abc import Callable

import torch
from torch import Tensor


def operator(name: str, forward: Callable, backward: Callable) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """A `torch.library` operator of the statistics (see `statistics_of`) with its gradient by hand.

    backward(grad_S, grad_L, grad_Q, q, k, v, scale, M, first, last) → gradients of q, k, v and scale.
    """
    operation = torch.library.custom_op(name, forward, mutates_args=())
    gradient_operation = torch.library.custom_op(f"{name}_backward", backward, mutates_args=())

    @operation.register_fake
    def _(q, k, v, scale, first, last):
        row = scale.new_empty(q.shape[:-1])
        return scale.new_empty(q.shape), row, torch.empty_like(row), torch.empty_like(row)

    @gradient_operation.register_fake
    def _(grad_S, grad_L, grad_Q, q, k, v, scale, M, first, last):
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), torch.empty_like(M)

    def save(ctx, inputs, output) -> None:
        q, k, v, scale, first, last = inputs
        ctx.save_for_backward(q, k, v, scale, output[3], first, last)
        ctx.mark_non_differentiable(output[3])
        ctx.set_materialize_grads(True)

    def gradient(ctx, grad_S: Tensor, grad_L: Tensor, grad_Q: Tensor, _grad_M: Tensor):
        return *gradient_operation(grad_S, grad_L, grad_Q, *ctx.saved_tensors), None, None

    operation.register_autograd(gradient, setup_context=save)
    return operation

"""What goes from process to process in one pass, tensors, and back in the other, their gradients.

Whoever sends goes on at once; between two processes messages are taken in the order in which they were sent. A process
that sends a tensor always asks for its gradient, and one that takes a tensor always gives one: else what nobody took
would be taken for the next.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def answered(x: Tensor) -> Tensor:
    """x, through which gradients go even where nothing before it is trained: who is sent a state always gives some."""
    if x.requires_grad or not x.is_floating_point() or not torch.is_grad_enabled():
        return x
    return x.detach().requires_grad_()


class Receive(torch.autograd.Function):
    """Tensors like those given, from a process; their gradients go back to it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, peer: int, *like: Tensor) -> tuple[Tensor, ...]:
        ctx.peer = peer
        found = tuple(received_from(x, peer) for x in like)
        ctx.mark_non_differentiable(*(x for x in found if not x.is_floating_point()))
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        floats = [x for x in gradients if x is not None and x.is_floating_point()]
        for x in floats:
            send(x, ctx.peer)
        return (None,) * (2 + len(gradients))


class Joined(torch.autograd.Function):
    """y as it is, of which the tensors are a part with gradient zero: so that their sender is always answered."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *tensors: Tensor) -> Tensor:
        ctx.count = len(tensors)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, *(None,) * ctx.count


_on_their_way: list[tuple[Any, Tensor]] = []
"""What was sent and has perhaps not arrived: whoever sends goes on at once."""


def send(x: Tensor, peer: int) -> None:
    """Let a tensor go to a process, which takes what comes in its order."""
    _on_their_way[:] = [one for one in _on_their_way if not one[0].is_completed()]
    whole = x.contiguous()
    try:
        _on_their_way.append((dist.isend(whole, peer), whole))
    except RuntimeError as error:
        raise RuntimeError(f"process {peer}: {error}") from error


def received_from(like: Tensor, peer: int) -> Tensor:
    """What a process has sent, which is like this."""
    found = torch.empty_like(like, memory_format=torch.contiguous_format)
    try:
        dist.recv(found, peer)
    except RuntimeError as error:
        raise RuntimeError(f"process {peer}: {error}") from error
    return found


__all__ = ["Joined", "Receive", "answered", "received_from", "send"]

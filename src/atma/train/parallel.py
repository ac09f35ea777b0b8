"""Several processes sharing one batch (`torchrun`): who we are, and sums over all of us.

Gradients are summed in float32 and every process then makes the whole update, so the weights stay equal everywhere.
"""

import os
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks(NamedTuple):
    """This process's number and how many there are."""

    rank: int = 0
    world: int = 1


def join(device: torch.device) -> Ranks:
    """Join the group that RANK and WORLD_SIZE describe, if they do; alone otherwise."""
    if not dist.is_available():
        return Ranks()
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Ranks()


def sum_over(ranks: Ranks, value: Tensor) -> Tensor:
    """The sum of `value` over all processes."""
    if ranks.world > 1:
        dist.all_reduce(value)
    return value


def sum_gradients(ranks: Ranks, parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its sum over all processes, in one float32 message."""
    if ranks.world == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = sum_over(ranks, torch.cat([gradient.flatten().float() for gradient in gradients]))
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def any_of(ranks: Ranks, flag: bool) -> bool:
    """Whether the flag is set in any process: the same answer in all."""
    if ranks.world == 1:
        return flag
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if dist.get_backend() == "nccl" else None
    return bool(sum_over(ranks, torch.tensor(float(flag), device=device)).item())


def wait(ranks: Ranks) -> None:
    """Let every process arrive here before any goes on."""
    if ranks.world > 1:
        dist.barrier()

"""Several processes of one run (`torchrun`): who we are, and sums over all of us in one order.

Processes share the rows of a batch, and with `context` above 1 so many neighbours share each row
(atma.mixers.stretches). Sums are added in the order of the processes, so they are the same bits everywhere, and those
of one process that takes the same parts one after the other.
"""

import os
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks(NamedTuple):
    """This process's number, how many there are, and how many of them share each row."""

    rank: int = 0
    world: int = 1
    context: int = 1

    @property
    def replica(self) -> int:
        """Which of the groups that share rows this process is in."""
        return self.rank // self.context

    @property
    def replicas(self) -> int:
        """How many such groups there are: each has rows of its own."""
        return self.world // self.context

    @property
    def peers(self) -> range:
        """The processes of this one's group, in the order of their stretches."""
        return range(self.replica * self.context, (self.replica + 1) * self.context)


def join(device: torch.device, context: int = 1) -> Ranks:
    """Join the group that RANK and WORLD_SIZE describe, if they do; alone otherwise.

    ValueError: so many processes cannot be in groups of `context`.
    """
    if not dist.is_available():
        return _grouped(0, 1, context)
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return _grouped(*world, context)


def _grouped(rank: int, world: int, context: int) -> Ranks:
    if world % context:
        raise ValueError(
            f"'context' {context}: {world} process{'' if world == 1 else 'es'} cannot be in groups of {context}; start "
            f"a multiple: torchrun --nproc-per-node {context} -m atma train …"
        )
    return Ranks(rank, world, context)


def sum_over(ranks: Ranks, value: Tensor) -> Tensor:
    """The sum of a small `value` over all processes, in their order."""
    if ranks.world == 1:
        return value
    found = [torch.empty_like(value) for _ in range(ranks.world)]
    dist.all_gather(found, value.contiguous())
    total = found[0]
    for one in found[1:]:
        total = total + one
    return total


def any_of(ranks: Ranks, flag: bool) -> bool:
    """Whether the flag is set in any process: the same answer in all."""
    if ranks.world == 1:
        return flag
    return bool(sum_over(ranks, torch.tensor(float(flag), device=where())).item())


def where() -> torch.device:
    """Of what is sent: a GPU where that is how processes speak."""
    nccl = dist.get_backend() == "nccl"
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if nccl else torch.device("cpu")


def wait(ranks: Ranks) -> None:
    """Let every process arrive here before any goes on."""
    if ranks.world > 1:
        dist.barrier()

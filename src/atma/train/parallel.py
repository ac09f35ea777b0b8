"""Several processes of one run (`torchrun`): who we are, and sums over all of us in one order.

Processes share the rows of a batch, and with `context` above 1 so many neighbours share each row
(atma.mixers.stretches), with `shard` above 1 so many the weights (atma.train.shards). Sums are added in the order of
the processes, so they are the same bits everywhere, and those of one process that takes the same parts one after the
other.
"""

import datetime
import os
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks(NamedTuple):
    """This process's number, how many there are, how many of them share each row, and how many the weights."""

    rank: int = 0
    world: int = 1
    context: int = 1
    shard: int = 1
    offload: bool = False
    """Whether weights, gradients and optimiser state are in the processor's memory while they are not computed with."""

    @property
    def in_parts(self) -> bool:
        """Whether the blocks' weights are gathered while they compute (atma.train.shards)."""
        return self.shard > 1 or self.offload

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


def join(
    device: torch.device, context: int = 1, shard: int = 1, hang_seconds: float = 600, offload: bool = False
) -> Ranks:
    """Join the group that RANK and WORLD_SIZE describe, if they do; alone otherwise.

    hang_seconds: how long one waits for another. offload: as of `Ranks`; tensors of the processor's memory are then
    sent by gloo, and one process alone makes a group of its own. ValueError: they cannot be in groups of so many.
    """
    if not dist.is_available():
        if offload:
            raise ValueError("'offload': this PyTorch has no torch.distributed, which moves weights; leave it out")
        return _grouped(Ranks(0, 1, context, shard))
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not dist.is_initialized() and (several or offload):
        if device.type == "cuda" and not dist.is_nccl_available():
            raise ValueError(
                "this PyTorch has no NCCL, by which GPUs speak; install one that has, or take --device cpu"
            )
        try:
            _begin(_backend(device, offload), datetime.timedelta(seconds=hang_seconds), several)
        except (RuntimeError, ValueError) as error:
            place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
            rank, told = os.environ.get("RANK", "?"), (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"process {rank} does not meet the others at {place}: {told}; is the port free, and are all started?"
            ) from error
    world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return _grouped(Ranks(*world, context, shard, offload))


def _backend(device: torch.device, offload: bool) -> str:
    if device.type != "cuda":
        return "gloo"
    return "cpu:gloo,cuda:nccl" if offload else "nccl"


def _begin(backend: str, patience: datetime.timedelta, several: bool) -> None:
    """Find each other. Where torchrun keeps the addresses, those of an earlier start, before a failure, are there too:
    each start has a shelf of its own."""
    if not several:
        from torch.distributed import HashStore  # pyright: ignore (not in every build)

        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=patience)
        return
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend, timeout=patience)
        return
    from torch.distributed import PrefixStore, TCPStore  # pyright: ignore (not in every build)

    shared = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=patience)
    store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", shared)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)


def _grouped(ranks: Ranks) -> Ranks:
    world = ranks.world
    for key, count in (("context_ranks", ranks.context), ("shard_ranks", ranks.shard)):
        if world % count:
            raise ValueError(
                f"'{key}' {count}: {world} process{'' if world == 1 else 'es'} cannot be in groups of {count}; "
                f"start a multiple: torchrun --nproc-per-node {count} -m atma train …"
            )
    return ranks


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


def own_device(device: torch.device) -> torch.device:
    """Of this process: a GPU that is not said is that of its number on the machine."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def all_here(ranks: Ranks, seconds: float, group: Any = None) -> None:
    """Let every process arrive here before any goes on. RuntimeError names one that does not come in so many seconds,
    where processes speak by gloo; NCCL has a watch of its own. group: as of `lines_of_their_own`."""
    if ranks.world > 1 and dist.get_backend(group) == "gloo":
        dist.monitored_barrier(group, datetime.timedelta(seconds=seconds), wait_all_ranks=True)


def lines_of_their_own(seconds: float) -> Any:
    """A gloo group of all processes for a second thread, for two threads cannot speak in one. All of them call it.

    seconds: how long one waits for another.
    """
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=seconds))


def where(group: Any = None) -> torch.device:
    """Of what is sent: a GPU where that is how processes speak."""
    return own_device(torch.device("cuda" if "nccl" in dist.get_backend(group) else "cpu"))


def wait(ranks: Ranks) -> None:
    """Let every process arrive here before any goes on."""
    if ranks.world > 1:
        dist.barrier()

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


def join(device: torch.device, context: int = 1, shard: int = 1, hang_seconds: float = 600) -> Ranks:
    """Join the group that RANK and WORLD_SIZE describe, if they do; alone otherwise.

    hang_seconds: how long one waits for another. ValueError: they cannot be in groups of so many.
    """
    if not dist.is_available():
        return _grouped(0, 1, context, shard)
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if device.type == "cuda" and not dist.is_nccl_available():
            raise ValueError(
                "this PyTorch has no NCCL, by which GPUs speak; install one that has, or take --device cpu"
            )
        try:
            _begin("nccl" if device.type == "cuda" else "gloo", datetime.timedelta(seconds=hang_seconds))
        except (RuntimeError, ValueError) as error:
            place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
            rank, told = os.environ.get("RANK", "?"), (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"process {rank} does not meet the others at {place}: {told}; is the port free, and are all started?"
            ) from error
    world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return _grouped(*world, context, shard)


def _begin(backend: str, patience: datetime.timedelta) -> None:
    """Find each other. Where torchrun keeps the addresses, those of an earlier start, before a failure, are there too:
    each start has a shelf of its own."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend, timeout=patience)
        return
    from torch.distributed import PrefixStore, TCPStore  # pyright: ignore (not in every build)

    shared = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=patience)
    store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", shared)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)


def _grouped(rank: int, world: int, context: int, shard: int) -> Ranks:
    for key, count in (("context_ranks", context), ("shard_ranks", shard)):
        if world % count:
            raise ValueError(
                f"'{key}' {count}: {world} process{'' if world == 1 else 'es'} cannot be in groups of {count}; "
                f"start a multiple: torchrun --nproc-per-node {count} -m atma train …"
            )
    return Ranks(rank, world, context, shard)


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
    return own_device(torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu"))


def wait(ranks: Ranks) -> None:
    """Let every process arrive here before any goes on."""
    if ranks.world > 1:
        dist.barrier()

"""What processes that share weights send in a step, and hold.

    torchrun --nproc-per-node 2 benchmarks/shards.py --preset small --length 64
    torchrun --nproc-per-node 2 benchmarks/shards.py --preset small --length 64 --travel float32

One row a process, computed in bfloat16 on one thread, random tokens. Told of the first process in the second step:
weights it gathers and gradients it gives, memory when the forward pass ends, and the most in both passes. What is freed
goes back to the system here, unlike in a training, so that what is held is seen.
"""

import argparse
import gc
import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from atma.config import TrainConfig, preset
from atma.model import Model
from atma.train import step as steps
from atma.train.optim import Optimisers
from atma.train.parallel import Ranks, join
from atma.train.shards import shard
from atma.train.step import Stepper, generator


class Rows(NamedTuple):
    """A batch of one row a process."""

    tokens: Tensor
    targets: Tensor
    segment_ids: Tensor


class Watch:
    """The most that this process holds while it is looked at, MiB."""

    def __init__(self) -> None:
        self.most, self._ended = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.003):
            self.most = max(self.most, resident())


def resident() -> float:
    """What this process has in memory, MiB."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmRSS"))


def counted(name: str, size: Callable[..., Tensor], sent: dict[str, float]) -> None:
    """Count the MiB that a collective of torch.distributed takes from this process."""
    real = getattr(dist, name)

    def call(*given: Any, **named: Any) -> Any:
        x = size(*given, **named)
        sent[name] = sent.get(name, 0.0) + x.numel() * x.itemsize / 2**20
        return real(*given, **named)

    setattr(dist, name, call)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--travel", choices=("bfloat16", "float32"), default="bfloat16")
    given = parser.parse_args()
    torch.set_num_threads(1)
    steps.keep_freed_memory = lambda: False
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        raise SystemExit("start it by torchrun, in two processes or more")
    ranks = join(torch.device("cpu"), 1, world)
    told = measured(ranks, given)
    if ranks.rank == 0:
        print(f"{given.preset}, {world} processes, {given.length} tokens each, weights travel in {given.travel}")
        for what, value in told.items():
            print(f"{what:32} {value:9,.1f} MiB")
    dist.destroy_process_group()


def measured(ranks: Ranks, given: argparse.Namespace) -> dict[str, float]:
    """MiB by what they are."""
    config, length = preset(given.preset), given.length
    train = TrainConfig(length=length, batch_tokens=ranks.world * length, shard_ranks=ranks.world)
    model = Model(config, generator(1))
    optimisers = Optimisers(model, train, ranks)
    stepper = Stepper(model, optimisers, train, torch.bfloat16, ranks)
    shard(model, optimisers, ranks, torch.device("cpu"), 600, getattr(torch, given.travel))
    stepper.follow()
    sent: dict[str, float] = {}
    counted("all_gather_single", lambda output, one, *_, **__: one, sent)
    counted("reduce_scatter_single", lambda output, *_, **__: output, sent)
    forward: list[float] = []
    real = stepper._total
    stepper._total = lambda losses: (forward.append(resident()), real(losses))[1]
    draws = generator(2, ranks.rank)
    for step in range(2):
        ids = torch.randint(config.vocab_size, (1, length + 1), generator=draws)
        rows = Rows(ids[:, :-1], ids[:, 1:].clone(), torch.zeros(1, length, dtype=torch.int32))
        sent.clear()
        gc.collect()
        with Watch() as watch:
            stepper._backward(step, rows)
        for parameter in model.parameters():
            parameter.grad = None
    weights, gradients = (sent.get(name, 0.0) for name in ("all_gather_single", "reduce_scatter_single"))
    told = {"weights sent": weights, "gradients sent": gradients}
    return told | {"at the end of the forward pass": forward[-1], "most in both passes": watch.most}


if __name__ == "__main__":
    main()

"""Steps of a tiny model by so many processes, or by one with so many micro-batches.

python moving.py FOLDER CONTEXT SHARD DTYPE ACCUMULATION OFFLOAD [BACKEND]: of torch.compile, for compiled blocks
"""

import sys
from dataclasses import replace

import torch
from safetensors.torch import save_file
from tiny_run import LENGTH, Rows, rows, tiny_model, tiny_recipe

from atma.model import Model
from atma.train import compiled
from atma.train.optim import Optimisers
from atma.train.parallel import Ranks, join
from atma.train.shards import shard
from atma.train.step import Stepper, generator

ROWS = 12
"""Of a batch: they can be shared by 1, 2, 3 and 4."""


def moved(
    ranks: Ranks, accumulation: int = 1, steps: int = 3, dtype: torch.dtype = torch.float32, **changes: bool
) -> dict:
    """The weights after some steps, and the loss and the norm of each. dtype: bfloat16 computes in it."""
    compute, dtype = (dtype, torch.float32) if dtype == torch.bfloat16 else (torch.float32, dtype)
    shares = {"context_ranks": ranks.context, "shard_ranks": ranks.shard}
    train = replace(tiny_recipe().train, batch_tokens=ROWS * LENGTH, accumulation=accumulation, **shares, **changes)
    model = Model(tiny_model(), generator(1)).to(dtype)
    optimisers = Optimisers(model, train, ranks)
    stepper = Stepper(model, optimisers, train, compute, ranks)
    if ranks.in_parts:
        shard(model, optimisers, ranks, torch.device("cpu"), 60, compute)
        stepper.follow()
    told = []
    for step in range(steps):
        share = Rows(*(part.chunk(ranks.replicas)[ranks.replica] for part in rows(step, ROWS)))
        outcome = stepper(step, share, 1.0)
        told.append([outcome.loss, outcome.grad_norm])
    state = sum(x.numel() for x in stepper.optimisers.tensors().values())
    about = {"told": torch.tensor(told, dtype=torch.float64), "state": torch.tensor(state)}
    return {name: _whole(x) for name, x in model.state_dict().items()} | about


def _whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x.clone()


if __name__ == "__main__":
    folder, context, parts, dtype, accumulation, offload, *backend = sys.argv[1:]
    compiled.BACKEND = backend[0] if backend else ""
    torch.set_num_threads(1)
    ours = join(torch.device("cpu"), int(context), int(parts), offload=offload == "True")
    found = moved(ours, int(accumulation), dtype=getattr(torch, dtype), compile=bool(backend))
    save_file(found, f"{folder}/{ours.rank}.safetensors")
    torch.distributed.destroy_process_group()

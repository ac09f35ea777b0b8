"""A tiny run of processes that share the weights: sharded.py RUN SHARD STOP [BASE]: of a base, adapters are trained."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from tiny_run import Rows, rows, tiny_recipe, tiny_source

from atma.config import Recipe
from atma.lora import LoraConfig
from atma.train.folder import RECIPE
from atma.train.loop import Stopped, fit
from atma.train.parallel import Ranks, join
from atma.train.start import resolved


def recipe(shard: int, base: str | None) -> Recipe:
    changes = {"keep_best": True, "shard_ranks": shard}
    if base is None:
        return tiny_recipe(**changes)
    changes |= {"lora_rate": 0.01, "adamw_rate": 0.003, "optimiser": "adamw", "init_from": base}
    made = tiny_recipe(**changes)
    return resolved(replace(made, lora=LoraConfig(rank=2, targets=("blocks.*.mixer.*",))))


def run(out: Path, ranks: Ranks, stop: int, base: str | None = None) -> Path | str:
    done = [0]

    def make(step: int) -> Rows:
        done[0] = step + 1
        return Rows(*(part.chunk(ranks.replicas)[ranks.replica] for part in rows(step)))

    again = (out / RECIPE).is_file()
    try:
        return fit(
            recipe(ranks.shard, base), out, tiny_source(make), again, ranks=ranks, stop=lambda: 0 < stop == done[0]
        )
    except Stopped as error:
        return str(error)


if __name__ == "__main__":
    out, shard, stop, *base = sys.argv[1:]
    torch.set_num_threads(1)
    run(Path(out), join(torch.device("cpu"), 1, int(shard)), int(stop), *base)
    torch.distributed.destroy_process_group()

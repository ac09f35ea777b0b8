"""A tiny run of processes that share the weights: sharded.py RUN SHARD STOP [BASE].

Of a base, adapters are trained; "samples" in its place: all is trained, and texts are written.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from tiny_run import Rows, rows, tiny_model, tiny_recipe, tiny_source

from atma.config import Recipe
from atma.lora import LoraConfig
from atma.tokenizer import byte_tokenizer
from atma.train.folder import RECIPE
from atma.train.loop import Stopped, fit
from atma.train.parallel import Ranks, join
from atma.train.start import resolved

SAMPLES = "samples"


def recipe(shard: int, base: str | None) -> Recipe:
    changes = {"keep_best": True, "shard_ranks": shard}
    if base == SAMPLES:
        texts = {"sample_every": 4, "sample_tokens": 5, "sample_prompts": ("def", ""), "keep_checkpoints": 9}
        return tiny_recipe(tiny_model(vocab_size=257), **changes, **texts)
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

    again, source = (out / RECIPE).is_file(), tiny_source(make)
    if base == SAMPLES:
        source = replace(source, tokenizer=byte_tokenizer())
    try:
        return fit(recipe(ranks.shard, base), out, source, again, ranks=ranks, stop=lambda: 0 < stop == done[0])
    except Stopped as error:
        return str(error)


if __name__ == "__main__":
    out, shard, stop, *base = sys.argv[1:]
    torch.set_num_threads(1)
    run(Path(out), join(torch.device("cpu"), 1, int(shard)), int(stop), *base)
    torch.distributed.destroy_process_group()

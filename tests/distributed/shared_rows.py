"""What each process of a test of shared rows does: every subject whole and shared, losses and gradients compared."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from atma.config import ModelConfig
from atma.mixers.stretches import stretch_of
from atma.mixers.table import names, small
from atma.model import Model
from tests.laws.conftest import randomise

VOCABULARY, TOKENS = 16, 12
"""Ids, and tokens of a stretch."""


def documents(rows: str, world: int) -> torch.Tensor | None:
    """Segments of three rows: one document; documents that end inside, at and next to edges; short ones everywhere."""
    if rows == "whole":
        return None
    length = TOKENS * world
    ends = (
        ([TOKENS], [TOKENS - 1, TOKENS + 1], [5, length - 3]) if rows == "edges" else ([], [3, 4, 9], [length // 2 + 2])
    )
    segments = torch.zeros(3, length, dtype=torch.int32)
    for row, places in zip(segments, ends, strict=True):
        for place in places:
            row[place:] += 1
    return segments


def model_of(kind: str, options: dict) -> Model:
    config = ModelConfig(VOCABULARY, width=16, depth=2, pattern=(kind, kind), **options)
    return randomise(Model(config, torch.Generator().manual_seed(0)))


def gradients(model: Model, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def compared(model: Model, rows: str, rank: int, world: int) -> float:
    """The largest difference between whole and shared rows, of the loss and of every gradient, in units of its size."""
    segments = documents(rows, world)
    generator = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(0, VOCABULARY, (2, 3, TOKENS * world), generator=generator)
    targets[1, :4] = -100
    loss = model.loss(model(tokens, segment_ids=segments)[0], targets).sum()
    whole = [loss.detach(), *gradients(model, loss)]
    stretch = stretch_of(rank, range(world), segments, tuple(tokens.shape))
    model.checkpointing = rows == "edges"  # a block is then computed again, what it hands on too
    some = slice(rank * TOKENS, (rank + 1) * TOKENS)
    loss = model.loss(model(tokens[:, some], stretch=stretch)[0], targets[:, some]).sum()
    shared = [loss.detach(), *gradients(model, loss)]
    worst = 0.0
    for one, other in zip(whole, shared, strict=True):
        dist.all_reduce(other)
        worst = max(worst, float((one - other).abs().max() / one.abs().max().clamp(min=1)))
    return worst


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, world = dist.get_rank(), dist.get_world_size()
    told = {}
    for kind in sys.argv[2:] or names():
        for i, options in enumerate(small(kind)):
            for rows in ("whole", "edges", "short"):
                torch.manual_seed(0)
                told[f"{kind}-{i} {rows}"] = compared(model_of(kind, options), rows, rank, world)
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

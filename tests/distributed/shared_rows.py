"""What each process of a test of shared rows and weights does: every subject whole and shared, losses and gradients
compared.

python -m tests.distributed.shared_rows OUT CONTEXT SHARD KIND…   (a mixer, or its NAME-N: of its small options those)
"""

import copy
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from atma.config import ModelConfig
from atma.mixers.stretches import stretch_of
from atma.mixers.table import names, small
from atma.model import Model
from atma.train.parallel import Ranks
from atma.train.shards import divide, mesh_of
from tests.laws.conftest import randomise

VOCABULARY, TOKENS = 16, 12
"""Ids, and tokens of a stretch."""
SHARES = {2: (5.0, 3.0), 4: (4.0, 3.0, 2.0, 1.0)}
"""Of a row for each of its processes, where weights are shared too."""


def documents(rows: str, world: int) -> torch.Tensor | None:
    """Segments of three rows: one document; documents that end inside, at and next to edges; short ones everywhere."""
    if rows in ("whole", "frozen"):
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


def model_of(kind: str, options: Mapping[str, Any]) -> Model:
    config = ModelConfig(VOCABULARY, width=16, depth=2, pattern=(kind, kind), **options)
    return randomise(Model(config, torch.Generator().manual_seed(0)))


def freeze(model: Model) -> None:
    """Leave little to be trained, as adapters do: nothing of the first block, nor of what the second hands on."""
    for name, parameter in model.named_parameters():
        handed = any(part in name for part in ("k_proj", "v_proj", "memory", "canon"))
        parameter.requires_grad_(name.startswith(("blocks.1.", "norm.")) and not handed)


def gradients(model: Model, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]


def compared(model: Model, rows: str, ranks: Ranks, mesh: Any) -> float:
    """The largest difference between one process and all, of the loss and of every gradient, in units of its size."""
    segments = documents(rows, ranks.context)
    segments = None if segments is None else segments.repeat(ranks.replicas, 1)
    generator = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(0, VOCABULARY, (2, 3 * ranks.replicas, TOKENS * ranks.context), generator=generator)
    targets[1, :4] = -100
    loss = model.loss(model(tokens, segment_ids=segments)[0], targets).sum()
    whole = [loss.detach(), *gradients(model, loss)]
    if mesh is not None:
        model = copy.deepcopy(model)
        divide(model, ranks, mesh)
    model.checkpointing = rows == "edges"  # a block is then computed again, what it hands on too
    loss = own_loss(model, tokens, targets, segments, ranks)
    shared = [loss.detach(), *gradients(model, loss)]
    worst = 0.0
    for one, other in zip(whole, shared, strict=True):
        if hasattr(other, "full_tensor"):
            other = other.full_tensor()
        else:
            dist.all_reduce(other)
        worst = max(worst, float((one - other).abs().max() / one.abs().max().clamp(min=1)))
    return worst


def own_loss(
    model: Model, tokens: torch.Tensor, targets: torch.Tensor, segments: torch.Tensor | None, ranks: Ranks
) -> torch.Tensor:
    """The loss of this process's rows, or stretch of them."""

    def own(x: torch.Tensor) -> torch.Tensor:
        return x.chunk(ranks.replicas)[ranks.replica]

    tokens, targets, segments = own(tokens), own(targets), None if segments is None else own(segments)
    if ranks.context == 1:
        return model.loss(model(tokens, segment_ids=segments)[0], targets).sum()
    place = ranks.rank % ranks.context
    shares = SHARES[ranks.context] if ranks.shard > 1 else ()
    stretch = stretch_of(place, ranks.peers, segments, tuple(tokens.shape), shares)
    some = slice(stretch.start, stretch.seen)
    return model.loss(model(tokens[:, some], stretch=stretch)[0], targets[:, some]).sum()


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    path, context, shard, *kinds = sys.argv[1:]
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), int(context), int(shard))
    mesh = mesh_of(ranks, torch.device("cpu"), 600) if ranks.shard > 1 else None
    told = {}
    for kind, _, only in (each.partition("-") for each in kinds or names()):
        for i, options in enumerate(small(kind)):
            if only not in ("", str(i)):
                continue
            for rows in ("whole", "edges", "short", "frozen"):
                torch.manual_seed(0)
                model = model_of(kind, options)
                if rows == "frozen":
                    freeze(model)
                    compared(model, rows, ranks, mesh)  # what nobody took of it would be taken for the next one's
                told[f"{kind}-{i} {rows}"] = compared(model, rows, ranks, mesh)
    if ranks.rank == 0:
        Path(path).write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

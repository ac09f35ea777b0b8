"""What each process of a test of weights that travel in bfloat16 does: every subject by one process and by all.

python -m tests.distributed.travelling OUT KIND…
"""

import contextlib
import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from atma.mixers.table import names, small
from atma.model import Model
from atma.train.parallel import Ranks
from atma.train.shards import divide, mesh_of
from atma.train.step import computing
from atma.train.travel import low_names
from tests.distributed.shared_rows import VOCABULARY, documents, freeze, model_of, own_loss

ALONE = Ranks()
CPU = torch.device("cpu")


def losses(model: Model, batch: tuple[torch.Tensor, ...], ranks: Ranks) -> list[torch.Tensor]:
    """The loss of this process's rows in bfloat16, and its gradients, which are in float32."""
    tokens, targets, segments = batch
    with computing(CPU, torch.bfloat16):
        loss = own_loss(model, tokens, targets, segments, ranks)
    loss.backward()
    return [loss.detach(), *(_gradient(p) for p in model.parameters() if p.requires_grad)]


def _gradient(parameter: Any) -> torch.Tensor:
    if parameter.grad is None:
        return torch.zeros(parameter.shape)
    return parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad.clone()


def differing(model: Model, rows: str, ranks: Ranks, mesh: Any) -> list[str]:
    """Gradients of weights in parts that are not, bit by bit, the sum of those of each process's rows, taken in turn."""
    segments = documents(rows, 1)
    generator = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(0, VOCABULARY, (2, 3 * ranks.replicas, 12), generator=generator)
    batch = (tokens, targets, None if segments is None else segments.repeat(ranks.replicas, 1))
    names = ["loss", *(name for name, p in model.named_parameters() if p.requires_grad)]
    divided = copy.deepcopy(model)
    divide(divided, ranks, mesh, torch.bfloat16)
    divided.checkpointing = model.checkpointing = rows == "edges"
    whole: list[Any] = [torch.tensor(0.0)]
    for place in range(ranks.replicas):
        own = tuple(None if x is None else x.chunk(ranks.replicas)[place] for x in batch)
        loss, *grads = losses(model, own, ALONE)
        whole = [whole[0] + loss, *grads]
    loss, *grads = losses(divided, batch, ranks)
    dist.all_reduce(loss)
    return [name for name, one, other in zip(names, whole, [loss, *grads], strict=True) if not torch.equal(one, other)]


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    path, *kinds = sys.argv[1:]
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), 1, dist.get_world_size())
    mesh = mesh_of(ranks, CPU, 600)
    told = {}
    for kind in kinds or names():
        for i, options in enumerate(small(kind)):
            for rows in ("whole", "edges", "short", "frozen"):
                torch.manual_seed(0)
                model = model_of(kind, options).float()
                if rows == "frozen":
                    freeze(model)
                found = {"low": sum(p.numel() for n, p in model.named_parameters() if n in low_names(model))}
                found["all"] = sum(p.numel() for p in model.parameters())
                try:
                    found["differing"] = differing(model, rows, ranks, mesh)
                except ValueError as error:
                    found["error"] = str(error)
                told[f"{kind}-{i} {rows}"] = found
    if ranks.rank == 0:
        Path(path).write_text(json.dumps(told))
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

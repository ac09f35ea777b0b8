"""What each process of a test of weights that travel in bfloat16 does: every subject so, and with float32 gathered.

python -m tests.distributed.travelling OUT CONTEXT KIND…
"""

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
from tests.distributed.shared_rows import TOKENS, VOCABULARY, documents, freeze, model_of, own_loss

CPU = torch.device("cpu")


def gradients(model: Model, rows: str, ranks: Ranks, mesh: Any, gathered: torch.dtype) -> list[torch.Tensor]:
    """The loss of this process's rows in bfloat16, and the gradients of all rows, of weights gathered in a type."""
    segments = documents(rows, ranks.context)
    segments = None if segments is None else segments.repeat(ranks.replicas, 1)
    generator = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(0, VOCABULARY, (2, 3 * ranks.replicas, TOKENS * ranks.context), generator=generator)
    divided = copy.deepcopy(model)
    divide(divided, ranks, mesh, gathered)
    divided.checkpointing = rows == "edges"
    with computing(CPU, torch.bfloat16):
        loss = own_loss(divided, tokens, targets, segments, ranks)
    loss.backward()
    found: list[Any] = [p.grad for p in divided.parameters() if p.requires_grad]
    return [loss.detach(), *(torch.zeros(()) if grad is None else grad.full_tensor() for grad in found)]


def differing(model: Model, rows: str, ranks: Ranks, mesh: Any) -> list[str]:
    """What is not the same to the bit."""
    names = ["loss", *(name for name, p in model.named_parameters() if p.requires_grad)]
    both = (gradients(model, rows, ranks, mesh, dtype) for dtype in (torch.float32, torch.bfloat16))
    return [name for name, one, other in zip(names, *both, strict=True) if not torch.equal(one, other)]


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    path, context, *kinds = sys.argv[1:]
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), int(context), dist.get_world_size())
    mesh, told = mesh_of(ranks, CPU, 600), {}
    for kind in kinds or names():
        for i, options in enumerate(small(kind)):
            for rows in ("whole", "edges", "short", "frozen"):
                torch.manual_seed(0)
                model = model_of(kind, options).float()
                if rows == "frozen":
                    freeze(model)
                told[f"{kind}-{i} {rows}"] = differing(model, rows, ranks, mesh)
    if ranks.rank == 0:
        Path(path).write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

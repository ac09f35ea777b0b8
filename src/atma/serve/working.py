"""What a step computes with: the most bytes of tensors that live at once while prompts are read, found by reading one.

It is part of the engine's budget, like all that is held from step to step, and is found before pages are shared out.
"""

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from atma.serve.carry import Carrier, join
from atma.serve.exact import Served
from atma.serve.pages import PagePool
from atma.serve.sampler import scores
from atma.serve.settings import EngineConfig
from atma.serve.writing import table_of

SCORED = 64
"""Positions of a prompt whose logits are held at once."""


class Meter(TorchDispatchMode):
    """`most`: bytes of tensors made within it, at the moment when these were most."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: marking the mode for the compiler would import the compiler, which takes seconds."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._live: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, function: Any, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {StorageWeakRef(x.untyped_storage()) for x in _tensors((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for x in _tensors(result):
            memory = StorageWeakRef(x.untyped_storage())
            if memory not in given:
                self._live[memory] = x.untyped_storage().nbytes()
        self._live = {memory: count for memory, count in self._live.items() if not memory.expired()}
        self.most = max(self.most, sum(self._live.values()))
        return result


@torch.inference_mode()
def working_bytes(served: Served, carrier: Carrier, config: EngineConfig) -> int:
    """Of reading a whole step's tokens for as many texts as there may be, or of scoring some of them."""
    count = -(-config.step_tokens // config.max_rows)
    pool = PagePool(carrier.paged, 1, config.page_tokens, served.device)
    pages = dict.fromkeys(range(pool.pages_for(count)), 0)  # one page stands for all: what is read makes no difference
    table = table_of([pages] * config.max_rows, served.device)
    tokens = torch.zeros(config.max_rows, count, dtype=torch.long, device=served.device)
    with Meter() as reading:
        carried = join([carrier.empty()] * config.max_rows)
        state = carrier.state(carried, carrier.lengths([0] * config.max_rows), table, pool)
        hidden, _ = served(tokens, state, [-1] * config.max_rows)
    with Meter() as scoring:
        some = hidden.flatten(0, 1)[:SCORED]
        scores(served.logits(some, [-1]), [0] * len(some), 1)
    served.adapters.require_called()
    return max(reading.most, scoring.most)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]

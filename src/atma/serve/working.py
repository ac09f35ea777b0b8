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
from atma.serve.lookup import INDEX_BYTES
from atma.serve.pages import PagePool
from atma.serve.passes import PROGRAMS, ROWS, Passes
from atma.serve.sampler import scores
from atma.serve.settings import EngineConfig, Recording, Reserve
from atma.serve.writing import Writing, table_of

SCORED = 64
"""Positions of a prompt whose logits are held at once."""

NONE, ENOUGH = Recording(0, 0), Recording(1 << 30, 1 << 30)


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


def reserve_of(served: Served, carrier: Carrier, config: EngineConfig) -> Reserve:
    """What steps take of the budget."""
    return Reserve(recording_of(served, carrier, config), working_bytes(served, carrier, config), served.adapters.bytes)


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
    return max(reading.most, scoring.most) + (drafting_bytes(carrier) if config.speculation else 0)


def drafting_bytes(carrier: Carrier) -> int:
    """Of what texts that draft hold: copies of their rows, and the indices of their tokens."""
    return ROWS * (carrier.row_bytes + INDEX_BYTES)


def recording_of(served: Served, carrier: Carrier, config: EngineConfig) -> Recording:
    """What recording a step of every number of rows takes, and passes over drafts, found by recording the largest."""
    pool = PagePool(carrier.paged, 1, config.page_tokens, served.device)
    batch = Writing(served, carrier, pool, config.max_rows, ENOUGH)
    passes = Passes(batch, config.speculation) if config.speculation else None
    if not (config.recorded_bytes and batch.recordings.possible):
        return NONE
    batch.record(config.max_rows)
    if passes is not None:
        passes.record(1, passes.widths[-1])
    recordings = batch.recordings
    each = [one.bytes for one in recordings.by_key.values()]
    if len(each) < 1 + (passes is not None):
        return NONE
    many = config.max_rows * each[0] + (PROGRAMS * each[1] if passes is not None else 0)
    return Recording(recordings.shared_bytes + many, recordings.arena_bytes)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]

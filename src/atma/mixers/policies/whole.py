"""Layers of which a policy leaves nothing out: their keys and values, held as the other layers' are, and read whole."""

from typing import NamedTuple

import torch
from torch import Tensor

from atma.mixers.heads import Core
from atma.mixers.policies.base import New, new_rows, read_pages
from atma.ops.chosen import Held
from atma.ops.paged.pages import Pages


class Rows(NamedTuple):
    """Keys and values of a whole text, and nothing else."""

    keys: Held  # (B, G, capacity, K)
    values: Held

    grows = {"keys": 2, "values": 2}  # noqa: RUF012 (a field otherwise)
    pages = {"keys": 2, "values": 2}  # noqa: RUF012


def new_keys(groups: int, width: int, batch: int, capacity: int, like: Tensor) -> Rows:
    """Room for keys and values (B, G, capacity, K) of the type of `like`."""
    rows = like.new_empty(batch)
    return Rows(*(new_rows(rows, groups, capacity, width) for _ in range(2)))


def read_all(core: Core, new: New, keys: Held, values: Held) -> tuple[Tensor, Tensor | None]:
    """What the new queries read of all keys that they see, and what the core adds."""
    if not isinstance(keys, Pages):
        return core(new.q, keys, values, new.start, None)
    page = keys.pool.shape[2]
    every = torch.arange(keys.table.shape[1], dtype=torch.int32, device=new.q.device)
    before = every * page < new.last[..., None]
    chosen = torch.where(before, every, -1)[:, None].expand(*new.q.shape[:3], -1)
    return read_pages(core, new, (keys, values), (chosen, page))

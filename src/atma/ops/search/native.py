"""The choices by the compiled kernels (ops/native/search.cpp): float32, float64 and bfloat16, on the CPU."""

import torch
from torch import Tensor

from atma.ops import native
from atma.ops.paged.pages import Pages
from atma.ops.search import Reach

_FIELDS = (
    "batch heads groups queries width page table_row q_batch q_head q_query k_batch k_head k_key q keys table last "
    "block kept sinks window share least most chosen slots threads"
)


def search_blocks(q: Tensor, keys: Tensor | Pages, last: Tensor, reach: Reach, slots: int) -> Tensor:
    """`atma.ops.search.search_blocks`."""
    return _call("search_blocks", q, keys, last, reach, slots)


def heaviest_pages(q: Tensor, keys: Tensor | Pages, last: Tensor, reach: Reach, slots: int) -> Tensor:
    """`atma.ops.search.heaviest_pages`."""
    return _call("heaviest_pages", q, keys, last, reach, slots)


def _call(name: str, q: Tensor, keys: Tensor | Pages, last: Tensor, reach: Reach, slots: int) -> Tensor:
    held = keys.pool if isinstance(keys, Pages) else keys
    q, last = q.to(held.dtype), last.contiguous()
    q, held = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, held))
    page, table, strides = 0, None, held.stride()[:3]
    if isinstance(keys, Pages):
        page, table, strides = held.shape[3], keys.table.contiguous(), (0, 0, 0)
    chosen = torch.empty(*q.shape[:3], slots, dtype=torch.int32)
    sizes = (*q.shape[:2], held.shape[1], *q.shape[2:], page, 0 if table is None else table.shape[1])
    places = native.addresses(q, held, table, last)
    values = (*sizes, *q.stride()[:3], *strides, *places, *reach, *native.addresses(chosen), slots)
    native.call(name, held.dtype, _FIELDS, (*values, torch.get_num_threads()))
    return chosen

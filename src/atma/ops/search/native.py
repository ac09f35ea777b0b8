"""The choices by the compiled kernels (ops/native/search.cpp): float32, float64 and bfloat16, on the CPU."""

import torch
from torch import Tensor

from atma.ops import native
from atma.ops.chosen.native import laid, paging, rows
from atma.ops.paged.pages import Pages
from atma.ops.search import Reach

_FIELDS = (
    "batch heads groups queries width q_batch q_head q_query k_batch k_head k_row pool_page table_row "
    "q keys table last block kept sinks window share least most chosen slots threads"
)


def search_blocks(q: Tensor, keys: Tensor | Pages, last: Tensor, reach: Reach, slots: int) -> Tensor:
    """`atma.ops.search.search_blocks`."""
    return _call("search_blocks", q, keys, last, reach, slots)


def heaviest_pages(q: Tensor, keys: Tensor | Pages, last: Tensor, reach: Reach, slots: int) -> Tensor:
    """`atma.ops.search.heaviest_pages`."""
    return _call("heaviest_pages", q, keys, last, reach, slots)


def _call(name: str, q: Tensor, keys: Tensor | Pages, last: Tensor, reach: Reach, slots: int) -> Tensor:
    (held, table, strides), last = laid(keys), last.contiguous()
    q = rows(q.to(held.dtype))
    chosen = torch.empty(*q.shape[:3], slots, dtype=torch.int32)
    sizes = (*q.shape[:2], held.shape[1], *q.shape[2:], *q.stride()[:3], *strides, *paging(keys))
    places, (into,) = native.addresses(q, held, table, last), native.addresses(chosen)
    native.call(name, held.dtype, _FIELDS, (*sizes, *places, *reach, into, slots, torch.get_num_threads()))
    return chosen

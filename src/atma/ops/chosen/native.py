"""Pages chosen and read by the compiled kernels (ops/native/chosen.cpp): float32, float64 and bfloat16, on the CPU."""

import torch
from torch import Tensor

from atma.ops import native
from atma.ops.chosen import Held, slots_of
from atma.ops.paged.pages import Pages

_CHOOSE = (
    "batch heads queries width groups page row k window slots u_batch u_head u_query s_batch s_head "
    "pool_page table_row u summaries table last pages threads"
)
_READ = (
    "batch heads queries width groups page slots q_batch q_head q_query q_slot k_batch k_head k_row v_batch v_head "
    "v_row pool_page table_row q keys values scale bias table pages last S L Q M threads"
)
_BOX = (
    "batch groups tokens width page row k_batch k_head k_row s_batch s_head pool_page table_row "
    "keys summaries table length"
)
_HOLD = "batch groups tokens row_bytes page table_row x_batch x_head x_token x pool table length"


def choose(u: Tensor, summaries: Held, last: Tensor, page: int, k: int, window: int) -> Tensor:
    """See `choose_pages`."""
    pool, table, (*strides, row) = laid(summaries)
    u, last, slots = rows(u), last.contiguous(), slots_of(k, window, page)
    pages = torch.empty(*u.shape[:3], slots, dtype=torch.int32)
    sizes = (*u.shape, pool.shape[1], page, row, k, window, slots, *u.stride()[:3], *strides, *paging(summaries))
    places = native.addresses(u, pool, table, last, pages)
    native.call("choose_pages", pool.dtype, _CHOOSE, (*sizes, *places, torch.get_num_threads()))
    return pages


def statistics(
    q: Tensor, keys: Held, values: Held, scale: Tensor, chosen: tuple[Tensor, int], last: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `chosen_statistics`."""
    (k, table, k_strides), (v, _, v_strides), (pages, page) = laid(keys), laid(values), chosen
    q, scale, pages, last = rows(q), scale.contiguous(), pages.contiguous(), last.contiguous()
    bias = None if bias is None else bias.to(scale.dtype).contiguous()
    (batch, heads, queries), width = q.shape[:3], q.shape[-1]
    S = torch.empty(batch, heads, queries, width, dtype=scale.dtype)
    L, Q, M = (torch.empty(q.shape[:3], dtype=scale.dtype) for _ in range(3))
    strides = (*q.stride()[:3], q.stride(3) if q.ndim == 5 else 0, *k_strides, *v_strides, *paging(keys))
    places = native.addresses(q, k, v, scale, bias, table, pages, last, S, L, Q, M)
    sizes = (batch, heads, queries, width, k.shape[1], page, pages.shape[3])
    native.call("chosen_read", k.dtype, _READ, (*sizes, *strides, *places, torch.get_num_threads()))
    return S, L, Q, M


def boxes(keys: Held, summaries: Held, length: Tensor, tokens: int, page: int) -> Held:
    """See `page_boxes`."""
    (k, table, k_strides), (s, _, (*s_strides, row)) = laid(keys), laid(summaries)
    sizes = (length.shape[0], k.shape[1], tokens, k.shape[3], page, row, *k_strides, *s_strides, *paging(keys))
    native.call("page_boxes", k.dtype, _BOX, (*sizes, *native.addresses(k, s, table, length)))
    return summaries


def hold_in_pages(held: Pages, x: Tensor, length: Tensor) -> Pages:
    """See `hold_rows`."""
    x, table = rows(x.to(held.pool.dtype)), held.table.contiguous()
    size = x.element_size()
    strides = [step * size for step in x.stride()[:3]]
    sizes = (*x.shape[:3], x.shape[3] * size, *paging(held), *strides)
    native.call("hold_rows", None, _HOLD, (*sizes, *native.addresses(x, held.pool, table, length)))
    return held


def laid(held: Held) -> tuple[Tensor, Tensor | None, tuple[int, int, int]]:
    """Where rows lie, whose pages they are, and their strides along texts, heads and tokens."""
    if isinstance(held, Pages):
        return held.pool, held.table.contiguous(), (0, 0, held.pool.shape[3])
    if held.stride(3) != 1 or held.stride(2) != held.shape[3]:
        held = held.contiguous()
    return held, None, (held.stride(0), held.stride(1), held.stride(2))


def paging(held: Held) -> tuple[int, int]:
    """Tokens of a page of the pool, and pages of a text; 0 where there is no pool."""
    return (held.pool.shape[2], held.table.shape[1]) if isinstance(held, Pages) else (0, 0)


def rows(x: Tensor) -> Tensor:
    """x with the numbers of a row side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()

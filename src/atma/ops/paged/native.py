"""Pages by the compiled kernels (ops/native/paged.cpp): float32, float64, bfloat16, on the CPU, without gradients."""

import torch
from torch import Tensor

from atma.ops import native
from atma.ops.paged.pages import Pages

_FORWARD = (
    "batch heads groups queries width page table_row q_batch q_head q_query "
    "q keys values scale table first last S L Q M threads"
)
_WRITE = (
    "batch groups tokens width page table_row k_batch k_head k_token v_batch v_head v_token "
    "k v table length keys values"
)


def statistics(
    q: Tensor, keys: Pages, values: Pages, scale: Tensor, first: Tensor, last: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The statistics of `atma.ops.polar.statistics_of`, the same bits for a query whatever else is in the call."""
    dtype, page = keys.pool.dtype, values.pool.shape[2]
    q = q.to(dtype) if q.stride(-1) == 1 else q.to(dtype).contiguous()
    scale, first, last, table = scale.contiguous(), first.contiguous(), last.contiguous(), keys.table.contiguous()
    S = torch.empty(q.shape, dtype=scale.dtype)
    L, Q, M = (torch.empty(q.shape[:-1], dtype=scale.dtype) for _ in range(3))
    sizes = (q.shape[0], q.shape[1], keys.pool.shape[1], q.shape[2], q.shape[3], page, table.shape[1])
    places = native.addresses(q, keys.pool, values.pool, scale, table, first, last, S, L, Q, M)
    native.call("paged_forward", dtype, _FORWARD, (*sizes, *q.stride()[:3], *places, torch.get_num_threads()))
    return S, L, Q, M


def hold(keys: Pages, values: Pages, k: Tensor, v: Tensor, length: Tensor) -> None:
    """Write k and v (B, G, T, K) at each row's positions from length (B,) on."""
    dtype, page = keys.pool.dtype, values.pool.shape[2]
    k, v = (x.to(dtype) if x.stride(-1) == 1 else x.to(dtype).contiguous() for x in (k, v))
    table, length = keys.table.contiguous(), length.to(torch.int32).contiguous()
    sizes = (*k.shape, page, table.shape[1])
    places = native.addresses(k, v, table, length, keys.pool, values.pool)
    native.call("paged_write", dtype, _WRITE, (*sizes, *k.stride()[:3], *v.stride()[:3], *places))

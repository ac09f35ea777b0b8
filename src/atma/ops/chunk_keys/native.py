"""Keys of chunks by the compiled kernel (ops/native/chunk_keys.cpp): float32, float64 and bfloat16, on the CPU."""

from torch import Tensor

from atma.ops import native
from atma.ops.chosen import Held
from atma.ops.chosen.native import laid, paging, rows

_FIELDS = (
    "batch heads queries width groups chunk row q_batch q_head q_query k_batch k_head k_row v_batch v_head v_row "
    "s_batch s_head pool_page table_row q ring keys values summaries table length"
)


def keys(summaries: Held, q: Tensor, ring: Tensor, held: tuple[Held, Held], length: Tensor) -> Held:
    """See `chunk_keys`."""
    (k, table, k_strides), (v, _, v_strides), (s, _, (*s_strides, row)) = laid(held[0]), laid(held[1]), laid(summaries)
    q, ring = rows(q), ring.contiguous()
    strides = (*q.stride()[:3], *k_strides, *v_strides, *s_strides, *paging(held[0]))
    places = native.addresses(q, ring, k, v, s, table, length)
    native.call("chunk_keys", k.dtype, _FIELDS, (*q.shape, k.shape[1], ring.shape[2], row, *strides, *places))
    return summaries

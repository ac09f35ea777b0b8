"""The kept set by the compiled kernel (ops/native/eviction.cpp), in place: float32, float64, bfloat16, on the CPU."""

import torch
from torch import Tensor

from atma.ops import native
from atma.ops.eviction import Budget, Kept
from atma.ops.eviction.reference import Sums

_FIELDS = (
    "batch heads groups queries width slots q_batch q_head q_query k_batch k_head k_query v_batch v_head v_query "
    "q k v scale null length keys values place lately wholly S L Q M budget block window anchors decay threads"
)


def attend_kept(
    q: Tensor, k: Tensor, v: Tensor, scale: Tensor, null: Tensor | None, length: Tensor, kept: Kept, budget: Budget
) -> tuple[Sums, Kept]:
    """`atma.ops.eviction.attend_kept`."""
    q, k, v = (x.to(kept.keys.dtype) for x in (q, k, v))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    work = kept.lately.dtype
    scale, null = scale.to(work).contiguous(), None if null is None else null.to(work).contiguous()
    length = length.to(torch.int32).contiguous()
    for x in kept:
        if not x.is_contiguous():
            raise ValueError("what is kept must lie in one piece")
    S = torch.empty(q.shape, dtype=work)
    L, Q, M = (torch.empty(q.shape[:-1], dtype=work) for _ in range(3))
    sizes = (*q.shape[:2], k.shape[1], *q.shape[2:], budget.slots)
    strides = [step for x in (q, k, v) for step in x.stride()[:3]]
    places = native.addresses(q, k, v, scale, null, length, *kept, S, L, Q, M)
    native.call("attend_kept", q.dtype, _FIELDS, (*sizes, *strides, *places, *budget, torch.get_num_threads()))
    return (S, L, Q, M), kept

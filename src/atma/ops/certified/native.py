"""Attention over shadows by the compiled kernels (ops/native/shadow_read.cpp): float32 and bfloat16, on the CPU."""

import torch
from torch import Tensor

from atma.ops import native
from atma.ops.certified.shadows import Held, Shadows, layout
from atma.ops.paged.pages import Pages

_FIELDS = (
    "batch heads groups queries width page table_row threads q_batch q_head q_query k_block k_head k_key k_channel "
    "v_block v_head v_key q scale null magnitude_slope null_value table first last keys values key_scale key_error "
    "value_scale value_error value_norm k v direction magnitude direction_error magnitude_error read "
    "direction_tolerance magnitude_tolerance"
)


def attention(
    q: Tensor,
    k: Held,
    v: Held,
    shadows: Shadows,
    logits: tuple[Tensor, Tensor, Tensor, Tensor],
    first: Tensor,
    last: Tensor,
    tolerances: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the reference's; logits: scale, null logit, magnitude slope and null value, all float32."""
    results = [torch.empty(q.shape, dtype=torch.float32)]
    results += [torch.empty(q.shape[:-1], dtype=torch.float32) for _ in range(3)]
    read = torch.empty(q.shape[:-1], dtype=torch.int32)
    exact = [x.pool if isinstance(x, Pages) else x for x in (k, v)]
    if exact[1].stride(3) != 1:
        raise ValueError("values must lie with their channels side by side")
    strides = (*_key_strides(k), *exact[1].stride()[:3])
    scale, null, slope, null_value = (x.contiguous() for x in logits)
    _call(
        "shadow_attention",
        q,
        shadows,
        (scale, null, slope, null_value, first.contiguous(), last.contiguous()),
        (strides, exact),
        results,
        read,
        tolerances,
    )
    return results[0], results[1], results[2], results[3], read


def statistics(
    q: Tensor, shadows: Shadows, scale: Tensor, first: Tensor, last: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the reference's."""
    S = torch.empty(q.shape, dtype=torch.float32)
    L, Q, M = (torch.empty(q.shape[:-1], dtype=torch.float32) for _ in range(3))
    given = (scale.contiguous(), None, None, None, first.contiguous(), last.contiguous())
    _call("shadow_statistics", q, shadows, given, ((0,) * 7, (None, None)), [S, L, Q, M], None, (0.0, 0.0))
    return S, L, Q, M


def _key_strides(k: Held) -> tuple[int, int, int, int]:
    """Of block, head, key and channel: in a pool of pages keys lie as their state's class says."""
    if isinstance(k, Tensor):
        block, head, key, channel = k.stride()
    elif k.axis == 3:
        block, head, channel, key = k.pool.stride()
    else:
        block, head, key, channel = k.pool.stride()
    return block, head, key, channel


def _call(
    name: str,
    q: Tensor,
    shadows: Shadows,
    given: tuple[Tensor | None, ...],
    exact: tuple[tuple[int, ...], tuple[Tensor | None, ...] | list[Tensor]],
    results: list[Tensor],
    read: Tensor | None,
    tolerances: tuple[float, float],
) -> None:
    place, (strides, held) = layout(shadows), exact
    q = q if q.stride(-1) == 1 else q.contiguous()
    scale, null, slope, null_value, first, last = given
    assert first is not None and last is not None
    groups = place.leaves[0].shape[1]
    sizes = (q.shape[0], q.shape[1], groups, q.shape[2], q.shape[3], place.page, place.table.shape[1])
    places = native.addresses(
        q,
        scale,
        null,
        slope,
        null_value,
        place.table,
        first.contiguous(),
        last.contiguous(),
        *place.leaves,
        *held,
        *results,
        read,
    )
    values = (*sizes, torch.get_num_threads(), *q.stride()[:3], *strides, *places, *tolerances)
    native.call(name, q.dtype, _FIELDS, values)


__all__ = ["attention", "statistics"]

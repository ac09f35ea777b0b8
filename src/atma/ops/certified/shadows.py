"""Shadow keys and values: copies in 8 bits, and for each how far from the exact one it is at the most.

A row of a shadow is whole numbers from −127 to 127 times one scale; scales, errors and lengths are bfloat16, rounded
up, so a key and a value of K numbers take 2 K + 10 bytes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from atma.ops import native
from atma.ops.backend import backend_for
from atma.ops.paged.pages import Pages

STEPS = 127
MOST_WIDTH = 512
"""Channels of which the compiled kernels add products of whole numbers in 32 bits."""
_WRITE = (
    "batch groups tokens width page table_row k_batch k_head k_token v_batch v_head v_token k v table length "
    "keys values key_scale key_error value_scale value_error value_norm threads"
)

Held = Tensor | Pages


class Shadows(NamedTuple):
    """Of all keys and values of a text: keys and values (B, G, S, K) int8, all else (B, G, S, 1) bfloat16."""

    keys: Held
    values: Held
    key_scale: Held
    key_error: Held
    """‖k − key_scale · keys‖, no less."""
    value_scale: Held
    value_error: Held
    value_norm: Held
    """‖value_scale · values‖, no less."""

    grows = dict.fromkeys(
        ("keys", "values", "key_scale", "key_error", "value_scale", "value_error", "value_norm"), 2
    )  # a field otherwise, if it had a type
    pages = grows


class Quantised(NamedTuple):
    """Rows (…, K) int8; scale, error and norm (…, 1) bfloat16, as in `Shadows`."""

    rows: Tensor
    scale: Tensor
    error: Tensor
    norm: Tensor


def quantise(x: Tensor) -> Quantised:
    """x (…, K) in 8 bits: the scale is max|x|/127 of each row, rounded up; a row that is not finite stays so."""
    work = torch.promote_types(x.dtype, torch.float32)
    x = x.to(work)
    scale = upward(x.abs().amax(-1, keepdim=True) / STEPS)
    unit = scale.to(work)
    rows = (x / unit.where(unit > 0, 1)).round().clamp(-STEPS, STEPS)
    near = rows * unit
    slightly = 1 + 2.0**-16
    error, norm = (torch.linalg.vector_norm(y, dim=-1, keepdim=True) * slightly for y in (x - near, near))
    return Quantised(rows.nan_to_num(0).to(torch.int8), scale, upward(error), upward(norm))


def upward(x: Tensor) -> Tensor:
    """The least bfloat16 that is not below x ≥ 0."""
    single = x.to(torch.float32)
    single = torch.where(single < x, torch.nextafter(single, torch.tensor(torch.inf, device=x.device)), single)
    near = single.to(torch.bfloat16)
    above = (near.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.where(near.to(torch.float32) < single, above, near)


def empty(batch: int, groups: int, capacity: int, width: int, device: torch.device | None = None) -> Shadows:
    """Shadows (B, G, capacity, …) of no keys."""
    rows = [torch.zeros(batch, groups, capacity, width, dtype=torch.int8, device=device) for _ in range(2)]
    marks = [torch.zeros(batch, groups, capacity, 1, dtype=torch.bfloat16, device=device) for _ in range(5)]
    return Shadows(*rows, *marks)


def hold(shadows: Shadows, k: Tensor, v: Tensor, length: Tensor) -> Shadows:
    """The shadows, in place, with those of k and v (B, G, T, K) from place length (B,) int32 of each row on.

    IndexError when a row has no room. Inference only: there is no gradient.
    """
    if backend_for("auto", k, "certified") == "native" and k.dtype != torch.float64 and k.dtype == v.dtype:
        _hold_native(shadows, k, v, length)
        return shadows
    keys, values = quantise(k), quantise(v)
    new = (keys.rows, values.rows, keys.scale, keys.error, values.scale, values.error, values.norm)
    for held, rows in zip(shadows, new, strict=True):
        _write(held, rows, length)
    return shadows


def _write(held: Held, rows: Tensor, length: Tensor) -> None:
    position = length.long()[:, None] + torch.arange(rows.shape[2], device=rows.device)
    if isinstance(held, Pages):
        page = held.pool.shape[2]
        at = held.table.gather(1, position // page % held.table.shape[1]).long()
        held.pool[at, :, position % page] = rows.transpose(1, 2)
    else:
        index = position[:, None, :, None].expand(rows.shape)
        if rows.shape[2] and int(position.max()) >= held.shape[2]:
            raise IndexError(
                f"{rows.shape[2]} keys after {int(length.max())} pass the {held.shape[2]} places there are"
            )
        held.scatter_(2, index, rows)


class Layout(NamedTuple):
    """Where rows of the shadows of a call lie, for a kernel: contiguous ones are one page a text."""

    page: int
    table: Tensor
    leaves: tuple[Tensor, ...]


def layout(shadows: Shadows) -> Layout:
    """Of pages or of contiguous tensors. ValueError: the kernels cannot read them as they lie."""
    leaves = [x.pool if isinstance(x, Pages) else x for x in shadows]
    if not all(x.is_contiguous() for x in leaves):
        raise ValueError("shadows must be contiguous, as `empty` makes them; copy them with .contiguous()")
    page = leaves[0].shape[2]
    if isinstance(shadows.keys, Pages):
        if page % 16:
            raise ValueError(f"a page of shadows must hold a multiple of 16 keys, not {page}")
        return Layout(page, shadows.keys.table.contiguous(), tuple(leaves))
    table = torch.arange(leaves[0].shape[0], dtype=torch.int32)
    return Layout(page, table.unsqueeze(1), tuple(leaves))


def _hold_native(shadows: Shadows, k: Tensor, v: Tensor, length: Tensor) -> None:
    place = layout(shadows)
    if not isinstance(shadows.keys, Pages) and not native.logging() and int(length.max()) + k.shape[2] > place.page:
        raise IndexError(f"{k.shape[2]} keys after {int(length.max())} pass the {place.page} places there are")
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    length = length.to(torch.int32).contiguous()
    sizes = (*k.shape, place.page, place.table.shape[1], *k.stride()[:3], *v.stride()[:3])
    places = native.addresses(k, v, place.table, length, *place.leaves)
    native.call("shadow_write", k.dtype, _WRITE, (*sizes, *places, torch.get_num_threads()))


__all__ = ["Layout", "Quantised", "Shadows", "empty", "hold", "layout", "quantise", "upward"]

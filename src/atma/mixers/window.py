"""What a layer with a window holds: the keys and values of its last tokens alone, in a ring that never grows.

The ring has as many places as the window has keys, and the token at position p lies at place p mod window. A key is
held with its position already in it, and the sums over keys do not depend on their order but by rounding: so one new
token takes the place of the oldest, and all places are attended as they lie. More tokens at once are attended behind
the last window − 1 of those held, put in order.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atma.mixers.heads import Attended
from atma.ops.paged.pages import Pages
from atma.ops.polar.held import hold


class WindowState(NamedTuple):
    """Of a global mixer with a window of R keys. All else is as in `GlobalState`."""

    length: Tensor
    keys: Tensor | Pages  # (B, G, R, K): position p at place p mod R
    values: Tensor | Pages  # (B, G, R, K)
    q_tail: Tensor | None
    k_tail: Tensor | None
    v_tail: Tensor | None
    memory: Any

    slides = {"keys": 2, "values": 2}  # noqa: RUF012 (a field otherwise)
    pages = {"keys": 3, "values": 2}  # noqa: RUF012

    def earlier(self, kind: str, saved: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The ring of a `GlobalState`, as which windowed layers once saved the keys and values of the whole text.

        None: it is of another kind. ValueError: it holds fewer keys than it has read tokens.
        """
        if kind != "GlobalState" or not {"length", "keys", "values"} <= set(saved):
            return None
        assert isinstance(self.keys, Tensor)
        length, size = saved["length"], self.keys.shape[2]
        return {name: _last(saved[name], length, size) for name in ("keys", "values")}


def attended(state: WindowState, k: Tensor, v: Tensor, in_order: bool) -> Attended:
    """New k and v (B, G, T, K) behind the ring of a state. One token without gradients is written into it in place,
    and all of it is attended as it lies, unless its keys are wanted `in_order`."""
    assert isinstance(state.keys, Tensor) and isinstance(state.values, Tensor)
    size, length = state.keys.shape[2], state.length
    start = length.clamp(max=size - 1)
    if k.shape[2] == 1 and not torch.is_grad_enabled() and not in_order:
        held = hold(state.keys, state.values, k, v, length % size)
        return Attended(*held, start, held, ring=True)
    seen, kept = _joined(length, start, size, k.shape[2])
    both = [torch.cat([old, new.to(old.dtype)], 2) for old, new in ((state.keys, k), (state.values, v))]
    keys, values = (_taken(x, seen) for x in both)
    return Attended(keys, values, start, (_taken(both[0], kept), _taken(both[1], kept)))


def _joined(length: Tensor, start: Tensor, size: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Places in a ring of `size` with new tokens behind it (B, ·): of what is attended, and of the ring afterwards."""
    length, start = length.long()[:, None], start.long()[:, None]
    index = torch.arange(size - 1 + tokens, device=length.device)
    new = (size + index - start).clamp(max=size + tokens - 1)  # what is behind the last is not attended
    seen = torch.where(index < start, (length - start + index) % size, new)
    place = torch.arange(size, device=length.device)
    position = _positions(length + tokens, size)
    return seen, torch.where(position < length, place, size + position - length)


def _positions(end: Tensor, size: int) -> Tensor:
    """The position (B, size) at each place of a ring after `end` (B, 1) tokens, negative where there is none."""
    return end - 1 - (end - 1 - torch.arange(size, device=end.device)) % size


def _taken(x: Tensor, place: Tensor) -> Tensor:
    """Places (B, N) of x (B, G, S, K)."""
    return x.gather(2, place[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _last(x: Tensor, length: Tensor, size: int) -> Tensor:
    """The ring of keys or values x (B, G, S, K) of `length` (B,) positions."""
    if x.ndim != 4 or length.dtype != torch.int32 or length.shape != x.shape[:1] or 0 in x.shape:
        raise ValueError(f"keys {tuple(x.shape)} with lengths {tuple(length.shape)} of {length.dtype}")
    if int(length.min()) < 0 or int(length.max()) > x.shape[2]:
        raise ValueError(f"lengths {length.tolist()} of texts of which at most {x.shape[2]} keys are there")
    position = _positions(length.long()[:, None], size)
    return _taken(x, position.clamp(min=0)).masked_fill((position < 0)[:, None, :, None], 0)

"""Memories over features without end: every key with the value written at it, read through a kernel of two keys.

κ(x, y) = exp(s (x·y − 1)) on unit keys is the inner product of such features (mixers.md, section 4.7). Here are what
there is to choose, the state, and the definition, token by token.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from atma.ops.fast_weights.state import chosen
from atma.ops.segments import begins


class Kernel(NamedTuple):
    """Which kernel memory it is."""

    sharpness: Tensor
    """s (H,), positive."""
    rule: Literal["add", "delta"] = "add"
    """Write v, or v less what the memory already says of the key."""
    window: int = 1
    """c: how many of the last keys a token writes at."""
    normalise: bool = False
    """Divide what is read by the sum of its weights."""


class KernelState(NamedTuple):
    """Float32 or wider. What is behind a row's length is never read."""

    length: Tensor  # (B,) int32
    keys: Tensor  # (B, H, capacity, K)
    written: Tensor  # (B, H, capacity, V): at n the u of token n − (c − 1), which changes no more
    v_tail: Tensor | None = None  # (B, H, c − 1, V), the oldest first, c > 1
    open: Tensor | None = None  # likewise: the u of the last c − 1 tokens, at whose keys the next ones write

    grows = {"keys": 2, "written": 2}  # noqa: RUF012 (a field otherwise)


def empty_kernel(memory: Kernel, batch: int, capacity: int, widths: tuple[int, int]) -> KernelState:
    """Before the first token of `batch` rows, with room for `capacity` tokens; widths are K and V."""
    s, tail = memory.sharpness, memory.window - 1
    work = torch.promote_types(s.dtype, torch.float32)
    keys, written, behind = (
        torch.zeros(batch, len(s), size, width, dtype=work, device=s.device)
        for size, width in ((capacity, widths[0]), (capacity, widths[1]), (tail, widths[1]))
    )
    length = torch.zeros(batch, dtype=torch.int32, device=s.device)
    return KernelState(length, keys, written, *(behind, behind.clone()) if tail else (None, None))


def unfolded(state: KernelState) -> KernelState:
    """With every u at its key's place, as it is computed with, and zeros behind each row's length."""
    seen = _seen(state)
    keys, written = (torch.where(seen, x, 0.0) for x in (state.keys, state.written))
    if state.open is not None:
        tail = state.open.shape[2]
        written = torch.cat([written[:, :, tail:], torch.zeros_like(written[:, :, :tail])], 2)
        written = written + _last_places(state).mT @ state.open
    return state._replace(keys=keys, written=written)


def folded(state: KernelState) -> KernelState:
    """What is written at a place of `written` is never written again: the u that may be are in `open`."""
    if state.open is None:
        return state
    tail, room = state.open.shape[2], state.written.shape[2]
    written = torch.cat([torch.zeros_like(state.written[:, :, :tail]), state.written[:, :, : max(0, room - tail)]], 2)
    return state._replace(written=torch.where(_seen(state), written, 0.0), open=_last_places(state) @ state.written)


def _seen(state: KernelState) -> Tensor:
    """(B, 1, L, 1), the places of each row's text."""
    places = torch.arange(state.keys.shape[2], device=state.keys.device)
    return (places < state.length[:, None])[:, None, :, None]


def _last_places(state: KernelState) -> Tensor:
    """(B, 1, c − 1, L): 1 where the last tokens are, the oldest first; nowhere before the text."""
    assert state.open is not None
    size = state.open.shape[2]
    back = torch.arange(size, 0, -1, device=state.keys.device)
    places = torch.arange(state.keys.shape[2], device=state.keys.device)
    return (places == (state.length[:, None] - back)[..., None])[:, None].to(state.keys.dtype)


def kernel_memory(
    q: Tensor, k: Tensor, v: Tensor, omega: Tensor, memory: Kernel, state: KernelState, segment_ids: Tensor | None
) -> tuple[Tensor, KernelState]:
    """Arguments of the public function in one dtype throughout."""
    read, after = token_by_token(q, k, v, omega, memory, unfolded(state), segment_ids)
    return read, folded(after)


def token_by_token(
    q: Tensor, k: Tensor, v: Tensor, omega: Tensor, memory: Kernel, state: KernelState, segment_ids: Tensor | None
) -> tuple[Tensor, KernelState]:
    """The same between states that are unfolded."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    begun = None if segment_ids is None else begins(segment_ids)
    fresh = empty_kernel(memory, q.shape[0], state.keys.shape[2], (k.shape[3], v.shape[3]))
    reads = []
    for t in range(q.shape[2]):
        if begun is not None:
            state = chosen(begun[:, t], fresh, state)
        state = _written(k[:, :, t], v[:, :, t], omega[:, :, t], memory, state)
        reads.append(_read(q[:, :, t], memory, state))
    return torch.stack(reads, 2), state


def _written(k: Tensor, v: Tensor, omega: Tensor, memory: Kernel, state: KernelState) -> KernelState:
    """u_{t−j} += ω_{t,j} (v_{t−j} − [rule delta] pred_t(k_{t−j})), u_t from 0, for the j of tokens there are (4.13)."""
    places = torch.arange(state.keys.shape[2], device=k.device)
    back = torch.arange(memory.window - 1, -1, -1, device=k.device)  # j, the oldest first
    lag = places == (state.length[:, None] - back)[..., None]  # (B, c, L): where t − j is; nowhere before the text
    here, lag = lag[:, None, -1, :, None], lag[:, None].to(k.dtype)
    keys = torch.where(here, k[:, :, None], state.keys)
    written = torch.where(here, 0.0, state.written)
    values = v[:, :, None] if state.v_tail is None else torch.cat([state.v_tail, v[:, :, None]], 2)
    tail = None if state.v_tail is None else values[:, :, 1:].clone()  # not what a gradient keeps
    if memory.rule == "delta":
        values = values - weights(lag @ keys, keys, _before(state, state.length), memory) @ written
    written = written + lag.mT @ (omega.index_select(-1, back)[..., None] * values)
    return KernelState(state.length + 1, keys, written, tail, state.open)


def _read(q: Tensor, memory: Kernel, state: KernelState) -> Tensor:
    """y_t = Σ_{i≤t} u_i κ(q_t, k_i), divided by Σ κ if `normalise` (4.14)."""
    kappa = weights(q[:, :, None], state.keys, _before(state, state.length), memory)
    read = kappa @ state.written
    return (read / kappa.sum(-1, keepdim=True) if memory.normalise else read)[:, :, 0]


def weights(x: Tensor, keys: Tensor, seen: Tensor, memory: Kernel) -> Tensor:
    """κ(x, k_i) (B, H, N, L) of x (B, H, N, K), 0 where not seen (B, 1, N or 1, L)."""
    scores = memory.sharpness[:, None, None] * (x @ keys.mT - 1)
    return torch.where(seen, scores, -torch.inf).exp()


def _before(state: KernelState, length: Tensor) -> Tensor:
    """(B, 1, 1, L): the places before each row's length."""
    return (torch.arange(state.keys.shape[2], device=length.device) < length[:, None])[:, None, None]

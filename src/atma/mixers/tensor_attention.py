"""Tensor (Kronecker) attention in a window: a query weighs pairs of tokens (mixers.md, section 5.3; 2310.04064).

A token has two keys and two values. The score of a pair multiplies the query and a key of each of its tokens, and what
is read is the product of a value of each: so a query can ask for two tokens that belong together.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from atma.layers import Linear
from atma.mixers.base import Mixer, Place
from atma.mixers.heads import HeadsConfig
from atma.mixers.window import WindowState, attended
from atma.ops.backend import own_precision
from atma.ops.dense import rms_norm
from atma.ops.polar import visible_range
from atma.strict import require

NORM_EPSILON = 2.0**-23
"""Beside the mean square of queries and keys, before its root."""
NUMBERS = 1 << 22
"""Scores and products of queries and keys that are computed together: 16 MiB of float32 each."""


@dataclass(frozen=True)
class TensorConfig(HeadsConfig):
    """Sizes are counts. The cost of a token is window² · head_width for each head."""

    window: int = 32
    """Keys that a query sees, its own among them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.window >= 1, "window", self.window, "at least 1")


class TensorState(NamedTuple):
    """Four windows of w tokens, two side by side."""

    length: Tensor  # (B,) int32
    keys: Tensor  # (B, G, w, 2·K): k¹ and k², position p at place p mod w
    values: Tensor  # (B, G, w, 2·K): v¹ and v²

    slides = {"keys": 2, "values": 2}  # noqa: RUF012 (a field otherwise)


class TensorAttention(Mixer):
    """o_i = Σ_jl p_i,jl (v¹_j ⊙ v²_l), p the softmax over all pairs of the window of Σ_a q_ia k¹_ja k²_la / K."""

    Config = TensorConfig

    def __init__(self, config: TensorConfig, place: Place) -> None:
        super().__init__()
        self.config, self.heads = config, config.query_heads
        inner, shared = (count * config.head_width for count in (config.query_heads, config.key_value_heads))
        self.q_proj = Linear(place.width, inner, bias=False)
        self.k_proj, self.v_proj = (Linear(place.width, 2 * shared, bias=False) for _ in range(2))
        self.out_proj = Linear(inner, place.width, bias=False)

    def init_state(self, batch: int, capacity: int) -> TensorState:
        """Empty windows; `capacity` has no part in it."""
        weight, config = self.k_proj.weight, self.config
        held = weight.new_zeros(batch, config.key_value_heads, config.window, 2 * config.head_width)
        return TensorState(torch.zeros(batch, dtype=torch.int32, device=weight.device), held, held.clone())

    def forward(
        self, x: Tensor, state: TensorState | None = None, *, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, TensorState | None]:
        """x (B, T, D) to y (B, T, D)."""
        width = self.config.head_width
        q = _normed(self.q_proj(x).unflatten(-1, (-1, width))).transpose(1, 2)
        k = _normed(self.k_proj(x).unflatten(-1, (-1, 2, width))).flatten(-2).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (-1, 2 * width)).transpose(1, 2)
        if state is None:
            return self._out(tensor_attention(q, k, v, self.config.window, None, segment_ids)), None
        seen = attended(WindowState(*state, None, None, None, None), k, v, in_order=False)
        assert seen.held is not None and isinstance(seen.keys, Tensor) and isinstance(seen.values, Tensor)
        if seen.ring:
            read = read_ring(q, seen.keys, seen.values, state.length)
        else:
            read = tensor_attention(q, seen.keys, seen.values, self.config.window, seen.start, None)
        return self._out(read), TensorState(state.length + x.shape[1], *seen.held)  # pyright: ignore

    def _out(self, read: Tensor) -> Tensor:
        return self.out_proj(read.transpose(1, 2).flatten(2))

    def channels(self) -> dict[str, nn.Linear]:
        """`Mixer.channels`."""
        return {"read": self.out_proj}

    @property
    def reach(self) -> int:
        """`Mixer.reach`."""
        return self.config.window - 1


@own_precision
def tensor_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, start: Tensor | None, segment_ids: Tensor | None
) -> Tensor:
    """q (B, H, T, K), k and v (B, G, S, 2·K) in the order of positions to reads (B, H, T, K).

    start (B,): where among the keys each row's first query stands; None: it is the first. segment_ids (B, T), only
    without a start: packed documents. Some queries at a time, and again for their gradients, so that memory is bounded.
    """
    first, last = visible_range(q, start, segment_ids, window)
    some = max(1, NUMBERS // (q.shape[0] * q.shape[1] * window * max(window, q.shape[3])))
    back = torch.arange(window, device=q.device)
    reads = []
    for queries, ends, begins in zip(q.split(some, 2), last.split(some, 1), first.split(some, 1), strict=True):
        place = (ends.unsqueeze(-1) - 1 - back).long()  # (B, Q, w)
        arguments = queries, k, v, place.clamp(min=0), place < begins.unsqueeze(-1)
        if torch.is_grad_enabled() and some < q.shape[2]:
            reads.append(checkpoint(_windows, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            reads.append(_windows(*arguments))
    return torch.cat(reads, 2).to(q.dtype)


@own_precision
def read_ring(q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
    """`tensor_attention` of one query a row at position `length` (B,) on the rings (B, G, w, 2·K) with its keys."""
    hidden = torch.arange(k.shape[2], device=q.device) > length[:, None, None]
    return _read(q, k.unsqueeze(2), v.unsqueeze(2), hidden).to(q.dtype)


def _windows(q: Tensor, k: Tensor, v: Tensor, place: Tensor, hidden: Tensor) -> Tensor:
    """`_read` of the keys and values at place (B, Q, w); hidden ones are zero, whatever is there."""
    index = place.flatten(1)[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
    near = (x.gather(2, index).unflatten(2, place.shape[1:]) for x in (k, v))
    k, v = (x.masked_fill(hidden[:, None, :, :, None], 0) for x in near)
    return _read(q, k, v, hidden)


def _read(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """q (B, H, Q, K), k and v (B, G, Q, w, 2·K), hidden (B, Q, w): tokens that a query does not see. (B, H, Q, K)."""
    work, width = torch.promote_types(q.dtype, torch.float32), q.shape[3]
    q = q.to(work).unflatten(1, (k.shape[1], -1)).unsqueeze(4)  # (B, G, H/G, Q, 1, K)
    (k1, k2), (v1, v2) = (x.to(work).unsqueeze(2).split(width, -1) for x in (k, v))
    score = (q * k1 @ k2.mT / width).flatten(1, 2)  # (B, H, Q, w, w)
    unseen = (hidden.unsqueeze(-1) | hidden.unsqueeze(-2)).unsqueeze(1)
    share = score.masked_fill(unseen, -torch.inf).flatten(-2).softmax(-1).view(score.shape)
    read = share.unflatten(1, (k.shape[1], -1)) @ v2
    return (v1 * read).sum(-2).flatten(1, 2)


def _normed(x: Tensor) -> Tensor:
    return rms_norm(x, None, x.shape[-1], NORM_EPSILON)


SMALL = (
    {"query_heads": 2, "key_value_heads": 1, "head_width": 8, "window": 5},
    {"query_heads": 2, "key_value_heads": 2, "head_width": 3, "window": 1},
)

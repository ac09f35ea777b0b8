"""RCMHA: attention over relative positions behind short convolutions, in a window (mixers.md, section 5.2; 2308.03429).

Transformer-XL's scores: the content of a key, how far back it lies, and a bias for each of the two. The tables have a
row for each distance in the window, which slides along the text instead of beginning anew at each call.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from atma.layers import Linear
from atma.mixers.base import Mixer, Place
from atma.mixers.gated_conv import advance
from atma.mixers.heads import HeadsConfig
from atma.mixers.window import WindowState, attended
from atma.ops import causal_conv
from atma.ops.backend import own_precision
from atma.ops.polar import visible_range
from atma.ops.polar.poison import poisoned
from atma.strict import require

TAPS = 3
BLOCK = 128
"""Queries whose scores are computed together."""


@dataclass(frozen=True)
class RelativeConfig(HeadsConfig):
    """Sizes are counts."""

    window: int = 128
    """Keys that a query sees, its own among them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.window >= 1, "window", self.window, "at least 1")


class RelativeState(NamedTuple):
    """A window of R keys and values after their convolutions, and the last inputs of these."""

    length: Tensor  # (B,) int32
    keys: Tensor  # (B, G, R, K): position p at place p mod R
    values: Tensor  # (B, G, R, K)
    q_tail: Tensor  # (B, 2, H·K)
    k_tail: Tensor  # (B, 2, G·K)
    v_tail: Tensor

    slides = {"keys": 2, "values": 2}  # noqa: RUF012 (a field otherwise)


class Tables(NamedTuple):
    """What is learned of distances, and of keys whatever the query."""

    u: Tensor  # (H, K)
    r: Tensor  # (window, H, K)
    b: Tensor  # (window, H)


class RelativeAttention(Mixer):
    """q, k, v = conv(Linear(x)); logit of the key j for the query i: ((q_i + u)·k_j + q_i·r_{i−j} + b_{i−j}) / √K."""

    Config = RelativeConfig
    vectors = ("r",)

    def __init__(self, config: RelativeConfig, place: Place) -> None:
        super().__init__()
        self.config, self.heads = config, config.query_heads
        heads, width, window = config.query_heads, config.head_width, config.window
        inner, shared = heads * width, config.key_value_heads * width
        self.q_proj = Linear(place.width, inner, bias=False)
        self.k_proj, self.v_proj = (Linear(place.width, shared, bias=False) for _ in range(2))
        self.q_taps, self.k_taps, self.v_taps = (nn.Parameter(torch.empty(width, TAPS)) for _ in range(3))
        self.q_bias, self.k_bias, self.v_bias = (nn.Parameter(torch.empty(width)) for _ in range(3))
        self.u = nn.Parameter(torch.empty(heads, width))
        self.r = nn.Parameter(torch.empty(window, heads, width))
        self.b = nn.Parameter(torch.empty(window, heads))
        self.out_proj = Linear(inner, place.width, bias=False)

    def init_weights(self, generator: torch.Generator | None) -> None:
        """`Mixer.init_weights`: convolutions begin as the token itself, tables and biases at zero."""
        super().init_weights(generator)
        for parameter in (self.u, self.r, self.b, self.q_bias, self.k_bias, self.v_bias):
            nn.init.zeros_(parameter)
        for taps in (self.q_taps, self.k_taps, self.v_taps):
            nn.init.zeros_(taps)
            nn.init.ones_(taps[:, -1])

    def init_state(self, batch: int, capacity: int) -> RelativeState:
        """An empty window; `capacity` has no part in it."""
        weight, config = self.k_proj.weight, self.config
        held = weight.new_zeros(batch, config.key_value_heads, config.window, config.head_width)
        sizes = (proj.weight.shape[0] for proj in (self.q_proj, self.k_proj, self.v_proj))
        tails = (weight.new_zeros(batch, TAPS - 1, size) for size in sizes)
        length = torch.zeros(batch, dtype=torch.int32, device=weight.device)
        return RelativeState(length, held, held.clone(), *tails)

    def forward(
        self, x: Tensor, state: RelativeState | None = None, *, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, RelativeState | None]:
        """x (B, T, D) to y (B, T, D)."""
        inputs = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        tails = (None,) * 3 if state is None else state[3:]
        q, k, v = self._convolved(inputs, tails, segment_ids)
        tables = Tables(self.u, self.r, self.b)
        if state is None:
            return self._out(relative_attention(q, k, v, tables, None, segment_ids)), None
        seen = attended(WindowState(*state[:3], None, None, None, None), k, v, in_order=False)
        assert seen.held is not None and isinstance(seen.keys, Tensor) and isinstance(seen.values, Tensor)
        if seen.ring:
            read = read_ring(q, seen.keys, seen.values, tables, state.length)
        else:
            read = relative_attention(q, seen.keys, seen.values, tables, seen.start, None)
        tails = (advance(tail, z.to(tail.dtype)) for tail, z in zip(state[3:], inputs, strict=True))
        return self._out(read), RelativeState(state.length + x.shape[1], *seen.held, *tails)  # pyright: ignore

    def _convolved(self, inputs: tuple[Tensor, ...], tails: tuple, segment_ids: Tensor | None) -> list[Tensor]:
        """q (B, H, T, K), k and v (B, G, T, K) behind their convolutions, whose taps the heads share."""
        convolutions = ((self.q_taps, self.q_bias), (self.k_taps, self.k_bias), (self.v_taps, self.v_bias))
        found = []
        for z, tail, (taps, bias) in zip(inputs, tails, convolutions, strict=True):
            each = taps.repeat(z.shape[-1] // taps.shape[0], 1)
            mixed = causal_conv(z, each, None if tail is None else tail.to(z.dtype), segment_ids)
            found.append((mixed.unflatten(-1, (-1, taps.shape[0])) + bias.to(z.dtype)).transpose(1, 2))
        return found

    def _out(self, read: Tensor) -> Tensor:
        return self.out_proj(read.transpose(1, 2).flatten(2))

    def channels(self) -> dict[str, nn.Linear]:
        """`Mixer.channels`."""
        return {"read": self.out_proj}

    @property
    def reach(self) -> int:
        """`Mixer.reach`."""
        return self.config.window - 1 + TAPS - 1


@own_precision
def relative_attention(
    q: Tensor, k: Tensor, v: Tensor, tables: Tables, start: Tensor | None, segment_ids: Tensor | None
) -> Tensor:
    """q (B, H, T, K), k and v (B, G, S, K) in the order of positions to reads (B, H, T, K).

    start (B,), at most window − 1: where among the keys each row's first query stands; None: it is the first.
    segment_ids (B, T), only without a start: packed documents. Scores are float32 or wider.
    """
    length, window = q.shape[2], tables.r.shape[0]
    first, last = visible_range(q, start, segment_ids, window)
    bad, spoilt = poisoned(k, v, first, last)  # a hidden key has the weight 0, but 0 · NaN is NaN
    k, v = (x.masked_fill(bad.unsqueeze(-1), 0) for x in (k, v))
    spoilt = spoilt.repeat_interleave(q.shape[1] // k.shape[1], 1).unsqueeze(-1)
    ahead = 0 if start is None else window - 1
    reads = []
    for i in range(0, length, BLOCK):
        rows = slice(i, min(i + BLOCK, length))
        near = slice(max(0, i - window + 1), min(rows.stop + ahead, k.shape[2]))
        place = torch.arange(near.start, near.stop, device=q.device)
        lag = last[:, rows, None] - 1 - place
        count = (last - first)[:, rows, None]
        reads.append(_read(q[:, :, rows], k[:, :, near], v[:, :, near], tables, lag, count))
    return torch.cat(reads, 2).masked_fill(spoilt, torch.nan).to(q.dtype)


@own_precision
def read_ring(q: Tensor, k: Tensor, v: Tensor, tables: Tables, length: Tensor) -> Tensor:
    """`relative_attention` of one query a row at position `length` (B,) on the rings (B, G, window, K) with its key."""
    window = k.shape[2]
    lag = (length[:, None, None] - torch.arange(window, device=q.device)) % window
    return _read(q, k, v, tables, lag, (length + 1).clamp(max=window)[:, None, None]).to(q.dtype)


def _read(q: Tensor, k: Tensor, v: Tensor, tables: Tables, lag: Tensor, count: Tensor) -> Tensor:
    """q (B, H, Q, K) on k and v (B, G, S, K); lag (B, Q, S): how far back each lies, seen from 0 to count (B, Q, 1)."""
    work, groups = torch.promote_types(q.dtype, torch.float32), k.shape[1]
    q, k, v, u, r, b = (x.to(work) for x in (q, k, v, *tables))
    by_lag = q @ r.permute(1, 2, 0) + b.mT.unsqueeze(1)  # (B, H, Q, window)
    place = lag.clamp(0, r.shape[0] - 1).long().unsqueeze(1).expand(-1, q.shape[1], -1, -1)
    # Heads that share a key head are rows of one product.
    grouped = (q + u.unsqueeze(1)).unflatten(1, (groups, -1)).flatten(2, 3)
    score = (grouped @ k.mT).view(place.shape) + by_lag.gather(-1, place)
    hidden = ((lag < 0) | (lag >= count)).unsqueeze(1)
    share = (score * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf).softmax(-1)
    return (share.view(*grouped.shape[:3], -1) @ v).view(q.shape)


SMALL = (
    {"query_heads": 2, "key_value_heads": 1, "head_width": 8, "window": 7},
    {"query_heads": 2, "key_value_heads": 2, "head_width": 3, "window": 1},
)

"""Superlinear attention: a window, and the spans of a text to which a search over square distances leads (2601.18401).

A query at i scores the anchors i − s², one number each, for the about √i stripes s beyond its window; the spans around
the best of them are read as the window is, each by a softmax of its own, and the anchors' scores weigh what is read. So
a token costs about √i products to search and as many keys to read, and every distance lies in some span: the one of s
is from s² − s to s² + 3s (mixers.md, section 6.6). The choice has no gradient; the weights of the chosen teach the
search.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from atma.layers import Linear
from atma.mixers.attention import Attention
from atma.mixers.attention_config import AttentionConfig, Settings
from atma.mixers.base import Place
from atma.mixers.gated_conv import advance
from atma.ops import recurrence
from atma.ops.backend import own_precision
from atma.ops.chosen import hold_rows
from atma.ops.polar.poison import poisoned
from atma.ops.segments import document_start
from atma.strict import require

AT_ONCE = 1 << 22
"""Numbers of keys, or of weights, that are gathered or computed together."""
KEEP = 3.9
"""Of an anchor's accumulated input: what its gate starts at, so that a token keeps σ(3.9) = 0.98 of it."""


@dataclass(frozen=True)
class SuperlinearConfig(AttentionConfig):
    """And the search; no positions and no memory, if nothing else is said. Sizes are counts."""

    core: str = "nope"
    memory: bool | str = False
    stripes: int = 65
    """Stripes that the window takes the place of: it holds (stripes + 1)² − 1 tokens. What is searched beyond it learns
    from texts that are longer than that alone."""
    spans: int = 2
    """Spans that a query and head reads beside its window."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("stripes", "spans"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.window is None, "window", self.window, "left out: 'stripes' says what is always read")
        require(self.core in ("nope", "rope"), "core", self.core, "nope or rope")


class SuperlinearState(NamedTuple):
    """As `GlobalState`, with the anchor keys and the accumulated input of the last of them."""

    length: Tensor
    keys: Tensor  # (B, G, capacity, K)
    values: Tensor  # (B, G, capacity, K)
    anchors: Tensor  # (B, G, capacity, K)
    q_tail: Tensor | None
    k_tail: Tensor | None
    v_tail: Tensor | None
    memory: Any
    accumulated: Tensor  # (B, G, K, 1): m, float32 or wider

    grows = {"keys": 2, "values": 2, "anchors": 2}  # noqa: RUF012 (a field otherwise)


class Searched(NamedTuple):
    """What is searched and read, of a call or of a state."""

    anchors: Tensor  # (B, G, S, K)
    keys: Tensor  # (B, G, S, K)
    values: Tensor  # (B, G, S, K)


class Sizes(NamedTuple):
    """What the search goes by."""

    stripes: int
    spans: int
    scale: float
    """Of the logits of keys."""
    whole: bool
    """Whether products with all keys are made, as is best for many queries from the first on; else keys are gathered,
    whose number does not grow with the text as fast."""


class Superlinear(Attention):
    """`Attention` over a window and searched spans, with the positions and the scale of its core."""

    Config = SuperlinearConfig

    def __init__(self, config: Settings, place: Place) -> None:
        super().__init__(config, place)
        own = self.own = cast(SuperlinearConfig, config.own)
        shared = self.groups * self.head_width
        self.anchor_q = Linear(place.width, self.heads * self.head_width, bias=False)
        self.anchor_k = Linear(place.width, shared, bias=False)
        self.anchor_m = Linear(place.width, shared, bias=False)
        self.anchor_keep = Linear(place.width, self.groups)
        self.window_score = nn.Parameter(torch.empty(self.heads))
        self.core.window = (own.stripes + 1) ** 2 - 1

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None) -> None:
        """`Mixer.init_weights`: the window starts at the score 0."""
        super().init_weights(generator)
        nn.init.zeros_(self.window_score)

    def init_state(self, batch: int, capacity: int) -> SuperlinearState:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`Attention.init_state`, and no anchors."""
        length, keys, values, *rest = cast(tuple[Any, ...], super().init_state(batch, capacity))
        work = torch.promote_types(keys.dtype, torch.float32)
        m = keys.new_zeros(batch, self.groups, self.head_width, 1, dtype=work)
        return SuperlinearState(length, keys, values, torch.zeros_like(keys), *rest, m)  # pyright: ignore[reportCallIssue]

    def steady(self, on: bool = True) -> bool:
        """`Mixer.steady`: it has no such form."""
        return False

    def anchor_parts(self, x: Tensor, m: Tensor | None, segment_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Of x (B, T, D): anchor queries (B, H, T, K), anchor keys (B, G, T, K), and m (B, G, K, 1) after them."""
        work = torch.promote_types(x.dtype, torch.float32)
        q, k, new = (
            layer(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for layer in (self.anchor_q, self.anchor_k, self.anchor_m)
        )
        keep = (self.anchor_keep(x).to(work) + KEEP).transpose(1, 2)  # (B, G, T)
        one = keep.new_ones(len(x), 1, x.shape[1], 1)
        added = new.to(work) * torch.sigmoid(-keep).unsqueeze(-1)
        heard, m = recurrence(one, one, added, F.logsigmoid(keep), memory=m, segment_ids=segment_ids)
        return q, k + heard.to(k.dtype), m

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, state: SuperlinearState | None = None, *, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, SuperlinearState | None]:
        """x (B, T, D) to y (B, T, D)."""
        projected = self.project(x, cast(Any, state), segment_ids)
        start = None if state is None else state.length
        q, k = self.core.turn(projected.q, projected.k, start, segment_ids)
        search, anchors, m = self.anchor_parts(x, None if state is None else state.accumulated, segment_ids)
        held = Searched(anchors, k, projected.v)
        if state is not None:
            before = (state.anchors, state.keys, state.values)
            held = Searched(*(cast(Tensor, hold_rows(h, z, state.length)) for h, z in zip(before, held, strict=True)))
        near = self.core(q, held.keys, held.values, start, segment_ids)[0]
        sizes = Sizes(self.own.stripes, self.own.spans, float(cast(Any, self.core).scale), state is None)
        read = read_spans((search, q), held, near, self.window_score, standing(x, start, segment_ids), sizes)
        y, memory = self.output(x, projected, (read, None), state, segment_ids)
        if state is None:
            return y, None
        tails = (state.q_tail, state.k_tail, state.v_tail)
        after: Any = (
            None if t is None else advance(t, z.to(t.dtype)) for t, z in zip(tails, projected.inputs, strict=True)
        )
        length = state.length + x.shape[1]
        return y, SuperlinearState(length, held.keys, held.values, held.anchors, *after, memory, m)  # pyright: ignore[reportCallIssue]


def standing(x: Tensor, start: Tensor | None, segment_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where among the keys the tokens of x (B, T, D) stand, and the first of each's document, both (B, T)."""
    place = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    if start is not None:
        place = place + start.long()[:, None]
    return place, torch.zeros_like(place) if segment_ids is None else document_start(segment_ids).long()


@own_precision
def read_spans(
    queries: tuple[Tensor, Tensor],
    held: Searched,
    near: Tensor,
    window_score: Tensor,
    where: tuple[Tensor, Tensor],
    sizes: Sizes,
) -> Tensor:
    """What queries read (B, H, T, K) of their best spans, and of their windows, whose reads are `near`.

    queries: anchor queries and queries (B, H, T, K); window_score (H,); where: as `standing` tells.
    """
    (search, q), most = queries, math.isqrt(held.keys.shape[2] - 1)
    if most <= sizes.stripes:
        return near
    if sizes.whole:  # Products with all keys are made, and 0 · NaN is NaN.
        first, last = (z.to(torch.int32) for z in (where[1], where[0] + 1))
        bad, spoilt = poisoned(torch.cat([held.anchors, held.keys], -1), held.values, first, last)
        held = Searched(*(z.masked_fill(bad.unsqueeze(-1), 0) for z in held))
    groups, width = held.keys.shape[1], held.keys.shape[3]
    each = q.shape[0] * q.shape[1] * sizes.spans * (held.keys.shape[2] if sizes.whole else (4 * most + 1) * width)
    step, reads = max(1, AT_ONCE // each), []
    for i in range(0, q.shape[2], step):
        some = slice(i, i + step)
        parts = [z[:, :, some].unflatten(1, (groups, -1)) for z in (search, q, near)]
        given = (*parts, held, window_score, tuple(z[:, some] for z in where), sizes)
        again = torch.is_grad_enabled() and step < q.shape[2]
        if again:
            read = cast(Tensor, checkpoint(_read, *given, use_reentrant=False, preserve_rng_state=False))
        else:
            read = _read(*given)  # pyright: ignore[reportCallIssue]
        reads.append(read.flatten(1, 2))
    found = torch.cat(reads, 2) if len(reads) > 1 else reads[0]
    if sizes.whole:
        found = found.masked_fill(spoilt.repeat_interleave(q.shape[1] // groups, 1).unsqueeze(-1), torch.nan)  # pyright: ignore[reportPossiblyUnboundVariable]
    return found.to(q.dtype)


def _read(
    search: Tensor,
    q: Tensor,
    near: Tensor,
    held: Searched,
    window_score: Tensor,
    where: tuple[Tensor, Tensor],
    sizes: Sizes,
) -> Tensor:
    """`read_spans` of some queries at once; search, q and near (B, G, N, Q, K), where N heads share a key."""
    work = torch.promote_types(q.dtype, torch.float32)
    score, stripe = _best(search, held.anchors, where, sizes)
    beside = window_score.to(work).view(1, *q.shape[1:3], 1, 1).expand(*score.shape[:-1], 1)
    share, own = torch.cat([score, beside], -1).softmax(-1).split((score.shape[-1], 1), -1)
    place, opening = (z[:, None, None, :, None] for z in where)
    end = torch.minimum(place - stripe * stripe + stripe, place - ((sizes.stripes + 1) ** 2 - 1))
    begin = place - stripe * stripe - 3 * stripe  # (B, G, N, Q, n)
    if sizes.whole:
        index = torch.arange(held.keys.shape[2], device=q.device)
    else:
        index = begin.unsqueeze(-1) + torch.arange(4 * math.isqrt(held.keys.shape[2] - 1) + 1, device=q.device)
    seen = (index >= torch.maximum(begin, opening).unsqueeze(-1)) & (index <= end.unsqueeze(-1))
    absent = (score == -torch.inf).unsqueeze(-1)
    q = q.to(work) * sizes.scale
    if sizes.whole:
        a = torch.einsum("bgnqk,bgsk->bgnqs", q, held.keys.to(work)).unsqueeze(-2)
        weight = _softmax(a, seen, absent) * share.unsqueeze(-1)
        far = torch.einsum("bgnqs,bgsk->bgnqk", weight.sum(-2), held.values.to(work))
    else:
        keys, values = (_at(z, index, seen).to(work) for z in held[1:])
        weight = _softmax(torch.einsum("bgnqk,bgnqsjk->bgnqsj", q, keys), seen, absent) * share.unsqueeze(-1)
        far = torch.einsum("bgnqsj,bgnqsjk->bgnqk", weight, values)
    return far + own * near.to(work)


def _best(search: Tensor, anchors: Tensor, where: tuple[Tensor, Tensor], sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Scores and stripes (B, G, N, Q, n) of the best anchors, of equal ones the nearest; −∞ where there is none."""
    work = torch.promote_types(search.dtype, torch.float32)
    stripes = torch.arange(sizes.stripes + 1, math.isqrt(anchors.shape[2] - 1) + 1, device=search.device)
    place = where[0].unsqueeze(-1) - stripes * stripes  # (B, Q, S)
    real = place >= where[1].unsqueeze(-1)
    search = search.to(work) * search.shape[-1] ** -0.5
    if sizes.whole:
        score = torch.einsum("bgnqk,bgsk->bgnqs", search, anchors.to(work))
        score = score.gather(-1, place.clamp(min=0)[:, None, None].expand(*search.shape[:-1], -1))
    else:
        found = _at(anchors, place[:, None, None], real[:, None, None])[:, :, 0].to(work)
        score = torch.einsum("bgnqk,bgqsk->bgnqs", search, found)
    score = score.masked_fill(~real[:, None, None], -torch.inf)
    left, index, best, none = score.detach(), torch.arange(len(stripes), device=search.device), [], []
    for _ in range(min(sizes.spans, len(stripes))):  # a few, and by what a recorded step has kernels for
        top = left.amax(-1, keepdim=True)
        best.append(torch.where(left == top, index, len(stripes) - 1).amin(-1, keepdim=True))
        none.append(top == -torch.inf)
        left = left.masked_fill(index == best[-1], -torch.inf)
    chosen = torch.cat(best, -1)
    return score.gather(-1, chosen).masked_fill(torch.cat(none, -1), -torch.inf), chosen + (sizes.stripes + 1)


def _at(x: Tensor, index: Tensor, seen: Tensor) -> Tensor:
    """Rows of x (B, G, S, K) at an index (B, G or 1, …), zero where they are not seen."""
    over = [1] * (index.ndim - 2)
    row = torch.arange(x.shape[0], device=x.device).view(-1, 1, *over)
    head = torch.arange(x.shape[1], device=x.device).view(1, -1, *over)
    return x[row, head, index.clamp(0, x.shape[2] - 1)].masked_fill(~seen.unsqueeze(-1), 0)


def _softmax(a: Tensor, seen: Tensor, absent: Tensor) -> Tensor:
    """Weights of what is seen, along the last axis; zero where all is absent."""
    return a.masked_fill(~seen, -torch.inf).masked_fill(absent, 0).softmax(-1)


SMALL = tuple(
    {"query_heads": 2, "key_value_heads": 1, "head_width": 8} | more
    for more in ({"stripes": 1}, {"stripes": 1, "spans": 1, "core": "rope", "memory": True})
)

"""Landmark attention: one softmax over the own block and landmarks of earlier ones, another in each (2305.16300).

The weight of a token of an earlier block is that of the block's landmark times its own in the block (mixers.md, section
5.8). Its logit less the block's logarithm of sums plus the landmark's is therefore its logit in one softmax over all of
them. At run time only the blocks of the best landmarks may be read. Blocks are those of the absolute grid, and a
landmark is the key of the mean of its block, so that it takes no place in the text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atma.mixers.attention import Attention
from atma.mixers.attention_config import AttentionConfig, Settings
from atma.mixers.base import Place
from atma.mixers.gated_conv import advance
from atma.mixers.grid import begun_in, best_of, grid_of, whole_pages
from atma.mixers.policies.base import Policy
from atma.ops.backend import own_precision
from atma.ops.chosen import hold_rows, hold_summaries
from atma.ops.dense import rms_norm
from atma.ops.polar import visible_range
from atma.ops.polar.poison import poisoned
from atma.strict import LATER, require

AT_ONCE = 1 << 21
"""Scores that are computed together."""


@dataclass(frozen=True)
class LandmarkConfig(AttentionConfig):
    """And the blocks; rotary positions and no memory, if nothing else is said. Sizes are counts."""

    core: str = "rope"
    memory: bool | str = False
    block: int = 50
    """Tokens of a block."""
    blocks_read: int | None = field(default=None, metadata=LATER)
    """Earlier blocks that a query reads, those of the best landmarks; None: all, as in training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.block >= 1, "block", self.block, "at least 1")
        read = self.blocks_read
        require(read is None or read >= 1, "blocks_read", read, "at least 1, or left out for all")
        require(self.window is None, "window", self.window, "left out: blocks are what is read")
        require(self.core in ("rope", "nope"), "core", self.core, "rope or nope")


class LandmarkState(NamedTuple):
    """As `GlobalState`, with the landmarks of full blocks, zero before, and the sum of what the next one is made of."""

    length: Tensor
    keys: Tensor  # (B, G, capacity, K)
    values: Tensor  # (B, G, capacity, K)
    landmarks: Tensor  # (B, G, capacity, ceil(K / block)): the K numbers of a block spread over its tokens
    q_tail: Tensor | None
    k_tail: Tensor | None
    v_tail: Tensor | None
    memory: Any
    total: Tensor  # (B, D): the sum of x over the current block, float32 or wider

    grows = {"keys": 2, "values": 2, "landmarks": 2}  # noqa: RUF012 (a field otherwise)


class Blocks(NamedTuple):
    """Keys and values in blocks, with the landmark of each."""

    keys: Tensor  # (B, G, P, b, K)
    values: Tensor  # (B, G, P, b, K)
    landmarks: Tensor  # (B, G, P, K)


class Standing(NamedTuple):
    """Where the queries of a call stand in the blocks."""

    block: Tensor  # (B, T): the block of each
    place: Tensor  # (B, T): the place in it
    opening: Tensor  # (B, T): the first block of its document


class LandmarkAttention(Attention):
    """`Attention` through landmarks, with the positions and the scale of its core."""

    Config = LandmarkConfig

    def __init__(self, config: Settings, place: Place) -> None:
        super().__init__(config, place)
        self.own = cast(LandmarkConfig, config.own)
        self.most = self.own.blocks_read
        self.shift = nn.Parameter(torch.empty(place.width))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None) -> None:
        """`Mixer.init_weights`: a landmark starts as the key of its block's mean."""
        super().init_weights(generator)
        nn.init.zeros_(self.shift)

    def init_state(self, batch: int, capacity: int) -> LandmarkState:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`Attention.init_state`, and no landmarks."""
        length, keys, values, *rest = cast(tuple[Any, ...], super().init_state(batch, capacity))
        weight, block = self.q_proj.weight, self.own.block
        landmarks = weight.new_zeros(batch, self.groups, capacity, -(-self.head_width // block))
        total = weight.new_zeros(batch, self.width, dtype=torch.promote_types(weight.dtype, torch.float32))
        return LandmarkState(length, keys, values, landmarks, *rest, total)  # pyright: ignore[reportCallIssue]

    def landmarks_of(self, mean: Tensor) -> Tensor:
        """Landmarks (B, G, P, K) of the means (B, P, D) of blocks."""
        norm = rms_norm(mean.to(self.shift.dtype) + self.shift, None, self.width, self.epsilon)
        key = self.k_proj(norm).unflatten(-1, (self.groups, -1))
        return rms_norm(key, None, self.head_width, self.epsilon).transpose(1, 2)

    chooses = True

    @property
    def selects(self) -> bool:
        """`Mixer.selects`: how many blocks are read may be said anew."""
        return True

    def select(self, policy: Policy | None, reads_call: bool = False) -> None:
        """`Mixer.select`, of the policy `pages`."""
        self.most = self.own.blocks_read if policy is None else policy.config.k

    def steady(self, on: bool = True) -> bool:
        """`Mixer.steady`: there is no such form yet."""
        return False

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, state: LandmarkState | None = None, *, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, LandmarkState | None]:
        """x (B, T, D) to y (B, T, D)."""
        projected = self.project(x, cast(Any, state), segment_ids)
        q, k, v = projected.q, projected.k, projected.v
        turned, keys = self.core.turn(q, k, None if state is None else state.length, segment_ids)
        scale = float(cast(Any, self.core).scale)
        if state is None:
            read, held, total = self._from_beginning(x, (q, turned, keys, v), segment_ids, scale), None, None
        else:
            *held, total = self._held(state, x, keys, v)
            read = self._behind((q, turned), held, state.length, scale)
        y, memory = self.output(x, projected, (read, None), state, segment_ids)
        if state is None or held is None or total is None:
            return y, None
        tails = (state.q_tail, state.k_tail, state.v_tail)
        after: Any = (
            None if t is None else advance(t, z.to(t.dtype)) for t, z in zip(tails, projected.inputs, strict=True)
        )
        return y, LandmarkState(state.length + x.shape[1], *cast(Any, held), *after, memory, total)  # pyright: ignore[reportCallIssue]

    def _from_beginning(self, x: Tensor, given: tuple[Tensor, ...], segment_ids: Tensor | None, scale: float) -> Tensor:
        """What texts read from their first token on; given: bare queries, queries, keys and values."""
        (q, turned, keys, v), b, tokens = given, self.own.block, x.shape[1]
        grid = grid_of(tokens, b, segment_ids, x.device)
        index = grid.begin[..., None] + torch.arange(b, device=x.device)  # (B or 1, P, b)
        index = index.clamp(max=tokens - 1).expand(x.shape[0], -1, -1)
        mean = x[torch.arange(len(x), device=x.device)[:, None, None], index].mean(2)
        bad, spoilt = poisoned(keys, v, *visible_range(q, None, segment_ids, None))
        keys, v = (z.masked_fill(bad.unsqueeze(-1), 0) for z in (keys, v))
        k, v = (z[torch.arange(len(z))[:, None, None], :, index].permute(0, 3, 1, 2, 4) for z in (keys, v))
        blocks = Blocks(k, v, self.landmarks_of(mean))
        opening = grid.page.gather(1, grid.document)
        index = torch.arange(tokens, device=x.device)
        stand = Standing(grid.page, (index - grid.document) % b, opening)
        stand = Standing(*(z.expand(len(x), -1) for z in stand))
        read = landmark_attention(q, turned, blocks, stand, scale, self.most)
        spoilt = spoilt.repeat_interleave(q.shape[1] // keys.shape[1], 1).unsqueeze(-1)
        return read.masked_fill(spoilt, torch.nan)

    def _held(self, state: LandmarkState, x: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
        """Keys, values, landmarks and the sum of the current block after new x, k and v."""
        keys, values = (hold_rows(held, z, state.length) for held, z in ((state.keys, k), (state.values, v)))
        b, tokens, work = self.own.block, x.shape[1], state.total.dtype
        number, full = begun_in(state.length, tokens, b)
        phase = state.length.long()[:, None] % b
        slot = (phase + torch.arange(tokens, device=x.device)) // b
        sums = F.pad(state.total[:, None], (0, 0, 0, number.shape[1]))
        sums = sums.scatter_add(1, slot[..., None].expand_as(x), x.to(work))
        landmarks = self.landmarks_of(sums[:, :-1] / b)
        total = sums.gather(1, ((phase + tokens) // b)[..., None].expand(-1, -1, x.shape[2]))[:, 0]
        return keys, values, hold_summaries(state.landmarks, landmarks, number, full, b), total

    def _behind(self, queries: tuple[Tensor, Tensor], held: Sequence[Tensor], start: Tensor, scale: float) -> Tensor:
        """What queries, bare and with positions, read of what is held; row b's first stands at start[b]."""
        (q, turned), (keys, values, spread), b = queries, held, self.own.block
        pages = (int(start.max()) + q.shape[2] - 1) // b + 1
        spread = F.pad(spread, (0, 0, 0, max(0, pages * b - spread.shape[2])))
        bad, spoilt = poisoned(keys, values, *visible_range(q, start, None, None))
        keys, values = (z.masked_fill(bad.unsqueeze(-1), 0) for z in (keys, values))
        room = max(0, pages * b - keys.shape[2])
        k, v = (F.pad(z, (0, 0, 0, room))[:, :, : pages * b].unflatten(2, (pages, b)) for z in (keys, values))
        blocks = Blocks(k, v, whole_pages(spread, b, pages, q.shape[-1]))
        position = start.long()[:, None] + torch.arange(q.shape[2], device=q.device)
        stand = Standing(position // b, position % b, torch.zeros_like(position))
        read = landmark_attention(q, turned, blocks, stand, scale, self.most)
        return read.masked_fill(spoilt.repeat_interleave(q.shape[1] // keys.shape[1], 1).unsqueeze(-1), torch.nan)


@own_precision
def landmark_attention(
    bare: Tensor, q: Tensor, blocks: Blocks, stand: Standing, scale: float, count: int | None = None
) -> Tensor:
    """(5.4): what queries q (B, H, T, K) read (B, H, T, K) of tokens, and bare ones, without positions, of landmarks.

    count: only so many earlier blocks a query and head, those of the best landmarks; None: all.
    """
    _, heads, tokens, _ = q.shape
    pages, b = blocks.keys.shape[2:4]
    each = heads * b * (pages if count is None else min(count, pages) * q.shape[-1])
    step = max(1, AT_ONCE // each)
    reads = []
    for i in range(0, tokens, step):
        rows = slice(i, i + step)
        some = Standing(*(z[:, rows] for z in stand))
        reads.append(_read(bare[:, :, rows], q[:, :, rows], blocks, some, scale, count))
    return torch.cat(reads, 2).to(q.dtype)


def _read(bare: Tensor, q: Tensor, blocks: Blocks, stand: Standing, scale: float, count: int | None) -> Tensor:
    """`landmark_attention` of some queries, all at once."""
    work = torch.promote_types(q.dtype, torch.float32)
    group, pages = q.shape[1] // blocks.keys.shape[1], blocks.keys.shape[2]
    bare, q = bare.to(work) * scale, q.to(work) * scale
    keys, values, landmarks = (z.to(work).repeat_interleave(group, 1) for z in blocks)
    index = torch.arange(pages, device=q.device)
    earlier = ((index < stand.block[..., None]) & (index >= stand.opening[..., None]))[:, None]
    found = (bare @ landmarks.mT).masked_fill(~earlier, -torch.inf)  # (B, H, Q, P)
    if count is None:
        a = torch.einsum("bhqk,bhpjk->bhqpj", q, keys)
    else:
        best = best_of(found, count)  # (B, H, Q, n)
        found = found.gather(-1, best)
        keys_read, values_read = _taken(keys, best), _taken(values, best)
        a = torch.einsum("bhqk,bhqpjk->bhqpj", q, keys_read)
    hidden = torch.isneginf(found)[..., None]
    within = a.masked_fill(hidden, 0).log_softmax(-1)
    a = (within + found[..., None]).masked_fill(hidden, -torch.inf).flatten(-2)
    mine = stand.block[:, None, :, None].expand(-1, q.shape[1], -1, -1)
    own = torch.einsum("bhqk,bhqpjk->bhqpj", q, _taken(keys, mine))[..., 0, :]
    later = torch.arange(keys.shape[3], device=q.device) > stand.place[:, None, :, None]
    share = torch.cat([a, own.masked_fill(later, -torch.inf)], -1).softmax(-1)
    far, near = share.split((a.shape[-1], own.shape[-1]), -1)
    near = torch.einsum("bhqj,bhqpjk->bhqk", near, _taken(values, mine))
    if count is None:
        return near + far @ values.flatten(2, 3)
    return near + torch.einsum("bhqs,bhqsk->bhqk", far, values_read.flatten(3, 4))  # pyright: ignore


def _taken(x: Tensor, number: Tensor) -> Tensor:
    """Blocks (B, H, Q, n, b, K) at numbers (B, H, Q, n) of x (B, H, P, b, K)."""
    rows = torch.arange(x.shape[0], device=x.device)[:, None, None, None]
    heads = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
    return x[rows, heads, number]


_TINY = {"query_heads": 2, "key_value_heads": 1, "head_width": 8}
SMALL = (
    _TINY | {"block": 5},
    _TINY | {"block": 3, "blocks_read": 2, "core": "nope", "memory": True},
)

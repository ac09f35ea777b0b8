"""Polar attention whose pages are found by a landmark that is learned with them (mixers.md, section 6.8).

Keys and values lie in pages of the absolute grid. Beside q, k and v a layer has a landmark key u of every token, a
landmark of every full page (a softmax pooling of its tokens' u and of those of a few tokens before it), and of every
query head a landmark query r, which hears its last few tokens. A query reads the pages near it and the few of largest
r·landmark; their logits are raised by that score, which is how landmarks learn. So a token costs a page's landmark for
each page of the text and the keys of a handful of pages, whatever the length.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from atma.layers import Linear
from atma.mixers.attention import Attention
from atma.mixers.attention_config import AttentionConfig, Settings
from atma.mixers.base import Call, Place
from atma.mixers.gated_conv import advance
from atma.mixers.grid import Grid, begun_in, chosen_of, grid_of
from atma.mixers.policies.base import Policy
from atma.mixers.starts import share_projection
from atma.ops import causal_conv
from atma.ops.backend import own_precision
from atma.ops.chosen import Held, Sums, choose_pages, chosen_statistics, hold_rows, hold_summaries, summaries_at
from atma.ops.dense import rms_norm
from atma.ops.polar import statistics_of, visible_range
from atma.strict import require

HIDDEN = -1e30
"""Beside a score: as good as -inf, and times zero it is zero."""
AT_ONCE = 1024
"""Queries behind a state that are worked on together."""


@dataclass(frozen=True)
class PagesConfig(AttentionConfig):
    """And the pages. Sizes are counts."""

    page: int = 16
    """Tokens of a page."""
    chosen: int = 8
    """Pages that a query and head reads beside those near it. It may be changed in a trained model."""
    near: int = 64
    """Tokens before a query, its own among them, whose pages it always reads."""
    landmark_width: int = 128
    """Numbers of a landmark."""
    landmark_taps: int = 8
    """Tokens that a landmark query hears, its own among them; a landmark hears as many before its page."""
    landmark_gain: float = 2.0
    """Initial value: what the score of a page is multiplied by."""
    blind_share: float = 0.5
    """In training, the share of calls in which a head weighs chosen pages by their landmarks alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("page", "chosen", "near", "landmark_width", "landmark_taps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.window is None, "window", self.window, "left out: 'near' is what is always read")
        require(0 <= self.blind_share <= 1, "blind_share", self.blind_share, "between 0 and 1")


class PagesState(NamedTuple):
    """As `GlobalState`, with the landmarks of full pages, zero before, and what the next one is made of."""

    length: Tensor
    keys: Held  # (B, G, capacity, K)
    values: Held  # (B, G, capacity, K)
    landmarks: Held  # (B, G, capacity, ⌈R / page⌉): the R numbers of a page spread over its tokens
    q_tail: Tensor | None
    k_tail: Tensor | None
    v_tail: Tensor | None
    memory: Any
    r_tail: Tensor  # (B, W − 1, H·R): last inputs of the landmark queries' convolution
    u_tail: Tensor  # (B, W + page − 1, G·(R + 1)): last landmark keys, and how much they stand out

    grows = {"keys": 2, "values": 2, "landmarks": 2}  # noqa: RUF012 (a field otherwise)
    pages = {"keys": 2, "values": 2, "landmarks": 2}  # noqa: RUF012


class PolarPages(Attention):
    """`Attention` with the polar core, over the pages near a query and those chosen by landmark."""

    Config = PagesConfig
    reads_call = True

    def __init__(self, config: Settings, place: Place) -> None:
        super().__init__(config, place)
        own = self.own = cast(PagesConfig, config.own)
        self.most = own.chosen
        self.layer, R = place.layer, own.landmark_width
        self.r_proj = Linear(place.width, self.heads * R)
        self.u_proj = Linear(place.width, self.groups * R)
        self.salience = Linear(place.width, self.groups, bias=False)
        self.r_taps = nn.Parameter(torch.empty(self.heads * R, own.landmark_taps))
        self.landmark_gain = nn.Parameter(torch.empty(self.heads))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None) -> None:
        """`Mixer.init_weights`: landmark queries and keys start alike, and every token counts as much as another."""
        super().init_weights(generator)
        nn.init.zeros_(self.salience.weight)
        nn.init.constant_(self.r_taps, self.own.landmark_taps**-0.5)
        nn.init.constant_(self.landmark_gain, self.own.landmark_gain)
        share_projection(self.r_proj, self.u_proj.weight, self.heads, self.groups)

    def init_state(self, batch: int, capacity: int) -> PagesState:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`Attention.init_state`, and no landmarks."""
        length, keys, values, *rest = cast(tuple[Any, ...], super().init_state(batch, capacity))
        own, weight, R = self.own, self.q_proj.weight, self.own.landmark_width
        landmarks = weight.new_zeros(batch, self.groups, capacity, -(-R // own.page))
        r = weight.new_zeros(batch, own.landmark_taps - 1, self.heads * R)
        u = weight.new_zeros(batch, own.landmark_taps + own.page - 1, self.groups * (R + 1))
        return PagesState(length, keys, values, landmarks, *rest, r, u)  # pyright: ignore[reportCallIssue]

    chooses = True

    @property
    def selects(self) -> bool:
        """`Mixer.selects`: how many pages are read may be said anew."""
        return True

    def select(self, policy: Policy | None, reads_call: bool = False) -> None:
        """`Mixer.select`, of the policy `pages`."""
        self.most = self.own.chosen if policy is None else policy.config.k

    def steady(self, on: bool = True) -> bool:
        """`Mixer.steady`: there is no such form yet."""
        return False

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        state: PagesState | None = None,
        *,
        segment_ids: Tensor | None = None,
        call: Call | None = None,
    ) -> tuple[Tensor, PagesState | None]:
        """x (B, T, D) to y (B, T, D). `call`: in training its noise draws the heads that weigh by landmarks alone."""
        projected = self.project(x, cast(Any, state), segment_ids)
        r, u, inputs = self.landmark_parts(x, None if state is None else state.r_tail, segment_ids)
        qkv = (projected.q, projected.k, projected.v)
        if state is None:
            sums, null = self.from_beginning(qkv, r, u, segment_ids, None if call is None else call.noise)
            return self.output(x, projected, self.core.assemble(sums, null, qkv[0].dtype), None, segment_ids)[0], None
        held = self._held(state, *qkv[1:], u)
        sums, null = self._behind(qkv[0], held, r, state.length)
        y, memory = self.output(x, projected, self.core.assemble(sums, null, qkv[0].dtype), state, None)
        tails = (state.q_tail, state.k_tail, state.v_tail, state.r_tail, state.u_tail)
        parts = (*projected.inputs, inputs, u.flatten(2))
        q, k, v, *rest = (None if t is None else advance(t, z.to(t.dtype)) for t, z in zip(tails, parts, strict=True))
        return y, PagesState(state.length + x.shape[1], *held, q, k, v, memory, *cast(list[Tensor], rest))

    def landmark_parts(self, x: Tensor, tail: Tensor | None, segment_ids: Tensor | None) -> tuple[Tensor, ...]:
        """Of x (B, T, D): landmark queries r (B, H, T, R), landmark keys with how much they stand out (B, T, G, R + 1),
        and what the convolution of r has read."""
        R = self.own.landmark_width
        inputs = rms_norm(self.r_proj(x).unflatten(-1, (-1, R)), None, R, self.epsilon).flatten(2)
        u = rms_norm(self.u_proj(x).unflatten(-1, (-1, R)), None, R, self.epsilon)
        heard = causal_conv(inputs, self.r_taps, None if tail is None else tail.to(inputs.dtype), segment_ids)
        r = heard.unflatten(-1, (-1, R)).transpose(1, 2)
        return r, torch.cat([u, self.salience(x).unsqueeze(-1).to(u.dtype)], -1), inputs

    def searching(self, r: Tensor) -> Tensor:
        """r (B, H, T, R) as it is multiplied with landmarks: the products b are in the units of scores."""
        work = torch.promote_types(r.dtype, torch.float32)
        return r.to(work) * (self.landmark_gain.to(work)[:, None, None] * r.shape[-1] ** -0.5)

    @own_precision
    def from_beginning(
        self, qkv: tuple[Tensor, ...], r: Tensor, u: Tensor, segment_ids: Tensor | None, noise: int | None
    ) -> tuple[Sums, Tensor | None]:
        """The sums of texts from their first token on, and the logits of the null. qkv, r and u: of all tokens."""
        q, k, v = qkv
        own, work, tokens = self.own, torch.promote_types(q.dtype, torch.float32), q.shape[2]
        grid = grid_of(tokens, own.page, segment_ids, q.device)
        found = pooled(u.to(work), grid, own.page, own.landmark_taps)
        score = (self.searching(r).unflatten(1, (self.groups, -1)).flatten(2, 3) @ found.mT).view(*q.shape[:3], -1)
        first, last = visible_range(q, None, segment_ids, None)
        count = last - first
        near = (count.long() - own.near).clamp(min=0) // own.page * own.page + grid.document  # the first near token
        begin, near = grid.begin[:, None], near[..., None]
        taken = chosen_of(
            score.masked_fill(~((begin < near) & (begin >= grid.document[..., None]))[:, None], -torch.inf), self.most
        )
        scale, null = self.core.scale_and_null(q, count)
        score = score if noise is None else self._blind(score, q, k, scale, grid, noise)
        beside = score.masked_fill(~taken, HIDDEN).masked_fill((begin >= near)[:, None], 0) * q.shape[-1] ** 0.5
        # Scores of pages are further coordinates of a query, of which a key has that of its page: one product is both.
        member = torch.zeros(*grid.page.shape, score.shape[-1], dtype=work, device=q.device)
        member = member.scatter_(-1, grid.page.unsqueeze(-1), 1)[:, None].expand(len(q), k.shape[1], -1, -1)
        q, k = torch.cat([q.to(work), beside], -1), torch.cat([k.to(work), member], -1)
        wide = torch.cat([v.to(work), torch.zeros_like(member)], -1)
        S, *sums = statistics_of("auto", q)(q, k, wide, scale, first, last)
        return Sums(S[..., : v.shape[-1]], *sums), null

    def _blind(self, score: Tensor, q: Tensor, k: Tensor, scale: Tensor, grid: Grid, noise: int) -> Tensor:
        """Scores (B, H, T, P) less log Σ e^(t s) / t over the tokens of each page, of the heads that are drawn: how
        well single keys match then says nothing of how much a page weighs, and landmarks must."""
        drawn = torch.rand(self.heads, generator=torch.Generator().manual_seed(noise + self.layer))
        heads = (drawn < self.own.blind_share).nonzero()[:, 0].to(q.device)
        if not len(heads):
            return score
        page, work = self.own.page, scale.dtype
        index = (grid.begin[..., None] + torch.arange(page, device=q.device)).clamp(max=q.shape[2] - 1)
        laid = k.to(work)[torch.arange(len(k))[:, None], :, index.expand(len(k), -1, -1).flatten(1)].transpose(1, 2)
        scale = scale[:, heads].unsqueeze(-1)
        a = (q.to(work)[:, heads] * scale) @ laid[:, heads // (self.heads // self.groups)].mT
        within = a.unflatten(-1, (-1, page)).logsumexp(-1) / (scale * q.shape[-1] ** 0.5)
        return score.index_add(1, heads, within, alpha=-1)

    def _held(self, state: PagesState, k: Tensor, v: Tensor, u: Tensor) -> tuple[Held, Held, Held]:
        """Keys, values and landmarks after new k, v and u."""
        keys, values = (hold_rows(held, z, state.length) for held, z in ((state.keys, k), (state.values, v)))
        page, heard = self.own.page, self.own.landmark_taps
        number, full = begun_in(state.length, k.shape[2], page)
        joined = torch.cat([state.u_tail.unflatten(-1, (self.groups, -1)), u.to(state.u_tail.dtype)], 1)
        position = number[..., None] * page + torch.arange(-heard, page, device=k.device)
        index = position - state.length.long()[:, None, None] + heard + page - 1
        new = pool(joined, index.clamp(0, joined.shape[1] - 1), position < 0)
        return keys, values, hold_summaries(state.landmarks, new, number, full, page)

    @own_precision
    def _behind(self, q: Tensor, held: tuple[Held, Held, Held], r: Tensor, start: Tensor) -> tuple[Sums, Tensor | None]:
        """The sums of q (B, H, T, K), of which row b's first stands at start[b], and the logits of the null."""
        (keys, values, landmarks), own = held, self.own
        last = start[:, None] + torch.arange(1, q.shape[2] + 1, device=q.device, dtype=torch.int32)
        scale, null = self.core.scored(q, last)
        parts = []
        for i in range(0, q.shape[2], AT_ONCE):
            some = slice(i, i + AT_ONCE)
            search, end, factor = self.searching(r[:, :, some]), last[:, some], scale[:, :, some]
            pages = choose_pages(search, landmarks, end, own.page, self.most, own.near)
            beside = (summaries_at(landmarks, pages, own.page, r.shape[-1]) * search.unsqueeze(3)).sum(-1)
            near = pages >= ((end - own.near).clamp(min=0) // own.page)[:, None, :, None]
            beside = beside.masked_fill(near | (pages < 0), 0) * (factor * q.shape[-1] ** 0.5).unsqueeze(-1)
            parts.append(chosen_statistics(q[:, :, some], keys, values, factor, (pages, own.page), end, beside))
        return Sums(*(torch.cat(column, 2) for column in zip(*parts, strict=True))), null


def pooled(u: Tensor, grid: Grid, page: int, before: int) -> Tensor:
    """Landmarks (B, G, P, R) of all pages of u (B, T, G, R + 1); that of one that is not full is not to be used."""
    tokens = u.shape[1]
    index = grid.begin[..., None] + torch.arange(-before, page, device=u.device)  # (B or 1, P, N)
    document = grid.document.gather(1, grid.begin.clamp(max=tokens - 1))[..., None]
    absent = (index < document) | (index >= tokens)
    absent[..., before] = False  # that a page without a token has one too
    index = index.clamp(0, tokens - 1).expand(u.shape[0], -1, -1)
    return pool(u, index, absent.expand_as(index))


def pool(u: Tensor, index: Tensor, absent: Tensor) -> Tensor:
    """Softmax pooling (B, G, P, R) of u (B, S, G, R + 1), the last its logit, at `index` (B, P, N) but where absent."""
    rows = torch.arange(u.shape[0], device=u.device)[:, None, None]
    each = u[rows, index]  # (B, P, N, G, R + 1)
    hidden = absent[..., None]
    share = each[..., -1].masked_fill(hidden, -torch.inf).softmax(2)
    kept = each[..., :-1].masked_fill(hidden[..., None], 0)
    return (share[..., None] * kept).sum(2).transpose(1, 2)


SMALL = tuple(
    {"query_heads": 2, "key_value_heads": 1, "head_width": 8, "landmark_width": 6} | more
    for more in (
        {"page": 4, "chosen": 2, "near": 6, "landmark_taps": 3, "memory": False},
        {"page": 8, "chosen": 1, "near": 1, "landmark_taps": 1, "memory": True, "count_limit": 20},
    )
)

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
from atma.mixers.attention import Attention, AttentionConfig, Settings
from atma.mixers.base import Call, Place
from atma.mixers.gated_conv import advance
from atma.mixers.grid import Grid, begun_in, best_of, chosen_of, grid_of, whole_pages, written
from atma.mixers.polar import PolarCore
from atma.mixers.starts import share_projection
from atma.ops import causal_conv
from atma.ops.backend import own_precision
from atma.ops.dense import rms_norm
from atma.ops.polar import fold, statistics_of, visible_range
from atma.ops.polar.held import hold
from atma.strict import require

HIDDEN = -1e30
"""Beside a score: as good as -inf, and times zero it is zero."""
BLOCK = 64
"""Queries behind a state whose keys are gathered together."""


@dataclass(frozen=True)
class PagesConfig(AttentionConfig):
    """And the pages. Sizes are counts."""

    page: int = 16
    """Tokens of a page."""
    chosen: int = 8
    """Pages that a query reads beside those near it."""
    near: int = 64
    """Tokens before a query, its own among them, whose pages it always reads."""
    landmark_width: int = 128
    """Numbers of a landmark."""
    landmark_taps: int = 8
    """Tokens that a landmark query hears, its own among them; a landmark hears as many before its page."""
    landmark_gain: float = 2.0
    """Initial value: what the score of a page is multiplied by."""

    blind_share: float = 0.5
    """In training, the share of the calls in which a head weighs pages by their landmarks alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("page", "chosen", "near", "landmark_width", "landmark_taps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.window is None, "window", self.window, "left out: 'near' is what is always read")


class PagesState(NamedTuple):
    """As `GlobalState`, with the landmarks of full pages, zero before, and what the next one is made of."""

    length: Tensor
    keys: Tensor  # (B, G, capacity, K)
    values: Tensor  # (B, G, capacity, K)
    landmarks: Tensor  # (B, G, capacity, ceil(R / page)): the R numbers of page p spread over its tokens
    q_tail: Tensor | None
    k_tail: Tensor | None
    v_tail: Tensor | None
    memory: Any
    r_tail: Tensor  # (B, W - 1, H R): last inputs of the landmark queries' convolution
    u_tail: Tensor  # (B, W + page - 1, G (R + 1)): last landmark keys, and how much they stand out

    grows = {"keys": 2, "values": 2, "landmarks": 2}  # noqa: RUF012 (a field otherwise)


class PolarPages(Attention):
    """`Attention` with the polar core over the pages near a query and those chosen by landmark."""

    Config = PagesConfig
    reads_call = True

    def __init__(self, config: Settings, place: Place) -> None:
        super().__init__(config, place)
        own = self.own = cast(PagesConfig, config.own)
        self.layer = place.layer
        R, taps = own.landmark_width, own.landmark_taps
        self.r_proj = Linear(place.width, self.heads * R)
        self.u_proj = Linear(place.width, self.groups * R)
        self.salience = Linear(place.width, self.groups, bias=False)
        self.r_taps = nn.Parameter(torch.empty(self.heads * R, taps))
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
        length, keys, values, q, k, v, memory = super().init_state(batch, capacity)[:7]
        own, weight = self.own, self.q_proj.weight
        R, page = own.landmark_width, own.page
        landmarks = weight.new_zeros(batch, self.groups, capacity, -(-R // page))
        r = weight.new_zeros(batch, own.landmark_taps - 1, self.heads * R)
        u = weight.new_zeros(batch, own.landmark_taps + page - 1, self.groups * (R + 1))
        return PagesState(length, keys, values, landmarks, q, k, v, memory, r, u)

    def landmark_parts(self, x: Tensor, tail: Tensor | None, segment_ids: Tensor | None) -> tuple[Tensor, ...]:
        """Of x (B, T, D): landmark queries r (B, H, T, R), landmark keys and salience (B, T, G, R + 1), the inputs of r."""
        R = self.own.landmark_width
        inputs = rms_norm(self.r_proj(x).unflatten(-1, (-1, R)), None, R, self.epsilon).flatten(2)
        u = rms_norm(self.u_proj(x).unflatten(-1, (-1, R)), None, R, self.epsilon)
        heard = causal_conv(inputs, self.r_taps, None if tail is None else tail.to(inputs.dtype), segment_ids)
        r = heard.unflatten(-1, (-1, R)).transpose(1, 2)
        return r, torch.cat([u, self.salience(x).unsqueeze(-1).to(u.dtype)], -1), inputs

    def forward(
        self,
        x: Tensor,
        state: PagesState | None = None,
        *,
        segment_ids: Tensor | None = None,
        call: Call | None = None,
    ) -> tuple[Tensor, PagesState | None]:
        """x (B, T, D) to y (B, T, D)."""
        projected = self.project(x, state, segment_ids)  # pyright: ignore[reportArgumentType]
        r, u, inputs = self.landmark_parts(x, None if state is None else state.r_tail, segment_ids)
        q, k, v = projected.q, projected.k, projected.v
        if state is None:
            direction, magnitude = self._from_beginning(q, k, v, r, u, segment_ids, None if call is None else call.noise)
            held = None
        else:
            held = self._held(state, k, v, u)
            direction, magnitude = self._behind(q, held, r, state.length)
        core = cast(PolarCore, self.core)
        y = self.out_proj(self.gated(direction * core.radius, projected.gate)) + core.count_proj(magnitude.mT)
        memory = None
        if self.memory is not None:
            kept = None if state is None else state.memory
            written, memory = self.memory(x, q, k, v, kept, segment_ids=segment_ids)
            y = y + (written if self.alpha is None else written * self.alpha.to(written.dtype))
        if state is None or held is None:
            return y, None
        tails = (state.q_tail, state.k_tail, state.v_tail, state.r_tail)
        parts = (*projected.inputs, inputs)
        q, k, v, r = (None if t is None else advance(t, z.to(t.dtype)) for t, z in zip(tails, parts, strict=True))
        tail = advance(state.u_tail, u.flatten(2).to(state.u_tail.dtype))
        return y, PagesState(state.length + x.shape[1], *held, q, k, v, memory, r, tail)  # pyright: ignore

    def _scores(self, r: Tensor, landmarks: Tensor) -> Tensor:
        """What the queries r (B, H, T, R) think of landmarks (B, G, P, R): (B, H, T, P), float32 or wider."""
        work, groups = torch.promote_types(r.dtype, torch.float32), landmarks.shape[1]
        gain = self.landmark_gain.to(work)[:, None, None] * r.shape[-1] ** -0.5
        grouped = (r.to(work) * gain).unflatten(1, (groups, -1)).flatten(2, 3)
        return (grouped @ landmarks.to(work).mT).view(*r.shape[:3], -1)

    @own_precision
    def _from_beginning(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        r: Tensor,
        u: Tensor,
        segment_ids: Tensor | None,
        noise: int | None,
    ) -> tuple[Tensor, Tensor]:
        """Direction and magnitude of texts from their first token on."""
        own, work = self.own, torch.promote_types(q.dtype, torch.float32)
        grid = grid_of(q.shape[2], own.page, segment_ids, q.device)
        score = self._scores(r, pooled(u.to(work), grid, own.page, own.landmark_taps))
        place = torch.arange(q.shape[2], device=q.device) - grid.document  # (B or 1, T)
        first = (place - own.near + 1).clamp(min=0) // own.page * own.page + grid.document  # the first that is near
        candidate = (grid.begin[:, None] < first[..., None]) & (grid.begin[:, None] >= grid.document[..., None])
        taken = chosen_of(score.masked_fill(~candidate[:, None], -torch.inf), own.chosen)
        is_near = (grid.begin[:, None] >= first[..., None])[:, None]
        if noise is not None:
            drawn = torch.rand(score.shape[1], generator=torch.Generator().manual_seed(noise + self.layer)) < own.blind_share
            heads = drawn.to(q.device).nonzero()[:, 0]
            if len(heads):
                within = self._within(q, k, heads, grid, own.page, segment_ids)
                score = score.index_add(1, heads, within, alpha=-1)
        bias = score.masked_fill(~taken, HIDDEN).masked_fill(is_near, 0) * q.shape[-1] ** 0.5
        # The pages' scores are further coordinates, of which a key has that of its page: one product is both.
        member = torch.zeros(*grid.page.shape, score.shape[-1], dtype=work, device=q.device)
        member.scatter_(-1, grid.page.unsqueeze(-1), 1)
        member = member[:, None].expand(q.shape[0], k.shape[1], -1, -1)
        q = torch.cat([q.to(work), bias], -1)
        k = torch.cat([k.to(work), member], -1)
        wide = torch.cat([v.to(work), torch.zeros_like(member)], -1)
        return self._polar(q, k, wide, v, segment_ids)

    def _within(
        self, q: Tensor, k: Tensor, heads: Tensor, grid: Grid, page: int, segment_ids: Tensor | None
    ) -> Tensor:
        """log Σ e^(t s) / t (B, ·, T, P) over the tokens of each page, of some query heads."""
        work, core = torch.promote_types(q.dtype, torch.float32), cast(PolarCore, self.core)
        first, last = visible_range(q, None, segment_ids, None)
        scale = core.scale_and_null(q, last - first)[0][:, heads, :, None]
        index = (grid.begin[..., None] + torch.arange(page, device=q.device)).clamp(max=q.shape[2] - 1)
        laid = k.to(work)[torch.arange(len(k))[:, None], :, index.expand(len(k), -1, -1).flatten(1)].transpose(1, 2)
        laid = laid[:, heads // (q.shape[1] // k.shape[1])]
        a = (q.to(work)[:, heads] * scale) @ laid.mT
        return a.unflatten(-1, (-1, page)).logsumexp(-1) / (scale * q.shape[-1] ** 0.5)

    def _polar(self, q: Tensor, k: Tensor, wide: Tensor, v: Tensor, segment_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        core = cast(PolarCore, self.core)
        first, last = visible_range(q, None, segment_ids, None)
        scale, null = core.scale_and_null(v, last - first)
        S, L, Q, M = statistics_of("auto", q)(q, k, wide, scale, first, last)
        slope, null_value = core.magnitude_slope.to(S.dtype), core.null_value.to(S.dtype)
        c, magnitude = fold(S[..., : v.shape[-1]], L, Q, null - M, slope, null_value)
        return c.to(v.dtype), magnitude.to(v.dtype)

    def _held(self, state: PagesState, k: Tensor, v: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and landmarks after new k, v and u."""
        keys, values = hold(state.keys, state.values, k, v, state.length)
        own, tokens = self.own, k.shape[2]
        page, heard = own.page, own.landmark_taps
        joined = torch.cat([state.u_tail.unflatten(-1, (self.groups, -1)), u.to(state.u_tail.dtype)], 1)
        number, full = begun_in(state.length, tokens, page)
        index = number[..., None] * page + torch.arange(-heard, page, device=k.device)  # position
        local = (index - state.length.long()[:, None, None] + heard + page - 1).clamp(0, joined.shape[1] - 1)
        new = pool(joined, local, index < 0)  # (B, G, pages, R)
        return keys, values, written(state.landmarks, new, number, full, page)

    @own_precision
    def _behind(
        self, q: Tensor, held: tuple[Tensor, Tensor, Tensor], r: Tensor, start: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Direction and magnitude of q (B, H, T, K) of which row b's first stands at start[b]."""
        keys, values, spread = held
        own, core = self.own, cast(PolarCore, self.core)
        pages = (int(start.max()) + q.shape[2]) // own.page
        landmarks = whole_pages(spread, own.page, pages, r.shape[-1])
        work = torch.promote_types(q.dtype, torch.float32)
        directions, magnitudes = [], []
        for i in range(0, q.shape[2], BLOCK):
            some, count = q[:, :, i : i + BLOCK], min(BLOCK, q.shape[2] - i)
            place = start.long()[:, None] + torch.arange(i, i + count, device=q.device)  # (B, Q)
            token, bias = self._chosen(r[:, :, i : i + BLOCK], landmarks, place)
            S, L, Q, M, null = self._read(some, keys, values, token, bias, place)
            slope, null_value = core.magnitude_slope.to(work), core.null_value.to(work)
            c, magnitude = fold(S, L, Q, null - M, slope, null_value)
            directions.append(c)
            magnitudes.append(magnitude)
        return torch.cat(directions, 2).to(q.dtype), torch.cat(magnitudes, 2).to(q.dtype)

    def _chosen(self, r: Tensor, landmarks: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (B, H, Q, N) that the queries at `place` (B, Q) read, and what is beside their scores."""
        own = self.own
        near = (place - own.near + 1).clamp(min=0) // own.page  # the first near page
        numbers = near[..., None] + torch.arange((own.near + own.page - 2) // own.page + 1, device=r.device)
        numbers = numbers[:, None].expand(-1, r.shape[1], -1, -1)
        bias = torch.zeros(numbers.shape, dtype=torch.promote_types(r.dtype, torch.float32), device=r.device)
        if landmarks.shape[2] > 0:
            score = self._scores(r, landmarks)
            index = torch.arange(landmarks.shape[2], device=r.device)
            score = score.masked_fill((index >= near[..., None])[:, None], -torch.inf)
            best = best_of(score, own.chosen)
            numbers = torch.cat([best, numbers], -1)
            bias = torch.cat([score.gather(-1, best), bias], -1)
        token = numbers[..., None] * own.page + torch.arange(own.page, device=r.device)
        return token.flatten(-2), bias.repeat_interleave(own.page, -1)

    def _read(
        self, q: Tensor, keys: Tensor, values: Tensor, token: Tensor, bias: Tensor, place: Tensor
    ) -> tuple[Tensor, ...]:
        """S, L, Q, M and the null's logit over the keys at `token` (B, H, Q, N)."""
        work, core = torch.promote_types(q.dtype, torch.float32), cast(PolarCore, self.core)
        group = q.shape[1] // keys.shape[1]
        hidden = (token > place[:, None, :, None]) | torch.isneginf(bias)
        index = token.clamp(max=keys.shape[2] - 1).flatten(2)
        rows = torch.arange(q.shape[0], device=q.device)[:, None, None]
        heads = (torch.arange(q.shape[1], device=q.device) // group)[None, :, None]
        k, v = (x[rows, heads, index].unflatten(2, token.shape[2:]).to(work) for x in (keys, values))
        scale, null = core.scale_and_null(q, place + 1)
        score = (k @ q.to(work)[..., None])[..., 0] + bias.masked_fill(hidden, 0) * q.shape[-1] ** 0.5
        a = (score * scale[..., None]).masked_fill(hidden, -torch.inf)
        M = a.amax(-1).detach()
        p = (a - M[..., None]).exp()
        v = v.masked_fill(hidden[..., None], 0)
        return (p[..., None, :] @ v)[..., 0, :], p.sum(-1), p.square().sum(-1), M, null


def pooled(u: Tensor, grid: Grid, page: int, before: int) -> Tensor:
    """The landmark (B, G, P, R) of every page of u (B, T, G, R + 1); of a page that is not full it is not to be used."""
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

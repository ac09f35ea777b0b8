"""Softmax attention made linear: a window of exact softmax, and a recurrence of what has left it (mixers.md, 7.3).

Hedgehog (arXiv 2402.04347) learns features of queries and keys whose products are like the weights of softmax; LoLCATs
(arXiv 2410.10254) keep a window exact beside them. Here a key enters the recurrence as it leaves the window, so that
every key is counted once. The layer holds a window and a matrix for each head, however long the text is.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from atma.mixers.attention import Attention, Settings
from atma.mixers.base import Place
from atma.mixers.features import Hedgehog
from atma.mixers.grouped_query import GroupedQueryAttention
from atma.mixers.heads import Attended
from atma.mixers.window import WindowState, attended
from atma.ops.backend import own_precision
from atma.ops.polar import statistics_of, visible_range
from atma.ops.recurrent import recurrence
from atma.strict import require

QUERIES = 128
"""Whose rows of weights are there at a time while features are aligned."""
OUTPUTS_WEIGHT = 1000.0
"""Of the mean square distance of a layer's outputs, beside the cross-entropy of its weights (LoLCATs)."""


class LinearisedState(NamedTuple):
    """The ring of a window of w keys, and the sums over those that have left it."""

    length: Tensor
    keys: Tensor  # (B, G, w, K): position p at place p mod w
    values: Tensor
    q_tail: Tensor | None
    k_tail: Tensor | None
    v_tail: Tensor | None
    memory: Tensor  # (B, H, K + 1, 2K), float32 or wider: sums of values and of ones, by features of their keys

    slides = {"keys": 2, "values": 2}  # noqa: RUF012 (a field otherwise)


class Left(NamedTuple):
    """For each query the key that leaves the window as it comes."""

    keys: Tensor
    """(B, G, T, K)."""
    values: Tensor
    here: Tensor
    """(B, T): whether there is one."""


class Linearised(Attention):
    """(e^g Σ of the window e^s v + Σ of the rest φ(q)·φ(k) v) over the same sums without v (formula 7.3)."""

    def __init__(self, config: Settings, place: Place) -> None:
        super().__init__(config, place)
        own = config.own
        require(own.window is not None, "window", own.window, "the keys that softmax sees exactly")
        require(not own.memory, "memory", own.memory, "false: the recurrence stands in its place")
        require(not own.window_sinks, "window_sinks", own.window_sinks, "0: the recurrence has what left the window")
        require(self.core.plain_softmax, "core", own.core, "one of plain softmax")
        self.feature = Hedgehog(self.heads, self.head_width, 0)
        self.window_gain = nn.Parameter(torch.empty(self.heads))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None) -> None:
        """`Mixer.init_weights`: A = I, b = 0, g = 0."""
        super().init_weights(generator)
        self.feature.init_weights()
        nn.init.zeros_(self.window_gain)

    def steady(self, on: bool = True) -> bool:
        """`Mixer.steady`: there is none. The sums of its features run in whatever order is fastest."""
        return False

    def init_state(self, batch: int, capacity: int) -> Any:
        """An empty ring and no sums; `capacity` has no part in it."""
        state: Any = super().init_state(batch, capacity)
        weight = self.q_proj.weight
        work = torch.promote_types(weight.dtype, torch.float32)
        shape = batch, self.heads, self.head_width + 1, self.feature.width
        length, keys, values, q, k, v = state[:6]
        return LinearisedState(length, keys, values, q, k, v, weight.new_zeros(shape, dtype=work))

    def forward(self, x: Tensor, state: Any = None, *, segment_ids: Tensor | None = None) -> tuple[Tensor, Any]:
        """`Mixer.forward`."""
        projected = self.project(x, state, segment_ids)
        start = None if state is None else state.length
        q, keys = self.core.turn(projected.q, projected.k, start, segment_ids)
        left = self.leaving(state, keys, projected.v, segment_ids)
        seen = self.attended(state, keys, projected.v)
        read, memory = self.mixed(q, seen, left, None if state is None else state.memory, segment_ids)
        y = self.out_proj(self.gated(read, projected.gate))
        return y, None if state is None else self._advance(state, seen, projected.inputs, memory)

    def attended(self, state: Any, k: Tensor, v: Tensor, in_order: bool = False) -> Attended:
        """`Attending.attended`, of the window."""
        if state is None:
            return Attended(k, v, None)
        return attended(WindowState(*state[:7]), k, v, in_order)

    def leaving(self, state: Any, k: Tensor, v: Tensor, segment_ids: Tensor | None) -> Left:
        """Of new k and v (B, G, T, K), and those held, which leaves the window at each of the T tokens."""
        window, tokens = self.core.window, k.shape[2]
        assert window is not None
        index = torch.arange(tokens, device=k.device)
        if state is None:
            both = [torch.cat([torch.zeros_like(z[:, :, :window]), z], 2)[:, :, :tokens] for z in (k, v)]
            if tokens < window:
                both = [torch.zeros_like(z) for z in (k, v)]
            here = (index >= window).expand(k.shape[0], -1)
            if segment_ids is not None:
                here = here & (segment_ids == segment_ids.roll(window, 1))
        else:
            length = state.length.long()[:, None]
            place = (length + torch.arange(window, device=k.device)) % window
            at = place[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
            pairs = ((state.keys, k), (state.values, v))
            both = [torch.cat([held.gather(2, at), new.to(held.dtype)], 2)[:, :, :tokens] for held, new in pairs]
            here = length + index >= window
        none = ~here[:, None, :, None]
        return Left(both[0].masked_fill(none, 0), both[1].masked_fill(none, 0), here)

    def mixed(
        self, q: Tensor, seen: Attended, left: Left, memory: Tensor | None, segment_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What is read (B, H, T, K) of the window and of what has left it, and the sums after."""
        assert isinstance(seen.keys, Tensor) and isinstance(seen.values, Tensor)
        first, last = visible_range(q, seen.start, segment_ids, self.core.window)
        scale, _ = self.core.scale_and_null(q, last)
        sums = self._window_sums(q, seen.keys, seen.values, scale, (first, last))
        phi_q, phi_k = self.feature(q), self.feature(left.keys) * left.here[:, None, :, None]
        ones = torch.ones_like(left.values[..., :1]) * left.here[:, None, :, None]
        values = torch.cat([left.values, ones], -1).to(phi_k.dtype)
        rest, memory = recurrence(phi_q, phi_k, values, None, None, memory, segment_ids, "add")
        return self._quotient(sums, rest).to(q.dtype), memory

    @own_precision
    def _window_sums(
        self, q: Tensor, k: Tensor, v: Tensor, scale: Tensor, visible: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Σ e^(s−x) v and Σ e^(s−x) over the window, and x = max(0, max s)."""
        S, L, _, M = statistics_of("auto", q)(q, k, v, scale, *visible)
        x = M.clamp(min=0)
        share = (M - x).exp()
        return S * share[..., None], L * share, x

    @own_precision
    def _quotient(self, sums: tuple[Tensor, Tensor, Tensor], rest: Tensor) -> Tensor:
        S, L, x = sums
        gain, small = self.window_gain.to(L.dtype).exp()[:, None], (-x).exp()
        rest = rest.to(L.dtype)
        above = gain[..., None] * S + small[..., None] * rest[..., :-1]
        return above / (gain * L + small * rest[..., -1])[..., None]

    def alignment(self, x: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """How far this layer is, at its inputs x (B, T, D), from softmax over all keys: the mean over queries and heads
        of −Σ_j p_j log φ_j, plus 1000 times the mean square distance of what the two put out."""
        with torch.no_grad():
            projected = self.project(x, None, segment_ids)
            q, k = self.core.turn(projected.q, projected.k, None, segment_ids)
        first, last = visible_range(q, None, segment_ids, None)
        phi_q, phi_k = self.feature(q), self.feature(k)
        k, v = (z.repeat_interleave(self.heads // self.groups, 1).to(phi_q.dtype) for z in (k, projected.v))
        total, reads = phi_q.new_zeros(()), []
        for at in range(0, q.shape[2], QUERIES):
            part = slice(at, at + QUERIES)
            mass = (phi_q[:, :, part], phi_k), (first[:, part], last[:, part])
            entropy, read = self._rows(q[:, :, part].to(phi_q.dtype), k, v, *mass)
            total = total + entropy
            reads.append(read)
        exact, ours = (torch.cat([pair[i] for pair in reads], 2).to(x.dtype) for i in range(2))
        with torch.no_grad():
            wanted = self.out_proj(self.gated(exact, projected.gate))
        found = self.out_proj(self.gated(ours, projected.gate))
        return total / phi_q[..., 0].numel() + OUTPUTS_WEIGHT * (found - wanted).float().square().mean()

    @own_precision
    def _rows(
        self, q: Tensor, k: Tensor, v: Tensor, features: tuple[Tensor, Tensor], visible: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Σ −p log φ over some queries (B, H, N, K), and what is read by the weights p and by the weights φ."""
        assert self.core.window is not None
        first, last = visible
        place = torch.arange(k.shape[2], device=k.device)
        seen = ((place >= first[..., None]) & (place < last[..., None]))[:, None]
        near = seen & (place >= last[..., None] - self.core.window)[:, None]
        scores = (q @ k.mT) * self.core.scale_and_null(q, last)[0][..., None]
        p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        far = (features[0] @ features[1].mT).clamp(min=torch.finfo(q.dtype).tiny).log()
        logits = torch.where(near, scores + self.window_gain.to(q.dtype)[:, None, None], far)
        logs = logits.masked_fill(~seen, -torch.inf).log_softmax(-1)
        entropy = -(p * logs.masked_fill(~seen, 0)).sum()
        return entropy, (p @ v, logs.exp() @ v)


class LinearisedAttention(Linearised):
    """The global mixer, made linear."""


class LinearisedGroupedQuery(Linearised, GroupedQueryAttention):
    """Attention as public checkpoints have it, made linear."""


_TINY = {"query_heads": 2, "key_value_heads": 1, "head_width": 8, "memory": False}
SMALL = (
    _TINY | {"core": "rope", "rope_canon": True, "window": 5},
    _TINY | {"core": "nope", "window": 1},
)

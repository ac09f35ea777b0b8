"""Raven: a memory of slots, of which each token writes a few (mixers.md, section 3.4).

A router chooses slots for a token. Those fade and take the token's key and value by the same amount, all others keep
what they hold. A query finds slots by their keys and reads their values: two linear recurrences with a softmax between.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atma.layers import Linear, RMSNorm
from atma.mixers.base import Call, Mixer, Place
from atma.mixers.recurrent_decays import init_rate, init_step
from atma.mixers.stretches_prefix import Transition
from atma.ops import recurrence
from atma.ops.backend import own_precision
from atma.strict import check_fields, require

EPSILON = 1e-6
"""Of every norm here."""
_TINY = 1e-9
"""Beside the sum of the weights of the chosen slots."""


@dataclass(frozen=True)
class RavenConfig:
    """Sizes are counts."""

    query_heads: int = 8
    """H, each with slots of its own."""
    slots: int = 64
    """M, of a head."""
    chosen_slots: int = 32
    """How many of them a token writes; all, where there are not so many."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("query_heads", "slots", "chosen_slots"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")


class RavenState(NamedTuple):
    """What the slots hold, as the recurrences have it, float32 or wider."""

    keys: Tensor  # (B, H, M, K): Nᵀ
    values: Tensor  # (B, H, V, M): Pᵀ


class Raven(Mixer):
    """N ← N diag(e^f) + k sᵀ; π = softmax(Nᵀ q); P ← diag(e^f) P + s vᵀ; y = out_proj(norm(silu(Pᵀ π)))."""

    Config = RavenConfig
    reads_call = True

    def __init__(self, config: RavenConfig, place: Place) -> None:
        super().__init__()
        width, heads = place.width, config.query_heads
        require(width % heads == 0, "query_heads", heads, f"a divisor of the width {width}")
        self.config, self.heads, self.layer = config, heads, place.layer
        self.q_proj, self.k_proj, self.v_proj = (Linear(width, width, bias=False) for _ in range(3))
        self.q_norm, self.k_norm = (RMSNorm(width // heads, EPSILON) for _ in range(2))
        self.slot_proj = Linear(width, heads * config.slots, bias=False)
        self.decay_proj = Linear(width, heads, bias=False)
        self.decay_scale = nn.Parameter(torch.empty(heads))  # A
        self.decay_bias = nn.Parameter(torch.empty(heads))  # b
        self.norm = RMSNorm(width, EPSILON)
        self.out_proj = Linear(width, width, bias=False)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None) -> None:
        """`Mixer.init_weights`: A = log U(1e-4, 16), and b such that sp(b) is log-uniform in [1e-3, 0.1]."""
        super().init_weights(generator)
        for norm in (self.q_norm, self.k_norm, self.norm):
            nn.init.ones_(norm.weight)
        init_rate(self.decay_scale, generator, 1e-4)
        init_step(self.decay_bias, generator)

    def init_state(self, batch: int, capacity: int) -> RavenState:
        """Empty slots; `capacity` has no part in it."""
        weight, slots = self.out_proj.weight, self.config.slots
        width, work = weight.shape[0] // self.heads, torch.promote_types(weight.dtype, torch.float32)
        shapes = (batch, self.heads, slots, width), (batch, self.heads, width, slots)
        return RavenState(*(weight.new_zeros(shape, dtype=work) for shape in shapes))

    def log_decay(self, x: Tensor) -> Tensor:
        """a / M (B, H, T), float32 or wider: the mean over a head's slots of f = a w, whose weights w add up to 1."""
        work = torch.promote_types(x.dtype, torch.float32)
        rate = F.softplus(self.decay_proj(x).to(work) + self.decay_bias.to(work))
        return -(self.decay_scale.to(work).exp() * rate).mT / self.config.slots

    def slot_weights(self, x: Tensor, seed: int | None = None) -> Tensor:
        """w (B, H, T, M) ≥ 0, float32 or wider: how much of a token each slot takes. `seed`: with Gumbel noise."""
        work = torch.promote_types(x.dtype, torch.float32)
        score = self.slot_proj(x).to(work).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        if seed is not None:
            generator = torch.Generator(x.device).manual_seed(seed)
            drawn = torch.empty(score.shape, dtype=work, device=x.device).exponential_(generator=generator)
            score = score - drawn.log()
        weight = torch.sigmoid(score) * largest(score.detach(), self.config.chosen_slots)
        return weight / (weight.sum(-1, keepdim=True) + _TINY)

    def forward(
        self,
        x: Tensor,
        state: RavenState | None = None,
        *,
        segment_ids: Tensor | None = None,
        call: Call | None = None,
    ) -> tuple[Tensor, RavenState | None]:
        """x (B, T, D) to y (B, T, D). The router has noise only in training, where the call has a seed for it."""
        given = self._inputs(x, call)
        held = (None, None) if state is None else state
        found, keys = given.found(held[0], segment_ids)
        read, values = given.read(found, held[1], segment_ids)
        return self._output(read), None if state is None else RavenState(keys, values)

    def transition(self, x: Tensor, state: RavenState, begun: bool, call: Call | None = None) -> Transition:
        """`Mixer.transition`: what is written to the values knows nothing of the slots that are found."""
        given = self._inputs(x, call)
        nothing, keys = given.found(None, None)
        _, values = given.read(given.s[:, :1], None, None)
        kept = given.f.sum(2)

        def finish(read: Tensor, before: Mapping[str, Tensor]) -> Tensor:
            if before:
                read = _with(read, given, before["keys"])
            return self._output(given.read(read, before.get("values"), None)[0])

        factors = {"keys": kept[..., None].exp(), "values": kept[..., None, :].exp()} if begun else {}
        return Transition(nothing, {"keys": keys, "values": values}, factors, finish)

    def _inputs(self, x: Tensor, call: Call | None) -> "_Inputs":
        q, k, v = (F.silu(proj(x)).unflatten(-1, (self.heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (z.transpose(1, 2) for z in (self.q_norm(q), self.k_norm(k), v))
        weight = self.slot_weights(x, _seed(call, self.layer) if self.training else None)
        f = (self.log_decay(x) * self.config.slots)[..., None] * weight
        return _Inputs(q, k, v, f, -torch.expm1(f))

    def _output(self, read: Tensor) -> Tensor:
        return self.out_proj(self.norm(F.silu(read).transpose(1, 2).flatten(2)))

    def channels(self) -> dict[str, nn.Linear]:
        """`Mixer.channels`."""
        return {"read": self.out_proj}

    @property
    def reach(self) -> int:
        """`Mixer.reach`: there is nothing but a memory."""
        return 0


class _Inputs(NamedTuple):
    """What both recurrences take of a call."""

    q: Tensor  # (B, H, T, K), and k and v (B, H, T, V) likewise
    k: Tensor
    v: Tensor
    f: Tensor  # (B, H, T, M), float32 or wider, and s
    s: Tensor

    def found(self, keys: Tensor | None, segment_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scores of the slots (B, H, T, M) by their keys, and these after: (3.6)."""
        return recurrence(self.q, self.k, self.s, self.f, None, keys, segment_ids, "add", "value")

    def read(self, found: Tensor, values: Tensor | None, segment_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the slots found hold (B, H, T, V), and their values after: (3.7)."""
        share = found.to(self.f.dtype).softmax(-1)
        read, values = recurrence(share, self.s, self.v, self.f, None, values, segment_ids, "add", "key")
        return read.to(self.v.dtype), values


@own_precision
def _with(found: Tensor, given: _Inputs, keys: Tensor) -> Tensor:
    """Scores of the slots by their keys from nothing, with those that they had before."""
    return (found + given.f.cumsum(2).exp() * (given.q.to(keys.dtype) @ keys.mT)).to(found.dtype)


def largest(score: Tensor, count: int) -> Tensor:
    """Which `count` of the last axis of `score` are the largest, the first of equals before the others: a mask."""
    size = score.shape[-1]
    if size <= count:
        return torch.ones_like(score, dtype=torch.bool)
    if score.shape[-2] > 1:
        order = score.sort(dim=-1, descending=True, stable=True).indices[..., :count]
        return torch.zeros_like(score, dtype=torch.bool).scatter(-1, order, True)
    # Of one token by comparing each with each, which can be recorded: those before it are larger, or equal and earlier.
    own, other = score[..., :, None], score[..., None, :]
    earlier = torch.ones(size, size, dtype=torch.bool, device=score.device).tril(-1)
    return ((other > own) | ((other == own) & earlier)).sum(-1) < count


def _seed(call: Call | None, layer: int) -> int | None:
    return None if call is None or call.noise is None else call.noise + layer


SMALL = ({"query_heads": 2, "slots": 5, "chosen_slots": 3}, {"query_heads": 1, "slots": 3})

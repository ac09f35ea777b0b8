"""Attention taken apart: what is left without mixing, without the softmax, or without the query (2510.11602).

Each is a class of few lines: `Glu` mixes nothing, `Taylor2` has the first three orders of the exponential as running
sums, and `GateSum` weighs tokens by themselves alone. Their states do not grow. Source: mixers.md, section 5.4.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atma.layers import Linear
from atma.mixers.base import Mixer, Place
from atma.mixers.heads import HeadsConfig
from atma.ops import recurrence
from atma.ops.backend import backend_for
from atma.ops.rows import sigmoid
from atma.ops.segments import document_start
from atma.strict import require

NOTHING = -1e3
"""A logarithm whose exponential is 0 in every dtype."""


class GluState(NamedTuple):
    """Nothing of earlier tokens is held."""


class Glu(Mixer):
    """y = out_proj(silu(gate_proj(x)) ⊙ up_proj(x)), as large as the attention of these heads that it replaces."""

    Config = HeadsConfig

    def __init__(self, config: HeadsConfig, place: Place) -> None:
        super().__init__()
        replaced = 2 * (config.query_heads + config.key_value_heads) * config.head_width * place.width
        inner = replaced // (3 * place.width)
        require(inner >= 1, "head_width", config.head_width, "larger: a glu of its size has no inner width")
        self.gate_proj = Linear(place.width, inner, bias=False)
        self.up_proj = Linear(place.width, inner, bias=False)
        self.out_proj = Linear(inner, place.width, bias=False)
        self.is_steady = False

    def init_state(self, batch: int, capacity: int) -> GluState:
        """There is none."""
        return GluState()

    def forward(
        self, x: Tensor, state: GluState | None = None, *, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, GluState | None]:
        """x (B, T, D) to y (B, T, D)."""
        gate = self.gate_proj(x)
        opened = gate * sigmoid(gate, True) if self.is_steady else F.silu(gate)
        return self.out_proj(opened * self.up_proj(x)), state

    def channels(self) -> dict[str, nn.Linear]:
        """`Mixer.channels`: all of it."""
        return {"read": self.out_proj}

    def steady(self, on: bool = True) -> bool:
        """`Mixer.steady`: with a compiled sigmoid."""
        self.is_steady = on and backend_for("auto", self.out_proj.weight, "dense") == "native"
        return self.is_steady

    @property
    def reach(self) -> int:
        """`Mixer.reach`."""
        return 0


class Summing(Mixer):
    """What two of them share: projections to heads, values with a 1 behind them so that sums count, and the output."""

    Config = HeadsConfig

    def __init__(self, config: HeadsConfig, place: Place) -> None:
        super().__init__()
        self.config, self.heads, self.groups = config, config.query_heads, config.key_value_heads
        inner, shared = self.heads * config.head_width, self.groups * config.head_width
        self.q_proj = Linear(place.width, inner, bias=False)
        self.k_proj = Linear(place.width, shared, bias=False)
        self.v_proj = Linear(place.width, shared, bias=False)
        self.out_proj = Linear(inner, place.width, bias=False)

    @property
    def reach(self) -> int:
        """`Mixer.reach`: what is earlier is in sums."""
        return 0

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) to q (B, H, T, K), k (B, G, T, K), and v (B, G, T, K + 1) whose last is 1, float32 or wider."""
        work = torch.promote_types(x.dtype, torch.float32)
        made = (layer(x).to(work) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (z.unflatten(-1, (-1, self.config.head_width)).transpose(1, 2) for z in made)
        return q, k, F.pad(v, (0, 1), value=1.0)

    def output(self, read: Tensor, dtype: torch.dtype) -> Tensor:
        """Reads (B, H, T, K) to y (B, T, D), in x's dtype."""
        return self.out_proj(read.transpose(1, 2).flatten(2).to(dtype))

    def zeros(self, batch: int, *shape: int) -> Tensor:
        """Zeros (B, H, …), float32 or wider."""
        weight = self.out_proj.weight
        return weight.new_zeros(batch, self.heads, *shape, dtype=torch.promote_types(weight.dtype, torch.float32))

    def channels(self) -> dict[str, nn.Linear]:
        """`Mixer.channels`: what is read."""
        return {"read": self.out_proj}


class TaylorState(NamedTuple):
    """For each order the sums of values, and of weights in the last row (B, H, K + 1, features)."""

    order_0: Tensor  # one feature
    order_1: Tensor  # K features
    order_2: Tensor


class Taylor2(Summing):
    """o = Σ_p Σ_j s^p_ij v_j / d(Σ_j s^p_ij) of the orders s⁰ = 1, s¹ = q·k/√K and s² = (q⊙q)·(k⊙k)/2K."""

    in_turn = False
    """Whether tokens are taken one after the other, however many a call has."""

    def init_state(self, batch: int, capacity: int) -> TaylorState:
        """Zeros; `capacity` has no part in it."""
        width = self.config.head_width
        return TaylorState(*(self.zeros(batch, width + 1, features) for features in (1, width, width)))

    def forward(
        self, x: Tensor, state: TaylorState | None = None, *, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, TaylorState | None]:
        """x (B, T, D) to y (B, T, D)."""
        q, k, v = self.project(x)
        width = self.config.head_width
        features = (
            (torch.ones_like(q[..., :1]), torch.ones_like(k[..., :1])),
            (q * width**-0.5, k),
            (q * q / (2 * width), k * k),
        )
        held = (None, None, None) if state is None else state
        sums = [
            recurrence(*pair, v, memory=memory, segment_ids=segment_ids, steady=self.in_turn)
            for pair, memory in zip(features, held, strict=True)
        ]
        first, second, third = (total[..., :-1] / away_from_zero(total[..., -1:]) for total, _ in sums)
        y = self.output(first + second + third, x.dtype)
        return y, None if state is None else TaylorState(*(memory for _, memory in sums))

    def steady(self, on: bool = True) -> bool:
        """`Mixer.steady`: tokens in turn, by operations whose bits are a row's own."""
        self.in_turn = on and backend_for("auto", self.out_proj.weight, "recurrent") == "native"
        return self.in_turn


def away_from_zero(x: Tensor) -> Tensor:
    """d(x) = x + 1e-6 sgn(x), sgn(0) = 1: a divisor that is not zero."""
    return x + torch.where(x < 0, -1e-6, 1e-6).to(x.dtype)


class GateSumState(NamedTuple):
    """The largest score so far of each head, and Σ e^(s − largest) v with Σ e^(s − largest) in its last row."""

    largest: Tensor  # (B, H), −∞ before the first token
    sums: Tensor  # (B, H, K + 1, 1)


class GateSum(Summing):
    """softmax_j of s_j = 1ᵀ(silu(W_q x_j) ⊙ W_k x_j)/√K over j ≤ i: a token's weight does not depend on who reads."""

    def init_state(self, batch: int, capacity: int) -> GateSumState:
        """Nothing summed; `capacity` has no part in it."""
        return GateSumState(self.zeros(batch) - torch.inf, self.zeros(batch, self.config.head_width + 1, 1))

    def forward(
        self, x: Tensor, state: GateSumState | None = None, *, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, GateSumState | None]:
        """x (B, T, D) to y (B, T, D)."""
        q, k, v = self.project(x)
        k = k.repeat_interleave(self.heads // self.groups, 1)
        score = (F.silu(q) * k).sum(-1) * self.config.head_width**-0.5
        read, state_after = softmax_sum(score, v, state, segment_ids)
        return self.output(read, x.dtype), state_after


def softmax_sum(
    score: Tensor, v: Tensor, state: GateSumState | None = None, segment_ids: Tensor | None = None
) -> tuple[Tensor, GateSumState | None]:
    """Σ_{j ≤ i} e^(s_j) v_j / Σ_{j ≤ i} e^(s_j) of score (B, H, T) and v (B, G, T, V + 1), whose last is 1, both
    float32 or wider.

    The sums are kept relative to the largest score so far, which the result does not depend on: a constant for
    gradients. So they are a recurrence that forgets e^(largest before − largest now), and nothing overflows.
    Returns (B, H, T, V), and the state after the last token, None for None.
    """
    index = torch.arange(score.shape[-1], device=score.device)
    first = torch.zeros_like(index) if segment_ids is None else document_start(segment_ids)[:, None]
    largest = running_largest(score.detach(), index, first)
    if state is None:
        earlier = torch.where(index == first, largest, largest.roll(1, -1))
    else:
        largest = torch.maximum(largest, state.largest.unsqueeze(-1))
        earlier = torch.cat([state.largest.unsqueeze(-1), largest[..., :-1]], -1)
    log_decay = (earlier - largest).clamp(min=NOTHING)
    ones = torch.ones_like(score).unsqueeze(-1)
    sums = None if state is None else state.sums
    total, after = recurrence(ones, ones, v, log_decay, (score - largest).exp(), sums, segment_ids)
    read = total[..., :-1] / total[..., -1:]
    return read, None if state is None else GateSumState(largest[..., -1], after)


def running_largest(score: Tensor, index: Tensor, first: Tensor) -> Tensor:
    """The largest of score (B, H, T) from the token `first`, of (T,) or (B, 1, T), up to the one of each index (T,)."""
    largest, step = score, 1
    while step < score.shape[-1]:
        both = torch.maximum(largest, largest.roll(step, -1))
        largest, step = torch.where(index - step >= first, both, largest), 2 * step
    return largest


SMALL = ({"query_heads": 2, "key_value_heads": 1, "head_width": 4},)

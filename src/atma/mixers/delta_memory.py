"""The third channel of a global mixer: a gated-delta memory on its keys and values (maths.md, section 5)."""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atma.layers import Linear, init_linear
from atma.mixers.heads import Heads, Memory
from atma.ops import gated_delta
from atma.ops.dense import rms_norm
from atma.ops.rows import gate_heads, log_sigmoid, sigmoid, unit
from atma.strict import FOLLOWS, check_fields, require

READ_EPSILON = 2.0**-23
"""Added to the mean square of a read before its root: a memory that holds almost nothing reads as almost nothing."""


@dataclass(frozen=True)
class DeltaConfig:
    """How long the memory holds, and how it starts. Half-lives are tokens."""

    max_half_life: float = field(default=math.inf, metadata=FOLLOWS)
    """Upper bound, in tokens, of every memory head's half-life; inf is the published unbounded form. A recipe that
    starts from a preset with a bound, and sets none, has its own training length here, and in `count_limit`."""
    learned_half_life: bool = False
    """Each memory head learns its own bound, beginning at max_half_life: a further factor of its γ."""
    decay_bias: float = 3.9
    """Added to the logit of γ, so that a memory begins by forgetting little."""
    beta_bias: float = 0.0
    """Added to the logit of β, how much of a token is written."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("decay_bias", "beta_bias"):
            require(math.isfinite(getattr(self, name)), name, getattr(self, name), "finite")
        most = self.max_half_life
        require(most > 0, "max_half_life", most, "positive")
        bounded = not self.learned_half_life or 1 <= most < math.inf
        require(bounded, "max_half_life", most, "finite and at least 1 for learned_half_life")


class DeltaMemory(Memory):
    """M ← γ M (I − β k kᵀ) + β v kᵀ on unit keys, read by unit queries; its output starts at zero."""

    Config = DeltaConfig

    def __init__(self, config: DeltaConfig, heads: Heads) -> None:
        super().__init__()
        width, inner = heads.place.width, heads.heads * heads.head_width
        self.config, self.shape = config, (heads.heads, heads.head_width, heads.head_width)
        self.decay_proj = Linear(width, heads.heads)
        self.beta_proj = Linear(width, heads.heads)
        self.gate_proj = Linear(width, inner)
        self.out_proj = Linear(inner, width)
        self.decay_bias, self.beta_bias = config.decay_bias, config.beta_bias
        self.max_half_life = math.inf if config.learned_half_life else config.max_half_life
        self.retention = nn.Parameter(torch.empty(heads.heads)) if config.learned_half_life else None
        self.in_turn = False
        """Whether tokens are taken one after the other, however many a call has."""

    def init_weights(self, generator: torch.Generator | None) -> None:
        """`Memory.init_weights`."""
        for layer in (self.decay_proj, self.beta_proj, self.gate_proj):
            init_linear(layer, generator)
        init_linear(self.out_proj, generator, zero=True)
        if self.retention is not None:
            nn.init.constant_(self.retention, -math.log(math.expm1(math.log(2) / self.config.max_half_life)))

    def init_state(self, batch: int) -> Tensor:
        """Zeros (B, H, K, K), float32 or wider."""
        weight = self.out_proj.weight
        return weight.new_zeros(batch, *self.shape, dtype=torch.promote_types(weight.dtype, torch.float32))

    @torch.no_grad()
    def bound(self, head: int) -> float:
        """The longest half-life, in tokens, that a head can have; inf where nothing bounds it."""
        if self.retention is None:
            return self.max_half_life
        return float(-math.log(2) / F.logsigmoid(self.retention[head].double()))

    def log_decay(self, x: Tensor) -> Tensor:
        """log γ ≤ 0 (B, H, T), float32 or wider. γ's half-life never exceeds its bound."""
        work = torch.promote_types(x.dtype, torch.float32)
        log_decay = log_sigmoid(self.decay_proj(x).to(work) + self.decay_bias, self.in_turn)
        if math.isfinite(self.max_half_life):
            log_decay = log_decay.clamp(max=-math.log(2) / self.max_half_life)
        if self.retention is not None:
            log_decay = log_decay + log_sigmoid(self.retention.to(work), self.in_turn)
        return log_decay.mT

    def beta(self, x: Tensor) -> Tensor:
        """β in (0, 1), (B, H, T), float32 or wider: how much of a write is made."""
        work = torch.promote_types(x.dtype, torch.float32)
        return sigmoid(self.beta_proj(x).to(work) + self.beta_bias, self.in_turn).mT

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, memory: Tensor | None, *, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, D), q (B, H, T, K), k and v (B, G, T, K), memory (B, H, K, K) or None. Returns (B, T, D), memory."""
        gates = self.log_decay(x), self.beta(x)
        unit_q, unit_k = unit(q, self.in_turn), unit(k, self.in_turn)
        read, memory = gated_delta(unit_q, unit_k, v, *gates, memory, segment_ids, steady=self.in_turn)
        read = rms_norm(read, None, read.shape[-1], READ_EPSILON)
        return self.out_proj(gate_heads(read, self.gate_proj(x), self.in_turn)), memory

    def steady(self, on: bool = True) -> bool:
        """`Memory.steady`: tokens in turn, by operations whose bits are a row's own."""
        self.in_turn = on
        return on

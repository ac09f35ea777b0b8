"""The third channel of a global mixer: a gated-delta memory on its keys and values (maths.md, section 5)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atma.config import ModelConfig
from atma.layers import Linear, init_linear
from atma.ops import gated_delta
from atma.ops.dense import rms_norm
from atma.ops.rows import remember

READ_EPSILON = 2.0**-23
"""Added to the mean square of a read before its root: a memory that holds almost nothing reads as almost nothing."""


class DeltaMemory(nn.Module):
    """M ← γ M (I − β k kᵀ) + β v kᵀ on unit keys, read by unit queries; its output starts at zero."""

    stepwise = False
    """Whether a held memory takes tokens one after the other, however many there are: the same bits however a text is
    cut into calls (atma.serve)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner = config.query_heads * config.head_width
        self.decay_proj = Linear(config.width, config.query_heads)
        self.beta_proj = Linear(config.width, config.query_heads)
        self.gate_proj = Linear(config.width, inner)
        self.out_proj = Linear(inner, config.width)
        self.decay_bias, self.beta_bias = config.decay_bias, config.beta_bias
        self.max_half_life = math.inf if config.learned_half_life else config.max_half_life
        self.retention = nn.Parameter(torch.empty(config.query_heads)) if config.learned_half_life else None

    def init_weights(self, config: ModelConfig, generator: torch.Generator | None) -> None:
        for layer in (self.decay_proj, self.beta_proj, self.gate_proj):
            init_linear(layer, generator)
        init_linear(self.out_proj, generator, zero=True)
        if self.retention is not None:
            nn.init.constant_(self.retention, -math.log(math.expm1(math.log(2) / config.max_half_life)))

    @torch.no_grad()
    def bound(self, head: int) -> float:
        """The longest half-life, in tokens, that a head can have; inf where nothing bounds it."""
        if self.retention is None:
            return self.max_half_life
        return float(-math.log(2) / F.logsigmoid(self.retention[head].double()))

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log γ ≤ 0 and β in (0, 1), both (B, H, T) float32 or wider. γ's half-life never exceeds its bound."""
        work = torch.promote_types(x.dtype, torch.float32)
        logit = self.decay_proj(x).to(work) + self.decay_bias
        log_decay = F.logsigmoid(logit)
        if math.isfinite(self.max_half_life):
            log_decay = log_decay.clamp(max=-math.log(2) / self.max_half_life)
        if self.retention is not None:
            log_decay = log_decay + F.logsigmoid(self.retention.to(work))
        beta = torch.sigmoid(self.beta_proj(x).to(work) + self.beta_bias)
        return log_decay.mT, beta.mT

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, memory: Tensor | None, *, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, D), q (B, H, T, K), k and v (B, G, T, K), memory (B, H, K, K) or None. Returns (B, T, D), memory."""
        if self.stepwise and memory is not None:
            return self._step(x, (q, k, v), memory)
        log_decay, beta = self.gates(x)
        unit_q, unit_k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        read, memory = gated_delta(unit_q, unit_k, v, log_decay, beta, memory, segment_ids)
        read = rms_norm(read, None, read.shape[-1], READ_EPSILON)
        gated = read.transpose(1, 2).flatten(2) * torch.sigmoid(self.gate_proj(x))
        return self.out_proj(gated), memory

    def _step(self, x: Tensor, attended: tuple[Tensor, Tensor, Tensor], memory: Tensor) -> tuple[Tensor, Tensor]:
        projected = (self.decay_proj(x), self.beta_proj(x), self.gate_proj(x))
        most = -math.log(2) / self.max_half_life if math.isfinite(self.max_half_life) else 0.0
        read = remember(attended, projected, memory, (self.decay_bias, self.beta_bias, most, READ_EPSILON))
        return self.out_proj(read), memory

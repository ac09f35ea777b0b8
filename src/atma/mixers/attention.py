"""The global mixer: projections, Canon, gate and memory around one of three attention cores (maths.md, section 3)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from atma.config import ModelConfig
from atma.layers import Linear, init_linear
from atma.mixers.delta_memory import DeltaMemory
from atma.mixers.gated_conv import advance, init_taps
from atma.mixers.rotary import Rotary, logit_scale
from atma.ops import causal_conv, paged, polar_attention, softmax_attention
from atma.ops.dense import rms_norm
from atma.ops.polar import visible_range
from atma.ops.polar.held import hold
from atma.ops.rows import gate
from atma.state import GlobalState, Pages

Held = Tensor | Pages


class Projected(NamedTuple):
    """What a core reads: q and gate (B, H, T, K), k and v (B, G, T, K), and the Canon inputs (B, T, ·) behind them."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    inputs: tuple[Tensor, Tensor, Tensor]


class PolarCore(nn.Module):
    """Polar attention with its learned scalars; the count channel is projected here (maths.md, section 4)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        heads = config.query_heads
        self.length_gain = nn.Parameter(torch.empty(heads))
        self.null_base = nn.Parameter(torch.empty(heads))
        self.null_slope = nn.Parameter(torch.empty(heads))
        self.magnitude_slope = nn.Parameter(torch.empty(heads))
        self.null_value = nn.Parameter(torch.empty(heads, config.head_width))
        self.count_proj = Linear(heads, config.width)
        self.radius, self.window = config.radius, config.window
        self.count_limit, self.sharpening = config.count_limit, config.sharpening

    def init_weights(self, config: ModelConfig, generator: torch.Generator | None) -> None:
        for name in ("length_gain", "null_base", "null_slope", "magnitude_slope"):
            nn.init.constant_(getattr(self, name), getattr(config, name))
        nn.init.zeros_(self.null_value)
        init_linear(self.count_proj, generator, zero=True)

    def attend(
        self, q: Tensor, k: Held, v: Held, start: Tensor | None, segment_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Direction (B, H, T, K), before the radius, and magnitude (B, H, T)."""
        scalars = (self.length_gain, self.null_base, self.null_slope, self.magnitude_slope, self.null_value)
        if isinstance(k, Pages) and isinstance(v, Pages):
            return paged.polar_attention(q, k, v, scalars, start, self.window, self.count_limit, self.sharpening)
        assert isinstance(k, Tensor) and isinstance(v, Tensor)
        return polar_attention(q, k, v, *scalars, start, segment_ids, self.window, self.count_limit, self.sharpening)

    def forward(
        self, q: Tensor, k: Held, v: Held, start: Tensor | None, segment_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        direction, magnitude = self.attend(q, k, v, start, segment_ids)
        return direction * self.radius, self.count_proj(magnitude.mT)


class SoftmaxCore(nn.Module):
    """Plain softmax attention of the controls: nope at 1/√K, rope at a fixed scale."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.scale = logit_scale(config) if config.core == "rope" else config.head_width**-0.5
        self.window = config.window

    def init_weights(self, config: ModelConfig, generator: torch.Generator | None) -> None:
        """Nothing is learned here."""

    def forward(
        self, q: Tensor, k: Held, v: Held, start: Tensor | None, segment_ids: Tensor | None
    ) -> tuple[Tensor, None]:
        if isinstance(k, Pages) and isinstance(v, Pages):
            return paged.softmax_attention(q, k, v, self.scale, start, self.window), None
        assert isinstance(k, Tensor) and isinstance(v, Tensor)
        return softmax_attention(q, k, v, self.scale, start, segment_ids, self.window), None


class Attention(nn.Module):
    """q, k, v and gate → RMS → Canon → core → gate → out_proj, plus the count and the memory where configured."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.groups, self.head_width = config.query_heads, config.key_value_heads, config.head_width
        self.epsilon = config.norm_epsilon
        shared = config.key_value_heads * config.head_width
        inner = config.query_heads * config.head_width
        self.q_proj = Linear(config.width, 2 * inner)
        self.k_proj = Linear(config.width, shared)
        self.v_proj = Linear(config.width, shared)
        self.out_proj = Linear(inner, config.width)
        self.rotary = Rotary(config) if config.core == "rope" else None
        self.canon_q, self.canon_k, self.canon_v = (
            nn.Parameter(torch.empty(size, config.canon_taps)) if config.has_canon else None
            for size in (inner, shared, shared)
        )
        self.core = PolarCore(config) if config.core == "polar" else SoftmaxCore(config)
        self.memory = DeltaMemory(config) if config.memory else None

    @torch.no_grad()
    def init_weights(self, config: ModelConfig, generator: torch.Generator | None) -> None:
        for layer in (self.q_proj, self.k_proj, self.v_proj):
            init_linear(layer, generator)
        init_linear(self.out_proj, generator, zero=True)
        for taps in self._canon():
            if taps is not None:
                init_taps(taps, generator)
        if config.canon_init == "previous" and self.canon_k is not None:
            start_at_previous(self.canon_k, self.head_width)
        if config.share_query_key_init and config.has_canon:
            share_projection(self.q_proj, self.k_proj, self.heads, self.groups)
        self.core.init_weights(config, generator)
        if self.memory is not None:
            self.memory.init_weights(config, generator)

    def stretch(self, config: ModelConfig) -> None:
        """Take the positions of `config`, of the same weights, from here on: none for a core without positions."""
        if self.rotary is not None and isinstance(self.core, SoftmaxCore):
            self.rotary.config, self.core.scale = config, logit_scale(config)

    def _canon(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.canon_q, self.canon_k, self.canon_v

    def init_state(self, batch: int, capacity: int) -> GlobalState:
        """Room for `capacity` keys in each of `batch` rows, none held yet."""
        weight = self.k_proj.weight
        held = weight.new_zeros(batch, self.groups, capacity, self.head_width)
        taps = self._canon()
        q, k, v = (None if w is None else weight.new_zeros(batch, w.shape[1] - 1, w.shape[0]) for w in taps)
        memory = None
        if self.memory is not None:
            work = torch.promote_types(weight.dtype, torch.float32)
            memory = weight.new_zeros(batch, self.heads, self.head_width, self.head_width, dtype=work)
        length = torch.zeros(batch, dtype=torch.int32, device=weight.device)
        return GlobalState(length, held, held.clone(), q, k, v, memory)

    def project(self, x: Tensor, state: GlobalState | None = None, segment_ids: Tensor | None = None) -> Projected:
        """x (B, T, D) to what the core reads: per-head RMS-normalised q and k, then Canon on q, k and v."""
        q, gate = self.q_proj(x).unflatten(-1, (self.heads, 2 * self.head_width)).chunk(2, -1)
        k = self.k_proj(x).unflatten(-1, (self.groups, self.head_width))
        q, k = (rms_norm(z, None, self.head_width, self.epsilon).flatten(2) for z in (q, k))
        inputs = (q, k, self.v_proj(x))
        tails = (None,) * 3 if state is None else (state.q_tail, state.k_tail, state.v_tail)
        mixed = [
            z if w is None else z + causal_conv(z, w, None if tail is None else tail.to(z.dtype), segment_ids)
            for z, w, tail in zip(inputs, self._canon(), tails, strict=True)
        ]
        q, k, v = (z.unflatten(-1, (-1, self.head_width)).transpose(1, 2) for z in mixed)
        return Projected(q, k, v, gate.transpose(1, 2), inputs)

    def forward(
        self, x: Tensor, state: GlobalState | None = None, *, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, GlobalState | None]:
        """x (B, T, D) to y (B, T, D). Keys and values are held after Canon and rotation."""
        projected = self.project(x, state, segment_ids)
        q, k, v = projected.q, projected.k, projected.v
        start = None if state is None else state.length
        if self.rotary is not None:
            first, last = visible_range(q, start, segment_ids, None)
            position = last - first - 1
            q, k = self.rotary(q, position), self.rotary(k, position)
        keys, values = k, v
        if state is not None:
            keys, values = _held(state, k, v)
        read, count = self.core(q, keys, values, start, segment_ids)
        y = self.out_proj(gate(read, projected.gate))
        if count is not None:
            y = y + count
        memory = None
        if self.memory is not None:
            held = None if state is None else state.memory
            unrotated = (projected.q, projected.k, projected.v)
            written, memory = self.memory(x, *unrotated, held, segment_ids=segment_ids)
            y = y + written
        if state is None:
            return y, None
        return y, self._advance(state, keys, values, projected.inputs, memory)

    def _advance(
        self, state: GlobalState, keys: Held, values: Held, inputs: tuple[Tensor, ...], memory: Tensor | None
    ) -> GlobalState:
        tails = (state.q_tail, state.k_tail, state.v_tail)
        q, k, v = (None if t is None else advance(t, z.to(t.dtype)) for t, z in zip(tails, inputs, strict=True))
        return GlobalState(state.length + inputs[0].shape[1], keys, values, q, k, v, memory)


def start_at_previous(taps: Tensor, head_width: int) -> None:
    """Canon taps (G·K, W) such that z + conv(z) is z in each head's lower channels and the previous z in its upper."""
    upper = torch.arange(taps.shape[0]) % head_width >= head_width // 2
    nn.init.zeros_(taps)
    taps[upper, -1], taps[upper, -2] = -1.0, 1.0


def share_projection(q_proj: nn.Linear, k_proj: nn.Linear, heads: int, groups: int) -> None:
    """Copy each key head's weights (K, D) into the query half of the heads that read it."""
    keys = k_proj.weight.unflatten(0, (groups, -1)).repeat_interleave(heads // groups, 0)
    q_proj.weight.unflatten(0, (heads, 2, -1))[:, 0] = keys


def _held(state: GlobalState, k: Tensor, v: Tensor) -> tuple[Held, Held]:
    """The state's keys and values with the new ones, contiguous or in pages."""
    if isinstance(state.keys, Pages) and isinstance(state.values, Pages):
        return paged.hold(state.keys, state.values, k, v, state.length)
    assert isinstance(state.keys, Tensor) and isinstance(state.values, Tensor)
    return hold(state.keys, state.values, k, v, state.length)

"""The global mixer: projections, Canon, gate and memory around an attention core (maths.md, section 3)."""

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from atma.layers import Linear, init_linear
from atma.mixers.attention_config import AttentionConfig, Settings
from atma.mixers.base import Call, Place
from atma.mixers.composed import Composed
from atma.mixers.gated_conv import advance, init_taps
from atma.mixers.heads import Attended, Core, Heads, Memory, Projected
from atma.mixers.held import GlobalState, SelectingState, WithSinks, behind
from atma.mixers.parts import part_of
from atma.mixers.policies.base import New, Policy
from atma.mixers.selecting import selected_afresh
from atma.mixers.sinks import SinkState, read_with_sinks
from atma.mixers.starts import share_projection, start_at_previous, start_scaled
from atma.mixers.stretches import Stretch
from atma.mixers.stretches_ahead import ahead
from atma.mixers.window import WindowState
from atma.ops import causal_conv
from atma.ops.backend import backend_for
from atma.ops.dense import rms_norm
from atma.ops.rows import gate


class Attention(Composed):
    """q, k, v and gate → RMS → Canon → core → gate → out_proj, plus the core's and the memory's channel."""

    Config = AttentionConfig

    def __init__(self, config: Settings, place: Place) -> None:
        super().__init__()
        own = self.config = config.own
        self.heads, self.groups, self.head_width = own.query_heads, own.key_value_heads, own.head_width
        self.width, self.epsilon = place.width, place.epsilon
        self.key_width = self.key_width_of(own)
        shared, inner = self.groups * self.head_width, self.heads * self.head_width
        q_width, k_width = self.heads * self.key_width, self.groups * self.key_width
        self.q_proj = Linear(place.width, q_width + inner)
        self.k_proj = Linear(place.width, k_width)
        self.v_proj = Linear(place.width, shared)
        self.out_proj = Linear(inner, place.width)
        core = part_of("core", own.core).cls
        self.has_canon = core.canon(config.core)
        self.canon_q, self.canon_k, self.canon_v = (
            nn.Parameter(torch.empty(size, own.canon_taps)) if self.has_canon else None
            for size in (q_width, k_width, shared)
        )
        self.seat = heads = Heads(place, self.heads, self.groups, self.key_width, own.window)
        self.core: Core = core(config.core, heads)
        self.sinks = own.window_sinks
        self.memory: Memory | None = part_of("memory", own.memory).cls(config.memory, heads) if own.memory else None
        self.alpha = nn.Parameter(torch.empty(place.width)) if own.memory_scale else None
        self.policy: Policy | None = None
        """What of its keys is read, where not all are; `select` sets it."""

    def key_width_of(self, own: AttentionConfig) -> int:
        """Numbers of each head's query and key as they are projected."""
        return own.head_width

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None) -> None:
        """`Mixer.init_weights`."""
        for layer in self.children():
            if isinstance(layer, nn.Linear):
                init_linear(layer, generator, zero=layer is self.out_proj)
        for taps in self._canon():
            if taps is not None:
                init_taps(taps, generator)
        if self.config.canon_init == "previous" and self.canon_k is not None:
            start_at_previous(self.canon_k, self.key_width)
        if self.config.share_query_key_init and self.has_canon:
            self.start_alike()
        self.core.init_weights(generator)
        if self.memory is not None:
            self.memory.init_weights(generator)
            if self.alpha is not None:
                start_scaled(self.alpha, self.memory.out_proj, generator)

    def start_alike(self) -> None:
        """Start every query projection as that of its key head."""
        share_projection(self.q_proj, self.k_proj.weight, self.heads, self.groups)

    def _canon(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.canon_q, self.canon_k, self.canon_v

    def init_state(self, batch: int, capacity: int) -> WithSinks | SelectingState:
        """Room for `capacity` keys, or those of the window, in each of `batch` rows; none held yet."""
        weight, window = self.q_proj.weight, self.config.window
        if self.policy is not None:
            cache = self.policy.init_cache(batch, capacity, weight)
            return SelectingState(*self._nothing_read(batch, cache))
        held = weight.new_zeros(batch, self.groups, window or capacity, self.head_width)
        kind = WindowState if window else GlobalState
        state = kind(*self._nothing_read(batch, held, held.clone()))
        if not self.sinks:
            return state
        first = weight.new_zeros(batch, self.groups, self.sinks, self.head_width)
        return SinkState(*state, first, first.clone())

    def _nothing_read(self, batch: int, *held: Any) -> tuple[Any, ...]:
        """The fields of a state before the first token, with what is `held` of keys and values."""
        weight = self.q_proj.weight
        tails = (None if w is None else weight.new_zeros(batch, w.shape[1] - 1, w.shape[0]) for w in self._canon())
        memory = None if self.memory is None else self.memory.init_state(batch)
        return torch.zeros(batch, dtype=torch.int32, device=weight.device), *held, *tails, memory

    def project(
        self, x: Tensor, state: WithSinks | SelectingState | None = None, segment_ids: Tensor | None = None
    ) -> Projected:
        """x (B, T, D) to what the core reads: per-head RMS-normalised q and k, then Canon on q, k and v."""
        q, gate = self.queries(x)
        k, v = self.keys_and_values(x, q)
        q, k = (z.flatten(2) for z in self.normed(q, k))
        inputs = (q, k, v)
        tails = (None,) * 3 if state is None else (state.q_tail, state.k_tail, state.v_tail)
        mixed = [
            z if w is None else z + causal_conv(z, w, None if tail is None else tail.to(z.dtype), segment_ids)
            for z, w, tail in zip(inputs, self._canon(), tails, strict=True)
        ]
        counts = (self.heads, self.groups, self.groups)
        q, k, v = (z.unflatten(-1, (count, -1)).transpose(1, 2) for z, count in zip(mixed, counts, strict=True))
        return Projected(q, k, v, None if gate is None else gate.transpose(1, 2), inputs)

    def queries(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x (B, T, D) to bare queries (B, T, H, ·) and their gate (B, T, H, K), None without one."""
        q, gate = self.q_proj(x).unflatten(-1, (self.heads, -1)).tensor_split((self.key_width,), -1)
        return q, gate

    def normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Bare queries (B, T, H, ·) and keys (B, T, G, ·) as Canon takes them."""
        return tuple(rms_norm(z, None, self.key_width, self.epsilon) for z in (q, k))  # pyright: ignore[reportReturnType]

    def keys_and_values(self, x: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, D) and its projected queries (B, T, H, ·) to keys (B, T, G, ·) and values (B, T, G·K), both bare."""
        return self.k_proj(x).unflatten(-1, (self.groups, -1)), self.v_proj(x)

    def forward(
        self,
        x: Tensor,
        state: WithSinks | SelectingState | None = None,
        *,
        segment_ids: Tensor | None = None,
        call: Call | None = None,
    ) -> tuple[Tensor, WithSinks | SelectingState | None]:
        """x (B, T, D) to y (B, T, D). Keys and values are held after Canon and with their positions."""
        if self.policy is not None and not isinstance(state, SelectingState):
            return selected_afresh(self, x, state, segment_ids, call)
        projected = self.project(x, state, segment_ids)
        start = None if state is None else state.length
        q, keys = self.core.turn(projected.q, projected.k, start, segment_ids)
        if isinstance(state, SelectingState):
            assert self.policy is not None
            new = New(q, keys, projected.v, projected.q, projected.k, state.length)
            read, added, held = self.policy(new, state.cache, call)
        else:
            held = self.attended(state, keys, projected.v)
            read, added = self.read(q, held, segment_ids)
        y, memory = self.output(x, projected, (read, added), state, segment_ids)
        return y, None if state is None else self._advance(state, held, projected.inputs, memory)

    def forward_shard(self, x: Tensor, stretch: Stretch, call: Call | None = None) -> Tensor:
        """`Mixer.forward_shard`: keys of the whole text go to the next process before they are read."""
        kind = type(self)
        plain = kind.forward is Attention.forward and kind.attended is Attention.attended
        if not plain or self.policy is not None or self.config.window is not None:
            return super().forward_shard(x, stretch, call)
        return ahead(self, x, stretch, call)

    def ahead(self, x: Tensor, state: GlobalState) -> tuple[GlobalState, Callable[[GlobalState], Tensor]]:
        """x (B, T, D) to the state moved on, and what makes y (B, T, D) of it."""
        projected = self.project(x, state)
        q, keys = self.core.turn(projected.q, projected.k, state.length, None)
        seen = self.attended(state, keys, projected.v)
        written, memory = self.remembered(x, projected, state, None)

        def finish(after: GlobalState) -> Tensor:
            read = self.read(q, seen._replace(keys=after.keys, values=after.values), None)
            return self._joined(read, projected.gate, written)

        after = self._advance(state, seen, projected.inputs, memory)
        assert isinstance(after, GlobalState)
        return after, finish

    def output(
        self, x: Tensor, given: Projected, read: tuple[Tensor, Tensor | None], state: Any, segment_ids: Tensor | None
    ) -> tuple[Tensor, Any]:
        """y (B, T, D) of what the core reads and adds, the memory's channel with it, and what the memory then holds."""
        written, memory = self.remembered(x, given, state, segment_ids)
        return self._joined(read, given.gate, written), memory

    def remembered(self, x: Tensor, given: Projected, state: Any, segment_ids: Tensor | None) -> tuple[Any, Any]:
        """The memory's channel (B, T, D), and what it then holds; None without a memory."""
        if self.memory is None:
            return None, None
        before = None if state is None else state.memory
        written, memory = self.memory(x, given.q, given.k, given.v, before, segment_ids=segment_ids)
        return written if self.alpha is None else written * self.alpha.to(written.dtype), memory

    def _joined(self, read: tuple[Tensor, Tensor | None], opening: Tensor | None, written: Tensor | None) -> Tensor:
        y = self.out_proj(self.gated(read[0], opening))
        for more in (read[1], written):
            y = y if more is None else y + more
        return y

    def read(self, q: Tensor, seen: Attended, segment_ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the core reads for q (B, H, T, K), and what it adds, of what is seen."""
        if self.sinks:
            return read_with_sinks(self.core, q, seen, segment_ids, self.sinks), None
        return self.core(q, seen.keys, seen.values, seen.start, segment_ids)

    def gated(self, read: Tensor, opening: Tensor | None) -> Tensor:
        """What the heads read (B, H, T, K), gated, side by side (B, T, H·K)."""
        return read.transpose(1, 2).flatten(2) if opening is None else gate(read, opening)

    def _advance(
        self, state: WithSinks | SelectingState, held: Any, inputs: tuple[Tensor, ...], memory: Any
    ) -> WithSinks | SelectingState:
        """The state moved on; held: what is attended, or the policy's cache."""
        tails = (state.q_tail, state.k_tail, state.v_tail)
        q, k, v = (None if t is None else advance(t, z.to(t.dtype)) for t, z in zip(tails, inputs, strict=True))
        length = state.length + inputs[0].shape[1]
        if isinstance(state, SelectingState):
            return SelectingState(length, held, q, k, v, memory)
        seen: Attended = held
        assert seen.held is not None
        first = () if seen.sinks is None else seen.sinks[:2]
        return type(state)(length, *seen.held, q, k, v, memory, *first)

    @property
    def selects(self) -> bool:
        """`Mixer.selects`: where keys of the whole text are held."""
        return self.config.window is None and type(self).forward is Attention.forward

    def select(self, policy: Policy | None, reads_call: bool = False) -> None:
        """From here on read as `policy` says, with states of its own; None: everything."""
        self.policy, self.reads_call = policy, reads_call

    def attended(
        self, state: WithSinks | SelectingState | None, k: Tensor, v: Tensor, in_order: bool = False
    ) -> Attended:
        """`Attending.attended`."""
        if isinstance(state, SelectingState):
            assert self.policy is not None
            return self.policy.attended(state.cache, k, v, state.length)
        return behind(state, k, v, in_order)

    def channels(self) -> dict[str, nn.Linear]:
        """`Mixer.channels`: what is attended, what the core adds, and the memory."""
        memory = {} if self.memory is None else {"memory": self.memory.out_proj}
        return {"read": self.out_proj, **self.core.channels(), **memory}

    def steady(self, on: bool = True) -> bool:
        """`Mixer.steady`: with the compiled operations, and a core and a memory with such a form; none with sinks."""
        compiled = all(backend_for("auto", self.q_proj.weight, name) == "native" for name in ("dense", "polar", "conv"))
        on = on and compiled and not self.sinks and self.core.steady(on)
        return on if self.memory is None else self.memory.steady(on)

    @property
    def reach(self) -> int | None:
        """`Mixer.reach`."""
        canon = self.config.canon_taps - 1 if self.has_canon else 0
        return None if self.config.window is None or self.sinks else self.config.window - 1 + canon

    def retention(self) -> nn.Module | None:
        """`Mixer.retention`: the memory, where it has decays."""
        return self.memory if self.memory is not None and self.memory.forgets else None


_TINY = {"query_heads": 2, "key_value_heads": 1, "head_width": 8}
SMALL = (
    *(
        _TINY | {"core": core, "memory": memory, "window": window}
        for core, memory, window in product(("polar", "nope", "rope"), (True, False), (None, 7))
    ),
    _TINY | {"core": "rope", "rope_canon": True, "window": 7},
    _TINY | {"core": "rope", "memory": "gla", "memory_scale": True, "window": 5, "window_sinks": 3},
    _TINY | {"core": "nope", "memory": False, "window": 3, "window_sinks": 70},
    *(_TINY | {"core": "rope_homotopy", "rope_canon": True, "start_mix": mix} for mix in (0.0, 0.3, 1.0)),
    _TINY | {"core": "rope_homotopy", "memory": False, "window": 7, "start_mix": 0.3, "start_fade": 0.4},
    _TINY | {"core": "persistent", "persistent": 3, "memory": False, "window": 7},
    _TINY | {"core": "polar", "learned_half_life": True, "max_half_life": 32.0, "count_limit": 9},
)

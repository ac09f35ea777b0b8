"""The global mixer: projections, Canon, gate and memory around an attention core (maths.md, section 3)."""

from collections.abc import Mapping
from dataclasses import Field, fields
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from atma.layers import Linear, init_linear
from atma.mixers.attention_config import AttentionConfig, Settings
from atma.mixers.base import Call, Place
from atma.mixers.gated_conv import advance, init_taps
from atma.mixers.heads import Attended, Attending, Core, Heads, Memory, Projected
from atma.mixers.held import GlobalState, SelectingState, WithSinks, behind
from atma.mixers.parts import name_of, open_options, part_of
from atma.mixers.policies.base import New, Policy
from atma.mixers.selecting import selected_afresh
from atma.mixers.sinks import SinkState, read_with_sinks
from atma.mixers.starts import share_projection, start_at_previous, start_scaled
from atma.mixers.table import Found, names
from atma.mixers.window import WindowState
from atma.ops import causal_conv
from atma.ops.backend import backend_for
from atma.ops.dense import rms_norm
from atma.ops.rows import gate
from atma.strict import from_dict, require


class Attention(Attending):
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
            seen = self.attended(state, keys, projected.v)
            read, added = self.read(q, seen, segment_ids)
            held = seen
        y = self.out_proj(self.gated(read, projected.gate))
        if added is not None:
            y = y + added
        memory = None
        if self.memory is not None:
            before = None if state is None else state.memory
            unturned = (projected.q, projected.k, projected.v)
            written, memory = self.memory(x, *unturned, before, segment_ids=segment_ids)
            y = y + (written if self.alpha is None else written * self.alpha.to(written.dtype))
        return y, None if state is None else self._advance(state, held, projected.inputs, memory)

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

    def attended(self, state: WithSinks | None, k: Tensor, v: Tensor, in_order: bool = False) -> Attended:
        """`Attending.attended`."""
        return behind(state, k, v, in_order)

    def channels(self) -> dict[str, nn.Linear]:
        """`Mixer.channels`: what is attended, what the core adds, and the memory."""
        memory = {} if self.memory is None else {"memory": self.memory.out_proj}
        return {"read": self.out_proj, **self.core.channels(), **memory}

    def steady(self, on: bool = True) -> bool:
        """`Mixer.steady`: with the compiled operations, and a core and a memory that have such a form."""
        compiled = all(backend_for("auto", self.q_proj.weight, name) == "native" for name in ("dense", "polar", "conv"))
        on = on and compiled and self.core.steady(on)
        return on if self.memory is None else self.memory.steady(on)

    @property
    def reach(self) -> int | None:
        """`Mixer.reach`."""
        canon = self.config.canon_taps - 1 if self.has_canon else 0
        return None if self.config.window is None or self.sinks else self.config.window - 1 + canon

    def retention(self) -> nn.Module | None:
        """`Mixer.retention`: the memory, where it has decays."""
        return self.memory if self.memory is not None and self.memory.forgets else None

    @classmethod
    def takes(cls, options: Mapping[str, Any]) -> dict[str, Field[Any]]:
        """`Mixer.takes`: its own options and those of its core and its memory."""
        own = {field.name: field for field in fields(cls.Config)}
        core, memory = (options.get(name, own[name].default) for name in ("core", "memory"))
        parts = [
            part_of(what, name) for what, name in (("core", core), ("memory", memory)) if name_of(name) in names(what)
        ]
        return own | {name: field for part in parts for name, field in open_options(part).items()}

    @classmethod
    def configure(cls, options: Mapping[str, Any], where: str = "") -> Settings:
        """`Mixer.configure`."""

        def chosen(part: Found) -> Any:
            given = {name: options[name] for name in open_options(part) if name in options}
            return from_dict(part.cls.Config, {**given, **part.fixed}, where)

        known = {field.name: options[field.name] for field in fields(cls.Config) if field.name in options}
        own = from_dict(cls.Config, known, where)
        core = part_of("core", own.core, where)
        memory = chosen(part_of("memory", own.memory, where)) if own.memory else None
        config = Settings(own, chosen(core), memory)
        single = own.canon_taps == 1 and own.canon_init == "previous" and core.cls.canon(config.core)
        summed = core.cls.plain_softmax or not own.window_sinks
        require(
            summed, f"{where}window_sinks", own.window_sinks, f'0 with core = "{own.core}", which is no plain softmax'
        )
        scaled = bool(own.memory) or not own.memory_scale
        require(scaled, f"{where}memory_scale", own.memory_scale, "false without a memory")
        require(not single, "canon_taps", 1, 'at least 2 for canon_init = "previous" ("uniform" takes one)')
        return config

    @classmethod
    def options(cls, config: Settings) -> dict[str, Any]:
        """`Mixer.options`."""
        own = config.own
        parts = [(config.core, part_of("core", own.core))]
        if own.memory:
            parts.append((config.memory, part_of("memory", own.memory)))
        told = {field.name: getattr(own, field.name) for field in fields(own)}
        return told | {name: getattr(chosen, name) for chosen, part in parts for name in open_options(part)}


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

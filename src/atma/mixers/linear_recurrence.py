"""Linear recurrences as mixers: q, k and v around one operation, `atma.ops.recurrence` (mixers.md, sections 2 and 3).

The published systems are the lines of `recurrent_systems`; their feature maps, gates and surround are modules beside
this one.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from atma.layers import Linear
from atma.mixers.base import Mixer, Place
from atma.mixers.features import FEATURES, Feature, Unit
from atma.mixers.recurrent_decays import Sizes, by_head, silu
from atma.mixers.recurrent_gates import Gates
from atma.mixers.recurrent_reading import Inputs, behind, from_nothing, recur
from atma.mixers.recurrent_surround import Readout, ShortConv, begin_at_recall
from atma.mixers.recurrent_systems import SYSTEMS, RecurrenceConfig, sizes
from atma.mixers.stretches_prefix import Transition
from atma.ops.backend import backend_for
from atma.ops.rows import expm1, rotate
from atma.ops.segments import tokens_before

BASE = 10_000.0
"""Of RetNet's rotary positions."""


class RecurrentState(NamedTuple):
    """Of a recurrence. What its system does not need is None."""

    memory: Tensor  # (B, H, V, K′), float32 or wider; with a normaliser V + 1 rows
    tail: Tensor | None = None  # (B, 3, C): the last inputs of the convolution, q, k and v side by side
    length: Tensor | None = None  # (B,) int32: where positions are turned


class LinearRecurrence(Mixer):
    """q, k, v → convolution → φ → M ← M diag(a) + β w kᵀ, M q → norm → gate → projection."""

    Config = RecurrenceConfig

    def __init__(self, config: RecurrenceConfig, place: Place) -> None:
        super().__init__()
        self.config, self.sizes = config, sizes(config, place)
        self.heads = self.sizes.heads
        self.turned, self.mamba = config.system == "retnet", config.system == "mamba2"
        self.key_heads = 1 if self.mamba else config.key_heads or self.heads
        self.key_floor = config.decay == "floor"
        keys, values = self.key_heads * self.sizes.key_width, self.heads * self.sizes.value_width
        self.q_proj = Linear(place.width, keys, bias=False)
        self.k_proj = None if self.key_floor else Linear(place.width, keys, bias=False)
        self.v_proj = Linear(place.width, values, bias=False)
        self.widths = [keys, values] if self.key_floor else [keys, keys, values]
        self.conv = None
        if config.conv is not None and config.conv != "none":
            self.conv = ShortConv(config.conv, sum(self.widths), self.mamba)
        self.feature = feature_of(config, self.sizes)
        self.gates = gates_of(config, self.sizes)
        self.skip = nn.Parameter(torch.empty(self.heads)) if self.mamba else None
        self.readout = _readout(config, self.sizes)
        self.in_turn = False
        """Whether tokens are taken one after the other, by operations whose bits are a row's own."""

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None) -> None:
        """`Mixer.init_weights`."""
        super().init_weights(generator)
        if self.conv is not None:
            self.conv.init_weights(generator)
        self.feature.init_weights()
        self.gates.init_weights(generator)
        self.readout.init_weights()
        if self.skip is not None:
            nn.init.ones_(self.skip)
        if self.config.start == "recall":
            assert self.k_proj is not None and self.conv is not None
            begin_at_recall(self.q_proj, self.k_proj, self.conv, self.widths)
            if self.gates.decay is not None:
                self.gates.decay.begin_slowly(self.config.max_half_life)

    def init_state(self, batch: int, capacity: int) -> RecurrentState:
        """Zeros; `capacity` has no part in it."""
        weight = self.readout.out_proj.weight
        memory = empty_memory(weight, batch, self.sizes, self.feature.width, bool(self.config.normaliser))
        length = torch.zeros(batch, dtype=torch.int32, device=weight.device) if self.turned else None
        return RecurrentState(memory, None if self.conv is None else self.conv.empty(batch), length)

    def forward(
        self, x: Tensor, state: RecurrentState | None = None, *, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        """x (B, T, D) to y (B, T, D). ValueError: a normaliser of zero."""
        given, tail = self._inputs(x, state, segment_ids)
        memory = None if state is None else state.memory
        read, memory = recur(given, memory, segment_ids, self.config, self.in_turn)
        y = self._output(read, given, x)
        if state is None:
            return y, None
        return y, RecurrentState(memory, tail, None if state.length is None else state.length + x.shape[1])

    def transition(self, x: Tensor, state: RecurrentState, begun: bool) -> Transition:
        """`Mixer.transition`: of the memory."""
        given, _ = self._inputs(x, state, None)
        made = from_nothing(given, self.config, begun)

        def finish(read: Tensor, before: Mapping[str, Tensor]) -> Tensor:
            return self._output(behind(read, before.get("memory"), given, self.config), given, x)

        factors = {} if made.factor is None else {"memory": made.factor}
        return Transition(made.read, {"memory": made.memory}, factors, finish, self.config.rule == "delta")

    def _inputs(
        self, x: Tensor, state: RecurrentState | None, segment_ids: Tensor | None
    ) -> tuple[Inputs, Tensor | None]:
        """What the operation takes of x, and the tail after."""
        tail, length = (None, None) if state is None else (state.tail, state.length)
        (q, k, v), tail = self._project(x, tail, segment_ids)
        if self.turned:
            assert k is not None
            q, k = self._turn(q, length, segment_ids), self._turn(k, length, segment_ids)
        log_decay, beta = self.gates(x, self.in_turn)
        log_decay = taken(self, x, log_decay)
        if k is None:
            assert log_decay is not None
            k = -expm1(log_decay, self.in_turn)
        q, k = self.feature(q, self.in_turn), self.feature(k, self.in_turn)
        if self.config.key_heads:
            q, k = (z.repeat_interleave(self.heads // self.key_heads, 1) for z in (q, k))
        if SYSTEMS[self.config.system].scaled:
            q = q * self.sizes.key_width**-0.5
        return Inputs(q, k, v, log_decay, beta), tail

    def _output(self, read: Tensor, given: Inputs, x: Tensor) -> Tensor:
        """y (B, T, D) of what is read (B, H, T, V)."""
        if self.skip is not None:
            read = read + self.skip.to(read.dtype)[:, None, None] * given.v
        return self.readout(read, x, self.in_turn)

    def _project(
        self, x: Tensor, tail: Tensor | None, segment_ids: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor | None, Tensor], Tensor | None]:
        """q, k and v by heads, and the tail after; k is None where it is what the decays leave."""
        layers = [layer for layer in (self.q_proj, self.k_proj, self.v_proj) if layer is not None]
        parts = [layer(x) for layer in layers]
        if self.conv is not None:
            mixed, tail = self.conv(torch.cat(parts, -1), tail, segment_ids, self.in_turn)
            parts = list(mixed.split(self.widths, -1))
        if self.config.system == "lightning" and self.config.conv != "silu":
            parts = [silu(part, self.in_turn) for part in parts]
        if self.config.system == "hgrn2" and self.config.conv != "silu":
            parts[0] = silu(parts[0], self.in_turn)
        q, v = by_head(parts[0], self.key_heads), by_head(parts[-1], self.heads)
        return (q, by_head(parts[1], self.key_heads) if len(parts) == 3 else None, v), tail

    def _turn(self, x: Tensor, start: Tensor | None, segment_ids: Tensor | None) -> Tensor:
        """x (B, H, T, K) by the angles n · 10000^(−2i/K), pairs (i, i + K/2), of positions n."""
        if segment_ids is not None:
            position = tokens_before(segment_ids)
        else:
            position = torch.arange(x.shape[2], device=x.device, dtype=torch.int32)[None]
            position = position if start is None else start[:, None] + position
        pairs = torch.arange(x.shape[3] // 2, dtype=torch.float64, device=x.device)
        return rotate(x, position, -(BASE ** (-2 / x.shape[3] * pairs)))

    def log_decay(self, x: Tensor) -> Tensor:
        """`Mixer.log_decay`: of channels their mean."""
        log_decay, _ = self.gates(x, self.in_turn)
        if log_decay is None:
            return super().log_decay(x)
        return mean_of(log_decay)

    def bound(self, head: int) -> float:
        """`Mixer.bound`."""
        return self.gates.bound(head)

    def retention(self) -> nn.Module | None:
        """`Mixer.retention`."""
        return None if self.gates.decay is None else self

    def channels(self) -> dict[str, nn.Linear]:
        """`Mixer.channels`."""
        return {"read": self.readout.out_proj}

    def share_weights(self, first: Mixer) -> None:
        """`Mixer.share_weights`: the table of floors."""
        share_table(self.gates, first.gates if isinstance(first, LinearRecurrence) else None)

    def steady(self, on: bool = True) -> bool:
        """`Mixer.steady`: with the compiled operations, and a feature map that has such a form."""
        compiled = (
            backend_for("auto", self.q_proj.weight, name) == "native" for name in ("dense", "conv", "recurrent")
        )
        self.in_turn = on and self.feature.steady and all(compiled)
        return self.in_turn

    @property
    def reach(self) -> int:
        """`Mixer.reach`."""
        return 0 if self.conv is None else self.conv.taps.shape[1] - 1


def feature_of(config: RecurrenceConfig, sizes: Sizes) -> Feature:
    """The feature map of a configuration."""
    assert config.feature is not None
    feature = FEATURES[config.feature](config.key_heads or sizes.heads, sizes.key_width, config.degree)
    if isinstance(feature, Unit):
        feature.epsilon = config.unit_epsilon
    return feature


def gates_of(config: RecurrenceConfig, sizes: Sizes) -> Gates:
    """The decays and β of a configuration."""
    assert config.decay is not None and config.write is not None
    least = SYSTEMS[config.system].least
    return Gates(sizes, config.decay, config.write, config.negative, config.max_half_life, least)


def empty_memory(weight: Tensor, batch: int, sizes: Sizes, width: int, normaliser: bool) -> Tensor:
    """Zeros (B, H, V, K′), float32 or wider."""
    work = torch.promote_types(weight.dtype, torch.float32)
    return weight.new_zeros(batch, sizes.heads, sizes.value_width + normaliser, width, dtype=work)


def share_table(gates: Gates, first: Gates | None) -> None:
    """Take the first such layer's table of floors. ValueError: it is one of another width, or has none."""
    table = getattr(gates.decay, "table", None)
    if table is None:
        return
    other = None if first is None else getattr(first.decay, "table", None)
    if other is None:
        raise ValueError(
            "layers with decay 'floor' share the table of the first layer of their kind, here one without that decay: "
            "give it the decay 'floor', or let it come later"
        )
    if other.shape != table.shape:
        found = f"{tuple(table.shape)} and {tuple(other.shape)}"
        raise ValueError(f"layers with decay 'floor' share one table, here {found}: give them equal sizes")
    gates.decay.table = other  # pyright: ignore


def _readout(config: RecurrenceConfig, sizes: Sizes) -> Readout:
    assert config.norm is not None and config.out_gate is not None
    rank = {"lightning": sizes.key_width, "kda": sizes.value_width}.get(config.system)
    readout = Readout(sizes, config.norm, config.out_gate, rank, config.system == "kda", config.system == "mamba2")
    if config.read_epsilon is not None:
        readout.epsilon = config.read_epsilon
    return readout


def taken(module: nn.Module, x: Tensor, log_decay: Tensor | None) -> Tensor | None:
    """The decays of a module's call, moved as far as a measurement moves their means.

    That puts a function of its own in place of the module's `log_decay` (atma.diagnose.interventions).
    """
    if log_decay is None or "log_decay" not in vars(module):
        return log_decay
    moved = vars(module)["log_decay"](x) - mean_of(log_decay)
    return log_decay + (moved.unsqueeze(-1) if log_decay.ndim == 4 else moved)


def mean_of(log_decay: Tensor) -> Tensor:
    """log a (B, H, T), of channels (B, H, T, K) their mean."""
    return log_decay.mean(-1) if log_decay.ndim == 4 else log_decay


SMALL = (
    {"system": "linear", "query_heads": 2},
    {"system": "based", "query_heads": 2, "key_width": 3},
    {"system": "hedgehog", "query_heads": 2},
    {"system": "lightning", "query_heads": 2},
    {"system": "retnet", "heads": 2},
    {"system": "gla", "heads": 2},
    {"system": "hgrn2", "key_width": 8},
    {"system": "mamba2", "key_width": 6, "value_width": 16},
    {"system": "deltanet", "heads": 2, "negative": True},
    {"system": "gated_deltanet", "heads": 2, "key_width": 4},
    {
        "system": "gated_deltanet",
        "heads": 4,
        "key_heads": 2,
        "key_width": 4,
        "unit_epsilon": 1e-6,
        "read_epsilon": 1e-6,
    },
    {"system": "kda", "key_width": 8},
    {"system": "delta_memory", "query_heads": 2},
    {"system": "poly_delta", "query_heads": 2, "key_width": 3},
    {"system": "poly_delta", "query_heads": 2, "key_width": 3, "conv": "none", "start": "published"},
    {"system": "gla", "heads": 2, "conv": "canon", "rule": "delta", "feature": "unit", "write": "sigmoid"},
)

"""Linear recurrences as the third channel of a global mixer (mixers.md, section 2.2, its end).

A memory has the recurrence of its system, its feature map, its decays and its β; it reads the mixer's own q, k and v,
which have no positions, and ends like the gated-delta memory: a norm, a gate, and a projection that starts at zero.
What a system has as K and V is then the head width. Heads too wide for a feature map are refused, but for "poly", which
is of narrower queries and keys, projected from the mixer's own.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from atma.layers import init_linear
from atma.mixers.features import WIDEST, Narrow
from atma.mixers.heads import Heads, Memory
from atma.mixers.linear_recurrence import empty_memory, feature_of, gates_of, mean_of, taken
from atma.mixers.recurrent_decays import Sizes
from atma.mixers.recurrent_reading import Inputs, recur
from atma.mixers.recurrent_surround import Readout, StartName
from atma.mixers.recurrent_systems import SYSTEMS, RecurrenceConfig, SystemName
from atma.ops.backend import backend_for
from atma.strict import FOLLOWS, check_fields, require


@dataclass(frozen=True)
class MemoryConfig:
    """What is to be chosen of a recurrence in a global mixer."""

    system: SystemName = "kda"
    """The published system. The name of a memory fixes it."""
    max_half_life: float = field(default=math.inf, metadata=FOLLOWS)
    """Upper bound, in tokens, of the half-life of every learned decay, as of the gated-delta memory: it is a part of
    this library's own layer, so a preset's bound is its own too."""
    negative: bool = False
    """β up to 2, of the delta rule."""
    start: StartName | None = None
    """Initial values: see `StartName`."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.max_half_life > 0, "max_half_life", self.max_half_life, "positive")


class RecurrentMemory(Memory):
    """M ← M diag(a) + β w φ(k)ᵀ, read by φ(q)."""

    Config = MemoryConfig

    def __init__(self, config: MemoryConfig, heads: Heads) -> None:
        super().__init__()
        width, system = heads.head_width, SYSTEMS[config.system]
        lifted, products = system.feature == "poly", system.feature == "taylor"
        most = f'at most {WIDEST} for memory = "{config.system}"'
        require(not products or width <= WIDEST, "head_width", width, most)
        self.config = RecurrenceConfig(
            config.system,
            conv="none",
            start="published",  # of the convolution that there is not
            norm="plain",
            out_gate="sigmoid",
            negative=config.negative,
            max_half_life=config.max_half_life,
        )
        self.sizes = Sizes(heads.place, heads.heads, WIDEST if lifted else width, width)
        self.narrow = Narrow(heads.heads, heads.groups, width) if lifted else None
        self.feature = feature_of(self.config, self.sizes)
        self.gates = gates_of(self.config, self.sizes)
        self.readout = Readout(self.sizes, "plain", "sigmoid")
        self.start, self.in_turn = config.start or system.start, False

    @property
    def out_proj(self) -> nn.Linear:  # pyright: ignore[reportIncompatibleVariableOverride]
        """`Memory.out_proj`."""
        return self.readout.out_proj

    def init_weights(self, generator: torch.Generator | None) -> None:
        """`Memory.init_weights`."""
        for layer in [module for module in self.modules() if isinstance(module, nn.Linear)]:
            init_linear(layer, generator, zero=layer is self.out_proj)
        if self.narrow is not None:
            self.narrow.init_weights(generator)
        self.feature.init_weights()
        self.gates.init_weights(generator)
        if self.start == "recall" and self.gates.decay is not None:
            self.gates.decay.begin_slowly(self.config.max_half_life)

    def init_state(self, batch: int) -> Tensor:
        """Zeros (B, H, V, K′), float32 or wider; with a normaliser V + 1 rows."""
        return empty_memory(self.out_proj.weight, batch, self.sizes, self.feature.width, bool(self.config.normaliser))

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, memory: Tensor | None, *, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`Memory.forward`. ValueError: a normaliser of zero."""
        log_decay, beta = self.gates(x, self.in_turn)
        if self.narrow is not None:
            q, k = self.narrow(q, k)
        q, k = self.feature(q, self.in_turn), self.feature(k, self.in_turn)
        if SYSTEMS[self.config.system].scaled:
            q = q * self.sizes.key_width**-0.5
        given = Inputs(q, k, v, taken(self, x, log_decay), beta)
        read, memory = recur(given, memory, segment_ids, self.config, self.in_turn)
        return self.readout(read, x, self.in_turn), memory

    @property
    def forgets(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """`Memory.forgets`."""
        return self.gates.decay is not None

    def log_decay(self, x: Tensor) -> Tensor:
        """log a ≤ 0 (B, H, T), float32 or wider: of channels their mean."""
        log_decay, _ = self.gates(x, self.in_turn)
        assert log_decay is not None
        return mean_of(log_decay)

    def bound(self, head: int) -> float:
        """The longest half-life, in tokens, that a head can have."""
        return self.gates.bound(head)

    def steady(self, on: bool = True) -> bool:
        """`Memory.steady`: the mixer has seen to it that the rest is compiled."""
        compiled = backend_for("auto", self.out_proj.weight, "recurrent") == "native"
        self.in_turn = on and compiled and self.feature.steady
        return self.in_turn

"""Neural memories as the third channel of a global mixer (mixers.md, section 2.2, its end).

A memory has the network, gates and slow weights of its system; it reads the mixer's own q, k and v, which have no
positions, and ends in a norm, a gate and a projection that starts at zero. K and V are the head width; products of
coordinates are of narrower queries and keys, projected from the mixer's own. Kernels, which keep keys of their own, are
no third channel.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from atma.layers import init_linear
from atma.mixers.features import WIDEST, Narrow
from atma.mixers.heads import Heads, Memory
from atma.mixers.linear_recurrence import mean_of, taken
from atma.mixers.neural_config import NeuralConfig
from atma.mixers.neural_systems import SYSTEMS, SystemName
from atma.mixers.neural_weights import FastWeights
from atma.mixers.recurrent_decays import Sizes
from atma.mixers.recurrent_surround import Readout, StartName
from atma.ops.fast_weights import MemoryState
from atma.strict import FOLLOWS, check_fields, require


@dataclass(frozen=True)
class ChannelConfig:
    """What is to be chosen of a neural memory in a global mixer."""

    system: SystemName = "atma_memory"
    """The published system. The name of a memory fixes it."""
    memory_chunk: int | None = None
    """C, tokens from one renewal of the anchor to the next; None is what the system has."""
    max_half_life: float = field(default=math.inf, metadata=FOLLOWS)
    """Upper bound, in tokens, of γ's half-life, as of the gated-delta memory: it is a part of this library's own layer,
    so a preset's bound is its own too."""

    start: StartName = "published"
    """Initial values: see `StartName`."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.max_half_life > 0, "max_half_life", self.max_half_life, "positive")
        fast = NeuralConfig(self.system, memory_chunk=self.memory_chunk).network != "kernel"
        require(fast, "system", self.system, "one with fast weights in a global mixer")


class NeuralChannel(Memory):
    """Fast weights on the mixer's queries, keys and values."""

    Config = ChannelConfig

    def __init__(self, config: ChannelConfig, heads: Heads) -> None:
        super().__init__()
        most = config.max_half_life if SYSTEMS[config.system].forgets else math.inf
        own = NeuralConfig(config.system, memory_chunk=config.memory_chunk, max_half_life=most)
        lifted, width = own.feature == "poly", heads.head_width
        self.half_life, self.in_turn = most, False
        self.start = config.start
        self.sizes = Sizes(heads.place, heads.heads, WIDEST if lifted else width, width)
        self.memory = FastWeights(own, self.sizes)
        self.narrow = Narrow(heads.heads, heads.groups, width) if lifted else None
        self.readout = Readout(self.sizes, "plain", "sigmoid")

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
        self.memory.init_weights(generator)
        if self.start == "recall":
            self.memory.gates.begin_slowly()

    def init_state(self, batch: int) -> MemoryState:
        """An empty memory."""
        return self.memory.init_state(batch, 0)

    def forward(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        memory: MemoryState | None,
        *,
        segment_ids: Tensor | None = None,
    ) -> tuple[Tensor, MemoryState]:
        """`Memory.forward`."""
        if self.narrow is not None:
            q, k = self.narrow(q, k)
        log_keep = taken(self, x, self.memory.log_keep(x, self.in_turn))
        read, after = self.memory(x, (q, k, v), log_keep, memory, segment_ids, self.in_turn)
        return self.readout(read, x, self.in_turn), after

    @property
    def forgets(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """`Memory.forgets`."""
        return self.memory.gates.keep is not None

    def log_decay(self, x: Tensor) -> Tensor:
        """log γ ≤ 0 (B, H, T), float32 or wider: of channels their mean."""
        log_keep = self.memory.log_keep(x, self.in_turn)
        assert log_keep is not None
        return mean_of(log_keep)

    def bound(self, head: int) -> float:
        """The longest half-life, in tokens, that a head can have."""
        return self.half_life

    def steady(self, on: bool = True) -> bool:
        """`Memory.steady`: the mixer has seen to it that the rest is compiled."""
        self.in_turn = on and self.memory.steady()
        return self.in_turn

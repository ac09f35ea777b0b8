"""Neural memories as mixers: q, k and v around fast weights or a kernel (mixers.md, sections 2.2 and 4).

Alone in a layer this is the wiring LMM; followed by windowed attention in the pattern, MAL. The published systems are
the lines of `neural_systems`; the memories themselves and their gates are modules beside this one.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from atma.layers import Linear
from atma.mixers.base import Mixer, Place
from atma.mixers.linear_recurrence import mean_of, taken
from atma.mixers.neural_config import NeuralConfig, sizes
from atma.mixers.neural_weights import FastWeights, memory_of
from atma.mixers.recurrent_decays import by_head
from atma.mixers.recurrent_surround import Readout, ShortConv, begin_at_recall
from atma.ops.backend import backend_for
from atma.ops.fast_weights import KernelState, MemoryState


class NeuralState(NamedTuple):
    """Of a neural memory and the surround."""

    memory: MemoryState | KernelState
    tail: Tensor | None = None  # (B, 3, C): the last inputs of the convolution, q, k and v side by side


class NeuralMemory(Mixer):
    """q, k, v → convolution → φ → a step of the inner gradient, a read → norm → gate → projection."""

    Config = NeuralConfig

    def __init__(self, config: NeuralConfig, place: Place) -> None:
        super().__init__()
        self.config, self.sizes, self.in_turn = config, sizes(config, place), False
        self.heads = self.sizes.heads
        self.memory = memory_of(config, self.sizes)
        keys, values = self.heads * self.sizes.key_width, self.heads * self.sizes.value_width
        self.widths = [keys, keys, values]
        self.q_proj = Linear(place.width, keys, bias=False)
        self.k_proj = Linear(place.width, keys, bias=False)
        self.v_proj = Linear(place.width, values, bias=False)
        assert config.conv is not None and config.out_gate is not None
        self.conv = None if config.conv == "none" else ShortConv(config.conv, sum(self.widths), bias=False)
        self.readout = Readout(self.sizes, "plain", config.out_gate)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None) -> None:
        """`Mixer.init_weights`."""
        super().init_weights(generator)
        if self.conv is not None:
            self.conv.init_weights(generator)
        self.memory.init_weights(generator)
        self.readout.init_weights()
        if self.config.start == "recall":
            assert self.conv is not None
            begin_at_recall(self.q_proj, self.k_proj, self.conv, self.widths)
            if isinstance(self.memory, FastWeights):
                self.memory.gates.begin_slowly()

    def init_state(self, batch: int, capacity: int) -> NeuralState:
        """An empty memory; `capacity` is the room of a kernel."""
        return NeuralState(
            self.memory.init_state(batch, capacity), None if self.conv is None else self.conv.empty(batch)
        )

    def forward(
        self, x: Tensor, state: NeuralState | None = None, *, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, NeuralState | None]:
        """x (B, T, D) to y (B, T, D)."""
        memory, tail = (None, None) if state is None else state
        qkv, tail = self._project(x, tail, segment_ids)
        log_keep = taken(self, x, self.memory.log_keep(x, self.in_turn))
        read, memory = self.memory(x, qkv, log_keep, memory, segment_ids, self.in_turn)
        y = self.readout(read, x, self.in_turn)
        return y, None if state is None else NeuralState(memory, tail)

    def _project(
        self, x: Tensor, tail: Tensor | None, segment_ids: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
        """q, k and v by heads, and the tail after."""
        parts = [layer(x) for layer in (self.q_proj, self.k_proj, self.v_proj)]
        if self.conv is not None:
            mixed, tail = self.conv(torch.cat(parts, -1), tail, segment_ids, self.in_turn)
            parts = list(mixed.split(self.widths, -1))
        q, k, v = (by_head(part, self.heads) for part in parts)
        return (q, k, v), tail

    def log_decay(self, x: Tensor) -> Tensor:
        """`Mixer.log_decay`: log γ, of channels their mean."""
        log_keep = self.memory.log_keep(x, self.in_turn)
        return super().log_decay(x) if log_keep is None else mean_of(log_keep)

    def bound(self, head: int) -> float:
        """`Mixer.bound`."""
        return self.config.max_half_life

    def retention(self) -> nn.Module | None:
        """`Mixer.retention`."""
        return self if self.config.forgets else None

    def channels(self) -> dict[str, nn.Linear]:
        """`Mixer.channels`."""
        return {"read": self.readout.out_proj}

    def steady(self, on: bool = True) -> bool:
        """`Mixer.steady`: with the compiled operations, and a memory that has such a form."""
        compiled = (backend_for("auto", self.q_proj.weight, name) == "native" for name in ("dense", "conv"))
        self.in_turn = on and self.memory.steady() and all(compiled)
        return self.in_turn

    @property
    def reach(self) -> int | None:
        """`Mixer.reach`: a kernel keeps every key."""
        if not isinstance(self.memory, FastWeights):
            return None
        return 0 if self.conv is None else self.conv.taps.shape[1] - 1


SMALL = (
    {"system": "atma_memory", "query_heads": 2, "memory_chunk": 4, "step_most": 0.25},
    {"system": "titans", "query_heads": 2, "memory_chunk": 4, "step_most": 0.25},
    {"system": "ttt_linear", "query_heads": 2, "memory_chunk": 4},
    {"system": "ttt_mlp", "query_heads": 2, "memory_chunk": 4},
    {"system": "moneta", "query_heads": 2, "memory_chunk": 4},
    {"system": "yaad", "query_heads": 2, "memory_chunk": 4},
    {"system": "memora", "query_heads": 2, "memory_chunk": 4},
    {"system": "dla", "query_heads": 2, "key_width": 3, "memory_chunk": 4},
    {"system": "swla", "query_heads": 2, "key_width": 3, "memory_chunk": 4, "memory_window": 3},
    {"system": "omeganet", "query_heads": 2, "key_width": 3, "memory_chunk": 4, "memory_window": 3},
    {"system": "atlas", "query_heads": 2, "key_width": 3, "memory_chunk": 4, "memory_window": 3},
    {"system": "atlas_pp", "query_heads": 2, "key_width": 3, "memory_chunk": 4, "memory_window": 6},
    {"system": "lact", "query_heads": 2, "memory_chunk": 4},
    {"system": "allmem", "query_heads": 2, "memory_chunk": 4},
    {"system": "deep_transformer", "query_heads": 2},
    {"system": "swdt", "query_heads": 2, "memory_window": 3},
    {"system": "dot", "query_heads": 2},
)

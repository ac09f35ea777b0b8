"""MAC, memory as a context, in its causal reading (mixers.md, section 4.11): attention over segments of the text.

A segment is a chunk of the memory's grid. Each of its tokens attends to the persistent rows, to what the memory of the
segment's beginning says to the tokens of the segment so far, and to these themselves; what it then reads is written to
the memory, and the memory's answer opens it. Nothing but the memory goes from one segment to the next.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from atma import state as trees
from atma.layers import Linear
from atma.mixers.base import Mixer, Place
from atma.mixers.features import widened
from atma.mixers.gated_conv import advance, init_taps
from atma.mixers.heads import Heads, HeadsConfig
from atma.mixers.linear_recurrence import mean_of, taken
from atma.mixers.neural_config import NeuralConfig, sizes
from atma.mixers.neural_systems import SystemName
from atma.mixers.neural_weights import FastWeights
from atma.mixers.neural_wirings import EPSILON, opened
from atma.mixers.persistent import PersistentConfig, PersistentCore
from atma.mixers.recurrent_decays import by_head
from atma.mixers.recurrent_surround import EPSILONS
from atma.ops import causal_conv
from atma.ops.backend import own_precision
from atma.ops.dense import rms_norm
from atma.ops.fast_weights import MemoryState, empty
from atma.ops.fast_weights.network import network
from atma.ops.polar.held import hold
from atma.ops.segments import begins, tokens_before
from atma.strict import require


@dataclass(frozen=True)
class SegmentsConfig(NeuralConfig):
    """The options of the memory, whose chunk is the segment, and of the attention. Sizes are counts."""

    system: SystemName = "titans"
    """The memory, with the options of its system."""
    key_value_heads: int = 2
    """G, of the attention."""
    head_width: int = 128
    """K of the attention."""
    persistent: int = 4
    """N_p, learned keys and values that every query sees."""
    canon_taps: int = 4
    """Of the attention's queries, keys and values of tokens."""

    def __post_init__(self) -> None:
        for name, why in (("out_gate", "where the memory is a gate"), ("conv", "where the memory reads attention")):
            require(getattr(self, name) in (None, "none"), name, getattr(self, name), f'"none" {why}')
            object.__setattr__(self, name, "none")
        super().__post_init__()
        HeadsConfig(self.query_heads, self.key_value_heads, self.head_width)
        require(self.network != "kernel", "system", self.system, "one with fast weights, which have an anchor to read")
        require(self.persistent >= 1, "persistent", self.persistent, "at least 1")
        require(self.canon_taps >= 1, "canon_taps", self.canon_taps, "at least 1")


class SegmentsState(NamedTuple):
    """The memory, and of the segment at hand the keys and values, those of what the memory said before each token's."""

    length: Tensor  # (B,) int32
    keys: Tensor  # (B, G, 2C, K): of h_j at 2j, of x_j at 2j + 1, j counting from the segment's first token
    values: Tensor  # (B, G, 2C, K)
    q_tail: Tensor  # (B, W − 1, H·K): last inputs of the convolutions
    k_tail: Tensor  # (B, W − 1, G·K)
    v_tail: Tensor
    memory: MemoryState


class Segments(Mixer):
    """h = memory(x) → attention over rows of h and x → y; memory ← y; out_proj(norm(y) ⊙ σ(norm(memory(y))))."""

    Config = SegmentsConfig

    def __init__(self, config: SegmentsConfig, place: Place) -> None:
        super().__init__()
        assert config.memory_chunk is not None
        self.config, self.chunk, self.epsilon = config, config.memory_chunk, place.epsilon
        self.groups, self.head_width = config.key_value_heads, config.head_width
        self.sizes, width = sizes(config, place), place.width
        self.memory = FastWeights(config, self.sizes)
        keys, values = self.sizes.heads * self.sizes.key_width, self.sizes.heads * self.sizes.value_width
        self.recall_proj = Linear(width, keys, bias=False)
        self.write_k_proj = Linear(width, keys, bias=False)
        self.write_v_proj = Linear(width, values, bias=False)
        self.merge_proj = None if values == width else Linear(values, width, bias=False)
        inner, shared = config.query_heads * self.head_width, self.groups * self.head_width
        self.q_proj = Linear(width, inner, bias=False)
        self.k_proj = Linear(width, shared, bias=False)
        self.v_proj = Linear(width, shared, bias=False)
        self.canon_q, self.canon_k, self.canon_v = (
            nn.Parameter(torch.empty(size, config.canon_taps)) for size in (inner, shared, shared)
        )
        heads = Heads(place, config.query_heads, self.groups, self.head_width, None)
        self.core = PersistentCore(PersistentConfig(config.persistent), heads)
        self.y_proj = Linear(inner, width, bias=False)
        self.attended_gain, self.recalled_gain = (nn.Parameter(torch.empty(width)) for _ in "ab")
        self.out_proj = Linear(width, width, bias=False)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None) -> None:
        """`Mixer.init_weights`."""
        super().init_weights(generator)
        self.memory.init_weights(generator)
        self.core.init_weights(generator)
        for taps in (self.canon_q, self.canon_k, self.canon_v):
            init_taps(taps, generator)
        nn.init.ones_(self.attended_gain)
        nn.init.ones_(self.recalled_gain)

    def init_state(self, batch: int, capacity: int) -> SegmentsState:
        """An empty memory and an empty segment; `capacity` has no part in it."""
        return self._begun(batch, self.memory.init_state(batch, capacity))

    def _begun(self, batch: int, memory: MemoryState) -> SegmentsState:
        weight = self.k_proj.weight
        held = weight.new_zeros(batch, self.groups, 2 * self.chunk, self.head_width)
        q, k, v = (
            weight.new_zeros(batch, self.config.canon_taps - 1, layer.out_features)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        length = torch.zeros(batch, dtype=torch.int32, device=weight.device)
        return SegmentsState(length, held, held.clone(), q, k, v, memory)

    def forward(
        self, x: Tensor, state: SegmentsState | None = None, *, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, SegmentsState | None]:
        """x (B, T, D) to y (B, T, D)."""
        if segment_ids is not None:
            if state is not None:
                raise ValueError(
                    "segment_ids marks packed documents in training; a call with a state continues one document"
                )
            return self._packed(x, segment_ids), None
        log_keep = taken(self, x, self.memory.log_keep(x))
        if state is None:
            begun = self._begun(x.shape[0], empty(self.memory.memory(), x.shape[0]))
            return self.out_proj(self._pieces(x, log_keep, begun, 0)[0]), None
        o, state = (self._piece if x.shape[1] == 1 else self._by_phase)(x, log_keep, state)
        return self.out_proj(o), state

    def _packed(self, x: Tensor, segment_ids: Tensor) -> Tensor:
        """Documents gathered into rows of their own, run, and scattered back."""
        first = begins(segment_ids)
        first[:, 0] = True
        row, place = first.flatten().cumsum(0) - 1, tokens_before(segment_ids).flatten().long()
        shape = int(row[-1]) + 1, int(place.max()) + 1, x.shape[2]
        alone = x.new_zeros(shape).index_put((row, place), x.flatten(0, 1))
        return self.forward(alone)[0][row, place].view_as(x)

    def _by_phase(self, x: Tensor, log_keep: Tensor | None, state: SegmentsState) -> tuple[Tensor, SegmentsState]:
        """Rows that stand at the same place of their segments together, each such group by itself."""
        phases = (state.length % self.chunk).tolist()
        if len(set(phases)) == 1:
            return self._pieces(x, log_keep, state, phases[0])
        order, reads, after = [], [], []
        for phase in sorted(set(phases)):
            rows = [i for i, own in enumerate(phases) if own == phase]
            own = None if log_keep is None else log_keep[rows]
            read, held = self._pieces(x[rows], own, trees.rows(state, rows), phase)
            order, reads, after = [*order, *rows], [*reads, read], [*after, held]
        back = sorted(range(len(order)), key=order.__getitem__)
        return torch.cat(reads)[back], trees.rows(trees.stack(after), back)

    def _pieces(
        self, x: Tensor, log_keep: Tensor | None, state: SegmentsState, phase: int
    ) -> tuple[Tensor, SegmentsState]:
        """x (B, T, D) segment by segment, the first of which has `phase` tokens already."""
        at, reads = 0, []
        while at < x.shape[1]:
            end = min(x.shape[1], (at + phase) // self.chunk * self.chunk + self.chunk - phase)
            kept = None if log_keep is None else log_keep[:, :, at:end]
            read, state = self._piece(x[:, at:end], kept, state)
            reads.append(read)
            at = end
        return torch.cat(reads, 1), state

    def _piece(self, x: Tensor, log_keep: Tensor | None, state: SegmentsState) -> tuple[Tensor, SegmentsState]:
        """Tokens x (B, L, D) of one segment in each row, to what is projected (B, L, D)."""
        y, state = self._attended(x, state)
        unit = rms_norm(y, None, y.shape[-1], EPSILON)  # what is read may be of any scale, values may not
        parts = (layer(unit) for layer in (self.recall_proj, self.write_k_proj, self.write_v_proj))
        q, k, v = (by_head(part, self.sizes.heads) for part in parts)
        read, memory = self.memory(x, (q, k, v), log_keep, state.memory, None)
        o = opened(y, self._flat(read, x), self.attended_gain, self.recalled_gain)
        return o, state._replace(length=state.length + x.shape[1], memory=memory)

    def _attended(self, x: Tensor, state: SegmentsState) -> tuple[Tensor, SegmentsState]:
        """y (B, L, D), what the tokens read of the segment and of what its memory says to each token."""
        place = state.length % self.chunk
        q, k, v, state = self._project(x, state, place)
        h = self._recalled(x, state.memory)
        h_k, h_v = self._normed(self.k_proj(h), self.groups), self.v_proj(h)
        both = (torch.stack([by_head(own, self.groups) for own in pair], 3) for pair in ((h_k, k), (h_v, v)))
        k, v = (rows.flatten(2, 3) for rows in both)
        keys, values = hold(state.keys, state.values, k, v, 2 * place)
        last = place[:, None] + torch.arange(1, x.shape[1] + 1, device=x.device, dtype=torch.int32)
        read = self.core.over(by_head(q, self.config.query_heads), keys, values, torch.zeros_like(last), 2 * last)
        y = self.y_proj(read.transpose(1, 2).flatten(2))
        return y, state._replace(keys=keys, values=values)

    def _project(self, x: Tensor, state: SegmentsState, place: Tensor) -> tuple[Tensor, Tensor, Tensor, SegmentsState]:
        """q, k and v (B, L, ·) after Canon, which begins with the segment, and the state with its tails moved on."""
        q, k = self._normed(self.q_proj(x), self.config.query_heads), self._normed(self.k_proj(x), self.groups)
        inputs, tails = (q, k, self.v_proj(x)), (state.q_tail, state.k_tail, state.v_tail)
        back = torch.arange(self.config.canon_taps - 1, 0, -1, device=x.device)
        other = (back > place[:, None]).unsqueeze(-1)  # of the segment before
        taps = (self.canon_q, self.canon_k, self.canon_v)
        q, k, v = (
            z + causal_conv(z, w, tail.masked_fill(other, 0).to(z.dtype))
            for z, w, tail in zip(inputs, taps, tails, strict=True)
        )
        after = [advance(tail, z.to(tail.dtype)) for tail, z in zip(tails, inputs, strict=True)]
        return q, k, v, state._replace(q_tail=after[0], k_tail=after[1], v_tail=after[2])

    def _normed(self, z: Tensor, heads: int) -> Tensor:
        """z (B, T, heads·K), each head's divided by its root mean square."""
        return rms_norm(z.unflatten(-1, (heads, -1)), None, self.head_width, self.epsilon).flatten(2)

    def _recalled(self, x: Tensor, memory: MemoryState) -> Tensor:
        """h (B, L, D): what the memory of the segment's beginning says to each token."""
        weights = memory.weights if self.config.granularity == "chunk" else memory.anchor
        q = self.memory.feature(widened(by_head(self.recall_proj(x), self.sizes.heads)))
        weights = tuple(w.to(q.dtype) for w in weights)
        return self._flat(own_precision(network)(weights, q, self.memory.memory()), x)

    def _flat(self, read: Tensor, x: Tensor) -> Tensor:
        """What is read (B, H, L, V), normed by heads, as wide as the stream and in its dtype."""
        flat = rms_norm(read, None, read.shape[-1], EPSILONS["plain"]).transpose(1, 2).flatten(2).to(x.dtype)
        return flat if self.merge_proj is None else self.merge_proj(flat)

    def log_decay(self, x: Tensor) -> Tensor:
        """`Mixer.log_decay`: log γ, of channels their mean."""
        log_keep = self.memory.log_keep(x)
        return super().log_decay(x) if log_keep is None else mean_of(log_keep)

    def bound(self, head: int) -> float:
        """`Mixer.bound`."""
        return self.config.max_half_life

    def retention(self) -> nn.Module | None:
        """`Mixer.retention`."""
        return self if self.config.forgets else None

    def channels(self) -> dict[str, nn.Linear]:
        """`Mixer.channels`."""
        return {"read": self.out_proj}

    @property
    def reach(self) -> int:
        """`Mixer.reach`: back to the segment's first token."""
        return self.chunk - 1


_TINY = {"query_heads": 2, "key_value_heads": 1, "head_width": 8, "persistent": 3}
SMALL = (
    {**_TINY, "system": "titans", "memory_chunk": 4, "step_most": 0.25},
    {**_TINY, "system": "lact", "memory_chunk": 5, "value_width": 6, "key_width": 6},
)

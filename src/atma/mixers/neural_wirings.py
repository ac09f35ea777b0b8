"""A neural memory beside windowed attention, in one layer (mixers.md, section 4.11): added to it, or gating it (MAG).

Both read the layer's input, each by projections and convolutions of its own. The memory is any of `neural_systems`, the
attention `Attention` without positions and with a window.
"""

from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from atma.layers import Linear, init_linear
from atma.mixers.attention import Attention, Settings
from atma.mixers.base import Mixer, Place
from atma.mixers.minimal import Through
from atma.mixers.neural_config import NeuralConfig
from atma.mixers.neural_memory import NeuralMemory, NeuralState
from atma.mixers.neural_systems import SystemName
from atma.mixers.window import WindowState
from atma.ops.dense import rms_norm
from atma.strict import require

EPSILON = 1e-6
"""Of the norms before the gate."""


@dataclass(frozen=True)
class WindowConfig(NeuralConfig):
    """The options of the memory and, as far as they are not the memory's, those of the attention. Sizes are counts."""

    system: SystemName = "titans"
    """The memory, with the options of its system."""
    key_value_heads: int = 2
    """G, of the attention."""
    head_width: int = 128
    """K of the attention."""
    window: int = 512
    """Most keys that a query sees, its own among them: by default a quarter of a training length of 2,048."""
    canon_taps: int = 4
    """Of the attention."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.attention()

    def attention(self) -> Settings:
        """The configuration of the attention. ValueError for options that make none."""
        told = {one.name for one in fields(self)} - {one.name for one in fields(NeuralConfig)}
        core = "persistent" if "persistent" in told else "nope"
        own = {"core": core, "memory": False, "query_heads": self.query_heads}
        return Attention.configure(own | {name: getattr(self, name) for name in told})


class BesideState(NamedTuple):
    """Of windowed attention and a neural memory."""

    window: WindowState
    memory: NeuralState


class BesideWindow(Mixer):
    """y = attention(x) + memory(x): both start as nothing, and each is the mixer it is alone."""

    Config = WindowConfig
    attention: ClassVar[type[Attention]] = Attention

    def __init__(self, config: WindowConfig, place: Place) -> None:
        super().__init__()
        self.config, self.heads = config, config.query_heads
        self.window = self.attention(config.attention(), place)
        self.memory = NeuralMemory(config, place)
        require(
            self.memory.heads == self.heads, "heads", self.memory.heads, f"query_heads = {self.heads} beside a window"
        )

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None) -> None:
        """`Mixer.init_weights`."""
        self.window.init_weights(generator)
        self.memory.init_weights(generator)

    def init_state(self, batch: int, capacity: int) -> BesideState:
        """An empty window and an empty memory; `capacity` is the room of a kernel."""
        window = cast(WindowState, self.window.init_state(batch, capacity))
        return BesideState(window, self.memory.init_state(batch, capacity))

    def forward(
        self, x: Tensor, state: BesideState | None = None, *, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, BesideState | None]:
        """x (B, T, D) to y (B, T, D)."""
        window, memory = (None, None) if state is None else state
        attended, window = self.window(x, window, segment_ids=segment_ids)
        recalled, memory = self.memory(x, memory, segment_ids=segment_ids)
        y = self.joined(attended, recalled)
        return y, None if state is None else BesideState(cast(WindowState, window), cast(NeuralState, memory))

    def joined(self, attended: Tensor, recalled: Tensor) -> Tensor:
        """What the attention and the memory give, as one (B, T, D)."""
        return attended + recalled

    def channels(self) -> dict[str, nn.Linear]:
        """`Mixer.channels`."""
        return {"read": self.window.out_proj, "memory": self.memory.readout.out_proj}

    def retention(self) -> nn.Module | None:
        """`Mixer.retention`: the memory, where it forgets."""
        return self.memory.retention()

    @property
    def reach(self) -> int | None:
        """`Mixer.reach`: the window's, but of a kernel, which keeps every key."""
        window, memory = self.window.reach, self.memory.reach
        return None if window is None or memory is None else max(window, memory)


@dataclass(frozen=True)
class GatedConfig(WindowConfig):
    """And the persistent rows before the window. There is no gate of the memory's own."""

    persistent: int = 4
    """N_p, learned keys and values that every query sees."""

    def __post_init__(self) -> None:
        require(self.out_gate in (None, "none"), "out_gate", self.out_gate, '"none" where the memory itself is a gate')
        require(self.persistent >= 1, "persistent", self.persistent, 'at least 1, or kind = "memory_beside_window"')
        object.__setattr__(self, "out_gate", "none")
        super().__post_init__()


class Read(Attention):
    """What the heads of `Attention` read, side by side: no gate, and no projection."""

    def __init__(self, config: Settings, place: Place) -> None:
        super().__init__(config, place)
        inner = self.heads * self.head_width
        self.q_proj = Linear(place.width, inner)
        self.out_proj = cast(Linear, Through(inner))

    def gated(self, read: Tensor, opening: Tensor) -> Tensor:
        """`Attention.gated`, without."""
        return read.transpose(1, 2).flatten(2)


class GatedWindow(BesideWindow):
    """MAG: y = out_proj(RMSNorm(attention's read) ⊙ σ(RMSNorm(memory's read)))."""

    Config = GatedConfig
    attention = Read

    def __init__(self, config: GatedConfig, place: Place) -> None:
        super().__init__(config, place)
        attended, recalled = self.window.out_proj.in_features, self.memory.readout.out_proj.in_features
        why = f"such that H·K = {recalled}, the width of what the memory reads"
        require(attended == recalled, "head_width", config.head_width, why)
        self.memory.readout.out_proj = cast(Linear, Through(recalled))
        self.attended_gain, self.recalled_gain = (nn.Parameter(torch.empty(attended)) for _ in "ab")
        self.out_proj = Linear(attended, place.width, bias=False)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None) -> None:
        """`Mixer.init_weights`."""
        super().init_weights(generator)
        nn.init.ones_(self.attended_gain)
        nn.init.ones_(self.recalled_gain)
        init_linear(self.out_proj, generator, zero=True)

    def joined(self, attended: Tensor, recalled: Tensor) -> Tensor:
        """`BesideWindow.joined`, of reads (B, T, H·V)."""
        return self.out_proj(opened(attended, recalled, self.attended_gain, self.recalled_gain))

    def channels(self) -> dict[str, nn.Linear]:
        """`Mixer.channels`."""
        return {"read": self.out_proj}


def opened(y: Tensor, m: Tensor, gain: Tensor, opening: Tensor) -> Tensor:
    """RMSNorm(y) ⊙ σ(RMSNorm(m)) over the last axis, with learned gains."""
    width = y.shape[-1]
    return rms_norm(y, gain, width, EPSILON) * rms_norm(m, opening, width, EPSILON).sigmoid()


_TINY = {"query_heads": 2, "key_value_heads": 1, "head_width": 8, "memory_chunk": 4}
SMALL = (
    {**_TINY, "system": "titans", "window": 5, "step_most": 0.25},
    {**_TINY, "system": "yaad", "window": 3},
)

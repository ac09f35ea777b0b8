"""The local mixer: a short causal convolution between two gates (maths.md, section 2; LFM2, 2511.23404)."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from atma.layers import Linear, init_linear
from atma.mixers.base import Mixer, Place
from atma.mixers.stretches_prefix import Transition
from atma.ops import causal_conv, gated_conv
from atma.ops.backend import backend_for
from atma.strict import UNSAID, check_fields, require


@dataclass(frozen=True)
class ConvConfig:
    """Taps of the convolution, and how it starts."""

    local_taps: int = 3
    """Tokens that the convolution sees, its own among them."""
    zero_input_projections: bool = False
    """Also zero the input projection, as the published training script does (it then never learns)."""
    projection_bias: bool = field(default=True, metadata=UNSAID)
    """Biases of both projections; LFM2 has none."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.local_taps >= 1, "local_taps", self.local_taps, "at least 1")


class LocalState(NamedTuple):
    """The last inputs of the convolution (B, W − 1, D)."""

    tail: Tensor


class GatedConv(Mixer):
    """b, c, u = split(in_proj(x)); y = out_proj(c ⊙ conv(b ⊙ u))."""

    Config = ConvConfig

    def __init__(self, config: ConvConfig, place: Place) -> None:
        super().__init__()
        self.config = config
        self.in_proj = Linear(place.width, 3 * place.width, config.projection_bias)
        self.taps = nn.Parameter(torch.empty(place.width, config.local_taps))
        self.out_proj = Linear(place.width, place.width, config.projection_bias)

    def init_weights(self, generator: torch.Generator | None) -> None:
        """`Mixer.init_weights`."""
        init_linear(self.in_proj, generator, zero=self.config.zero_input_projections)
        init_linear(self.out_proj, generator, zero=True)
        init_taps(self.taps, generator)

    def init_state(self, batch: int, capacity: int) -> LocalState:
        """Zeros (B, W − 1, D); `capacity` has no part in it."""
        return LocalState(self.taps.new_zeros(batch, self.taps.shape[1] - 1, self.taps.shape[0]))

    def forward(
        self, x: Tensor, state: LocalState | None = None, *, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, LocalState | None]:
        """x (B, T, D) to y (B, T, D)."""
        h = self.in_proj(x)
        if state is None:
            return self.out_proj(gated_conv(h, self.taps, segment_ids)), None
        b, c, u = h.chunk(3, -1)
        inputs = b * u
        y = self.out_proj(c * causal_conv(inputs, self.taps, state.tail.to(h.dtype), segment_ids))
        return y, LocalState(advance(state.tail, inputs.to(state.tail.dtype)))

    def transition(self, x: Tensor, state: LocalState, begun: bool) -> Transition:
        """`Mixer.transition`: nothing but the last tokens counts."""
        return Transition(self(x, state)[0], {}, {}, lambda read, _: read)

    def steady(self, on: bool = True) -> bool:
        """`Mixer.steady`: the compiled convolution is, as it is."""
        return backend_for("auto", self.taps, "conv") == "native"

    @property
    def reach(self) -> int:
        """`Mixer.reach`."""
        return self.config.local_taps - 1


def advance(tail: Tensor, inputs: Tensor) -> Tensor:
    """The last W − 1 of tail (B, W − 1, C) followed by inputs (B, T, C)."""
    keep = tail.shape[1]
    if inputs.shape[1] >= keep:
        return inputs[:, inputs.shape[1] - keep :].clone()
    return torch.cat([tail[:, inputs.shape[1] :], inputs], 1)


def init_taps(taps: Tensor, generator: torch.Generator | None) -> None:
    """Uniform in ±1/√W, as PyTorch initialises a depthwise convolution of W taps."""
    bound = taps.shape[1] ** -0.5
    nn.init.uniform_(taps, -bound, bound, generator=generator)


SMALL = ({}, {"local_taps": 1, "projection_bias": False}, {"local_taps": 5, "zero_input_projections": True})

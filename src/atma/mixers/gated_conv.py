"""The local mixer: a short causal convolution between two gates (maths.md, section 2; LFM2, 2511.23404)."""

import torch
from torch import Tensor, nn

from atma.config import ModelConfig
from atma.layers import Linear, init_linear
from atma.ops import causal_conv, gated_conv
from atma.state import LocalState


class GatedConv(nn.Module):
    """b, c, u = split(in_proj(x)); y = out_proj(c ⊙ conv(b ⊙ u))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.in_proj = Linear(config.width, 3 * config.width)
        self.taps = nn.Parameter(torch.empty(config.width, config.local_taps))
        self.out_proj = Linear(config.width, config.width)

    def init_weights(self, config: ModelConfig, generator: torch.Generator | None) -> None:
        init_linear(self.in_proj, generator, zero=config.zero_input_projections)
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
        inputs, tail = b * u, state.tail.to(h.dtype)
        y = self.out_proj(c * causal_conv(inputs, self.taps, tail, segment_ids))
        return y, LocalState(advance(tail, inputs))


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

"""A model as an auto-encoder: what it knows at its last token, with a position added, is decoded to the token there.

It is the backbone that MAD compresses with (atma.eval.recall.mad.Compression): an encoding, sinusoidal positions, a
decoder of two layers that do not widen. Only the decoder is new; embedding, blocks, norm and head are the model's own.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from atma.config import ModelConfig
from atma.layers import RMSNorm, init_linear
from atma.model import Model

LONGEST = 10_000
"""By how much the slowest position turns more slowly than the fastest, which turns by a radian a token."""


class Decoder(nn.Module):
    """gelu(W₂ norm(gelu(W₁ norm(x)))). Source: mad-lab, mad/model/auto_encoder.py."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.norm_first, self.first = RMSNorm(width, epsilon), nn.Linear(width, width)
        self.norm_second, self.second = RMSNorm(width, epsilon), nn.Linear(width, width)
        self.norm_out = RMSNorm(width, epsilon)

    def forward(self, x: Tensor) -> Tensor:
        x = gelu(self.first(self.norm_first(x)))
        return self.norm_out(gelu(self.second(self.norm_second(x))))


class AutoEncoder(Model):
    """A model whose hidden states are decoded from its last one, so that the loss and the answers are as of any model.

    The encoding is normed before positions are added, which MAD's is not.
    """

    def __init__(self, config: ModelConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(config, generator)
        self.decoder = Decoder(config.width, config.norm_epsilon)
        for layer in (self.decoder.first, self.decoder.second):
            init_linear(layer, generator)

    def forward(
        self, tokens: Tensor, state: Any = None, *, segment_ids: Tensor | None = None, noise: int | None = None
    ) -> tuple[Tensor, Any]:
        """tokens (B, T) to what is decoded for each position (B, T, D), and no state. ValueError with a state."""
        if state is not None:
            raise ValueError("an auto-encoder reads a whole text at once; give it no state")
        hidden, _ = super().forward(tokens, segment_ids=segment_ids, noise=noise)
        return self.decoder(hidden[:, -1:] + positions(tokens.shape[1], hidden)), None


def positions(length: int, like: Tensor) -> Tensor:
    """(length, D) sines, then cosines, of wavelengths from 2π to 2π · LONGEST."""
    half = -(-like.shape[-1] // 2)
    rates = torch.exp(torch.arange(half, device=like.device) * (-math.log(LONGEST) / max(half - 1, 1)))
    angles = torch.arange(length, device=like.device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)[:, : like.shape[-1]].to(like.dtype)

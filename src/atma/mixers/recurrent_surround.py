"""What stands around a recurrence: the short convolution before it, the norm, gate and projection after it.

Source: mixers.md, sections 2.2 and 3.3.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from atma.layers import Linear
from atma.mixers.gated_conv import advance, init_taps
from atma.mixers.recurrent_decays import Sizes, silu
from atma.ops import causal_conv
from atma.ops.dense import rms_norm
from atma.ops.rows import sigmoid

ConvName = Literal["canon", "silu", "none"]
NormName = Literal["plain", "head", "whole", "whole_plain", "none"]
GateName = Literal["sigmoid", "silu", "none"]
TAPS = 4
EPSILONS = {"plain": 2.0**-23, "head": 1e-5, "whole": 1e-5, "whole_plain": 1e-6}
"""Added to the mean square."""


class ShortConv(nn.Module):
    """Four taps on each channel of what q, k and v are projected to: z + conv(z), or silu(conv(z))."""

    def __init__(self, kind: ConvName, channels: int, bias: bool) -> None:
        super().__init__()
        self.kind = kind
        self.taps = nn.Parameter(torch.empty(channels, TAPS))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def init_weights(self, generator: torch.Generator | None) -> None:
        """Taps uniform in ±½, a bias of 0."""
        init_taps(self.taps, generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def pass_on(self, taps: Tensor, back: int) -> None:
        """Set some channels' taps so that what is convolved, before its activation, is z of `back` tokens before."""
        nn.init.zeros_(taps)
        taps[:, -1 - back] = 1.0
        if self.kind == "canon":
            taps[:, -1] -= 1.0

    def empty(self, batch: int) -> Tensor:
        """The tail before the first token: zeros (B, 3, C)."""
        return self.taps.new_zeros(batch, TAPS - 1, len(self.taps))

    def forward(
        self, z: Tensor, tail: Tensor | None, segment_ids: Tensor | None, steady: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """z (B, T, C) and the last 3 inputs before it, to the same of what is convolved and of the tail after."""
        mixed = causal_conv(z, self.taps, None if tail is None else tail.to(z.dtype), segment_ids)
        if self.bias is not None:
            mixed = mixed + self.bias.to(mixed.dtype)
        mixed = z + mixed if self.kind == "canon" else silu(mixed, steady)
        return mixed, None if tail is None else advance(tail, z.to(tail.dtype))


StartName = Literal["published", "recall"]
"""With "recall" a mixer begins as ATMA's attention does, ready to find what followed a token before. Queries and keys
are projected alike, the convolution gives a query its own token and a key the one before, and learned decays begin with
half-lives of tens to hundreds of tokens. In a third channel, which reads what the mixer has convolved, it is the decays
alone, where there are any."""


def begin_at_recall(q_proj: Linear, k_proj: Linear, conv: ShortConv, widths: list[int]) -> None:
    """Project queries and keys, the first of what is convolved, alike: of its own token, and of the one before."""
    k_proj.weight.copy_(q_proj.weight)
    q_taps, k_taps = conv.taps.split(widths)[:2]
    conv.pass_on(q_taps, 0)
    conv.pass_on(k_taps, 1)


class Readout(nn.Module):
    """What is read (B, H, T, V), normed and gated, to the stream by a projection that starts at zero."""

    def __init__(
        self,
        sizes: Sizes,
        norm: NormName,
        gate: GateName,
        rank: int | None = None,
        gate_bias: bool = False,
        gate_first: bool = False,
    ) -> None:
        super().__init__()
        inner = sizes.heads * sizes.value_width
        self.norm, self.gate, self.gate_first = norm, gate, gate_first
        self.epsilon = EPSILONS.get(norm, 0.0)
        self.down_proj = Linear(sizes.width, rank, bias=False) if rank and gate != "none" else None
        self.gate_proj = Linear(rank or sizes.width, inner, bias=gate_bias) if gate != "none" else None
        self.gain = (
            nn.Parameter(torch.empty(sizes.value_width if norm == "head" else inner)) if norm in _LEARNED else None
        )
        self.out_proj = Linear(inner, sizes.width, bias=False)

    def init_weights(self) -> None:
        """Set the gain to 1."""
        if self.gain is not None:
            nn.init.ones_(self.gain)

    def forward(self, read: Tensor, x: Tensor, steady: bool = False) -> Tensor:
        """read (B, H, T, V) and the x (B, T, D) that gates it, to (B, T, D)."""
        if self.norm in ("plain", "head"):
            read = rms_norm(read, self.gain, read.shape[-1], self.epsilon)
        flat = read.transpose(1, 2).flatten(2)
        if self.gate_first:
            flat = self._gated(flat, x, steady)
        if self.norm in ("whole", "whole_plain"):
            flat = rms_norm(flat, self.gain, flat.shape[-1], self.epsilon)
        if not self.gate_first:
            flat = self._gated(flat, x, steady)
        return self.out_proj(flat.to(x.dtype))

    def _gated(self, flat: Tensor, x: Tensor, steady: bool) -> Tensor:
        if self.gate_proj is None:
            return flat
        opening = self.gate_proj(x if self.down_proj is None else self.down_proj(x))
        return flat * (sigmoid if self.gate == "sigmoid" else silu)(opening, steady)


_LEARNED = ("head", "whole")

"""Plain softmax attention without positions, at 1/√K: the control called nope (maths.md, section 3)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from atma.mixers.heads import Core, Heads, Held
from atma.ops import paged, softmax_attention
from atma.ops.chosen import Sums
from atma.ops.paged.pages import Pages


@dataclass(frozen=True)
class SoftmaxConfig:
    """There is nothing to choose."""


class SoftmaxCore(Core):
    """softmax(scale · q kᵀ) v."""

    Config = SoftmaxConfig
    plain_softmax = True

    def __init__(self, config: SoftmaxConfig, heads: Heads) -> None:
        super().__init__(heads)
        self.scale = heads.head_width**-0.5

    def forward(
        self, q: Tensor, k: Held, v: Held, start: Tensor | None, segment_ids: Tensor | None
    ) -> tuple[Tensor, None]:
        """`Core.forward`."""
        if isinstance(k, Pages) and isinstance(v, Pages):
            return paged.softmax_attention(q, k, v, self.scale, start, self.window), None
        assert isinstance(k, Tensor) and isinstance(v, Tensor)
        return softmax_attention(q, k, v, self.scale, start, segment_ids, self.window), None

    def scale_and_null(self, q: Tensor, count: Tensor) -> tuple[Tensor, None]:
        """`Core.scale_and_null`."""
        work = torch.promote_types(q.dtype, torch.float32)
        return torch.full(q.shape[:-1], self.scale, dtype=work, device=q.device), None

    def assemble(self, sums: Sums, null: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, None]:
        """`Core.assemble`."""
        return (sums.S / sums.L.unsqueeze(-1)).to(dtype), None

    def toward_own(
        self, q: Tensor, k: Held, v: Held, start: Tensor | None, own: tuple[Tensor, Tensor], strength: Tensor
    ) -> tuple[Tensor, None]:
        """`Core.toward_own`: (1 − s) read + s v of the token's own."""
        read, _ = self.forward(q, k, v, start, None)
        value = own[1].repeat_interleave(q.shape[1] // own[1].shape[1], 1).to(read.dtype)
        return read + strength.to(read)[:, None, None] * (value - read), None

    def steady(self, on: bool = True) -> bool:
        """`Core.steady`: compiled, it is as it is."""
        return True

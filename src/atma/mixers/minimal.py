"""Softmax attention with fewer matrices (2410.13732): what a Transformer can do without (mixers.md, section 5.5).

The surround of the global mixer stays: norms of q and k, Canon, the gate. Head slices x[h] take the places of
projections, so there are as many key heads as query heads and together they are as wide as the stream.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from atma.layers import Linear
from atma.mixers.attention import Attention, AttentionConfig, Settings
from atma.mixers.base import Place
from atma.mixers.starts import share_projection
from atma.strict import require


@dataclass(frozen=True)
class MinimalConfig(AttentionConfig):
    """Which matrices there are not; softmax attention without positions or memory, if nothing else is said."""

    core: str = "nope"
    memory: bool | str = False
    merge_qk: bool = False
    """A head's key is its slice of the input: only q has a matrix, in place of W_q W_kᵀ."""
    symmetric: bool = False
    """A head's key is its query, by one projection; Canon keeps a token from matching itself best."""
    identity_vo: bool = False
    """A head's value is its slice of the input, and what the heads read goes into the stream as it is. So a block does
    not start as the identity."""

    def __post_init__(self) -> None:
        super().__post_init__()
        both = self.merge_qk and self.symmetric
        require(not both, "symmetric", True, "left out with merge_qk: a key is the input's slice or the query")
        groups, alike = self.key_value_heads, self.key_value_heads == self.query_heads
        sliced = self.merge_qk or self.symmetric or self.identity_vo
        require(alike or not sliced, "key_value_heads", groups, f"query_heads = {self.query_heads} here")


class Through(nn.Identity):
    """Stands where an output projection would: what the heads read, side by side, is the channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_features = width


class MinimalAttention(Attention):
    """`Attention` without the matrices that its options take away."""

    Config = MinimalConfig

    def __init__(self, config: Settings, place: Place) -> None:
        super().__init__(config, place)
        own = self.own = cast(MinimalConfig, config.own)
        inner = self.heads * self.head_width
        sliced = own.merge_qk or own.identity_vo
        require(inner == place.width or not sliced, "head_width", self.head_width, f"{place.width} / query_heads here")
        if own.merge_qk or own.symmetric:
            del self.k_proj
        if own.identity_vo:
            del self.v_proj
            self.out_proj = cast(Linear, Through(inner))

    def start_alike(self) -> None:
        """`Attention.share`: with merge_qk the key projection is the slice itself."""
        if self.own.merge_qk:
            share_projection(self.q_proj, torch.eye(self.width).to(self.q_proj.weight), self.heads, self.groups)
        elif not self.own.symmetric:
            super().start_alike()

    def keys_and_values(self, x: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """`Attention.keys_and_values`."""
        v = x if self.own.identity_vo else self.v_proj(x)
        if self.own.merge_qk:
            return x.unflatten(-1, (self.heads, -1)), v
        return q if self.own.symmetric else self.k_proj(x).unflatten(-1, (self.groups, -1)), v


SMALL = (
    {
        "query_heads": 2,
        "key_value_heads": 2,
        "head_width": 8,
        "merge_qk": True,
        "identity_vo": True,
        "window": 7,
    },
)

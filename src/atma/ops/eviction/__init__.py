"""Attention over a bounded set of kept keys: what receives little attention is evicted, so nothing grows with the text.

Carried over to text from the tokens that HiPrune keeps of a picture (arXiv 2508.00553): anchors, those beside them, and
registers. The rule is mixers.md, section 6.9. Evictions are at the end of blocks of the text's own grid, so they are
the same however a text is cut into calls.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from atma.ops.backend import backend_for, check_indices, check_tensors, implementation, own_precision, recording


class Kept(NamedTuple):
    """What is kept of each row and head of keys, in the order of the text; N ≥ budget + block."""

    keys: Tensor
    """(B, G, K, N), zero where there is none."""
    values: Tensor
    """(B, G, N, K)."""
    place: Tensor
    """(B, G, N) int32: positions, −1 where there is none."""
    lately: Tensor
    """(B, G, N): weight received by each key, that of earlier blocks decayed; float32 or wider."""
    wholly: Tensor
    """(B, G, N): weight received since it came."""


class Budget(NamedTuple):
    """How much is kept, in tokens."""

    budget: int = 1024
    """Of each head of keys, at the end of a block; those of the window among them."""
    block: int = 64
    """After so many tokens the rest is evicted."""
    window: int = 128
    """The last tokens, which are always kept."""
    anchors: int = 149
    """Of the others, those that received most lately; the tokens beside each are kept too."""
    decay: float = 0.9
    """What is left of the weight received lately after one more block."""

    @property
    def slots(self) -> int:
        """N: with whole vectors of any processor."""
        return -(-(self.budget + self.block) // 16) * 16

    def check(self) -> None:
        """ValueError with the number that is wrong."""
        for name in ("block", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.budget < self.window:
            raise ValueError(f"budget must be at least the window of {self.window} tokens, not {self.budget}")
        if not 0 <= 3 * self.anchors <= self.budget - self.window:
            most = (self.budget - self.window) // 3
            raise ValueError(
                f"anchors must be 0 to {most}, a third of what is kept beside the window, not {self.anchors}"
            )
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay must be 0 to 1, not {self.decay}")


def empty(rows: int, groups: int, width: int, budget: Budget, like: Tensor) -> Kept:
    """Nothing kept yet, of keys in the dtype and on the device of `like`."""
    shape, work = (rows, groups, budget.slots), torch.promote_types(like.dtype, torch.float32)
    keys, values = like.new_zeros(rows, groups, width, budget.slots), like.new_zeros(*shape, width)
    place = torch.full(shape, -1, dtype=torch.int32, device=like.device)
    return Kept(keys, values, place, *(like.new_zeros(shape, dtype=work) for _ in range(2)))


@own_precision
def attend_kept(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    null: Tensor | None,
    length: Tensor,
    kept: Kept,
    budget: Budget,
    backend: str = "auto",
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Kept]:
    """The statistics S (B, H, T, K), L, Q, M (B, H, T) of `atma.ops.polar.statistics_of` over what is kept, and what is
    kept afterwards; in place unless gradients are recorded.

    q (B, H, T, K), k and v (B, G, T, K) of the tokens from length (B,) int32 on; scale (B, H, T): of scores; null (B,
    H, T): the logit of a null sink, which takes its share of what keys receive, or None.
    """
    budget.check()
    check_tensors("q k v scale null keys values", q, k, v, scale, null, kept.keys, kept.values)
    if q.ndim != 4 or k.shape != v.shape or k.shape[::2] != q.shape[::2] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    if kept.values.shape != (*k.shape[:2], budget.slots, k.shape[3]):
        raise ValueError(f"what is kept {tuple(kept.values.shape)} is not of {budget.slots} keys of k {tuple(k.shape)}")
    check_indices("length", length, q.shape[:1], q.device)
    chosen = "reference" if recording() and backend == "auto" else backend_for(backend, q, "eviction")
    return implementation("eviction", chosen).attend_kept(q, k, v, scale, null, length, kept, budget)


__all__ = ["Budget", "Kept", "attend_kept", "empty"]

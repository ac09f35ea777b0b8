"""Adapter by adapter, in plain PyTorch, on any device."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from atma.ops.low_rank import Stack


def add(y: Tensor, x: Tensor, which: Tensor, stack: "Stack") -> None:
    texts = len(which)
    rows, sums = x.reshape(texts, -1, x.shape[-1]), y.view(texts, -1, y.shape[-1])
    for slot, factors in enumerate(stack.held):
        own = (which == slot).nonzero()[:, 0]
        if factors is not None and len(own):
            work = torch.promote_types(x.dtype, torch.float32)
            added = rows[own].to(work) @ factors.a[:, : len(factors.b)] @ factors.b[:, : y.shape[-1]]
            sums[own] = (sums[own].to(work) + added).to(y.dtype)

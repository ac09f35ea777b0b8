"""The compiled kernel of ops/native/low_rank.cpp: float32, float64 and bfloat16, on the CPU."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from atma.ops import native

if TYPE_CHECKING:
    from atma.ops.low_rank import Stack

_FIELDS = "rows inputs outputs tokens slots which table x y threads"


def add(y: Tensor, x: Tensor, which: Tensor, stack: "Stack") -> None:
    """y must be contiguous, as what a layer has just computed is."""
    x, rows = x.contiguous(), x.numel() // x.shape[-1]
    sizes = (rows, x.shape[-1], y.shape[-1], max(1, rows // len(which)), len(stack.table))
    values = (*sizes, *native.addresses(which, stack.table, x, y), torch.get_num_threads())
    native.call("add_low_rank", x.dtype, _FIELDS, values)

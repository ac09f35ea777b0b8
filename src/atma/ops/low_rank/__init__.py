"""What low-rank adapters add to a layer's rows: each row has its own adapter, or none and is then left as it is.

An adapter of a layer is A (r, inputs) and B (outputs, r), of which x Aᵀ Bᵀ is added (Hu et al. 2021, arXiv 2106.09685,
section 4.1; α/r is within B). Compiled, the bits that a row gets depend on no other row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from atma.ops.backend import backend_for, implementation

ALIGNED = 64
"""Bytes that rows of the factors are filled up to."""


class Factors(NamedTuple):
    """What one adapter has for one layer."""

    a: Tensor
    """A (r, inputs)."""
    b: Tensor
    """B (outputs, r), α/r times."""

    @property
    def rank(self) -> int:
        return self.a.shape[0]


class Stack:
    """Of one layer, the factors of several adapters, None where one has none, for rows of a dtype on a device."""

    def __init__(self, factors: Sequence[Factors | None], dtype: torch.dtype, device: torch.device) -> None:
        work = torch.promote_types(dtype, torch.float32)
        self.held = [None if one is None else _laid_out(one, work, device) for one in factors]
        places = [(0, 0, 0) if one is None else (one.a.data_ptr(), one.b.data_ptr(), len(one.b)) for one in self.held]
        self.table = torch.tensor(places, dtype=torch.int64).reshape(-1, 3)
        """(adapters, 3): where the factors lie, and their rank."""

    @property
    def bytes(self) -> int:
        return self.table.nbytes + sum(one.a.nbytes + one.b.nbytes for one in self.held if one is not None)


def add(y: Tensor, x: Tensor, which: Tensor, stack: Stack) -> None:
    """y (N, …, outputs) += x (N, …, inputs) A B in place, of the adapters which (N,) int32 in the stack; −1 is none.

    Where N is 1, x and y are of any shape. Inference only. ValueError: the rows are not those of `which`.
    """
    if len(which) != 1 and x.shape[0] != len(which):
        raise ValueError(f"adapters of {len(which)} texts for {tuple(x.shape)}: the layer's rows are not the texts'")
    implementation("low_rank", backend_for("auto", x, "low_rank")).add(y, x, which, stack)


def _laid_out(factors: Factors, work: torch.dtype, device: torch.device) -> Factors:
    """(inputs, r) and (r, outputs), rows filled up with zeros."""
    lanes = ALIGNED // work.itemsize
    pairs = (factors.a.T, factors.b.T)
    return Factors(*(torch.nn.functional.pad(x.to(device, work), (0, -x.shape[1] % lanes)).contiguous() for x in pairs))


__all__ = ["Factors", "Stack", "add"]

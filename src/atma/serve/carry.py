"""What a text carries from token to token besides its keys and values: tails of convolutions and memories, by row.

The engine keeps these as a flat tuple of tensors (rows, …), and builds the model's state of it for each call.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from atma.model import Model
from atma.serve.pages import PagePool
from atma.state import GlobalState, LocalState, ModelState

Carried = tuple[Tensor, ...]
_FIELDS = ("q_tail", "k_tail", "v_tail", "memory")


class Carrier:
    """Between flat rows and the state of a model whose keys and values are in `pool`."""

    def __init__(self, model: Model) -> None:
        self._blocks = model.init_state(1, 1).blocks
        self._device = model.embed.weight.device
        self.hidden_bytes = model.config.width * model.embed.weight.element_size()

    @property
    def row_bytes(self) -> int:
        """Of one row, with its last hidden state."""
        return sum(x.numel() * x.element_size() for x in self.empty()) + self.hidden_bytes

    def empty(self) -> Carried:
        """One row that has read nothing."""
        found = []
        for block in self._blocks:
            if isinstance(block, LocalState):
                found.append(torch.zeros_like(block.tail))
            else:
                held = (getattr(block, name) for name in _FIELDS)
                found += [torch.zeros_like(x) for x in held if x is not None]
        return tuple(found)

    def state(self, carried: Carried, length: Tensor, table: Tensor, pool: PagePool) -> ModelState:
        """The model's state of rows that stand at `length` (rows,) int32."""
        rest, blocks, layer = iter(carried), [], 0
        for block in self._blocks:
            if isinstance(block, LocalState):
                blocks.append(LocalState(next(rest)))
                continue
            held = (None if getattr(block, name) is None else next(rest) for name in _FIELDS)
            blocks.append(GlobalState(length, *pool.layer(layer, table), *held))
            layer += 1
        return ModelState(length, tuple(blocks))

    def lengths(self, positions: Sequence[int]) -> Tensor:
        """Positions of rows as a state has them."""
        return torch.tensor(positions, dtype=torch.int32, device=self._device)

    def carried(self, state: ModelState) -> Carried:
        """The flat rows of a state."""
        found = []
        for block in state.blocks:
            if isinstance(block, LocalState):
                found.append(block.tail)
            else:
                found += [x for name in _FIELDS if (x := getattr(block, name)) is not None]
        return tuple(found)


def row(carried: Carried, index: int) -> Carried:
    """A copy of one row."""
    return tuple(x[index : index + 1].clone() for x in carried)


def join(parts: Sequence[Carried]) -> Carried:
    """All rows of all parts, in order."""
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


class Standing(NamedTuple):
    """A text's state at one position: what it carries, and the last hidden state (D,), which gives the next token."""

    position: int
    carried: Carried
    hidden: Tensor

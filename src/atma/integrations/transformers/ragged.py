"""Rows of different lengths moved on together: each reads its own tokens, and no padding.

Rows are read side by side from their first token. Where the shortest ends its state is put aside, and the others go on,
so there are as many calls as there are different lengths, and each computes nothing but text. Cutting a text changes
nothing (the law of split), nor do the rows beside it (the law of rows): a row gives what it gives alone.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from atma import state as states
from atma.state import ModelState

Read = Callable[[Tensor, ModelState], tuple[Tensor, ModelState]]
"""Tokens or embeddings (B, T, …) and a state, to what is found for each token (B, T, …) and the state after them."""


def read_ragged(read: Read, inputs: Tensor, state: ModelState, real: Tensor) -> tuple[Tensor | None, ModelState]:
    """Read inputs (B, T, …) where real (B, T) is set, a run in each row, to outputs, zero at padding, and the state.

    Outputs are None where no row has any text; the state is then what it was.
    """
    counts, starts = real.sum(1), real.int().argmax(1)
    edges = [0, *sorted({count for count in counts.tolist() if count})]
    out: Tensor | None = None
    going, moving = torch.arange(len(real), device=real.device), state
    order: list[Tensor] = []
    ended: list[ModelState] = []
    for begin, end in pairwise([*edges, edges[-1] + 1]):
        ends = counts[going] <= begin
        if bool(ends.any()):
            order.append(going[ends])
            ended.append(states.rows(moving, ends.nonzero()[:, 0]))
            if bool(ends.all()):
                break
            moving, going = states.rows(moving, (~ends).nonzero()[:, 0]), going[~ends]
        place = starts[going, None] + torch.arange(begin, end, device=real.device)
        found, moving = read(inputs[going[:, None], place], moving)
        out = found.new_zeros(*real.shape, *found.shape[2:]) if out is None else out
        out = out.index_put((going[:, None], place), found)
    return out, states.rows(states.stack(ended), torch.cat(order).argsort())


__all__ = ["read_ragged"]

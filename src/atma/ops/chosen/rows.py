"""Rows of tokens in one piece, wherever they lie."""

from torch import Tensor

from atma.ops.paged.pages import Pages


def in_one_piece(held: Tensor | Pages) -> Tensor:
    """(B, G, S, ·) of what a state holds; of pages a copy, in the order of positions while no text passes its ring."""
    if not isinstance(held, Pages):
        return held
    return held.pool[held.table.long()].transpose(1, 2).flatten(2, 3)

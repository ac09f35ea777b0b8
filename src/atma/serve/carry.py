"""What a text carries from token to token besides what lies in pages: tails of convolutions, memories, sums, by row.

The engine keeps these as a flat tuple of tensors (rows, …), and builds the model's state of it for each call. Which
leaves of a state are carried and which lie in pages is found in `model.init_state`.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from atma.model import Model
from atma.serve.pages import PagePool, in_pages, is_paged
from atma.state import LENGTH, Leaf, ModelState, leaves, replaced

Carried = tuple[Tensor, ...]


class Carrier:
    """Between flat rows and the state of a model of which what grows, or slides, is in a pool of pages.

    ValueError: a mixer's state cannot be served so.
    """

    def __init__(self, model: Model) -> None:
        self.like = model.init_state(1, 1)
        """A state of one row that has read nothing."""
        self._device = model.embed.weight.device
        check_served(self.like, model.init_state(2, 3))
        self.paged = [leaf for leaf in leaves(self.like) if is_paged(leaf)]
        """What lies in pages."""
        self._whole = [i for i, leaf in enumerate(self.paged) if not in_pages(leaf)]
        weight = model.embed.weight
        self.hidden = weight.new_empty(0)
        """Of the type of a hidden state."""
        self.hidden_bytes = model.config.width * weight.element_size()

    @property
    def recordable(self) -> bool:
        """Whether a step touches the same memory each time: all that grows is read where it lies."""
        return not self._whole

    @property
    def row_bytes(self) -> int:
        """Of one row, with its last hidden state."""
        return sum(x.numel() * x.element_size() for x in self.empty()) + self.hidden_bytes

    def empty(self) -> Carried:
        """One row that has read nothing."""
        return tuple(x.clone() for x in self.carried(self.like))

    def state(self, carried: Carried, length: Tensor, table: Tensor, pool: PagePool) -> ModelState:
        """The model's state of rows that stand at `length` (rows,) int32 and have the pages `table` (rows, P) int32."""
        rest, index = iter(carried), iter(range(len(self.paged)))

        def build(leaf: Leaf) -> object:
            if is_paged(leaf):
                at = next(index)
                return pool.view(at, table) if in_pages(leaf) else _in_one_piece(pool, at, table)
            return length if leaf.name == LENGTH else next(rest)

        return replaced(self.like, build)

    def put_back(
        self, after: ModelState, starts: Sequence[int], pages: Sequence[Mapping[int, int]], pool: PagePool
    ) -> None:
        """Write into the pages what a call has put behind `starts` in leaves that were given in one piece."""
        if not self._whole:
            return
        grown = [leaf for leaf in leaves(after) if is_paged(leaf)]
        ends = after.length.tolist()
        for i in self._whole:
            leaf = grown[i]
            assert leaf.axis is not None
            for row, (start, own) in enumerate(zip(starts, pages, strict=True)):
                x = leaf.tensor[row : row + 1].narrow(leaf.axis, start, ends[row] - start)
                pool.write(i, own, x, start)

    def lengths(self, positions: Sequence[int]) -> Tensor:
        """Positions of rows as a state has them."""
        return torch.tensor(positions, dtype=torch.int32, device=self._device)

    def carried(self, state: ModelState) -> Carried:
        """The flat rows of a state."""
        return tuple(leaf.tensor for leaf in leaves(state) if leaf.carried and not is_paged(leaf))

    def copy(self, carried: Carried, position: int, pages: Mapping[int, int], pool: PagePool) -> ModelState:
        """The state of one row that has read `position` tokens, of which nothing lies in pages; of a window that is
        not full yet, the places that are."""
        rest, index = iter(carried), iter(range(len(self.paged)))

        def build(leaf: Leaf) -> Tensor:
            if is_paged(leaf):
                start, places = _slid(leaf, position)
                x = pool.read(next(index), pages, start, position)
                return x if places is None else _placed(x, leaf, places, position)
            return self.lengths([position]) if leaf.name == LENGTH else next(rest)

        return replaced(self.like, build)

    def spread(self, state: ModelState, pages: Mapping[int, int], pool: PagePool) -> None:
        """Write what lies in pages of a state of one row into these."""
        position = int(state.length)
        held = (leaf for leaf in leaves(state) if is_paged(leaf))
        for i, (leaf, like) in enumerate(zip(held, self.paged, strict=True)):
            start, places = _slid(like, position)
            x = leaf.tensor if places is None else leaf.tensor.index_select(leaf.slides, places)
            pool.write(i, pages, x, start)


def _slid(like: Leaf, position: int) -> tuple[int, Tensor | None]:
    """The first position that is read again of a leaf after so many, and the places (N,) of it and all later ones in a
    window; None where none slides."""
    if like.slides is None:
        return 0, None
    size = like.tensor.shape[like.slides]
    start = max(0, position - size + 1)
    return start, torch.arange(start, position, device=like.tensor.device) % size


def _placed(x: Tensor, like: Leaf, places: Tensor, position: int) -> Tensor:
    """The positions x (1, …) of a window at their places."""
    shape, axis = list(x.shape), like.slides
    assert axis is not None
    shape[axis] = min(position, like.tensor.shape[axis])
    return x.new_zeros(shape).index_copy_(axis, places, x)


def check_served(small: ModelState, large: ModelState) -> None:
    """ValueError unless a state of one row and token, and one of two rows and three tokens, differ as states served do.

    Rows come first; what grows has a place a token on its axis, and what does not is as large for any text.
    """
    for one, other in zip(leaves(small), leaves(large), strict=True):
        wanted = [2, *one.tensor.shape[1:]]
        if one.axis is not None and 0 < one.axis < one.tensor.ndim:
            wanted[one.axis] = 3
        named = f"'{'.'.join(one.path)}' of {one.owner.__name__}"
        if one.axis is not None and not 0 < one.axis < one.tensor.ndim:
            raise ValueError(f"{named} cannot be served: it grows along axis {one.axis} of {one.tensor.ndim}")
        if list(other.tensor.shape) != wanted:
            grows = f"grows along axis {one.axis}" if one.axis is not None else "does not grow"
            raise ValueError(
                f"{named} cannot be served: it {grows}, so with 2 rows and room for 3 tokens it must be "
                f"{tuple(wanted)}, not {tuple(other.tensor.shape)}"
            )


def _in_one_piece(pool: PagePool, index: int, table: Tensor) -> Tensor:
    """A leaf of rows with these pages, copied out of them."""
    leaf, axis = pool.leaves[index], pool.view(index, table).axis
    assert leaf.axis is not None
    x = pool.pools[index][table.long()]  # (B, P, …) with a page's positions at axis + 1
    return x.movedim(axis + 1, 2).flatten(1, 2).movedim(1, leaf.axis).contiguous()


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

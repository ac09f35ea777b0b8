"""The pool of pages that hold what grows with every text, or slides along it, counted by who refers to them.

A text's pages are known by their places in it: page n holds its positions n · size … (n + 1) · size − 1. Where all that
lies in pages slides, a text needs those of its window alone, however long it is.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from atma.ops.paged import Pages
from atma.state import Leaf


class PagePool:
    """`count` pages of `size` positions; a page has room for what these have in every paged leaf of a state.

    A page is written only by the one text it was taken for; kept states and later texts read it for as long as they
    refer to it. It is free again when nobody does.
    """

    def __init__(self, leaves: Sequence[Leaf], count: int, size: int, device: torch.device) -> None:
        self.size, self.count, self.leaves = size, count, leaves
        shapes = [_page_shape(leaf, size) for leaf in leaves]
        self.pools = [
            torch.empty(count, *shape, dtype=leaf.tensor.dtype, device=device)
            for shape, leaf in zip(shapes, leaves, strict=True)
        ]
        self.window = _window(leaves)
        """Most positions behind which nothing is read any more, the next one included; None: all are."""
        self.references = [0] * count
        self.freed = 0
        """Pages that have become free since the start."""
        self._free = list(range(count - 1, -1, -1))

    @staticmethod
    def page_bytes(leaves: Sequence[Leaf], size: int) -> int:
        """Bytes of a page over all leaves."""
        return sum(size * leaf.tensor.nbytes // leaf.tensor.shape[_axis(leaf)] for leaf in leaves)

    @property
    def free(self) -> int:
        """Pages that nobody refers to."""
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        """Pages that so many positions take."""
        return -(-tokens // self.size)

    def first_page(self, position: int) -> int:
        """The first page of a text that is read once `position` tokens have been read."""
        return 0 if self.window is None else max(0, position - self.window + 1) // self.size

    def most_pages(self, tokens: int) -> int | None:
        """Pages that a text holds at the most while it is read `tokens` at a time; None: all of its own."""
        return None if self.window is None else self.pages_for(self.window - 1 + tokens) + 1

    def take(self, count: int) -> list[int]:
        """So many free pages, now referred to once. The caller has seen to it that they are there."""
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self.references[page] = 1
        return taken

    def retain(self, pages: Iterable[int]) -> None:
        """One more reference to each."""
        for page in pages:
            self.references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One reference less to each; those without any are free."""
        for page in pages:
            self.references[page] -= 1
            if self.references[page] == 0:
                self._free.append(page)
                self.freed += 1

    def copy(self, source: int, target: int) -> None:
        """Everything in one page to another."""
        for pool in self.pools:
            pool[target] = pool[source]

    def view(self, index: int, table: Tensor) -> Pages:
        """A leaf of rows whose pages are `table` (B, P) int32, where it lies."""
        return Pages(self.pools[index], table, page_axis(self.leaves[index]))

    def read(self, index: int, pages: Mapping[int, int], start: int, end: int) -> Tensor:
        """A copy of a leaf (1, …) with the positions from start to end of a text with these pages."""
        leaf, pool = self.leaves[index], self._by_token(index)
        shape = list(leaf.tensor.shape)
        shape[_axis(leaf)] = end - start
        found = pool.new_empty(shape)
        by_token = found[0].movedim(_axis(leaf) - 1, 0)
        for page, slots, at in self._pieces(pages, start, end):
            by_token[at] = pool[page, slots]
        return found

    def write(self, index: int, pages: Mapping[int, int], x: Tensor, start: int = 0) -> None:
        """Positions from `start` on of a text with these pages take x (1, …)."""
        pool, by_token = self._by_token(index), x[0].movedim(_axis(self.leaves[index]) - 1, 0)
        for page, slots, at in self._pieces(pages, start, start + len(by_token)):
            pool[page, slots] = by_token[at]

    def _pieces(self, pages: Mapping[int, int], start: int, end: int) -> Iterator[tuple[int, slice, slice]]:
        """Pages with positions from start to end: those in the page, and where they are behind start."""
        at = start
        while at < end:
            slot = at % self.size
            some = min(self.size - slot, end - at)
            yield pages[at // self.size], slice(slot, slot + some), slice(at - start, at - start + some)
            at += some

    def _by_token(self, index: int) -> Tensor:
        """A leaf's pool as (pages, page, …)."""
        return self.pools[index].movedim(page_axis(self.leaves[index]), 1)


def in_pages(leaf: Leaf) -> bool:
    """Whether the mixer reads a leaf where it lies in pages, and does not ask for it in one piece."""
    return leaf.name in getattr(leaf.owner, "pages", {})


def is_paged(leaf: Leaf) -> bool:
    """Whether a leaf lies in pages: what grows, and what slides where its mixer reads it so."""
    return leaf.axis is not None or (leaf.slides is not None and in_pages(leaf))


def page_axis(leaf: Leaf) -> int:
    """The axis of a page's positions in the leaf's pool: where its mixer says, or else where they are in a state."""
    return getattr(leaf.owner, "pages", {}).get(leaf.name, leaf.axis)


def _axis(leaf: Leaf) -> int:
    """Of a leaf's positions in a state."""
    axis = leaf.slides if leaf.axis is None else leaf.axis
    assert axis is not None
    return axis


def _window(leaves: Sequence[Leaf]) -> int | None:
    """The longest window, where every leaf has one. Where there are no leaves a token reads but itself."""
    if any(leaf.axis is not None for leaf in leaves):
        return None
    return max((leaf.tensor.shape[_axis(leaf)] for leaf in leaves), default=1)


def _page_shape(leaf: Leaf, size: int) -> list[int]:
    """Of a page of this leaf."""
    shape = list(leaf.tensor.shape[1:])
    del shape[_axis(leaf) - 1]
    shape.insert(page_axis(leaf) - 1, size)
    return shape

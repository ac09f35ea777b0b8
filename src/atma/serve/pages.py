"""The pool of pages that hold what grows with every text, counted by who refers to them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from atma.ops.paged import Pages
from atma.state import Leaf


class PagePool:
    """`count` pages of `size` positions; a page has room for what these have in every growing leaf of a state.

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
        self.references = [0] * count
        self.freed = 0
        """Pages that have become free since the start."""
        self._free = list(range(count - 1, -1, -1))

    @staticmethod
    def page_bytes(leaves: Sequence[Leaf], size: int) -> int:
        """Bytes of a page over all leaves."""
        return max(1, sum(size * leaf.tensor.nbytes for leaf in leaves))

    @property
    def free(self) -> int:
        """Pages that nobody refers to."""
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        """Pages that so many positions take."""
        return -(-tokens // self.size)

    def take(self, count: int) -> list[int]:
        """So many free pages, now referred to once. The caller has seen to it that they are there."""
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self.references[page] = 1
        return taken

    def retain(self, pages: list[int]) -> None:
        """One more reference to each."""
        for page in pages:
            self.references[page] += 1

    def release(self, pages: list[int]) -> None:
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

    def read(self, index: int, pages: Sequence[int], count: int) -> Tensor:
        """A copy of a leaf (1, …) with the first `count` positions of these pages."""
        leaf, pool = self.leaves[index], self._by_token(index)
        shape = list(leaf.tensor.shape)
        shape[_axis(leaf)] = count
        found = pool.new_empty(shape)
        by_token = found[0].movedim(_axis(leaf) - 1, 0)
        for page, at in zip(pages, range(0, count, self.size), strict=False):
            some = min(self.size, count - at)
            by_token[at : at + some] = pool[page, :some]
        return found

    def write(self, index: int, pages: Sequence[int], x: Tensor, start: int = 0) -> None:
        """Positions from `start` on of a text with these pages take x (1, …)."""
        pool, by_token = self._by_token(index), x[0].movedim(_axis(self.leaves[index]) - 1, 0)
        at, end = start, start + len(by_token)
        while at < end:
            slot = at % self.size
            some = min(self.size - slot, end - at)
            pool[pages[at // self.size], slot : slot + some] = by_token[at - start : at - start + some]
            at += some

    def _by_token(self, index: int) -> Tensor:
        """A leaf's pool as (pages, page, …)."""
        return self.pools[index].movedim(page_axis(self.leaves[index]), 1)


def in_pages(leaf: Leaf) -> bool:
    """Whether the mixer reads a leaf where it lies in pages, and does not ask for it in one piece."""
    return leaf.name in getattr(leaf.owner, "pages", {})


def page_axis(leaf: Leaf) -> int:
    """The axis of a page's positions in the leaf's pool: where its mixer says, or else where they are in a state."""
    return getattr(leaf.owner, "pages", {}).get(leaf.name, leaf.axis)


def _axis(leaf: Leaf) -> int:
    assert leaf.axis is not None
    return leaf.axis


def _page_shape(leaf: Leaf, size: int) -> list[int]:
    """Of a page of this leaf."""
    shape = list(leaf.tensor.shape[1:])
    del shape[_axis(leaf) - 1]
    shape.insert(page_axis(leaf) - 1, size)
    return shape

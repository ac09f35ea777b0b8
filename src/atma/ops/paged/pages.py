"""Where keys and values of many texts lie in one pool (atma.serve)."""

from typing import NamedTuple

from torch import Tensor


class Pages(NamedTuple):
    """Keys or values of many texts in one pool of pages; `table` says which pages are whose."""

    pool: Tensor  # keys (pages, G, K, page), values (pages, G, page, K)
    table: Tensor  # (B, P) int32: where row b holds its positions n·page … (n + 1)·page − 1, at n mod P
    axis: int = 2
    """The pool's axis of a page's positions."""

    @property
    def capacity(self) -> int:
        """Positions that the pages of a row have room for."""
        return self.table.shape[1] * self.pool.shape[self.axis]

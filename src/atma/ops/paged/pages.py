"""Where keys and values lie when many texts share one pool."""

from typing import NamedTuple

from torch import Tensor


class Pages(NamedTuple):
    """Keys or values of many texts in one pool of pages (atma.serve); `table` says which pages are whose."""

    pool: Tensor  # keys (pages, G, K, page), values (pages, G, page, K)
    table: Tensor  # (B, P) int32: where row b holds its positions n·page … (n + 1)·page − 1

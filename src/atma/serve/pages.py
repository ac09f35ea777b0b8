"""The pool of pages that hold every text's keys and values, counted by who refers to them."""

import torch
from torch import Tensor

from atma.config import ModelConfig
from atma.ops.paged import Pages


class PagePool:
    """`count` pages of `size` positions; a page has room for these positions' keys and values in every global layer.

    A page is written only by the one text it was taken for; kept states and later texts read it for as long as they
    refer to it. It is free again when nobody does.
    """

    def __init__(self, config: ModelConfig, count: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        layers, shape = config.layers.count("global"), (count, config.key_value_heads)
        self.size, self.count = size, count
        self.keys = [torch.empty(*shape, config.head_width, size, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.empty(*shape, size, config.head_width, dtype=dtype, device=device) for _ in range(layers)]
        self.references = [0] * count
        self.freed = 0
        """Pages that have become free since the start."""
        self._free = list(range(count - 1, -1, -1))

    @staticmethod
    def page_bytes(config: ModelConfig, size: int, dtype: torch.dtype) -> int:
        """Bytes of a page over all layers."""
        numbers = 2 * config.layers.count("global") * config.key_value_heads * config.head_width * size
        return max(1, numbers * dtype.itemsize)

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
        for pool in (*self.keys, *self.values):
            pool[target] = pool[source]

    def contiguous(self, index: int, pages: list[int], count: int) -> tuple[Tensor, Tensor]:
        """A copy of a global layer's keys and values (1, G, count, K) at the first `count` positions of `pages`."""
        keys, values = self.keys[index], self.values[index]
        shape = 1, values.shape[1], count, values.shape[3]
        k, v = keys.new_empty(shape), values.new_empty(shape)
        for page, at in zip(pages, range(0, count, self.size), strict=True):
            some = min(self.size, count - at)
            k[0, :, at : at + some] = keys[page].mT[:, :some]
            v[0, :, at : at + some] = values[page][:, :some]
        return k, v

    def layer(self, index: int, table: Tensor) -> tuple[Pages, Pages]:
        """Keys and values of a global layer, for rows whose pages are `table` (B, P) int32."""
        return Pages(self.keys[index], table), Pages(self.values[index], table)

"""Which keys a query reads, found among all that it sees: by a search that halves intervals, or by their very scores.

Every choice is of one query and the keys up to it, so it is the same however a text is cut into calls. It is told as
indices of blocks on the text's own grid: block n holds the positions n·block … (n + 1)·block − 1. Inference only.
Sources: HiP (arXiv 2406.09827) and HyLRA (arXiv 2602.00777); mixers.md, sections 6.2 and 6.4.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from atma.ops.backend import backend_for, check_indices, check_tensors, implementation
from atma.ops.paged.pages import Pages


class Reach(NamedTuple):
    """What a query's choice is made of, in tokens. Whole blocks are read: those that cover the last `window` tokens
    always, and `sinks` first ones."""

    block: int = 16
    """Tokens of a block."""
    kept: int = 0
    """Chosen by the search."""
    sinks: int = 0
    window: int = 128
    share: int = 8
    """Of n visible keys, n / share are chosen by their scores, but at least `least` and at most `most`."""
    least: int = 64
    most: int = 2048

    def check(self) -> None:
        """ValueError with the number that makes no choice."""
        for name, value in self._asdict().items():
            if value < (0 if name in ("kept", "sinks", "window") else 1):
                raise ValueError(
                    f"{name} must be at least {0 if name in ('kept', 'sinks', 'window') else 1}, not {value}"
                )
        for name in ("kept", "sinks"):
            if getattr(self, name) % self.block:
                raise ValueError(
                    f"{name} must be whole blocks of {self.block} tokens, not {getattr(self, name)} tokens"
                )
        if self.least > self.most:
            raise ValueError(f"least must be at most {self.most}, not {self.least}")


def search_blocks(q: Tensor, keys: Tensor | Pages, last: Tensor, reach: Reach, backend: str = "auto") -> Tensor:
    """The blocks (B, H, T, N) int32 that each query reads, ascending, −1 behind them, by the search of HiP.

    q (B, H, T, K); keys (B, G, S, K), or pages of them; last (B, T) int32: each query sees the keys before it. The
    first `sinks` keys and the last `window` are read; of the n between, cut into kept / block intervals of blocks, each
    is halved and the better parts kept, by the largest q·k of a part's first block, until they are single blocks; all
    are read where n ≤ kept. Of equals the first is kept. ValueError: something does not fit.
    """
    if reach.kept < reach.block:
        raise ValueError(f"kept must be at least one block of {reach.block} tokens, not {reach.kept}")
    return _chosen("search_blocks", q, keys, last, reach, backend, reach.sinks + reach.kept + reach.window)


def heaviest_pages(q: Tensor, keys: Tensor | Pages, last: Tensor, reach: Reach, backend: str = "auto") -> Tensor:
    """The pages (B, H, T, N) int32 that hold the keys of largest scores, ascending, −1 behind them.

    Arguments as in `search_blocks`. Of the pages before those of the window, the ⌈k/block⌉ with the largest max q·k,
    the first of equals, k = min(most, max(least, ⌊n/share⌋)) of n visible keys; and the window's. A page of them holds
    one of the k largest scores: before it come at most ⌈k/block⌉ − 1 pages, which have fewer than k keys.
    """
    return _chosen("heaviest_pages", q, keys, last, reach, backend, reach.most + reach.block - 1 + reach.window)


def _chosen(name: str, q: Tensor, keys: Any, last: Tensor, reach: Reach, backend: str, most: int) -> Tensor:
    held = keys.pool if isinstance(keys, Pages) else keys
    reach.check()
    check_tensors("q keys", q, held)
    room = keys.capacity if isinstance(keys, Pages) else keys.shape[2]
    if q.ndim != 4 or held.ndim != 4 or held.shape[3] != q.shape[3] or q.shape[1] % held.shape[1]:
        raise ValueError(f"q {tuple(q.shape)} and keys {tuple(held.shape)} do not fit together")
    check_indices("last", last, (q.shape[0], q.shape[2]), q.device)
    if isinstance(keys, Pages) and held.shape[2] % reach.block:
        raise ValueError(f"block must divide a page of {held.shape[2]} keys, not be {reach.block}")
    slots = min(most // reach.block + 2, -(-room // reach.block))
    chosen = getattr(implementation("search", backend_for(backend, q, "search")), name)
    return chosen(q, keys, last, reach, slots)


def finished(chosen: Tensor, slots: int) -> Tensor:
    """Which blocks are chosen (…, blocks) bool as indices (…, slots) int32, ascending, −1 behind them."""
    index = torch.arange(chosen.shape[-1], device=chosen.device, dtype=torch.int32)
    none = chosen.shape[-1]
    placed = torch.where(chosen, index, none).sort(-1).values[..., :slots]
    return placed.masked_fill(placed == none, -1).contiguous()


__all__ = ["Reach", "heaviest_pages", "search_blocks"]

"""Attention over some pages of a text alone: which pages score highest, and the sums over their keys.

A page is `page` neighbouring tokens; page g holds the positions g · page … (g + 1) · page − 1 of its text, whatever
call brought them. Its summary, n numbers by which queries score it, lies spread over its tokens: of `summaries`
(B, G, S, w) with w = ⌈n / page⌉ it is the first n of the page · w numbers of these tokens, row by row. So summaries
grow, lie in pools and are saved as keys do. Decisions are those of each query by itself (mixers.md, section 6).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from atma.ops.backend import backend_for, check_indices, check_tensors, implementation, own_precision, recording
from atma.ops.paged.pages import Pages

Held = Tensor | Pages
"""Rows of tokens: (B, G, S, ·), or a pool (pages, G, page, ·) and whose its pages are."""


class Sums(NamedTuple):
    """What attention is made of (maths.md, section 4): S (B, H, T, K); L, Q and M (B, H, T), float32 or wider."""

    S: Tensor
    L: Tensor
    Q: Tensor
    M: Tensor


def slots_of(k: int, window: int, page: int) -> int:
    """Pages that a query reads at the most: k chosen ones, and those that cover its last `window` tokens."""
    return k + (window + page - 2) // page + 1


@own_precision
def choose_pages(
    u: Tensor, summaries: Held, last: Tensor, page: int, k: int, window: int, backend: str = "auto"
) -> Tensor:
    """The pages that each query reads (B, H, T, `slots_of`) int32, ascending, −1 behind the last.

    These are the whole pages that cover its last `window` tokens, its own among them, and of all before those the k
    whose summaries have the largest products with u (B, H, T, n), of equal ones the first; all, where there are fewer.
    last (B, T) int32: tokens that a query sees. H is a multiple of G. ValueError: shapes do not fit.
    """
    pool = summaries.pool if isinstance(summaries, Pages) else summaries
    _check(u, pool, last, page)
    if u.shape[3] > page * pool.shape[3]:
        raise ValueError(f"summaries of {page} × {pool.shape[3]} numbers cannot hold the {u.shape[3]} of u")
    if k < 0 or window < 1:
        raise ValueError(f"k must be at least 0 and window at least 1, not {k} and {window}")
    return implementation("chosen", _backend(backend, u, pool)).choose(u, summaries, last, page, k, window)


@own_precision
def chosen_statistics(
    q: Tensor,
    keys: Held,
    values: Held,
    scale: Tensor,
    chosen: tuple[Tensor, int],
    last: Tensor,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> Sums:
    """The sums of each query over the keys of its pages.

    q (B, H, T, K), or (B, H, T, N, K) of which each page meets its own; keys and values (B, G, S, K) or pages of them;
    scale (B, H, T), the logits being scale q·k; chosen: pages (B, H, T, N) int32, ascending, −1 behind the last, and
    the tokens of a page; last (B, T): tokens that a query sees; bias (B, H, T, N): added to the logits of each page. A
    query without any page has sums of 0 and M = −1e30.
    """
    pool = keys.pool if isinstance(keys, Pages) else keys
    check_tensors("q keys", q, pool)
    _check(q, pool, last, chosen[1])
    check_indices("chosen", chosen[0], (*q.shape[:3], chosen[0].shape[-1]), q.device)
    read = implementation("chosen", _backend(backend, q, pool)).statistics
    return Sums(*read(q, keys, values, scale, chosen, last, bias))


def page_boxes(keys: Held, summaries: Held, length: Tensor, tokens: int, page: int) -> Held:
    """The summaries with the least and the most of every channel, 2K numbers, of each page that has become full.

    keys hold `tokens` new ones from length (B,) on. Written in place unless gradients are recorded.
    """
    pool = summaries.pool if isinstance(summaries, Pages) else summaries
    return implementation("chosen", _backend("auto", pool, pool)).boxes(keys, summaries, length, tokens, page)


def hold_summaries(summaries: Held, x: Tensor, index: Tensor, full: Tensor, page: int) -> Held:
    """The summaries with x (B, G, P, n) as those of the pages index (B, P), where these are `full` (B, P).

    In place unless gradients are recorded.
    """
    from atma.ops.chosen.cpu import write_summaries

    return write_summaries(summaries, x, index, full, page)


def summaries_at(summaries: Held, pages: Tensor, page: int, width: int) -> Tensor:
    """The first `width` numbers of the summaries of pages (B, H, T, N), as in `choose_pages`: (B, H, T, N, width)."""
    pool = summaries.pool if isinstance(summaries, Pages) else summaries
    place = pages.long().clamp(min=0)[..., None] * page + torch.arange(page, device=pages.device)
    head = torch.arange(pages.shape[1], device=pages.device) // (pages.shape[1] // pool.shape[1])
    row, head = torch.arange(len(pages), device=pages.device)[:, None, None, None, None], head[:, None, None, None]
    if isinstance(summaries, Pages):
        size = pool.shape[2]
        found = pool[summaries.table.long()[row, place // size % summaries.table.shape[1]], head, place % size]
    else:
        found = pool[row, head, place.clamp(max=pool.shape[2] - 1)]
    return found.flatten(-2)[..., :width]


def hold_rows(held: Held, x: Tensor, length: Tensor) -> Held:
    """The rows with x (B, G, T, ·) at each text's positions from length (B,) on.

    In place unless gradients are recorded.
    IndexError when a text has no room.
    """
    if isinstance(held, Pages):
        plain = recording() or held.pool.device.type != "cpu"  # rows of any type are held, whole numbers too
        chosen = "cpu" if plain else backend_for("auto", None, "chosen")
        return implementation("chosen", chosen).hold_in_pages(held, x, length)
    from atma.ops.polar.held import hold

    return hold(held, held, x, x, length)[0]


def _backend(name: str, x: Tensor, pool: Tensor) -> str:
    """What takes these tensors: compiled kernels have no gradients."""
    if name == "auto" and (recording() or x.dtype != pool.dtype):
        name = "cpu"
    return backend_for(name, x, "chosen")


def _check(q: Tensor, pool: Tensor, last: Tensor, page: int) -> None:
    if q.ndim not in (4, 5) or pool.ndim != 4 or q.shape[1] % pool.shape[1] != 0:
        raise ValueError(
            f"queries (B, H, T, ·) with H a multiple of G are wanted, not {tuple(q.shape)} of {pool.shape[1]}"
        )
    if page < 1:
        raise ValueError(f"a page has at least 1 token, not {page}")
    check_indices("last", last, (q.shape[0], q.shape[2]), q.device)


__all__ = [
    "Held",
    "Sums",
    "choose_pages",
    "chosen_statistics",
    "hold_rows",
    "hold_summaries",
    "page_boxes",
    "slots_of",
    "summaries_at",
]

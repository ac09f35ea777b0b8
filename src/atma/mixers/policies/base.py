"""What a selection policy is: it holds keys and values of one layer's texts, and says what each query reads of them.

A policy is set on a trained layer at run time (`atma.select`), and changes nothing else of it: projections, Canon, gate
and memory stay. It keeps what it wants of a text in a cache of its own class, a NamedTuple of tensors of which `grows`
tells those that grow with the text, and `pages` where in a page of a pool its positions lie (atma.state). Decisions are
those of each query by itself, from what it sees, on the grid of absolute positions: so how a text is cut into calls
changes nothing (mixers.md, section 6).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from atma.mixers.base import Call
from atma.mixers.heads import Attended, Core, Heads
from atma.ops.chosen import Held, chosen_statistics, hold_rows
from atma.ops.paged.pages import Pages


class Seat(NamedTuple):
    """The layer that a policy works for."""

    heads: Heads
    core: Core
    index: int
    """Which of the model's layers that take policies, from 0."""
    count: int
    """How many there are."""
    model: Callable[[], str]
    """The hash of the model, for plans that are made for one."""


class New(NamedTuple):
    """The tokens of a call: q (B, H, T, K), k and v (B, G, T, K), positions in q and k."""

    q: Tensor
    k: Tensor
    v: Tensor
    bare_q: Tensor
    """q without positions in it."""
    bare_k: Tensor
    start: Tensor
    """(B,) int32: the position of each text's first token here."""

    @property
    def last(self) -> Tensor:
        """(B, T) int32: tokens that each query sees, its own among them."""
        return self.start[:, None] + torch.arange(self.q.shape[2], device=self.q.device, dtype=torch.int32) + 1


class Read(NamedTuple):
    """What a policy's queries have read, and what it then holds."""

    read: Tensor
    """(B, H, T, K)."""
    added: Tensor | None
    """(B, T, D), the core's own channel, if it has one."""
    cache: Any


@dataclass
class Counts:
    """What queries saw and what was read for them, over all layers and heads while it was counted."""

    seen: int = 0
    """Keys that queries see."""
    read: int = 0
    """Of these, those that were read as they are, not in 8 bits."""
    direction_error: float | None = None
    """The most that is certain of any query's direction, a vector of length 1; None: nothing is certain."""
    magnitude_error: float | None = None
    """And of its magnitude, below 1."""

    def row(self) -> dict[str, float]:
        """As rows of results tell it; empty where nothing was counted."""
        if not self.seen:
            return {}
        certain = {"certificate_direction": self.direction_error, "certificate_magnitude": self.magnitude_error}
        return {"keys_read": self.read / self.seen} | {k: x for k, x in certain.items() if x is not None}


class Policy:
    """Built as `cls(config, seat)` for a layer, with its own frozen `Config`. ValueError: the layer cannot take it."""

    Config: ClassVar[type]
    trained: ClassVar[bool] = False
    """Whether it is for mixers that choose by what they have learned, and for those alone."""
    reads_call: ClassVar[bool] = False
    """Whether it is given the record of the model's call, in which layers leave something for those after them."""

    def __init__(self, config: Any, seat: Seat) -> None:
        self.config, self.seat, self.core = config, seat, seat.core
        self.counts: Counts | None = None
        """Where what is read is counted, while it is."""

    def init_cache(self, batch: int, capacity: int, like: Tensor) -> Any:
        """What is held before the first token, with room for `capacity` tokens a text, of the type of `like`."""
        raise NotImplementedError(f"{type(self).__name__} holds nothing")

    def __call__(self, new: New, cache: Any, call: Call | None) -> Read:
        """The new tokens' keys and values join the cache, and their queries read of it."""
        raise NotImplementedError(f"{type(self).__name__} reads nothing")

    def count(self, new: "New", read: Tensor | None = None, chosen: tuple[Tensor, int] | None = None) -> None:
        """While it is counted, count what the new queries see and read: so many keys each, (B, H, T), or those in
        chosen pages, as in `read_pages`; neither: all."""
        if self.counts is None:
            return
        seen = new.last[:, None].expand(new.q.shape[:3])
        if chosen is not None:
            pages, size = chosen
            read = torch.where(pages < 0, 0, (seen[..., None] - pages * size).clamp(0, size)).sum(-1)
        self.counts.seen += int(seen.sum())
        self.counts.read += int((seen if read is None else read).sum())

    def attended(self, cache: Any, k: Tensor, v: Tensor, start: Tensor) -> Attended:
        """What queries would see if all were read: new k and v (B, G, T, K) from start (B,) on behind those held, for
        diagnosis. ValueError: the keys themselves are not held."""
        keys, values = getattr(cache, "keys", None), getattr(cache, "values", None)
        if not isinstance(keys, Tensor) or not isinstance(values, Tensor) or keys.shape[3] != k.shape[3]:
            raise ValueError(f"{type(self).__name__} does not hold all keys: what would be attended to cannot be told")
        return Attended(hold_rows(keys, k, start), hold_rows(values, v, start), start)


def new_rows(like: Tensor, heads: int, capacity: int, width: int) -> Tensor:
    """Room for rows (B, heads, capacity, width) of the type of `like` (B, …)."""
    return like.new_zeros(like.shape[0], heads, capacity, width)


def hold(keys: Held, values: Held, new: New, page: int) -> tuple[Held, Held]:
    """Keys and values with the new ones. ValueError: the pool's pages are no multiple of the policy's."""
    if isinstance(keys, Pages) and keys.pool.shape[2] % page:
        raise ValueError(f"pages of {page} tokens do not divide the engine's, of {keys.pool.shape[2]} (page_tokens)")
    return hold_rows(keys, new.k, new.start), hold_rows(values, new.v, new.start)


def read_pages(
    core: Core, new: New, held: tuple[Held, Held], chosen: tuple[Tensor, int], bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """What the new queries read of chosen pages of keys and values, as `chosen_statistics`, and what the core adds."""
    scale, null = core.scored(new.q, new.last)
    sums = chosen_statistics(new.q, *held, scale, chosen, new.last, bias)
    return core.assemble(sums, null, new.q.dtype)


__all__ = ["Counts", "New", "Policy", "Read", "Seat", "hold", "new_rows", "read_pages"]

"""The first tokens of a text beside a window: attention sinks (StreamingLLM, arXiv 2309.17453; mixers.md, formula 7.1).

A layer with a window of w keys then also reads the first s of the text, and holds them beside its ring. What is read is
one softmax over both: each part is summed by itself, and the sums are added.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from atma.mixers.heads import Attended, Core, Sinks
from atma.mixers.window import WindowState, attended
from atma.ops import paged
from atma.ops.backend import own_precision
from atma.ops.paged.pages import Pages
from atma.ops.polar import statistics_of, visible_range
from atma.ops.segments import document_start


class SinkState(NamedTuple):
    """Of a global mixer with a window and s sinks: a `WindowState`, and the first keys and values of the text."""

    length: Tensor
    keys: Tensor | Pages  # (B, G, R, K): position p at place p mod R
    values: Tensor | Pages
    q_tail: Tensor | None
    k_tail: Tensor | None
    v_tail: Tensor | None
    memory: Any
    sink_keys: Tensor  # (B, G, s, K): position p at place p, zero before it is there
    sink_values: Tensor

    slides = {"keys": 2, "values": 2}  # noqa: RUF012 (a field otherwise)
    pages = {"keys": 3, "values": 2}  # noqa: RUF012


def attended_with_sinks(state: SinkState, k: Tensor, v: Tensor, in_order: bool) -> Attended:
    """New k and v (B, G, T, K) behind the ring of a state, and the sinks of the text with them."""
    first, values = (_joined(state.length, *pair) for pair in ((state.sink_keys, k), (state.sink_values, v)))
    window = WindowState(*state[:7])
    if isinstance(state.keys, Pages) and isinstance(state.values, Pages):
        held = paged.hold(state.keys, state.values, k, v, state.length)
        seen = Attended(*held, state.length, held)
    else:
        seen = attended(window, k, v, in_order)
    return seen._replace(sinks=Sinks(first, values, state.length))


def _joined(length: Tensor, held: Tensor, new: Tensor) -> Tensor:
    """The first keys or values (B, G, s, K), those among `new` (B, G, T, K) in their places."""
    place = torch.arange(held.shape[2], device=held.device)
    index = place - length.long()[:, None]
    here = ((index >= 0) & (index < new.shape[2]))[:, None, :, None]
    index = index.clamp(0, new.shape[2] - 1)[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
    return torch.where(here, new.gather(2, index).to(held.dtype), held)


def read_with_sinks(core: Core, q: Tensor, seen: Attended, segment_ids: Tensor | None, sinks: int) -> Tensor:
    """What q (B, H, T, K) reads (B, H, T, K) of the window and of the first `sinks` tokens of its text."""
    k, v, start, window = seen.keys, seen.values, seen.start, core.window
    if seen.sinks is None and (window is None or q.shape[2] <= window):  # none is outside the window
        return core(q, k, v, start, segment_ids)[0]
    assert window is not None
    if isinstance(k, Pages) and isinstance(v, Pages):
        assert start is not None
        k, v, start = paged.gather(k, v, start, q.shape[2], window)
    assert isinstance(k, Tensor) and isinstance(v, Tensor)
    visible = visible_range(q, start, segment_ids, window)
    if seen.sinks is None:
        begin = torch.zeros_like(visible[0]) if segment_ids is None else document_start(segment_ids)
        most = k.shape[2] if segment_ids is not None else min(sinks, k.shape[2])
        parts = (k, v, *visible), (k[:, :, :most], v[:, :, :most], begin, torch.minimum(begin + sinks, visible[0]))
    else:
        index = torch.arange(q.shape[2], device=q.device, dtype=torch.int32)
        outside = seen.sinks.length.to(torch.int32)[:, None] + index + 1 - window
        end = outside.clamp(0, seen.sinks.keys.shape[2])
        parts = (k, v, *visible), (seen.sinks.keys, seen.sinks.values, torch.zeros_like(end), end)
    scale, _ = core.scale_and_null(q, visible[1])
    return _sum(q, scale, parts)


Part = tuple[Tensor, Tensor, Tensor, Tensor]


@own_precision
def _sum(q: Tensor, scale: Tensor, parts: tuple[Part, Part]) -> Tensor:
    """One softmax over two parts, keys, values, and the first and last (B, T) seen of them; the second may be empty."""
    (k, v, first, last), (sink_k, sink_v, begin, end) = parts
    statistics, none = statistics_of("auto", q), (begin >= end)[:, None]
    S, L, _, M = statistics(q, k, v, scale, first, last)
    end = torch.maximum(end, begin + 1)
    unseen = (torch.arange(sink_k.shape[2], device=k.device) >= end.max())[:, None]
    s, l, _, m = statistics(q, sink_k.masked_fill(unseen, 0), sink_v.masked_fill(unseen, 0), scale, begin, end)
    most = torch.maximum(M, m.masked_fill(none, -torch.inf))
    here, there = (M - most).exp(), (m - most).exp().masked_fill(none, 0)
    return ((S * here[..., None] + s * there[..., None]) / (L * here + l * there)[..., None]).to(q.dtype)


__all__ = ["SinkState", "attended_with_sinks", "read_with_sinks"]

"""Rows that processes share, for mixers that know their state before they read of it, as attention knows its keys.

What the next stretch needs goes there first; then all processes read at once, and none waits for what another reads. In
the backward pass each goes through its own reads before it asks for the gradients of what it handed on. Everything
else is as in atma.mixers.stretches, whose order of messages this keeps.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from atma import state as states
from atma.mixers.messages import Joined, answered, received_from, send
from atma.mixers.stretches import Part, Stretch, called, chosen, in_order, receive, rows_of


class Ahead(Protocol):
    """What such a mixer gives besides what every mixer does."""

    def ahead(self, x: Tensor, state: Any) -> tuple[Any, Callable[[Any], Tensor]]:
        """x (B, T, D) to the state moved on, and what makes y (B, T, D) of that state."""
        ...


class _Last(NamedTuple):
    """The piece of a part whose document goes on in the next stretch."""

    part: Part
    state: Any
    finish: Callable[[Any], Tensor]


def ahead(mixer: Any, x: Tensor, stretch: Stretch, call: Any) -> Tensor:
    """`Mixer.forward_shard` of a mixer that is `Ahead`: x (B, tokens, D) to y of the same."""
    given, received = receive(mixer, stretch) if len(stretch.before) else (None, ())
    before = [
        rows_of(given, torch.searchsorted(stretch.before, part.rows)) if part.begun else None for part in stretch.parts
    ]
    places = [i for i, part in enumerate(stretch.parts) if part.goes_on]
    lasts = [_last(mixer, x, stretch.parts[i], before[i], stretch) for i in places]
    ends = dict(zip(places, zip(lasts, _handed(lasts, mixer, stretch), strict=True), strict=True))
    outputs = [_part(mixer, x, part, before[i], (stretch, call, ends.get(i))) for i, part in enumerate(stretch.parts)]
    y = in_order(outputs, [part.rows for part in stretch.parts])
    return Joined.apply(y, *received) if received else y


def _part(
    mixer: Any, x: Tensor, part: Part, before: Any, more: tuple[Stretch, Any, tuple[_Last, Any] | None]
) -> Tensor:
    """Rows that are cut alike: the document begun before, those that are whole here, and the one that goes on."""
    (stretch, call, end), rows, pieces = more, chosen(x, part.rows), []
    if part.begun and not (end is not None and part.open == stretch.tokens):
        pieces.append(called(mixer, rows, slice(0, part.begun), (before, None), (part, call))[0])
    if part.begun < part.open:
        own = chosen(stretch.segments, part.rows)[:, part.begun : part.open]
        pieces.append(called(mixer, rows, slice(part.begun, part.open), (None, own), (part, call))[0])
    if end is not None:
        last, state = end
        pieces.append(last.finish(state))
    return torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0]


def _last(mixer: Any, x: Tensor, part: Part, state: Any, stretch: Stretch) -> _Last:
    """Only a document that fills the stretch was begun before, and is all of it."""
    start = 0 if part.open == stretch.tokens else part.open
    if start or state is None:
        state = mixer.init_state(len(part.rows), stretch.seen)
    return _Last(part, *mixer.ahead(chosen(x, part.rows)[:, start:], state))


def _handed(lasts: list[_Last], mixer: Any, stretch: Stretch) -> list[Any]:
    """The states, which have gone to the process behind: gradients of both uses come together in them."""
    if not lasts:
        return []
    order = torch.cat([last.part.rows for last in lasts]).argsort()
    tensors = [answered(x) for last in lasts for x in states.tensors(last.state)]
    expected = [x.dtype for x in states.tensors(mixer.init_state(1, 1))]
    passed = iter(_HandAhead.apply(stretch.peers[stretch.index + 1], order, expected, *tensors))
    return [states.transform(last.state, lambda *_: next(passed)) for last in lasts]


class _HandAhead(torch.autograd.Function):
    """The tensors of several states as they are; all rows go to a process, in `order` and the dtypes it expects."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, peer: int, order: Tensor, expected: list[torch.dtype], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        fields = len(expected)
        ctx.peer, ctx.order, ctx.expected = peer, order, expected
        ctx.rows = [len(x) for x in tensors[::fields]]
        ctx.like = [(x.shape[1:], x.dtype, x.device) for x in tensors]
        for i, dtype in enumerate(expected):
            send(_rows([x.detach().to(dtype) for x in tensors[i::fields]], order), peer)
        passed = tuple(x.view_as(x) for x in tensors)
        ctx.mark_non_differentiable(*(x for x in passed if not x.is_floating_point()))
        ctx.set_materialize_grads(False)
        return passed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        fields, found = len(ctx.expected), list(gradients)
        for i, dtype in enumerate(ctx.expected):
            shape, own, device = ctx.like[i]
            if not own.is_floating_point:
                continue
            whole = received_from(torch.empty(len(ctx.order), *shape, dtype=dtype, device=device), ctx.peer)
            parts = whole[ctx.order.argsort()] if len(ctx.rows) > 1 else whole
            for turn, part in enumerate(parts.to(own).split(ctx.rows)):
                before = found[turn * fields + i]
                found[turn * fields + i] = part if before is None else part + before
        return None, None, None, *found


def _rows(parts: list[Tensor], order: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)[order]


__all__ = ["Ahead", "ahead"]

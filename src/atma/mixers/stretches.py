"""Rows longer than one device: each process holds a stretch of every row, and hands on what a mixer knows at its end.

Processes of one context hold consecutive stretches of equal length. By default a mixer runs on each as it is and its
state goes from one process to the next, gradients the other way: `y, state = f(x, state)` is all that this needs, so it
is exact for every mixer, of other packages too. A layer of one stretch waits for the same layer of the stretch before,
and no longer: once the first stretch is two layers ahead, all processes work at once, so that of L layers on N
processes L of L + N − 1 turns are work. Documents of packed rows may end inside, at or next to an edge.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from atma import state as states

if TYPE_CHECKING:
    from atma.mixers.base import Call, Mixer


class Stretch(NamedTuple):
    """What of each row this process holds."""

    index: int
    """Which of the row's stretches, from 0."""
    peers: tuple[int, ...]
    """The processes that hold the stretches of these rows, in order, by their number in the whole group."""
    segments: Tensor
    """(B, whole length) int: the documents of the whole rows, a number each, ascending."""

    @property
    def tokens(self) -> int:
        """Of a stretch."""
        return self.segments.shape[1] // len(self.peers)

    def over(self, edge: int) -> Tensor:
        """Whether the document of each row goes on over the beginning of stretch `edge`: (B,) bool."""
        at = edge * self.tokens
        if not 0 < at < self.segments.shape[1]:
            return torch.zeros(len(self.segments), dtype=torch.bool, device=self.segments.device)
        return self.segments[:, at - 1] == self.segments[:, at]

    @property
    def own(self) -> Tensor:
        """(B, tokens): the documents of this stretch."""
        return self.segments[:, self.index * self.tokens : (self.index + 1) * self.tokens]


def stretch_of(index: int, peers: Sequence[int], segments: Tensor | None, shape: tuple[int, int]) -> Stretch:
    """The stretch of rows (B, whole length) of `shape`; no segments: each row is one document. ValueError: the length
    is no multiple of the number of processes."""
    if shape[1] % len(peers):
        raise ValueError(f"rows of {shape[1]} tokens cannot be shared by {len(peers)} processes: choose a multiple")
    whole = torch.zeros(shape, dtype=torch.int32) if segments is None else segments
    return Stretch(index, tuple(peers), whole)


class Part(NamedTuple):
    """Rows of a stretch whose documents begin and end alike."""

    rows: Tensor
    """Which, (n,) int64."""
    begun: int
    """Tokens at the beginning that go on with a document of the stretch before."""
    open: int
    """Where the last document begins, if it goes on in the next stretch and began in this one; else all tokens."""


def parts_of(stretch: Stretch) -> Iterator[Part]:
    """The rows of a stretch by where their first document ends and their last begins."""
    before, after, own = stretch.over(stretch.index), stretch.over(stretch.index + 1), stretch.own
    tokens = stretch.tokens
    first = (own == own[:, :1]).sum(1)
    last = tokens - (own == own[:, -1:]).sum(1)
    begun = torch.where(before, first, 0)
    # A document that fills the stretch and was begun before is no new one.
    opened = torch.where(after & (last >= begun), last, tokens)
    places = torch.stack([begun, opened], 1).tolist()
    for begin, end in sorted(set(map(tuple, places))):
        rows = [i for i, place in enumerate(places) if tuple(place) == (begin, end)]
        yield Part(torch.tensor(rows, device=own.device), begin, end)


def chained(mixer: "Mixer", x: Tensor, stretch: Stretch, call: "Call | None") -> Tensor:
    """`Mixer.forward_shard` of any mixer: its state goes from stretch to stretch. x (B, tokens, D) to y of the same.

    Gradients cross over in `backward`; `torch.autograd.grad` of some inputs alone does not reach what crosses.
    """
    whole = stretch.segments.shape[1]
    before, after = (stretch.over(edge).nonzero()[:, 0] for edge in (stretch.index, stretch.index + 1))
    given, received = None, ()
    if len(before):
        given, received = _receive(mixer.init_state(len(before), whole), stretch)
    outputs, order, handed, handed_rows = [], [], [], []
    for part in parts_of(stretch):
        state = None if not part.begun else _rows(given, torch.searchsorted(before, part.rows))
        y, state = _run(mixer, x[part.rows], part, (state, stretch), call)
        outputs.append(y)
        order.append(part.rows)
        if state is not None:
            handed.append(state)
            handed_rows.append(part.rows)
    y = torch.cat(outputs)[torch.cat(order).argsort()]
    if received:
        y = _Joined.apply(y, *received)
    if len(after):
        y = _hand_over(
            y, _rows(states.stack(handed), torch.cat(handed_rows).argsort()), mixer.init_state(1, 1), stretch
        )
    return y


def _run(mixer: "Mixer", x: Tensor, part: Part, before: tuple[Any, Stretch], call: "Call | None") -> tuple[Tensor, Any]:
    """Rows that are cut alike: the document begun before, those that are whole here, and the one that goes on."""
    (state, stretch), tokens, outputs = before, x.shape[1], []
    goes_on = bool(stretch.over(stretch.index + 1)[part.rows[0]])
    if part.begun:
        y, state = _called(mixer, x, slice(0, part.begun), (state, None), (part, call))
        outputs.append(y)
    if part.begun < part.open:
        own = stretch.own[part.rows, part.begun : part.open]
        y, _ = _called(mixer, x, slice(part.begun, part.open), (None, own), (part, call))
        outputs.append(y)
    if part.open < tokens:
        fresh = mixer.init_state(len(x), stretch.segments.shape[1])
        y, state = _called(mixer, x, slice(part.open, tokens), (fresh, None), (part, call))
        outputs.append(y)
    return torch.cat(outputs, 1), state if goes_on else None


def _called(
    mixer: "Mixer",
    x: Tensor,
    some: slice,
    given: tuple[Any, Tensor | None],
    record: "tuple[Part, Call | None]",
) -> tuple[Tensor, Any]:
    (state, segments), (part, call) = given, record
    more: dict[str, Any] = {} if state is not None else {"segment_ids": segments}
    if mixer.reads_call and call is not None:
        left = call.left.setdefault(f"rows {part.rows.tolist()} from {some.start}", {})
        more["call"] = dataclasses.replace(call, embedding=call.embedding[part.rows, some], left=left, stretch=None)
    return mixer(x[:, some], state, **more)


def _rows(state: Any, index: Tensor) -> Any:
    """The chosen rows of a state, through which gradients go."""
    return states.transform(state, lambda _, x: x[index])


def _sent(state: Any, tokens: int) -> list[Tensor]:
    """The tensors of a state; of what grows the first `tokens`."""
    return [x.tensor if x.axis is None else x.tensor.narrow(x.axis, 0, tokens) for x in states.leaves(state)]


def _receive(template: Any, stretch: Stretch) -> tuple[Any, tuple[Tensor, ...]]:
    """The state that the process before hands over, of the shapes of `template`; its tensors with gradients."""
    known = stretch.index * stretch.tokens
    like = [x.detach() for x in _sent(template, known)]
    anchor = torch.empty(0, requires_grad=torch.is_grad_enabled())
    found = _Receive.apply(anchor, stretch.peers[stretch.index - 1], *like)
    fill = iter(found)

    def put(leaf: states.Leaf) -> Tensor:
        x = next(fill)
        if leaf.axis is None:
            return x
        shape = list(x.shape)
        shape[leaf.axis] = leaf.tensor.shape[leaf.axis] - known
        return torch.cat([x, x.new_zeros(shape)], leaf.axis)

    return states.replaced(template, put), tuple(x for x in found if x.requires_grad)


def _hand_over(y: Tensor, state: Any, template: Any, stretch: Stretch) -> Tensor:
    """y, and the state to the process behind, in the dtypes of `template`, which that process expects."""
    known = (stretch.index + 1) * stretch.tokens
    sent = [x.to(own.dtype) for x, own in zip(_sent(state, known), states.tensors(template), strict=True)]
    return _HandOver.apply(y, stretch.peers[stretch.index + 1], *sent)


class _Receive(torch.autograd.Function):
    """Tensors like those given, from a process; their gradients go back to it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, peer: int, *like: Tensor) -> tuple[Tensor, ...]:
        ctx.peer = peer
        found = tuple(_received(x, peer) for x in like)
        ctx.mark_non_differentiable(*(x for x in found if not x.is_floating_point()))
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        floats = [x for x in gradients if x is not None and x.is_floating_point()]
        for x in floats:
            dist.send(x.contiguous(), ctx.peer)
        return (None,) * (2 + len(gradients))


class _HandOver(torch.autograd.Function):
    """y as it is; the tensors go to a process, which gives their gradients when that of y is asked for."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, peer: int, *tensors: Tensor) -> Tensor:
        ctx.peer, ctx.like = peer, [(x.shape, x.dtype) if x.is_floating_point() else None for x in tensors]
        for x in tensors:
            dist.send(x.detach().contiguous(), peer)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        like = (None if x is None else gradient.new_empty(x[0], dtype=x[1]) for x in ctx.like)
        return gradient, None, *(None if x is None else _received(x, ctx.peer) for x in like)


class _Joined(torch.autograd.Function):
    """y as it is, of which the tensors are a part with gradient zero: so that their sender is always answered."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *tensors: Tensor) -> Tensor:
        ctx.count = len(tensors)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, *(None,) * ctx.count


def _received(like: Tensor, peer: int) -> Tensor:
    found = torch.empty_like(like, memory_format=torch.contiguous_format)
    dist.recv(found, peer)
    return found


__all__ = ["Part", "Stretch", "chained", "parts_of", "stretch_of"]

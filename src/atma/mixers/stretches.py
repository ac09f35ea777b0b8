"""Rows longer than one device: each process holds a stretch of every row, and hands on what a mixer knows at its end.

Processes of one context hold consecutive stretches, of equal length or of shares that make equal work where attention
reads more for later tokens. By default a mixer runs on each as it is and its
state goes from one process to the next, gradients the other way: `y, state = f(x, state)` is all that this needs, so it
is exact for every mixer, of other packages too. A layer of one stretch waits for the same layer of the stretch before,
and no longer: once the first stretch is two layers ahead, all processes work at once, so that of L layers on N
processes L of L + N − 1 turns are work. Documents of packed rows may end inside, at or next to an edge.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from atma import state as states
from atma.mixers.messages import Joined, Receive, answered, received_from, send

if TYPE_CHECKING:
    from atma.mixers.base import Call, Mixer


class Part(NamedTuple):
    """Rows of a stretch whose documents begin and end alike."""

    rows: Tensor
    """Which, (n,) int64, ascending."""
    begun: int
    """Tokens at the beginning that go on with a document of the stretch before."""
    open: int
    """Where the last document begins, if it goes on in the next stretch and began in this one; else all tokens."""
    goes_on: bool
    """Whether the last document goes on in the next stretch."""


class Stretch(NamedTuple):
    """What of each row this process holds, from `stretch_of`."""

    index: int
    """Which of the row's stretches, from 0."""
    peers: tuple[int, ...]
    """The processes that hold the stretches of these rows, in order, by their number in the whole group."""
    edges: tuple[int, ...]
    """Where each of the row's stretches begins, and where the last ends, in tokens."""
    segments: Tensor
    """(B, tokens) int: the documents of this stretch."""
    parts: tuple[Part, ...]
    before: Tensor
    """Rows, (n,) int64, whose first document was begun in the stretch before."""
    begun: Tensor
    """(stretches, B) int64: at which token of the row the first document of each stretch begins."""
    prefix: bool = False
    """Whether mixers that know their transitions hand these on in place of states (atma.mixers.stretches_prefix)."""

    @property
    def start(self) -> int:
        """Tokens of a row before this stretch."""
        return self.edges[self.index]

    @property
    def tokens(self) -> int:
        """Of a stretch."""
        return self.segments.shape[1]

    @property
    def seen(self) -> int:
        """Tokens of a row up to the end of this stretch: the most that a state here holds."""
        return self.start + self.tokens

    @property
    def hands_over(self) -> bool:
        """Whether a document goes on in the next stretch."""
        return any(part.goes_on for part in self.parts)


def edges_of(length: int, count: int, shares: Sequence[float] = ()) -> list[int]:
    """Where each of `count` stretches of a row begins, and where the last ends: in proportion to `shares`, or equal.

    ValueError: the length is no multiple of the count, or a share is less than a token.
    """
    if not shares and length % count:
        raise ValueError(f"rows of {length} tokens cannot be shared by {count} processes: choose a multiple")
    shares = shares or [1.0] * count
    edges = [round(length * sum(shares[:i]) / sum(shares)) for i in range(count + 1)]
    if any(edge >= after for edge, after in itertools.pairwise(edges)):
        raise ValueError(f"shares {list(shares)} of {length} tokens leave a process none: choose others")
    return edges


def stretch_of(
    index: int,
    peers: Sequence[int],
    segments: Tensor | None,
    shape: tuple[int, int],
    shares: Sequence[float] = (),
    prefix: bool = False,
) -> Stretch:
    """The stretch of rows (B, whole length) of `shape`, of documents with a number each, ascending; no segments: each
    row is one document. Shares and ValueError as for `edges_of`, prefix as of `Stretch`."""
    edges = edges_of(shape[1], len(peers), shares)
    whole = torch.zeros(shape, dtype=torch.int32) if segments is None else segments
    own = whole[:, edges[index] : edges[index + 1]]
    before, after = (_over(whole, edge) for edge in edges[index : index + 2])
    begun = torch.stack([(whole < whole[:, start, None]).sum(1) for start in edges[:-1]])
    parts = tuple(_parts(own, before, after))
    return Stretch(index, tuple(peers), tuple(edges), own, parts, before.nonzero()[:, 0], begun, prefix)


def _over(segments: Tensor, at: int) -> Tensor:
    """Whether the document of each row goes on over the place before token `at`: (B,) bool."""
    if not 0 < at < segments.shape[1]:
        return torch.zeros(len(segments), dtype=torch.bool, device=segments.device)
    return segments[:, at - 1] == segments[:, at]


def _parts(own: Tensor, before: Tensor, after: Tensor) -> Iterator[Part]:
    """The rows of a stretch by where their first document ends and their last begins."""
    tokens = own.shape[1]
    first = (own == own[:, :1]).sum(1)
    last = tokens - (own == own[:, -1:]).sum(1)
    begun = torch.where(before, first, 0)
    # A document that fills the stretch and was begun before is no new one.
    opened = torch.where(after & (last >= begun), last, tokens)
    places = [tuple(place) for place in torch.stack([begun, opened, after.long()], 1).tolist()]
    for begin, end, goes_on in sorted(set(places)):
        rows = [i for i, place in enumerate(places) if place == (begin, end, goes_on)]
        yield Part(torch.tensor(rows, device=own.device), begin, end, bool(goes_on))


def chained(mixer: "Mixer", x: Tensor, stretch: Stretch, call: "Call | None") -> Tensor:
    """`Mixer.forward_shard` of any mixer: its state goes from stretch to stretch. x (B, tokens, D) to y of the same.

    Gradients cross over in `backward`; `torch.autograd.grad` of some inputs alone does not reach what crosses.
    """
    given, received = receive(mixer, stretch) if len(stretch.before) else (None, ())
    outputs, handed = [], []
    for part in stretch.parts:
        state = rows_of(given, torch.searchsorted(stretch.before, part.rows)) if part.begun else None
        y, state = _run(mixer, chosen(x, part.rows), part, (state, stretch), call)
        outputs.append(y)
        if part.goes_on:
            handed.append(state)
    y = in_order(outputs, [part.rows for part in stretch.parts])
    if received:
        y = Joined.apply(y, *received)
    if stretch.hands_over:
        order = torch.cat([part.rows for part in stretch.parts if part.goes_on]).argsort()
        y = _hand_over(y, rows_of(states.stack(handed) if len(handed) > 1 else handed[0], order), mixer, stretch)
    return y


def _run(mixer: "Mixer", x: Tensor, part: Part, before: tuple[Any, Stretch], call: "Call | None") -> tuple[Tensor, Any]:
    """Rows that are cut alike: the document begun before, those that are whole here, and the one that goes on."""
    (state, stretch), outputs = before, []
    if part.begun:
        y, state = called(mixer, x, slice(0, part.begun), (state, None), (part, call))
        outputs.append(y)
    if part.begun < part.open:
        own = chosen(stretch.segments, part.rows)[:, part.begun : part.open]
        y, _ = called(mixer, x, slice(part.begun, part.open), (None, own), (part, call))
        outputs.append(y)
    if part.open < stretch.tokens:
        fresh = mixer.init_state(len(x), stretch.seen)
        y, state = called(mixer, x, slice(part.open, stretch.tokens), (fresh, None), (part, call))
        outputs.append(y)
    return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0], state


def called(
    mixer: "Mixer",
    x: Tensor,
    some: slice,
    given: tuple[Any, Tensor | None],
    record: "tuple[Part, Call | None]",
) -> tuple[Tensor, Any]:
    """y of some tokens of the rows x of a part, behind a state or of documents, and the state after them."""
    (state, segments), (part, call) = given, record
    more: dict[str, Any] = {} if state is not None else {"segment_ids": segments}
    return mixer(x[:, some], state, **more, **with_call(mixer, some, part, call))


def with_call(mixer: "Mixer", some: slice, part: Part, call: "Call | None") -> dict[str, Any]:
    """The argument `call` of some tokens of a part's rows, where the mixer reads it."""
    if not mixer.reads_call or call is None:
        return {}
    left = call.left.setdefault(f"rows {part.rows.tolist()} from {some.start}", {})
    own = dataclasses.replace(call, embedding=call.embedding[part.rows, some], left=left, stretch=None)
    return {"call": own}


def chosen(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of x (B, …), distinct and ascending: x itself where they are all."""
    return x if len(rows) == len(x) else x[rows]


def in_order(parts: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
    """The rows of all parts as they were."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))[torch.cat(list(rows)).argsort()]


def rows_of(state: Any, index: Tensor) -> Any:
    """The chosen rows of a state, in that order, through which gradients go; the state itself where nothing changes."""
    same = torch.equal(index, torch.arange(len(index), device=index.device))
    return states.transform(state, lambda _, x: x if same and len(x) == len(index) else x[index])


def receive(mixer: "Mixer", stretch: Stretch) -> tuple[Any, tuple[Tensor, ...]]:
    """The state that the process before hands over, with room for this stretch; its tensors with gradients."""
    template = mixer.init_state(len(stretch.before), stretch.start)
    anchor = torch.empty(0, requires_grad=torch.is_grad_enabled())
    like = [x.detach() for x in states.tensors(template)]
    found = Receive.apply(anchor, stretch.peers[stretch.index - 1], *like)
    fill = iter(found)
    state = states.transform(template, lambda *_: next(fill))
    return states.grow(state, stretch.seen), tuple(x for x in found if x.requires_grad)


def _hand_over(y: Tensor, state: Any, mixer: "Mixer", stretch: Stretch) -> Tensor:
    """y, and the state to the process behind, in the dtypes that it expects, whatever the call computed in."""
    expected = (x.dtype for x in states.tensors(mixer.init_state(1, 1)))
    sent = [x.to(dtype) for x, dtype in zip(states.tensors(state), expected, strict=True)]
    return _HandOver.apply(answered(y), stretch.peers[stretch.index + 1], *sent)


class _HandOver(torch.autograd.Function):
    """y as it is; the tensors go to a process, which gives their gradients when that of y is asked for."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, peer: int, *tensors: Tensor) -> Tensor:
        ctx.peer, ctx.like = peer, [(x.shape, x.dtype) if x.is_floating_point() else None for x in tensors]
        for x in tensors:
            send(x.detach(), peer)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        like = (None if x is None else gradient.new_empty(x[0], dtype=x[1]) for x in ctx.like)
        return gradient, None, *(None if x is None else received_from(x, ctx.peer) for x in like)


__all__ = [
    "Part",
    "Stretch",
    "called",
    "chained",
    "chosen",
    "edges_of",
    "in_order",
    "receive",
    "rows_of",
    "stretch_of",
    "with_call",
]

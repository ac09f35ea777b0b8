"""Rows that processes share, for linear recurrences: no stretch waits for the one before it.

What such a mixer holds after a stretch is A · before + B, with A and B of the stretch alone. Each process finds its own
from nothing before, all hand them on to the processes behind, and each composes in the order of the stretches what is
before its own. Of a convolution and the like the last tokens of the stretch before are read again. Gradients go the
same way back: each process gives those of the A and B that it took, and none waits for what another was given.
Documents that end in a stretch, at its edge or next to it need no A: what is before them is nothing.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from atma import state as states
from atma.mixers.messages import Joined, Receive, answered, received_from, send
from atma.mixers.stretches import Part, Stretch, called, chosen, in_order, with_call
from atma.ops.backend import own_precision

if TYPE_CHECKING:
    from atma.mixers.base import Call, Mixer

WORTH = 2
"""Layers for each process after the first, up to which the prefix form is surely the faster one (docs/LOG.md): as a
chain each process waits for one layer of each before it, once; in the prefix form every layer computes more, by 3 to
20% where channels or heads decay and by 20 to 33% by the delta rule."""
Fields = Mapping[str, Tensor]
"""Of a state, by name."""


def composes(layers: int, processes: int) -> bool:
    """Whether rows of a model of so many layers are shared by so many processes in the prefix form."""
    return layers <= WORTH * (processes - 1)


class Transition(NamedTuple):
    """What T tokens do to a state, of which some fields are linear in what they were, and what they read of it."""

    read: Tensor
    """What they read where nothing is before them, of any shape."""
    after: Fields
    """B: the linear fields after the tokens, where they were zero before."""
    factors: Fields
    """A of each of them, (B, …): the field is then A ∘ before + B, or with `matrix` before @ A + B."""
    finish: Callable[[Tensor, Fields], Tensor]
    """What is read from nothing, and the linear fields before the tokens (none: all zero), to y (B, T, D)."""
    matrix: bool = False
    """Whether a field is before @ A + B."""

    def moved(self, before: Tensor, factor: Tensor) -> Tensor:
        """A · before."""
        return before @ factor if self.matrix else factor * before


class _Piece(NamedTuple):
    """Tokens of a document that crosses an edge, of rows that are cut alike."""

    part: Part
    some: slice
    goes_on: bool
    made: Transition

    @property
    def begun(self) -> bool:
        """Whether its document was begun before."""
        return self.part.begun > self.some.start


def prefixed(mixer: "Mixer", x: Tensor, stretch: Stretch, call: "Call | None") -> Tensor:
    """`Mixer.forward_shard` of a mixer that has `transition`: x (B, tokens, D) to y of the same."""
    x, last, received = _last_tokens(x, stretch, mixer.reach or 0)
    parts = [one for part in stretch.parts for one in _alike(part, stretch, mixer.reach or 0)]
    pieces = [_pieces(mixer, x, part, last, (stretch, call)) for part in parts]
    pieces = _handed_on(pieces, stretch)
    whole = [_whole(mixer, x, part, stretch, call) for part in parts]
    given, more = _composed([piece for some in pieces for piece in some if piece.begun], stretch, last)
    outputs = [_output(*one, given, stretch) for one in zip(pieces, whole, parts, strict=True)]
    y = in_order(outputs, [part.rows for part in parts])
    return Joined.apply(y, *received, *more) if received or more else y


def _last_tokens(x: Tensor, stretch: Stretch, reach: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """x as it is, the `reach` tokens before the stretch (B, reach, D), and what was received of them.

    Where a document is begun later than these, they are zeros, or another's: nobody reads them.
    """
    index, edges, last = stretch.index, stretch.edges, x.new_zeros(len(x), reach, x.shape[2])
    if not reach:
        return x, last, ()
    messages, fields = [], []
    for later in range(index + 1, len(stretch.peers)):
        rows, start = _crossing(stretch, index, later), max(edges[later] - reach, edges[index])
        if len(rows) and start < edges[index + 1]:
            messages.append((stretch.peers[later], ((len(fields), rows),)))
            fields.append(x[:, start - edges[index] :])
    if messages:
        x = _HandOn.apply(messages, 1, answered(x), *fields)[0]
    received = []
    for earlier in range(index):
        rows, start = _crossing(stretch, earlier, index), max(edges[index] - reach, edges[earlier])
        if len(rows) and start < edges[earlier + 1]:
            found = _received(stretch.peers[earlier], [x.new_empty(len(rows), edges[earlier + 1] - start, x.shape[2])])
            place = slice(start - edges[index] + reach, edges[earlier + 1] - edges[index] + reach)
            last = last.index_copy(0, rows, last[rows].slice_scatter(found[0], 1, place.start, place.stop))
            received += found
    return x, last, tuple(received)


def _crossing(stretch: Stretch, earlier: int, later: int, before: bool = False) -> Tensor:
    """Rows (n,) whose first document in a later stretch was begun in an earlier one or before it, or only before it."""
    return (stretch.begun[later] < stretch.edges[earlier + (not before)]).nonzero()[:, 0]


def _alike(part: Part, stretch: Stretch, reach: int) -> list[Part]:
    """A part's rows by how many tokens of their document stand right before the stretch, up to `reach`."""
    if not part.begun or not reach:
        return [part]
    near = _near(part.rows, stretch, reach)
    return [part._replace(rows=part.rows[near == count]) for count in near.unique()]


def _near(rows: Tensor, stretch: Stretch, reach: int) -> Tensor:
    return (stretch.start - stretch.begun[stretch.index][rows]).clamp(max=reach)


def _pieces(mixer: Any, x: Tensor, part: Part, last: Tensor, record: "tuple[Stretch, Call | None]") -> list[_Piece]:
    """What of a part belongs to documents that cross an edge: begun before, or going on behind."""
    (stretch, call), rows, found = record, chosen(x, part.rows), []
    fills = part.goes_on and part.begun == stretch.tokens
    for begun, some in ((True, slice(0, part.begun)), (False, slice(part.open, stretch.tokens))):
        if some.start < some.stop:
            near = int(_near(part.rows[:1], stretch, last.shape[1])) if begun else 0
            state = _state_before(mixer, chosen(last, part.rows)[:, last.shape[1] - near :], part, (stretch, begun))
            more = with_call(mixer, some, part, call)
            found.append(_Piece(part, some, fills or not begun, mixer.transition(rows[:, some], state, begun, **more)))
    return found


def _state_before(mixer: Any, last: Tensor, part: Part, more: tuple[Stretch, bool]) -> Any:
    """The state before a piece, all that is not linear in it as the last tokens leave it."""
    stretch, begun = more
    state = mixer.init_state(len(part.rows), stretch.seen)
    if not begun:
        return state
    if last.shape[1]:
        _, state = mixer(last, state)
    count = (stretch.start - stretch.begun[stretch.index][part.rows]).int()
    return states.replaced(state, lambda leaf: count if leaf.name == states.LENGTH else leaf.tensor)


def _handed_on(pieces: list[list[_Piece]], stretch: Stretch) -> list[list[_Piece]]:
    """The pieces as they are; A and B of those that go on are sent to the processes behind."""
    going = [piece for some in pieces for piece in some if piece.goes_on]
    if not going or not going[0].made.after:
        return pieces
    names = list(going[0].made.after)
    fields = [torch.cat([piece.made.after[name] for piece in going]) for name in names]
    filling = [piece for piece in going if piece.begun]
    if filling:
        fields += [torch.cat([piece.made.factors[name] for piece in filling]) for name in names]
    places = [_places(some, stretch) for some in (going, filling)]
    messages = []
    for later in range(stretch.index + 1, len(stretch.peers)):
        taken = [_crossing(stretch, stretch.index, later, before) for before in (False, True)]
        sent = [(i, places[i >= len(names)][taken[i >= len(names)]]) for i in range(2 * len(names))]
        sent = tuple((i, index) for i, index in sent if len(index))
        if sent:
            messages.append((stretch.peers[later], sent))
    reads = [answered(piece.made.read) for piece in going]
    passed = iter(_HandOn.apply(messages, len(reads), *reads, *fields))
    return [
        [one._replace(made=one.made._replace(read=next(passed))) if one.goes_on else one for one in some]
        for some in pieces
    ]


def _places(pieces: list[_Piece], stretch: Stretch) -> Tensor:
    """Where each row (B,) is among those of the pieces, one after the other."""
    places = stretch.begun.new_zeros(stretch.begun.shape[1])
    if pieces:
        rows = torch.cat([piece.part.rows for piece in pieces])
        places[rows] = torch.arange(len(rows), device=rows.device)
    return places


@own_precision
def _composed(pieces: list[_Piece], stretch: Stretch, last: Tensor) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """The linear fields before this stretch, of the rows `stretch.before`, and what was received for them.

    last: what was received earlier, whose gradients are given later.
    """
    if not pieces or not pieces[0].made.after:
        return {}, ()
    made, rows = pieces[0].made, stretch.before
    given = {name: x.new_zeros(len(rows), *x.shape[1:]) for name, x in made.after.items()}
    received: list[Tensor] = []
    for earlier in range(stretch.index):
        own, older = (_crossing(stretch, earlier, stretch.index, before) for before in (False, True))
        if not len(own):
            continue
        like = [(own, x) for x in made.after.values()] + [(older, x) for x in made.factors.values() if len(older)]
        found = _received(stretch.peers[earlier], [x.new_empty(len(some), *x.shape[1:]) for some, x in like], last)
        received += found
        factors = iter(found[len(given) :])
        for (name, before), after in zip(given.items(), found, strict=False):
            if len(older):
                place = torch.searchsorted(own, older)
                moved = made.moved(chosen(before, torch.searchsorted(rows, older)), next(factors))
                after = after + moved if len(older) == len(own) else after.index_add(0, place, moved)
            same = len(own) == len(rows)
            given[name] = after if same else before.index_copy(0, torch.searchsorted(rows, own), after)
    return given, tuple(x for x in received if x.requires_grad)


def _whole(mixer: "Mixer", x: Tensor, part: Part, stretch: Stretch, call: "Call | None") -> Tensor | None:
    """y of the documents of a part that begin and end in this stretch."""
    if part.begun == part.open:
        return None
    own = chosen(stretch.segments, part.rows)[:, part.begun : part.open]
    return called(mixer, chosen(x, part.rows), slice(part.begun, part.open), (None, own), (part, call))[0]


def _output(
    pieces: list[_Piece], whole: Tensor | None, part: Part, given: dict[str, Tensor], stretch: Stretch
) -> Tensor:
    """y of a part: the document begun before, those that are whole here, and the one that goes on."""
    index = torch.searchsorted(stretch.before, part.rows)
    found = []
    for piece in pieces:
        before = {name: chosen(x, index) for name, x in given.items()} if piece.begun else {}
        found.append((piece.some.start, piece.made.finish(piece.made.read, before)))
    if whole is not None:
        found.append((part.begun, whole))
    outputs = [y for _, y in sorted(found, key=lambda one: one[0])]
    return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]


def _received(peer: int, like: list[Tensor], earlier: Tensor | None = None) -> list[Tensor]:
    """What a process has sent, which is like this; gradients go back to it, before those of what came earlier."""
    anchor = earlier
    if anchor is None or not anchor.requires_grad:
        anchor = torch.empty(0, requires_grad=torch.is_grad_enabled())
    return list(Receive.apply(anchor, peer, *like))


class _HandOn(torch.autograd.Function):
    """Some tensors as they are; of those behind them rows go to other processes, which give their gradients.

    A message is a process and what it gets: the number of a tensor among those that are handed on, and which rows.
    """

    @staticmethod
    def forward(ctx: Any, messages: list, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.messages, ctx.count = messages, count
        ctx.like = [(x.shape, x.dtype, x.device) for x in tensors[count:]]
        for peer, sent in messages:
            for i, rows in sent:
                send(tensors[count + i].detach()[rows], peer)
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        found = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like]
        for peer, sent in ctx.messages:
            for i, rows in sent:
                part = received_from(found[i].new_empty(len(rows), *found[i].shape[1:]), peer)
                found[i].index_add_(0, rows, part)
        return None, None, *gradients, *found


__all__ = ["Transition", "composes", "prefixed"]

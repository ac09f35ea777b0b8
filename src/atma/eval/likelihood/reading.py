"""A text as a model reads it, at every length: which tokens, which of them are targets, and how many bytes those are.

Lengths count tokens or bytes. In bytes a text is cut at every length and each piece is tokenised by itself, so that
every tokenizer has a token border there, and what is measured is the same text for all of them.
"""

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from atma.eval.likelihood.texts import Ids, Text, ending, joined, tokens_of
from atma.tokenizer import Tokenizer

Unit = Literal["tokens", "bytes"]


class Reading(NamedTuple):
    """A text from its beginning: its tokens, and how many of them come before each place that it reaches."""

    ids: np.ndarray
    sizes: np.ndarray
    stops: dict[int, int]


class Ending(NamedTuple):
    """A text whose end is the target: context and target, and how many context tokens are read at each length."""

    context: Ids
    target: Ids
    counts: dict[int, int]

    def sequence(self, length: int, start: int) -> np.ndarray:
        """What the model reads at a length: what begins a text, the tokens before the target, and the target."""
        count = self.counts[length]
        return np.concatenate([[start], self.context.ids[len(self.context.ids) - count :], self.target.ids])

    def context_bytes(self, length: int) -> int:
        """Of the text before the target, what is read."""
        return int(self.context.sizes[len(self.context.sizes) - self.counts[length] :].sum())


def from_beginning(text: Text, places: Sequence[int], unit: Unit, tokenizer: Tokenizer, junk: bool) -> Reading:
    """The text as far as the last of `places`; `junk` puts end-of-text between its documents."""
    data = text.whole.encode()
    borders = np.cumsum([len(part.encode()) for part in text.parts])[:-1].tolist() if junk else []
    marks = {place: _boundary(data, place) for place in places if unit == "bytes" and place <= len(data)}
    last = max(marks.values(), default=len(data))
    cuts = sorted(cut for cut in {0, last, *borders, *marks.values()} if cut <= last)
    pieces = tokens_of([data[start:stop].decode() for start, stop in itertools.pairwise(cuts)], tokenizer)
    end, whole, before = Ids(np.array([tokenizer.eot]), np.zeros(1, np.int64)), [], {0: 0}
    for stop, piece in zip(cuts[1:], pieces, strict=True):
        whole.append(piece)
        before[stop] = sum(len(one.ids) for one in whole)
        if stop in borders:
            whole.append(end)
    ids, sizes = joined(whole)
    if unit == "bytes":
        return Reading(ids, sizes, {place: before[mark] for place, mark in marks.items()})
    return Reading(ids, sizes, {place: place for place in places if place <= len(ids)})


def to_end(text: Text, lengths: Sequence[int], target_bytes: int, unit: Unit, tokenizer: Tokenizer) -> Ending:
    """The last `target_bytes` and what stands before, at every length for which there is enough of it.

    In tokens a length counts what is read before the first target, the one that begins a text included; in bytes, text
    alone.
    """
    target = ending(text.whole, target_bytes)
    data = text.whole.encode()[: -len(target.encode())]
    [goal] = tokens_of([target], tokenizer)
    if unit == "tokens":
        [context] = tokens_of([data.decode()], tokenizer)
        return Ending(context, goal, {n: n - 1 for n in lengths if n - 1 <= len(context.ids)})
    starts = {n: _boundary(data, len(data) - n) for n in lengths if n <= len(data)}
    cuts = sorted({len(data), *starts.values()})
    pieces = tokens_of([data[start:stop].decode() for start, stop in itertools.pairwise(cuts)], tokenizer)
    left = np.cumsum([0, *(len(piece.ids) for piece in reversed(pieces))])[::-1].tolist()
    counts = dict(zip(cuts, left, strict=True))
    return Ending(joined(pieces), goal, {n: counts[start] for n, start in starts.items()})


def _boundary(data: bytes, place: int) -> int:
    """The last place at or before this one where a character of UTF-8 begins."""
    while 0 < place < len(data) and data[place] & 0xC0 == 0x80:
        place -= 1
    return place

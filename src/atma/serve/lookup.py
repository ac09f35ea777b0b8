"""Drafts of a text from itself: what followed the last time that its end was written, found by an index of pairs.

A text that repeats something, such as a file with a change, goes on as that did. The place is followed token by token
as the text grows, also while nothing is drafted, so how long a repetition has held is known at no cost; a draft is at
most as long as that. After drafts that were wrong a repetition must have held for longer before it is believed again.
"""

from array import array
from typing import TypeVar

import numpy as np

T = TypeVar("T", int, np.ndarray)

PAIRS = 1 << 16
"""Places of a text that are known, the last ones."""

INDEX_BYTES = 6 * PAIRS
"""Of the index of a text, at the most."""

TRIED = 8
"""Earlier places of the last two tokens, the last ones first, of which that with the longest repetition is taken."""

LONGEST = 32
"""Tokens of a repetition that are counted when it is found."""

LEAST, FIRST, MOST = 4, 8, 64
"""Tokens that a repetition must have held for before it is believed: at the least, at first, at the most."""


class Lookup:
    """The places of one text that only grows: `tokens` is the list itself."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens
        self.needed = FIRST
        """Tokens that a repetition must have held for."""
        self.held = 0
        """Tokens that the present one has held for."""
        self._at = -1
        """The place of the token that comes next by the present repetition; −1: there is none."""
        self._known = self._size = 0
        self._last = self._before = array("i")

    @property
    def bytes(self) -> int:
        """Of the index."""
        return self._last.itemsize * (len(self._last) + len(self._before))

    def reach(self) -> int:
        """Tokens that may be drafted now: as many as the present repetition has held for; 0: too few to believe it."""
        self._follow()
        return self.held if self._at >= 0 and self.held >= self.needed else 0

    def draft(self, count: int) -> list[int]:
        """The next `count` tokens by the present repetition."""
        found = self._tokens[self._at : self._at + count]
        while len(found) < count:  # what repeats is shorter than the draft
            found += found[: count - len(found)]
        return found

    def tell(self, drafted: int, right: int) -> None:
        """How many of the tokens of a draft were right."""
        if 2 * right >= drafted:
            self.needed = max(LEAST, self.needed // 2)
        else:
            self.needed = min(MOST, 2 * self.needed)

    def _follow(self) -> None:
        """Take in the tokens that have come since."""
        tokens, end = self._tokens, len(self._tokens)
        if end > self._size < PAIRS:
            self._build()
        for i in range(self._known, end):
            if self._at >= 0 and tokens[self._at] == tokens[i]:
                self._at, self.held = self._at + 1, self.held + 1
            else:
                self._at = -1
            if i:
                pair = _pair(tokens[i - 1], tokens[i]) & (len(self._last) - 1)
                self._before[(i + 1) & (self._size - 1)] = self._last[pair]
                self._last[pair] = i + 1
        self._known = end
        if self._at < 0:
            self._find()

    def _find(self) -> None:
        """Begin with the longest repetition that the text now ends with, of the last places of its last two tokens."""
        tokens, end, best = self._tokens, len(self._tokens), 1
        if end < 3:
            return
        at = self._before[end & (self._size - 1)]
        for _ in range(TRIED):
            if at < 2 or at <= end - self._size:
                break
            held = 0
            while held < min(LONGEST, at) and tokens[at - 1 - held] == tokens[end - 1 - held]:
                held += 1
            if held > best:
                self._at, self.held, best = at, held, held
            if best == LONGEST:
                break
            at, previous = self._before[at & (self._size - 1)], at
            if at >= previous:  # of a place that another has taken since
                break

    def _build(self) -> None:
        """The index of the text so far, with room for as much again."""
        tokens = self._tokens
        while self._size < min(2 * len(tokens), PAIRS):
            self._size = max(256, 2 * self._size)
        first = max(1, len(tokens) - self._size + 1)
        read = np.asarray(tokens[first - 1 :], np.int64)
        pairs = _pair(read[:-1], read[1:]) & (self._size // 2 - 1)
        places = np.arange(first + 1, len(tokens) + 1, dtype=np.int32)
        last, before = np.zeros(self._size // 2, np.int32), np.zeros(self._size, np.int32)
        last[pairs] = places  # of equal pairs the last stays
        order = np.argsort(pairs, kind="stable")
        same = pairs[order][1:] == pairs[order][:-1]
        before[places[order[1:][same]] & (self._size - 1)] = places[order[:-1][same]]
        self._last, self._before = array("i", last.tobytes()), array("i", before.tobytes())
        self._known = len(tokens)
        self._at = -1


def _pair(one: T, other: T) -> T:
    """A number of two tokens that spreads over its low bits."""
    return ((one * 40503) ^ (one >> 7)) + other * 2654435 ^ (other >> 9)

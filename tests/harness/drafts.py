"""Drafts for any text, of which some are right to the end, some to the middle, and some not at all.

The real ones come of what a text repeats, which random texts hardly do. These take the place of `Lookup`: they ask an
engine without drafts how a text goes on, and change some of that.
"""

import random

from atma.serve.engine import Engine
from atma.serve.request import Request

AHEAD = 40


class Drafts:
    """Makes the lookups of an engine whose greedy answers `plain` gives. `right`: how likely a draft is left whole."""

    def __init__(self, plain: Engine, seed: int, right: float = 0.4) -> None:
        self.plain, self.random, self.right = plain, random.Random(seed), right
        self.told: list[tuple[int, int]] = []
        """Of every draft, its tokens and how many were right."""
        self._known: dict[tuple[int, ...], list[int]] = {}

    def __call__(self, tokens: list[int]) -> "_Lookup":
        return _Lookup(self, tokens)

    def ahead(self, tokens: list[int], count: int) -> list[int]:
        """The next greedy tokens."""
        key = tuple(tokens)
        for back in range(min(AHEAD, len(key) - 1)):
            known = self._known.get(key[: len(key) - back], [])
            if known[:back] == tokens[len(tokens) - back :] and len(known) >= back + count:
                return known[back : back + count]
        handle = self.plain.submit(Request(tokens, max_tokens=AHEAD, temperature=0, ignore_end=True))
        while not handle.done:
            self.plain.step()
        self._known[key] = handle.outputs[0].tokens
        return self._known[key][:count]


class _Lookup:
    def __init__(self, drafts: Drafts, tokens: list[int]) -> None:
        self._drafts, self._tokens = drafts, tokens

    def reach(self) -> int:
        return self._drafts.random.choice((0, 3, 3, 7, 15, 31))

    def draft(self, count: int) -> list[int]:
        chance, found = self._drafts.random, self._drafts.ahead(self._tokens, count)
        if chance.random() > self._drafts.right:
            at = chance.randrange(count)
            found = [*found[:at], (found[at] + 1) % self._drafts.plain.tokenizer.vocab_size, *found[at + 1 :]]
        return found

    def tell(self, drafted: int, right: int) -> None:
        self._drafts.told.append((drafted, right))

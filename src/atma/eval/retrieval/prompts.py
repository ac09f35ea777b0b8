"""What a model is shown and asked: token ids, the spans of them that are answers, and how texts are put together.

A prompt of `length` tokens is the one that begins a text, everything shown, and the room for the (last) answer: exactly
so many in the tokens shown, whatever the tokenizer.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice
from typing import NamedTuple

import numpy as np

from atma.eval.retrieval.haystacks import REACH, Haystack
from atma.tokenizer import Tokenizer

BLOCK = 64
"""Items of a list that are drawn and encoded at a time."""
REMEMBERED = 1 << 19
SPARE = 8
"""Tokens of room beyond an answer that is longer than its task allows for."""


class NoRoom(ValueError):
    """What must be in a prompt takes more than its length."""


class Ask(NamedTuple):
    """One question: the span of a prompt's ids that is its expected answer, and how a free answer is judged."""

    start: int
    stop: int
    room: int
    """The most tokens of a free answer."""
    outputs: tuple[str, ...]
    """Texts that a free answer must hold."""
    any: bool = False
    """Whether one of them is enough."""


class Prompt(NamedTuple):
    """Token ids (n,) int64 with the expected answers in their places, and where these are, in order."""

    ids: np.ndarray
    asks: tuple[Ask, ...]


class Insert(NamedTuple):
    """Tokens that stand somewhere in a haystack, `depth` in [0, 1] of it before them."""

    depth: float
    ids: np.ndarray


class Encoder:
    """A tokenizer that remembers what it has encoded: names and numbers come again and again."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, np.ndarray] = {}

    def many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text."""
        if len(self.known) > REMEMBERED:
            self.known.clear()
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        self.known.update(zip(new, self.tokenizer.encode_many(new), strict=True))
        return [self.known[text] for text in texts]

    def ids(self, text: str) -> np.ndarray:
        """Token ids of a text."""
        return self.many([text])[0]


def spliced(haystack: Haystack, end: int, size: int, inserts: Sequence[Insert]) -> np.ndarray:
    """`size` tokens of a haystack up to the place `end`, with the inserts between its sentences or words.

    An insert at depth d goes to d · size, and from there to the nearest beginning of a sentence, else of a word, at
    most 64 tokens and 1/32 of the size away; at depths 0 and 1 it stays at the edge. Inserts that come to one place
    stand there by depth. So with equal `end` a longer haystack is a shorter one with more before it.
    """
    start, reach = end - size, min(REACH, size // 32)
    places = []
    for insert in inserts:
        offset = round(insert.depth * size)
        if 0 < offset < size:
            offset = min(max(haystack.between(start + offset, reach) - start, 0), size)
        places.append(offset)
    parts, done = [], 0
    for i in sorted(range(len(inserts)), key=lambda i: (places[i], inserts[i].depth)):
        parts += [haystack.take(start + done, places[i] - done), inserts[i].ids]
        done = places[i]
    return np.concatenate([*parts, haystack.take(start + done, size - done)]).astype(np.int64)


def listing(
    encoder: Encoder,
    first: Sequence[str],
    more: Iterable[str],
    size: int,
    header: Callable[[int], str],
    rng: np.random.Generator,
) -> np.ndarray:
    """Items in random order, each after its header (of its number from 1): all of `first`, and of `more` what fits.

    At most `size` tokens, and fewer by less than the item that did not fit. A line end stands at the end of a piece and
    not at the beginning of the next: many tokenizers join it to what is before it. ValueError if `first` does not fit.
    """
    chosen: list[np.ndarray] = []
    used, items = 0, chain(first, more)
    full = False
    while not full and (block := list(islice(items, BLOCK))):
        numbers = range(len(chosen) + 1, len(chosen) + 1 + len(block))
        heads = encoder.many([header(number) for number in numbers])
        for head, item in zip(heads, encoder.many(block), strict=True):
            used += len(head) + len(item)
            if used > size:
                full = True
                break
            chosen.append(item)
    if len(chosen) < len(first):
        raise NoRoom(f"{size} tokens have no room for the {len(first)} things that must be in them")
    order = rng.permutation(len(chosen)).tolist()
    heads = encoder.many([header(number) for number in range(1, len(chosen) + 1)])
    parts = [part for head, i in zip(heads, order, strict=True) for part in (head, chosen[i])]
    return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)


def filled(ids: np.ndarray, padding: Haystack, size: int) -> np.ndarray:
    """The ids and, after them, as much of another text's beginning as `size` tokens have room for."""
    return np.concatenate([ids, padding.take(0, size - len(ids))])


def asked(
    encoder: Encoder, length: int, before: str, context: Callable[[int], np.ndarray], after: str, ask: Ask
) -> Prompt:
    """The token that begins a text, `before`, the context (a function of its size), `after`, and the answer to the ask.

    `ask` has spans still unknown. Its room is raised for a tokenizer that needs more for the answer alone. ValueError
    if that leaves no token for the context.
    """
    expected = ask.outputs[:1] if ask.any else ask.outputs
    answer = encoder.ids(" " + ", ".join(expected))
    head, tail = encoder.ids(before), encoder.ids(after)
    room = max(ask.room, len(answer) + SPARE)
    size = length - 1 - len(head) - len(tail) - room
    if size < 1:
        raise NoRoom(f"its fixed parts and the room for the answer alone take {length - size} tokens")
    shown = [[encoder.tokenizer.start], head, context(size), tail]
    ids = np.concatenate([*shown, answer]).astype(np.int64)
    return Prompt(ids, (ask._replace(start=len(ids) - len(answer), stop=len(ids), room=room),))

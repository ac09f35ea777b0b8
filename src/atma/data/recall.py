"""Synthetic rows that can only be predicted by remembering: spans, keys and values that come back later in the row.

A recipe may mix a share of them into its text (`recall_share`), and may begin with nothing but copies over a few token
ids (`copy_warmup_tokens`), because copying is learned earliest with few symbols. Four kinds, equally often:

- span: a random sequence comes back two to eight times, with text between or none;
- pairs: random keys with random values, then the keys again in another order, each to be followed by its value;
- paste: a row of text in which spans of its own come back later;
- record: a sentence with a number as key and five digits as value, in text, and later the sentence up to the value.

A row is one document (its first token is end-of-text, there is no other). What nobody could predict is not scored: the
first occurrence of anything random, the first token of each return (nothing announces it), and keys asked for in
records. Everything else is, text included. The sentence that the needle evaluation uses is never written, so that the
evaluation asks for the ability and not for the sentence.
"""

import itertools
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from atma.data.phrases import TEMPLATES, WORDS
from atma.tokenizer import Tokenizer

VALUE_DIGITS = 5
KEY_DIGITS = (3, 8)
SENTENCE = 20
"""About the tokens of a record: what a row has room for is counted in these."""
SMALLEST_POOL = 8


class Piece(NamedTuple):
    """Token ids (n,) int64 and which of them are scored as targets (n,) bool."""

    ids: np.ndarray
    scored: np.ndarray


class Recall:
    """Writes synthetic rows for one vocabulary. Every method is a pure function of its arguments."""

    def __init__(self, vocab_size: int, eot: int, subset: int = 0, tokenizer: Tokenizer | None = None) -> None:
        """subset: ids that one row's random tokens are drawn from, 0 for all of the vocabulary.

        tokenizer: without one, or with one whose digits are not single tokens, no records are written.
        """
        self.vocab_size, self.eot, self.subset = vocab_size, eot, subset
        self.records = Records(tokenizer) if tokenizer is not None and has_digits(tokenizer) else None

    def row(self, generator: Generator, text: np.ndarray, length: int) -> Piece:
        """A row of `length` tokens of one of the kinds. text: ids to put between; they are used from the first on."""
        kinds = [self.span, self.pairs, self.paste] + ([self.record] if self.records else [])
        kind = kinds[generator.integers(len(kinds))]
        text = np.resize(text[text != self.eot], length)
        body = kind(generator, text, length - 1)
        return join([self._start(), body])

    def copies(self, generator: Generator, ids: np.ndarray, length: int) -> Piece:
        """A random sequence over `ids`, of 16 to length/2 tokens, repeated until the row is full."""
        most = max(1, length // 2)
        sequence = ids[generator.integers(len(ids), size=generator.integers(min(16, most), most + 1))]
        return join([self._start(), _repeat(sequence, length - 1)])

    def span(self, generator: Generator, text: np.ndarray, length: int) -> Piece:
        """A random sequence that comes back."""
        sequence = self._draw(generator)(_log_uniform(generator, 4, length // 3))
        if generator.random() < 0.5:
            return _repeat(sequence, length)
        copies = generator.integers(2, max(2, min(8, length // len(sequence))) + 1)
        return weave(generator, [unscored(sequence)] + [returned(sequence)] * (copies - 1), text, length)

    def pairs(self, generator: Generator, text: np.ndarray, length: int) -> Piece:
        """Random keys of one to four tokens with values of one to four, then the keys again with their values."""
        key, value = generator.integers(1, 5, size=2)
        draw = self._draw(generator)
        heads = np.unique(draw(_log_uniform(generator, 2, length // (3 * (key + value)))))
        table = np.column_stack([generator.permutation(heads), draw((len(heads), key + value - 1))])
        asked = [_asked(generator.permutation(table)) for _ in range(2 + length // table.size)]
        if generator.random() < 0.5:
            return weave(generator, [unscored(table.ravel()), asked[0]], text, length)
        return _shorten(join([unscored(table.ravel()), *asked]), length)

    def paste(self, generator: Generator, text: np.ndarray, length: int) -> Piece:
        """Text in which one to three spans of its own come back later."""
        ids, scored = text[:length].copy(), np.ones(length, bool)
        size = _log_uniform(generator, 4, length // 4)
        for _ in range(generator.integers(1, 4)):
            to = generator.integers(size, length - size + 1)
            source = generator.integers(to - size + 1)
            ids[to:] = np.concatenate([ids[source : source + size], ids[to:]])[: length - to]
            scored[to:] = np.concatenate([scored[to : to + size], scored[to:]])[: length - to]
            scored[to : to + size] = True
            scored[to] = False
        return Piece(ids, scored)

    def record(self, generator: Generator, text: np.ndarray, length: int) -> Piece:
        """Sentences with a key and a value, each asked for later by its beginning.

        Half of the rows repeat one wording, so that only the keys tell their records apart.
        """
        assert self.records is not None
        count = _log_uniform(generator, 1, max(1, length // (2 * SENTENCE)))
        wordings = [self.records.wording(generator) for _ in range(count)]
        if generator.random() < 0.5:
            wordings = wordings[:1] * count
        records = [self.records.draw(generator, wording) for wording in wordings]
        pieces = [unscored(record.ids) for record in records] + [records[i] for i in generator.permutation(count)]
        return weave(generator, pieces, text, length)

    def _start(self) -> Piece:
        return Piece(np.array([self.eot]), np.array([False]))

    def _draw(self, generator: Generator) -> Callable[[int | tuple[int, int]], np.ndarray]:
        """A function that draws random ids for one row from a pool of its own, never end-of-text.

        The pool's size is log-uniform: few ids repeat by chance, so that only a longer context tells places apart.
        """
        most = min(self.subset or self.vocab_size, self.vocab_size) - 1
        size = _log_uniform(generator, min(SMALLEST_POOL, most), most)
        pool = _without(generator.permutation(self.vocab_size - 1)[:size], self.eot)
        return lambda shape: pool[generator.integers(len(pool), size=shape)]


class Records:
    """Writes sentences such as " The ledger number for harbour 5521 is 90817" as token ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._digits = np.array([tokenizer.encode(digit)[0] for digit in "0123456789"])
        self._words = [np.array(tokenizer.encode(" " + word)) for word in WORDS.split()]
        parts = [[part for part in re.split(r"({\w+})", text) if part] for text in TEMPLATES]
        literals = {part for template in parts for part in template if not part.startswith("{")}
        self._literals = {part: np.array(tokenizer.encode(part)) for part in sorted(literals)}
        self._templates = parts

    def wording(self, generator: Generator) -> list[np.ndarray | str]:
        """A sentence as ids, its words chosen, its key and value still open."""
        parts = self._templates[generator.integers(len(self._templates))]
        return [self._word(generator) if part == "{word}" else self._literals.get(part, part) for part in parts]

    def draw(self, generator: Generator, wording: list[np.ndarray | str]) -> Piece:
        """The sentence with a key and a value, scored as where it comes back: all but its first token and its key."""
        ids = [self._number(generator, part) if isinstance(part, str) else part for part in wording]
        scored = [
            np.full(len(part_ids), not (isinstance(part, str) and part == "{key}"))
            for part, part_ids in zip(wording, ids, strict=True)
        ]
        scored[0][0] = False
        return Piece(np.concatenate(ids), np.concatenate(scored))

    def _word(self, generator: Generator) -> np.ndarray:
        return self._words[generator.integers(len(self._words))]

    def _number(self, generator: Generator, part: str) -> np.ndarray:
        size = VALUE_DIGITS if part == "{value}" else generator.integers(KEY_DIGITS[0], KEY_DIGITS[1] + 1)
        return self._digits[generator.integers(10, size=size)]


def has_digits(tokenizer: Tokenizer) -> bool:
    """Whether each digit alone is one token."""
    return all(len(tokenizer.encode(digit)) == 1 for digit in "0123456789")


def unscored(ids: np.ndarray) -> Piece:
    """Ids that nobody could predict."""
    return Piece(ids, np.zeros(len(ids), bool))


def returned(ids: np.ndarray) -> Piece:
    """Ids that come back: predictable from the second on."""
    return Piece(ids, np.arange(len(ids)) > 0)


def join(pieces: list[Piece]) -> Piece:
    """Pieces one after another."""
    return Piece(np.concatenate([piece.ids for piece in pieces]), np.concatenate([piece.scored for piece in pieces]))


def weave(generator: Generator, pieces: list[Piece], text: np.ndarray, length: int) -> Piece:
    """Exactly `length` tokens: the pieces in order, each after a random share of the text, which is all scored."""
    spare = max(0, length - sum(len(piece.ids) for piece in pieces))
    cuts = [0, *sorted(generator.integers(spare + 1, size=len(pieces)).tolist()), spare]
    gaps = [Piece(text[low:high], np.ones(high - low, bool)) for low, high in itertools.pairwise(cuts)]
    ordered = [piece for pair in zip(gaps, pieces, strict=False) for piece in pair]
    return _shorten(join([*ordered, gaps[-1]]), length)


def _shorten(piece: Piece, length: int) -> Piece:
    return Piece(piece.ids[:length], piece.scored[:length])


def _repeat(sequence: np.ndarray, length: int) -> Piece:
    """A sequence over and over; scored once one return has shown that it comes back."""
    return Piece(np.resize(sequence, length), np.arange(length) > len(sequence))


def _asked(table: np.ndarray) -> Piece:
    """Keys and values, one a row; the first token of each key is free to choose."""
    return Piece(table.ravel(), np.resize(np.arange(table.shape[1]) > 0, table.size))


def _without(ids: np.ndarray, left_out: int) -> np.ndarray:
    """Ids of 0 … n-2 as ids of 0 … n-1 that skip one."""
    return ids + (ids >= left_out)


def _log_uniform(generator: Generator, low: int, high: int) -> int:
    """A whole number from low to high (or low, if that is more), each factor of two about equally likely."""
    return int(low * ((high + 1) / low) ** generator.random()) if high > low else low

"""The six tasks of MAD: recall in context (plain, fuzzy, noisy), selective copying, compression and memorisation.

Each has MAD's ids, lengths and answers, and its `harder` sizes are MAD's changes of one thing at a time. In training
the three of recall are asked for every next token, as MAD does, and in a test for the values of keys that came before.
Source: Mechanistic design and scaling of hybrid architectures, arXiv 2403.17844, and github.com/athms/mad-lab
(mad/data/instances.py, configs/tasks). Answers are counted each once; MAD averages over their ids first.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.random import Generator

from atma.eval.recall.drawing import Drawn, Sequence, asked
from atma.ops.loss import NOT_SCORED
from atma.strict import check_fields

FIXED = 12345
"""The generator of the facts of memorisation, which are the same in every example of every seed."""
BOTH = ("global", "global")
MOTIF = 3
"""Most tokens of a key, and of a value, in fuzzy recall."""


@dataclass(frozen=True)
class Mad(Drawn):
    """What the six have in common: a length, and a vocabulary in which everything that stands in an example is."""

    length: int = 128
    vocabulary: int = 16
    fields = ("length", "vocabulary")
    sizes = ("128,16",)
    harder = ("128,32", "128,64", "128,128", "256,16", "512,16", "1024,16")
    layers = BOTH

    def __post_init__(self) -> None:
        check_fields(self)
        if self.length < 2 or self.length % 2:
            raise ValueError(f"{self.name} needs an even length of 2 or more, not {self.length}")
        self.check()

    def check(self) -> None:
        """ValueError for what cannot be drawn."""
        if self.vocabulary < 4:
            raise ValueError(f"{self.name} needs a vocabulary of 4 or more, not {self.vocabulary}")

    def stretched(self, factor: int) -> "Mad":
        """As many ids in a context so many times as long."""
        return replace(self, length=factor * self.length)


@dataclass(frozen=True)
class InContextRecall(Mad):
    """Pairs of a key and a value, the value of a key being the same throughout: asked at keys that came before."""

    name = "mad-recall"

    def check(self) -> None:
        super().check()
        if self.length < 4:
            raise ValueError(f"{self.name} needs a length of 4 or more, not {self.length}")

    def pairs(self, generator: Generator) -> tuple[np.ndarray, np.ndarray]:
        """Pairs (L / 2, 2), and whether each place is a key that came before."""
        return _pairs(generator, self.length // 2, self.vocabulary)

    def example(self, generator: Generator) -> Sequence:
        tokens, again = (part.ravel() for part in self.pairs(generator))
        return tokens, np.where(again, np.roll(tokens, -1), NOT_SCORED)

    def lesson(self, generator: Generator) -> Sequence:
        tokens = self.pairs(generator)[0].ravel()
        return tokens, np.append(tokens[1:], NOT_SCORED)


@dataclass(frozen=True)
class NoisyRecall(InContextRecall):
    """The same, but so many of the pairs are two random ids that are neither keys nor values."""

    vocabulary: int = 32
    noise: int = 20
    """Percent of the pairs."""
    noise_ids: ClassVar[int] = 16
    name = "mad-noisy"
    fields = ("length", "vocabulary", "noise")
    sizes = ("128,32,20",)
    harder = (
        *("128,48,20", "128,80,20", "128,144,20"),
        *("256,32,20", "512,32,20", "1024,32,20"),
        *("128,32,40", "128,32,60", "128,32,80"),
    )

    def check(self) -> None:
        super().check()
        if self.vocabulary < self.noise_ids + 4 or not 0 <= self.noise < 100:
            rule = f"a vocabulary of {self.noise_ids + 4} or more, and 0 to 99 percent of noise"
            raise ValueError(f"{self.name} needs {rule}, not {self.vocabulary} and {self.noise}")

    def pairs(self, generator: Generator) -> tuple[np.ndarray, np.ndarray]:
        count, content = self.length // 2, self.vocabulary - self.noise_ids
        noisy = generator.random(count) < self.noise / 100
        noisy[[generator.integers(count - 1), -1]] = False
        tokens, again = generator.integers(content, self.vocabulary, (count, 2)), np.zeros((count, 2), dtype=bool)
        tokens[~noisy], again[~noisy] = _pairs(generator, int((~noisy).sum()), content)
        return tokens, again


@dataclass(frozen=True)
class FuzzyRecall(Mad):
    """Recall whose keys and values are one to three different ids each; in a test keys are always of three.

    The last id of the vocabulary fills up on the left. What the last key is, is drawn among the keys before it (MAD
    draws it first and puts it in at a random place, which in rare examples is never reached).
    """

    name = "mad-fuzzy"

    def check(self) -> None:
        most = 4 * MOTIF
        if (self.vocabulary - 1) // 2 < MOTIF or self.length < most:
            rule = f"a vocabulary of {2 * MOTIF + 1} or more and a length of {most} or more"
            raise ValueError(f"{self.name} needs {rule}, not {self.vocabulary} and {self.length}")

    def pairs(self, generator: Generator, least: int) -> tuple[list[int], list[bool]]:
        """Up to L + 1 tokens, and which of them are of a value whose key was there before; keys of `least` to 3 ids."""
        half, content = (self.vocabulary - 1) // 2, self.vocabulary - 1
        value_of: dict[tuple[int, ...], tuple[int, ...]] = {}
        tokens, again = list[int](), list[bool]()

        def tell(key: tuple[int, ...]) -> None:
            known = key in value_of
            value = value_of.setdefault(key, _motif(generator, half, content, 1))
            tokens.extend(key + value)
            again.extend([False] * len(key) + [known] * len(value))

        while len(tokens) + 4 * MOTIF <= self.length + 1:
            tell(_motif(generator, 0, half, least))
        keys = list(value_of)
        tell(keys[generator.integers(len(keys))])
        return tokens, again

    def example(self, generator: Generator) -> Sequence:
        tokens, again = self._filled(*self.pairs(generator, MOTIF))
        return tokens[:-1], np.where(again, tokens, NOT_SCORED)[1:]

    def lesson(self, generator: Generator) -> Sequence:
        tokens, _ = self._filled(*self.pairs(generator, 1))
        return tokens[:-1], tokens[1:]

    def _filled(self, tokens: list[int], again: list[bool]) -> tuple[np.ndarray, np.ndarray]:
        """L + 1 tokens, filled up on the left."""
        spare = self.length + 1 - len(tokens)
        whole = np.concatenate([np.full(spare, self.vocabulary - 1), tokens])
        return whole, np.concatenate([np.zeros(spare, dtype=bool), again])


@dataclass(frozen=True)
class MadCopying(Mad):
    """Symbols among blanks, an id that says copy, then as many blanks: at blank i, symbol i.

    Each blank stands before a symbol drawn for it, so gaps are of about the same length and a symbol comes last. The
    last id says copy, and the one before it is the blank.
    """

    length: int = 256
    symbols: int = 16
    name = "mad-copy"
    fields = ("length", "vocabulary", "symbols")
    sizes = ("256,16,16",)
    harder = (
        *("256,32,16", "256,64,16", "256,128,16"),
        *("512,16,16", "1024,16,16"),
        *("256,16,32", "256,16,64", "256,16,96"),
    )

    def check(self) -> None:
        super().check()
        if self.symbols < 1 or self.length <= 2 * self.symbols + 1:
            rule = "a symbol or more, and a length of more than twice as many and one"
            raise ValueError(f"{self.name} needs {rule}, not {self.symbols} symbols and length {self.length}")

    def example(self, generator: Generator) -> Sequence:
        content, n = self.length - self.symbols - 1, self.symbols
        symbols = generator.integers(0, self.vocabulary - 2, n)
        gaps = np.bincount(generator.integers(0, n, content - n), minlength=n)
        tokens = np.full(self.length, self.vocabulary - 2)
        tokens[np.cumsum(gaps + 1) - 1] = symbols
        tokens[content] = self.vocabulary - 1
        return tokens, asked(self.length, np.arange(content + 1, self.length), symbols)


@dataclass(frozen=True)
class Compression(Mad):
    """Random ids and an id that ends them; from what the model then knows, a small decoder gives all of them back."""

    length: int = 32
    name = "mad-compression"
    sizes = ("32,16",)
    harder = ("32,32", "32,64", "32,128", "64,16", "128,16", "256,16")
    encoded = True

    def example(self, generator: Generator) -> Sequence:
        tokens = generator.integers(0, self.vocabulary - 1, self.length)
        tokens[-1] = self.vocabulary - 1
        return tokens, tokens.copy()


@dataclass(frozen=True)
class Memorisation(Mad):
    """Keys, each before an id at which its value is asked: the values are never shown, only learned in training."""

    length: int = 32
    vocabulary: int = 256
    name = "mad-memory"
    sizes = ("32,256",)
    harder = ("32,512", "32,1024", "32,2048", "32,4096", "32,8192")

    def facts(self) -> np.ndarray:
        """The value of every key, no two the same."""
        half = (self.vocabulary - 1) // 2
        return half + np.random.default_rng([FIXED, self.vocabulary]).permutation(self.vocabulary - 1 - half)[:half]

    def example(self, generator: Generator) -> Sequence:
        value_of = self.facts()
        keys = generator.integers(0, len(value_of), self.length // 2)
        tokens = np.full(self.length, self.vocabulary - 1)
        tokens[::2] = keys
        return tokens, asked(self.length, np.arange(1, self.length, 2), value_of[keys])


MAD = (InContextRecall, FuzzyRecall, NoisyRecall, MadCopying, Compression, Memorisation)


def _pairs(generator: Generator, count: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (count, 2), and whether each place is a key that came before, as the last always is."""
    half = vocabulary // 2
    value_of = generator.integers(half, vocabulary, half)
    keys = generator.integers(0, half, count)
    keys[-1] = generator.choice(np.unique(keys[:-1]))
    again = np.zeros((count, 2), dtype=bool)
    again[:, 0] = True
    again[np.unique(keys, return_index=True)[1], 0] = False
    return np.column_stack([keys, value_of[keys]]), again


def _motif(generator: Generator, low: int, high: int, least: int) -> tuple[int, ...]:
    """`least` to 3 different ids of low … high − 1, every number of them as likely."""
    size = generator.integers(least, MOTIF + 1)
    return tuple(int(low + one) for one in generator.permutation(high - low)[:size])

"""The tasks: sequences whose answers can only be known by remembering, drawn by example and by nothing else.

Example i of a seed and a stream is the same whatever is asked beside it, on every machine. Training, validation and
test are three streams, so that none of them ever draws from a generator of another. Ids of these tasks begin with what
is not content: 0 is the blank. Those of MAD are beside them (atma.eval.recall.mad).
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from atma.eval.recall.drawing import Drawn, Sequence, asked
from atma.eval.recall.mad import MAD, Mad
from atma.strict import check_fields

TRAIN, VALIDATION, TEST = range(3)
BLANK = 0


class Examples(NamedTuple):
    """A batch, as training takes it: tokens (B, L), targets (B, L), each row a document of its own."""

    tokens: Tensor
    targets: Tensor
    segment_ids: Tensor


@dataclass(frozen=True)
class AssociativeRecall(Drawn):
    """MQAR: pairs of a key and a value, then every key once more, at which its value is the target.

    Where the keys come again is a power law of the distance from the pairs: slot s of 1, 2, … (every other position)
    with probability ∝ s^(power − 1), no slot twice. Keys are distinct, and so are values; keys are of the lower half of
    the vocabulary, values of the upper. Source: Zoology, arXiv 2312.04927, appendix E.
    """

    length: int = 64
    pairs: int = 4
    vocabulary: int = 8192
    power: float = 0.01
    filler: Literal["blank", "random"] = "blank"
    """What stands between: the blank, or random ids that are not among the example's keys."""
    name = "mqar"
    fields = ("length", "pairs")
    sizes = ("64,4", "128,8", "256,16", "512,64")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.length % 2 or self.pairs < 1 or 4 * self.pairs > self.length:
            rule = "an even length of at least 4 tokens a pair, one pair or more"
            raise ValueError(f"mqar needs {rule}, not length {self.length} and {self.pairs} pairs")
        _check_keys(self.vocabulary, self.pairs)

    def stretched(self, factor: int) -> "AssociativeRecall":
        """As many pairs in a context so many times as long."""
        return replace(self, length=factor * self.length)

    def example(self, generator: Generator) -> Sequence:
        keys, values = _pairs(generator, self.vocabulary, self.pairs)
        tokens = _filler(generator, self.length, keys, self.vocabulary if self.filler == "random" else 0)
        told = 2 * self.pairs
        tokens[:told] = np.column_stack([keys, values]).ravel()
        chances = np.arange(1, (self.length - told) // 2 + 1) ** (self.power - 1)
        at = told + 2 * generator.choice(len(chances), self.pairs, replace=False, p=chances / chances.sum())
        tokens[at] = keys
        return tokens, asked(self.length, at, values)


@dataclass(frozen=True)
class Copying(Drawn):
    """A separator and random symbols, then both again: each symbol of the second half is asked for one token ahead.

    The separator before either half is what tells where the copy begins. Source: Repeat After Me, arXiv 2402.01032.
    """

    length: int = 64
    vocabulary: int = 64
    """Symbols, besides the blank, which separates."""
    name = "copy"
    fields = ("length",)
    sizes = ("64",)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.length % 2 or self.length < 4 or self.vocabulary < 2:
            rule = "an even length of 4 or more and two symbols or more"
            raise ValueError(f"copying needs {rule}, not length {self.length} and {self.vocabulary}")

    @property
    def ids(self) -> int:
        return self.vocabulary + 1

    def stretched(self, factor: int) -> "Copying":
        """So many times as many symbols."""
        return replace(self, length=factor * self.length)

    def example(self, generator: Generator) -> Sequence:
        half = self.length // 2
        symbols = generator.integers(1, self.vocabulary + 1, half - 1)
        tokens = np.tile(np.concatenate([[BLANK], symbols]), 2)
        return tokens, asked(self.length, np.arange(half, self.length - 1), symbols)


@dataclass(frozen=True)
class SelectiveCopying(Drawn):
    """A few symbols at random places among blanks, then as many markers, at which they are asked for in their order.

    All markers are the same, so symbols must be counted in one layer and found by their number in a later one: a model
    with one layer that looks far does not learn it. Source: the task of Mamba, arXiv 2312.00752, section 4.1.1.
    """

    length: int = 64
    symbols: int = 8
    vocabulary: int = 16
    """Different symbols, besides the blank and the marker."""
    name = "selective-copy"
    fields = ("length", "symbols")
    sizes = ("64,8",)
    harder = ("128,8", "256,8", "256,16", "4096,16")
    layers = ("local", "global", "local", "global")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.symbols < 1 or 2 * self.symbols > self.length or self.vocabulary < 2:
            rule = "two different symbols or more, and a length of at least twice the symbols"
            raise ValueError(f"selective copying needs {rule}, not length {self.length} and {self.symbols} symbols")

    @property
    def ids(self) -> int:
        return self.vocabulary + 2

    def stretched(self, factor: int) -> "SelectiveCopying":
        """As many symbols in a context so many times as long."""
        return replace(self, length=factor * self.length)

    def example(self, generator: Generator) -> Sequence:
        context = self.length - self.symbols
        symbols = generator.integers(1, self.vocabulary + 1, self.symbols)
        tokens = np.full(self.length, BLANK)
        tokens[np.sort(generator.choice(context, self.symbols, replace=False))] = symbols
        tokens[context:] = self.vocabulary + 1
        return tokens, asked(self.length, np.arange(context, self.length), symbols)


@dataclass(frozen=True)
class Capacity(Drawn):
    """Pairs of a key and a value, a gap of blanks, then every key once, in another order: its value is the target."""

    pairs: int = 8
    gap: int = 0
    vocabulary: int = 8192
    name = "capacity"
    fields = ("pairs",)
    sizes = ("4",)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.pairs < 1 or self.gap < 0:
            raise ValueError(f"the capacity probe needs a pair or more, not {self.pairs} with a gap of {self.gap}")
        _check_keys(self.vocabulary, self.pairs)

    @property
    def length(self) -> int:
        return 3 * self.pairs + self.gap

    def stretched(self, factor: int) -> "Capacity":
        """So many times as many pairs."""
        return replace(self, pairs=factor * self.pairs)

    def example(self, generator: Generator) -> Sequence:
        keys, values = _pairs(generator, self.vocabulary, self.pairs)
        order = generator.permutation(self.pairs)
        told = np.column_stack([keys, values]).ravel()
        tokens = np.concatenate([told, np.full(self.gap, BLANK), keys[order]])
        return tokens, asked(self.length, np.arange(self.length - self.pairs, self.length), values[order])


Task = AssociativeRecall | Copying | SelectiveCopying | Capacity | Mad
TASKS = {task.name: task for task in (AssociativeRecall, Copying, SelectiveCopying, Capacity, *MAD)}


def examples(task: Task, seed: int, stream: int, first: int, count: int) -> Examples:
    """Examples `first` to `first + count` of a stream of a seed. ValueError for a seed that is not of 32 bits."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"a seed of a recall task must be 0 or more, below 2^32, not {seed}")
    draw = task.lesson if stream == TRAIN else task.example
    drawn = [draw(np.random.default_rng([seed, stream, first + i])) for i in range(count)]
    tokens, targets = (torch.from_numpy(np.stack(part)) for part in zip(*drawn, strict=True))
    return Examples(tokens, targets, torch.zeros(tokens.shape, dtype=torch.int32))


def _pairs(generator: Generator, vocabulary: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct keys of 1 … V/2 − 1 and distinct values of V/2 … V − 1."""
    half = vocabulary // 2
    keys = 1 + generator.choice(half - 1, count, replace=False)
    return keys, half + generator.choice(vocabulary - half, count, replace=False)


def _filler(generator: Generator, length: int, keys: np.ndarray, vocabulary: int) -> np.ndarray:
    """Blanks, or random ids below `vocabulary`, blanks in the place of any of the keys."""
    if not vocabulary:
        return np.full(length, BLANK)
    drawn = generator.integers(1, vocabulary, length)
    return np.where(np.isin(drawn, keys), BLANK, drawn)


def _check_keys(vocabulary: int, pairs: int) -> None:
    if vocabulary // 2 - 1 < pairs:
        raise ValueError(f"a vocabulary of {vocabulary} has too few keys for {pairs} pairs; make it {2 * pairs + 2}")

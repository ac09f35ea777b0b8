"""What every task of recall is: something that draws an example from a generator, and has a size to be named by."""

from typing import ClassVar

import numpy as np
from numpy.random import Generator

from atma.ops.loss import NOT_SCORED

Sequence = tuple[np.ndarray, np.ndarray]
"""Token ids (L,) and targets (L,), both int64; −100 where nothing is asked."""


class Drawn:
    """The base of the tasks, which are frozen dataclasses of a `vocabulary` and of what their `fields` name."""

    name: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]
    """What a size such as "64,4" gives, in its order."""
    sizes: ClassVar[tuple[str, ...]]
    """The sizes that are taken where none is asked for."""
    harder: ClassVar[tuple[str, ...]] = ()
    """Sizes besides these by which the literature changes one thing at a time."""
    layers: ClassVar[tuple[str, ...]] = ("local", "global")
    """The layers that a small model for it begins with."""
    encoded: ClassVar[bool] = False
    """Whether the answers are decoded from the last token alone (atma.eval.recall.compression)."""
    vocabulary: int

    @property
    def size(self) -> str:
        return ",".join(str(getattr(self, name)) for name in self.fields)

    @property
    def ids(self) -> int:
        """Token ids that it uses: the vocabulary of a model for it."""
        return self.vocabulary

    def example(self, generator: Generator) -> Sequence:
        """One example of a test."""
        raise NotImplementedError(f"{type(self).__name__} draws nothing")

    def lesson(self, generator: Generator) -> Sequence:
        """One example of training; by default as those of a test are."""
        return self.example(generator)


def asked(length: int, at: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Targets (L,): the answers at their places, and nothing elsewhere."""
    targets = np.full(length, NOT_SCORED)
    targets[at] = answers
    return targets

"""Small worlds that facts are told of and questions are asked about: what they have in common, and how one is drawn.

A world is simulated as events or relations; sentences are written from these, and answers are derived from these, each
without the other. Which questions a story allows is decided by the world, so that every answer is determined and
unique. The answer is drawn first, evenly from the task's answers, and stories are drawn until one has a question with
it: no answer is more frequent than another. Source of the tasks: Weston et al. 2015, arXiv 1502.05698.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.random import Generator

Split = Literal["test", "train"]
TEST_SHARE = 64
"""Of 256: which share of all stories is for tests, by the first byte of their SHA-256. Training has the others."""
MOST_STORIES = 100_000
T = TypeVar("T")


class Question(NamedTuple):
    """What is asked, its only answer, and the facts (indices, increasing) that the answer follows from."""

    text: str
    answer: str
    support: tuple[int, ...]


class Story(NamedTuple):
    """Facts, one sentence each, in order, and the questions that they answer once all are told."""

    facts: tuple[str, ...]
    questions: tuple[Question, ...]


class Task(NamedTuple):
    """One of the twenty: its number, what it asks for in words, its answers, and how a story of it is drawn."""

    number: int
    about: str
    answers: tuple[str, ...]
    tell: Callable[[Generator], Story]

    @property
    def name(self) -> str:
        """As published: qa1 to qa20."""
        return f"qa{self.number}"


class Sample(NamedTuple):
    """Facts, one question, its answer, and the indices of the facts it follows from."""

    facts: tuple[str, ...]
    question: str
    answer: str
    support: tuple[int, ...]


@functools.lru_cache(maxsize=1 << 12)
def draw(task: Task, seed: int, index: int, split: Split = "test") -> Sample:
    """Sample `index` of a seed: the same in every process. No facts of one split are ever those of the other."""
    rng = np.random.default_rng([seed, task.number, index, split == "train"])
    wanted = pick(rng, task.answers)
    for _ in range(MOST_STORIES):
        story = task.tell(rng)
        fitting = [question for question in story.questions if question.answer == wanted]
        if fitting and split_of(story.facts) == split:
            chosen = pick(rng, fitting)
            return Sample(story.facts, chosen.text, chosen.answer, chosen.support)
    raise RuntimeError(f"{task.name}: no story in {MOST_STORIES} has the answer '{wanted}'")


def split_of(facts: Sequence[str]) -> Split:
    """Which split a story belongs to, by the hash of its facts, whatever is asked about them."""
    return "test" if hashlib.sha256("\n".join(facts).encode()).digest()[0] < TEST_SHARE else "train"


def pick(rng: Generator, options: Sequence[T]) -> T:
    """One of the options."""
    return options[int(rng.integers(len(options)))]


def some(rng: Generator, options: Sequence[T], count: int) -> list[T]:
    """So many different ones of the options, in random order."""
    return [options[i] for i in rng.permutation(len(options))[:count].tolist()]


def between(rng: Generator, low: int, high: int) -> int:
    """A whole number from low to high, both possible."""
    return int(rng.integers(low, high + 1))

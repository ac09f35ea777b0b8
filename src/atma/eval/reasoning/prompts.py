"""What a model is shown: examples, facts among the background's lines, a question, and the cue of an answer.

`<start> examples text-with-facts "Question: …\nAnswer:"` and then, to be found, " answer\n". A prompt of length L is L
tokens of the model's own tokenizer with room for the longest answer of its task; length 0 is the facts alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from atma.eval.language_model import Row
from atma.eval.reasoning.background import Background
from atma.eval.reasoning.worlds import Sample, Split, Task, draw
from atma.eval.suite import sha256
from atma.tokenizer import Tokenizer

SHOTS = 1 << 32
"""Added to a trial's index to draw its examples."""


class Prompt(NamedTuple):
    """Token ids (n,) int64 up to the cue, the ids of every answer of the task, and which of these is the true one."""

    ids: np.ndarray
    candidates: tuple[np.ndarray, ...]
    true: int
    question: str


class Writer:
    """Tokenises what samples say; the same sentences come again and again, and are remembered."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, np.ndarray] = {}

    def ids(self, text: str) -> np.ndarray:
        """Token ids (n,) int64 of a short text."""
        if text not in self.known:
            self.known[text] = np.asarray(self.tokenizer.encode(text), dtype=np.int64)
        return self.known[text]

    def facts(self, sample: Sample) -> list[np.ndarray]:
        """Each fact as a line."""
        return [self.ids(f"{fact}\n") for fact in sample.facts]

    def question(self, text: str) -> np.ndarray:
        """A question and the cue of its answer."""
        return np.concatenate([self.ids(f"Question: {text}\n"), self.ids("Answer:")])

    def answers(self, answers: Sequence[str]) -> tuple[np.ndarray, ...]:
        """Each answer as it follows the cue, with the line end that ends it."""
        return tuple(np.concatenate([self.ids(f" {answer}"), self.ids("\n")]) for answer in answers)

    def examples(self, samples: Sequence[Sample]) -> np.ndarray:
        """Samples with their answers, one after another, an empty line after each."""
        parts = [np.zeros(0, np.int64)]
        for sample in samples:
            answer = self.answers([sample.answer])[0]
            parts += [*self.facts(sample), self.question(sample.question), answer, self.ids("\n")]
        return np.concatenate(parts)


class Maker:
    """Prompts of our own worlds: a pure function of the seed, the task, the length and the trial."""

    def __init__(self, tokenizer: Tokenizer, text: Background | None, seed: int, shots: int, split: Split) -> None:
        """text: None where every length is 0."""
        self.writer, self.text = Writer(tokenizer), text
        self.seed, self.shots = seed, shots
        self.split: Split = split

    def sample(self, task: Task, index: int) -> Sample:
        """Facts and question of a trial."""
        return draw(task, self.seed, index, self.split)

    def places(self, task: Task, index: int, facts: int) -> list[float]:
        """In [0, 1): where a trial's background ends, and the depth of each of its facts, rising."""
        rng = np.random.default_rng([self.seed, task.number, index, 2 + (self.split == "train")])
        end, *depths = rng.random(1 + facts).tolist()
        return [end, *sorted(depths)]

    def beginning(self, task: Task, index: int) -> np.ndarray:
        """The token that begins a text, and a trial's examples."""
        first = SHOTS + index * self.shots
        samples = [draw(task, self.seed, first + i, "train") for i in range(self.shots)]
        return np.concatenate([[self.writer.tokenizer.start], self.writer.examples(samples)])

    def prompt(self, task: Task, length: int, index: int) -> Prompt:
        """A trial at a length. ValueError: the length has no room for what must be in it."""
        sample, writer = self.sample(task, index), self.writer
        before = self.beginning(task, index)
        facts, question = writer.facts(sample), writer.question(sample.question)
        candidates = writer.answers(task.answers)
        fixed = sum(map(len, (before, *facts, question)))
        room = max(map(len, candidates))
        if length and length < fixed + room:
            raise ValueError(
                f"length {length} has no room for {task.name}: trial {index}'s facts and question take {fixed} tokens "
                f"and its answer up to {room}"
            )
        end, *depths = self.places(task, index, len(facts))
        if length:
            assert self.text is not None
            shown = self.text.spread(self.text.end(end), length - fixed - room, facts, depths)
        else:
            shown = np.concatenate(facts)
        ids = np.concatenate([before, shown, question]).astype(np.int64)
        return Prompt(ids, candidates, task.answers.index(sample.answer), sample.question)

    def drawn(self, task: Task, count: int) -> Row:
        """The hash of the first `count` trials before they are tokenised, and the share of their commonest answer."""
        samples = [self.sample(task, index) for index in range(count)]
        placed = [[sample, self.places(task, i, len(sample.facts))] for i, sample in enumerate(samples)]
        return {
            "chance": 1 / len(task.answers),
            "majority": commonest([sample.answer for sample in samples]),
            "trials_sha256": sha256([placed, self.shots, self.text.sha256 if self.text else ""]),
        }


def commonest(answers: Sequence[str]) -> float:
    """The share of the most frequent answer: the accuracy of who always gives that one."""
    return max(answers.count(answer) for answer in set(answers)) / len(answers)

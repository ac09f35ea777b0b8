"""The suite `reasoning`: twenty kinds of questions about facts, alone and spread over long texts.

Trial i of a seed has the same facts, question, depths and background at every length, for every model and on every
machine; only the tokens that say so are the model's own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from atma.eval.language_model import LanguageModel, Row, check_length
from atma.eval.reasoning.answers import Scoring, answered, generation_row, ranking_row
from atma.eval.reasoning.background import background
from atma.eval.reasoning.prompts import Maker, Prompt
from atma.eval.reasoning.published import Published
from atma.eval.reasoning.tasks import TASKS, chosen
from atma.eval.reasoning.worlds import Split, Task
from atma.eval.stream import Advance
from atma.eval.suite import Measurement, sha256
from atma.strict import check_fields

FACTS_ALONE = 200
"""About the tokens of length 0: what its time is estimated by. Other lengths are longer."""


class Cell(NamedTuple):
    """One task at one length: its answers, its trials' prompts, and what all of them share."""

    task: str
    length: int
    answers: tuple[str, ...]
    prompt: Callable[[int], Prompt]
    drawn: Row
    source_sha256: str
    """Of the background, or of the published rows."""


@dataclass(frozen=True)
class Reasoning:
    """bAbI's questions, their facts spread over long texts as in BABILong."""

    tasks: tuple[str, ...] = tuple(TASKS)[:10]
    """qa1 to qa20."""
    lengths: tuple[int, ...] = (0, 1024, 2048, 4096)
    """In tokens of the model, everything counted; increasing. 0 is the facts alone."""
    per_cell: int = 100
    """Trials of each task at each length."""
    scoring: Scoring = "both"
    """By ranking the task's answers, by greedy generation, or both."""
    shots: int = 0
    """Other stories of the task, with question and answer, before the text."""
    background: str = "stdlib"
    """The long text: a file or folder of text, jsonl or parquet, or stdlib."""
    data: Path | None = None
    """A folder with files of the published BABILong; generated if left out."""
    seed: int = 1234
    """Draws the trials."""

    name = "reasoning"

    def __post_init__(self) -> None:
        check_fields(self)
        chosen(self.tasks)
        if not self.lengths or list(self.lengths) != sorted(set(self.lengths)):
            raise ValueError(f"lengths must be strictly increasing, and one at least, not {list(self.lengths)}")
        if any(length != 0 and length <= FACTS_ALONE for length in self.lengths):
            raise ValueError(f"lengths must be 0 or above {FACTS_ALONE}, not {list(self.lengths)}")
        if self.per_cell < 1 or self.shots < 0 or self.seed < 0:
            told = f"{self.per_cell}, {self.shots} and {self.seed}"
            raise ValueError(f"'per_cell' must be 1 or more, 'shots' and 'seed' 0 or more, not {told}")

    def trials(self) -> dict[int, int]:
        """`Suite.trials`; length 0 stands as FACTS_ALONE."""
        return {length or FACTS_ALONE: self.per_cell for length in self.lengths}

    def cells(self) -> int:
        """`Suite.cells`."""
        return len(self.tasks)

    def maker(self, model: LanguageModel, split: Split = "test") -> Maker:
        """What makes the prompts for a model. ValueError: no such background, or published rows to be trained on."""
        if split == "train" and self.data is not None:
            raise ValueError(f"{self.data}: published rows are not for training; leave out --data")
        wanted = self.data is None and max(self.lengths) > 0
        text = background(self.background, model.tokenizer) if wanted else None
        return Maker(model.tokenizer, text, self.seed, self.shots, split)

    def measurements(self, model: LanguageModel, trials: Mapping[int, int]) -> list[Measurement]:
        """`Suite.measurements`: shortest lengths first."""
        maker, found = self.maker(model), []
        for length, count in trials.items():
            for task in chosen(self.tasks):
                found.append(self._measurement(model, maker, task, 0 if length == FACTS_ALONE else length, count))
        return found

    def _measurement(self, model: LanguageModel, maker: Maker, task: Task, length: int, count: int) -> Measurement:
        """What is measured is made again to be measured: all published rows together may not fit in memory."""
        cell, count = self._cell(maker, task, length, count)
        sizes = [_size(model, cell.prompt(index)) for index in range(count)]
        spec: Row = {"task": task.name, "length": length, "scoring": self.scoring, "shots": self.shots}
        spec |= {"data": "published" if self.data else "generated", "trials": count}
        spec |= {"source_sha256": cell.source_sha256}

        def run(advance: Advance) -> list[Row]:
            return measured(model, self._cell(maker, task, length, count)[0], count, self.scoring, advance)

        return Measurement(f"{task.name}, {length}", spec, sum(sizes), run)

    def _cell(self, maker: Maker, task: Task, length: int, count: int) -> tuple[Cell, int]:
        """The cell, and how many trials it can have."""
        if self.data is None:
            source = maker.text.sha256 if maker.text is not None and length else ""

            def prompt(index: int) -> Prompt:
                return maker.prompt(task, length, index)

            return Cell(task.name, length, task.answers, prompt, maker.drawn(task, count), source), count
        rows = Published(self.data, task, length, maker)
        count = min(count, len(rows.entries))
        return Cell(task.name, length, rows.answers, rows.prompt, rows.drawn(count), sha256(rows.entries)), count


def measured(model: LanguageModel, cell: Cell, count: int, scoring: Scoring, advance: Advance) -> list[Row]:
    """The rows of a cell, one for each way of scoring. Prompts are made when they are read, and not kept."""
    trials, prompts, shown = [], [], []
    for index in range(count):
        prompt = cell.prompt(index)
        trials.append(answered(model, prompt, scoring, advance))
        shown.append([len(prompt.ids), sha256(prompt.ids)])
        prompts.append(prompt._replace(ids=prompt.ids[:0]))
    rows = [] if scoring == "generation" else [ranking_row(trials, prompts)]
    rows += [] if scoring == "ranking" else [generation_row(trials, prompts, cell.task, cell.answers)]
    about: Row = {"task": cell.task, "length": cell.length, "trials": count, "answers": len(cell.answers)}
    about |= {"longest_prompt": max(size for size, _ in shown), "prompts_sha256": sha256(shown)} | cell.drawn
    return [{"kind": row["kind"]} | about | row for row in rows]


def _size(model: LanguageModel, prompt: Prompt) -> int:
    """Tokens of a prompt. ValueError if a model cannot read it and its longest answer, and nothing may be dropped."""
    check_length(model, len(prompt.ids) + max(map(len, prompt.candidates)))
    return len(prompt.ids)

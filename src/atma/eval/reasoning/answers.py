"""Answers and whether they are right: the likeliest of a task's answers, and what is written after the cue.

`ranking` takes the answer whose tokens, line end included, cost the fewest nats. It suits base models, which know the
form of no task. `generation` is greedy: the first line that is written must be the answer (exact); or its first
sentence must name it and no other of the task's answers (named), much as the published metric of BABILong, arXiv
2406.10149, has it.
"""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch

from atma.eval.language_model import LanguageModel, OwnModel, Row, finite
from atma.eval.reasoning.prompts import Prompt
from atma.eval.stream import Advance
from atma.model import Model
from atma.ops.loss import NOT_SCORED
from atma.state import ModelState, rows
from atma.statistics import proportion

Scoring = Literal["both", "ranking", "generation"]
SPARE = 8
"""Tokens that may be written beyond the longest answer."""
PATHS = ("qa19",)
"""Tasks whose answers are words in an order, some twice; others' are sets of words."""
SHOWN = 3
"""Written answers that a row holds."""


class Answered(NamedTuple):
    """Nats of every answer of the task (none without ranking), and what was written (nothing without generation)."""

    nats: np.ndarray
    written: str


def answered(model: LanguageModel, prompt: Prompt, scoring: Scoring, progress: Advance) -> Answered:
    """A trial. Our own models read its prompt once; others once for every answer and once to go on."""
    if isinstance(model, OwnModel):
        return _read_once(model, prompt, scoring, progress)
    nats = _each(model, prompt) if scoring != "generation" else np.zeros(0)
    written: list[int] = []
    if scoring != "ranking":
        written = model.generate(prompt.ids.tolist(), _most(model, prompt), _line_end(model))
    progress(len(prompt.ids))
    return Answered(nats, model.tokenizer.decode(written))


@torch.inference_mode()
def _read_once(model: OwnModel, prompt: Prompt, scoring: Scoring, progress: Advance) -> Answered:
    *before, last = prompt.ids.tolist()
    most = _most(model, prompt)
    state = model.read(before, 1 + most, progress)
    at_once = max(1, model.streaming.batch_tokens // len(prompt.ids))
    nats = np.zeros(0)
    if scoring != "generation":
        groups = [prompt.candidates[i : i + at_once] for i in range(0, len(prompt.candidates), at_once)]
        nats = np.concatenate([_costs(model.loaded.model, state, last, group) for group in groups])
    written: list[int] = []
    if scoring != "ranking":
        written = model.go_on(state, last, most, _line_end(model))
    progress(1)
    return Answered(nats, model.tokenizer.decode(written))


def _costs(model: Model, state: ModelState, last: int, candidates: Sequence[np.ndarray]) -> np.ndarray:
    """Nats of each of some answers after the state and the token `last`; the state stays as it is.

    ValueError where one is not finite.
    """
    width = max(map(len, candidates))
    inputs = torch.zeros(len(candidates), width, dtype=torch.long)
    targets = torch.full_like(inputs, NOT_SCORED)
    inputs[:, 0] = last
    for row, ids in enumerate(map(torch.from_numpy, candidates)):
        inputs[row, 1 : len(ids)] = ids[:-1]
        targets[row, : len(ids)] = ids
    device = state.length.device
    hidden, _ = model(inputs.to(device), rows(state, [0] * len(candidates)))
    return finite(model.loss(hidden, targets.to(device)).double().cpu().numpy()).sum(1)


def _each(model: LanguageModel, prompt: Prompt) -> np.ndarray:
    """Nats of every answer, those of equal length together."""
    nats = np.zeros(len(prompt.candidates))
    for size in sorted({len(ids) for ids in prompt.candidates}):
        members = [i for i, ids in enumerate(prompt.candidates) if len(ids) == size]
        texts = [np.concatenate([prompt.ids, prompt.candidates[i]]) for i in members]
        nats[members] = model.predict(torch.from_numpy(np.stack(texts)), size).nats.sum(1)
    return nats


def _most(model: LanguageModel, prompt: Prompt) -> int:
    """Tokens that may be written: the longest answer's, and what a model has positions for of SPARE."""
    longest = max(map(len, prompt.candidates))
    left = SPARE if model.longest is None else model.longest - len(prompt.ids) - longest
    return longest + max(0, min(SPARE, left))


def _line_end(model: LanguageModel) -> tuple[int, ...]:
    """The token of a line end, if it is one."""
    ids = model.tokenizer.encode("\n")
    return tuple(ids) if len(ids) == 1 else ()


def first_line(written: str) -> str:
    """What counts of a written answer: what stands before the first line end, without blanks around it."""
    return written.partition("\n")[0].strip()


def exact(written: str, answer: str) -> bool:
    """Whether the first line is the answer, in any case of letters, a full stop allowed."""
    return first_line(written).removesuffix(".").lower() == answer.lower()


def named(written: str, answer: str, answers: Sequence[str], question: str, path: bool = False) -> bool:
    """Whether the first sentence of the first line names the words of the answer, and no other word of any answer.

    How often and in which order does not matter, except in a path. Words of the question do not count unless they are
    the answer's. The published metric reads on over line ends, and finds answers within other words as well.
    """
    true = _words(answer)
    counted = {word for other in answers for word in _words(other)} - (set(_words(question)) - set(true))
    found = [word for word in _words(first_line(written).partition(".")[0]) if word in counted]
    return found == true if path else set(found) == set(true)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def ranking_row(trials: Sequence[Answered], prompts: Sequence[Prompt]) -> Row:
    """Accuracy of the likeliest answer, with its Wilson interval; nats of the true answer, mean over trials."""
    right = [int(np.argmin(one.nats) == prompt.true) for one, prompt in zip(trials, prompts, strict=True)]
    cost = float(np.mean([one.nats[prompt.true] for one, prompt in zip(trials, prompts, strict=True)]))
    row: Row = {"kind": "ranking"} | proportion("accuracy", "accuracy_", sum(right), len(right))
    return row | {"answer_nats": cost, "outcomes": right}


def generation_row(trials: Sequence[Answered], prompts: Sequence[Prompt], task: str, answers: Sequence[str]) -> Row:
    """Accuracy of what is written, exact and named, with Wilson intervals; outcomes are the exact ones."""
    triples = [(one.written, answers[prompt.true], prompt) for one, prompt in zip(trials, prompts, strict=True)]
    right = [int(exact(written, answer)) for written, answer, _ in triples]
    told = [int(named(written, answer, answers, one.question, task in PATHS)) for written, answer, one in triples]
    row: Row = {"kind": "generation"} | proportion("accuracy", "accuracy_", sum(right), len(right))
    row |= proportion("named", "named_", sum(told), len(told))
    return row | {"outcomes": right, "written": [one.written for one in trials[:SHOWN]]}

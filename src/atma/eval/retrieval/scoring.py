"""Answers and their figures: teacher-forced (every token judged after the true ones) and free (greedy continuation).

The answer to a needle is five single-digit tokens. Where a tokenizer's digits are always single, both find the same
trials exact: a continuation holds the value if, and only if, each of its tokens is the likeliest after the true ones
before it. Where digits are also joined, a free answer counts however it is spelled, a forced one only as five tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from atma.eval.language_model import LanguageModel, Row
from atma.eval.retrieval.prompts import Ask, Prompt
from atma.eval.stream import Advance
from atma.statistics import mean_interval, proportion

SHOWN = 3
"""Free answers that a row holds as they were written."""


class Forced(NamedTuple):
    """One trial: answer tokens that were the likeliest, of how many, and their costs in nats, float64."""

    right: int
    of: int
    nats: np.ndarray


class Free(NamedTuple):
    """One trial: the share of expected texts that were found, whether that is enough, and what was written."""

    recall: float
    exact: bool
    written: str


def forced(model: LanguageModel, prompts: Sequence[Prompt], progress: Advance | None = None) -> list[Forced]:
    """Trials in order; those of equal shape are read together."""
    shapes: dict[tuple[int, int], list[int]] = {}
    for i, prompt in enumerate(prompts):
        shapes.setdefault((len(prompt.ids), len(prompt.ids) - prompt.asks[0].start), []).append(i)
    found: dict[int, Forced] = {}
    for (length, last), members in shapes.items():
        tokens = torch.from_numpy(np.stack([prompts[i].ids for i in members]))
        scored = model.predict(tokens, last, progress)
        for row, i in enumerate(members):
            columns = np.concatenate([np.arange(ask.start, ask.stop) for ask in prompts[i].asks]) - (length - last)
            right, nats = scored.right[row, columns], scored.nats[row, columns]
            found[i] = Forced(int(right.sum()), len(columns), nats)
    return [found[i] for i in range(len(prompts))]


def free(model: LanguageModel, prompt: Prompt) -> Free:
    """The greedy continuations of everything before each answer, true answers to earlier asks included."""
    judged = [_judged(model, prompt.ids[: ask.start].tolist(), ask) for ask in prompt.asks]
    recall = sum(one.recall for one in judged) / len(judged)
    return Free(recall, all(one.exact for one in judged), " | ".join(one.written for one in judged))


def found_share(written: str, ask: Ask) -> float:
    """The share of the expected texts that `written` holds, in any case of letters; of `any`, the best of them."""
    held = [output.lower() in written.lower() for output in ask.outputs]
    return float(any(held)) if ask.any else sum(held) / len(held)


def forced_row(trials: Sequence[Forced]) -> Row:
    """Token and exact accuracy with Wilson 95% intervals over tokens and over trials, and cross-entropy in nats."""
    row: Row = {"cross_entropy": float(np.mean([trial.nats.mean() for trial in trials]))} | accuracies(trials)
    return row | {"outcomes": [int(trial.right == trial.of) for trial in trials]}


def accuracies(trials: Sequence[Forced], prefix: str = "") -> Row:
    """The shares of tokens and of trials that are right, each with its Wilson 95% interval."""
    right, of = sum(trial.right for trial in trials), sum(trial.of for trial in trials)
    exact = sum(trial.right == trial.of for trial in trials)
    row: Row = proportion(f"{prefix}token_accuracy", f"{prefix}token_", right, of)
    return row | proportion(f"{prefix}exact_accuracy", f"{prefix}exact_", exact, len(trials))


def free_row(trials: Sequence[Free]) -> Row:
    """Recall (mean share of expected texts found) with its bootstrap interval, and exact with Wilson's; both 95%."""
    recall = mean_interval([trial.recall for trial in trials])
    outcomes = [int(trial.exact) for trial in trials]
    row: Row = {"recall": recall.value, "recall_low": recall.low, "recall_high": recall.high}
    row |= proportion("exact_accuracy", "exact_", sum(outcomes), len(trials))
    return row | {"outcomes": outcomes, "written": [trial.written for trial in trials[:SHOWN]]}


def _judged(model: LanguageModel, shown: list[int], ask: Ask) -> Free:
    written = model.tokenizer.decode(model.generate(shown, ask.room))
    share = found_share(written, ask)
    return Free(share, share == 1.0, written)

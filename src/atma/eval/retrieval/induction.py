"""The induction needle: is a fact stated at the start of a context found again at its end?

`<eot> needle gap cue value`, where needle = cue value, cue = " The access code for record {7 digits} is" and value is
five single-digit tokens. Source: maths.md, section 7. The gap is text without end-of-text.
"""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from atma.eval.language_model import LanguageModel, Row
from atma.eval.retrieval.needles import CUE, RECORD_DIGITS, VALUE_TOKENS, Writer
from atma.eval.retrieval.prompts import Ask, Encoder, Prompt
from atma.eval.retrieval.scoring import Forced, accuracies, forced
from atma.eval.stream import Advance
from atma.tokenizer import Tokenizer


class Trial(NamedTuple):
    """One needle: token ids of cue and value, and where in the haystack the gap ends (the token before the cue)."""

    cue: list[int]
    value: list[int]
    gap_end: int


def needle(
    model: LanguageModel,
    haystack: np.ndarray,
    lengths: Sequence[int],
    trials: int,
    seed: int = 0,
    progress: Advance | None = None,
) -> list[Row]:
    """One row a length: teacher-forced token and exact accuracy, cross-entropy, and the same with the needle absent.

    haystack: text token ids (n,), read round and round if a gap is longer. A length counts every token, from
    end-of-text to the last digit. Trial i has the same record, value and end of gap at every length and for every model
    of the same tokenizer. Intervals are Wilson 95%, over trials × 5 tokens and over trials.
    """
    if trials < 1 or not lengths:
        raise ValueError(f"needles need a length and a trial at each, not lengths {list(lengths)} and {trials} trials")
    drawn = draw_trials(model.tokenizer, trials, len(haystack), seed)
    rows: list[Row] = []
    for length in lengths:
        gap = int(statistics.median(gap_length(trial, length) for trial in drawn))
        row: Row = {"kind": "needle", "length": length, "gap": gap, "trials": trials}
        for absent in (False, True):
            asked = prompts(model.tokenizer, model.tokenizer.eot, haystack, drawn, length, absent)
            row |= _measured("absent_" if absent else "", forced(model, asked, progress))
        rows.append(row)
    return rows


def draw_trials(tokenizer: Tokenizer, count: int, haystack_tokens: int, seed: int) -> list[Trial]:
    """The first `count` trials of a seed; a larger count begins with the same ones."""
    if haystack_tokens < 1:
        raise ValueError("the haystack has no tokens; prepare data with a validation split")
    writer, trials = Writer(Encoder(tokenizer)), []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        digits = rng.integers(0, 10, RECORD_DIGITS + VALUE_TOKENS).tolist()
        record = "".join(map(str, digits[:RECORD_DIGITS]))
        fact = writer.fact(CUE.format(record=record), tuple(digits[RECORD_DIGITS:]))
        trials.append(Trial(fact.cue.tolist(), fact.value.tolist(), int(rng.integers(0, haystack_tokens))))
    return trials


def gap_length(trial: Trial, length: int) -> int:
    """Tokens between needle and cue in a sequence of `length`; ValueError if not even one fits."""
    overhead = 1 + 2 * (len(trial.cue) + len(trial.value))
    if length <= overhead:
        raise ValueError(
            f"length {length} has no room for a needle; its fixed parts alone take {overhead} tokens: "
            "choose longer lengths, or 0 needle trials"
        )
    return length - overhead


def layouts(
    first: int, haystack: np.ndarray, trials: Sequence[Trial], length: int, absent: bool = False
) -> torch.Tensor:
    """Token ids (trials, length) int64; `absent` has haystack tokens where the needle was."""
    sequences = []
    for trial in trials:
        gap = gap_length(trial, length)
        start = [] if absent else [*trial.cue, *trial.value]
        size = gap + len(trial.cue) + len(trial.value) if absent else gap
        places = np.arange(trial.gap_end - size, trial.gap_end)
        text = np.take(haystack, places, mode="wrap")
        sequences.append(np.concatenate([[first], start, text, trial.cue, trial.value]).astype(np.int64))
    return torch.from_numpy(np.stack(sequences))


def prompts(
    tokenizer: Tokenizer, first: int, haystack: np.ndarray, trials: Sequence[Trial], length: int, absent: bool
) -> list[Prompt]:
    """`layouts` that begin with the token `first`, each with what it asks for."""
    rows = layouts(first, haystack, trials, length, absent).numpy()
    texts = [tokenizer.decode(trial.value).strip() for trial in trials]
    start = length - VALUE_TOKENS
    return [Prompt(ids, (Ask(start, length, VALUE_TOKENS, (text,)),)) for ids, text in zip(rows, texts, strict=True)]


def _measured(prefix: str, found: Sequence[Forced]) -> Row:
    row: Row = {f"{prefix}cross_entropy": float(np.concatenate([trial.nats for trial in found]).mean())}
    return row | accuracies(found, prefix)

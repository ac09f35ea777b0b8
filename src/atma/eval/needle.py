"""The induction needle: is a fact stated at the start of a context found again at its end?

`<eot> needle gap cue value`, where needle = cue value, cue = " The access code for record {7 digits} is" and value is
five single-digit tokens. Source: maths.md, section 7. The gap is text of the validation split without end-of-text.
"""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from atma.config import EvaluationConfig
from atma.eval.language_model import LanguageModel, Row, Scored
from atma.eval.stream import Advance
from atma.statistics import proportion
from atma.tokenizer import Tokenizer

CUE = " The access code for record {record} is"
RECORD_DIGITS = 7
VALUE_TOKENS = 5


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
    tokenizer = model.tokenizer
    drawn = draw_trials(tokenizer, trials, len(haystack), seed)
    rows: list[Row] = []
    for length in lengths:
        present = layouts(tokenizer.eot, haystack, drawn, length)
        absent = layouts(tokenizer.eot, haystack, drawn, length, absent=True)
        gap = int(statistics.median(gap_length(trial, length) for trial in drawn))
        row: Row = {"kind": "needle", "length": length, "gap": gap, "trials": trials}
        row |= _measured("", model.predict(present, VALUE_TOKENS, progress))
        rows.append(row | _measured("absent_", model.predict(absent, VALUE_TOKENS, progress)))
    return rows


def draw_trials(tokenizer: Tokenizer, count: int, haystack_tokens: int, seed: int) -> list[Trial]:
    """The first `count` trials of a seed; a larger count begins with the same ones."""
    if haystack_tokens < 1:
        raise ValueError("the haystack has no tokens; prepare data with a validation split")
    first, rest, spaced = digit_ids(tokenizer)
    cue = CUE if spaced else CUE + " "
    trials = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        digits = rng.integers(0, 10, RECORD_DIGITS + VALUE_TOKENS).tolist()
        record = "".join(map(str, digits[:RECORD_DIGITS]))
        value = digits[RECORD_DIGITS:]
        ids = [first[value[0]], *(rest[digit] for digit in value[1:])]
        gap_end = int(rng.integers(0, haystack_tokens))
        trials.append(Trial(tokenizer.encode(cue.format(record=record)), ids, gap_end))
    return trials


def digit_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int], bool]:
    """Ids of a value's first digit and of its others, and whether the first holds the space before it.

    Where some digit with a space is not one token (bytes, a small BPE), the cue takes the space. ValueError where a
    bare digit is not one token.
    """
    bare = [tokenizer.encode(str(digit)) for digit in range(10)]
    for digit, ids in enumerate(bare):
        if len(ids) != 1:
            raise ValueError(f"the tokenizer makes {len(ids)} tokens of the digit {digit}; needles need single digits")
    rest = [ids[0] for ids in bare]
    spaced = [tokenizer.encode(f" {digit}") for digit in range(10)]
    if all(len(ids) == 1 for ids in spaced):
        return [ids[0] for ids in spaced], rest, True
    return rest, rest, False


def gap_length(trial: Trial, length: int) -> int:
    """Tokens between needle and cue in a sequence of `length`; ValueError if not even one fits."""
    overhead = 1 + 2 * (len(trial.cue) + len(trial.value))
    if length <= overhead:
        raise ValueError(
            f"length {length} has no room for a needle; its fixed parts alone take {overhead} tokens: "
            "choose longer lengths, or 0 needle trials"
        )
    return length - overhead


def check_room(tokenizer: Tokenizer, evaluation: EvaluationConfig) -> None:
    """ValueError, with the mend, if a length has no room for one of its needles, or the tokenizer for any."""
    counts = [(length, evaluation.trials(length)) for length in evaluation.lengths]
    drawn = draw_trials(tokenizer, max(count for _, count in counts), 1, evaluation.seed)
    for length, count in counts:
        for trial in drawn[:count]:
            gap_length(trial, length)


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


def _measured(prefix: str, outcome: Scored) -> Row:
    tokens, exact = int(outcome.right.sum()), int(outcome.right.all(1).sum())
    count = len(outcome.right)
    row: Row = {f"{prefix}cross_entropy": float(outcome.nats.mean())}
    for name, hits, of in (("token", tokens, count * VALUE_TOKENS), ("exact", exact, count)):
        row |= proportion(f"{prefix}{name}_accuracy", f"{prefix}{name}_", hits, of)
    return row

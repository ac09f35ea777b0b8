"""Sequences of different lengths through a model together: sorted by length, padded on the right.

Padding on the right changes nothing that comes before it, for the models are causal. A sequence is taken back out by
its row and its targets, and the padding's are thrown away.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from atma.eval.language_model import LanguageModel, Scored, by_length
from atma.eval.stream import Advance


class Padded(NamedTuple):
    """Some sequences as one tensor (B, T + 1), and the `last` targets that hold all of theirs."""

    rows: list[int]
    tokens: Tensor
    last: int
    read: int
    """Tokens that the model would read of these sequences without padding."""


def score_each(
    model: LanguageModel, sequences: Sequence[np.ndarray], lasts: Sequence[int], progress: Advance | None = None
) -> list[np.ndarray]:
    """Nats (last,) of the last targets of each sequence (n,) of token ids, in the order given."""
    found: list[np.ndarray] = [np.empty(0)] * len(sequences)
    for padded in together(sequences, lasts, model):
        told = Told(progress, padded.read)
        nats = model.score(padded.tokens, padded.last, told.some)
        for place, row in enumerate(padded.rows):
            found[row] = nats[place, _targets(padded, len(sequences[row]), lasts[row])]
        told.rest()
    return found


def predict_each(
    model: LanguageModel, sequences: Sequence[np.ndarray], lasts: Sequence[int], progress: Advance | None = None
) -> list[Scored]:
    """`score_each`, with whether each target was the likeliest."""
    found: list[Scored] = [Scored(np.empty(0), np.empty(0, bool))] * len(sequences)
    for padded in together(sequences, lasts, model):
        told = Told(progress, padded.read)
        outcome = model.predict(padded.tokens, padded.last, told.some)
        for place, row in enumerate(padded.rows):
            columns = _targets(padded, len(sequences[row]), lasts[row])
            found[row] = Scored(outcome.nats[place, columns], outcome.right[place, columns])
        told.rest()
    return found


def together(sequences: Sequence[np.ndarray], lasts: Sequence[int], model: LanguageModel) -> Iterator[Padded]:
    """The longest first, as many together as the model's `batch_tokens` holds with their padding.

    A sequence that passes what the model can read goes alone, so that padding takes none of its place; so does
    every one where the length decides how it is read.
    """
    order = sorted(range(len(sequences)), key=lambda row: -len(sequences[row]))
    start = 0
    while start < len(order):
        longest = len(sequences[order[start]])
        alone = by_length(model) or (model.longest is not None and longest - 1 > model.longest)
        stop = start + (1 if alone else max(1, model.streaming.batch_tokens // longest))
        yield _padded(sequences, lasts, order[start:stop], model.tokenizer.eot)
        start = stop


class Told:
    """Progress that counts no padding: what is told sums to `tokens`."""

    def __init__(self, progress: Advance | None, tokens: int) -> None:
        self.progress, self.left = progress, tokens

    def some(self, tokens: int) -> None:
        """So many more, padding among them."""
        known = min(tokens, self.left)
        self.left -= known
        if self.progress is not None and known:
            self.progress(known)

    def rest(self) -> None:
        """All that is left."""
        self.some(self.left)


def _padded(sequences: Sequence[np.ndarray], lasts: Sequence[int], rows: list[int], pad: int) -> Padded:
    longest = len(sequences[rows[0]])
    tokens = np.full((len(rows), longest), pad, np.int64)
    for place, row in enumerate(rows):
        tokens[place, : len(sequences[row])] = sequences[row]
    last = max(longest - len(sequences[row]) + lasts[row] for row in rows)
    return Padded(rows, torch.from_numpy(tokens), last, sum(len(sequences[row]) - 1 for row in rows))


def _targets(padded: Padded, size: int, last: int) -> slice:
    """Where the last targets of a sequence of `size` tokens are among those of `padded`."""
    stop = padded.last - (padded.tokens.shape[1] - size)
    return slice(stop - last, stop)

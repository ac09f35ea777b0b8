"""Measuring models side by side, a text each in turn, until the time is up: all have then read the same texts.

What was read is kept, and the measures of `atma.eval` are made of it afterwards, so that they are the same figures with
the same intervals as `atma eval lengths` would give for so many documents and needles.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from atma.data.dataset import TokenSet
from atma.demo.pace import Enough, Stage, lengths_in
from atma.eval import OwnModel, Row, choose_documents, fixed_targets, haystack, length_curve, needle, provenance
from atma.eval.language_model import Scored, by_length
from atma.eval.likelihood.prefixes import Documents, text_tokens
from atma.eval.retrieval.induction import VALUE_TOKENS, draw_trials, layouts
from atma.eval.stream import Advance
from atma.tokenizer import Tokenizer

SEED, TARGETS, LEAST = 1234, 128, 2
Show = Callable[[str, int, int], None]


class Kept:
    """A language model that remembers what it was asked, row by row, so that asking again costs nothing."""

    def __init__(self, model: OwnModel, stage: Stage) -> None:
        self.model, self.stage = model, stage
        self.by_length = by_length(model)
        self.tokenizer: Tokenizer = self.model.tokenizer
        self.name, self.streaming, self.longest, self.truncated = self.model.name, self.model.streaming, None, 0
        self._nats: dict[bytes, np.ndarray] = {}
        self._scored: dict[tuple[bytes, int], Scored] = {}

    def score(self, tokens: Tensor, last: int | None = None, progress: Advance | None = None) -> np.ndarray:
        """`LanguageModel.score`; Enough when a row that is not known would take longer than there is time."""
        wanted, rows = tokens.shape[1] - 1 if last is None else last, []
        for row in tokens.split(1):
            key = _key(row)
            if key not in self._nats or self._nats[key].shape[0] < wanted:
                self._nats[key] = self.model.score(row, last, self.stage.tick)[0]
            rows.append(self._nats[key][-wanted:])
        return np.stack(rows)

    def predict(self, tokens: Tensor, last: int, progress: Advance | None = None) -> Scored:
        """`LanguageModel.predict`, remembered like `score`."""
        rows = []
        for row in tokens.split(1):
            key = _key(row), last
            if key not in self._scored:
                self._scored[key] = self.model.predict(row, last, self.stage.tick)
            rows.append(self._scored[key])
        return Scored(np.concatenate([row.nats for row in rows]), np.concatenate([row.right for row in rows]))

    def generate(self, prompt: Sequence[int], most: int, stop: Sequence[int] = ()) -> list[int]:
        """`LanguageModel.generate`."""
        return self.model.generate(prompt, most, stop)

    def provenance(self) -> Row:
        """`LanguageModel.provenance`."""
        return self.model.provenance()


class Measured(NamedTuple):
    """Evaluation rows of each model, and how much was measured of what was wanted."""

    rows: list[list[Row]]
    documents: int
    needles: int
    lengths: list[int]


def measure(
    models: Sequence[OwnModel],
    text: TokenSet,
    lengths: Sequence[int],
    sizes: tuple[int, int],
    stages: tuple[Stage, Stage],
    show: Show,
) -> Measured:
    """Losses in the first stage and needles (none where it has no time) in the second. See `Plan` for the sizes."""
    kept = [Kept(model, stages[0]) for model in models]
    available = [length for length in lengths if length <= text_tokens(text)]
    if not available:
        raise ValueError(f"the held-out text has {text_tokens(text)} tokens, too few for a length of {lengths[0]}")
    fitting = lengths_in(stages[0].left, _costs(models, available, stages[0]), sizes[0])
    chosen = choose_documents(text, kept[0].tokenizer.eot, fitting[-1], sizes[1], SEED, True)
    targets = min(TARGETS, fitting[0] // 2)
    documents = _read(kept, chosen, fitting, targets, show)
    for model in kept:
        model.stage = stages[1]
    needles = _find(kept, text, fitting, sizes[1], show) if stages[1].left > 0 else 0
    read = Documents(chosen.tokens[:documents], chosen.eot, max(0, documents - len(chosen.tokens) + chosen.joined))
    rows = [_rows(model, text, read, fitting, targets, needles) for model in kept]
    return Measured(rows, documents, needles, fitting)


def reading_seconds(model: OwnModel, lengths: Sequence[int], now: Callable[[], float]) -> dict[int, float]:
    """Seconds to score one row of each length: a T + b T² through those at 1/32 and 1/8 of the last."""
    short, long = max(1, lengths[-1] // 32), max(2, lengths[-1] // 8)
    rates = []
    for length in (short, long):
        began = now()
        model.score(torch.zeros(1, length + 1, dtype=torch.int64))
        rates.append((now() - began) / length)
    growth = max(0.0, (rates[1] - rates[0]) / (long - short))
    return {length: length * (rates[1] + growth * (length - long)) for length in lengths}


def _costs(models: Sequence[OwnModel], lengths: Sequence[int], stage: Stage) -> dict[int, float]:
    """Seconds for one text of each length, read by every model."""
    costs = [reading_seconds(model, lengths, stage.pace.now) for model in models]
    return {length: sum(cost[length] for cost in costs) for length in lengths}


def _read(kept: Sequence[Kept], chosen: Documents, lengths: Sequence[int], targets: int, show: Show) -> int:
    """Documents that every model has read at every length. The first two may take half of what all has left."""
    count, stage = len(chosen.tokens), kept[0].stage
    for i in range(count):
        one = Documents(chosen.tokens[i : i + 1], chosen.eot)
        for model in kept:
            model.stage = stage if i >= LEAST else stage.longer(0.5)
        try:
            for model in kept:
                model.score(torch.from_numpy(one.windows(lengths[-1])))
                for length in lengths[:-1]:
                    model.score(torch.from_numpy(one.endings(length)), targets)
        except Enough:
            return i
        show("documents", i + 1, count)
    return count


def _find(kept: Sequence[Kept], text: TokenSet, lengths: Sequence[int], most: int, show: Show) -> int:
    """Needles that every model was asked for at every length, with and without the needle in the text."""
    tokenizer = kept[0].tokenizer
    hay = haystack(text, tokenizer.eot)
    for i, trial in enumerate(draw_trials(tokenizer, most, len(hay), SEED)):
        try:
            for model in kept:
                for length in lengths:
                    for absent in (False, True):
                        model.predict(layouts(tokenizer.eot, hay, [trial], length, absent), VALUE_TOKENS)
        except Enough:
            return i
        show("needles", i + 1, most)
    return most


def _rows(
    model: Kept, text: TokenSet, read: Documents, lengths: Sequence[int], targets: int, needles: int
) -> list[Row]:
    """The measures of what was read, each row with what it was measured with."""
    rows: list[Row] = []
    if len(read.tokens):
        if not model.by_length:  # else each prefix is a reading of its own, which nobody made
            rows += length_curve(model, read, lengths)
        rows += fixed_targets(model, read, lengths, targets)
    if needles:
        rows += needle(model, haystack(text, model.tokenizer.eot), lengths, needles, SEED)
    stamp = provenance(model.model.loaded, text, SEED) | model.provenance()
    return [row | {"provenance": stamp} for row in rows]


def _key(row: Tensor) -> bytes:
    return hashlib.blake2b(row.numpy().tobytes(), digest_size=16).digest()

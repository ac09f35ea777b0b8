"""Training rows as a pure function of (seed, step, rank, world): no loader, no state, nothing to save or restore.

An epoch cuts the token stream into windows of `length` tokens at an offset of its own and visits them in the order of
a permutation that is computed, not stored: a Feistel network over the window numbers. Row r of step s is visit
s·rows + r, so any step can be asked for at any time, and ranks take neighbouring slices of the same global batch.

Every target of text is scored. Documents begin with end-of-text, so the last token of a document predicts end-of-text
(documents end) and end-of-text predicts the next document's first token; neither needs the other document.
"""

from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.random import Generator, Philox
from torch import Tensor

from atma.config import DataConfig, TrainConfig
from atma.data.dataset import TokenSet
from atma.data.recall import Piece, Recall
from atma.data.split import mix
from atma.ops.loss import NOT_SCORED

LEAST_RECALL_LENGTH = 32
ROUNDS = 6
TEXT_MARGIN = 64
PERMUTE, OFFSET, CHOOSE, WRITE, SUBSET = range(5)
"""What a random stream is for; each use has its own."""


class Batch(NamedTuple):
    """Rows of one step for one rank, all (B, T)."""

    tokens: Tensor
    """int64 token ids."""
    targets: Tensor
    """int64: the next token, or -100 where it is not scored."""
    segment_ids: Tensor
    """int32: 0, 1, 2 … for the documents of a row."""


class Batches:
    """Rows of a token set, some of them synthetic as the data configuration asks."""

    def __init__(
        self, token_set: TokenSet, data: DataConfig, train: TrainConfig, rank: int = 0, world: int = 1
    ) -> None:
        """ValueError if ranks and micro-batches do not divide the rows of a batch, or the tokens do not fill a row."""
        self.token_set, self.data, self.train = token_set, data, train
        self.length = train.length
        rows = train.batch_tokens // train.length
        if not 0 <= rank < world:
            raise ValueError(f"rank must be 0 to {world - 1}, not {rank}")
        if rows % (world * train.accumulation):
            parts = f"{world} ranks × {train.accumulation} micro-batches"
            raise ValueError(
                f"'batch_tokens' {train.batch_tokens} makes {rows} rows, which {parts} cannot share equally"
            )
        if token_set.tokens <= self.length:
            raise ValueError(
                f"{token_set.tokens} tokens do not fill one row of length {self.length} and its last target"
            )
        if (data.recall_share or data.copy_warmup_tokens) and self.length < LEAST_RECALL_LENGTH:
            raise ValueError(f"synthetic rows need a length of at least {LEAST_RECALL_LENGTH}, not {self.length}")
        self._rows = rows
        self._mine = np.arange(rank * (rows // world), (rank + 1) * (rows // world))
        self._windows = max(1, (token_set.tokens - self.length) // self.length)
        self._slack = min(self.length, token_set.tokens - self._windows * self.length)

    @property
    def epoch_rows(self) -> int:
        """Rows that show the stream once."""
        return self._windows

    def batch(self, step: int) -> Batch:
        """The rows of one step, step ≥ 0."""
        visits = step * self._rows + self._mine
        if step * self.train.batch_tokens < self.data.copy_warmup_tokens:
            return self._pack([self._copies(visit) for visit in visits.tolist()])
        starts = self._starts(visits)
        ids = self.token_set.rows(starts, self.length + 1)
        scored = np.ones(ids.shape, bool)
        synthetic = np.zeros(len(visits), bool)
        if self.data.recall_share:
            synthetic = mix(visits, self._seed(CHOOSE)) < np.uint64(self.data.recall_share * (2**64 - 2**11))
        for row in np.flatnonzero(synthetic).tolist():
            ids[row], scored[row] = self._synthetic(int(visits[row]), int(starts[row]))
        return _batch(ids, scored, self.token_set.eot)

    def _pack(self, rows: list[Piece]) -> Batch:
        ids, scored = np.stack([row.ids for row in rows]), np.stack([row.scored for row in rows])
        return _batch(ids, scored, self.token_set.eot)

    def _starts(self, visits: np.ndarray) -> np.ndarray:
        """First token (n,) of the window of each visit."""
        epochs, positions = np.divmod(visits, self._windows)
        windows = permuted(positions, self._windows, mix(epochs, self._seed(PERMUTE)))
        offsets = mix(epochs, self._seed(OFFSET)) % np.uint64(self._slack)
        return windows * self.length + offsets.astype(np.int64)

    def _synthetic(self, visit: int, start: int) -> Piece:
        stop = min(self.token_set.tokens, start + self.length + TEXT_MARGIN)
        return self._recall.row(self._generator(visit), self.token_set.read(start, stop), self.length + 1)

    def _copies(self, visit: int) -> Piece:
        return self._recall.copies(self._generator(visit), self._copy_ids, self.length + 1)

    def _generator(self, visit: int) -> Generator:
        return Generator(Philox(key=np.array([self._seed(WRITE), visit], np.uint64)))

    def _seed(self, use: int) -> int:
        return (self.train.seed * 8 + use) % 2**64

    @cached_property
    def _recall(self) -> Recall:
        tokens = self.token_set
        return Recall(tokens.vocab_size, tokens.eot, self.data.recall_vocabulary, tokens.tokenizer)

    @cached_property
    def _copy_ids(self) -> np.ndarray:
        """The ids of the copy warm-up, chosen once per seed."""
        others = np.delete(np.arange(self.token_set.vocab_size), self.token_set.eot)
        generator = Generator(Philox(key=np.array([self._seed(SUBSET), 0], np.uint64)))
        return generator.permutation(others)[: self.data.copy_vocabulary]


def permuted(positions: np.ndarray, count: int, keys: np.ndarray) -> np.ndarray:
    """Where a permutation of 0 … count-1 takes positions (n,) int64; keys (n,) uint64 choose the permutation of each.

    A Feistel network over a rectangle just larger than count; values that fall outside go round again (cycle walking).
    """
    height = np.int64(np.ceil(np.sqrt(count)))
    width = np.int64(-(-count // height))
    out = positions.astype(np.int64)
    pending = np.arange(len(out))
    while len(pending):
        left, right = np.divmod(out[pending], width)
        for turn in range(0, ROUNDS, 2):
            left = (left + _round(right, keys[pending], turn, height)) % height
            right = (right + _round(left, keys[pending], turn + 1, width)) % width
        out[pending] = left * width + right
        pending = pending[out[pending] >= count]
    return out


def _round(half: np.ndarray, keys: np.ndarray, turn: int, size: np.int64) -> np.ndarray:
    return (mix(half.astype(np.uint64) ^ keys, turn) % np.uint64(size)).astype(np.int64)


def _batch(ids: np.ndarray, scored: np.ndarray, eot: int) -> Batch:
    """Rows (B, T + 1) as tokens, targets and segment ids (B, T)."""
    starts = ids[:, :-1] == eot
    segments = np.cumsum(starts, 1, dtype=np.int32) - starts[:, :1]
    targets = np.where(scored[:, 1:], ids[:, 1:], NOT_SCORED)
    tokens = torch.from_numpy(np.ascontiguousarray(ids[:, :-1]))
    return Batch(tokens, torch.from_numpy(targets), torch.from_numpy(segments.astype(np.int32)))

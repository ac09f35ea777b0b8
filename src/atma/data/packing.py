"""Training rows of whole conversations: packed side by side, none cut in two, as a pure function of the step.

A conversation of n tokens asks for n − 1 places of a row, for its last token is only predicted. Rows are filled once:
the longest conversation first, each into the fullest row that still has room (best fit, decreasing). An epoch visits
every row, in an order of its own. `segment_ids` keep neighbours apart, so that each conversation's gradient is what it
would be alone. What is left of a row is a segment of its own without targets.
"""

import bisect
from functools import cached_property

import numpy as np
import torch

from atma.config import DataConfig, TrainConfig
from atma.data.batches import PERMUTE, Batch, permuted
from atma.data.dataset import TokenSet
from atma.data.split import mix
from atma.ops.loss import NOT_SCORED


class Conversations:
    """Rows of a set of conversations for one rank. `once`: after one epoch rows are empty, as validation wants it."""

    def __init__(
        self,
        token_set: TokenSet,
        data: DataConfig,
        train: TrainConfig,
        rank: int = 0,
        world: int = 1,
        once: bool = False,
    ) -> None:
        """ValueError: rows that ranks and micro-batches cannot share, or no conversation with an answer in a row."""
        if not token_set.masks:
            raise ValueError(f"{token_set.path}: holds texts, not conversations")
        if data.recall_share or data.copy_warmup_tokens:
            raise ValueError(
                f"{token_set.path}: holds conversations, beside which no synthetic rows go; leave data.recall_share "
                "and data.copy_warmup_tokens at 0"
            )
        self.token_set, self.data, self.train, self.once = token_set, data, train, once
        self._rows = train.batch_tokens // train.length
        if not 0 <= rank < world or self._rows % (world * train.accumulation):
            parts = f"{world} ranks × {train.accumulation} micro-batches"
            raise ValueError(
                f"'batch_tokens' {train.batch_tokens} makes {self._rows} rows, which {parts} cannot share equally"
            )
        self._mine = np.arange(rank * (self._rows // world), (rank + 1) * (self._rows // world))
        self._places = np.minimum(token_set.lengths - 1, train.length)
        self.long = np.flatnonzero(token_set.lengths - 1 > train.length)
        """Conversations that a row does not hold whole."""
        self.left_out = self.long[[not self._kept(i) for i in self.long.tolist()]] if len(self.long) else self.long
        kept = np.setdiff1d(np.arange(token_set.documents), self.left_out)
        if not len(kept):
            raise ValueError(f"{token_set.path}: no conversation has an answer within 'length' {train.length} tokens")
        self.rows = pack(kept, self._places[kept], train.length)
        """The conversations of each row of an epoch."""

    @cached_property
    def full(self) -> float:
        """Share of the places of an epoch's rows that conversations take."""
        return float(sum(self._places[row].sum() for row in self.rows) / (len(self.rows) * self.train.length))

    def told(self) -> str:
        """What became of the conversations, in one line."""
        length, cut = self.train.length, len(self.long) - len(self.left_out)
        count = self.token_set.documents - len(self.left_out)
        text = f"{count:,} conversations in {len(self.rows):,} rows of {length:,} tokens, {100 * self.full:.0f}% full"
        text += f"; {cut:,} longer than a row, their ends cut off" if cut else ""
        return text + (f"; {len(self.left_out):,} longer than a row left out" if len(self.left_out) else "")

    def batch(self, step: int) -> Batch:
        """The rows of one step, step ≥ 0."""
        visits = step * self._rows + self._mine
        epochs, positions = np.divmod(visits, len(self.rows))
        seeds = mix(epochs, (self.train.seed * 8 + PERMUTE) % 2**64)
        chosen = permuted(positions, len(self.rows), seeds).tolist()
        shape = len(visits), self.train.length
        tokens, targets = np.full(shape, self.token_set.eot, np.int64), np.full(shape, NOT_SCORED, np.int64)
        segments = np.zeros(shape, np.int32)
        for at, (row, epoch) in enumerate(zip(chosen, epochs.tolist(), strict=True)):
            if not (self.once and epoch):
                self._fill(self.rows[row], tokens[at], targets[at], segments[at])
        return Batch(*map(torch.from_numpy, (tokens, targets, segments)))

    def _fill(self, row: np.ndarray, tokens: np.ndarray, targets: np.ndarray, segments: np.ndarray) -> None:
        """Write the conversations of a row into it, and the rest of it as one more segment."""
        start = 0
        for number, i in enumerate(row.tolist()):
            place = slice(start, start + int(self._places[i]))
            start = place.stop
            ids, answers = self._learned(i)
            tokens[place], targets[place] = ids[:-1], np.where(answers[1:], ids[1:], NOT_SCORED)
            segments[place] = number
        segments[start:] = len(row)

    def _learned(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a conversation as far as a row holds it, and which of them have a loss."""
        last = int(self._places[i]) + 1
        ids = self.token_set.document(i)[:last]
        scored = np.ones(last, bool) if self.data.scored == "everything" else self.token_set.answers(i)[:last]
        return ids, scored

    def _kept(self, i: int) -> bool:
        """Whether a conversation that is too long is used all the same, its end cut off."""
        return self.data.too_long == "truncate" and bool(self._learned(i)[1][1:].any())


def pack(items: np.ndarray, sizes: np.ndarray, room: int) -> list[np.ndarray]:
    """Items (n,) of sizes (n,), 0 < size ≤ room, into rows of `room` places: the largest first, each into the fullest
    row that has room, else into a new one. The same sizes give the same rows."""
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}
    spaces: list[int] = []
    """Places left in open rows, ascending, each once."""
    for at in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[at])
        found = bisect.bisect_left(spaces, size)
        if found < len(spaces):
            space = spaces[found]
            row = open_rows[space].pop()
            if not open_rows[space]:
                del open_rows[space]
                spaces.pop(found)
        else:
            space, row = room, len(rows)
            rows.append([])
        rows[row].append(int(items[at]))
        if space > size:
            if space - size not in open_rows:
                bisect.insort(spaces, space - size)
            open_rows.setdefault(space - size, []).append(row)
    return [np.array(row, np.int64) for row in rows]

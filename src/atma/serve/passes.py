"""Passes over drafts: copies of a few rows read several tokens at once, and become the rows if the tokens were right.

A row stands where it stood until its copy is put in its place, so nothing is ever taken back: what a copy read of a
draft that was wrong is forgotten with it. Its keys lie behind the row's length, where the next tokens' are written.
Passes are recorded as steps are (recording.py), by width and number of rows, those of one row at the start.
"""

from collections.abc import Sequence as Many

import torch
from torch import Tensor

from atma.decoding import take
from atma.serve.adapters import NONE as BARE
from atma.serve.carry import Carried, Standing, row
from atma.serve.recording import Copy
from atma.serve.sequence import Sequence
from atma.serve.writing import Writing, copied

ROWS = 4
"""Texts that draft at once: with more rows a step is bound by its products, and reading a token in a pass takes as long
as in a step."""

PROGRAMS = 16
"""Recorded passes that there is room for."""

TOKENS = 32
"""Of all rows of a pass together."""


class Passes:
    """Room for the copies of `ROWS` rows. `drafted`: tokens of a draft at the most."""

    def __init__(self, writing: Writing, drafted: int) -> None:
        self.writing, self.carrier, self.pool = writing, writing.carrier, writing.pool
        self.widths = [1 << n for n in range(1, 12) if 1 << n <= drafted + 1]
        """Tokens of a row that are read at once: the last of the text, and those of its draft."""
        self._rows: Carried = tuple(x.expand(ROWS, *x.shape[1:]).clone() for x in self.carrier.empty())
        device, served = writing.served.device, writing.served
        self._tokens = torch.zeros(max(TOKENS, self.widths[-1]), dtype=torch.long, device=device)
        self._lengths = torch.zeros(ROWS, dtype=torch.int32, device=device)
        self._table = torch.zeros(ROWS, self.pool.count, dtype=torch.int32, device=device)
        self._hidden = torch.zeros(ROWS, served.config.width, dtype=served.dtype, device=device)
        self._worn = torch.full((ROWS,), BARE.slot, dtype=torch.int32, device=device)
        self._copies = [[x[i : i + 1] for x in (*self._rows, self._hidden)] for i in range(ROWS)]
        self._sequences: list[Sequence] = []
        self._positions: list[int] = []

    @property
    def bytes(self) -> int:
        """Of the copies."""
        return sum(x.nbytes for x in (*self._rows, self._tokens, self._lengths, self._table, self._hidden, self._worn))

    def prepare(self) -> None:
        """Record the passes of one row before anybody waits for them; what they write into pages is written anew."""
        if self.writing.recordings.possible:
            for width in (1, *self.widths):
                self.record(1, width)

    def take(self, sequences: Many[Sequence]) -> None:
        """Copy the rows of these, at most `ROWS`."""
        self._sequences = list(sequences)
        self._positions = [sequence.position for sequence in sequences]
        for at, sequence in enumerate(sequences):
            torch._foreach_copy_(self._copies[at], self.writing.carried(sequence))  # pyright: ignore[reportPrivateImportUsage]
            self._table[at], self._worn[at] = self.writing.table(sequence)[0], sequence.adapter

    def read(self, tokens: Many[list[int]]) -> Tensor:
        """The copies read these, as many each. Logits (rows, T, V) after every token, for now."""
        count, width = len(tokens), len(tokens[0])
        self._tokens[: count * width] = torch.tensor(tokens, device=self._tokens.device).flatten()
        self._lengths[:count] = torch.tensor(self._positions, dtype=torch.int32, device=self._tokens.device)
        key, recordings = ("pass", count, width), self.writing.recordings
        logits = recordings.replay(key)
        if logits is None:
            logits = self.record(count, width) if recordings.due(key) else None
            logits = self._eager(count, width) if logits is None else logits
        self._positions = [position + width for position in self._positions]
        return logits.unflatten(0, (count, width))

    def read_on(self, sequence: Sequence, end: int) -> None:
        """The one copy reads the tokens of its text up to `end`, in few passes."""
        while (left := end - self._positions[0]) > 0:
            width, at = 1 << (left.bit_length() - 1), self._positions[0]
            self.read([sequence.tokens[at : at + width]])

    def put(self, sequence: Sequence) -> None:
        """The row of a sequence becomes its copy."""
        at = self._sequences.index(sequence)
        torch._foreach_copy_(self.writing.carried(sequence), self._copies[at])  # pyright: ignore[reportPrivateImportUsage]
        sequence.position = self._positions[at]

    def standing(self, sequence: Sequence) -> Standing:
        """A copy of where the copy of a row stands."""
        at = self._sequences.index(sequence)
        return Standing(self._positions[at], row(self._rows, at), self._hidden[at].clone())

    def record(self, count: int, width: int) -> Tensor | None:
        """A pass of so many rows and tokens, carried out and recorded. None where that cannot be."""
        fixed = [self._tokens, self._lengths, self._table, self._hidden, self._worn, *self._rows, *self.pool.pools]
        own = [x[:count] for x in (*self._rows, self._lengths)]
        return self.writing.recordings.record(
            ("pass", count, width),
            [slice(count)],
            fixed,
            own,
            lambda some, copy: self._compute(some, width, self._table[some], copy),
        )

    def _eager(self, count: int, width: int) -> Tensor:
        longest = min(self.pool.count, 1 + max(max(sequence.pages) for sequence in self._sequences))
        return self._compute(slice(count), width, self._table[:count, :longest], copied)

    def _compute(self, some: slice, width: int, table: Tensor, copy: Copy) -> Tensor:
        served, rows = self.writing.served, tuple(x[some] for x in self._rows)
        state = self.carrier.state(rows, self._lengths[some], table, self.pool)
        tokens = self._tokens[: some.stop * width].view(some.stop, width)
        with served.adapters.rows(self._worn[some]):
            hidden, after = served.model.unchecked(tokens, state)
            logits = served.scores(hidden).flatten(0, 1)
        assert after is not None
        self.carrier.put_back(after, self._positions[some], [s.pages for s in self._sequences[some]], self.pool)
        take(rows, self.carrier.carried(after), copy)
        copy(self._hidden[some], hidden[:, -1])
        return logits

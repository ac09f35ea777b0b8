"""The texts that are being written, as one state in fixed memory: rows join behind the last and leave from anywhere.

The state stays where it is from step to step, keys and values lie in pages, and a row that leaves is replaced by the
last; so a change of membership copies one row, and a step copies nothing. And since memory is fixed, the step of a
number of rows is recorded once, as in `atma.decoding`, and then replayed in one call without Python between kernels.
Rows have nothing to do with one another, so each thread replays the step of its own, and no kernel waits for another.
All these recordings have one arena: one step runs at a time.
"""

import itertools
from collections.abc import Mapping
from collections.abc import Sequence as Many

import torch
from torch import Tensor

from atma.decoding import RECORDED, take, way
from atma.serve.adapters import NONE as BARE
from atma.serve.carry import Carried, Carrier, Standing, row
from atma.serve.exact import Served
from atma.serve.pages import PagePool
from atma.serve.recording import Copy, Recordings
from atma.serve.sequence import Sequence
from atma.serve.settings import Recording

TOGETHER = 32 << 20
"""Bytes of weights up to which threads work side by side on rows of their own, each reading all weights: as many as
processors keep in a cache that they share. With more, threads divide each product's outputs."""

ROWS_OF_A_THREAD = 8
"""Fewer take as long to read the weights for as to compute."""


class Writing:
    """Rows of sequences that all stand before their last token."""

    def __init__(self, served: Served, carrier: Carrier, pool: PagePool, max_rows: int, recording: Recording) -> None:
        self.served, self.carrier, self.pool, self.recording = served, carrier, pool, recording
        self.sequences: list[Sequence] = []
        device = served.device
        self._rows: Carried = tuple(x.expand(max_rows, *x.shape[1:]).clone() for x in carrier.empty())
        self._tokens = torch.zeros(max_rows, 1, dtype=torch.long, device=device)
        self._lengths = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._table = torch.zeros(max_rows, pool.count, dtype=torch.int32, device=device)
        self._hidden = torch.zeros(max_rows, served.config.width, dtype=served.dtype, device=device)
        self._worn = torch.full((max_rows,), BARE.slot, dtype=torch.int32, device=device)
        """The adapter of each row."""
        self._positions: list[int] = []
        way_there = served.exact and carrier.recordable and way(device.type, served.dtype) == RECORDED
        self.recordings = Recordings(recording, way_there, served)

    @property
    def recorded_bytes(self) -> int:
        """Of recorded steps: what they share, and the calls of each."""
        return self.recordings.bytes

    def carried(self, sequence: Sequence) -> list[Tensor]:
        """What the row of a sequence carries, and its last hidden state, where these lie."""
        at = self.sequences.index(sequence)
        return [x[at : at + 1] for x in (*self._rows, self._hidden)]

    def table(self, sequence: Sequence) -> Tensor:
        """The pages (1, P) of the row of a sequence, where they lie."""
        at = self.sequences.index(sequence)
        return self._table[at : at + 1]

    def stats(self) -> dict[str, int]:
        """Rows, and bytes of recorded steps."""
        return {"writing": len(self.sequences), "recorded_bytes": self.recorded_bytes}

    def add(self, sequences: Many[Sequence]) -> None:
        """Sequences join, each with what it carries; it is the batch's from now on."""
        for sequence in sequences:
            assert sequence.carried is not None and sequence.hidden is not None
            at = len(self.sequences)
            for own, given in zip(self._rows, sequence.carried, strict=True):
                own[at] = given[0]
            self._hidden[at], self._worn[at] = sequence.hidden[-1], sequence.adapter
            sequence.carried = sequence.hidden = None
            self.sequences.append(sequence)
            self.pages_changed(sequence)

    def drop(self, gone: Many[Sequence]) -> None:
        """Sequences leave; those that are not in the batch are passed over."""
        for sequence in gone:
            if sequence not in self.sequences:
                continue
            at, last = self.sequences.index(sequence), len(self.sequences) - 1
            if at < last:
                for x in (*self._rows, self._hidden, self._table, self._worn):
                    x[at] = x[last]
                self.sequences[at] = self.sequences[last]
            self.sequences.pop()

    def standing(self, sequence: Sequence) -> Standing:
        """A copy of where a sequence stands after a step."""
        at = self.sequences.index(sequence)
        return Standing(sequence.position, row(self._rows, at), self._hidden[at].clone())

    def pages_changed(self, sequence: Sequence) -> None:
        """A sequence has other pages than before."""
        places = torch.tensor(list(sequence.pages), device=self._table.device) % self.pool.count
        pages = torch.tensor(list(sequence.pages.values()), dtype=torch.int32, device=self._table.device)
        self._table[self.sequences.index(sequence), places] = pages

    def step(self) -> Tensor:
        """Every row reads its last token, and stands one further. Logits (rows, V), which the next step overwrites."""
        count = len(self.sequences)
        device = self._tokens.device
        self._tokens[:count, 0] = torch.tensor([s.tokens[-1] for s in self.sequences], device=device)
        self._positions = [s.position for s in self.sequences]
        self._lengths[:count] = torch.tensor(self._positions, dtype=torch.int32, device=device)
        key = "step", count, 1
        logits = self.recordings.replay(key)
        if logits is None:
            logits = self.record(count) if self.recordings.due(key) else None
            logits = self._eager(count) if logits is None else logits
        for sequence in self.sequences:
            sequence.position += 1
        return logits

    def _eager(self, count: int) -> Tensor:
        longest = min(self.pool.count, 1 + max(max(s.pages) for s in self.sequences))
        return self._compute(slice(count), self._table[:count, :longest], copied)

    def _compute(self, some: slice, table: Tensor, copy: Copy) -> Tensor:
        """The model on some rows, what they carry written back by `copy`."""
        rows = tuple(x[some] for x in self._rows)
        state = self.carrier.state(rows, self._lengths[some], table, self.pool)
        with self.served.adapters.rows(self._worn[some]):
            hidden, after = self.served.model.unchecked(self._tokens[some], state)
            logits = self.served.scores(hidden[:, -1])
        assert after is not None
        self.carrier.put_back(after, self._positions[some], [s.pages for s in self.sequences[some]], self.pool)
        take(rows, self.carrier.carried(after), copy)
        copy(self._hidden[some], hidden[:, -1])
        return logits

    def record(self, count: int) -> Tensor | None:
        """A step of `count` rows, carried out and recorded. None where that cannot be: nothing has changed then."""
        parts = self._parts(count)
        if len(parts) > 1 and self.recordings.together is None:
            work = torch.promote_types(self.served.dtype, torch.float32)
            with torch.inference_mode(False):
                size = len(self._tokens), self.served.config.vocab_size
                self.recordings.together = torch.empty(size, dtype=work)
        together = [] if self.recordings.together is None else [self.recordings.together]
        fixed = [self._tokens, self._lengths, self._table, self._hidden, self._worn, *together]
        fixed += [*self._rows, *self.pool.pools]
        own = [x[:count] for x in (*self._rows, self._lengths)]
        return self.recordings.record(
            ("step", count, 1), parts, fixed, own, lambda some, copy: self._compute(some, self._table[some], copy)
        )

    def _parts(self, count: int) -> list[slice]:
        """The rows that each thread works on."""
        small = self.served.packed_bytes <= TOGETHER
        parts = max(1, min(torch.get_num_threads(), count // ROWS_OF_A_THREAD)) if small else 1
        bounds = [count * i // parts for i in range(parts + 1)]
        return [slice(low, high) for low, high in itertools.pairwise(bounds)]


def copied(to: Tensor, source: Tensor) -> None:
    """The `Copy` of a step that is not recorded."""
    to.copy_(source)


def table_of(pages: Many[Mapping[int, int]], device: torch.device) -> Tensor:
    """The pages of each row (rows, P) int32, page n of a text at n mod P; what is no page of a row is 0 and never read.

    P is the least that has room for every row's pages, which are neighbours.
    """
    size = max(map(len, pages))
    table = [[0] * size for _ in pages]
    for of_row, own in zip(table, pages, strict=True):
        for n, page in own.items():
            of_row[n % size] = page
    return torch.tensor(table, dtype=torch.int32, device=device)

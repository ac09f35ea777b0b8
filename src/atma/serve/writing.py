"""The texts that are being written, as one state in fixed memory: rows join behind the last and leave from anywhere.

The state stays where it is from step to step, keys and values lie in pages, and a row that leaves is replaced by the
last; so a change of membership copies one row, and a step copies nothing. And since memory is fixed, the step of a
number of rows is recorded once, as in `atma.decoding`, and then replayed in one call without Python between kernels.
Rows have nothing to do with one another, so each thread replays the step of its own, and no kernel waits for another.
All these recordings have one arena: one step runs at a time.
"""

import itertools
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from typing import NamedTuple

import torch
from torch import Tensor

from atma.decoding import RECORDED, take, way
from atma.ops.native.arena import Arena
from atma.ops.native.beside import Beside
from atma.ops.native.recorder import Program, Recorder, TooLarge, Unrecordable
from atma.serve.adapters import NONE as BARE
from atma.serve.carry import Carried, Carrier, Standing, row
from atma.serve.exact import Served
from atma.serve.pages import PagePool
from atma.serve.sequence import Sequence
from atma.serve.settings import EngineConfig, Recording

OFTEN = 4
"""Steps of a number of rows before that step is recorded: recording takes as long as many steps."""


TOGETHER = 32 << 20
"""Bytes of weights up to which threads work side by side on rows of their own, each reading all weights: as many as
processors keep in a cache that they share. With more, threads divide each product's outputs."""

ROWS_OF_A_THREAD = 8
"""Fewer take as long to read the weights for as to compute."""

NONE = Recording(0, 0)
ENOUGH = 1 << 30


class _Recorded(NamedTuple):
    steps: Beside
    logits: Tensor
    bytes: int


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
        self._recorded: dict[int, _Recorded] = {}
        self._used: dict[int, int] = {}
        self._arena: Arena | None = None
        self._logits: Tensor | None = None
        """Of rows that threads compute in parts."""
        self._too_large: set[int] = set()
        self._positions: list[int] = []
        self._recordable = (
            served.exact and carrier.recordable and way(device.type, served.dtype) == RECORDED and recording.room > 0
        )

    @property
    def recorded_bytes(self) -> int:
        """Of recorded steps: what they share, and the calls of each."""
        return self.shared_bytes + sum(one.bytes for one in self._recorded.values())

    @property
    def shared_bytes(self) -> int:
        """Of what recorded steps share."""
        arena = 0 if self._arena is None else self._arena.bytes
        return arena + (0 if self._logits is None else self._logits.nbytes)

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
        recorded = self._recorded.get(count)
        if recorded is not None:
            self._recorded[count] = self._recorded.pop(count)
            recorded.steps.replay()
            logits = recorded.logits
        else:
            self._used[count] = self._used.get(count, 0) + 1
            often = self._used[count] >= OFTEN and self._recordable and count not in self._too_large
            logits = self.record(count) if often else None
            logits = self._eager(count) if logits is None else logits
        for sequence in self.sequences:
            sequence.position += 1
        return logits

    def _eager(self, count: int) -> Tensor:
        longest = min(self.pool.count, 1 + max(max(s.pages) for s in self.sequences))
        return self._compute(slice(count), self._table[:count, :longest], _copy)

    def _compute(self, some: slice, table: Tensor, copy: Callable[[Tensor, Tensor], object]) -> Tensor:
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
        own = (*self._rows, self._lengths)
        before = [x[:count].clone() for x in own]
        try:
            logits, programs = self._programs(count)
        except Unrecordable as reason:
            if isinstance(reason, TooLarge):
                self._too_large.add(count)
            else:
                self._recordable = False
            for x, old in zip(own, before, strict=True):
                x[:count] = old
            return None
        known = {x.untyped_storage().data_ptr() for x in (*self._fixed(), *self.served.parameters())}
        one = _Recorded(Beside(programs), logits, sum(program.bytes(known) for program in programs))
        if self.shared_bytes + one.bytes > self.recording.room:
            self._too_large.add(count)
        else:
            self._recorded[count] = one
            self._trim()
        return logits

    def _programs(self, count: int) -> tuple[Tensor, list[Program]]:
        """The logits of a step, and for each thread the program of its rows, in its own part of the arena."""
        parts, programs, at = self._parts(count), [], 0
        self._arena = self._arena or Arena(self.recording.shared)
        if len(parts) > 1 and self._logits is None:
            work = torch.promote_types(self.served.dtype, torch.float32)
            with torch.inference_mode(False):
                self._logits = torch.empty(len(self._tokens), self.served.config.vocab_size, dtype=work)
        for some in parts:
            recorder = Recorder(self._fixed(), self._arena, at)
            with torch.inference_mode(False), torch.no_grad(), recorder:
                logits = self._compute(some, self._table[some], recorder.copy)
                if len(parts) > 1 and self._logits is not None:
                    recorder.copy(self._logits[some], logits)
            programs.append(recorder.program())
            at = recorder.end
        return logits if len(parts) == 1 or self._logits is None else self._logits[:count], programs

    def _fixed(self) -> list[Tensor]:
        """What is where it is from step to step."""
        logits = [] if self._logits is None else [self._logits]
        fixed = self._tokens, self._lengths, self._table, self._hidden, self._worn
        return [*fixed, *logits, *self._rows, *self.pool.pools]

    def _parts(self, count: int) -> list[slice]:
        """The rows that each thread works on."""
        small = self.served.packed_bytes <= TOGETHER
        parts = max(1, min(torch.get_num_threads(), count // ROWS_OF_A_THREAD)) if small else 1
        bounds = [count * i // parts for i in range(parts + 1)]
        return [slice(low, high) for low, high in itertools.pairwise(bounds)]

    def _trim(self) -> None:
        """Forget recorded steps that were used longest ago until the rest keep within the room."""
        while self.recorded_bytes > self.recording.room:
            oldest = next(iter(self._recorded))
            del self._recorded[oldest]
            self._used[oldest] = 0


def recording_of(served: Served, carrier: Carrier, config: EngineConfig) -> Recording:
    """What recording a step of every number of rows takes, found by recording one of the most rows."""
    pool = PagePool(carrier.paged, 1, config.page_tokens, served.device)
    batch = Writing(served, carrier, pool, config.max_rows, Recording(ENOUGH, ENOUGH))
    if not (config.recorded_bytes and batch._recordable):
        return NONE
    batch.record(config.max_rows)
    recorded = batch._recorded.get(config.max_rows)
    if recorded is None or batch._arena is None:
        return NONE
    return Recording(batch.shared_bytes + config.max_rows * recorded.bytes, batch._arena.bytes)


def _copy(to: Tensor, source: Tensor) -> None:
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

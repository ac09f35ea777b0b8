"""The texts that are being written, as one state in fixed memory: rows join behind the last and leave from anywhere.

The state stays where it is from step to step, keys and values lie in pages, and a row that leaves is replaced by the
last; so a change of membership copies one row, and a step copies nothing. And since memory is fixed, the step of a
number of rows is recorded once, as in `atma.decoding`, and then replayed in one call without Python between kernels.
Rows have nothing to do with one another, so each thread replays the step of its own, and no kernel waits for another.
"""

import itertools
from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import NamedTuple

import torch
from torch import Tensor

from atma.decoding import RECORDED, way
from atma.ops.native.recorder import Beside, Recorder, Unrecordable
from atma.serve.carry import Carried, Carrier, Standing, row
from atma.serve.exact import Served
from atma.serve.pages import PagePool
from atma.serve.sequence import Sequence

OFTEN = 4
"""Steps of a number of rows before that step is recorded: recording takes as long as many steps."""


TOGETHER = 32 << 20
"""Bytes of weights up to which threads work side by side on rows of their own, each reading all weights: as many as
processors keep in a cache that they share. With more, threads divide each product's outputs."""

ROWS_OF_A_THREAD = 8
"""Fewer take as long to read the weights for as to compute."""


class _Recorded(NamedTuple):
    steps: Beside
    logits: Tensor
    bytes: int


class Batch:
    """Rows of sequences that all stand before their last token; `room` bytes for recorded steps, 0 to record none."""

    def __init__(self, served: Served, carrier: Carrier, pool: PagePool, max_rows: int, room: int) -> None:
        self.served, self.carrier, self.pool, self.room = served, carrier, pool, room
        self.sequences: list[Sequence] = []
        embed = served.model.embed.weight
        self._rows: Carried = tuple(x.expand(max_rows, *x.shape[1:]).clone() for x in carrier.empty())
        self._tokens = torch.zeros(max_rows, 1, dtype=torch.long, device=embed.device)
        self._lengths = torch.zeros(max_rows, dtype=torch.int32, device=embed.device)
        self._table = torch.zeros(max_rows, pool.count, dtype=torch.int32, device=embed.device)
        self._hidden = embed.new_zeros(max_rows, embed.shape[1])
        self._recorded: dict[int, _Recorded] = {}
        self._used: dict[int, int] = {}
        self._recordable = served.exact and way(embed.device.type, embed.dtype) == RECORDED

    @property
    def recorded_bytes(self) -> int:
        """Of recorded steps, beside the engine's budget."""
        return sum(one.bytes for one in self._recorded.values())

    def add(self, sequences: Many[Sequence]) -> None:
        """Sequences join, each with what it carries; it is the batch's from now on."""
        for sequence in sequences:
            assert sequence.carried is not None and sequence.hidden is not None
            at = len(self.sequences)
            for own, given in zip(self._rows, sequence.carried, strict=True):
                own[at] = given[0]
            self._hidden[at] = sequence.hidden[-1]
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
                for x in (*self._rows, self._hidden, self._table):
                    x[at] = x[last]
                self.sequences[at] = self.sequences[last]
            self.sequences.pop()

    def standing(self, sequence: Sequence) -> Standing:
        """A copy of where a sequence stands after a step."""
        at = self.sequences.index(sequence)
        return Standing(sequence.position, row(self._rows, at), self._hidden[at].clone())

    def pages_changed(self, sequence: Sequence) -> None:
        """A sequence has other pages than before."""
        pages = torch.tensor(sequence.pages, dtype=torch.int32, device=self._table.device)
        self._table[self.sequences.index(sequence), : len(pages)] = pages

    def step(self) -> Tensor:
        """Every row reads its last token, and stands one further. Logits (rows, V), which the next step overwrites."""
        count = len(self.sequences)
        device = self._tokens.device
        self._tokens[:count, 0] = torch.tensor([s.tokens[-1] for s in self.sequences], device=device)
        self._lengths[:count] = torch.tensor([s.position for s in self.sequences], dtype=torch.int32, device=device)
        recorded = self._recorded.get(count)
        if recorded is not None:
            self._recorded[count] = self._recorded.pop(count)
            recorded.steps.replay()
            logits = recorded.logits
        else:
            self._used[count] = self._used.get(count, 0) + 1
            often = self._recordable and self.room > 0 and self._used[count] >= OFTEN
            logits = self._record(count) if often else self._eager(count)
        for sequence in self.sequences:
            sequence.position += 1
        return logits

    def _eager(self, count: int) -> Tensor:
        longest = max(len(s.pages) for s in self.sequences)
        return self._compute(slice(count), self._table[:count, :longest], _copy)

    def _compute(self, some: slice, table: Tensor, copy: Callable[[Tensor, Tensor], object]) -> Tensor:
        """The model on some rows, what they carry written back by `copy`."""
        rows = tuple(x[some] for x in self._rows)
        state = self.carrier.state(rows, self._lengths[some], table, self.pool)
        hidden, after = self.served.model.unchecked(self._tokens[some], state)
        assert after is not None
        logits = self.served.logits(hidden[:, -1])
        for own, new in zip(rows, self.carrier.carried(after), strict=True):
            if own.data_ptr() != new.data_ptr():
                copy(own, new)
        copy(self._hidden[some], hidden[:, -1])
        return logits

    def _record(self, count: int) -> Tensor:
        """A step carried out and recorded. Where that cannot be, it is carried out as ever, as are all that follow."""
        fixed, parts = [self._tokens, self._lengths, self._table, self._hidden, *self._rows], self._parts(count)
        before, programs = tuple(x[:count].clone() for x in self._rows), []
        whole = self._logits_of(count) if len(parts) > 1 else None
        try:
            for some in parts:
                with torch.inference_mode(False), torch.no_grad(), Recorder(fixed) as recorder:
                    logits = self._compute(some, self._table[some], recorder.copy)
                    if whole is not None:
                        recorder.copy(whole[some], logits)
                programs.append(recorder.program())
        except Unrecordable:
            self._recordable = False
            for own, old in zip(self._rows, before, strict=True):
                own[:count] = old
            return self._eager(count)
        known = {x.untyped_storage().data_ptr() for x in (*fixed, *self.served.parameters())}
        logits = logits if whole is None else whole
        used = sum(program.bytes(known) for program in programs) + (0 if whole is None else whole.nbytes)
        self._recorded[count] = _Recorded(Beside(programs), logits, used)
        self._trim()
        return logits

    def _logits_of(self, count: int) -> Tensor:
        """Room for the logits of rows that threads compute in parts."""
        work = torch.promote_types(self._hidden.dtype, torch.float32)
        with torch.inference_mode(False):
            return torch.empty(count, self.served.model.config.vocab_size, dtype=work)

    def _parts(self, count: int) -> list[slice]:
        """The rows that each thread works on."""
        small = sum(x.nbytes for x in self.served.parameters()) <= TOGETHER
        parts = max(1, min(torch.get_num_threads(), count // ROWS_OF_A_THREAD)) if small else 1
        bounds = [count * i // parts for i in range(parts + 1)]
        return [slice(low, high) for low, high in itertools.pairwise(bounds)]

    def _trim(self) -> None:
        """Forget recorded steps that were used longest ago until the rest keep within the room."""
        while self.recorded_bytes > self.room:
            oldest = next(iter(self._recorded))
            del self._recorded[oldest]
            self._used[oldest] = 0


def _copy(to: Tensor, source: Tensor) -> None:
    to.copy_(source)


def table_of(pages: Many[Many[int]], device: torch.device) -> Tensor:
    """The pages of each row (rows, longest) int32; what is beyond a row's own is 0 and never read."""
    longest = max(map(len, pages))
    return torch.tensor([[*own, *[0] * (longest - len(own))] for own in pages], dtype=torch.int32, device=device)

"""The texts that are being written, as one state whose rows join and leave between steps.

The state stays as it is from step to step; only a change of membership copies it, without keys and values, which lie in
pages. A step therefore copies what is new, and nothing else.
"""

from collections.abc import Sequence as Many

import torch
from torch import Tensor

from atma.serve.carry import Carried, Carrier, Standing, join, keep, row
from atma.serve.exact import Served
from atma.serve.pages import PagePool
from atma.serve.sequence import Sequence


class Batch:
    """Rows of sequences that all stand before their last token."""

    def __init__(self, served: Served, carrier: Carrier, pool: PagePool) -> None:
        self.served, self.carrier, self.pool = served, carrier, pool
        self.sequences: list[Sequence] = []
        self._carried: Carried | None = None
        self._hidden: Tensor | None = None
        self._table: Tensor | None = None
        self._device = served.model.embed.weight.device

    def add(self, sequences: Many[Sequence]) -> None:
        """Sequences join, each with what it carries; it is the batch's from now on."""
        parts = [] if self._carried is None or self._hidden is None else [(*self._carried, self._hidden)]
        for sequence in sequences:
            assert sequence.carried is not None and sequence.hidden is not None
            parts.append((*sequence.carried, sequence.hidden))
            sequence.carried = sequence.hidden = None
        if sequences:
            *carried, self._hidden = join(parts)
            self._carried = tuple(carried)
            self.sequences += sequences
            self._table = None

    def drop(self, gone: Many[Sequence]) -> None:
        """Sequences leave; those that are not in the batch are passed over."""
        rows = [i for i, sequence in enumerate(self.sequences) if sequence not in gone]
        if len(rows) == len(self.sequences):
            return
        self.sequences = [self.sequences[i] for i in rows]
        self._carried = keep(self._carried, rows) if rows and self._carried is not None else None
        self._hidden = self._hidden[rows] if rows and self._hidden is not None else None
        self._table = None

    def standing(self, sequence: Sequence) -> Standing:
        """A copy of where a sequence stands after a step."""
        assert self._carried is not None and self._hidden is not None
        at = self.sequences.index(sequence)
        return Standing(sequence.position, row(self._carried, at), self._hidden[at].clone())

    def pages_changed(self) -> None:
        """A sequence has a page more."""
        self._table = None

    def step(self) -> Tensor:
        """Every row reads its last token. Hidden states (rows, D); each row then stands one further."""
        tokens = torch.tensor([[s.tokens[-1]] for s in self.sequences], device=self._device)
        assert self._carried is not None
        if self._table is None:
            self._table = table_of([s.pages for s in self.sequences], self._device)
        state = self.carrier.state(self._carried, [s.position for s in self.sequences], self._table, self.pool)
        hidden, after = self.served(tokens, state)
        self._carried = self.carrier.carried(after)
        for sequence in self.sequences:
            sequence.position += 1
        self._hidden = last = hidden[:, -1]
        return last


def table_of(pages: Many[Many[int]], device: torch.device) -> Tensor:
    """The pages of each row (rows, longest) int32; what is beyond a row's own is 0 and never read."""
    longest = max(map(len, pages))
    return torch.tensor([[*own, *[0] * (longest - len(own))] for own in pages], dtype=torch.int32, device=device)

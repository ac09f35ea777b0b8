"""Who is taken in, who reads how much in a step, and who makes room: policy alone, without a tensor.

Order is that of arrival. Three bounds keep it fair. A sequence that does not fit yet may be passed by later ones
`overtakes` times, then nobody passes it. Of a step's tokens for prompts the one that came first gets at least half, the
shortest rest what is left, so that a long prompt holds nobody up and is itself at most half as fast. A sequence that
has written `quantum` tokens gives its row to one that waits for a row, and queues again behind all others; if its state
had been lost it first writes as many tokens as it had to read again, so that turns cost at most as much as they
bring.
"""

import bisect
from collections.abc import Callable
from collections.abc import Sequence as Many

from atma.serve.request import RequestError
from atma.serve.sequence import Sequence

ASIDE = 48
"""Tokens of a step for texts that ask for a vector, while there are others: a chat beside them hardly waits."""


class Scheduler:
    """Sequences that wait, and those taken in (`running`), each in the order of their tickets."""

    def __init__(self, max_rows: int, max_waiting: int, overtakes: int, quantum: int) -> None:
        self.max_rows, self.max_waiting, self.overtakes, self.quantum = max_rows, max_waiting, overtakes, quantum
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._tickets = 0

    def stats(self) -> dict[str, int]:
        """Sequences that wait, and that run."""
        return {"waiting": len(self.waiting), "running": len(self.running)}

    def add(self, sequences: Many[Sequence]) -> None:
        """All choices of a new request. RequestError "queue_full" if there is not a place for each."""
        if len(self.waiting) + len(sequences) > self.max_waiting:
            taken = f"{len(self.waiting)} of {self.max_waiting} places are taken"
            raise RequestError("queue_full", f"{len(sequences)} more cannot wait: {taken}; try again later")
        for sequence in sequences:
            self._last(sequence)

    def of(self, identity: str) -> list[Sequence]:
        """The choices of a request that have not ended."""
        return [sequence for sequence in (*self.waiting, *self.running) if sequence.id == identity]

    def clear(self) -> None:
        """Nobody waits or runs any more."""
        self.waiting, self.running = [], []

    def requeue(self, sequence: Sequence, last: bool) -> None:
        """A running sequence waits again, in its old place or behind all others."""
        self.running.remove(sequence)
        if last:
            self._last(sequence)
        else:
            bisect.insort(self.waiting, sequence, key=lambda s: s.ticket)

    def remove(self, sequence: Sequence) -> None:
        """A sequence has ended."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)

    def take_in(self, fits: Callable[[Sequence], bool]) -> list[Sequence]:
        """Move to `running` whoever has a turn and fits; `fits` reserves what it needs when it says yes."""
        taken, passed = [], []
        for sequence in [sequence for sequence in self.waiting if not sequence.waits]:
            if len(self.running) >= self.max_rows or any(s.passed >= self.overtakes for s in passed):
                break
            if fits(sequence):
                self._enter(sequence)
                taken.append(sequence)
            elif not sequence.waits:
                passed.append(sequence)
        return taken

    def reading(self, tokens: int, beside: bool = False) -> list[tuple[Sequence, int]]:
        """How many tokens of a step each sequence that still reads may read; `beside`: while others are written.

        Those that ask for a vector alone get at most ASIDE of them where anybody else reads or is written.
        """
        rest = [s for s in self.running if s.position < s.target]
        vectors, rest = [s for s in rest if s.request.embed], [s for s in rest if not s.request.embed]
        given, left = {}, min(tokens, ASIDE) if rest or beside else tokens
        for sequence in vectors:
            if left > 0:
                given[sequence] = min(sequence.target - sequence.position, left)
                left -= given[sequence]
        return list((given | _shared(rest, tokens - sum(given.values()))).items())

    def last_to_come(self) -> Sequence | None:
        """Whoever came last makes room for the others; None for nobody."""
        return max(self.running, key=lambda s: s.ticket, default=None)

    def spent(self) -> Sequence | None:
        """A sequence that has had its turn while another waits for a row; None for nobody."""
        if len(self.running) < self.max_rows or all(s.waits for s in self.waiting):
            return None
        over = {s: s.written - s.turn - max(self.quantum, s.reread) for s in self.running}
        most = max(self.running, key=lambda s: over[s])
        return most if over[most] >= 0 else None

    def _enter(self, sequence: Sequence) -> None:
        at = self.waiting.index(sequence)
        for passed in self.waiting[:at]:
            passed.passed += not passed.waits
        del self.waiting[at]
        sequence.leader = None
        sequence.turn, sequence.reread, sequence.passed = sequence.written, 0, 0
        bisect.insort(self.running, sequence, key=lambda s: s.ticket)

    def _last(self, sequence: Sequence) -> None:
        self._tickets += 1
        sequence.ticket = self._tickets
        self.waiting.append(sequence)


def _shared(rest: Many[Sequence], tokens: int) -> dict[Sequence, int]:
    """So many tokens for those that read: half for whoever came first, what is left for the shortest rest."""
    if not rest or tokens < 1:
        return {}
    oldest, given = rest[0], {}
    given[oldest] = min(oldest.target - oldest.position, max(1, -(-tokens // 2)))
    tokens -= given[oldest]
    for sequence in sorted(rest[1:], key=lambda s: (s.target - s.position, s.ticket)):
        if tokens > 0:
            given[sequence] = min(sequence.target - sequence.position, tokens)
            tokens -= given[sequence]
    given[oldest] += min(tokens, oldest.target - oldest.position - given[oldest])
    return given

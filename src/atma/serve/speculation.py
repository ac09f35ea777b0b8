"""Several tokens of a text in one step: what it says again is drafted (lookup.py), and checked in one pass (passes.py).

Every token is drawn as ever, position by position, from the logits after the tokens before it, with the draw that it
would have had: a draft is right as far as it says the tokens that are drawn. So answers are those without drafts, at
any temperature, with penalties and structures too; where sums run in one order (`Served.exact`) to the last bit. After
a wrong token, what was right is read again from the row as it was. A draft takes no page that is not free, and texts
are written by drafts while they are few.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from operator import eq
from typing import NamedTuple

from torch import Tensor

from atma.sampling import of_tokens
from atma.serve.answers import Answers
from atma.serve.lookup import Lookup
from atma.serve.passes import ROWS, TOKENS, Passes
from atma.serve.request import Logprob
from atma.serve.sampler import drawn
from atma.serve.sequence import Sequence
from atma.serve.settings import EngineConfig
from atma.serve.store import Store
from atma.serve.writing import TOGETHER, Writing

SHORTEST = 4
"""Tokens of a pass at least, where there is room for so many: fewer hardly pay for it."""


@dataclass
class Checked:
    """What became of the texts with drafts."""

    whole: bool = False
    """Whether every text that is written had one: the step is then made for all."""
    written: int = 0
    """Tokens."""
    ended: list[Sequence] = field(default_factory=list)
    failed: list[tuple[Sequence, str]] = field(default_factory=list)


class Speculation:
    """Drafts of the texts that are being written. `counters`: of drafts, their tokens, and the right ones."""

    def __init__(self, writing: Writing, store: Store, answers: Answers, config: EngineConfig) -> None:
        self.writing, self.store, self.answers = writing, store, answers
        self.counters = {"drafts": 0, "draft_tokens": 0, "accepted_tokens": 0}
        self._passes = Passes(writing, config.speculation) if config.speculation else None
        if self._passes is not None:
            self._passes.prepare()
        self._lookups: dict[Sequence, Lookup] = {}

    def step(self) -> Checked:
        """Write the texts that have drafts on, as far as these are right and one token further."""
        passes, texts = self._passes, self.writing.sequences
        if passes is None or not texts:
            return Checked()
        drafts = self._drafts(passes.widths)
        if not drafts:
            return Checked()
        checked = Checked(len(drafts) == len(texts))
        together = self.writing.served.packed_bytes > TOGETHER
        for group in _groups(drafts, together):
            self._check(passes, group, drafts, checked)
        return checked

    def _drafts(self, widths: Many[int]) -> dict[Sequence, list[int]]:
        texts, known = self.writing.sequences, self._lookups
        if len(texts) > ROWS:
            known.clear()
            return {}
        if len(known) > len(texts):
            self._lookups = known = {sequence: known[sequence] for sequence in texts if sequence in known}
        found = {}
        for sequence in texts:
            lookup = known.get(sequence)
            if lookup is None:
                lookup = known[sequence] = Lookup(sequence.tokens)
            room = min(self._room(sequence, len(texts)), 1 + lookup.reach())
            width = max((width for width in widths if width <= room), default=0)
            if width < min(SHORTEST, widths[-1]):
                continue
            taken = self.store.spare(sequence, width)
            if taken is not None:
                if taken:
                    self.writing.pages_changed(sequence)
                found[sequence] = lookup.draft(width - 1)
        return found

    def _room(self, sequence: Sequence, rows: int) -> int:
        """Tokens that may be read at once: up to the answer's last one, and to where a state is to be kept."""
        left = sequence.request.max_tokens - sequence.written
        return self.store.to_boundary(sequence.position, min(left, TOKENS // rows))

    def _check(
        self, passes: Passes, texts: list[Sequence], drafts: dict[Sequence, list[int]], checked: Checked
    ) -> None:
        """One pass over the drafts of these, which are equally long."""
        try:
            passes.take(texts)
            logits = of_tokens(passes.read([[s.tokens[-1], *drafts[s]] for s in texts]), self.answers.tokenizer)
        except Exception as error:  # the texts of this pass end, the engine goes on
            checked.failed.extend((sequence, f"the step failed: {error}") for sequence in texts)
            return
        written = []
        for at, sequence in enumerate(texts):
            try:
                written.append(self._write(sequence, drafts[sequence], logits[at]))
            except Exception as error:  # no token can be drawn, or the tokenizer has no text for it
                checked.failed.append((sequence, str(error)))
        for one in sorted(written, key=lambda one: not one.whole):  # rows that are read again overwrite the copies
            try:
                self._settle(passes, one)
            except Exception as error:
                if one.sequence.finish is None:  # what has ended has its answer
                    checked.failed.append((one.sequence, f"the step failed: {error}"))
                    continue
                one.sequence.request = dataclasses.replace(one.sequence.request, cache=False)
            checked.written += one.count
            if one.sequence.finish is not None:
                checked.ended.append(one.sequence)

    def _write(self, sequence: Sequence, draft: list[int], logits: Tensor) -> "_Written":
        """Tokens of a text as they are drawn, to its end or the first that the draft does not say."""
        count, mark, stream = 0, None, sequence.stream
        for token, scored in self._drawn(sequence, logits):
            if isinstance(token, Exception):
                raise token
            finish, count = self.answers.add(sequence, token, scored), count + 1
            if finish is not None:
                break
            if not stream.held:
                mark = None
                self.store.unmark(sequence)
            elif sequence.request.cache and stream.held <= stream.fresh:
                mark = sequence.position + count
            if draft[count - 1 : count] != [token]:
                break
        right = sum(map(eq, draft, sequence.tokens[-count:]))
        self._lookups[sequence].tell(len(draft), right)
        self.counters["drafts"] += 1
        self.counters["draft_tokens"] += len(draft)
        self.counters["accepted_tokens"] += right
        end = sequence.position + count
        return _Written(sequence, count, end, mark, count > len(draft) and mark in (None, end))

    def _drawn(self, sequence: Sequence, logits: Tensor) -> Iterator[tuple[int | Exception, Logprob | None]]:
        """What comes at each position of logits (T, V), drawn when it is asked for if what came before matters."""
        alone = sequence.adjusts or sequence.guide is not None or not sequence.greedy
        for some in logits.split(1) if alone else [logits]:
            tokens, scored = drawn(some, [sequence] * len(some), self.answers.tokenizer.eot)
            yield from ((token, scored.get(i)) for i, token in enumerate(tokens))

    def _settle(self, passes: Passes, one: "_Written") -> None:
        """See to it that the row of a text stands before its last token, and that what is to be kept is."""
        sequence, stream, store = one.sequence, one.sequence.stream, self.store
        stopped = stream.stopped and (one.mark is not None or store.marked(sequence))
        stands = sequence.finish is None or (sequence.request.cache and not stopped)
        mark = one.mark if sequence.finish is None or stream.stopped else None
        places = [*([] if mark is None else [mark]), *([one.end] if stands else [])]
        if not one.whole and places:
            passes.take([sequence])
        for place in places:
            if not one.whole:
                passes.read_on(sequence, place)
            if place == mark:
                store.mark(sequence, passes.standing(sequence))
        if stands:
            passes.put(sequence)
        if sequence.finish is None and store.wanted(sequence):
            store.keep(sequence, self.writing.standing(sequence))


class _Written(NamedTuple):
    """A text with the tokens that a pass has brought."""

    sequence: Sequence
    count: int
    end: int
    """Where its state is to stand."""
    mark: int | None
    """Where it stood before the token that began what is held back."""
    whole: bool
    """Whether the copy of its row stands there."""


def _groups(drafts: dict[Sequence, list[int]], together: bool) -> Iterable[list[Sequence]]:
    """Texts whose drafts are equally long, or each alone: weights that lie in the processor's cache are read anew at no
    cost, and a pass of one text is recorded once for all of them."""
    by_length: dict[object, list[Sequence]] = {}
    for sequence, draft in drafts.items():
        by_length.setdefault(len(draft) if together else sequence, []).append(sequence)
    return by_length.values()

"""Reading: tokens of several texts into their states, together as far as their cuts allow, keeping states meanwhile."""

from collections.abc import Mapping

import torch
from torch import Tensor

from atma.sampling import of_tokens
from atma.serve.carry import Standing, join
from atma.serve.exact import Served
from atma.serve.request import Logprob
from atma.serve.sampler import scores
from atma.serve.sequence import Sequence
from atma.serve.store import Store
from atma.serve.working import SCORED
from atma.serve.writing import Writing, table_of
from atma.tokenizer import Tokenizer


class Reader:
    """Advances sequences that have their pages and carry their own state. A cut anywhere gives the same states."""

    def __init__(self, served: Served, store: Store, tokenizer: Tokenizer) -> None:
        self.served, self.store, self.tokenizer = served, store, tokenizer
        self.read = 0
        self._device = served.device

    def advance(self, plan: Mapping[Sequence, int]) -> list[tuple[Sequence, Exception]]:
        """So many tokens of each sequence. Returns those that failed; what fails together is tried again one by one."""
        failed, left = [], dict(plan)
        while left:
            some = min(self.store.to_boundary(sequence.position, count) for sequence, count in left.items())
            for sequence, error in self._attempt(list(left), some):
                failed.append((sequence, error))
                del left[sequence]
            for sequence in left:
                left[sequence] -= some
                if self.store.wanted(sequence):
                    self.store.keep(sequence, standing(sequence))
                self.store.slide(sequence)
            left = {sequence: count for sequence, count in left.items() if count}
        return failed

    def _attempt(self, sequences: list[Sequence], count: int) -> list[tuple[Sequence, Exception]]:
        try:
            self._together(sequences, count)
        except Exception as error:  # whatever it is, it ends those whose it is and no others
            if len(sequences) == 1:
                return [(sequences[0], error)]
            return [failure for sequence in sequences for failure in self._attempt([sequence], count)]
        return []

    def _together(self, sequences: list[Sequence], count: int) -> None:
        """One call of the model: the next `count` tokens of each."""
        carrier, starts = self.store.carrier, [s.position for s in sequences]
        tokens = [s.tokens[s.position : s.position + count] for s in sequences]
        parts = [s.carried for s in sequences if s.carried is not None]
        table = table_of([s.pages for s in sequences], self._device)
        carried = join(parts) if len(parts) > 1 else parts[0]
        state = carrier.state(carried, carrier.lengths(starts), table, self.store.pool)
        worn = [s.adapter for s in sequences]
        hidden, after = self.served(torch.tensor(tokens, device=self._device), state, worn)
        carrier.put_back(after, starts, [s.pages for s in sequences], self.store.pool)
        rows = carrier.carried(after)
        for i, sequence in enumerate(sequences):
            sequence.carried = tuple(x[i : i + 1] for x in rows)
            sequence.hidden = hidden[i, -1:].clone()
            sequence.position += count
            sequence.reread += count if sequence.written else 0
            if sequence.scores_prompt:
                self._score(sequence, hidden[i], starts[i])
            if sequence.request.embed == "mean":
                _add(sequence, hidden[i], starts[i])
        self.read += count * len(sequences)

    def _score(self, sequence: Sequence, hidden: Tensor, at: int) -> None:
        """Log-probabilities of the prompt's tokens after those just read (count, D)."""
        if at == 0:
            sequence.prompt_logprobs = [Logprob(sequence.tokens[0], None, ())]
        after = sequence.tokens[at + 1 : min(at + len(hidden) + 1, sequence.prompt_length)]
        for i in range(0, len(after), SCORED):
            some = after[i : i + SCORED]
            logits = of_tokens(self.served.logits(hidden[i : i + len(some)], [sequence.adapter]), self.tokenizer)
            sequence.prompt_logprobs += scores(logits, some, sequence.request.logprobs or 0)


def _add(sequence: Sequence, hidden: Tensor, at: int) -> None:
    """Sum up the hidden states just read (count, D), one after the other, so that cuts change no bit."""
    before = hidden.new_zeros(hidden.shape[-1], dtype=torch.float64) if at == 0 else sequence.total
    assert before is not None
    sequence.total = torch.cat([before[None], hidden.double()]).cumsum(0)[-1]


def standing_of(sequence: Sequence, writing: Writing) -> Standing:
    """A copy of where a sequence stands, which carries its own state or is written."""
    return writing.standing(sequence) if sequence.carried is None else standing(sequence)


def standing(sequence: Sequence) -> Standing:
    """A copy of where a sequence that carries its own state stands."""
    assert sequence.carried is not None and sequence.hidden is not None
    return Standing(sequence.position, tuple(x.clone() for x in sequence.carried), sequence.hidden[-1].clone())

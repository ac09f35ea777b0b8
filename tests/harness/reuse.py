"""How much of what could be reused is: whole conversations held, then repeated exactly, under a budget.

Reusable are the tokens of a prompt's longest beginning after which an unbounded cache has a state: the ends of the
prompts asked so far, the ends of their answers (without the last token, which is never read), and every
`snapshot_tokens` tokens on the way to these. Of a prompt that was asked before that is all of it: its last hidden state
is kept too, so not even its last token is read again.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from atma.serve.engine import Engine
from atma.serve.handle import Output
from atma.serve.request import Request
from tests.harness.conversations import Conversation

TURNS = ("append", "append", "append", "edit", "branch")


class Reusable:
    """Beginnings that a state is kept after, if none is ever let go."""

    def __init__(self, every: int) -> None:
        self.every = every
        self._known: set[bytes] = set()
        self._positions: set[int] = set()

    def of(self, prompt: Sequence[int]) -> int:
        """Tokens of the longest known beginning of `prompt`."""
        tokens = np.asarray(prompt, np.int32)
        below = sorted((p for p in self._positions if p <= len(prompt)), reverse=True)
        return next((p for p in below if tokens[:p].tobytes() in self._known), 0)

    def add(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """A prompt has been answered."""
        tokens = np.asarray([*prompt, *answer], np.int32)
        last = len(tokens) - 1
        positions = {len(prompt), last, *(range(self.every, last + 1, self.every) if self.every else ())}
        self._positions |= positions
        self._known |= {tokens[:p].tobytes() for p in positions}


class Reuse(NamedTuple):
    """Tokens of prompts, those reusable, and those reused; and answers other than the first time."""

    prompts: int
    reusable: int
    reused: int
    other: int

    @property
    def share(self) -> float:
        """Of the reusable tokens; 1 where there are none."""
        return self.reused / self.reusable if self.reusable else 1.0


class Repeats:
    """`count` conversations with an engine, turn about, and each of them again as a whole, in random order."""

    def __init__(self, engine: Engine, corpus: Sequence[int], count: int, seed: int, longest: int = 600) -> None:
        self.engine, self.random = engine, random.Random(seed)
        self.reusable = Reusable(engine.config.snapshot_tokens)
        self.conversations = [
            Conversation(random.Random(self.random.getrandbits(62)), corpus, longest) for _ in range(count)
        ]
        self._asked: list[list[tuple[Request, Output]]] = [[] for _ in self.conversations]

    def hold(self, turns: int) -> Reuse:
        """The first time: a turn of every conversation, then the next."""
        found = []
        for _ in range(turns):
            for conversation, asked in zip(self.conversations, self._asked, strict=True):
                request = conversation.request(conversation.turn(TURNS)[1])
                output, row = self._answer(request)
                conversation.take(list(request.prompt), output.tokens)  # pyright: ignore[reportArgumentType]
                asked.append((request, output))
                found.append(row)
        return _sum(found)

    def repeat(self) -> Reuse:
        """Every conversation again, each turn by turn."""
        found = []
        for asked in self.random.sample(self._asked, len(self._asked)):
            for request, before in asked:
                output, row = self._answer(request)
                same = (output.tokens, output.logprobs) == (before.tokens, before.logprobs)
                found.append(row._replace(other=int(not same)))
        return _sum(found)

    def _answer(self, request: Request) -> tuple[Output, Reuse]:
        prompt = [int(token) for token in request.prompt]
        reusable, handle = self.reusable.of(prompt), self.engine.submit(request)
        while not handle.done:
            self.engine.step()
            if (disk := self.engine.store.disk) is not None:
                disk.flush()  # what is measured is room, not whether the disk keeps up
        output = handle.outputs[0]
        assert output.usage is not None and output.usage.cached <= reusable, (output.usage, reusable)
        self.reusable.add(prompt, output.tokens)
        return output, Reuse(len(prompt), reusable, output.usage.cached, 0)


def _sum(rows: list[Reuse]) -> Reuse:
    return Reuse(*map(sum, zip(*rows, strict=True)))

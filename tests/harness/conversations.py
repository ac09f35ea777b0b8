"""Is what is served what a cold read of the same text gives? Random conversations, every answer compared.

Turns are appended, edited in the middle, asked again and branched; texts are interrupted, states evicted, engines
restarted from disk. Every greedy answer is then read with its prompt in one call, alone and cold: its tokens must be
the most likely ones there, and its log-probabilities the same numbers.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from atma.model import Model
from atma.serve.carry import Carrier
from atma.serve.engine import Engine
from atma.serve.exact import Served
from atma.serve.handle import Output
from atma.serve.pages import PagePool
from atma.serve.request import Request
from atma.serve.sampler import scores
from atma.serve.writing import table_of

Check = Callable[[list[int], Output], None]
KINDS = ("new", "append", "append", "append", "edit", "again", "branch")


class Cold:
    """A model with an empty pool of its own for every text."""

    def __init__(self, model: Model, vocabulary: int, page: int) -> None:
        self.model, self.vocabulary, self.page = model, vocabulary, page
        self.served, self.carrier = Served(model), Carrier(model)

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> Tensor:
        """(T, vocabulary)."""
        pages = -(-len(tokens) // self.page)
        pool = PagePool(self.carrier.paged, pages, self.page, self.served.device)
        table = table_of([{n: n for n in range(pages)}], self.model.embed.weight.device)
        state = self.carrier.state(self.carrier.empty(), self.carrier.lengths([0]), table, pool)
        hidden, _ = self.served(torch.tensor([tokens]), state)
        return self.served.logits(hidden[0])[:, : self.vocabulary]

    def differences(self, prompt: list[int], output: Output) -> tuple[int, int]:
        """Of a greedy answer with log-probabilities: tokens that are not the most likely, and log-probabilities that
        differ in any bit, when prompt and answer are read in one call."""
        logits = self.logits(prompt + output.tokens)[len(prompt) - 1 : -1]
        tokens = logits.argmax(-1).tolist()
        logprobs = [one.logprob for one in scores(logits, output.tokens, 0)]
        wrong = sum(a != b for a, b in zip(tokens, output.tokens, strict=True))
        return wrong, sum(a != b.logprob for a, b in zip(logprobs, output.logprobs, strict=True))


class Conversation:
    """Texts that a conversation has come to, and what is asked of it next; new text is cut from `corpus`.

    Kinds of turns: "new" is another beginning; "append" goes on from a text; "edit" changes it in the middle first,
    "branch" goes on from before its end; "again" asks what was asked before. A prompt has at most `longest` tokens.
    """

    def __init__(self, chance: random.Random, corpus: Sequence[int], longest: int) -> None:
        self.random, self.corpus, self.longest = chance, corpus, longest
        self.texts: list[list[int]] = []
        self.asked: list[list[int]] = []

    def take(self, prompt: list[int], answer: list[int]) -> None:
        """An answer has come."""
        self.texts.append(prompt + answer)
        self.asked.append(prompt)

    def turn(self, kinds: Sequence[str]) -> tuple[str, list[int]]:
        """One of `kinds`, and its prompt; "new" while there is no text."""
        kind = self.random.choice(kinds)
        if kind == "new" or not self.texts:
            return "new", self._new(self.longest // 2)
        text = self.random.choice(self.texts[-6:])
        if kind == "again":
            return kind, self.random.choice(self.asked[-6:])
        if kind == "edit":
            text = text[: self.longest // 2]
            at = self.random.randrange(len(text))
            text = text[:at] + self._new(4) + text[at + 1 :]
        if kind == "branch":
            text = text[: self.random.randint(1, len(text))]
        return kind, (text + self._new(20))[: self.longest]

    def request(self, prompt: list[int]) -> Request:
        """Greedy, with log-probabilities, for 1 to 24 tokens."""
        count = self.random.randint(1, 24)
        return Request(prompt, max_tokens=count, temperature=0, logprobs=0, ignore_end=True)

    def _new(self, most: int) -> list[int]:
        count = self.random.randint(1, most)
        at = self.random.randrange(len(self.corpus) - count)
        return list(self.corpus[at : at + count])


class Trace:
    """One trace of turns over an engine that `make` builds, again after each restart. `check` sees every answer.

    New text is cut from `corpus`; a prompt has at most `longest` tokens.
    """

    def __init__(
        self, make: Callable[[], Engine], seed: int, corpus: Sequence[int], longest: int, check: Check
    ) -> None:
        self.make, self.check = make, check
        self.random = random.Random(seed)
        self.conversation = Conversation(self.random, corpus, longest)
        self.engine = make()
        self.cached = self.read = 0

    def run(self, rounds: int) -> None:
        """Rounds of one to four requests at once, with what happens between them."""
        for _ in range(rounds):
            prompts = [self.conversation.turn(KINDS)[1] for _ in range(self.random.randint(1, 4))]
            handles = [(prompt, self.engine.submit(self.conversation.request(prompt))) for prompt in prompts]
            while not all(handle.done for _, handle in handles):
                self.engine.step()
                if self.random.random() < 0.02 and self.engine.scheduler.running:
                    self.engine._preempt(self.random.choice(self.engine.scheduler.running))
            for prompt, handle in handles:
                self._take(prompt, handle.outputs[0])
            self._between()

    def _take(self, prompt: list[int], output: Output) -> None:
        assert output.usage is not None
        self.cached, self.read = self.cached + output.usage.cached, self.read + len(prompt)
        self.check(prompt, output)
        self.conversation.take(prompt, output.tokens)

    def _between(self) -> None:
        event = self.random.random()
        if event < 0.2:
            for _ in range(self.random.randint(1, 6)):
                self.engine.store.cache.evict()
        elif event < 0.3:
            self.engine.close()
            self.engine = self.make()
        elif event < 0.35:
            config = self.engine.config
            steps = self.random.randint(config.max_rows + 1, 64)
            self.engine.config = dataclasses.replace(config, step_tokens=steps)

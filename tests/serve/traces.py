"""Random conversations: turns appended, edited, asked again, branched; states evicted, engines restarted."""

import dataclasses
import random
from collections.abc import Callable

from atma.serve.engine import Engine
from atma.serve.handle import Output
from atma.serve.request import Request

Check = Callable[[list[int], Output], None]


class Trace:
    """One trace of turns over an engine that `make` builds, again after each restart. `check` sees every answer."""

    def __init__(self, make: Callable[[], Engine], seed: int, longest: int, check: Check) -> None:
        self.make, self.check, self.longest = make, check, longest
        self.random = random.Random(seed)
        self.engine = make()
        self.vocabulary = self.engine.tokenizer.vocab_size
        self.texts: list[list[int]] = []
        self.asked: list[list[int]] = []
        self.cached = self.read = 0

    def run(self, rounds: int) -> None:
        """Rounds of one to four requests at once, with what happens between them."""
        for _ in range(rounds):
            prompts = [self._prompt() for _ in range(self.random.randint(1, 4))]
            handles = [(prompt, self.engine.submit(self._request(prompt))) for prompt in prompts]
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
        self.texts.append(prompt + output.tokens)
        self.asked.append(prompt)

    def _request(self, prompt: list[int]) -> Request:
        count = self.random.randint(1, 24)
        return Request(prompt, max_tokens=count, temperature=0, logprobs=0, ignore_end=True)

    def _new(self, most: int) -> list[int]:
        return [self.random.randrange(self.vocabulary) for _ in range(self.random.randint(1, most))]

    def _prompt(self) -> list[int]:
        kind = self.random.choice(["new", "append", "append", "append", "edit", "again", "branch"])
        if kind == "new" or not self.texts:
            return self._new(self.longest // 2)
        text = self.random.choice(self.texts[-6:])
        if kind == "again":
            return self.random.choice(self.asked[-6:])
        if kind == "edit":
            at = self.random.randrange(len(text))
            text = text[:at] + self._new(4) + text[at + 1 :]
        if kind == "branch":
            text = text[: self.random.randint(1, len(text))]
        return (text + self._new(20))[: self.longest]

    def _between(self) -> None:
        event = self.random.random()
        if event < 0.2:
            for _ in range(self.random.randint(1, 6)):
                self.engine.memory.cache.evict()
        elif event < 0.3:
            self.engine.close()
            self.engine = self.make()
        elif event < 0.35:
            config = self.engine.config
            steps = self.random.randint(config.max_rows + 1, 64)
            self.engine.config = dataclasses.replace(config, step_tokens=steps)

"""Thousands of short conversations through one engine, many at once, every answer compared and every step audited.

Each is a trace of three to six turns: texts are appended to, edited in the middle, asked again, branched. Meanwhile
texts are interrupted, kept states let go, prompts cut otherwise, and the engine closed and built anew on what it left
on disk; what it was then answering is asked again. After every step the bytes that are held are counted, also from the
tensors and the files themselves.
"""

import contextlib
import dataclasses
import random
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from atma.serve.engine import Engine
from atma.serve.handle import Handle, Output
from atma.serve.sequence import Sequence
from tests.harness.conversations import Conversation

TURNS = ("append", "append", "append", "edit", "again", "branch")
Compare = Callable[[list[int], Output], tuple[int, int]]


def held(engine: Engine) -> dict[str, tuple[int, int]]:
    """What is held now, each with its bound, in bytes."""
    config, memory = engine.config, engine.store
    found = {
        "counted by the engine": (memory.used_bytes, config.memory_bytes),
        "tensors": (sum(x.nbytes for x in _tensors(engine)), config.memory_bytes),
        "kept states": (memory.cache.bytes, config.cache_bytes),
    }
    if config.cache_folder is not None:
        found["files"] = _file_bytes(config.cache_folder), config.cache_folder_bytes
    return found


def _file_bytes(folder: Path) -> int:
    """Of whole files, without one that is just being written or removed."""
    total = 0
    for path in list(folder.glob("[!.]*")):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def _tensors(engine: Engine) -> list[Tensor]:
    """All that stays from step to step: every page, used or not, rows, and kept states; without lists of page numbers
    and recorded steps."""
    memory, batch = engine.store, engine.writing
    found = [*memory.pool.pools, *batch._rows, batch._hidden]
    for kept in memory.cache._kept.values():
        found += [*kept.standing.carried, kept.standing.hidden]
    for sequence in engine.scheduler.running:
        found += sequence.carried or ()
    return found


@dataclass
class Found:
    """What came of some traces. `most` has the most bytes held after any step, with their bound."""

    traces: int = 0
    wrong_traces: int = 0
    answers: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    wrong_tokens: int = 0
    wrong_logprobs: int = 0
    steps: int = 0
    turns: Counter[str] = field(default_factory=Counter)
    """How often each kind was asked."""
    traces_with: Counter[str] = field(default_factory=Counter)
    """Traces in which a kind of turn, a restart, or an interruption at random was met at least once."""
    events: Counter[str] = field(default_factory=Counter)
    most: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def exceeded(self) -> list[str]:
        """What was ever above its bound."""
        return [name for name, (most, bound) in self.most.items() if most > bound]


class _Trace:
    """A conversation with the turn it is at."""

    def __init__(self, conversation: Conversation, turns: int) -> None:
        self.conversation, self.left = conversation, turns
        self.prompt: list[int] = []
        self.handle: Handle | None = None
        self.met: set[str] = set()
        self.restarted = self.wrong = False


class Traces:
    """Traces, `together` at once, over an engine that `make` builds, again after each restart.

    `compare` gives of every answer how many tokens and log-probabilities are others than those of a cold read.
    """

    def __init__(
        self, make: Callable[[], Engine], seed: int, corpus: Many[int], compare: Compare, together: int = 24
    ) -> None:
        self.make, self.corpus, self.compare, self.together = make, corpus, compare, together
        self.random = random.Random(seed)
        self.engine = make()
        self.found = Found()
        self._open: list[_Trace] = []

    def run(self, count: int, longest: int = 240) -> Found:
        """So many traces to their ends, with prompts of at most `longest` tokens."""
        left = count
        while left or self._open:
            while left and len(self._open) < self.together:
                chance = random.Random(self.random.getrandbits(62))
                self._open.append(_Trace(Conversation(chance, self.corpus, longest), chance.randint(3, 6)))
                left -= 1
            for trace in self._open:
                if trace.handle is None:
                    self._ask(trace)
            self.engine.step()
            self._audit()
            self._collect()
            self._meanwhile()
        self._count_engine()
        if (disk := self.engine.store.disk) is not None:
            disk.flush()  # nobody writes to the folder any more
        return self.found

    def _ask(self, trace: _Trace) -> None:
        kind, trace.prompt = trace.conversation.turn(TURNS)
        self.found.turns[kind] += 1
        trace.met.add(kind)
        trace.handle = self.engine.submit(trace.conversation.request(trace.prompt))

    def _audit(self) -> None:
        self.found.steps += 1
        for name, (now, bound) in held(self.engine).items():
            self.found.most[name] = max(now, self.found.most.get(name, (0, 0))[0]), bound

    def _collect(self) -> None:
        """Compare what has been answered, and close the traces that have come to their end."""
        for trace in self._open:
            if trace.handle is None or not trace.handle.done:
                continue
            self._take(trace, trace.handle.outputs[0])
            trace.handle, trace.left = None, trace.left - 1
            if not trace.left:
                self.found.traces += 1
                self.found.wrong_traces += trace.wrong
                self.found.traces_with.update(trace.met)
        self._open = [trace for trace in self._open if trace.left]

    def _take(self, trace: _Trace, output: Output) -> None:
        found, usage = self.found, output.usage
        assert usage is not None and output.finish_reason == "length", output
        tokens, logprobs = self.compare(trace.prompt, output)
        trace.wrong = trace.wrong or tokens + logprobs > 0
        found.wrong_tokens, found.wrong_logprobs = found.wrong_tokens + tokens, found.wrong_logprobs + logprobs
        found.answers, found.tokens = found.answers + 1, found.tokens + len(output.tokens)
        found.prompt_tokens, found.cached_tokens = (
            found.prompt_tokens + usage.prompt,
            found.cached_tokens + usage.cached,
        )
        found.events["turns from a kept state"] += usage.cached > 0
        found.events["turns from a state on disk after a restart"] += usage.cached > 0 and trace.restarted
        trace.restarted = False
        trace.conversation.take(trace.prompt, output.tokens)

    def _meanwhile(self) -> None:
        """Now and then, what happens to an engine between two steps."""
        event, running, config = self.random.random(), self.engine.scheduler.running, self.engine.config
        if event < 0.05 and running:
            self._interrupt(self.random.choice(running))
        elif event < 0.08:
            for _ in range(self.random.randint(1, 6)):
                self.found.events["evictions at random"] += self.engine.store.cache.evict()
        elif event < 0.09:
            self.found.events["other cuts of prompts"] += 1
            steps = self.random.randint(config.max_rows + 1, config.max_rows + 128)
            self.engine.config = dataclasses.replace(config, step_tokens=steps)
        elif event < 0.095:
            self._restart()

    def _interrupt(self, sequence: Sequence) -> None:
        self.found.events["interruptions at random"] += 1
        for trace in self._open:
            if trace.handle is not None and trace.handle.id == sequence.id:
                trace.met.add("interruption")
        self.engine._preempt(sequence)

    def _restart(self) -> None:
        self.found.events["restarts"] += 1
        self._count_engine()
        self.engine.close()
        self.engine = self.make()
        for trace in self._open:
            trace.restarted = True
            trace.met.add("restart")
            if trace.handle is not None:
                self.found.events["answers cut by a restart and asked again"] += 1
                trace.handle = self.engine.submit(trace.conversation.request(trace.prompt))

    def _count_engine(self) -> None:
        stats = self.engine.stats()
        self.found.events["interruptions in all"] += stats["preemptions"]
        self.found.events["evictions in all"] += stats["evictions"]
        self.found.events["tokens read"] += stats["read"]

"""START HERE. The engine: many requests through one model, a step at a time.

    engine = Engine(model, tokenizer, EngineConfig())
    handle = engine.submit(Request("def main():", max_tokens=20, temperature=0))
    while not handle.done:
        engine.step()

A step takes in whoever fits, lets prompts be read within the step's tokens, and writes one token of every text that is
being written. Four nouns: a `Request` is what is asked; the `Scheduler` says who is next; the `Writing` is the state of
the texts being written; the `Engine` runs the model and turns tokens into events. Not thread-safe:
`atma.serve.AsyncEngine` gives it a thread of its own.
"""

import secrets
import uuid
from collections.abc import Sequence as Many
from typing import Any

import torch
from torch import Tensor

from atma.hashes import model_hash
from atma.model import Model
from atma.sampling import of_tokens
from atma.serve.adapters import Adapter
from atma.serve.answers import Answers, prompt_tokens
from atma.serve.carry import Carrier
from atma.serve.exact import Served
from atma.serve.guides import Guides, Prepared
from atma.serve.handle import Handle
from atma.serve.reader import Reader, standing_of
from atma.serve.request import Event, Finish, Request, RequestError
from atma.serve.sampler import drawn
from atma.serve.scheduler import Scheduler
from atma.serve.sequence import Sequence
from atma.serve.settings import EngineConfig
from atma.serve.speculation import Speculation
from atma.serve.store import Store
from atma.serve.working import reserve_of
from atma.serve.writing import Writing
from atma.tokenizer import Tokenizer


class Engine:
    """Continuous batching over one model. ValueError: a budget without room, or a tokenizer of another model.

    `keep_model` False takes the model over, which is then of no other use, and holds each weight once; else packed
    copies of the weights are held beside the caller's model. `adapters`: those that a request may name.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        keep_model: bool = True,
        adapters: Many[Adapter] = (),
    ) -> None:
        if tokenizer.vocab_size > model.config.vocab_size:
            told = f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.config.vocab_size}"
            raise ValueError(f"{told}; use the tokenizer that the model was trained with")
        self.config, self.tokenizer = config or EngineConfig(), tokenizer
        weights, carrier = model_hash(model), Carrier(model)
        self.served = Served(model, keep_model, adapters)
        self.store = Store(self.served, carrier, self.config, reserve_of(self.served, carrier, self.config), weights)
        rows, own = self.config.max_rows, self.config
        self.scheduler = Scheduler(rows, own.max_waiting, own.overtakes, own.quantum)
        self.writing = Writing(self.served, carrier, self.store.pool, rows, self.store.budget.recording)
        self.reader = Reader(self.served, self.store, tokenizer)
        self.counters = dict.fromkeys(("steps", "written", "preemptions", "failures", "requests"), 0)
        self.answers, self.guides = Answers(tokenizer), Guides(tokenizer)
        self.speculation = Speculation(self.writing, self.store, self.answers, self.config)
        self._closed = False

    @property
    def busy(self) -> bool:
        """Whether a step would do something. Texts that are paused alone keep nobody busy."""
        waiting = any(not sequence.paused for sequence in self.scheduler.waiting)
        return bool(waiting or self.scheduler.running or self.answers.events)

    def prepare(self, request: Request) -> Prepared:
        """The prompt's tokens; checks everything that does not change. Safe in any thread. RequestError."""
        return self.guides.prepared(prompt_tokens(request, self.tokenizer, self.store.longest_text), request.structure)

    def check_open(self) -> None:
        """RequestError "closed": it takes no more."""
        if self._closed:
            raise RequestError("closed", "the engine is closed")

    def submit(self, request: Request, tokens: Prepared | None = None, keep: bool = True) -> Handle:
        """Queue a request; `tokens` are what `prepare` gave for it. RequestError: refused, or the queue is full.

        `keep` False: its events are read as they come, and the handle holds no answer.
        """
        self.check_open()
        tokens = self.prepare(request) if tokens is None else tokens
        identity = uuid.uuid4().hex if request.id is None else request.id
        if identity in self.answers.handles:
            raise RequestError("invalid", f"a request '{identity}' is under way", "id")
        seed = secrets.randbits(62) if request.seed is None else request.seed
        worn = self.served.adapters.worn(request.adapter)
        choices = [Sequence(request, identity, i, tokens, seed + i, worn) for i in range(request.n)]
        for choice in choices:
            choice.leader = None if choice is choices[0] else choices[0]
            choice.guide = self.guides.begin(tokens, request)
        self.scheduler.add(choices)
        self.counters["requests"] += 1
        return self.answers.open(identity, request.n, keep)

    @torch.inference_mode()
    def pause(self, identity: str) -> None:
        """Write no more of a request for now: its texts give way, their states are kept if there is room."""
        for sequence in self.scheduler.of(identity):
            sequence.paused = True
            if sequence in self.scheduler.running:
                self._preempt(sequence)

    def resume(self, identity: str) -> None:
        """Go on with a paused request."""
        for sequence in self.scheduler.of(identity):
            sequence.paused = False

    def abort(self, identity: str) -> None:
        """End a request and free what it holds; the next step tells. An id that is not under way is passed over."""
        for sequence in self.scheduler.of(identity):
            self._end(sequence, "abort")

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One step for everybody. The events are also in each request's handle."""
        self.counters["steps"] += 1
        if (spent := self.scheduler.spent()) is not None:
            self._preempt(spent, last=True)
        self.scheduler.take_in(self._place)
        self._join()
        self._make_room()
        self._read()
        self._write(alone=self._speculate())
        return self.answers.deliver()

    @torch.inference_mode()
    def close(self) -> list[Event]:
        """Abort what is under way, write kept states to disk if there is a folder, and take no more."""
        self._closed = True
        for identity in list(self.answers.handles):
            self.abort(identity)
        self.store.cache.flush()
        return self.answers.deliver()

    def stats(self) -> dict[str, Any]:
        """Counts since the start, and what is held now; plain numbers."""
        return self.counters | {
            "read": self.reader.read,
            "exact": self.served.exact,
            **self.scheduler.stats(),
            **self.writing.stats(),
            **self.served.adapters.stats(),
            **self.speculation.counters,
            **self.store.stats(),
        }

    def _place(self, sequence: Sequence) -> bool:
        try:
            return self.store.place(sequence, self.scheduler.running)
        except Exception as error:  # a state or a salt that cannot be read costs its own request alone
            self._fail(sequence, f"no place could be made: {error}")
            return False

    def _join(self) -> None:
        """Whoever came back to be written on needs nothing read: it joins the batch as it is."""
        ready = [s for s in self.scheduler.running if s.carried is not None and s.written and s.position == s.target]
        self.writing.add(ready)

    def _make_room(self) -> None:
        """A page for every text that needs one to be written on."""
        full = [(s, 0) for s in self.writing.sequences if s.position // self.store.pool.size not in s.pages]
        for sequence in self._with_pages(full):
            self.writing.pages_changed(sequence)

    def _with_pages(self, plan: list[tuple[Sequence, int]]) -> dict[Sequence, int]:
        """Pages for reading so many tokens of each text; those that came last give way, and are left out."""
        for sequence, count in sorted(plan, key=lambda one: one[0].ticket):
            while sequence in self.scheduler.running:
                if self.store.grow(sequence, count):
                    break
                victim = self.scheduler.last_to_come()
                assert victim is not None
                self._preempt(victim)
        return {sequence: count for sequence, count in plan if sequence in self.scheduler.running}

    def _preempt(self, sequence: Sequence, last: bool = False) -> None:
        """Keep a sequence's state and let it wait again; if that state is lost meanwhile, its tokens are read again."""
        self.counters["preemptions"] += 1
        if sequence.position:
            self.store.keep(sequence, standing_of(sequence, self.writing))
        self.writing.drop([sequence])
        self.store.release(sequence)
        self.scheduler.requeue(sequence, last)

    def _read(self) -> None:
        """What the step's tokens allow of the prompts; a text that had been interrupted is then written on."""
        writing = len(self.writing.sequences)
        plan = self.scheduler.reading(self.config.step_tokens - writing, beside=writing > 0)
        for sequence, error in self.reader.advance(self._with_pages(plan)):
            self._fail(sequence, f"reading failed: {error}")
        self._join()

    def _speculate(self) -> bool:
        """Write texts that repeat something on by drafts. Whether these were all that are being written."""
        checked = self.speculation.step()
        self.counters["written"] += checked.written
        for sequence, reason in checked.failed:
            self._fail(sequence, reason)
        self._leave(checked.ended)
        return checked.whole

    def _write(self, alone: bool) -> None:
        """The first token of texts whose prompts have been read, and unless these are `alone` one of all others."""
        writing, parts = [] if alone else list(self.writing.sequences), []
        if writing:
            try:
                parts.append(of_tokens(self.writing.step(), self.tokenizer))
            except Exception as error:  # the rows of this call end, the engine goes on
                for sequence in writing:
                    self._fail(sequence, f"the step failed: {error}")
                writing = []
        begun = [s for s in self.scheduler.running if s.begins]
        for sequence in begun:
            try:
                self.answers.begin(sequence)
            except Exception as error:  # a prompt that the tokenizer has no text for, a vector that is not finite
                what = "embedded" if sequence.request.embed else "echoed"
                self._fail(sequence, f"the prompt cannot be {what}: {error}")
                continue
            if sequence.request.embed:
                self._leave([sequence])
            elif sequence.request.max_tokens == 0:
                self._end(sequence, "length")
        begun = [s for s in begun if s.finish is None and s.hidden is not None]
        if begun:
            hidden = torch.cat([s.hidden for s in begun if s.hidden is not None])
            parts.append(of_tokens(self.served.logits(hidden, [s.adapter for s in begun]), self.tokenizer))
        if parts:
            self._commit(writing + begun, parts[0] if len(parts) == 1 else torch.cat(parts))
        self.writing.add([s for s in begun if s.finish is None])

    def _commit(self, sequences: list[Sequence], logits: Tensor) -> None:
        """Give each text its next token; end those that have ended."""
        tokens, scored = drawn(logits, sequences, self.tokenizer.eot)
        ended = []
        for i, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
            try:
                if isinstance(token, Exception):
                    raise token
                finish = self.answers.add(sequence, token, scored.get(i))
            except Exception as error:  # none can be drawn, or the tokenizer has no text for it
                self._fail(sequence, error)
                continue
            if finish is not None:
                ended.append(sequence)
                continue
            self._mark(sequence)
            if sequence.carried is None and self.store.wanted(sequence):
                self.store.keep(sequence, standing_of(sequence, self.writing))
        self.counters["written"] += len(sequences)
        self._leave(ended)

    def _mark(self, sequence: Sequence) -> None:
        """Keep the state from before the token that began what is held back, until that is told or ends the text."""
        stream = sequence.stream
        if not stream.held:
            self.store.unmark(sequence)
        elif sequence.request.cache and stream.held <= stream.fresh:
            self.store.mark(sequence, standing_of(sequence, self.writing))

    def _leave(self, ended: list[Sequence]) -> None:
        """Texts that have ended whole: their states are kept, from before a stop text, and all else is freed."""
        for sequence in ended:
            if self.store.marked(sequence):
                continue
            self.store.unmark(sequence)
            kept = self.store.cache.has(sequence.tokens, sequence.position, sequence.salt)
            if sequence.request.cache and not kept:
                self.store.keep(sequence, standing_of(sequence, self.writing))
        self.writing.drop(ended)
        for sequence in ended:
            self.store.release(sequence)
            self.scheduler.remove(sequence)

    def _fail(self, sequence: Sequence, why: str | Exception) -> None:
        self.counters["failures"] += 1
        self._end(sequence, "error", why if isinstance(why, RequestError) else RequestError("failed", str(why)))

    def _end(self, sequence: Sequence, finish: Finish, error: RequestError | None = None) -> None:
        """An end that no token brought: nothing is kept of it."""
        self.answers.end(sequence, finish, error)
        self.store.unmark(sequence)
        self.writing.drop([sequence])
        self.store.release(sequence)
        self.scheduler.remove(sequence)

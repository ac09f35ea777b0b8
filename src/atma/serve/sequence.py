"""One choice of one request on its way: its tokens, where its state stands, and the text that came out."""

import functools

import torch
from torch import Tensor

from atma.serve.adapters import NONE, Worn
from atma.serve.carry import Carried
from atma.serve.guides import Guide
from atma.serve.request import Finish, Logprob, Request, Usage
from atma.text_stream import TextStream


class Sequence:
    """Tokens, of which the state has read the first `position`. While it is written that is all but the last."""

    def __init__(
        self, request: Request, identity: str, index: int, tokens: list[int], seed: int, worn: Worn = NONE
    ) -> None:
        self.request, self.id, self.index = request, identity, index
        self.tokens = list(tokens)
        self.prompt_length = len(tokens)
        self.adapter = worn.slot
        """The place of its adapter among the engine's, −1 for none."""
        self.salt = _salt(request.salt if request.cache else f"{request.salt}\0{identity}", worn.digest)
        self.seed = seed
        self.stream = TextStream(request.stop, through=request.include_stop)
        self.leader: Sequence | None = None
        self.until = len(tokens)
        """Another that reads the first `until` tokens for this one too: it waits for that."""
        self.paused = False
        """Whether it waits for its reader."""
        self.ticket = 0
        """Its place in the order of arrival."""
        self.passed = 0
        """How many later sequences have been taken in before it."""
        self.refused: tuple[int, int, int] | None = None
        """What had been given up and kept when there was last no room for it: until that changes there is none."""
        self.turn = 0
        """Tokens it had written when it was last taken in."""
        self.reread = 0
        """Tokens it has had to read again since then, its state having been lost."""
        self.cached = 0
        self.position = 0
        self.pages: dict[int, int] = {}
        """Those that it reads or is about to write, by their places in the text."""
        self.carried: Carried | None = None
        """What it carries while it reads; while it is written its row of the batch holds that."""
        self.hidden: Tensor | None = None
        self.prompt_logprobs: list[Logprob] = []
        self.total: Tensor | None = None
        """The sum of the hidden states read so far (D,) float64, where their mean is asked for."""
        self.greedy, self.adjusts = request.temperature == 0, request.adjusts
        self.counts: Tensor | None = None
        self.seen: Tensor | None = None
        self.mark: str | None = None
        """The kept state from before what may become a stop text: a next turn goes on from there."""
        self.finish: Finish | None = None
        self.guide: Guide | None = None
        """Where it stands in the structure that was asked for."""

    @functools.cached_property
    def random(self) -> torch.Generator:
        """What it draws from; a greedy text never makes it."""
        return torch.Generator().manual_seed(self.seed)

    @property
    def written(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def target(self) -> int:
        """Where its state must stand before it can be written (on)."""
        return len(self.tokens) - 1 if self.written else self.prompt_length

    @property
    def begins(self) -> bool:
        """Whether its prompt has been read, and its first token comes next."""
        return self.carried is not None and not self.written and self.position == self.target

    @property
    def shares(self) -> bool:
        """Whether its state is kept for others as it is read."""
        return self.request.cache or self.request.n > 1

    @property
    def longest(self) -> int:
        """Positions it may come to hold: the last token is never read."""
        return self.prompt_length + self.request.max_tokens - 1

    @property
    def scores_prompt(self) -> bool:
        """Whether every token of the prompt is to get a log-probability."""
        return self.request.echo and self.request.logprobs is not None and not self.written

    @property
    def reads_all(self) -> bool:
        """Whether every token of the prompt must be read, none taken from a kept state."""
        return self.scores_prompt or self.request.embed == "mean"

    @property
    def embedding(self) -> Tensor | None:
        """The vector (D,) float32 of a prompt that has been read."""
        if self.request.embed == "mean":
            return None if self.total is None else (self.total / self.prompt_length).float()
        return None if self.hidden is None else self.hidden[-1].float()

    @property
    def waits(self) -> bool:
        """Whether its reader has yet to take what was written, or another is reading its beginning."""
        leader = self.leader
        follows = leader is not None and not (leader.finish or leader.written or leader.paused)
        return self.paused or (follows and leader is not None and leader.position < self.until)

    def append(self, token: int) -> None:
        """A token of the answer."""
        self.tokens.append(token)
        if self.guide is not None:
            self.guide.take(token)
        if self.counts is not None:
            self.counts[token] += 1
        if self.seen is not None:
            self.seen[token] = True

    def usage(self) -> Usage:
        return Usage(self.prompt_length, self.cached, self.written)


def _salt(asked: str, digest: str) -> str:
    """What its states are kept under besides tokens: those of each adapter apart, whatever salt is asked for. What
    stands before a first NUL is an adapter's digest."""
    return f"{digest}\0{asked}" if digest or "\0" in asked else asked

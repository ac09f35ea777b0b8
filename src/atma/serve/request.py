"""What is asked of the engine and what it answers: requests, events, and errors with a code a server can map."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

from atma.serve.structure import Structure

Code = Literal["invalid", "too_long", "queue_full", "closed", "failed"]
Finish = Literal["stop", "length", "abort", "error"]

MOST_CHOICES, MOST_LOGPROBS, MOST_STOPS = 128, 100, 64


class RequestError(ValueError):
    """A request that is not served. `code` says why: "invalid" and "too_long" will never work, "queue_full" may later,
    "closed" not by this engine, "failed" began and could not go on. `parameter` names what is to be changed."""

    def __init__(self, code: Code, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.code: Code = code
        self.parameter = parameter

    def renamed(self, parameter: str, name: str) -> "RequestError":
        """The same in the words of an API that calls that parameter so."""
        if self.parameter != parameter:
            return self
        return RequestError(self.code, str(self).replace(f"'{parameter}'", f"'{name}'"), name)


@dataclass(frozen=True)
class Request:
    """One prompt and how to continue it. Filters and penalties as in `atma.settings`; checked by `check`."""

    prompt: str | Sequence[int]
    """Text, which begins a document (after an end-of-text token), or exactly these token ids."""
    max_tokens: int = 256
    """Tokens of an answer at the most."""
    temperature: float = 1.0
    """0 always takes the most likely token."""
    top_k: int = 0
    """Keep only this many of the most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest most likely tokens whose probabilities sum to at least this."""
    min_p: float = 0.0
    """Keep tokens at least this times as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Of tokens in prompt and answer; 1 leaves them."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens in the answer."""
    frequency_penalty: float = 0.0
    """Taken from the logits of tokens in the answer, as often as they are in it."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of tokens, by id; −inf forbids one."""
    seed: int | None = None
    """Equal seeds give equal answers; None draws one. Choice i of `n` has seed + i."""
    n: int = 1
    """Choices: so many answers to the prompt."""
    stop: tuple[str, ...] = ()
    """End before the first of these texts."""
    stop_tokens: tuple[int, ...] = ()
    """End with the first of these tokens, which gives no text."""
    ignore_end: bool = False
    """Go on after the end-of-text token; `stop_tokens` end all the same."""
    min_tokens: int = 0
    """Before so many tokens nothing ends an answer but `max_tokens`: what would is not written, stop texts are not
    looked for."""
    include_stop: bool = False
    """Give the stop text that ended an answer, and the text of a token that did."""
    special: bool = False
    """Spell special tokens in the text, as an echoed prompt's."""
    spelled: tuple[int, ...] = ()
    """Special tokens that an answer spells in any case."""
    logprobs: int | None = None
    """Give each token's log-probability under the model, before penalties and temperature, with this many best."""
    structure: Structure | None = None
    """What the answer must be; log-probabilities are then those of what it allows."""
    embed: Literal["", "last", "mean"] = ""
    """Write nothing, and give a vector: the last hidden state of the prompt, or the mean of all."""
    echo: bool = False
    """Begin the answer with the prompt, with its log-probabilities if these are asked for."""
    cache: bool = True
    """Whether states of this text may come from, and be kept for, other requests."""
    salt: str = ""
    """Only requests of equal salt share states."""
    adapter: str | None = None
    """The name of the adapter that the model wears for it; None is the model alone."""
    id: str | None = None
    """What its events are known by; None makes one."""

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed by penalties, biases or a least length before a token is chosen."""
        penalised = self.presence_penalty != 0 or self.frequency_penalty != 0
        return self.repetition_penalty != 1 or penalised or bool(self.logit_bias) or self.min_tokens > 0

    def check(self) -> None:
        """RequestError "invalid" with the offending value."""
        _require(self.max_tokens >= 0, "max_tokens", self.max_tokens, "0 or more")
        fits = 0 <= self.min_tokens <= self.max_tokens
        _require(fits, "min_tokens", self.min_tokens, f"from 0 to max_tokens, {self.max_tokens}")
        _require(0 <= self.temperature < math.inf, "temperature", self.temperature, "0 or more")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (all) or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        _require(0 < self.repetition_penalty < math.inf, "repetition_penalty", self.repetition_penalty, "above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            _require(math.isfinite(getattr(self, name)), name, getattr(self, name), "finite")
        for token, bias in self.logit_bias.items():
            _require(isinstance(token, int) and token >= 0, "logit_bias", token, "of token ids")
            _require(not math.isnan(bias) and bias < math.inf, "logit_bias", bias, "finite, or -inf to forbid a token")
        _require(self.seed is None or 0 <= self.seed < 2**63, "seed", self.seed, "from 0 to 2^63 − 1")
        _require(1 <= self.n <= MOST_CHOICES, "n", self.n, f"from 1 to {MOST_CHOICES}")
        _require(self.embed in ("", "last", "mean"), "embed", self.embed, "'last', 'mean' or ''")
        alone = not self.embed or (self.n == 1 and not self.echo)
        _require(alone, "embed", self.embed, "without echo and with n 1")
        _require(not isinstance(self.stop, str), "stop", self.stop, "a tuple of texts")
        stops = all(self.stop) and len(self.stop) <= MOST_STOPS
        _require(stops, "stop", self.stop, f"up to {MOST_STOPS} texts, none of them empty")
        whole = all(type(token) is int for token in self.stop_tokens)
        _require(whole, "stop_tokens", self.stop_tokens, "a tuple of token ids")
        top = self.logprobs
        _require(top is None or 0 <= top <= MOST_LOGPROBS, "logprobs", top, f"from 0 to {MOST_LOGPROBS}")


def scored_bytes(best: int) -> int:
    """About what a `Logprob` with so many best tokens holds."""
    return 200 + 130 * best


class Logprob(NamedTuple):
    """Of one `token`: its `logprob` (None for a text's first token), and the `best` tokens with theirs."""

    token: int
    logprob: float | None
    best: tuple[tuple[int, float], ...]


class Usage(NamedTuple):
    """Tokens: of the `prompt`, `cached` ones of these, from a kept state, and of the choice's answer (`completion`)."""

    prompt: int
    cached: int
    completion: int


class Event(NamedTuple):
    """What one step added to one choice: `tokens` and their `text`, with `logprobs` where they were asked for.

    `id` is that of the request, `index` the choice, from 0, `usage` what the choice has come to. Its last event has a
    `finish_reason`, and an `error` where the choice could not go on.
    """

    id: str
    index: int
    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[Logprob, ...] | None = None
    finish_reason: Finish | None = None
    usage: Usage | None = None
    error: RequestError | None = None
    embedding: Tensor | None = None
    """(D,) float32, of a request that asks for one."""
    stop: str | None = None
    """The stop text that ended the choice."""

    @property
    def bytes(self) -> int:
        """About what it holds, while nobody has taken it."""
        logprobs = self.logprobs or ()
        return 350 + 2 * len(self.text) + 32 * len(self.tokens) + sum(scored_bytes(len(one.best)) for one in logprobs)


def _require(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise RequestError("invalid", f"'{name}' must be {rule}, not {value!r}", name)

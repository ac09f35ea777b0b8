"""The bodies of answers, whole and in chunks, for both kinds of completion."""

import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

import atma
from atma.serve.http.feed import Item
from atma.serve.http.tokens import TextLogprobs, TokenNames, chat_logprobs
from atma.serve.request import Event, Logprob, Usage

FINGERPRINT = f"atma-{atma.__version__}"


class Tally:
    """Usage of a request: its prompts counted once each, all its choices' answers."""

    def __init__(self, prompts: int) -> None:
        self._first: list[Usage | None] = [None] * prompts
        self.completion = 0

    def add(self, index: int, event: Event) -> None:
        if event.usage is not None:
            self.completion += event.usage.completion
            if event.index == 0 or self._first[index] is None:
                self._first[index] = event.usage

    @property
    def prompt(self) -> int:
        return sum(usage.prompt for usage in self._first if usage)

    @property
    def cached(self) -> int:
        return sum(usage.cached for usage in self._first if usage)

    @property
    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class Shape(Protocol):
    """How a kind of completion writes its answers: `choice` whole, `delta` in chunks."""

    kind: str
    chunk_kind: str
    prefix: str

    def opening(self) -> dict[str, Any] | None: ...
    def choice(self, position: int, text: str, logprobs: Sequence[Logprob]) -> dict[str, Any]: ...
    def delta(self, position: int, event: Event) -> dict[str, Any]: ...


class ChatShape:
    """chat.completion"""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def __init__(self, names: TokenNames, scored: bool) -> None:
        self.names, self.scored = names, scored

    def opening(self) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def choice(self, position: int, text: str, logprobs: Sequence[Logprob]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(logprobs)}

    def delta(self, position: int, event: Event) -> dict[str, Any]:
        delta = {"content": event.text} if event.text or event.tokens else {}
        return {"delta": delta, "logprobs": self._logprobs(event.logprobs or ()) if event.tokens else None}

    def _logprobs(self, logprobs: Sequence[Logprob]) -> dict[str, Any] | None:
        return chat_logprobs(logprobs, self.names) if self.scored else None


class TextShape:
    """text_completion. `spelled`: whether the text of an echo spells special tokens, as that of token ids does."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl-"

    def __init__(self, names: TokenNames, scored: bool, spelled: bool) -> None:
        self.names, self.scored, self.spelled = names, scored, spelled
        self._offsets: dict[int, TextLogprobs] = {}

    def opening(self) -> dict[str, Any] | None:
        return None

    def choice(self, position: int, text: str, logprobs: Sequence[Logprob]) -> dict[str, Any]:
        return {"text": text, "logprobs": self._logprobs(position, logprobs)}

    def delta(self, position: int, event: Event) -> dict[str, Any]:
        scored = self._logprobs(position, event.logprobs or ()) if event.tokens else None
        return {"text": event.text, "logprobs": scored}

    def _logprobs(self, position: int, logprobs: Sequence[Logprob]) -> dict[str, Any] | None:
        if not self.scored:
            return None
        return self._offsets.setdefault(position, TextLogprobs(self.names)).of(logprobs, self.spelled)


class Answer:
    """One HTTP request's answer as it grows. Choice j of prompt i stands at position i · n + j."""

    def __init__(self, shape: Shape, model: str, prompts: int, n: int) -> None:
        self.shape, self.n, self.choices = shape, n, prompts * n
        self.tally = Tally(prompts)
        self._head = {"id": shape.prefix + uuid.uuid4().hex, "created": int(time.time()), "model": model}
        self._head["system_fingerprint"] = FINGERPRINT
        self._texts = ["" for _ in range(self.choices)]
        self._logprobs: list[list[Logprob]] = [[] for _ in range(self.choices)]
        self._ends: list[str | None] = [None] * self.choices

    def add(self, item: Item) -> None:
        """Take an event into the whole answer."""
        index, event = item
        position = index * self.n + event.index
        self._texts[position] += event.text
        self._logprobs[position] += event.logprobs or ()
        self._ends[position] = event.finish_reason
        self.tally.add(index, event)

    def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = [
            {"index": i} | self.shape.choice(i, text, logprobs) | {"finish_reason": end}
            for i, (text, logprobs, end) in enumerate(zip(self._texts, self._logprobs, self._ends, strict=True))
        ]
        return self._head | {"object": self.shape.kind, "choices": choices, "usage": self.tally.body}

    def openings(self) -> list[dict[str, Any]]:
        """The chunks that come before any text."""
        opening = self.shape.opening()
        if opening is None:
            return []
        return [self._chunk([{"index": i} | opening | {"finish_reason": None}]) for i in range(self.choices)]

    def chunk(self, item: Item) -> dict[str, Any]:
        """The chunk of one event."""
        index, event = item
        self.tally.add(index, event)
        position = index * self.n + event.index
        delta = self.shape.delta(position, event)
        return self._chunk([{"index": position} | delta | {"finish_reason": event.finish_reason}])

    def usage_chunk(self) -> dict[str, Any]:
        """The chunk after the last, for those who ask for it."""
        return self._chunk([]) | {"usage": self.tally.body}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head | {"object": self.shape.chunk_kind, "choices": choices}

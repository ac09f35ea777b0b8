"""The bodies of answers, whole and in chunks, for both kinds of completion."""

import io
import time
import uuid
from array import array
from collections.abc import Sequence
from typing import Any, Protocol

import atma
from atma.serve.http.errors import encoded
from atma.serve.http.feed import Item
from atma.serve.http.tokens import TextLogprobs, TokenNames, chat_logprobs
from atma.serve.request import Event, Usage
from atma.serve.tools.reading import Piece

FINGERPRINT = f"atma-{atma.__version__}"


class Tally:
    """Usage of a request: its prompts counted once each, all its choices' answers."""

    def __init__(self, prompts: int) -> None:
        self._first: list[Usage | None] = [None] * prompts
        self._written: dict[tuple[int, int], int] = {}

    def add(self, index: int, event: Event) -> None:
        if event.usage is not None:
            self._written[index, event.index] = event.usage.completion
            if event.index == 0 or self._first[index] is None:
                self._first[index] = event.usage

    @property
    def completion(self) -> int:
        return sum(self._written.values())

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
    """How a kind of completion writes its answers: `choice` is what the whole has, `delta` what a chunk has; `ids` are
    those of each prompt where token ids are asked for."""

    kind: str
    chunk_kind: str
    prefix: str
    ids: list[list[int]] | None
    ids_of_choices: bool
    """Whether a prompt's are told with each of its choices, or once."""

    copies: int
    """How often an answer that is held to its end is in memory."""

    def opening(self) -> dict[str, Any] | None: ...
    def choice(self, text: str, end: str | None) -> dict[str, Any]: ...
    def delta(self, event: Event) -> dict[str, Any]: ...
    def logprobs(self, position: int, event: Event) -> dict[str, Any] | None: ...
    def token_bytes(self, best: int) -> int: ...


class ChatShape:
    """chat.completion"""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"
    ids_of_choices, copies = False, 1

    def __init__(self, names: TokenNames, scored: bool, ids: list[list[int]] | None = None, begun: str = "") -> None:
        """`begun`: what comes before the text that is written."""
        self.names, self.scored, self.ids, self.begun = names, scored, ids, begun

    def opening(self) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": self.begun}, "logprobs": None}

    def choice(self, text: str, end: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": self.begun + text, "refusal": None}
        return {"message": message, "finish_reason": end}

    def delta(self, event: Event) -> dict[str, Any]:
        return {"delta": {"content": event.text} if event.text or event.tokens else {}}

    def read(self, event: Event) -> list[Piece]:
        """What an event says and calls; each is read once, in their order."""
        return [Piece(event.text)] if event.text else []

    def called(self, index: int = 0) -> bool:
        """Whether what has been read of a choice calls a tool."""
        return False

    def call_id(self, prefix: str = "call_") -> str:
        """A new id of a call."""
        return prefix + uuid.uuid4().hex[:24]

    def logprobs(self, position: int, event: Event) -> dict[str, Any] | None:
        return chat_logprobs(event.logprobs or (), self.names) if self.scored else None

    def token_bytes(self, best: int) -> int:
        """About what a scored token takes in a whole answer."""
        return 120 + 100 * best


class TextShape:
    """text_completion. `echo`: answers begin with the prompt, which spells special tokens if it is `spelled`, as one of
    token ids is, and as all of the text is where that is asked for."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl-"
    ids_of_choices, copies = True, 1

    def __init__(
        self, names: TokenNames, scored: bool, echo: bool, spelled: bool, ids: list[list[int]] | None = None
    ) -> None:
        self.names, self.scored, self.echo, self.spelled, self.ids = names, scored, echo, spelled, ids
        self._offsets: dict[int, TextLogprobs] = {}

    def opening(self) -> dict[str, Any] | None:
        return None

    def choice(self, text: str, end: str | None) -> dict[str, Any]:
        return {"text": text, "finish_reason": end}

    def delta(self, event: Event) -> dict[str, Any]:
        return {"text": event.text}

    def logprobs(self, position: int, event: Event) -> dict[str, Any] | None:
        if not self.scored:
            return None
        echoed = event.text if self.echo and position not in self._offsets else None
        offsets = self._offsets.setdefault(position, TextLogprobs(self.names))
        return offsets.of(event.logprobs or (), echoed, self.spelled)

    def token_bytes(self, best: int) -> int:
        """About what a scored token takes in a whole answer."""
        return 60 + 40 * best


class Scores:
    """Log-probabilities of one choice as JSON text, a tenth of what they take as objects: lists that grow."""

    def __init__(self) -> None:
        self._lists: dict[str, bytearray] = {}
        self._rest: dict[str, Any] = {}

    def add(self, part: dict[str, Any]) -> None:
        """Append each list of `part`; what is no list is the same every time."""
        for key, value in part.items():
            if not isinstance(value, list):
                self._rest[key] = value
                continue
            grown = self._lists.setdefault(key, bytearray())
            if value:
                grown += (b"," if grown else b"") + encoded(value)[1:-1]

    def pieces(self) -> list[bytes]:
        """The JSON object."""
        if not self._lists:
            return [b"null"]
        lists = [piece for key, data in self._lists.items() for piece in (encoded(key) + b":[", bytes(data), b"],")]
        rest = encoded(self._rest)[1:-1]
        lists[-1] = b"]," + rest + b"}" if rest else b"]}"
        return [b"{", *lists]


class Answer:
    """One HTTP request's answer as it grows. Choice j of prompt i stands at position i · n + j."""

    gathers = False
    """Whether it is held to its end though it is streamed."""

    def __init__(self, shape: Shape, model: str, prompts: int, n: int) -> None:
        self.shape, self.n, self.choices = shape, n, prompts * n
        self.tally = Tally(prompts)
        self._head = {"id": shape.prefix + uuid.uuid4().hex, "created": int(time.time()), "model": model}
        self._head["system_fingerprint"] = FINGERPRINT
        self._texts = [io.StringIO() for _ in range(self.choices)]
        self._scores = [Scores() for _ in range(self.choices)]
        self._ends: list[str | None] = [None] * self.choices
        self._ids = [array("i") for _ in range(self.choices)]
        self._told: set[int] = set()
        """Choices whose prompt's ids a chunk has told."""

    def add(self, item: Item) -> None:
        """Take an event into the whole answer."""
        index, event = item
        position = index * self.n + event.index
        self._texts[position].write(event.text)
        self._ends[position] = event.finish_reason
        if self.shape.ids is not None:
            self._ids[position].extend(event.tokens)
        self.tally.add(index, event)
        scored = self.shape.logprobs(position, event)
        if scored is not None:
            self._scores[position].add(scored)

    def whole(self) -> list[bytes]:
        """The body of an answer that is not streamed, in pieces."""
        head = self._head | {"object": self.shape.kind, "usage": self.tally.body}
        if self.shape.ids is not None and not self.shape.ids_of_choices:
            head["prompt_token_ids"] = self.shape.ids[0]
        pieces = [encoded(head)[:-1] + b',"choices":[']
        for i, (text, scores, end) in enumerate(zip(self._texts, self._scores, self._ends, strict=True)):
            choice = {"index": i} | self.shape.choice(text.getvalue(), end)
            choice |= self._with_ids(i, self._ids[i])
            pieces += [b"," * (i > 0) + encoded(choice)[:-1] + b',"logprobs":', *scores.pieces(), b"}"]
        return [*pieces, b"]}"]

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
        scored = self.shape.logprobs(position, event) if event.tokens else None
        rest = {"logprobs": scored, "finish_reason": event.finish_reason} | self._with_ids(position, event.tokens)
        return self._chunk([{"index": position} | rest | self.shape.delta(event)])

    def usage_chunk(self) -> dict[str, Any]:
        """The chunk after the last, for those who ask for it."""
        return self._chunk([]) | {"usage": self.tally.body}

    def _with_ids(self, position: int, written: Sequence[int]) -> dict[str, Any]:
        """The ids of a choice, if they are asked for, with those of its prompt the first time."""
        if self.shape.ids is None:
            return {}
        first = self.shape.ids_of_choices and position not in self._told
        self._told.add(position)
        of_prompt = {"prompt_token_ids": self.shape.ids[position // self.n]} if first else {}
        return of_prompt | {"token_ids": list(written)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = self._head | {"object": self.shape.chunk_kind, "choices": choices}
        if self.shape.ids is not None and not self.shape.ids_of_choices and not self._told:
            self._told.add(-1)
            head["prompt_token_ids"] = self.shape.ids[0]
        return head

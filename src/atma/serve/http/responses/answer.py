"""An answer as OpenAI's Responses have it: items of text and of calls, whole or as the events of a stream."""

import time
import uuid
from collections.abc import Callable
from typing import Any, Literal

from atma.serve.http.answers import Answer, ChatShape
from atma.serve.http.errors import ApiError, encoded
from atma.serve.http.feed import Item
from atma.serve.http.responses.body import NAMES, ResponsesBody
from atma.serve.http.streams import EventStream
from atma.serve.http.tokens import chat_logprobs
from atma.serve.request import Event
from atma.serve.tools.reading import Piece

Status = Literal["in_progress", "completed", "incomplete", "failed"]
CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}
"""How a failed answer tells of a status; of any other as `server_error`."""
Told = dict[str, Any]


class ResponseAnswer(Answer):
    """One answer as it grows; `keep` is given it once it is whole, and says whether it kept it."""

    shape: ChatShape
    gathers = True

    def __init__(
        self,
        shape: ChatShape,
        body: ResponsesBody,
        model: str,
        identity: str,
        keep: Callable[["ResponseAnswer"], bool],
    ) -> None:
        super().__init__(shape, model, 1, 1)
        self.identity, self.output, self.kept = identity, list[Told](), body.store
        self._asked, self._model, self._keep, self._created = body, model, keep, int(time.time())
        self._number, self._status, self._completed = 0, "in_progress", None
        self._error: Told | None = None
        self._parts: list[str] = []
        """Text or arguments of the last item, which grows while it has them."""
        self._scores: list[Told] = []
        self._untold = 0
        """Log-probabilities at the end of `_scores` that no event has told."""
        self._open = False

    def add(self, item: Item) -> None:
        self.take(item[1])

    def whole(self) -> list[bytes]:
        return [encoded(self.ended())]

    def take(self, event: Event) -> list[Told]:
        """Read an event; what a stream tells of it."""
        told = []
        if self.shape.scored and event.logprobs:
            some = chat_logprobs(event.logprobs, self.shape.names)["content"]
            self._scores, self._untold = self._scores + some, self._untold + len(some)
        for piece in self.shape.read(event):
            told += self._piece(piece)
        self.tally.add(0, event)
        if event.finish_reason is not None:
            told += [] if self.output else self._message()
            self._status = "incomplete" if event.finish_reason == "length" else "completed"
            self._completed = int(time.time()) if self._status == "completed" else None
            told += self._close(self._status)
        return told

    def ended(self) -> Told:
        """The whole answer, kept if that is asked for and there is room."""
        self.kept = self.kept and self._keep(self)
        return self.body

    def failed(self, error: ApiError) -> Told:
        """The answer that could not be finished."""
        error = error.renamed(NAMES)
        self._error = {"code": CODES.get(error.status, "server_error"), "message": error.body["error"]["message"]}
        self._status, self.kept, number = "failed", False, self._number
        self._close("incomplete")
        self._number = number  # its item's end is told by this event alone
        return self.body

    def event(self, kind: str, fields: Told) -> Told:
        """The next event of the stream."""
        self._number += 1
        return {"type": f"response.{kind}", "sequence_number": self._number - 1} | fields

    @property
    def ending(self) -> str:
        """The kind of the last event."""
        return self._status

    @property
    def body(self) -> Told:
        """The answer as far as it has come."""
        asked = self._asked
        functions = [tool["function"] for tool in asked.tools]
        cut = {"reason": "max_output_tokens"} if self._status == "incomplete" else None
        return {
            "id": self.identity,
            "object": "response",
            "created_at": self._created,
            "completed_at": self._completed,
            "status": self._status,
            "background": False,
            "error": self._error,
            "incomplete_details": cut,
            "instructions": asked.instructions or None,
            "max_output_tokens": asked.max_output_tokens,
            "max_tool_calls": None,
            "model": self._model,
            "output": self.output,
            "parallel_tool_calls": asked.parallel_tool_calls,
            "previous_response_id": asked.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": self.kept,
            "temperature": asked.temperature,
            "text": {"format": asked.text.said, "verbosity": "medium"},
            "tool_choice": _chosen(asked.tool_choice),
            "tools": [
                {"type": "function", "description": None, "parameters": None, "strict": False} | f for f in functions
            ],
            "top_logprobs": asked.top_logprobs,
            "top_p": asked.top_p,
            "truncation": asked.truncation,
            "usage": None if self._status in ("in_progress", "failed") else self.usage,
            "user": None,
            "metadata": asked.metadata or {},
        }

    @property
    def usage(self) -> Told:
        """Tokens, those of a kept state among the input's."""
        read, written = self.tally.prompt, self.tally.completion
        return {
            "input_tokens": read,
            "input_tokens_details": {"cached_tokens": self.tally.cached, "cache_write_tokens": 0},
            "output_tokens": written,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": read + written,
        }

    def _piece(self, piece: Piece) -> list[Told]:
        told = []
        if piece.content:
            begun = self._open and self.output[-1]["type"] == "message"
            told += [] if begun else [*self._close(), *self._message()]
            scores, self._untold = self._scores[len(self._scores) - self._untold :], 0
            told.append(self._more("output_text.delta", piece.content, content_index=0, logprobs=scores))
        if piece.name is not None:
            told += [*self._close(), self._call(piece.name)]
        if piece.arguments:
            told.append(self._more("function_call_arguments.delta", piece.arguments))
        return told

    def _message(self) -> list[Told]:
        item = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "content": []}
        added = self._begin(item)
        return [added, self._of_item("content_part.added", content_index=0, part=_text("", []))]

    def _call(self, name: str) -> Told:
        item = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "call_id": self.shape.call_id()}
        return self._begin(item | {"name": name, "arguments": ""})

    def _begin(self, item: Told) -> Told:
        self.output.append(item | {"status": "in_progress"})
        self._open = True
        return self._output_item("added", dict(self.output[-1]))

    def _more(self, kind: str, text: str, **fields: Any) -> Told:
        self._parts.append(text)
        return self._of_item(kind, delta=text, **fields)

    def _close(self, status: str = "completed") -> list[Told]:
        """The last item is whole, if it is not yet; `status` is the answer's."""
        if not self._open:
            return []
        item, text = self.output[-1], "".join(self._parts)
        item["status"], self._open, self._parts = status, False, []
        if item["type"] == "function_call":
            item["arguments"] = text
            told = [self._of_item("function_call_arguments.done", arguments=text)]
        else:
            part, self._scores = _text(text, self._scores), []
            item["content"] = [part]
            done = self._of_item("output_text.done", content_index=0, text=text, logprobs=part["logprobs"])
            told = [done, self._of_item("content_part.done", content_index=0, part=part)]
        return [*told, self._output_item("done", item)]

    def _of_item(self, kind: str, **fields: Any) -> Told:
        return self.event(kind, {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1} | fields)

    def _output_item(self, kind: str, item: Told) -> Told:
        return self.event(f"output_item.{kind}", {"output_index": len(self.output) - 1, "item": item})


class ResponseStream(EventStream):
    """The events of an answer, each with its name; there is no mark behind the last."""

    @property
    def response(self) -> ResponseAnswer:
        assert isinstance(self.answer, ResponseAnswer)
        return self.answer

    def _opening(self) -> bytes:
        kinds = ("created", "in_progress")
        return b"".join(_event(self.response.event(kind, {"response": self.response.body})) for kind in kinds)

    def _of(self, item: Item) -> bytes:
        return b"".join(map(_event, self.response.take(item[1])))

    def _ending(self) -> bytes:
        body = self.response.ended()
        return _event(self.response.event(self.response.ending, {"response": body}))

    def _failure(self, error: ApiError) -> bytes:
        body = self.response.failed(error)
        return _event(self.response.event(self.response.ending, {"response": body}))


def _text(text: str, scores: list[Told]) -> Told:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": scores}


def _chosen(choice: Any) -> Any:
    if isinstance(choice, str):
        return choice
    if choice["type"] == "allowed_tools":
        allowed = choice["allowed_tools"]
        return {"type": choice["type"], "mode": allowed["mode"], "tools": [_chosen(one) for one in allowed["tools"]]}
    return {"type": "function", "name": choice["function"]["name"]}


def _event(data: Told) -> bytes:
    return b"event: " + data["type"].encode() + b"\ndata: " + encoded(data) + b"\n\n"

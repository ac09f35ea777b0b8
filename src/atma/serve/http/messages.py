"""Chats in the words of Anthropic's API: the same conversations and answers as `/v1/chat/completions`, other names.

A last message of the assistant is the beginning of the answer. Tools and thinking are not had this way.
"""

import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import Field, ValidationError
from starlette.responses import Response

from atma.serve.http.answers import Answer, ChatShape
from atma.serve.http.bodies import Body, ChatBody
from atma.serve.http.errors import ApiError, encoded, json_response
from atma.serve.http.feed import Item
from atma.serve.http.fields import MOST_MESSAGES, TOKEN, ContentField, StopField
from atma.serve.http.neutral import MESSAGE_ASIDE, asks_nothing, without_nulls
from atma.serve.http.streams import EventStream, while_there
from atma.serve.http.templates import chat_tokens
from atma.serve.request import Event, Usage

if TYPE_CHECKING:
    from atma.serve.http.app import Routes

Role = Literal["user", "assistant"]
CHOICES = ({"type": "auto"}, {"type": "none"})


class Turn(Body):
    """One message; its blocks are of type text."""

    role: Role
    content: ContentField

    @classmethod
    def _asks_nothing(cls, key: str, value: Any) -> bool:
        return key in MESSAGE_ASIDE or without_nulls(value) in ({}, [], "")


# One fewer than a chat has: 'system' is a message of it.
Turns = Annotated[list[Turn], Field(min_length=1, max_length=MOST_MESSAGES - 1, fail_fast=True)]


class CountBody(Body):
    """The body of /v1/messages/count_tokens."""

    model: Annotated[str, Field(max_length=256)] | None = None
    messages: Turns
    system: ContentField = ""

    @classmethod
    def _asks_nothing(cls, key: str, value: Any) -> bool:
        return asks_nothing(key, value) or (key == "tool_choice" and without_nulls(value) in CHOICES)

    def chat(self, fields: Mapping[str, Any]) -> ChatBody:
        """The same conversation, with these fields, in the words of OpenAI's API."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        turns = [{"role": turn.role, "content": turn.content} for turn in self.messages]
        begun = self.messages[-1].role == get_args(Role)[1]
        given = {"model": self.model, "messages": [*system, *turns], "continue_final_message": begun}
        try:
            return ChatBody.model_validate(given | dict(fields))
        except ValidationError as error:
            raise RequestValidationError(error.errors()) from None


class MessagesBody(CountBody):
    """The body of /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1, lt=TOKEN)]
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=TOKEN)] = 0
    stop_sequences: StopField = ()
    stream: bool = False

    def asked(self) -> ChatBody:
        """The same request in the words of OpenAI's API."""
        names = ("max_tokens", "temperature", "top_p", "top_k", "stream")
        return self.chat({name: getattr(self, name) for name in names} | {"stop": list(self.stop_sequences)})


class Message(Answer):
    """One answer as it grows."""

    def __init__(self, shape: ChatShape, model: str, tokens: int, stops: list[str]) -> None:
        super().__init__(shape, model, 1, 1)
        self._stops, self._model, self._text, self._usage = stops, model, "", Usage(tokens, 0, 0)
        self._id, self._stop = f"msg_{uuid.uuid4().hex}", {"stop_reason": None, "stop_sequence": None}

    def add(self, item: Item) -> None:
        event = item[1]
        self.saw(event)
        self._text += event.text
        self.tally.add(0, event)

    def saw(self, event: Event) -> None:
        """Note its usage, and why it ended if it has."""
        self._usage = event.usage or self._usage
        if event.finish_reason is not None:
            own = event.stop if event.stop in self._stops else None
            reason = "max_tokens" if event.finish_reason == "length" else "stop_sequence" if own else "end_turn"
            self._stop = {"stop_reason": reason, "stop_sequence": own}

    @property
    def usage(self) -> dict[str, int]:
        """Tokens of the prompt that were read, those from a kept state apart."""
        prompt, cached, written = self._usage
        read = {"input_tokens": prompt - cached, "cache_read_input_tokens": cached, "cache_creation_input_tokens": 0}
        return read | {"output_tokens": written}

    def body(self, text: str | None) -> dict[str, Any]:
        """The message; without a text its beginning."""
        content = [] if text is None else [{"type": "text", "text": text}]
        head = {"id": self._id, "type": "message", "role": "assistant", "model": self._model, "content": content}
        return head | self._stop | {"usage": self.usage}

    def whole(self) -> list[bytes]:
        return [encoded(self.body(self._text))]

    def ending(self) -> list[dict[str, Any]]:
        """The events after the last text."""
        told = {"type": "message_delta", "delta": self._stop, "usage": self.usage}
        return [{"type": "content_block_stop", "index": 0}, told, {"type": "message_stop"}]


class MessageStream(EventStream):
    """The events of a message, each with its name."""

    ping = b'event: ping\ndata: {"type":"ping"}\n\n'

    @property
    def message(self) -> Message:
        assert isinstance(self.answer, Message)
        return self.answer

    def _opening(self) -> bytes:
        usage = [item[1].usage for item in self.first if item[1].usage is not None][:1]
        if usage:
            self.message.saw(self.first[0][1]._replace(usage=usage[0]._replace(completion=0), finish_reason=None))
        block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
        return _event({"type": "message_start", "message": self.message.body(None)}) + _event(block)

    def _of(self, item: Item) -> bytes:
        event = item[1]
        self.message.saw(event)
        self.message.tally.add(0, event)
        delta = {"type": "text_delta", "text": event.text}
        return _event({"type": "content_block_delta", "index": 0, "delta": delta}) if event.text else b""

    def _ending(self) -> bytes:
        return b"".join(map(_event, self.message.ending()))

    def _failure(self, error: ApiError) -> bytes:
        return _event(error.message_body)


class Messages:
    """The routes."""

    def __init__(self, routes: "Routes") -> None:
        self.routes = routes

    async def answer(self, body: MessagesBody, request: Request) -> Response:
        """Answer a conversation, in the words of Anthropic's API."""
        chat = body.asked()
        asked, shape, name = await self.routes.asked(chat, request)
        answer = Message(shape, self.routes.service.called(chat.model), len(asked.prompt), list(body.stop_sequences))
        return await self.routes.answered([asked], answer, chat, request, name, MessageStream)

    async def count(self, body: CountBody, request: Request) -> Response:
        """How many tokens a conversation is read as."""
        chat = body.chat({})
        ready = self.routes.ready(chat)
        work = chat_tokens(ready.renderer, ready.tokenizer, chat.messages, chat.rendering)
        return json_response({"input_tokens": len(await while_there(request.receive, work))})


def _event(data: dict[str, Any]) -> bytes:
    return b"event: " + data["type"].encode() + b"\ndata: " + encoded(data) + b"\n\n"

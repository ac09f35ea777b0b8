"""Chats in the words of Anthropic's API: the same conversations and answers as `/v1/chat/completions`, other names.

A last message of the assistant is the beginning of the answer. Thinking is not had this way.
"""

import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import Field, ValidationError, model_validator
from starlette.responses import Response

from atma.serve.http.answers import Answer, ChatShape
from atma.serve.http.bodies import Body, ChatBody
from atma.serve.http.errors import ApiError, encoded, json_response
from atma.serve.http.feed import Item
from atma.serve.http.fields import MOST_MESSAGES, TOKEN, ContentField, StopField
from atma.serve.http.message_blocks import (
    BlocksField,
    Choice,
    ChoiceField,
    ToolsField,
    arguments,
    check_results,
    messages,
)
from atma.serve.http.neutral import MESSAGE_ASIDE, Refused, without_nulls
from atma.serve.http.streams import EventStream, while_there
from atma.serve.http.structured import OutputConfig
from atma.serve.request import Event, Usage

if TYPE_CHECKING:
    from atma.serve.http.app import Routes

Role = Literal["user", "assistant"]


class Turn(Body):
    """One message."""

    role: Role
    content: BlocksField

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
    tools: ToolsField = ()
    tool_choice: ChoiceField = Choice()

    @model_validator(mode="after")
    def _answered(self) -> "CountBody":
        try:
            check_results([(turn.role, turn.content) for turn in self.messages])
        except ValueError as error:
            raise Refused(str(error), "messages") from None
        return self

    def chat(self, fields: Mapping[str, Any]) -> ChatBody:
        """The same conversation, with these fields, in the words of OpenAI's API."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        turns = [one for turn in self.messages for one in messages(turn.role, turn.content)]
        begun = self.messages[-1].role == get_args(Role)[1]
        given = {"model": self.model, "messages": [*system, *turns], "continue_final_message": begun}
        given |= {"tools": list(self.tools), "tool_choice": self.tool_choice.chosen}
        given |= {"parallel_tool_calls": self.tool_choice.several}
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
    output_config: OutputConfig = None

    def asked(self) -> ChatBody:
        """The same request in the words of OpenAI's API."""
        names = ("max_tokens", "temperature", "top_p", "top_k", "stream")
        chat = self.chat({name: getattr(self, name) for name in names} | {"stop": list(self.stop_sequences)})
        chat.response_format = self.output_config
        return chat


class Message(Answer):
    """One answer as it grows; what a stream has told of it is not `kept`."""

    shape: ChatShape

    def __init__(self, shape: ChatShape, model: str, tokens: int, stops: list[str], kept: bool) -> None:
        super().__init__(shape, model, 1, 1)
        self._kept, self._stops, self._model, self._usage = kept, stops, model, Usage(tokens, 0, 0)
        self._id, self._stop = f"msg_{uuid.uuid4().hex}", {"stop_reason": None, "stop_sequence": None}
        self._blocks: list[dict[str, Any]] = []
        self._parts: list[str] = []
        """Text or arguments of the last block, which is open while it has no end."""
        self._open = False

    def add(self, item: Item) -> None:
        self.take(item[1])

    def take(self, event: Event) -> list[dict[str, Any]]:
        """Read an event; what a stream tells of it."""
        told = []
        for piece in self.shape.read(event):
            if piece.content:
                if not self._open or self._blocks[-1]["type"] != "text":
                    told += [*self._close(), self._begin({"type": "text", "text": ""})]
                told.append(self._more({"type": "text_delta", "text": piece.content}, piece.content))
            if piece.name is not None:
                block = {"type": "tool_use", "id": self.shape.call_id("toolu_"), "name": piece.name, "input": {}}
                told += [*self._close(), self._begin(block)]
            if piece.arguments:
                delta = {"type": "input_json_delta", "partial_json": piece.arguments}
                told.append(self._more(delta, piece.arguments))
        self.saw(event)
        self.tally.add(0, event)
        if event.finish_reason is not None and not self._blocks:
            told.append(self._begin({"type": "text", "text": ""}))
        return told + (self._close() if event.finish_reason is not None else [])

    def saw(self, event: Event) -> None:
        """Note its usage, and why it ended if it has."""
        self._usage = event.usage or self._usage
        if event.finish_reason is not None:
            own = event.stop if event.stop in self._stops else None
            reason = "max_tokens" if event.finish_reason == "length" else "stop_sequence" if own else "end_turn"
            reason = "tool_use" if reason == "end_turn" and self.shape.called() else reason
            self._stop = {"stop_reason": reason, "stop_sequence": own}

    @property
    def usage(self) -> dict[str, int]:
        """Tokens of the prompt that were read, those from a kept state apart."""
        prompt, cached, written = self._usage
        read = {"input_tokens": prompt - cached, "cache_read_input_tokens": cached, "cache_creation_input_tokens": 0}
        return read | {"output_tokens": written}

    @property
    def body(self) -> dict[str, Any]:
        """The message as far as it has come."""
        head = {"id": self._id, "type": "message", "role": "assistant", "model": self._model}
        return head | {"content": self._blocks} | self._stop | {"usage": self.usage}

    def whole(self) -> list[bytes]:
        return [encoded(self.body)]

    def ending(self) -> list[dict[str, Any]]:
        """The events after the last block."""
        return [{"type": "message_delta", "delta": self._stop, "usage": self.usage}, {"type": "message_stop"}]

    def _begin(self, block: dict[str, Any]) -> dict[str, Any]:
        self._blocks.append(block)
        self._open = True
        return {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": dict(block)}

    def _more(self, delta: dict[str, Any], text: str) -> dict[str, Any]:
        self._parts += [text] if self._kept else []
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _close(self) -> list[dict[str, Any]]:
        if not self._open:
            return []
        block, text = self._blocks[-1], "".join(self._parts)
        block |= {"text": text} if block["type"] == "text" else {"input": arguments(text)}
        self._parts, self._open = [], False
        return [{"type": "content_block_stop", "index": len(self._blocks) - 1}]


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
        return _event({"type": "message_start", "message": self.message.body})

    def _of(self, item: Item) -> bytes:
        return b"".join(map(_event, self.message.take(item[1])))

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
        sizes = len(asked.prompt), list(body.stop_sequences), not body.stream
        answer = Message(shape, self.routes.service.called(chat.model), *sizes)
        return await self.routes.answered([asked], answer, chat, request, name, MessageStream)

    async def count(self, body: CountBody, request: Request) -> Response:
        """How many tokens a conversation is read as."""
        work = self.routes.rendered(body.chat({}))
        return json_response({"input_tokens": len(await while_there(request.receive, work))})


def _event(data: dict[str, Any]) -> bytes:
    return b"event: " + data["type"].encode() + b"\ndata: " + encoded(data) + b"\n\n"

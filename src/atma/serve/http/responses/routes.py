"""The routes of OpenAI's Responses: an answer is asked for, told again, as what it was asked with, and forgotten.

Answers that are kept lie in this process. The name of a conversation stands in its answers' ids, so that a balancer
of several servers can send what goes on from an answer to the one that has it.
"""

import contextlib
import uuid
from collections.abc import Generator
from typing import TYPE_CHECKING, Annotated

from fastapi import Query, Request
from starlette.responses import Response

from atma.serve.http import affinity
from atma.serve.http.errors import ApiError, Body, json_response
from atma.serve.http.neutral import shown
from atma.serve.http.responses.answer import ResponseAnswer, ResponseStream
from atma.serve.http.responses.body import NAMES, ResponsesBody
from atma.serve.http.responses.items import Message, check_calls, messages
from atma.serve.http.responses.listing import MOST, Order, listed, page
from atma.serve.http.responses.store import Kept, Store
from atma.serve.http.room import Room
from atma.serve.http.streams import while_there

if TYPE_CHECKING:
    from atma.serve.http.app import Routes

COPIES, SCORED_COPIES = 2, 8
"""Of an answer, while its last events are written: it stands in four of them, log-probabilities as objects too."""


class Responses:
    """The routes, and the answers that they keep."""

    def __init__(self, routes: "Routes") -> None:
        self.routes, self.store = routes, Store(routes.service.options.stored_bytes)
        self.talks = Room(self.store.total)
        """Of conversations that are gone on from or listed, until that has been answered."""

    async def create(self, body: ResponsesBody, request: Request) -> Response:
        """Answer a conversation, in the words of OpenAI's Responses."""
        before = await self._before(body.previous_response_id, request)
        check_calls(before, body.input)
        chat = body.chat(before)
        with _in_its_words():
            copies = SCORED_COPIES if body.scored else COPIES
            asked, shape, name = await self.routes.asked(chat, request, copies)
            given = affinity.given(request.headers.get(affinity.HEADER))
            name = affinity.of_response(body.previous_response_id) or given or name
            body.store = body.store and affinity.AWAY not in request.scope

            def keep(answer: ResponseAnswer) -> bool:
                return self._keep(answer, [*before, *messages(body.input)])

            identity = affinity.response_id(uuid.uuid4().hex, name)
            answer = ResponseAnswer(shape, body, self.routes.service.called(chat.model), identity, keep)
            return await self.routes.answered([asked], answer, chat, request, name, ResponseStream)

    async def told(self, response_id: str, request: Request, stream: str = "") -> Response:
        """An answer that was kept, once more."""
        if stream.lower() not in ("", "false", "0"):
            told = "'stream': what was streamed is not streamed again; leave it out for the whole answer"
            raise ApiError(400, "invalid_value", told, "stream")
        return Body([self._kept(response_id, request).body])

    async def items(
        self,
        response_id: str,
        request: Request,
        limit: Annotated[int, Query(ge=1, le=MOST)] = 20,
        order: Order = "desc",
        after: Annotated[str, Query(max_length=256)] = "",
    ) -> Response:
        """What an answer that was kept was asked with, the last first: earlier turns too."""
        kept = self._kept(response_id, request)
        await self._room(kept, request)
        own = messages([_given(item) for item in kept.output])
        return json_response(page(listed(response_id, kept.messages[: -len(own)]), limit, order, after))

    async def forget(self, response_id: str, request: Request) -> Response:
        """Keep an answer no longer."""
        self._kept(response_id, request)
        self.store.delete(response_id)
        return json_response({"id": response_id, "object": "response", "deleted": True})

    async def _before(self, identity: str | None, request: Request) -> list[Message]:
        """The conversation up to and with an answer. ApiError: it is not kept."""
        if identity is None:
            return []
        kept = self._found(identity, request)
        if kept is None:
            told = f"'previous_response_id': no response {shown(identity)} is kept here; give the whole conversation"
            raise ApiError(400, "previous_response_not_found", told, "previous_response_id")
        await self._room(kept, request)
        return kept.messages

    def _kept(self, identity: str, request: Request) -> Kept:
        """An answer. ApiError: it is not kept."""
        kept = self._found(identity, request)
        if kept is None:
            raise ApiError(404, "not_found", f"no response {shown(identity)} is kept here", "response_id")
        return kept

    def _found(self, identity: str, request: Request) -> Kept | None:
        """An answer if it is kept. ApiError: the server that would know cannot be asked now."""
        kept = self.store.get(identity)
        if kept is None and request.scope.get(affinity.AWAY):
            raise ApiError(503, "busy", "the server that keeps this conversation cannot be asked now", None, 1)
        return kept

    async def _room(self, kept: Kept, request: Request) -> None:
        """Wait until there is room for the conversation of an answer besides the kept ones."""
        await while_there(request.receive, request.state.call.hold(self.talks, len(kept.talk), "input"))

    def _keep(self, answer: ResponseAnswer, before: list[Message]) -> bool:
        found = [_given(item) for item in answer.output]
        return self.store.put(answer.identity, answer.body, [*before, *messages(found)])


def _given(item: dict) -> dict:
    """An item of an answer as an item of a conversation."""
    if item["type"] == "function_call":
        function = {"name": item["name"], "arguments": item["arguments"]}
        return {"call": {"id": item["call_id"], "type": "function", "function": function}}
    return {"role": "assistant", "content": "".join(part["text"] for part in item["content"])}


@contextlib.contextmanager
def _in_its_words() -> Generator[None, None, None]:
    """Refusals of a chat, with what its fields are called here."""
    try:
        yield
    except ApiError as error:
        raise error.renamed(NAMES) from None

"""The turns of a conversation go to one replica, which keeps their states.

A conversation has a name: the client's `x-atma-affinity`, else the hash of its beginning that the server itself sends
in that header. Ray's consistent hashing gives every name a home. Ray's proxies see headers but no bodies: where their
environment says RAY_SERVE_SESSION_ID_HEADER_KEY=x-atma-affinity, requests with the header arrive at home. Any other
arrives anywhere; its body is read there, and it is passed on if its home is another replica. Where that cannot be asked
it is answered all the same, but not kept: whoever goes on from it is sent home.
"""
# pyright: reportMissingImports=false

import asyncio
import ipaddress
import logging
import os
from typing import NamedTuple

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from ray import serve  # pyright: ignore[reportAttributeAccessIssue] (where ray is not there)
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atma.serve.http import affinity
from atma.serve.http.bodies import ChatBody, CompletionBody
from atma.serve.http.errors import MESSAGES, RESPONSES, ApiError
from atma.serve.http.messages import MessagesBody
from atma.serve.http.metrics import TYPE
from atma.serve.http.responses.body import ResponsesBody
from atma.serve.ray.metrics import merged

LOG = logging.getLogger("atma.serve")
REPLICA = "x-atma-replica"
METRICS_SECONDS = 10.0
PASSED_ON = "atma.passed_on"
SENT = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "client", "server")
BODIES = {"/v1/chat/completions": ChatBody, "/v1/completions": CompletionBody}
BODIES |= {MESSAGES: MessagesBody, RESPONSES: ResponsesBody}


Asked = ChatBody | CompletionBody | MessagesBody | ResponsesBody


class Route(NamedTuple):
    """What the log and the metrics call a request that the routes of this replica do not see."""

    path: str


class Forwarding:
    """ASGI between the guard and the routes of a replica. `most`: requests passed on at once; 0: conversations have no
    home, None: there is no other replica.

    The bound keeps two replicas from waiting for each other: most places of each do work of its own.
    """

    def __init__(self, app: ASGIApp, most: int | None, local: bool) -> None:
        self.app, self.most, self.local = app, most, local
        self._passing = 0
        context = serve.get_replica_context()
        self.replica = context.replica_tag
        handle = serve.get_deployment_handle(context.deployment, context.app_name)
        self._all, self._handle = handle, handle.options(method_name="answer", stream=True)
        key = os.environ.get("RAY_SERVE_SESSION_ID_HEADER_KEY", "")
        self._routed = key.lower().replace("_", "-") == affinity.HEADER

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.local and not _is_local(scope):
            raise ApiError(403, "host", "without an API key this server answers only to its own machine")
        try:
            await self._answer(scope, receive, self._signed(send))
        except asyncio.CancelledError:  # how Ray tells that the client has gone
            scope["state"]["call"].gone = True
            raise

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "GET" and scope["path"] == "/metrics":
            scope["route"] = Route("/metrics")
            await Response(await self._metrics(), media_type=TYPE)(scope, receive, send)
            return
        if self.most is None or scope.get(PASSED_ON, False):
            await self.app(scope, receive, send)
            return
        if not self.most:
            scope[affinity.AWAY] = False
        elif scope["path"].startswith(RESPONSES + "/"):
            name = affinity.of_response(scope["path"].split("/")[3])
            if name is not None and await self._pass_on(name, scope, b"", send):  # it takes no place
                return
        elif scope["method"] == "POST" and scope["path"] in BODIES:
            first = await receive()
            name = self._elsewhere(scope, first["body"], BODIES[scope["path"]])
            if name is not None and self._passing >= self.most:
                scope[affinity.AWAY] = True
            elif name is not None and await self._pass_on(name, scope, first["body"], send):
                return
            receive = _again(first, receive)
        await self.app(scope, receive, send)

    def _elsewhere(self, scope: Scope, body: bytes, model: type[Asked]) -> str | None:
        """The name of the conversation, if its home may be another replica."""
        given = affinity.given(Headers(scope=scope).get(affinity.HEADER))
        here = given if self._routed else None
        if given is not None and model is not ResponsesBody:
            return None if here else given
        try:
            asked = model.model_validate_json(body)
            before = asked.previous_response_id if isinstance(asked, ResponsesBody) else None
            given = affinity.of_response(before) or given
            if given is not None:
                return None if given == here else given
            asked = asked.asked() if isinstance(asked, MessagesBody) else asked
            asked = asked.chat() if isinstance(asked, ResponsesBody) else asked
        except (ValidationError, RequestValidationError, ApiError):
            return None
        if isinstance(asked, ChatBody):
            return affinity.of_messages(asked.messages, asked.cache_salt)
        return affinity.of_prompt(asked.prompt, asked.cache_salt)

    async def _pass_on(self, name: str, scope: Scope, body: bytes, send: Send) -> bool:
        """Whether another replica has answered; if it could not begin to, this one has to."""
        begun = False
        self._passing += 1
        try:
            async with self._handle.options(session_id=name).choose_replica() as chosen:
                if chosen.replica_id == self.replica:
                    return False
                response = self._handle.dispatch(chosen, _sent(scope), body)
                try:
                    async for messages in response:  # pyright: ignore[reportGeneralTypeIssues]
                        begun = True
                        for message in messages:
                            await send(message)
                finally:
                    response.cancel()
        except (RayError, RayServeException) as error:
            if begun:
                raise
            LOG.warning("a conversation's home cannot be reached (%s); answering it here", type(error).__name__)
            scope[affinity.AWAY] = True
            return False
        finally:
            self._passing -= 1
        scope["route"] = Route("passed on")
        return True

    async def _metrics(self) -> bytes:
        """Of every replica that answers; ApiError 503 if one does not, so that no sum is of some alone."""
        asked = self._all.broadcast("metrics")
        told = await asked.results_async(timeout_s=METRICS_SECONDS, return_exceptions=True)
        if missing := sum(isinstance(one, BaseException) for one in told):
            silent = f"{missing} of {len(told)} replicas tell no metrics; ask again later"
            raise ApiError(503, "metrics", silent, None, 1)
        return merged(dict(told))

    def _signed(self, send: Send) -> Send:
        async def signed(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).setdefault(REPLICA, self.replica)
            await send(message)

        return signed


def _sent(scope: Scope) -> Scope:
    """What another replica needs of a request, under the id that it has here."""
    call_id = scope["state"]["call"].id.encode()
    headers = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
    headers.append((b"x-request-id", call_id))
    return {key: scope[key] for key in SENT if key in scope} | {"headers": headers, PASSED_ON: True}


def _again(first: Message, receive: Receive) -> Receive:
    unread = [first]

    async def replay() -> Message:
        return unread.pop() if unread else await receive()

    return replay


def _is_local(scope: Scope) -> bool:
    """Whether the client of Ray's proxy is on the proxy's machine."""
    client = scope.get("client")
    try:
        return client is not None and ipaddress.ip_address(client[0].partition("%")[0]).is_loopback
    except ValueError:
        return False

"""What every request passes before it reaches a route: its id, who may ask, how much it may send, and how it is told.

Nothing of a request's text is ever logged: its id, route, status, sizes and times are.
"""

import asyncio
import logging
import re
import secrets
from collections.abc import Callable, Mapping

import numpy as np
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atma.serve.http.call import Call
from atma.serve.http.errors import MESSAGES, RESPONSES, ApiError, ClientGone
from atma.serve.http.front import TOLD, inside, preflight, shared_with
from atma.serve.http.metrics import Metrics
from atma.serve.http.neutral import IGNORED
from atma.serve.http.options import BODIES_AT_ONCE, BODY_SECONDS, HEAD_BYTES, ServerOptions, origins, root

LOG = logging.getLogger("atma.serve")
OPEN = {"/health", "/"}
"""Told without a key: whether the server is up, and the page, which holds nothing of the model."""
DEEPEST = 64
PLAIN = bytes(byte for byte in range(256) if byte not in b"[]{}")
UPDOWN = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
LOCAL_HOST = re.compile(r"(?:localhost|127(?:\.\d{1,3}){3}|\[::1\])(?::\d{1,5})?", re.ASCII | re.IGNORECASE)
UNSAYABLE = re.compile(r"[^A-Za-z0-9._-]", re.ASCII)
MEASURED = {"/v1/chat/completions", "/v1/completions", MESSAGES, RESPONSES}


class Guard:
    """ASGI around the routes. Without a key anybody on this machine may ask, by a name that is this machine's."""

    def __init__(self, app: ASGIApp, metrics: Metrics, options: ServerOptions) -> None:
        self.app, self.metrics, self.options, self.most = app, metrics, options, options.body_bytes
        key = options.key()
        self._key = None if key is None else key.encode()
        self._origins, self._root = origins(options.cors_origin), root(options.root_path)
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        call = Call(self.metrics, headers.get("x-request-id"), scope["method"])
        call.messages = inside(scope, self._root)["path"].startswith(MESSAGES)
        scope.setdefault("state", {})["call"] = call
        IGNORED.set(call.ignored if self.options.lenient else None)
        scope = inside(scope, self._root)
        shared = shared_with(self._origins, headers)
        answer = _Answer(send, call, scope["method"] == "HEAD", shared)
        held = 0

        def hold(count: int) -> None:
            nonlocal held
            if self._held + count > BODIES_AT_ONCE * self.most:
                raise ApiError(503, "busy", "too much is being sent to this server; ask again later", None, 1)
            self._held, held = self._held + count, held + count

        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}  # `_Answer` leaves the body out
        try:
            _short(scope)
            told = preflight(scope["method"], headers, shared)
            if told is not None:
                await Response(status_code=204, headers=told)(scope, receive, answer)
                return
            self._admit(scope["path"], headers)
            if scope["method"] == "POST" and not _nothing_comes(headers):
                receive = await self._body(headers, receive, hold)
            await self.app(scope, receive, answer)
        except ApiError as error:
            await refuse(error, call, scope, receive, answer)
        except ClientGone:
            call.gone = True
        except Exception as error:
            if call.error is None:  # else the application has told and logged it
                LOG.exception("id=%s: %s", call.id, type(error).__name__)
                await refuse(ApiError.unforeseen(call.id), call, scope, receive, answer)
        finally:
            self._held -= held
            call.close()
            self._told(call, scope)

    def _admit(self, path: str, headers: Headers) -> None:
        """ApiError for whoever may not ask."""
        if self._key is None:
            host = headers.get("host", "localhost")
            if not LOCAL_HOST.fullmatch(host):
                raise ApiError(
                    403, "host", "ask for this server as localhost or 127.0.0.1, or start it with an API key"
                )
        elif path not in OPEN:
            kind, _, given = headers.get("authorization", "").partition(" ")
            given = given if kind.lower() == "bearer" else headers.get("x-api-key", "")
            if not secrets.compare_digest(given.strip().encode("utf-8", "replace"), self._key):
                raise ApiError(401, "invalid_api_key", "this server asks for its API key: 'Authorization: Bearer KEY'")

    async def _body(self, headers: Headers, receive: Receive, hold: Callable[[int], None]) -> Receive:
        """Read a JSON body within its limits; a `receive` that gives it again."""
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "content_type", "send JSON, with the header 'content-type: application/json'")
        if "content-encoding" in headers:
            raise ApiError(415, "content_encoding", "send the body as it is, without content-encoding")
        announced = headers.get("content-length", "")
        if announced.isdigit() and int(announced[:20]) > 4 * self.most:
            raise self._too_large()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await self._read(receive, hold)
        except TimeoutError:
            raise ApiError(408, "slow", f"the body did not come within {BODY_SECONDS:.0f} seconds") from None
        if deepest(body) > DEEPEST:
            raise ApiError(400, "too_deep", f"the JSON is nested more than {DEEPEST} deep")
        return _again(body, receive)

    async def _read(self, receive: Receive, hold: Callable[[int], None]) -> bytes:
        """The body. What is too large is read on for a while, not kept, so that the client hears why it is refused."""
        parts, count = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            count += len(part)
            if count > self.most:
                parts.clear()
            else:
                hold(len(part))
                parts.append(part)
            if not message.get("more_body", False) or count > 4 * self.most:
                break
        if count > self.most:
            raise self._too_large()
        return b"".join(parts)

    def _too_large(self) -> ApiError:
        return ApiError(413, "too_large", f"the body is larger than the {self.most:,} bytes that this server reads")

    def _told(self, call: Call, scope: Scope) -> None:
        route = scope.get("route")
        call.route = getattr(route, "path", "other")
        self.metrics.answered.labels(call.route, "gone" if call.gone else str(call.status), call.model).inc()
        if call.gone:
            self.metrics.gone.inc()
        if call.error is not None:
            self.metrics.refused.labels(call.error.code).inc()
        if call.route in MEASURED and call.sizes is not None:
            self.metrics.whole.observe(call.seconds)
        if call.route not in ("/health", "/metrics") and self.options.access_log != "off":
            LOG.info("%s", call.line(), extra={"call": call.fields()})


async def refuse(error: ApiError, call: Call, scope: Scope, receive: Receive, send: "_Answer") -> None:
    """Answer with an error, unless an answer has begun."""
    call.error = error
    if not call.status:
        await error.response(scope["path"])(scope, receive, send)


def _nothing_comes(headers: Headers) -> bool:
    """Whether a request says of its body neither what it is nor that there is one: its route is what tells it off."""
    return not {"content-type", "transfer-encoding"} & set(headers.keys()) and headers.get("content-length", "0") == "0"


def deepest(body: bytes) -> int:
    """How deep brackets of a JSON text are nested, leaving out those in strings."""
    signs = np.frombuffer(STRING.sub(b"", body).translate(UPDOWN, PLAIN), np.int8)
    return int(signs.cumsum(dtype=np.int32).max(initial=0))


def _short(scope: Scope) -> None:
    """ApiError for a head that is too long; one that comes in many pieces is refused before it is whole."""
    lines = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    if lines + len(scope["raw_path"]) + len(scope["query_string"]) > HEAD_BYTES:
        raise ApiError(431, "malformed_http", f"the request's head is longer than {HEAD_BYTES:,} bytes")


class _Answer:
    """`send` that puts what belongs on every response, and sends no body to who asks for the head alone."""

    def __init__(self, send: Send, call: Call, bare: bool, shared: Mapping[str, str]) -> None:
        self._send, self._call, self._bare, self._shared = send, call, bare, shared

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._call.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._call.id
            if self._call.messages:
                headers["request-id"] = self._call.id
            headers.setdefault("cache-control", "no-store")
            headers["x-content-type-options"] = "nosniff"
            for name, value in self._shared.items():
                headers.setdefault(name, value)
            if "access-control-allow-origin" in self._shared:
                headers["access-control-expose-headers"] = TOLD
            if self._call.ignored:
                names = ", ".join(UNSAYABLE.sub("?", name[:64]) for name in self._call.ignored)
                headers["x-atma-ignored"] = names
        elif self._bare:
            message = {**message, "body": b""}
        await self._send(message)


def _again(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay

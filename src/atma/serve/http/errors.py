"""Errors as clients of OpenAI's API read them: a status, and {"error": {message, type, param, code}}."""

import json
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from atma.serve.request import RequestError

LONGEST_MESSAGE = 400
PIECE = 64 << 10
"""Bytes of a body that are given to the connection at once."""
FIELDS = {"stop_tokens": "stop_token_ids"}
"""What this API calls the engine's parameters, where the names differ."""
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
MESSAGE_TYPES = TYPES | {404: "not_found_error", 413: "request_too_large", 503: "overloaded_error"}
MESSAGES = "/v1/messages"
"""Where errors are in the words of Anthropic's API."""
RESPONSES = "/v1/responses"


class ApiError(Exception):
    """An answer other than what was asked for. `retry_after`: seconds after which the same request may succeed."""

    def __init__(
        self, status: int, code: str, message: str, parameter: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.parameter, self.retry_after = status, code, parameter, retry_after
        self.allow: str | None = None
        """The methods that the route has, where it has not the one that was asked for."""

    @classmethod
    def of(cls, error: RequestError) -> "ApiError":
        """What the engine refused or could not finish."""
        status, code, retry = {
            "invalid": (400, "invalid_value", None),
            "too_long": (400, "context_length_exceeded", None),
            "queue_full": (429, "queue_full", 1),
            "closed": (503, "draining", 5),
            "failed": (500, "failed", None),
        }[error.code]
        for parameter, name in FIELDS.items():
            error = error.renamed(parameter, name)
        return cls(status, code, str(error), error.parameter, retry)

    def renamed(self, names: Mapping[str, str]) -> "ApiError":
        """The same where its parameter is called otherwise."""
        name = names.get(self.parameter or "")
        if name is None:
            return self
        message = str(self).replace(f"'{self.parameter}'", f"'{name}'")
        return ApiError(self.status, self.code, message, name, self.retry_after)

    @classmethod
    def unforeseen(cls, identity: str) -> "ApiError":
        """A fault of this server itself, under the id of the request."""
        return cls(500, "internal", f"an error of this server; its log has it under id {identity}")

    @property
    def body(self) -> dict[str, Any]:
        message = str(self)
        if len(message) > LONGEST_MESSAGE:
            message = message[:LONGEST_MESSAGE] + "…"
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": message, "type": kind, "param": self.parameter, "code": self.code}}

    @property
    def message_body(self) -> dict[str, Any]:
        """The same in the words of Anthropic's API."""
        kind = MESSAGE_TYPES.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": self.body["error"]["message"]}}

    def response(self, path: str = "") -> Response:
        """The answer to a request of that path."""
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if self.allow:
            headers["allow"] = self.allow
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.status in (408, 413, 431):
            headers["connection"] = "close"
        body = self.message_body if path.startswith(MESSAGES) else self.body
        return json_response(body, self.status, headers)


class ClientGone(Exception):
    """Nobody is left to answer to."""


class Silence(Response):
    """What they are answered."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        return


def encoded(data: object) -> bytes:
    """JSON in UTF-8, whatever characters clients sent."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")


def json_response(data: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Body([encoded(data)], status, headers)


class Body(Response):
    """JSON in pieces, given to the connection no faster than the client takes it, and forgotten as it goes."""

    def __init__(self, pieces: Sequence[bytes], status: int = 200, headers: dict[str, str] | None = None) -> None:
        size = {"content-length": str(sum(map(len, pieces)))}
        super().__init__(None, status, size | (headers or {}), "application/json")
        self._pieces = deque(pieces)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        while self._pieces:
            piece = memoryview(self._pieces.popleft())
            for at in range(0, len(piece), PIECE):
                await send({"type": "http.response.body", "body": bytes(piece[at : at + PIECE]), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

"""Errors as clients of OpenAI's API read them: a status, and {"error": {message, type, param, code}}."""

import json
from typing import Any

from starlette.responses import Response

from atma.serve.request import RequestError

LONGEST_MESSAGE = 400
FIELDS = {"stop_tokens": "stop_token_ids"}
"""What this API calls the engine's parameters, where the names differ."""
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer other than what was asked for. `retry_after`: seconds after which the same request may succeed."""

    def __init__(
        self, status: int, code: str, message: str, parameter: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.parameter, self.retry_after = status, code, parameter, retry_after

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
        name = FIELDS.get(error.parameter or "", error.parameter)
        return cls(status, code, str(error).replace(f"'{error.parameter}'", f"'{name}'"), name, retry)

    @property
    def body(self) -> dict[str, Any]:
        message = str(self)
        if len(message) > LONGEST_MESSAGE:
            message = message[:LONGEST_MESSAGE] + "…"
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": message, "type": kind, "param": self.parameter, "code": self.code}}

    def response(self) -> Response:
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.status in (408, 413, 431):
            headers["connection"] = "close"
        return json_response(self.body, self.status, headers)


class ClientGone(Exception):
    """Nobody is left to answer to."""


def encoded(data: object) -> bytes:
    """JSON in UTF-8, whatever characters clients sent."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")


def json_response(data: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encoded(data), status, headers, "application/json")

"""From what routes raise, and FastAPI before them, to errors in the words of the API."""

from collections.abc import Sequence

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import Scope

from atma.serve.http.call import Call
from atma.serve.http.errors import ApiError, ClientGone, Silence
from atma.serve.http.guard import LOG

NAMES = {404: ("not_found", "there is no such route"), 405: ("method_not_allowed", "the route has other methods")}
LONGEST_NAME = 64


async def told(request: Request, error: Exception) -> Response:
    """The answer to a request that went wrong, whatever is raised; what nobody foresaw goes to the log."""
    call: Call = request.state.call
    if isinstance(error, ClientGone):
        return Silence()
    known = isinstance(error, ApiError | RequestValidationError | HTTPException)
    if not known:
        LOG.error("id=%s: %s", call.id, type(error).__name__, exc_info=error)
    call.error = _api_error(error) if known else ApiError.unforeseen(call.id)
    if call.error.status == 405:
        call.error.allow = ", ".join(_methods(request.app.routes, request.scope))
    return call.error.response(request.scope["path"])


def _api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    assert isinstance(error, HTTPException)
    code, message = NAMES.get(error.status_code, ("invalid_request", str(error.detail)))
    return ApiError(error.status_code, code, message)


def _methods(routes: Sequence[BaseRoute], scope: Scope) -> list[str]:
    """All that a path can be asked by: several routes may have it, and what is read can be asked for its head."""
    found = {
        method for route in routes if route.matches(scope)[0] != Match.NONE for method in getattr(route, "methods", ())
    }
    return sorted(found | {"HEAD"} if "GET" in found else found)


def _invalid(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, "invalid_json", "the body is not JSON")
    place = list(first["loc"])[first["loc"][:1] in (("body",), ("query",)) :]
    if first["type"] == "missing" and not place:
        return ApiError(400, "invalid_value", "there is no body: send a JSON object")
    name = ".".join(map(str, place))
    message = first["msg"].removeprefix("Value error, ")
    message = f"'{name}': {message}" if name else message
    field = getattr(first.get("ctx", {}).get("error"), "parameter", None)
    return ApiError(400, "invalid_value", message, _sayable(str(place[0]) if place else field))


def _sayable(name: str | None) -> str | None:
    """The beginning of a name that a client gave."""
    return None if name is None else name[:LONGEST_NAME]

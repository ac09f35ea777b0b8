"""What browsers and proxies need of a server: which pages of elsewhere may ask it, and a prefix before every path."""

import re
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.responses import RedirectResponse, Response
from starlette.types import Scope

NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+(?: *, *[A-Za-z0-9!#$%&'*+.^_`|~-]+)*", re.ASCII)
TOLD = "x-request-id, x-atma-affinity, x-atma-ignored, x-atma-replica, retry-after"
KEPT_SECONDS = 600
BARE = "atma.bare"
"""In a scope: whether it asks for the prefix and nothing behind it."""


def inside(scope: Scope, prefix: str) -> Scope:
    """A request without the prefix, whether a proxy has taken it off already or not."""
    if not prefix:
        return scope
    raw, path, taken = scope["raw_path"], scope["path"], {}
    if path == prefix or path.startswith(prefix + "/"):
        taken = {"path": path[len(prefix) :] or "/", "raw_path": raw[len(prefix) :] or b"/", BARE: path == prefix}
    return {**scope, "root_path": prefix, **taken}


def moved(scope: Scope) -> Response | None:
    """Where a request for the prefix alone goes instead: to the prefix with a slash, from which the page's links are
    read. None for any other."""
    return RedirectResponse(scope["root_path"] + "/") if scope.get(BARE) else None


def shared_with(allowed: frozenset[str], headers: Headers) -> dict[str, str]:
    """What lets the page that asks read the answer: nothing for one that may not."""
    origin = headers.get("origin")
    if not allowed:
        return {}
    vary = {"vary": "Origin"}
    if origin is None or not (origin in allowed or "*" in allowed):
        return vary
    return vary | {"access-control-allow-origin": "*" if "*" in allowed else origin}


def preflight(method: str, headers: Headers, shared: Mapping[str, str]) -> dict[str, str] | None:
    """What a browser is told before it sends a page's request; None if it does not ask, or the page may not."""
    asks = method == "OPTIONS" and "access-control-request-method" in headers
    if not asks or "access-control-allow-origin" not in shared:
        return None
    told = {
        **shared,
        "vary": "Origin, Access-Control-Request-Headers",
        "access-control-allow-methods": "GET, HEAD, POST, DELETE",
        "access-control-max-age": str(KEPT_SECONDS),
    }
    names = headers.get("access-control-request-headers", "")
    if NAMES.fullmatch(names):
        told["access-control-allow-headers"] = names
    if headers.get("access-control-request-private-network") == "true":
        told["access-control-allow-private-network"] = "true"
    return told

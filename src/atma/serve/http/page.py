"""The chat page: one file without anything from elsewhere, and the policy that holds a browser to that.

Its parts, in chat_page/, are put together here: page.html, page.css, and scripts in the order in which they are needed.
"""

import base64
import functools
import hashlib
from importlib.resources import files

from starlette.responses import Response

SCRIPTS = ("markdown.js", "talk.js", "server.js", "page.js")
_NAMES = '"use strict";\nconst at = (name) => document.getElementById(name);\n'


def page() -> Response:
    """The page, as every browser may have it: it holds no key and nothing of the model."""
    text, policy = _read()
    headers = {"content-security-policy": policy, "referrer-policy": "no-referrer", "x-frame-options": "DENY"}
    return Response(text, headers=headers, media_type="text/html")


@functools.cache
def _read() -> tuple[str, str]:
    """The page and its policy: its own style and script by their hashes, requests to this server, and nothing else."""
    style, script = _part("page.css"), _NAMES + "\n".join(map(_part, SCRIPTS))
    text = _part("page.html").replace("<style></style>", f"<style>{style}</style>")
    text = text.replace("<script></script>", f"<script>{script}</script>")
    closed = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    allowed = f"connect-src 'self'; img-src data:; script-src {_hash(script)}; style-src {_hash(style)}"
    return text, f"{closed}; {allowed}"


def _part(name: str) -> str:
    return files("atma.serve.http").joinpath("chat_page", name).read_text(encoding="utf-8")


def _hash(part: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"

"""The chat page: one file without anything from elsewhere, and the policy that holds a browser to that."""

import base64
import functools
import hashlib
import re
from importlib.resources import files

from starlette.responses import Response


def page() -> Response:
    """The page, as every browser may have it: it holds no key and nothing of the model."""
    text, policy = _read()
    headers = {"content-security-policy": policy, "referrer-policy": "no-referrer", "x-frame-options": "DENY"}
    return Response(text, headers=headers, media_type="text/html")


@functools.cache
def _read() -> tuple[str, str]:
    """The page and its policy: its own style and script by their hashes, requests to this server, and nothing else."""
    text = files("atma.serve.http").joinpath("chat.html").read_text(encoding="utf-8")
    script, style = (_hashes(text, name) for name in ("script", "style"))
    closed = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return text, f"{closed}; connect-src 'self'; img-src data:; script-src {script}; style-src {style}"


def _hashes(text: str, name: str) -> str:
    parts = re.findall(f"<{name}>(.*?)</{name}>", text, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts]
    return " ".join(f"'sha256-{digest}'" for digest in digests)

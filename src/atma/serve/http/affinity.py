"""A name for the beginning of a conversation: a balancer can send its turns to the server that keeps its states.

It depends on the salt and on the conversation up to and including the first message of the user (of that, the first
characters), so all turns of a conversation have the same one, on every server and after every restart. A client that
sends its own in the header gets that back: it may name a conversation before the first answer.
"""

import hashlib
import json
import re

from atma.serve.http.bodies import Message
from atma.serve.http.fields import Prompt

HEADER = "x-atma-affinity"
AWAY = "atma.away"
"""In the scope of a request whose conversation is not at home here, or may not be, so that nothing of it is to be kept:
whether there is a home that can be asked later."""
CHARACTERS, TOKENS = 1024, 256
SANE = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)


def of_messages(messages: list[Message], salt: str) -> str:
    """Of a chat."""
    beginning = []
    for message in messages:
        beginning.append([message.role, message.content[:CHARACTERS]])
        if message.role == "user":
            break
    return _hash("chat", beginning, salt)


def of_prompt(prompt: Prompt, salt: str) -> str:
    """Of a text or tokens; of the first of several."""
    first = prompt[0] if isinstance(prompt, list) and not isinstance(prompt[0], int) else prompt
    return _hash("text", first[: CHARACTERS if isinstance(first, str) else TOKENS], salt)  # pyright: ignore


def response_id(own: str, name: str) -> str:
    """An id of an answer that tells the name of its conversation."""
    return f"resp_{own}_{name}"


def of_response(identity: str | None) -> str | None:
    """The name that an id of an answer tells."""
    parts = (identity or "").split("_", 2)
    return given(parts[2]) if len(parts) == 3 and parts[0] == "resp" else None


def given(value: str | None) -> str | None:
    """The client's own, if it is one that a header may carry."""
    return value if value is not None and SANE.fullmatch(value) else None


def _hash(kind: str, beginning: object, salt: str) -> str:
    return hashlib.sha256(json.dumps([kind, salt, beginning]).encode()).hexdigest()[:32]

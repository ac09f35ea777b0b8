"""From a row of data to its text: a field, a field within a field, or a chat.

A field is named by its key, or by keys with dots between them: `meta.text`. On the way, a list stands for each of its
items. A list of messages ({"role", "content"}, or {"from", "value"}) becomes one text, a line for each turn, as the
server's plain dialogue has it: "User: …", "Assistant: …", "System: …". A list of texts becomes its lines.
"""

import math
from collections.abc import Iterator
from typing import Any

from atma.data.conversations import CONVERSATIONS, documents_of
from atma.data.left_out import LeftOut, NoField

SPEAKERS = {"user": "User", "human": "User", "assistant": "Assistant", "gpt": "Assistant", "model": "Assistant"}


def texts(row: Any, field: str, where: str, left_out: LeftOut, first: bool) -> Iterator[str]:
    """The texts in a field of a row. A row without it is left out and counted; NoField if it is the first of its file.

    ValueError: the field holds something that is no text.
    """
    if field == CONVERSATIONS:
        yield from documents_of(row, where, left_out, first)
        return
    if isinstance(row, str) and field == "text":
        row = {"text": row}  # a list of texts instead of records
    found = list(_values(row, field))
    if not found:
        if first:
            raise NoField(f"{where}: no field '{field}'; {_has(row)}")
        left_out.row("without the field")
    for value in found:
        text = _text(value, field, where)
        if text is None:
            left_out.row("null")
        else:
            yield text


def _values(row: Any, field: str) -> Iterator[Any]:
    """What a path of keys leads to: nothing, one value, or several where a list is on the way."""
    if isinstance(row, list):
        for item in row:
            yield from _values(item, field)
    elif row is None:
        yield None
    elif isinstance(row, dict) and field in row:
        yield row[field]
    elif isinstance(row, dict):
        key, dot, rest = field.partition(".")
        while dot and key not in row:  # a key may itself have a dot
            more, dot, rest = rest.partition(".")
            key = f"{key}.{more}"
        if dot:
            yield from _values(row[key], rest)


def _has(row: Any) -> str:
    if not isinstance(row, dict):
        return f"it is a {type(row).__name__}"
    told = f"it has {', '.join(map(str, row))}"
    chat = next((key for key in ("messages", "conversations") if isinstance(row.get(key), list)), None)
    return told + (f"; read its chats with --field {chat}" if chat else "; name the one to read with --field")


def _text(value: Any, field: str, where: str) -> str | None:
    """A text as it is; None for null."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = _dialogue([item for item in value if item is not None], field, where)
    elif isinstance(value, list) and all(isinstance(item, str | None) for item in value):
        value = "\n".join(item for item in value if item is not None)
    if not isinstance(value, str):
        raise ValueError(f"{where}: '{field}' must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise ValueError(f"{where}: '{field}' holds half a character ({half!r}), which is no text") from None
    return value


def _dialogue(messages: list[dict[str, Any]], field: str, where: str) -> str:
    lines = []
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError(
                f"{where}: '{field}' must be a list of messages alone, with a {type(message).__name__} in it"
            )
        pairs = (("role", "from"), ("content", "value"))
        role, content = (message.get(b) if message.get(a) is None else message[a] for a, b in pairs)
        if isinstance(content, list):  # parts, of which some may be pictures
            spoken = (part.get("text") for part in content if isinstance(part, dict))
            content = "\n".join(str(text) for text in spoken if text is not None)
        if not isinstance(role, str):
            raise ValueError(f"{where}: '{field}' is a list of records without 'role': neither a text nor a chat")
        if isinstance(content, str):
            gap = "" if content[:1] in ("", " ", "\n", "\t") else " "
            lines.append(f"{SPEAKERS.get(role, 'System')}:{gap}{content}")
        elif content is not None:
            raise ValueError(f"{where}: the content of a message must be text, not {type(content).__name__}")
    return "\n".join(lines)

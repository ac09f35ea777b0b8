"""Conversations out of rows of data, whichever of the usual ways they are written in.

    {"messages": [{"role", "content"}, …]}            OpenAI's; also under "conversations"
    {"conversations": [{"from", "value"}, …]}         ShareGPT's, with an optional "system" beside
    {"prompt", "completion"}                          texts, or lists of messages
    {"instruction", "input", "output"}                Alpaca's; "input" may be empty or absent

Each becomes a list of messages of the roles system, user, assistant and tool. As a document it is the sign `MARK` and
its JSON, so that whatever reads, counts and shuffles documents does so with conversations too.
"""

import json
from collections.abc import Iterator
from typing import Any

from atma.data.left_out import LeftOut, NoField

CONVERSATIONS = "\x1econversation"
"""The name of the field that stands for a whole row that is a conversation."""
MARK = "\x1e"
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "tool": "tool"}
ROLES |= {
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
}
ROLES |= {"function": "tool", "observation": "tool"}

Message = dict[str, str]


class Unusable(ValueError):
    """A conversation that nothing can be learned from, and of what kind its fault is."""

    def __init__(self, where: str, kind: str, told: str) -> None:
        super().__init__(f"{where}: {told}; mend it, or leave such conversations out with --skip-bad")
        self.kind = kind


def is_conversation(row: Any) -> bool:
    """Whether a row is written in one of the known ways."""
    if not isinstance(row, dict):
        return False
    listed = any(isinstance(row.get(key), list) for key in ("messages", "conversations"))
    return listed or {"prompt", "completion"} <= row.keys() or {"instruction", "output"} <= row.keys()


def documents_of(row: Any, where: str, left_out: LeftOut, first: bool) -> Iterator[str]:
    """The document of a row. NoField if the first row of a file is no conversation.

    ValueError: a later row is none, or one that cannot be used; where bad ones are to be skipped it is counted instead.
    """
    if not is_conversation(row):
        has = f"it has {', '.join(map(str, row))}" if isinstance(row, dict) else f"it is a {type(row).__name__}"
        told = f"no conversation; {has}"
        if first:
            raise NoField(f"{where}: {told}")
        error = Unusable(where, "rows that are no conversation", told)
    else:
        try:
            yield MARK + json.dumps(messages_of(row, where), ensure_ascii=False)
            return
        except Unusable as found:
            error = found
    if not left_out.skips_bad:
        raise error
    left_out.row(error.kind)


def messages_in(document: str) -> list[Message]:
    """The messages of a document."""
    return json.loads(document.removeprefix(MARK))


def said(document: str) -> str:
    """The text of a document: of a conversation, what is said in it."""
    if not document.startswith(MARK):
        return document
    return "\n".join(message["content"] for message in messages_in(document))


def messages_of(row: dict[str, Any], where: str) -> list[Message]:
    """The messages of a row, their roles by our names. Unusable: what is wrong with it."""
    found = [_message(one, where) for one in _listed(row, where)]
    system = row.get("system")
    if isinstance(system, str) and system.strip() and not any(one["role"] == "system" for one in found):
        found.insert(0, {"role": "system", "content": system})
    if not any(one["role"] == "assistant" for one in found):
        raise Unusable(where, "conversations without an answer", "a conversation without an answer of an assistant")
    return found


def _listed(row: dict[str, Any], where: str) -> list[Any]:
    """The messages of a row as they are written."""
    for key in ("messages", "conversations"):
        if isinstance(row.get(key), list):
            return [one for one in row[key] if one is not None]
    if "prompt" in row:
        return _turn(row["prompt"], "user") + _turn(row["completion"], "assistant")
    asked, more = row["instruction"], row.get("input")
    if isinstance(asked, str) and isinstance(more, str) and more.strip():
        asked = f"{asked}\n\n{more}"
    return _turn(asked, "user") + _turn(row["output"], "assistant")


def _turn(value: Any, role: str) -> list[Any]:
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _message(one: Any, where: str) -> Message:
    if not isinstance(one, dict):
        raise Unusable(where, "messages that are none", f"a message must be a table, not {type(one).__name__}")
    pairs = (("role", "from"), ("content", "value"))
    said, content = (one.get(b) if one.get(a) is None else one[a] for a, b in pairs)
    role = ROLES.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        known = ", ".join(ROLES)
        raise Unusable(where, "unknown roles", f"unknown role {said!r}; known are {known}")
    if content is None and one.get("tool_calls"):
        raise Unusable(where, "tool calls", f"a message of {said!r} calls tools, which are not read")
    if content is None:
        raise Unusable(where, "null content", f"a message of {said!r} has no content (null)")
    text = _text(content, where)
    if not text.strip():
        raise Unusable(where, "empty content", f"a message of {said!r} is empty")
    return {"role": role, "content": text}


def _text(content: Any, where: str) -> str:
    if isinstance(content, list):  # parts
        kinds = [part.get("type", "text") if isinstance(part, dict) else type(part).__name__ for part in content]
        other = next((kind for kind in kinds if kind != "text"), None)
        if other is not None:
            raise Unusable(where, "content that is no text", f"a part of a message is {other!r}; only text is read")
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise Unusable(where, "content that is no text", f"content must be text, not {type(content).__name__}")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        half = content[error.start]
        raise Unusable(where, "half characters", f"content holds half a character ({half!r})") from None
    return content

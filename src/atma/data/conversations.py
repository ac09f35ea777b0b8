"""Conversations out of rows of data, whichever of the usual ways they are written in.

    {"messages": [{"role", "content"}, …]}            OpenAI's; also under "conversations"
    {"conversations": [{"from", "value"}, …]}         ShareGPT's, with an optional "system" beside
    {"prompt", "completion"}                          texts, or lists of messages
    {"instruction", "input", "output"}                Alpaca's; "input" may be empty or absent

Each becomes a list of messages of the roles system, user, assistant and tool. All answers are learned but those of a
list of messages that is a prompt, and those of "weight" 0 (OpenAI's): such a message has "learned", false. Calls of
tools and reasoning beside the content are refused, for no template would be shown them; empty system messages are left
out. As a document it is the sign `MARK` and its JSON, so that whatever reads, counts and shuffles documents does so
with conversations too.
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

TOOLS, REASONING = ("tool_calls", "function_call"), ("reasoning_content", "reasoning", "thinking")
"""What stands beside the content of a message and is not read."""

Message = dict[str, Any]
"""Its role and content, texts, and where it is an answer that is not learned "learned", false."""


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
    if any(_given(row.get(key)) for key in ("tools", "functions")):
        raise Unusable(where, "tools", "a conversation with tools, which are not read")
    found = [_message(one, where) for one in _listed(row, where) if not _silent_system(one)]
    system = row.get("system")
    if isinstance(system, str) and system.strip() and not any(one["role"] == "system" for one in found):
        found.insert(0, {"role": "system", "content": system})
    answers = [one for one in found if one["role"] == "assistant"]
    if not answers:
        raise Unusable(where, "conversations without an answer", "a conversation without an answer of an assistant")
    if not any(one.get("learned", True) for one in answers):
        raise Unusable(where, "conversations without an answer", "a conversation whose answers all have weight 0")
    return found


def _given(value: Any) -> bool:
    """Whether something is said, also where it is JSON in a text."""
    return bool(value.strip() not in ("", "[]", "{}", "null") if isinstance(value, str) else value)


def _silent_system(one: Any) -> bool:
    """Whether a message is one of the system that says nothing."""
    if not isinstance(one, dict) or ROLES.get(str(one.get("role") or one.get("from")).lower()) != "system":
        return False
    content = one.get("content") if one.get("content") is not None else one.get("value")
    return content is None or (isinstance(content, str) and not content.strip())


def _listed(row: dict[str, Any], where: str) -> list[Any]:
    """The messages of a row as they are written."""
    for key in ("messages", "conversations"):
        if isinstance(row.get(key), list):
            return [one for one in row[key] if one is not None]
    if "prompt" in row:
        asked = [one | {"weight": 0} if isinstance(one, dict) else one for one in _turn(row["prompt"], "user")]
        return asked + _turn(row["completion"], "assistant")
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
    _check_beside(one, f"a message of {said!r}", where)
    if content is None:
        raise Unusable(where, "null content", f"a message of {said!r} has no content (null)")
    text = _text(content, where)
    if not text.strip():
        raise Unusable(where, "empty content", f"a message of {said!r} is empty")
    weight = one.get("weight")
    if role != "assistant" or weight is None:
        return {"role": role, "content": text}
    if weight not in (0, 1):
        raise Unusable(where, "weights", f"a message of {said!r} has weight {weight!r}; only 0 and 1 are read")
    return {"role": role, "content": text} | ({} if weight else {"learned": False})


def _check_beside(one: dict[str, Any], who: str, where: str) -> None:
    """Unusable: a message has more to it than its content."""
    if any(_given(one.get(key)) for key in TOOLS):
        raise Unusable(where, "tool calls", f"{who} calls tools, which are not read")
    key = next((key for key in REASONING if _given(one.get(key))), None)
    if key is not None:
        told = f"{who} has {key!r}, which is not read; write it into the content, as the model is to write it"
        raise Unusable(where, "reasoning beside the content", told)


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

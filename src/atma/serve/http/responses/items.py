"""Items of a conversation, and the messages of a chat that they are.

A call belongs to the message of the assistant before it, as in a chat; an item that is no text is refused.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import PlainValidator, WithJsonSchema

from atma.serve.http.errors import ApiError
from atma.serve.http.fields import MOST_MESSAGES
from atma.serve.http.neutral import shown, without_nulls
from atma.serve.http.tool_fields import NAME

ROLES = ("system", "developer", "user", "assistant")
ASIDE = {"id", "status", "type", "phase", "prompt_cache_breakpoint", "annotations", "logprobs"}
"""What labels an item or a part, and changes no text."""
CALLER = {"type": "direct"}
KINDS = "message, function_call and function_call_output"

Item = dict[str, Any]
Message = dict[str, Any]


def items(value: object) -> list[Item]:
    """The items of `input`, checked each by itself. ValueError."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not 0 < len(value) <= MOST_MESSAGES:
        raise ValueError(f"must be a text or a list of 1 to {MOST_MESSAGES:,} items")
    found = []
    for i, one in enumerate(value):
        try:
            found.append(_item(without_nulls(one)))
        except ValueError as error:
            raise ValueError(f"item {i}: {error}") from None
    return found


def messages(some: Sequence[Item]) -> list[Message]:
    """Items as messages of a chat."""
    found: list[Message] = []
    for one in some:
        if "call" not in one:
            found.append(dict(one))
            continue
        if not found or found[-1]["role"] != "assistant":
            found.append({"role": "assistant", "content": ""})
        found[-1].setdefault("tool_calls", []).append(one["call"])
    return found


def check_calls(before: Sequence[Message], some: Sequence[Item]) -> None:
    """ApiError unless every output is that of a call before it, and every call has one; `before`: earlier turns."""
    called = {call["id"] for message in before for call in message.get("tool_calls", ())}
    answered = {message.get("tool_call_id") for message in before}
    for i, one in enumerate(some):
        if "call" in one:
            called.add(one["call"]["id"])
            answered.discard(one["call"]["id"])
        elif one["role"] == "tool":
            if one["tool_call_id"] not in called:
                given = shown(one["tool_call_id"])
                raise _wrong(f"item {i}: its 'call_id' must be that of a function_call before it, not {given}")
            answered.add(one["tool_call_id"])
    if called - answered:
        raise _wrong(f"there is no function_call_output for the call {shown(min(called - answered))}")


def _wrong(problem: str) -> ApiError:
    return ApiError(400, "invalid_value", f"'input': {problem}", "input")


def _item(value: object) -> Item:
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    kind = value.get("type", "message")
    if kind == "message":
        return _message(value)
    if kind == "function_call":
        _only(value, {"call_id", "name", "arguments"})
        if not isinstance(value.get("name"), str) or not NAME.fullmatch(value["name"]):
            raise ValueError(f"'name' has 1 to 64 letters, digits, '_', '-' and '.', not {shown(value.get('name'))}")
        if not isinstance(value.get("arguments"), str):
            raise ValueError("'arguments' must be a text")
        function = {"name": value["name"], "arguments": value["arguments"]}
        return {"call": {"id": _call_id(value), "type": "function", "function": function}}
    if kind == "function_call_output":
        _only(value, {"call_id", "output", "name"})
        return {"role": "tool", "tool_call_id": _call_id(value), "content": _text(value.get("output"), "output")}
    raise ValueError(f"items are of type {KINDS}, not {shown(kind)}: nothing else is kept or run here")


def _message(value: Mapping[str, Any]) -> Item:
    _only(value, {"role", "content"})
    if value.get("role") not in ROLES:
        raise ValueError(f"'role' must be one of {', '.join(ROLES)}, not {shown(value.get('role'))}")
    return {"role": value["role"], "content": _text(value.get("content"), "content")}


def _text(value: object, name: str) -> str:
    """A text, or parts of text put together."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"'{name}' must be a text or a list of parts")
    return "".join(map(_part, value))


def _part(value: object) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(value, dict) or kind not in ("input_text", "output_text"):
        told = f"parts are of type input_text and output_text, not {shown(kind)}"
        raise ValueError(f"{told}: this model reads no images, sounds or files, and nothing is fetched")
    _only(value, {"text"})
    if not isinstance(value.get("text"), str):
        raise ValueError("'text' of a part must be a text")
    return value["text"]


def _call_id(value: Mapping[str, Any]) -> str:
    given = value.get("call_id")
    if not isinstance(given, str) or not 0 < len(given) <= 256:
        raise ValueError(f"'call_id' must be a text of 1 to 256 characters, not {shown(given)}")
    return given


def _only(value: Mapping[str, Any], known: set[str]) -> None:
    for name, one in value.items():
        if name not in known and name not in ASIDE and one not in ({}, [], "", False, CALLER):
            raise ValueError(f"{shown(name)}: this server cannot do what it asks for; leave it out")


_TEXT = {"type": "object", "properties": {"type": {"enum": ["input_text", "output_text"]}, "text": {"type": "string"}}}
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT | {"required": ["type", "text"]}}]}
_MESSAGE = {"type": "object", "properties": {"role": {"enum": list(ROLES)}, "content": _CONTENT}}
_CALL = {
    "type": "object",
    "properties": {
        "type": {"const": "function_call"},
        "call_id": {"type": "string"},
        "name": {"type": "string"},
        "arguments": {"type": "string"},
    },
    "required": ["type", "call_id", "name", "arguments"],
}
_OUTPUT = {
    "type": "object",
    "properties": {"type": {"const": "function_call_output"}, "call_id": {"type": "string"}, "output": _CONTENT},
    "required": ["type", "call_id", "output"],
}
_ITEM = {"anyOf": [_MESSAGE | {"required": ["role", "content"]}, _CALL, _OUTPUT]}
_ITEMS = {"type": "array", "items": _ITEM, "minItems": 1, "maxItems": MOST_MESSAGES}
_SCHEMA: dict[str, Any] = {"anyOf": [{"type": "string"}, _ITEMS]}

InputField = Annotated[Any, PlainValidator(items), WithJsonSchema(_SCHEMA)]

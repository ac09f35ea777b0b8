"""What Anthropic's API says of tools and of what was called: read from its words, and told in those of OpenAI's.

A turn of the user with results of tools becomes a message for each of them, and one for what is said between; a turn
of the assistant is one message with its text and its calls. Arguments that are no JSON object are a value in one.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import PlainValidator, WithJsonSchema

from atma.serve.http.errors import encoded
from atma.serve.http.fields import content_text
from atma.serve.http.neutral import MESSAGE_ASIDE, shown, without_nulls
from atma.serve.http.tool_fields import MOST_TOOLS, NAME

BLOCKS = {"text": {"text"}, "tool_use": {"id", "name", "input"}, "tool_result": {"tool_use_id", "content", "is_error"}}
"""What each kind of block may have; `is_error` is said by the text too, and templates have no place for it."""
CALLER = {"type": "direct"}
WRONG = "INVALID_JSON"
"""The name under which Anthropic's API has arguments that are no JSON object."""
TOOL = {"name", "description", "input_schema", "strict", "type", "eager_input_streaming"}
CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class Choice(NamedTuple):
    """Which tools are to be called, as OpenAI's API says it, and whether several may be."""

    chosen: Any = None
    several: bool = True


def tools(value: object) -> list[dict[str, Any]]:
    """Descriptions of tools. ValueError."""
    if not isinstance(value, list) or len(value) > MOST_TOOLS:
        raise ValueError(f"must be a list of at most {MOST_TOOLS} tools")
    return [_tool(without_nulls(one)) for one in value]


def choice(value: object) -> Choice:
    """Of `tool_choice`. ValueError."""
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(value, dict) or kind not in (*CHOICES, "tool"):
        raise ValueError("must be an object with a 'type' of auto, any, tool or none")
    alone = value.get("disable_parallel_tool_use")
    if not isinstance(alone, bool | None):
        raise ValueError("'disable_parallel_tool_use' must be true or false")
    _only(value, {"type", "name", "disable_parallel_tool_use"})
    if kind != "tool":
        return Choice(CHOICES[kind], not alone)
    return Choice({"type": "function", "function": {"name": _name(value.get("name"))}}, not alone)


def blocks(value: object) -> list[dict[str, Any]]:
    """The blocks of a message, of the kinds that are known. ValueError."""
    if value is None or isinstance(value, str):
        return [{"type": "text", "text": value or ""}]
    if not isinstance(value, list):
        raise ValueError("must be a text or a list of blocks")
    return [_block(without_nulls(one)) for one in value]


def messages(role: str, parts: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """A turn as messages of OpenAI's API."""
    if role == "assistant":
        said = "".join(part["text"] for part in parts if part["type"] == "text")
        called = [_call(part) for part in parts if part["type"] == "tool_use"]
        yield {"role": role, "content": said} | ({"tool_calls": called} if called else {})
        return
    said: str | None = None if parts else ""
    for part in parts:
        if part["type"] == "text":
            said = (said or "") + part["text"]
            continue
        if said is not None:
            yield {"role": role, "content": said}
        said = None
        yield {"role": "tool", "tool_call_id": part["tool_use_id"], "content": part["content"]}
    if said is not None:
        yield {"role": role, "content": said}


def check_results(turns: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> None:
    """ValueError unless every call is answered by the next turn, and nothing else is."""
    called: set[str] = set()
    for i, (role, parts) in enumerate(turns):
        strange = next(
            (p["type"] for p in parts if p["type"] == ("tool_use", "tool_result")[role == "assistant"]), None
        )
        if strange is not None:
            raise ValueError(f"'messages.{i}': a message of the {role} has no blocks of type '{strange}'")
        answered = {part["tool_use_id"] for part in parts if part["type"] == "tool_result"}
        if answered - called:
            raise ValueError(f"'messages.{i}': no 'tool_use' before it has the id {shown(min(answered - called))}")
        if called - answered:
            raise ValueError(f"'messages.{i}': there is no 'tool_result' for {shown(min(called - answered))}")
        called = {part["id"] for part in parts if part["type"] == "tool_use"}
    if called:
        raise ValueError(f"'messages': behind the last one there is no 'tool_result' for {shown(min(called))}")


def arguments(text: str) -> dict[str, Any]:
    """The input of a call from the text of its arguments, which the model may have written wrongly."""
    try:
        read = json.loads(text or "{}")
        encoded(read)
    except (ValueError, RecursionError):
        read = None
    return read if isinstance(read, dict) else {WRONG: text}


def _tool(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("tools must be objects with a 'name' and an 'input_schema'")
    if value.get("type", "custom") != "custom":
        told = f"{shown(value['type'])} is a tool of the server, which has none: nothing is run or fetched here"
        raise ValueError(f"{told}; describe one of your own")
    name, schema = _name(value.get("name")), value.get("input_schema")
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        raise ValueError(f"'input_schema' of '{name}' must be a JSON schema of type 'object'")
    known = {
        key: one for key, one in value.items() if key not in MESSAGE_ASIDE and (key, one) != ("defer_loading", False)
    }
    _only({key: one for key, one in known.items() if (key, one) != ("allowed_callers", ["direct"])}, TOOL)
    function = {"name": name, "parameters": schema}
    function |= {key: value[key] for key in ("description", "strict") if key in value}
    return {"type": "function", "function": function}


def _block(value: object) -> dict[str, Any]:
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(kind, str) or kind not in BLOCKS:
        told = f"blocks are of type {', '.join(BLOCKS)}, not {shown(kind)}"
        raise ValueError(f"{told}: this model reads no images, files or thoughts")
    if kind == "tool_result":
        _only(value, {"type", *MESSAGE_ASIDE, *BLOCKS[kind]})
        if not isinstance(value.get("is_error", False), bool):
            raise ValueError("'is_error' must be true or false")
        return {"type": kind, "tool_use_id": _id(value, "tool_use_id"), "content": content_text(value.get("content"))}
    if kind == "tool_use":
        _only(
            {key: one for key, one in value.items() if (key, one) != ("caller", CALLER)},
            {"type", *MESSAGE_ASIDE, *BLOCKS[kind]},
        )
        if not isinstance(value.get("input"), dict):
            raise ValueError("'input' of a 'tool_use' must be an object")
        return {"type": kind, "id": _id(value, "id"), "name": _name(value.get("name")), "input": value["input"]}
    return {"type": kind, "text": content_text([value])}


def _call(part: Mapping[str, Any]) -> dict[str, Any]:
    wrong = part["input"].get(WRONG) if len(part["input"]) == 1 else None
    given = wrong if isinstance(wrong, str) else part["input"]
    return {"id": part["id"], "type": "function", "function": {"name": part["name"], "arguments": given}}


def _name(value: object) -> str:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise ValueError(f"a tool's 'name' has 1 to 64 letters, digits, '_', '-' and '.', not {shown(value)}")
    return value


def _id(value: Mapping[str, Any], name: str) -> str:
    given = value.get(name)
    if not isinstance(given, str) or not 0 < len(given) <= 256:
        raise ValueError(f"'{name}' must be a text of 1 to 256 characters, not {shown(given)}")
    return given


def _only(value: Mapping[str, Any], known: set[str]) -> None:
    strange = next((name for name, one in value.items() if name not in known and one not in ({}, [], "")), None)
    if strange is not None:
        raise ValueError(f"{shown(strange)}: this server cannot do what it asks for; leave it out")


_NAME = {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"}
_TOOL: dict[str, Any] = {
    "type": "object",
    "properties": {"name": _NAME, "description": {"type": "string"}, "input_schema": {"type": "object"}},
    "required": ["name", "input_schema"],
}
_TOOLS_SCHEMA: dict[str, Any] = {"type": "array", "items": _TOOL, "maxItems": MOST_TOOLS}
_CHOICE_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "type": {"enum": [*CHOICES, "tool"]},
        "name": _NAME,
        "disable_parallel_tool_use": {"type": "boolean"},
    },
    "required": ["type"],
}
_BLOCK = {"type": "object", "properties": {"type": {"enum": list(BLOCKS)}}, "required": ["type"]}
_BLOCKS_SCHEMA: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "array", "items": _BLOCK}]}

ToolsField = Annotated[Any, PlainValidator(tools), WithJsonSchema(_TOOLS_SCHEMA)]
ChoiceField = Annotated[Any, PlainValidator(choice), WithJsonSchema(_CHOICE_SCHEMA)]
BlocksField = Annotated[Any, PlainValidator(blocks), WithJsonSchema(_BLOCKS_SCHEMA)]

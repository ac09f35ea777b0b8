"""What requests say of tools: descriptions, which are to be called, and calls of earlier turns, as OpenAI has them."""

import json
import re
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import PlainValidator, WithJsonSchema

from atma.serve.http.neutral import shown, without_nulls
from atma.serve.tools.grammar import Tool

MOST_TOOLS, MOST_CALLS, LONGEST = 128, 128, 256 << 10
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
CHOICES = ("none", "auto", "required")


class Chosen(NamedTuple):
    """Whether tools are called: if the model likes, or at all events; `names`: which, all of them if none is named."""

    mode: Literal["none", "auto", "required"] = "auto"
    names: tuple[str, ...] = ()
    alone: bool = False
    """One call and no more."""


def _tools(value: object) -> list[Tool]:
    if not isinstance(value, list) or len(value) > MOST_TOOLS:
        raise ValueError(f"must be a list of at most {MOST_TOOLS} tools")
    if len(json.dumps(value)) > LONGEST:
        raise ValueError(f"the descriptions are longer than {LONGEST:,} characters")
    tools = [_tool(one) for one in value]
    names = [tool.name for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two tools are called '{twice}'")
    return tools


def _tool(value: object) -> Tool:
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(value, dict) or value.get("type", "function") != "function" or not isinstance(function, dict):
        raise ValueError("tools must be objects with 'type': 'function' and a 'function'")
    name, parameters, strict = _name(function), function.get("parameters"), function.get("strict")
    if not isinstance(parameters, dict | None):
        raise ValueError(f"'parameters' of '{name}' must be a JSON schema, which is an object")
    if parameters is not None and parameters.get("type", "object") != "object":
        raise ValueError(f"'parameters' of '{name}' must have the type 'object', not {shown(parameters['type'])}")
    if not isinstance(function.get("description"), str | None) or not isinstance(strict, bool | None):
        raise ValueError(f"of '{name}' 'description' must be a text and 'strict' true or false")
    known = {key: one for key, one in function.items() if one is not None and key != "strict"}
    return Tool(name, parameters, strict is True, {"type": "function", "function": known})


def _name(function: dict[str, Any]) -> str:
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"a function's 'name' has 1 to 64 letters, digits, '_', '-' and '.', not {shown(name)}")
    return name


def _choice(value: object) -> Chosen:
    """Of `tool_choice`: a mode, one function, or a mode and the functions that are allowed. ValueError."""
    if isinstance(value, str) and value in CHOICES:
        return Chosen(value)
    given = value if isinstance(value, dict) else {}
    allowed = given.get("allowed_tools") if given.get("type") == "allowed_tools" else None
    if isinstance(allowed, dict) and allowed.get("mode") in ("auto", "required"):
        some = allowed.get("tools")
        if not isinstance(some, list) or not 0 < len(some) <= MOST_TOOLS:
            raise ValueError(f"'tools' of 'allowed_tools' must be a list of 1 to {MOST_TOOLS} tools")
        return Chosen(allowed["mode"], tuple(_name(_function(one)) for one in some))
    return Chosen("required", (_name(_function(given)),), alone=True)


def _function(value: object) -> dict[str, Any]:
    function = (
        value.get("function") if isinstance(value, dict) and value.get("type", "function") == "function" else None
    )
    if not isinstance(function, dict):
        kinds = '"none", "auto", "required", {"type": "function", "function": {"name": …}}'
        raise ValueError(f'must be {kinds} or {{"type": "allowed_tools", "allowed_tools": {{"mode": …, "tools": …}}}}')
    return function


def _calls(value: object) -> list[dict[str, Any]]:
    """Calls of an earlier turn, their arguments read: templates write them as they like."""
    if not isinstance(value, list) or len(value) > MOST_CALLS:
        raise ValueError(f"must be a list of at most {MOST_CALLS} calls")
    return [_call(without_nulls(one)) for one in value]


def _call(value: object) -> dict[str, Any]:
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(function, dict) or not isinstance(value.get("id", ""), str):
        raise ValueError("calls must be objects with an 'id' and a 'function'")
    arguments: Any = function.get("arguments", "{}")
    if isinstance(arguments, str):
        try:
            read = json.loads(arguments or "{}")
            arguments = read if isinstance(read, dict) else arguments
        except (ValueError, RecursionError):
            pass  # what a model wrote wrongly is shown to it as it was
    return {"type": "function", "function": {"name": _name(function), "arguments": arguments}} | (
        {"id": value["id"][:256]} if "id" in value else {}
    )


_FUNCTION = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"},
        "description": {"type": "string"},
        "parameters": {"type": "object"},
        "strict": {"type": "boolean"},
    },
    "required": ["name"],
}
_TOOL = {
    "type": "object",
    "properties": {"type": {"const": "function"}, "function": _FUNCTION},
    "required": ["function"],
}
_TOOLS_SCHEMA: dict[str, Any] = {"type": "array", "items": _TOOL, "maxItems": MOST_TOOLS}
_ALLOWED = {
    "type": "object",
    "properties": {
        "type": {"const": "allowed_tools"},
        "allowed_tools": {
            "type": "object",
            "properties": {"mode": {"enum": ["auto", "required"]}, "tools": _TOOLS_SCHEMA | {"minItems": 1}},
            "required": ["mode", "tools"],
        },
    },
    "required": ["type", "allowed_tools"],
}
_CHOICE_SCHEMA: dict[str, Any] = {"anyOf": [{"enum": list(CHOICES)}, _TOOL, _ALLOWED]}
_CALL = {"type": "object", "properties": {"id": {"type": "string"}, "function": {"type": "object"}}}
_CALLS_SCHEMA: dict[str, Any] = {"type": "array", "items": _CALL, "maxItems": MOST_CALLS}

ToolsField = Annotated[Any, PlainValidator(_tools), WithJsonSchema(_TOOLS_SCHEMA)]
ToolChoice = Annotated[Any, PlainValidator(_choice), WithJsonSchema(_CHOICE_SCHEMA)]
CallsField = Annotated[Any, PlainValidator(_calls), WithJsonSchema(_CALLS_SCHEMA)]

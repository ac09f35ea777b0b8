"""What requests say of the form of an answer: OpenAI's `response_format`, vLLM's `structured_outputs`, and Anthropic's
`output_config`."""

from typing import Annotated, Any

from pydantic import PlainValidator, WithJsonSchema

from atma.serve.structure import KINDS, Structure

FORMATS = ("text", "json_object", "json_schema")


def response_format(value: object) -> Structure | None:
    """The structure of `response_format`; None for plain text. ValueError."""
    if not isinstance(value, dict) or value.get("type") not in FORMATS:
        raise ValueError(f"must be an object with a 'type' of {', '.join(FORMATS)}")
    known = {"type", "json_schema"} if value["type"] == "json_schema" else {"type"}
    _only(value, known)
    if value["type"] == "json_schema":
        return _schema(value.get("json_schema"))
    return Structure(json_object=True, parameter="response_format") if value["type"] == "json_object" else None


def structured_outputs(value: object) -> Structure | None:
    """The structure of `structured_outputs`. ValueError."""
    if not isinstance(value, dict):
        raise ValueError(f"must be an object with one of {', '.join(KINDS)}")
    _only(value, {*KINDS, "disable_any_whitespace", "disable_fallback"})
    given = {name: value[name] for name in KINDS if value.get(name) not in (None, False)}
    for name, kind in {"json_object": bool, "disable_any_whitespace": bool, "choice": list}.items():
        if not isinstance(value.get(name), kind | None):
            raise ValueError(f"'{name}' must be {'true or false' if kind is bool else 'a list of texts'}")
    return _said(compact=value.get("disable_any_whitespace") is True, parameter="structured_outputs", **given)


def output_config(value: object) -> Structure | None:
    """The structure of `output_config`, as Anthropic's API has it; None for plain text. ValueError."""
    if not isinstance(value, dict):
        raise ValueError("must be an object with a 'format'")
    _only(value, {"format", "effort"})
    if value.get("effort") not in (None, "high"):
        raise ValueError("'effort' can only be high here; leave it out")
    form = value.get("format")
    if form is None:
        return None
    if not isinstance(form, dict) or form.get("type") != "json_schema" or not isinstance(form.get("schema"), dict):
        raise ValueError("'format' must be an object of type json_schema with a 'schema', which is an object")
    _only(form, {"type", "schema", "name"})
    return _said(json=form["schema"], parameter="output_config")


def _schema(value: object) -> Structure:
    if not isinstance(value, dict) or not isinstance(value.get("schema"), dict | bool):
        raise ValueError("'json_schema' must be an object with a 'schema', which is an object")
    _only(value, {"name", "description", "schema", "strict"})
    if not isinstance(value.get("strict"), bool | None):
        raise ValueError("'strict' must be true or false")
    return _said(json=value["schema"], lenient=value.get("strict") is False, parameter="response_format")


def _said(**given: Any) -> Structure:
    try:
        return Structure(**given)
    except ValueError as error:  # the field is named by whoever tells what is wrong with it
        raise ValueError(str(error).partition(": ")[2]) from None


def _only(value: dict[str, Any], known: set[str]) -> None:
    strange = next((name for name, given in value.items() if name not in known and given not in (None, False)), None)
    if strange is not None:
        raise ValueError(f"{strange[:40]!a} is unknown; leave it out. Known: {', '.join(sorted(known))}")


_SCHEMA = {"anyOf": [{"type": "object"}, {"type": "boolean"}]}
_FORMAT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "type": {"enum": list(FORMATS)},
        "json_schema": {"type": "object", "properties": {"schema": _SCHEMA}, "required": ["schema"]},
    },
    "required": ["type"],
}
_OUTPUTS_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "json": {"anyOf": [{"type": "object"}, {"type": "boolean"}, {"type": "string"}]},
        "regex": {"type": "string"},
        "grammar": {"type": "string"},
        "choice": {"type": "array", "items": {"type": "string"}, "minItems": 1},
        "json_object": {"type": "boolean"},
        "disable_any_whitespace": {"type": "boolean"},
    },
}

_CONFIG_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "format": {
            "type": "object",
            "properties": {"type": {"const": "json_schema"}, "schema": {"type": "object"}},
            "required": ["type", "schema"],
        },
        "effort": {"const": "high"},
    },
}

ResponseFormat = Annotated[Any, PlainValidator(response_format), WithJsonSchema(_FORMAT_SCHEMA)]
StructuredOutputs = Annotated[Any, PlainValidator(structured_outputs), WithJsonSchema(_OUTPUTS_SCHEMA)]
OutputConfig = Annotated[Any, PlainValidator(output_config), WithJsonSchema(_CONFIG_SCHEMA)]

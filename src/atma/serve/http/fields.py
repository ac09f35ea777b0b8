"""Fields that pydantic alone cannot judge: how their values are checked, and what the schema says of them."""

import json
import re
from typing import Annotated, Any

from pydantic import Field, PlainValidator, WithJsonSchema

from atma.serve.http.neutral import shown, without_nulls

MOST_CHOICES, MOST_TEXTS, MOST_STOPS, MOST_LOGPROBS, MOST_BIASES, MOST_MESSAGES = 16, 128, 16, 20, 1024, 4096
LONGEST_STOP, MOST_STOP_TOKENS, MOST_KEYWORDS, LONGEST_KEYWORDS = 128, 128, 32, 16384
MOST_INPUTS = 2048
"""Texts of one request for embeddings."""
TOKEN = 2**31

Prompt = str | list[str] | list[int] | list[list[int]]
Text = dict[str, object]


def _prompt(value: object) -> Prompt:
    return inputs(value, MOST_TEXTS)


def inputs(value: object, most: int = MOST_INPUTS) -> Prompt:
    """A text, tokens, or a list of at most so many of either. ValueError for anything else."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError("must be a text, a list of texts, token ids, or a list of lists of token ids; none empty")
    if type(value[0]) is int:
        return _tokens(value)
    if len(value) > most:
        raise ValueError(f"at most {most:,} texts in one request, not {len(value):,}")
    if all(isinstance(item, str) for item in value):
        return value
    return [_tokens(item) for item in value]


def _tokens(value: object) -> list[int]:
    if not isinstance(value, list) or not value:
        raise ValueError("must be texts or lists of token ids, all of one kind, none empty")
    for token in value:
        if type(token) is not int or not 0 <= token < TOKEN:
            raise ValueError(f"token ids are whole numbers from 0, not {shown(token)}")
    return value


def _some_tokens(value: object) -> list[int]:
    return _tokens(value) if value != [] else []


def _stop_tokens(value: object) -> list[int]:
    tokens = _some_tokens(value)
    if len(tokens) > MOST_STOP_TOKENS:
        raise ValueError(f"at most {MOST_STOP_TOKENS} stop tokens, not {len(tokens):,}")
    return tokens


def _stop(value: object) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MOST_STOPS:
        raise ValueError(f"must be a text or a list of at most {MOST_STOPS} texts")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= LONGEST_STOP:
            raise ValueError(f"stop texts have 1 to {LONGEST_STOP} characters, not {shown(stop)}")
    return stops


def _biases(value: object) -> dict[int, float]:
    if not isinstance(value, dict) or len(value) > MOST_BIASES:
        raise ValueError(f"must map at most {MOST_BIASES:,} token ids to numbers from -100 to 100")
    value = {token: bias for token, bias in value.items() if bias is not None}
    for token, bias in value.items():
        if not re.fullmatch("[0-9]{1,9}", token, re.ASCII):
            raise ValueError(f"{shown(token)} is no token id")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise ValueError(f"of token {token} must be a number from -100 to 100, not {shown(bias)}")
    return {int(token): float(bias) for token, bias in value.items()}


def content_text(value: object) -> str:
    """A text, or parts of type "text" put together. ValueError for anything else."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise ValueError("must be a text or a list of parts of type 'text'")
    parts = without_nulls(value)
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text", ""), str):
            raise ValueError("parts must be of type 'text': this model reads no images, sounds or files")
    return "".join(part.get("text", "") for part in parts)


def _keywords(value: object) -> dict[str, Any] | None:
    """What a template is given besides; names that it has already are refused where the template is known."""
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > MOST_KEYWORDS:
        raise ValueError(f"must be an object of at most {MOST_KEYWORDS} names")
    for name in value:
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]{0,63}", name, re.ASCII):
            raise ValueError(f"{shown(name)} is no name that a template can have")
    if len(json.dumps(value)) > LONGEST_KEYWORDS:
        raise ValueError(f"longer than {LONGEST_KEYWORDS:,} characters")
    return value


def _length(value: object) -> int:
    if type(value) is not int or not (value == -1 or 1 <= value < TOKEN):
        raise ValueError(f"must be a whole number from 1, or -1 for as much as there is room for, not {shown(value)}")
    return value


_INTEGERS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}


def _inputs_schema(most: int) -> Text:
    several = {"type": "array", "minItems": 1, "maxItems": most}
    lists = [several | {"items": items} for items in ({"type": "string"}, _INTEGERS)]
    return {"anyOf": [{"type": "string"}, _INTEGERS, *lists]}


_PROMPT_SCHEMA, INPUT_SCHEMA = _inputs_schema(MOST_TEXTS), _inputs_schema(MOST_INPUTS)
_STOP_TEXT = {"type": "string", "minLength": 1, "maxLength": LONGEST_STOP}
_STOP_SCHEMA: Text = {"anyOf": [_STOP_TEXT, {"type": "array", "items": _STOP_TEXT, "maxItems": MOST_STOPS}]}
_STOP_TOKENS_SCHEMA: Text = {**_INTEGERS, "minItems": 0, "maxItems": MOST_STOP_TOKENS}
_BIAS = {"type": "number", "minimum": -100, "maximum": 100}
_BIAS_SCHEMA: Text = {"type": "object", "additionalProperties": _BIAS, "propertyNames": {"pattern": "^[0-9]{1,9}$"}}
_LENGTH_SCHEMA: Text = {"type": "integer", "minimum": -1, "not": {"const": 0}}
_NAME = {"pattern": "^[A-Za-z_][A-Za-z0-9_]{0,63}$"}
_KEYWORDS_SCHEMA: Text = {"anyOf": [{"type": "object", "propertyNames": _NAME}, {"type": "null"}]}
_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_CONTENT_SCHEMA: Text = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}, {"type": "null"}]}

TokensField = Annotated[Any, PlainValidator(_some_tokens), WithJsonSchema({**_INTEGERS, "minItems": 0})]
PromptField = Annotated[Any, PlainValidator(_prompt), WithJsonSchema(_PROMPT_SCHEMA)]
StopField = Annotated[Any, PlainValidator(_stop), WithJsonSchema(_STOP_SCHEMA)]
StopTokensField = Annotated[Any, PlainValidator(_stop_tokens), WithJsonSchema(_STOP_TOKENS_SCHEMA)]
BiasField = Annotated[Any, PlainValidator(_biases), WithJsonSchema(_BIAS_SCHEMA)]
ContentField = Annotated[Any, PlainValidator(content_text), WithJsonSchema(_CONTENT_SCHEMA)]
Length = Annotated[int, PlainValidator(_length), WithJsonSchema(_LENGTH_SCHEMA)]
KeywordsField = Annotated[Any, PlainValidator(_keywords), WithJsonSchema(_KEYWORDS_SCHEMA)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Short = Annotated[str, Field(max_length=128)]

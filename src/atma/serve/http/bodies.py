"""What requests may hold: every field with its type and bounds, so that what is wrong is told before any work.

Fields are of three kinds. Those below are honoured. Those of OpenAI's API that cannot change the text are accepted and
left aside. Those that would change it, and cannot be honoured, are accepted only with the value that asks for nothing;
any other value, and any field that nobody knows, is refused by name: an answer is never other than what was asked for.
"""

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator

from atma.serve.http.structured import ResponseFormat, StructuredOutputs

ASIDE = {"user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
ASIDE |= {"parallel_tool_calls"}
NEUTRAL: dict[str, list[Any]] = {
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "modalities": [["text"]],
    "store": [False],
    "suffix": [""],
    "best_of": [1],
    "audio": [],
    "prediction": [],
    "web_search_options": [],
    "reasoning_effort": ["none"],
    "verbosity": ["medium"],
}
MESSAGE_NEUTRAL = ("refusal", "annotations", "audio", "function_call", "tool_calls", "reasoning_content")

MOST_CHOICES, MOST_TEXTS, MOST_STOPS, MOST_LOGPROBS, MOST_BIASES, MOST_MESSAGES = 16, 128, 16, 20, 1024, 4096
LONGEST_STOP, MOST_STOP_TOKENS = 128, 128
TOKEN = 2**31

Prompt = str | list[str] | list[int] | list[list[int]]
Text = dict[str, object]


def shown(value: object) -> str:
    """The beginning of a value in quotes, without characters that no answer can hold."""
    return ascii(str(value)[:40])


def _prompt(value: object) -> Prompt:
    """A text, tokens, or a list of either."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError("must be a text, a list of texts, token ids, or a list of lists of token ids; none empty")
    if type(value[0]) is int:
        return _tokens(value)
    if len(value) > MOST_TEXTS:
        raise ValueError(f"at most {MOST_TEXTS} texts in one request, not {len(value):,}")
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


def _content(value: object) -> str:
    """A text, or parts of type "text" put together."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise ValueError("must be a text or a list of parts of type 'text'")
    parts = _without_nulls(value)
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text", ""), str):
            raise ValueError("parts must be of type 'text': this model reads no images, sounds or files")
    return "".join(part.get("text", "") for part in parts)


_INTEGERS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_STRINGS = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MOST_TEXTS}
_LISTS = {"type": "array", "items": _INTEGERS, "minItems": 1, "maxItems": MOST_TEXTS}
_PROMPT_SCHEMA: Text = {"anyOf": [{"type": "string"}, _STRINGS, _INTEGERS, _LISTS]}
_STOP_TEXT = {"type": "string", "minLength": 1, "maxLength": LONGEST_STOP}
_STOP_SCHEMA: Text = {"anyOf": [_STOP_TEXT, {"type": "array", "items": _STOP_TEXT, "maxItems": MOST_STOPS}]}
_STOP_TOKENS_SCHEMA: Text = {**_INTEGERS, "minItems": 0, "maxItems": MOST_STOP_TOKENS}
_BIAS = {"type": "number", "minimum": -100, "maximum": 100}
_BIAS_SCHEMA: Text = {"type": "object", "additionalProperties": _BIAS, "propertyNames": {"pattern": "^[0-9]{1,9}$"}}
_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_CONTENT_SCHEMA: Text = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}, {"type": "null"}]}

PromptField = Annotated[Any, PlainValidator(_prompt), WithJsonSchema(_PROMPT_SCHEMA)]
StopField = Annotated[Any, PlainValidator(_stop), WithJsonSchema(_STOP_SCHEMA)]
StopTokensField = Annotated[Any, PlainValidator(_stop_tokens), WithJsonSchema(_STOP_TOKENS_SCHEMA)]
BiasField = Annotated[Any, PlainValidator(_biases), WithJsonSchema(_BIAS_SCHEMA)]
ContentField = Annotated[Any, PlainValidator(_content), WithJsonSchema(_CONTENT_SCHEMA)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Short = Annotated[str, Field(max_length=128)]


def _without_nulls(value: Any) -> Any:
    """A value whose objects have no field that is null."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value if part is not None] if isinstance(value, list) else value


class Body(BaseModel):
    """Strict: a number in quotes is no number. Null is the same as nothing, in fields that nobody knows too."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        """Leave out nulls and what changes nothing; refuse what cannot be honoured or is not known."""
        if not isinstance(values, dict):
            raise ValueError("the body must be a JSON object")
        kept = {}
        for key, value in values.items():
            if value is None:
                continue
            if key in cls.model_fields:
                kept[key] = value
            elif key not in ASIDE and not cls._asks_nothing(key, value):
                raise ValueError(cls._refusal(key))
        return kept

    @classmethod
    def _asks_nothing(cls, key: str, value: Any) -> bool:
        return _without_nulls(value) in NEUTRAL.get(key, ())

    @classmethod
    def _refusal(cls, key: str) -> str:
        if key in NEUTRAL:
            return f"{shown(key)}: this server cannot do what it asks for; leave it out"
        near = difflib.get_close_matches(key[:64], cls.model_fields, 1)
        return f"unknown field {shown(key)}" + (f"; did you mean '{near[0]}'?" if near else "")


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class SamplingBody(Body):
    """What both kinds of completion share."""

    model: Annotated[str, Field(max_length=256)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=TOKEN)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    stop: StopField = []
    stop_token_ids: StopTokensField = []
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    logit_bias: BiasField = {}
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    cache_salt: Short = ""
    response_format: ResponseFormat = None
    structured_outputs: StructuredOutputs = None

    @model_validator(mode="after")
    def _streams(self) -> "SamplingBody":
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' is only for requests with 'stream': true")
        if self.response_format is not None and self.structured_outputs is not None:
            raise ValueError("give either 'response_format' or 'structured_outputs'")
        return self


class CompletionBody(SamplingBody):
    """The body of /v1/completions."""

    prompt: PromptField
    max_tokens: Annotated[int, Field(ge=0, lt=TOKEN)] = 16
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool = False


class Message(Body):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: ContentField = ""
    name: Short | None = None

    @classmethod
    def _asks_nothing(cls, key: str, value: Any) -> bool:
        value = _without_nulls(value)
        return not value if key in MESSAGE_NEUTRAL else value in ({}, [], "")

    @classmethod
    def _refusal(cls, key: str) -> str:
        return f"{shown(key)} in a message: this server cannot do what it asks for; leave it out"


Messages = Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]


class ChatBody(SamplingBody):
    """The body of /v1/chat/completions."""

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1, lt=TOKEN)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=TOKEN)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _scored(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("'top_logprobs' is only for requests with 'logprobs': true")
        return self


class TokenizeBody(Body):
    """The body of /tokenize: a text, or messages as a chat would read them."""

    model: Annotated[str, Field(max_length=256)] | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _one(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either 'prompt' or 'messages'")
        return self


class DetokenizeBody(Body):
    """The body of /detokenize."""

    model: Annotated[str, Field(max_length=256)] | None = None
    tokens: Annotated[Any, PlainValidator(_some_tokens), WithJsonSchema({**_INTEGERS, "minItems": 0})]

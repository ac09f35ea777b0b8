"""What a request of OpenAI's Responses may have, and the chat that it asks for."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from fastapi.exceptions import RequestValidationError
from pydantic import Field, PlainValidator, ValidationError, WithJsonSchema, model_validator

from atma.serve.http.bodies import Body, ChatBody
from atma.serve.http.fields import MOST_LOGPROBS, TOKEN, KeywordsField, Penalty, Short, StopField
from atma.serve.http.neutral import NEUTRAL, Refused, asks_nothing, require_finite, shown, without_nulls
from atma.serve.http.responses.items import InputField, Message, messages
from atma.serve.http.structured import FORMATS
from atma.serve.http.tool_fields import CHOICES, MOST_TOOLS

SCORES = "message.output_text.logprobs"
INCLUDED = {
    SCORES,
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
}
"""All but the first are parts of items that no answer here has."""
ONLY: dict[str, list[Any]] = {
    "background": [False],
    "conversation": [""],
    "prompt": [{}],
    "context_management": [[]],
    "moderation": [{}],
    "image": [{}],
}
"""Fields that are taken with these values alone."""
LEFT = {"max_tool_calls", "prompt_cache_options", "access_programs", "background_options"}
"""Fields that change nothing here: limits of tools that there are none of, and hints."""
PASSED = (
    "model",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "ignore_eos",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "chat_template_kwargs",
    "cache_salt",
    "stream",
    "tool_choice",
    "parallel_tool_calls",
)
"""Fields that a chat has too."""
NAMES = {"messages": "input", "response_format": "text", "max_completion_tokens": "max_output_tokens"}
NAMES |= {"max_tokens": "max_output_tokens", "logprobs": "include"}
"""What fields of a chat are called here."""
FUNCTION = ("type", "name", "description", "parameters", "strict")
ASKS_NOTHING = ({}, [], "", False, ["direct"])


class Form(NamedTuple):
    """Of `text`: the form of an answer, as it was said and as a chat says it."""

    said: Mapping[str, Any] = {"type": "text"}
    of_chat: Mapping[str, Any] | None = None


class Options(Body):
    include_obfuscation: bool = False


def _form(value: object) -> Form:
    value = without_nulls(value)
    if not isinstance(value, dict):
        raise ValueError("must be an object with a 'format'")
    require_finite(value)
    _only(value, ("format", "verbosity"))
    if value.get("verbosity", "medium") != "medium":
        raise ValueError("'verbosity' can only be medium here; leave it out")
    said = value.get("format", {"type": "text"})
    if not isinstance(said, dict) or said.get("type") not in FORMATS:
        raise ValueError(f"'format' must be an object with a 'type' of {', '.join(FORMATS)}")
    if said["type"] != "json_schema":
        _only(said, ("type",))
        return Form(said, said)
    if not isinstance(said.get("description", ""), str):
        raise ValueError("the 'description' of a format must be a text")
    if not isinstance(said.get("name"), str) or not isinstance(said.get("schema"), dict):
        raise ValueError("'format' of type json_schema must have a 'name' and a 'schema', which is an object")
    return Form(said, {"type": "json_schema", "json_schema": {k: v for k, v in said.items() if k != "type"}})


def _tools(value: object) -> list[dict[str, Any]]:
    if not isinstance(value, list) or len(value) > MOST_TOOLS:
        raise ValueError(f"must be a list of at most {MOST_TOOLS} tools")
    require_finite(value)
    return [_tool(without_nulls(one)) for one in value]


def _tool(value: object) -> dict[str, Any]:
    if not isinstance(value, dict) or value.get("type") != "function":
        kind = shown(value.get("type")) if isinstance(value, dict) else shown(value)
        raise ValueError(f"{kind} is no tool that there is here: nothing is run or fetched; describe a 'function'")
    _only(value, FUNCTION)
    return {"type": "function", "function": {key: one for key, one in value.items() if key in FUNCTION[1:]}}


def _choice(value: object) -> Any:
    if isinstance(value, str) and value in CHOICES:
        return value
    if isinstance(value, dict) and value.get("type") == "allowed_tools" and isinstance(value.get("tools"), list):
        _only(value, ("type", "mode", "tools"))
        allowed = {"mode": value.get("mode"), "tools": [_named(one) for one in value["tools"]]}
        return {"type": "allowed_tools", "allowed_tools": allowed}
    return _named(value)


def _named(value: object) -> dict[str, Any]:
    if not isinstance(value, dict) or value.get("type") != "function" or not isinstance(value.get("name"), str):
        kinds = '"none", "auto", "required" or {"type": "function", "name": …}'
        raise ValueError(f'must be {kinds}, or {{"type": "allowed_tools", "mode": …, "tools": […]}}')
    _only(value, ("type", "name"))
    return {"type": "function", "function": {"name": value["name"]}}


def _included(value: object) -> list[str]:
    if not isinstance(value, list):
        raise ValueError("must be a list of names")
    strange = next((one for one in value if not isinstance(one, str) or one not in INCLUDED), None)
    if strange is not None:
        raise ValueError(f"{shown(strange)} is unknown; known are {', '.join(sorted(INCLUDED))}")
    return value


def _reasoning(value: object) -> None:
    """Nothing; what is said of a summary is said of what there is none of."""
    value = without_nulls(value)
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    _only(value, ("effort", "summary", "generate_summary", "context"))
    if value.get("effort", "none") != "none":
        raise ValueError(f"'effort': this server tells no reasoning apart; leave it out, not {shown(value['effort'])}")


def _metadata(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > 16:
        raise ValueError("must be an object of at most 16 texts")
    for key, one in value.items():
        if len(key) > 64 or not isinstance(one, str) or len(one) > 512:
            raise ValueError(f"names have up to 64 characters and values are texts of up to 512: not {shown(key)}")
    return value


def _only(value: Mapping[str, Any], known: Sequence[str]) -> None:
    strange = next((name for name, one in value.items() if name not in known and one not in ASKS_NOTHING), None)
    if strange is not None:
        raise ValueError(f"{shown(strange)}: this server cannot do what it asks for; leave it out")


_TOOL = {
    "type": "object",
    "properties": {"type": {"const": "function"}, "name": {"type": "string"}, "parameters": {"type": "object"}},
    "required": ["type", "name"],
}
_NAMED = {
    "type": "object",
    "properties": {"type": {"const": "function"}, "name": {"type": "string"}},
    "required": ["type", "name"],
}
_ALLOWED = {
    "type": "object",
    "properties": {
        "type": {"const": "allowed_tools"},
        "mode": {"enum": ["auto", "required"]},
        "tools": {"type": "array", "items": _NAMED, "minItems": 1, "maxItems": MOST_TOOLS},
    },
    "required": ["type", "mode", "tools"],
}
_CHOICE = {"anyOf": [{"enum": list(CHOICES)}, _NAMED, _ALLOWED]}
_FORMAT = {"type": "object", "properties": {"type": {"enum": list(FORMATS)}}, "required": ["type"]}
_TEXTS = {"type": "object", "additionalProperties": {"type": "string", "maxLength": 512}, "maxProperties": 16}


def _schema(value: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema(value)


class ResponsesBody(Body):
    """The body of /v1/responses."""

    model: Annotated[str, Field(max_length=256)] | None = None
    input: InputField
    instructions: str = ""
    previous_response_id: Annotated[str, Field(max_length=256)] | None = None
    store: bool = True
    max_output_tokens: Annotated[int, Field(ge=1, lt=TOKEN)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    stream: bool = False
    stream_options: Options | None = None
    tools: Annotated[Any, PlainValidator(_tools), _schema({"type": "array", "items": _TOOL})] = ()
    tool_choice: Annotated[Any, PlainValidator(_choice), _schema(_CHOICE)] = "auto"
    parallel_tool_calls: bool = True
    text: Annotated[Any, PlainValidator(_form), _schema({"type": "object", "properties": {"format": _FORMAT}})] = Form()
    metadata: Annotated[Any, PlainValidator(_metadata), _schema(_TEXTS)] = None
    truncation: Literal["disabled"] = "disabled"
    include: Annotated[
        Any, PlainValidator(_included), _schema({"type": "array", "items": {"enum": sorted(INCLUDED)}})
    ] = ()
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] = 0
    reasoning: Annotated[Any, PlainValidator(_reasoning), _schema({"type": "object"})] = None
    top_k: Annotated[int, Field(ge=-1, lt=TOKEN)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopField = ()
    ignore_eos: bool = False
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    chat_template_kwargs: KeywordsField = None
    cache_salt: Short = ""

    @classmethod
    def _asks_nothing(cls, key: str, value: Any) -> bool:
        return key in LEFT or without_nulls(value) in ONLY.get(key, ()) or asks_nothing(key, value)

    @classmethod
    def _refusal(cls, key: str) -> str:
        known = key in ONLY and key not in NEUTRAL
        return f"{shown(key)}: this server does nothing of that; leave it out" if known else super()._refusal(key)

    @model_validator(mode="after")
    def _scores(self) -> "ResponsesBody":
        if self.top_logprobs and not self.scored:
            raise Refused(f"'top_logprobs' is only for requests that 'include' {SCORES}", "top_logprobs")
        if self.scored and self.tools and self.tool_choice != "none":
            raise Refused(f"'include': beside tools there are no {SCORES}", "include")
        return self

    @property
    def scored(self) -> bool:
        """Whether log-probabilities are asked for."""
        return SCORES in self.include

    def chat(self, before: Sequence[Message] = ()) -> ChatBody:
        """The same in the words of a chat; `before`: the messages of earlier turns. RequestValidationError."""
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        given = {name: getattr(self, name) for name in PASSED}
        given |= {"messages": [*system, *before, *messages(self.input)], "tools": list(self.tools)}
        given |= {"stop": list(self.stop), "response_format": self.text.of_chat, "logprobs": self.scored}
        given |= {"max_completion_tokens": self.max_output_tokens}
        given |= {"top_logprobs": self.top_logprobs} if self.scored else {}
        try:
            return ChatBody.model_validate(given)
        except ValidationError as error:
            found = [one | {"loc": tuple(NAMES.get(str(p), p) for p in one["loc"])} for one in error.errors()]
            raise RequestValidationError(found) from None

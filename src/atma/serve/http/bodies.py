"""What requests may hold: every field with its type and bounds, so that what is wrong is told before any work.

What else clients send, and what becomes of it, is in `neutral`; how single values are checked in `fields`.
"""

import difflib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from atma.serve.http.fields import (
    MOST_CHOICES,
    MOST_LOGPROBS,
    MOST_MESSAGES,
    TOKEN,
    BiasField,
    ContentField,
    KeywordsField,
    Length,
    Penalty,
    PromptField,
    Short,
    StopField,
    StopTokensField,
    TokensField,
    whole_number,
)
from atma.serve.http.neutral import (
    ASIDE,
    IGNORED,
    MESSAGE_ASIDE,
    MESSAGE_NEUTRAL,
    MOST_IGNORED,
    NEUTRAL,
    Refused,
    asks_nothing,
    shown,
    without_nulls,
)
from atma.serve.http.rendering import Rendering
from atma.serve.http.structured import ResponseFormat, StructuredOutputs
from atma.serve.http.tool_fields import CallsField, ToolChoice, ToolsField

NO_MORE: dict[str, Any] = {"additionalProperties": {"type": "null"}}
"""What schemas say of fields that they do not name; those that are known and ask for nothing are taken all the same."""


class Body(BaseModel):
    """Strict: a number in quotes is no number. Null is the same as nothing, in fields that nobody knows too."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, hide_input_in_errors=True, json_schema_extra=NO_MORE)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        """Leave out nulls and what changes nothing; refuse what cannot be honoured or is not known."""
        if not isinstance(values, dict):
            raise ValueError("the body must be a JSON object")
        kept, ignored = {}, IGNORED.get()
        for key, value in values.items():
            if value is None:
                continue
            if key in cls.model_fields:
                kept[key] = whole_number(value)
            elif key in ASIDE or cls._asks_nothing(key, value):
                continue
            elif ignored is not None and key not in NEUTRAL and len(ignored) < MOST_IGNORED:
                ignored += [key] if key not in ignored else []
            else:
                raise Refused(cls._refusal(key), key)
        return kept

    @classmethod
    def _asks_nothing(cls, key: str, value: Any) -> bool:
        return asks_nothing(key, value)

    @classmethod
    def _refusal(cls, key: str) -> str:
        if key in NEUTRAL:
            return f"{shown(key)}: this server cannot do what it asks for; leave it out"
        near = difflib.get_close_matches(key[:64], cls.model_fields, 1)
        return f"unknown field {shown(key)}" + (f"; did you mean '{near[0]}'?" if near else "")


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False
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
    min_tokens: Annotated[int, Field(ge=0, lt=TOKEN)] = 0
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool | None = None
    return_token_ids: bool = False
    cache_prompt: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None
    cache_salt: Short = ""
    response_format: ResponseFormat = None
    structured_outputs: StructuredOutputs = None

    @model_validator(mode="after")
    def _streams(self) -> "SamplingBody":
        asked = self.stream_options
        if asked is not None and (asked.include_usage or asked.continuous_usage_stats) and not self.stream:
            raise Refused("'stream_options' is only for requests with 'stream': true", "stream_options")
        if self.spaces_between_special_tokens and not self.skip_special_tokens:
            told = "'spaces_between_special_tokens': special tokens are written without spaces; make it false"
            raise Refused(told, "spaces_between_special_tokens")
        if self.response_format is not None and self.structured_outputs is not None:
            raise Refused("give either 'response_format' or 'structured_outputs'", "structured_outputs")
        return self


class CompletionBody(SamplingBody):
    """The body of /v1/completions."""

    prompt: PromptField
    max_tokens: Annotated[int, Field(ge=0, lt=TOKEN)] = 16
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool = False
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None

    @model_validator(mode="after")
    def _all_told(self) -> "CompletionBody":
        if self.best_of not in (None, 1, self.n):
            raise Refused(self._refusal("best_of"), "best_of")
        return self


class Message(Body):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: ContentField = ""
    name: Short | None = None
    tool_calls: CallsField = []
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None

    @classmethod
    def _asks_nothing(cls, key: str, value: Any) -> bool:
        value = without_nulls(value)
        return key in MESSAGE_ASIDE or (not value if key in MESSAGE_NEUTRAL else value in ({}, [], ""))

    @classmethod
    def _refusal(cls, key: str) -> str:
        return f"{shown(key)} in a message: this server cannot do what it asks for; leave it out"


Messages = Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]


class RenderedBody(Body):
    """How messages are rendered by the chat template."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: KeywordsField = None
    tools: ToolsField = []

    @property
    def rendering(self) -> Rendering:
        """As `chat_tokens` takes it: the beginning of an answer comes last unless the last message is gone on with."""
        continued = self.continue_final_message
        prompted = not continued if self.add_generation_prompt is None else self.add_generation_prompt
        return Rendering(prompted, continued, self.chat_template_kwargs or {})

    @model_validator(mode="after")
    def _one_end(self) -> "RenderedBody":
        if self.continue_final_message and self.add_generation_prompt:
            told = "'continue_final_message' and 'add_generation_prompt': only one of them may be true"
            raise Refused(told, "continue_final_message")
        return self


class ChatBody(SamplingBody, RenderedBody):
    """The body of /v1/chat/completions."""

    messages: Messages
    echo: bool = False
    max_tokens: Length | None = None
    max_completion_tokens: Length | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool = True

    @property
    def begun(self) -> str:
        """What the answer's text begins with: the last message, if it is an answer and is to be echoed."""
        last = self.messages[-1]
        return last.content if self.echo and last.role == "assistant" else ""

    @property
    def best(self) -> int | None:
        """The best tokens of each place to be told; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _scored(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise Refused("'top_logprobs' is only for requests with 'logprobs': true", "top_logprobs")
        return self


ONE_OF: list[Any] = [
    {"properties": {name: {"type": kind}}, "required": [name]}
    for name, kind in {"prompt": "string", "messages": "array"}.items()
]


class TokenizeBody(RenderedBody):
    """The body of /tokenize: a text, or messages as a chat would read them."""

    model_config = ConfigDict(json_schema_extra=NO_MORE | {"oneOf": ONE_OF})

    model: Annotated[str, Field(max_length=256)] | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either 'prompt' or 'messages'")
        return self


class DetokenizeBody(Body):
    """The body of /detokenize."""

    model: Annotated[str, Field(max_length=256)] | None = None
    tokens: TokensField

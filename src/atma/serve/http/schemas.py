"""What the routes answer, for /openapi.json; the answers themselves are written by `answers`, `embeddings`, `app`."""

from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict

Finish = Literal["stop", "length"]
ChatFinish = Literal["stop", "length", "tool_calls"]


class Answered(BaseModel):
    """Nothing is in an answer that its schema does not have."""

    model_config = ConfigDict(extra="forbid")


class Error(Answered):
    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(Answered):
    """Every refusal."""

    error: Error


class MessageError(Answered):
    type: str
    message: str


class MessageErrorAnswer(Answered):
    """Every refusal in the words of Anthropic's API."""

    type: Literal["error"]
    error: MessageError


class PromptDetails(Answered):
    cached_tokens: int


class Usage(Answered):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class ChatToken(Answered):
    token: str
    logprob: float
    bytes: list[int]


class ScoredChatToken(ChatToken):
    top_logprobs: list[ChatToken]


class ChatLogprobs(Answered):
    content: list[ScoredChatToken]
    refusal: None


class CalledFunction(Answered):
    name: str
    arguments: str


class ToolCall(Answered):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(Answered):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Answered):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinish
    token_ids: list[int] | None = None


class ChatAnswer(Answered):
    """A chat's answer in one body; streamed it is chunks, each an event."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None


class TextLogprobs(Answered):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Answered):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Finish
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class TextAnswer(Answered):
    """Continued texts in one body; streamed they are chunks, each an event."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage


class Embedding(Answered):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Answered):
    prompt_tokens: int
    total_tokens: int


class EmbeddingAnswer(Answered):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class ModelAnswer(Answered):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    type: Literal["model"]
    display_name: str
    created_at: str
    parent: str | None = None
    max_model_len: int | None = None
    chat_template: bool | None = None
    description: list[str] | None = None


class ModelsAnswer(Answered):
    """In the words of OpenAI's API and of Anthropic's."""

    object: Literal["list"]
    data: list[ModelAnswer]
    has_more: bool
    first_id: str
    last_id: str


class TokenizeAnswer(Answered):
    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizeAnswer(Answered):
    prompt: str


class TokenizerAnswer(BaseModel):
    """Beside these, the special tokens that the model's folder names, such as `pad_token`."""

    tokenizer_class: str
    name: str
    hash: str
    vocab_size: int
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    special_tokens: dict[str, int]
    end_of_turn_tokens: list[str | None]
    beginning: list[int]
    chat_template: str
    chat_template_source: str


class HealthAnswer(Answered):
    status: Literal["loading", "ready", "draining", "failed", "closed"]
    model: str


class MessageText(Answered):
    type: Literal["text"]
    text: str


class MessageToolUse(Answered):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class MessageUsage(Answered):
    input_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int
    output_tokens: int


class MessageAnswer(Answered):
    """An answer in the words of Anthropic's API."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[MessageText | MessageToolUse]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage


class CountAnswer(Answered):
    input_tokens: int


REFUSALS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer, "description": "Refused, with the field at fault where there is one"},
    "5XX": {"model": ErrorAnswer, "description": "Not now, or not by this server"},
}
MESSAGE_REFUSALS = {status: told | {"model": MessageErrorAnswer} for status, told in REFUSALS.items()}
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {
            "text/event-stream": {"schema": {"type": "string"}},
        },
        "description": 'In one body, or with "stream": true as server-sent events',
    }
}


def describe(app: FastAPI) -> None:
    """Take out of the schema what FastAPI says of refusals that are never so: they are 400, in the words above; and say
    that what is read can be asked for its head."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        schema = made()
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
            if "get" in path and "head" not in path:
                path["head"] = _head(path["get"])
        for name in ("HTTPValidationError", "ValidationError"):
            schema.get("components", {}).get("schemas", {}).pop(name, None)
        return schema

    app.openapi = openapi


def _head(got: dict[str, Any]) -> dict[str, Any]:
    """Asking for the head of what is read so."""
    bare = {status: {"description": told["description"]} for status, told in got["responses"].items()}
    own = {"operationId": f"{got['operationId']}_head", "summary": f"{got['summary']}: its head", "responses": bare}
    return own | ({"parameters": got["parameters"]} if "parameters" in got else {})

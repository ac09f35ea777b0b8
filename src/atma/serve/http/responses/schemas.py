"""What the routes of Responses answer, for /openapi.json."""

from typing import Any, Literal

from atma.serve.http.schemas import Answered, ScoredChatToken


class OutputText(Answered):
    type: Literal["output_text"]
    text: str
    annotations: list[None]
    logprobs: list[ScoredChatToken]


class OutputMessage(Answered):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["completed", "incomplete"]
    content: list[OutputText]


class FunctionCall(Answered):
    id: str
    type: Literal["function_call"]
    status: Literal["completed", "incomplete"]
    call_id: str
    name: str
    arguments: str


class InputDetails(Answered):
    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(Answered):
    reasoning_tokens: int


class ResponseUsage(Answered):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Incomplete(Answered):
    reason: Literal["max_output_tokens"]


class Function(Answered):
    type: Literal["function"]
    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool


class Named(Answered):
    type: Literal["function"]
    name: str


class Allowed(Answered):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[Named]


class Reasoning(Answered):
    effort: None
    summary: None


class TextForm(Answered):
    format: dict[str, Any]
    verbosity: Literal["medium"]


class ResponseAnswer(Answered):
    """An answer in one body; streamed it is events, of which the last has it whole."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["completed", "incomplete"]
    background: Literal[False]
    error: None
    incomplete_details: Incomplete | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    model: str
    output: list[OutputMessage | FunctionCall]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: Reasoning
    service_tier: Literal["default"]
    store: bool
    temperature: float
    text: TextForm
    tool_choice: Literal["none", "auto", "required"] | Named | Allowed
    tools: list[Function]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage
    user: None
    metadata: dict[str, str]


class InputText(Answered):
    type: Literal["input_text"]
    text: str


class InputMessage(Answered):
    id: str
    type: Literal["message"]
    role: Literal["system", "developer", "user"]
    status: Literal["completed"]
    content: list[InputText]


class FunctionCallOutput(Answered):
    id: str
    type: Literal["function_call_output"]
    status: Literal["completed"]
    call_id: str
    output: str


class ItemsAnswer(Answered):
    """A page of the items that an answer was asked with."""

    object: Literal["list"]
    data: list[InputMessage | OutputMessage | FunctionCall | FunctionCallOutput]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedAnswer(Answered):
    id: str
    object: Literal["response"]
    deleted: Literal[True]

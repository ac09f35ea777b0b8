"""Tools and forms in OpenAI's Responses, by the real client, and how little a next turn reads."""

import json
from typing import Literal

import openai
import pytest
from pydantic import BaseModel, Field

pytest.importorskip("llguidance", reason="the extra [guided] is not installed")
pytest.importorskip("jsonschema", reason="the extra [test] is not installed")

import jsonschema

from atma.serve.http.responses.schemas import ResponseAnswer
from atma.text_stream import TextStream
from tests.serve.http.test_responses import events
from tests.serve.http.tools.conftest import SCHEMAS, WEATHER
from tests.serve.http.tools.conftest import TOOLS as OF_CHATS

FORMS = ["hermes", "mistral"]
QUESTION = "What is it like in Oslo?"
TOOLS = [
    {"type": "function", "name": "weather", "description": "Of a city", "parameters": WEATHER, "strict": True},
    {"type": "function", "name": "now", "parameters": None, "strict": False},
]
ASKED = {"input": QUESTION, "tools": TOOLS, "max_output_tokens": 300, "temperature": 0}
NAMED = {"type": "function", "name": "weather"}
FORM = {"type": "json_schema", "name": "x", "schema": {}}
NULL = {"type": "object", "properties": {"unit": {"const": None}}, "required": ["unit"], "additionalProperties": False}


class Weather(BaseModel):
    city: str = Field(max_length=6)
    unit: Literal["C", "F"]


def create(client, **fields):
    return client.responses.create(model="tiny", **ASKED | fields)


def check(item) -> None:
    assert (item.type, item.status) == ("function_call", "completed")
    jsonschema.validate(json.loads(item.arguments), SCHEMAS[item.name])


def test_a_named_tool_is_called_by_its_schema(client, live):
    for name in SCHEMAS:
        told = create(client, tool_choice={"type": "function", "name": name})
        [item] = told.output
        check(item)
        assert (item.name, told.status, told.tool_choice.name) == (name, "completed", name)
        assert len(item.call_id) == 9 if live.form == "mistral" else item.call_id.startswith("call_")
        assert item.id != item.call_id
    asked = ASKED | {"tool_choice": NAMED}
    ResponseAnswer.model_validate(live.post("/v1/responses", asked).json(), strict=True)


def test_null_is_a_value_of_a_schema_as_any_other(client):
    told = create(client, tools=[TOOLS[0] | {"parameters": NULL}], tool_choice="required", parallel_tool_calls=False)
    assert json.loads(told.output[0].arguments) == {"unit": None}


def test_required_calls_some_tool_and_one_if_only_one_is_wanted(client):
    [item] = create(client, tool_choice="required", parallel_tool_calls=False).output
    check(item)
    assert [item.type for item in create(client, tool_choice="none", max_output_tokens=5).output] == ["message"]


def test_of_allowed_tools_one_is_called_and_the_choice_is_told_again(client, live):
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [NAMED]}
    told = create(client, tool_choice=allowed, parallel_tool_calls=False)
    [item] = told.output
    check(item)
    assert (item.name, told.tool_choice.to_dict()) == ("weather", allowed)
    asked = ASKED | {"tool_choice": allowed}
    ResponseAnswer.model_validate(live.post("/v1/responses", asked).json(), strict=True)


def test_a_stream_of_a_call_has_its_events_in_their_order(live):
    told = events(live.post("/v1/responses", ASKED | {"tool_choice": NAMED, "stream": True}))
    kinds = [one["type"].removeprefix("response.") for one in told]
    assert list(dict.fromkeys(kinds)) == [
        "created",
        "in_progress",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    deltas = [one["delta"] for one in told if one["type"].endswith("arguments.delta")]
    done = next(one for one in told if one["type"].endswith("arguments.done"))
    assert "".join(deltas) == done["arguments"] == told[-1]["response"]["output"][0]["arguments"]
    assert len(deltas) > 5
    assert {one["item_id"] for one in told if "item_id" in one} == {told[2]["item"]["id"]}


def test_the_client_puts_a_stream_of_a_call_together(client):
    whole = create(client, tool_choice=NAMED)
    with client.responses.stream(model="tiny", **ASKED, tool_choice=NAMED) as stream:
        final = stream.get_final_response()
    assert final.output[0].arguments == whole.output[0].arguments
    assert final.output[0].parsed_arguments == json.loads(whole.output[0].arguments)
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_an_answer_is_parsed_as_a_model_by_the_client(client):
    for seed in range(3):
        fields = {"model": "tiny", "input": QUESTION, "text_format": Weather, "extra_body": {"seed": seed}}
        told = client.responses.parse(**fields, max_output_tokens=300)
        assert told.status == "completed"
        assert told.output_parsed == Weather.model_validate_json(told.output_text)
        with client.responses.stream(**fields, max_output_tokens=300) as stream:
            assert stream.get_final_response().output_parsed == told.output_parsed
    loose = client.responses.create(
        model="tiny", input=QUESTION, text={"format": {"type": "json_object"}}, max_output_tokens=300, temperature=0
    )
    assert loose.status == "incomplete" or isinstance(json.loads(loose.output_text), dict)
    assert loose.text.format.type == "json_object"


def test_a_conversation_with_calls_and_results_goes_on_either_way(client, live):
    first = create(client, tool_choice=NAMED)
    [item] = first.output
    result = {"type": "function_call_output", "call_id": item.call_id, "output": "12 degrees"}
    fields = {"max_output_tokens": 5}
    kept = create(client, input=[result], previous_response_id=first.id, **fields)
    given = create(client, input=[{"role": "user", "content": QUESTION}, item.to_dict(), result], **fields)
    assert kept.output_text == given.output_text
    assert kept.usage.input_tokens == given.usage.input_tokens
    assert kept.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens
    call = {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.arguments}}
    talk = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": item.call_id, "content": "12 degrees"},
    ]
    chat = live.post("/v1/chat/completions", {"messages": talk, "tools": OF_CHATS, "max_tokens": 1}).json()
    assert chat["usage"]["prompt_tokens"] == kept.usage.input_tokens
    with pytest.raises(openai.BadRequestError, match="no function_call_output"):
        create(client, input="And?", previous_response_id=first.id)


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_said_and_what_is_called_are_items(live, monkeypatch, stream):
    call = '{"name": "now", "arguments": {"a": 1}}'
    text = f"Hm.<tool_call>{call}</tool_call>bye" if live.form == "hermes" else f"Hm.[TOOL_CALLS][{call}] bye"
    monkeypatch.setattr(TextStream, "push", lambda self, data, looks=True: "")
    monkeypatch.setattr(TextStream, "flush", lambda self: text)
    told = live.post("/v1/responses", ASKED | {"max_output_tokens": 1, "stream": stream})
    response = events(told)[-1]["response"] if stream else told.json()
    said = [
        {k: v for k, v in item.items() if k in ("type", "content", "name", "arguments")} for item in response["output"]
    ]
    part = {"type": "output_text", "annotations": [], "logprobs": []}
    assert said == [
        {"type": "message", "content": [part | {"text": "Hm."}]},
        {"type": "function_call", "name": "now", "arguments": '{"a": 1}'},
        {"type": "message", "content": [part | {"text": "bye"}]},
    ]
    assert [item["status"] for item in response["output"]] == ["completed", "completed", "incomplete"]
    if stream:
        indices = [one["output_index"] for one in events(told) if one["type"] == "response.output_item.done"]
        assert indices == [0, 1, 2]
    result = {"type": "function_call_output", "call_id": response["output"][1]["call_id"], "output": "x"}
    fields = {"input": [result], "previous_response_id": response["id"], "max_output_tokens": 1}
    assert live.post("/v1/responses", ASKED | fields).status == 200


def plain_answer(client, **fields):
    """An answer in characters of one byte, which are read as the tokens that were written."""
    for seed in range(100):
        told = client.responses.create(model="tiny", max_output_tokens=3, extra_body={"seed": seed}, **fields)
        if told.output_text.isascii() and told.usage.output_tokens == len(told.output_text) == 3:
            return told
    raise AssertionError("no answer is plain")


def test_a_next_turn_reads_only_what_is_new(client):
    first = None
    for question in ("Hello", "And then?", "Why?"):
        told = plain_answer(client, input=question, previous_response_id=first.id if first else openai.omit)
        if first is not None:
            known = first.usage.input_tokens + first.usage.output_tokens - 1
            new = len(f"<user>{question}\n<assistant>".replace("\n", ""))
            assert told.usage.input_tokens == known + 1 + new
            assert told.usage.input_tokens_details.cached_tokens >= known
        first = told
    fresh = client.responses.create(model="tiny", input="new", previous_response_id=first.id, max_output_tokens=1)
    known = first.usage.input_tokens + first.usage.output_tokens - 1
    assert fresh.usage.input_tokens_details.cached_tokens == known


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"$ref": "http://x/y"}}}, "tools": []},
         "text", "nothing is fetched"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"a": "x" * 2**18}}}, "tools": []},
         "text", "262,144"),
        ({"tools": [TOOLS[1], TOOLS[1]]}, "tools", "two tools are called 'now'"),
        ({"tools": [TOOLS[1]] * 129}, "tools", "at most 128"),
        ({"tools": [TOOLS[1] | {"defer_loading": True}]}, "tools", "'defer_loading'"),
        ({"tools": [TOOLS[1] | {"parameters": {"type": "string"}}]}, "tools", "'parameters'"),
        ({"tools": [TOOLS[0] | {"parameters": {"properties": {"a": {"not": {}}}}}]}, "tools", "cannot be compiled"),
        ({"tools": [TOOLS[1] | {"parameters": {"maximum": float("inf")}}]}, "tools", "not finite"),
        ({"text": {"format": FORM | {"description": 5}}}, "text", "'description'"),
        ({"text": {"format": FORM | {"schema": {"maximum": float("nan")}}}}, "text", "not finite"),
        ({"tool_choice": {"type": "function", "name": "z"}}, "tool_choice", "'z'"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "any", "tools": [NAMED]}}, "tool_choice", "allowed_tools"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [5]}}, "tool_choice", "allowed_tools"),
        ({"include": ["message.output_text.logprobs"]}, "include", "beside tools"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_a_400_that_names_its_field(live, fields, param, told):
    answer = live.post("/v1/responses", ASKED | {"max_output_tokens": 2} | fields)
    assert answer.status == 400, answer.body
    assert (answer.error()["param"], told in answer.error()["message"]) == (param, True), answer.error()

"""JSON by a schema, regular expressions, grammars and choices over HTTP, asked for by the real client and by hand."""

import concurrent.futures
import json
import re
import time
from typing import Literal

import pydantic
import pytest

pytest.importorskip("llguidance", reason="the extra [guided] is not installed")
pytest.importorskip("jsonschema", reason="the extra [test] is not installed")

import jsonschema

from atma.serve import guides
from tests.serve.http.conftest import Live

TALK = [{"role": "user", "content": "Hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog", None]}, "age": {"type": "integer", "minimum": 0, "maximum": 30}},
    "required": ["kind", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA, "strict": True}}


class Animal(pydantic.BaseModel):
    kind: Literal["cat", "dog"]
    age: int = pydantic.Field(ge=0, le=30)


def chat(client, **fields):
    fields = {"model": "tiny", "messages": TALK, "max_tokens": 200, "temperature": 1, "seed": 5} | fields
    return client.chat.completions.create(**fields)


def test_the_client_parses_an_answer_into_its_own_type(client):
    answer = client.chat.completions.parse(model="tiny", messages=TALK, response_format=Animal, max_tokens=200, seed=1)
    assert isinstance(answer.choices[0].message.parsed, Animal)
    assert answer.choices[0].finish_reason == "stop"


def test_an_answer_is_json_of_its_schema_whole_and_streamed(client):
    whole = chat(client, response_format=FORMAT).choices[0].message.content
    jsonschema.validate(json.loads(whole), SCHEMA)
    chunks = chat(client, response_format=FORMAT, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


def test_the_client_streams_into_its_own_type(client):
    with client.chat.completions.stream(
        model="tiny", messages=TALK, response_format=Animal, max_tokens=200, seed=2
    ) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Animal)


def test_any_object_can_be_asked_for(client):
    for seed in range(5):
        [choice] = chat(client, response_format={"type": "json_object"}, seed=seed).choices
        assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)


def test_what_max_tokens_cuts_says_length(client):
    assert chat(client, response_format=FORMAT, max_tokens=3).choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("outputs", "pattern"),
    [
        ({"regex": "[0-9]{3}-[a-f]{2}"}, "[0-9]{3}-[a-f]{2}"),
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"grammar": 'root ::= "a" | "bb"'}, "a|bb"),
        ({"grammar": 'start: /[xy]{2}/ "."'}, r"[xy]{2}\."),
        ({"json": SCHEMA, "disable_any_whitespace": True}, r'\{"kind":(null|"cat"|"dog"),"age":\d+\}'),
        ({"json": json.dumps(SCHEMA), "regex": None}, r"\{.*\}"),
    ],
)
def test_structured_outputs_hold_in_chats_and_completions(client, outputs, pattern):
    more = {"extra_body": {"structured_outputs": outputs}}
    assert re.fullmatch(pattern, chat(client, **more).choices[0].message.content, re.S)
    answer = client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=200, n=2, seed=1, **more)
    assert len(answer.choices) == 4
    for choice in answer.choices:
        assert re.fullmatch(pattern, choice.text, re.S)


def test_log_probabilities_are_of_what_is_allowed(client):
    more = {"extra_body": {"structured_outputs": {"choice": ["aa", "ab"]}}}
    content = chat(client, logprobs=True, top_logprobs=2, **more).choices[0].logprobs.content
    assert [content[0].token, content[0].logprob, content[2].logprob] == ["a", 0, 0]
    assert sorted(one.token for one in content[1].top_logprobs) == ["a", "b"]
    assert content[0].top_logprobs[1].logprob == -9999


@pytest.mark.parametrize(
    ("fields", "parameter", "told"),
    [
        ({"response_format": "json"}, "response_format", "an object with a 'type'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "'schema'"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": [1]}}}, "response_format", "'schema'"),
        ({"response_format": FORMAT | {"more": 1}}, "response_format", "'more' is unknown"),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, "response_format", "'schema' is unknown"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one of"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "regex and choice"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs", "1 to 16,384 characters"),
        ({"structured_outputs": {"choice": "yes"}}, "structured_outputs", "a list of texts"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "unclosed group"),
        ({"structured_outputs": {"grammar": "start: x"}}, "structured_outputs", "unknown name"),
        ({"structured_outputs": {"whitespace_pattern": " ", "regex": "a"}}, "structured_outputs", "whitespace_pattern"),
        ({"structured_outputs": {"json": {"const": "x" * 300_000}}}, "structured_outputs", "262,144"),
        ({"structured_outputs": {"json": {"const": "\ud800"}}}, "structured_outputs", "structured_outputs"),
        ({"response_format": FORMAT, "structured_outputs": {"regex": "a"}}, "structured_outputs", "either"),
    ],
)
def test_what_cannot_be_held_to_is_a_400_that_names_its_field(live: Live, fields, parameter, told):
    for stream in (False, True):
        answer = live.post("/v1/chat/completions", {"messages": TALK, "stream": stream} | fields)
        assert answer.status == 400, answer.body
        assert (answer.error()["param"], told in answer.error()["message"]) == (parameter, True), answer.error()


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ({"type": "thing"}, "Invalid type"),
        ({"$ref": "http://127.0.0.1:9/schema.json"}, "nothing is fetched"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {}}, "not"),
    ],
)
def test_a_schema_that_cannot_be_compiled_is_a_400_with_its_reason(live: Live, schema, told):
    body = {"messages": TALK, "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
    answer = live.post("/v1/chat/completions", body)
    assert (answer.status, answer.error()["param"]) == (400, "response_format")
    assert told in answer.error()["message"]


def test_strict_false_leaves_aside_what_cannot_be_held_to(live: Live):
    schema = {"type": "array", "items": {"type": "null"}, "maxItems": 2, "uniqueItems": True}
    named = {"schema": schema, "strict": False}
    body = {"messages": TALK, "max_tokens": 99, "response_format": {"type": "json_schema", "json_schema": named}}
    assert isinstance(
        json.loads(live.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]), list
    )


def test_without_the_extra_the_field_and_the_mend_are_told(live: Live, monkeypatch):
    monkeypatch.setattr(guides, "find_spec", lambda name: None)
    body = {"messages": TALK, "response_format": {"type": "json_schema", "json_schema": {"schema": {"const": 77}}}}
    answer = live.post("/v1/chat/completions", body)
    assert (answer.status, answer.error()["param"]) == (400, "response_format")
    assert "pip install 'atma-lm[guided]'" in answer.error()["message"]


def test_nobody_waits_while_a_structure_is_compiled(live: Live, monkeypatch):
    def slow(structure, reader):
        time.sleep(3)
        raise ValueError("slow")

    monkeypatch.setattr(guides, "_compiled", slow)
    asked = {"prompt": "x", "max_tokens": 2, "structured_outputs": {"regex": "never compiled before"}}
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        waiting = [pool.submit(live.post, "/v1/completions", asked) for _ in range(2)]
        time.sleep(0.5)
        free = [pool.submit(live.post, "/v1/completions", {"prompt": "x", "max_tokens": 2}) for _ in range(9)]
        assert {one.result().status for one in free} == {200}
        assert not all(one.done() for one in waiting)
        assert {one.result().status for one in waiting} == {400}


def test_a_form_that_grows_too_wide_is_the_requests_own_fault(live: Live, monkeypatch):
    monkeypatch.setattr(guides, "MOST_ITEMS", 500)
    ambiguous = {"grammar": 'start: s\ns: s s s | s s | "a"'}
    asked = {"prompt": "x", "max_tokens": 200, "min_tokens": 200, "structured_outputs": ambiguous}
    told = live.post("/v1/completions", asked)
    assert told.status == 400
    error = told.error()
    assert (error["code"], error["param"]) == ("invalid_value", "structured_outputs")
    assert error["message"].startswith("'structured_outputs' cannot be written on: ")
    assert live.post("/v1/completions", asked | {"stream": True}).events()[-1]["error"] == error


def test_a_form_that_breaks_down_is_called_what_the_route_calls_it(live: Live, monkeypatch):
    allow, left = guides.Guide.allow, [0]

    def breaks(guide):
        left[0] -= 1
        if left[0] < 0:
            raise guide.stuck()
        return allow(guide)

    monkeypatch.setattr(guides.Guide, "allow", breaks)
    long = {"type": "object", "properties": {"a": {"type": "string", "minLength": 200}}, "required": ["a"]}
    form = {"format": {"type": "json_schema", "name": "long", "schema": long}}
    asked = {"input": "Hi", "max_output_tokens": 150, "text": form}
    assert live.post("/v1/responses", asked).error()["message"].startswith("'text' cannot be written on: ")
    left[0] = 60  # more than a feed holds, so that the stream has begun
    last = live.post("/v1/responses", asked | {"stream": True}).body.decode().split("data: ")[-1]
    error = json.loads(last)["response"]["error"]
    assert error["code"] == "invalid_prompt"
    assert error["message"].startswith("'text' cannot be written on: ")

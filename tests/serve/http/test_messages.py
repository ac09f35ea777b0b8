"""Anthropic's form of a chat: the same answers as OpenAI's, streamed as named events, refused in its own words."""

import dataclasses
import json

import pytest
from fastapi.exceptions import RequestValidationError

from atma.serve.http.messages import CountBody
from tests.serve.http.conftest import OPTIONS, Live

HELLO = [{"role": "user", "content": "Hello"}]
ASKED = {"messages": HELLO, "max_tokens": 10, "temperature": 0}


def events(told) -> list[tuple[str, dict]]:
    """The named events of a stream."""
    found = []
    for part in told.body.decode().strip().split("\n\n"):
        name, data = part.split("\n")
        assert name.startswith("event: ")
        assert data.startswith("data: ")
        found.append((name[7:], json.loads(data[6:])))
        assert found[-1][1]["type"] == found[-1][0]
    return found


def same_chat(live: Live, messages=HELLO, **fields) -> dict:
    fields = {"max_tokens": 10, "temperature": 0} | fields
    return live.post("/v1/chat/completions", {"messages": messages} | fields).json()


def test_an_answer_is_the_one_of_a_chat(live: Live):
    told, chat = live.post("/v1/messages", ASKED), same_chat(live)
    assert told.status == 200
    assert told.headers["request-id"] == told.headers["x-request-id"]
    message = told.json()
    assert (message["type"], message["role"], message["model"]) == ("message", "assistant", "tiny")
    assert message["content"] == [{"type": "text", "text": chat["choices"][0]["message"]["content"]}]
    expected = {"length": "max_tokens", "stop": "end_turn"}[chat["choices"][0]["finish_reason"]]
    assert (message["stop_reason"], message["stop_sequence"]) == (expected, None)
    usage = message["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == chat["usage"]["prompt_tokens"]
    assert usage["output_tokens"] == chat["usage"]["completion_tokens"]


def test_a_system_text_and_blocks_are_read(live: Live):
    blocks = [{"type": "text", "text": "He", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "llo"}]
    asked = ASKED | {"system": [{"type": "text", "text": "Be"}], "messages": [{"role": "user", "content": blocks}]}
    chat = same_chat(live, [{"role": "system", "content": "Be"}, *HELLO])
    assert live.post("/v1/messages", asked).json()["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    counted = {key: asked[key] for key in ("system", "messages")}
    count = live.post("/v1/messages/count_tokens", counted).json()
    assert count == {"input_tokens": chat["usage"]["prompt_tokens"]}


def test_a_last_message_of_the_assistant_begins_the_answer(live: Live):
    begun = [*HELLO, {"role": "assistant", "content": " Well"}]
    chat = same_chat(live, begun, continue_final_message=True)
    told = live.post("/v1/messages", ASKED | {"messages": begun}).json()
    assert told["content"][0]["text"] == chat["choices"][0]["message"]["content"]


def test_a_stream_is_the_same_message(live: Live):
    whole = live.post("/v1/messages", ASKED).json()
    told = events(live.post("/v1/messages", ASKED | {"stream": True}))
    assert [name for name, _ in told[:2]] == ["message_start", "content_block_start"]
    assert [name for name, _ in told[-3:]] == ["content_block_stop", "message_delta", "message_stop"]
    start = told[0][1]["message"]
    assert (start["content"], start["stop_reason"], start["usage"]["output_tokens"]) == ([], None, 0)
    text = "".join(data["delta"]["text"] for name, data in told if name == "content_block_delta")
    assert text == whole["content"][0]["text"]
    assert told[-2][1]["delta"] == {key: whole[key] for key in ("stop_reason", "stop_sequence")}
    assert told[-2][1]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


def test_the_stop_text_that_ended_it_is_named(live: Live):
    text = live.post("/v1/messages", ASKED).json()["content"][0]["text"]
    stop = text[3:5]
    told = live.post("/v1/messages", ASKED | {"stop_sequences": ["never", stop]}).json()
    assert (told["stop_reason"], told["stop_sequence"]) == ("stop_sequence", stop)
    assert told["content"][0]["text"] == text[: text.index(stop)]
    streamed = events(live.post("/v1/messages", ASKED | {"stop_sequences": [stop], "stream": True}))
    assert streamed[-2][1]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": stop}


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": {"type": "auto"}, "thinking": {"type": "disabled"}, "metadata": {"user_id": "x"}},
        {"thinking": {"type": "adaptive"}, "output_config": {"effort": "high", "format": None}},
        {"service_tier": "auto", "container": None, "top_k": None, "stop_sequences": []},
    ],
)
def test_what_asks_for_nothing_is_taken(live: Live, fields):
    assert (
        live.post("/v1/messages", ASKED | fields).json()["content"]
        == live.post("/v1/messages", ASKED).json()["content"]
    )


@pytest.mark.parametrize(
    ("fields", "status", "kind", "named"),
    [
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
        ({"messages": []}, 400, "invalid_request_error", "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "invalid_request_error", "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "invalid_request_error", "image"),
        ({"tools": [{"name": "f", "input_schema": {}}]}, 400, "invalid_request_error", "tools"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, 400, "invalid_request_error", "thinking"),
        ({"output_config": {"effort": "low"}}, 400, "invalid_request_error", "'effort'"),
        ({"output_config": {"format": {"type": "json_object"}}}, 400, "invalid_request_error", "json_schema"),
        ({"output_config": {"task_budget": 5}}, 400, "invalid_request_error", "task_budget"),
        ({"max_completion_tokens": 3}, 400, "invalid_request_error", "did you mean 'max_tokens'"),
        ({"model": "other"}, 404, "not_found_error", "tiny"),
        ({"max_tokens": 10**9}, 400, "invalid_request_error", "memory"),
    ],
)
def test_refusals_are_in_its_own_words(live: Live, fields, status, kind, named):
    told = live.post("/v1/messages", {key: value for key, value in (ASKED | fields).items() if value is not None})
    body = told.json()
    assert (told.status, body["type"], body["error"]["type"]) == (status, "error", kind)
    assert set(body) == {"type", "error"}
    assert named in body["error"]["message"]
    assert live.ask("GET", "/v1/messages").json()["type"] == "error"


def test_the_real_client_is_answered_streamed_counted_and_refused(folder):
    anthropic = pytest.importorskip("anthropic", reason="pip install anthropic: the client that is tried here")
    live = Live(folder, dataclasses.replace(OPTIONS, api_key="secret"))
    try:
        with anthropic.Anthropic(base_url=live.url, api_key="secret", max_retries=0) as client:
            fields = {"model": "tiny", "max_tokens": 10, "messages": HELLO, "system": "Be"}
            fields["extra_body"] = {"temperature": 0}
            whole = client.messages.create(**fields)
            assert whole.content[0].type == "text"
            with client.messages.stream(**fields) as stream:
                text = "".join(stream.text_stream)
                final = stream.get_final_message()
            assert text == final.content[0].text == whole.content[0].text
            assert final.stop_reason == whole.stop_reason
            assert final.usage.output_tokens == whole.usage.output_tokens
            counted = client.messages.count_tokens(model="tiny", messages=HELLO, system="Be")
            assert counted.input_tokens == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
            with pytest.raises(anthropic.NotFoundError, match="tiny") as told:
                client.messages.create(**fields | {"model": "other"})
            assert told.value.request_id
        wrong = anthropic.Anthropic(base_url=live.url, api_key="wrong", max_retries=0)
        with wrong, pytest.raises(anthropic.AuthenticationError):
            wrong.messages.create(**fields)
    finally:
        live.stop()


def test_the_model_is_listed_as_anthropic_lists_them(live: Live):
    anthropic = pytest.importorskip("anthropic", reason="pip install anthropic: the client that is tried here")
    with anthropic.Anthropic(base_url=live.url, api_key="none", max_retries=0) as client:
        [listed] = client.models.list()
        one = client.models.retrieve("tiny")
    assert (listed.id, listed.type, listed.display_name) == ("tiny", "model", "tiny")
    assert one.created_at == listed.created_at
    assert one.created_at.timestamp() == live.service.created


@pytest.mark.parametrize("count", [4095, 4096])
def test_too_many_turns_for_a_chat_are_a_400(live: Live, count):
    asked = {"messages": HELLO * count, "system": "Be brief"}
    assert live.post("/v1/messages/count_tokens", asked).status == (200 if count == 4095 else 400)


def test_what_a_chat_refuses_is_refused_here():
    body = CountBody(messages=[{"role": "user", "content": "x"}], system="Be brief")
    body.messages *= 4096
    with pytest.raises(RequestValidationError, match="at most 4096"):
        body.chat({})

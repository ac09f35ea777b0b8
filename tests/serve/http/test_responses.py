"""OpenAI's Responses by the real client: answers, the events of streams, and turns that go on from a kept answer."""

import dataclasses
import json
import re

import openai
import pytest

from atma.serve.http import affinity
from atma.serve.http.responses.items import items, messages
from atma.serve.http.responses.schemas import DeletedAnswer, ItemsAnswer, ResponseAnswer
from atma.serve.http.responses.store import Store
from tests.serve.http.conftest import OPTIONS, Live

ASKED = {"input": "Hello", "max_output_tokens": 10, "temperature": 0}
IMAGE = {"type": "input_image", "image_url": "http://x"}
FILE = {"type": "input_file", "file_url": "http://x"}
CALL = {"type": "function_call", "call_id": "x", "name": "f", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "x", "output": "y"}
EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]


def events(told) -> list[dict]:
    """The events of a stream, their names and numbers checked."""
    assert told.status == 200, told.body
    found = []
    for part in told.body.decode().strip().split("\n\n"):
        name, data = part.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    assert [one["sequence_number"] for one in found] == list(range(len(found)))
    return found


def text_of(response: dict) -> str:
    [item] = response["output"]
    [part] = item["content"]
    return part["text"]


def same_chat(live: Live, talk, **fields) -> dict:
    asked = {"messages": talk, "max_tokens": 10, "temperature": 0} | fields
    return live.post("/v1/chat/completions", asked).json()


def test_an_answer_is_the_one_of_a_chat(client, live: Live):
    told = client.responses.create(model="tiny", **ASKED, metadata={"a": "b"})
    chat = same_chat(live, [{"role": "user", "content": "Hello"}])
    choice = chat["choices"][0]
    assert told.output_text == choice["message"]["content"]
    assert (told.object, told.model, told.error, told.metadata) == ("response", "tiny", None, {"a": "b"})
    assert told.status == {"length": "incomplete", "stop": "completed"}[choice["finish_reason"]]
    assert told.usage.input_tokens == chat["usage"]["prompt_tokens"]
    assert told.usage.output_tokens == chat["usage"]["completion_tokens"]
    assert told.usage.total_tokens == told.usage.input_tokens + told.usage.output_tokens
    [item] = told.output
    assert (item.type, item.role, item.status) == ("message", "assistant", told.status)
    ResponseAnswer.model_validate(live.post("/v1/responses", ASKED).json(), strict=True)


def test_a_cut_answer_is_incomplete_and_a_whole_one_is_complete(client, live: Live):
    cut = client.responses.create(model="tiny", **ASKED | {"max_output_tokens": 2})
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert cut.completed_at is None
    whole = live.post("/v1/responses", ASKED | {"stop": text_of(live.post("/v1/responses", ASKED).json())[2:4]}).json()
    assert (whole["status"], whole["incomplete_details"]) == ("completed", None)
    assert whole["completed_at"] >= whole["created_at"]
    assert whole["output"][0]["status"] == "completed"


def test_a_stream_has_all_events_in_their_order(live: Live):
    whole = live.post("/v1/responses", ASKED).json()
    told = events(live.post("/v1/responses", ASKED | {"stream": True}))
    kinds = [one["type"] for one in told]
    assert list(dict.fromkeys(kinds)) == [*EVENTS, f"response.{whole['status']}"]
    deltas = [one for one in told if one["type"] == "response.output_text.delta"]
    assert (
        "".join(one["delta"] for one in deltas)
        == text_of(whole)
        == told[-1]["response"]["output"][0]["content"][0]["text"]
    )
    assert len(deltas) > 1
    identity = {one["item_id"] for one in told if "item_id" in one}
    assert identity == {told[2]["item"]["id"]} == {told[-1]["response"]["output"][0]["id"]}
    assert {one["response"]["id"] for one in told if "response" in one} == {told[0]["response"]["id"]}
    assert (told[0]["response"]["status"], told[0]["response"]["output"]) == ("in_progress", [])
    assert told[-1]["response"]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    ResponseAnswer.model_validate(told[-1]["response"], strict=True)


def test_the_client_puts_a_stream_together(client):
    whole = client.responses.create(model="tiny", **ASKED)
    with client.responses.stream(model="tiny", **ASKED) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text == whole.output_text


def test_a_next_turn_goes_on_from_the_answer_before(client, live: Live):
    first = client.responses.create(model="tiny", **ASKED)
    second = client.responses.create(model="tiny", **ASKED | {"input": "And?"}, previous_response_id=first.id)
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": first.output_text}]
    chat = same_chat(live, [*talk, {"role": "user", "content": "And?"}])
    assert second.output_text == chat["choices"][0]["message"]["content"]
    assert second.previous_response_id == first.id
    assert second.usage.input_tokens == chat["usage"]["prompt_tokens"]
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens


def test_a_streamed_answer_is_gone_on_from_as_well(live: Live):
    last = events(live.post("/v1/responses", ASKED | {"stream": True}))[-1]["response"]
    told = live.post("/v1/responses", ASKED | {"input": "x", "previous_response_id": last["id"]}).json()
    assert told["usage"]["input_tokens_details"]["cached_tokens"] >= last["usage"]["input_tokens"]
    assert live.ask("GET", f"/v1/responses/{last['id']}").json() == last


def test_instructions_come_first_and_are_of_one_turn(live: Live):
    talk = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hello"}]
    first = live.post("/v1/responses", ASKED | {"instructions": "Be brief"}).json()
    chat = same_chat(live, talk)
    assert text_of(first) == chat["choices"][0]["message"]["content"]
    second = live.post("/v1/responses", ASKED | {"input": "x", "previous_response_id": first["id"]}).json()
    talk = [talk[1], {"role": "assistant", "content": text_of(first)}, {"role": "user", "content": "x"}]
    assert second["usage"]["input_tokens"] == same_chat(live, talk)["usage"]["prompt_tokens"]
    assert (first["instructions"], second["instructions"]) == ("Be brief", None)


def test_items_are_messages_of_a_chat(live: Live):
    talk = [
        {"role": "developer", "content": "Be brief"},
        {"type": "message", "role": "user",
         "content": [{"type": "input_text", "text": "He"}, {"type": "input_text", "text": "llo"}]},
        {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed",
         "content": [{"type": "output_text", "text": "Yes", "annotations": [], "logprobs": []}]},
        {"role": "user", "content": "Why?"},
    ]  # fmt: skip
    told = live.post("/v1/responses", ASKED | {"input": talk}).json()
    roles, texts = ("system", "user", "assistant", "user"), ("Be brief", "Hello", "Yes", "Why?")
    chat = same_chat(live, [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)])
    assert text_of(told) == chat["choices"][0]["message"]["content"]
    assert told["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]


def test_answers_are_told_again_and_forgotten_by_the_client(client, live: Live):
    told = client.responses.create(model="tiny", **ASKED)
    again = client.responses.retrieve(told.id)
    assert again.to_dict() == told.to_dict()
    assert client.responses.delete(told.id) is None
    deleted = client.responses.create(model="tiny", **ASKED)
    answer = live.ask("DELETE", f"/v1/responses/{deleted.id}")
    DeletedAnswer.model_validate(answer.json(), strict=True)
    for gone in (told.id, deleted.id):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(gone)
        with pytest.raises(openai.NotFoundError):
            client.responses.delete(gone)
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(model="tiny", **ASKED, previous_response_id=gone)
        assert (refused.value.code, refused.value.param) == ("previous_response_not_found", "previous_response_id")
    kept = client.responses.create(model="tiny", **ASKED)
    assert live.ask("GET", f"/v1/responses/{kept.id}?stream=true").error()["param"] == "stream"


TALK = [
    {"role": "developer", "content": "Be brief"},
    {"role": "user", "content": [{"type": "input_text", "text": "He"}, {"type": "input_text", "text": "llo"}]},
    {"role": "assistant", "content": "Hm"},
    CALL,
    CALL | {"call_id": "z"},
    OUTPUT,
    OUTPUT | {"call_id": "z"},
    {"role": "user", "content": "Well?"},
]


def test_what_an_answer_was_asked_with_is_listed_in_pages(client, live: Live):
    told = client.responses.create(model="tiny", **ASKED | {"input": TALK})
    path = f"/v1/responses/{told.id}/input_items"
    whole = live.ask("GET", f"{path}?order=asc").json()
    ItemsAnswer.model_validate(whole, strict=True)
    data = whole["data"]
    kinds = ["message"] * 3 + ["function_call"] * 2 + ["function_call_output"] * 2 + ["message"]
    assert [item["type"] for item in data] == kinds
    texts = [item["content"][0]["text"] for item in data if item["type"] == "message"]
    roles = [item["role"] for item in data if item["type"] == "message"]
    assert (texts, roles) == (["Be brief", "Hello", "Hm", "Well?"], ["developer", "user", "assistant", "user"])
    assert [(item["call_id"], item["arguments"]) for item in data[3:5]] == [("x", "{}"), ("z", "{}")]
    assert [(item["call_id"], item["output"]) for item in data[5:7]] == [("x", "y"), ("z", "y")]
    assert (whole["first_id"], whole["last_id"], whole["has_more"]) == (data[0]["id"], data[-1]["id"], False)
    assert len({item["id"] for item in data}) == len(data)
    backwards = live.ask("GET", f"{path}?limit=3").json()
    assert (backwards["data"], backwards["has_more"]) == (data[::-1][:3], True)
    last = live.ask("GET", f"{path}?after={data[0]['id']}").json()
    assert last == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    for order, expected in (("asc", data), ("desc", data[::-1])):
        paged = client.responses.input_items.list(told.id, order=order, limit=3)
        assert [item.id for item in paged] == [item["id"] for item in expected]


def test_earlier_turns_are_among_what_an_answer_was_asked_with(live: Live):
    first = live.post("/v1/responses", ASKED).json()
    second = live.post("/v1/responses", ASKED | {"input": "And?", "previous_response_id": first["id"]}).json()
    found = [live.ask("GET", f"/v1/responses/{one['id']}/input_items?order=asc").json() for one in (first, second)]
    texts = [[item["content"][0]["text"] for item in one["data"]] for one in found]
    assert texts == [["Hello"], ["Hello", text_of(first), "And?"]]
    # Answering with what is listed is the same turn once more.
    assert text_of(live.post("/v1/responses", ASKED | {"input": found[1]["data"]}).json()) == text_of(second)


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=x", "limit"),
        ("order=up", "order"),
        ("after=msg_1", "after"),
    ],
)
def test_a_page_that_there_is_not_is_refused(live: Live, query, param):
    told = live.post("/v1/responses", ASKED).json()
    refused = live.ask("GET", f"/v1/responses/{told['id']}/input_items?{query}")
    assert (refused.status, refused.error()["param"]) == (400, param)
    assert refused.error()["message"].startswith(f"'{param}': ")
    assert live.ask("GET", f"/v1/responses/resp_none/input_items?{query}").status in (400, 404)


def test_items_of_an_answer_that_is_not_kept_are_a_404(live: Live):
    assert live.ask("GET", "/v1/responses/resp_none/input_items").error()["param"] == "response_id"


def test_every_method_of_an_answer_is_told(live: Live):
    told = live.post("/v1/responses", ASKED).json()
    path = f"/v1/responses/{told['id']}"
    assert live.ask("PUT", path).headers["allow"] == "DELETE, GET, HEAD"
    assert live.ask("DELETE", f"{path}/input_items").headers["allow"] == "GET, HEAD"
    for one in (path, f"{path}/input_items"):
        head = live.ask("HEAD", one)
        assert (head.status, head.body) == (200, b"")
    routes = live.ask("GET", "/openapi.json").json()["paths"]
    assert routes["/v1/responses/{response_id}"].keys() == {"get", "head", "delete"}
    listing = routes["/v1/responses/{response_id}/input_items"]
    assert listing.keys() == {"get", "head"}
    assert {one["name"] for one in listing["head"]["parameters"]} == {"response_id", "limit", "order", "after"}


def test_an_answer_that_is_not_to_be_kept_is_not(live: Live):
    told = live.post("/v1/responses", ASKED | {"store": False}).json()
    assert (told["store"], told["id"][:5]) == (False, "resp_")
    assert live.ask("GET", f"/v1/responses/{told['id']}").status == 404
    assert live.post("/v1/responses", ASKED | {"previous_response_id": told["id"]}).status == 400


@pytest.mark.parametrize(
    ("later", "statuses"), [(True, [503, 503, 503, 503]), (False, [400, 404, 404, 404])], ids=["busy", "nowhere"]
)
def test_away_from_home_nothing_is_kept_and_what_is_unknown_may_be_known_there(
    live: Live, monkeypatch, later, statuses
):
    known = live.post("/v1/responses", ASKED).json()["id"]
    guard = live.process.server.config.app
    routes = guard.app

    async def away(scope, receive, send):
        await routes(scope | {affinity.AWAY: later}, receive, send)

    monkeypatch.setattr(guard, "app", away)
    told = [live.post("/v1/responses", ASKED | fields).json() for fields in ({}, {"previous_response_id": known})]
    assert [(one["store"], one["status"]) for one in told] == [(False, "incomplete")] * 2
    path = f"/v1/responses/{told[0]['id']}"
    found = [live.post("/v1/responses", ASKED | {"previous_response_id": told[0]["id"]})]
    found += [live.ask(*asked) for asked in (("GET", path), ("GET", f"{path}/input_items"), ("DELETE", path))]
    assert [one.status for one in found] == statuses
    assert {one.headers.get("retry-after") for one in found} == ({"1"} if later else {None})
    monkeypatch.setattr(guard, "app", routes)
    assert live.ask("GET", path).status == 404


def test_the_id_tells_the_name_of_the_conversation(live: Live):
    told = live.post("/v1/responses", ASKED)
    name = told.headers["x-atma-affinity"]
    assert told.json()["id"].endswith(f"_{name}")
    assert (
        name
        == live.post(
            "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
        ).headers["x-atma-affinity"]
    )
    second = live.post("/v1/responses", ASKED | {"input": "other", "previous_response_id": told.json()["id"]})
    assert second.headers["x-atma-affinity"] == name
    own = live.post("/v1/responses", ASKED, {"x-atma-affinity": "my_own.name"})
    assert own.json()["id"].endswith("_my_own.name")
    later = live.post("/v1/responses", ASKED | {"previous_response_id": own.json()["id"]})
    assert later.headers["x-atma-affinity"] == "my_own.name"
    # What goes on from an answer is kept where that is, whatever it is called now.
    other = live.post("/v1/responses", ASKED | {"previous_response_id": own.json()["id"]}, {"x-atma-affinity": "new"})
    assert other.json()["id"].endswith("_my_own.name")


def test_log_probabilities_are_told_if_they_are_included(live: Live):
    fields = ASKED | {"include": ["message.output_text.logprobs", "reasoning.encrypted_content"], "top_logprobs": 2}
    told = live.post("/v1/responses", fields).json()
    ResponseAnswer.model_validate(told, strict=True)
    scores = told["output"][0]["content"][0]["logprobs"]
    talk = [{"role": "user", "content": "Hello"}]
    chat = same_chat(live, talk, logprobs=True, top_logprobs=2)["choices"][0]
    assert scores == chat["logprobs"]["content"]
    assert len(scores) == told["usage"]["output_tokens"]
    streamed = events(live.post("/v1/responses", fields | {"stream": True}))
    deltas = [one for one in streamed if one["type"] == "response.output_text.delta"]
    assert [score for one in deltas for score in one["logprobs"]] == scores[
        : sum(len(one["logprobs"]) for one in deltas)
    ]
    assert streamed[-1]["response"]["output"][0]["content"][0]["logprobs"] == scores


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"input": None}, "input", "required"),
        ({"input": []}, "input", "1 to 4,096"),
        ({"input": 5}, "input", "a text or a list"),
        ({"input": ["x"]}, "input", "item 0"),
        ({"input": [{"role": "user", "content": 5}]}, "input", "item 0"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input", "'role'"),
        ({"input": [{"role": "user", "content": [IMAGE]}]}, "input", "no images"),
        ({"input": [{"role": "user", "content": [FILE]}]}, "input", "nothing is fetched"),
        ({"input": [{"role": "user", "content": "x", "weight": 1}]}, "input", "'weight'"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input", "'item_reference'"),
        ({"input": [{"type": "reasoning", "id": "rs_1", "summary": []}]}, "input", "'reasoning'"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input", "'web_search_call'"),
        ({"input": [{"type": ["x"]}]}, "input", "item 0"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "input", "'x'"),
        ({"input": [CALL]}, "input", "no function_call_output"),
        ({"input": [CALL, OUTPUT, CALL]}, "input", "no function_call_output"),
        ({"input": [CALL | {"arguments": {}}]}, "input", "'arguments'"),
        ({"input": [CALL | {"name": "a b"}]}, "input", "'name'"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input", "'call_id'"),
        ({"input": "\ud800"}, "input", ""),
        ({"input": "x", "messages": []}, None, None),
        ({"model": "other"}, "model", "tiny"),
        ({"previous_response_id": "resp_none"}, "previous_response_id", "resp_none"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater"),
        ({"max_output_tokens": 10**8}, "max_output_tokens", "memory"),
        ({"temperature": "1"}, "temperature", "number"),
        ({"truncation": "auto"}, "truncation", "disabled"),
        ({"background": True}, "background", "background"),
        ({"conversation": "conv_1"}, "conversation", "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "prompt"),
        ({"context_management": [{"type": "compaction"}]}, "context_management", "context_management"),
        ({"reasoning": {"effort": "high"}}, "reasoning", "'high'"),
        ({"include": ["all"]}, "include", "'all'"),
        ({"include": [["all"]]}, "include", "unknown"),
        ({"top_logprobs": 2}, "top_logprobs", "include"),
        ({"text": {"format": {"type": "xml"}}}, "text", "json_schema"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text", "'name'"),
        ({"text": {"verbosity": "high"}}, "text", "'verbosity'"),
        ({"metadata": {"a": 1}}, "metadata", "'a'"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata", "16"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "include_usage"),
        ({"tools": [{"type": "web_search"}]}, "tools", "nothing is run or fetched"),
        ({"tools": [{"type": "mcp", "server_url": "http://x", "server_label": "x"}]}, "tools", "'mcp'"),
        ({"tools": [{"type": "file_search", "vector_store_ids": []}]}, "tools", "'file_search'"),
        ({"tools": [{"type": "computer_use_preview"}]}, "tools", "'computer_use_preview'"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "'function'"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools", "'name'"),
        ({"tools": [{"type": "function", "name": "f", "parameters": {}}]}, "tools", "--chat-template"),
        ({"tool_choice": "any"}, "tool_choice", "required"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice", "function"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"max_tokens": 3}, "max_tokens", "max_output_tokens"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_a_400_that_names_its_field(live: Live, fields, param, told):
    answer = live.post("/v1/responses", ASKED | fields)
    if param is None:
        assert answer.status == 400
        return
    assert answer.status == (404 if param == "model" else 400), answer.body
    assert answer.error()["param"] == param
    assert told in answer.error()["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {
            "tools": [],
            "tool_choice": "auto",
            "truncation": "disabled",
            "reasoning": {"effort": None, "summary": "auto"},
        },
        {"user": "x", "service_tier": "flex", "safety_identifier": "x", "prompt_cache_key": "x", "background": False},
        {"text": {"format": {"type": "text"}, "verbosity": "medium"}, "metadata": None, "conversation": None},
        {"store": True, "include": [], "max_tool_calls": 3, "stream_options": None, "prompt": None, "anything": None},
        {"stream_options": {"include_obfuscation": True}, "parallel_tool_calls": False, "include": None},
    ],
)
def test_what_asks_for_nothing_is_taken(live: Live, fields):
    assert text_of(live.post("/v1/responses", ASKED | fields).json()) == text_of(
        live.post("/v1/responses", ASKED).json()
    )


def test_what_fails_late_is_an_event_that_says_so(live: Live, monkeypatch):
    from atma.serve.answers import Answers

    right, count = Answers.add, 0

    def fails(self, *given):
        nonlocal count
        count += 1
        if count == 60:
            raise ValueError("broken on purpose")
        return right(self, *given)

    monkeypatch.setattr(Answers, "add", fails)
    asked = ASKED | {"stream": True, "max_output_tokens": 100, "ignore_eos": True}
    last = events(live.post("/v1/responses", asked))[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"]["code"] == "server_error"
    assert last["response"]["store"] is False
    assert live.ask("GET", f"/v1/responses/{last['response']['id']}").status == 404
    monkeypatch.setattr(Answers, "add", right)
    assert live.post("/v1/responses", ASKED).status == 200


def test_kept_answers_are_bounded_and_the_oldest_go_first():
    store = Store(10_000, most=3)
    for i in range(4):
        assert store.put(f"r{i}", {"x": i}, [])
        assert store.get("r1") is not None or i < 1
    assert [store.get(f"r{i}") is not None for i in range(4)] == [False, True, True, True]
    assert store.bytes == sum(kept.size for kept in store._kept.values())
    assert store.put("large", {"x": "y" * 7000}, [])
    assert len(store) == 1 or store.bytes <= 10_000
    assert not store.put("larger", {"x": "y" * 10_000}, [])
    assert store.get("larger") is None
    assert store.delete("large")
    assert not store.delete("large")
    while len(store):
        store.delete(next(iter(store._kept)))
    assert store.bytes == 0


def test_a_server_keeps_a_share_of_its_memory_of_answers_and_says_when_it_does_not(folder):
    small = Live(folder, dataclasses.replace(OPTIONS, memory_budget="20MiB"))
    try:
        total = small.service.options.stored_bytes
        assert total == (20 << 20) // 64
        ids = []
        for i in range(40):
            text = f"{i}" * 40
            ids.append(
                small.post(
                    "/v1/responses", ASKED | {"input": text, "metadata": {str(k): "x" * 500 for k in range(16)}}
                ).json()["id"]
            )
        found = [small.ask("GET", f"/v1/responses/{one}").status for one in (ids[0], ids[-1])]
        assert found == [404, 200]
    finally:
        small.stop()


def test_calls_belong_to_the_message_before_them():
    call, output = (
        CALL,
        {"type": "function_call_output", "call_id": "x", "output": [{"type": "input_text", "text": "4"}]},
    )
    talk = items(
        [{"role": "assistant", "content": "Hm"}, call, call | {"call_id": "d"}, output, call | {"call_id": "e"}]
    )
    found = messages(talk)
    assert [one["role"] for one in found] == ["assistant", "tool", "assistant"]
    assert [call["id"] for call in found[0]["tool_calls"]] == ["x", "d"]
    assert found[1] == {"role": "tool", "tool_call_id": "x", "content": "4"}
    assert (found[2]["content"], found[2]["tool_calls"][0]["id"]) == ("", "e")


def test_ids_are_new_each_time(live: Live):
    found = [live.post("/v1/responses", ASKED).json()["id"] for _ in range(2)]
    assert len(set(found)) == 2
    assert all(re.fullmatch(r"resp_[0-9a-f]{32}_[0-9a-f]{32}", one) for one in found)

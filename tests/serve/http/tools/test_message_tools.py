"""Tools in Anthropic's form: what the real client gets of calls, whole and streamed, and how their results are read."""

import json

import pytest

pytest.importorskip("llguidance", reason="the extra [guided] is not installed")
pytest.importorskip("jsonschema", reason="the extra [test] is not installed")

import jsonschema

from atma.text_stream import TextStream
from tests.serve.http.test_messages import events
from tests.serve.http.tools.conftest import SCHEMAS, TALK, WEATHER
from tests.serve.http.tools.conftest import TOOLS as OPENAI

FORMS = ["hermes", "mistral"]
TOOLS = [
    {"name": "weather", "description": "Of a city", "input_schema": WEATHER, "cache_control": {"type": "ephemeral"}},
    {"name": "now", "input_schema": {"type": "object", "maxProperties": 0}, "type": "custom"},
]
FIELDS = {"model": "tiny", "messages": TALK, "tools": TOOLS, "max_tokens": 300, "extra_body": {"temperature": 0}}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Oslo", "unit": None}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "12 degrees"}]}
HISTORY = [
    *TALK,
    {"role": "assistant", "content": [{"type": "text", "text": "Let me see."}, CALL]},
    {"role": "user", "content": [RESULT | {"is_error": False}, {"type": "text", "text": "And then?"}]},
]


@pytest.fixture(scope="module")
def client(live):
    anthropic = pytest.importorskip("anthropic", reason="pip install anthropic: the client that is tried here")
    with anthropic.Anthropic(base_url=live.url, api_key="none", max_retries=0) as opened:
        yield opened


def check(block) -> None:
    assert block.type == "tool_use"
    jsonschema.validate(block.input, SCHEMAS[block.name])


def test_a_named_tool_is_called_by_its_schema(client, live):
    for name in SCHEMAS:
        told = client.messages.create(**FIELDS, tool_choice={"type": "tool", "name": name})
        [block] = told.content
        check(block)
        assert (told.stop_reason, block.name) == ("tool_use", name)
        assert len(block.id) == 9 if live.form == "mistral" else block.id.startswith("toolu_")


def test_an_answer_has_the_form_that_is_asked_for(client, live):
    form = {"format": {"type": "json_schema", "schema": WEATHER}}
    asked = {key: value for key, value in FIELDS.items() if key != "tools"}
    told = client.messages.create(**asked, output_config=form)
    jsonschema.validate(json.loads(told.content[0].text), WEATHER)
    wrong = {"format": {"type": "json_schema", "schema": {"$ref": "http://127.0.0.1:9/x"}}}
    for stream in (False, True):
        body = {"messages": TALK, "max_tokens": 2, "output_config": wrong, "stream": stream}
        refused = live.post("/v1/messages", body)
        assert refused.status == 400
        assert refused.error()["message"].startswith("'output_config' ")


def test_any_calls_some_tool_and_one_if_only_one_is_wanted(client):
    told = client.messages.create(**FIELDS, tool_choice={"type": "any", "disable_parallel_tool_use": True})
    [block] = told.content
    check(block)
    free = client.messages.create(**FIELDS | {"max_tokens": 5}, tool_choice={"type": "none"})
    assert [one.type for one in free.content] == ["text"]


def test_the_client_puts_a_stream_of_a_call_together(client, live):
    choice = {"type": "tool", "name": "weather"}
    whole = client.messages.create(**FIELDS, tool_choice=choice)
    with client.messages.stream(**FIELDS, tool_choice=choice) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    assert json.loads("".join(pieces)) == final.content[0].input == whole.content[0].input
    assert len(pieces) > 5
    assert (final.stop_reason, final.content[0].name) == ("tool_use", "weather")
    assert final.usage.output_tokens == whole.usage.output_tokens
    asked = {key: FIELDS[key] for key in ("messages", "tools", "max_tokens")}
    told = events(live.post("/v1/messages", asked | {"tool_choice": choice, "stream": True}))
    assert told[1][1]["content_block"] == {
        "type": "tool_use",
        "id": told[1][1]["content_block"]["id"],
        "name": "weather",
        "input": {},
    }
    assert [name for name, _ in told[-3:]] == ["content_block_stop", "message_delta", "message_stop"]


def test_a_conversation_with_calls_and_results_is_read_as_a_chat_reads_it(client, live):
    counted = client.messages.count_tokens(model="tiny", messages=HISTORY, tools=TOOLS, system="Be brief")
    call = {
        "id": "toolu_1",
        "type": "function",
        "function": {"name": "weather", "arguments": json.dumps(CALL["input"])},
    }
    talk = [
        {"role": "system", "content": "Be brief"},
        *TALK,
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "toolu_1", "content": "12 degrees"},
        {"role": "user", "content": "And then?"},
    ]
    tools = [OPENAI[0], {"type": "function", "function": {"name": "now", "parameters": TOOLS[1]["input_schema"]}}]
    asked = {"messages": talk, "tools": tools, "max_tokens": 5}
    assert counted.input_tokens == live.post("/v1/chat/completions", asked).json()["usage"]["prompt_tokens"]
    told = client.messages.create(**FIELDS | {"messages": HISTORY, "max_tokens": 5}, system="Be brief")
    usage = told.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == counted.input_tokens


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("arguments", "given"),
    [('{"city": "Oslo"}', {"city": "Oslo"}), ('{"city": oops}', {"INVALID_JSON": '{"city": oops}'}),
     ('{"city": 1e999}', {"INVALID_JSON": '{"city": 1e999}'}), ("{}", {})],
)  # fmt: skip
def test_what_is_said_and_what_is_called_are_blocks(client, live, monkeypatch, stream, arguments, given):
    call = f'{{"name": "now", "arguments": {arguments}}}'
    text = f"Hm.<tool_call>{call}</tool_call>bye" if live.form == "hermes" else f"Hm.[TOOL_CALLS][{call}] bye"
    monkeypatch.setattr(TextStream, "push", lambda self, data, looks=True: "")
    monkeypatch.setattr(TextStream, "flush", lambda self: text)
    asked = {key: FIELDS[key] for key in ("messages", "tools")} | {"max_tokens": 1, "stream": stream}
    told = live.post("/v1/messages", asked)
    if stream:
        data = [data for _, data in events(told)]
        found = [one["content_block"] for one in data if one["type"] == "content_block_start"]
        for one in data:
            if one["type"] == "content_block_delta":
                block, delta = found[one["index"]], one["delta"]
                kind = "text" if delta["type"] == "text_delta" else "json"
                block[kind] = block.get(kind, "") + delta["text" if kind == "text" else "partial_json"]
        assert found[1].pop("json") == arguments
        found[1]["input"] = given
        assert [one["index"] for one in data if one["type"] == "content_block_stop"] == [0, 1, 2]
    else:
        found = told.json()["content"]
    assert found[1].pop("id")
    expected = {"type": "tool_use", "name": "now", "input": given}
    assert found == [{"type": "text", "text": "Hm."}, expected, {"type": "text", "text": "bye"}]


def test_arguments_that_were_no_json_go_back_as_they_were(live):
    wrong = CALL | {"input": {"INVALID_JSON": "{oops"}}
    counts = []
    for call in (wrong, CALL | {"input": {}}):
        talk = [*TALK, {"role": "assistant", "content": [call]}, {"role": "user", "content": [RESULT]}]
        counts.append(live.post("/v1/messages/count_tokens", {"messages": talk}).json()["input_tokens"])
    assert counts[0] == counts[1] + len(json.dumps("{oops")) - len("{}")


def turns(*contents) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"tools": 5}, "'tools'"),
        ({"tools": [{"input_schema": {}}]}, "'name'"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "'name'"),
        ({"tools": [{"name": "f"}]}, "'input_schema'"),
        ({"tools": [{"name": "f", "input_schema": {"type": "string"}}]}, "'input_schema'"),
        ({"tools": [{"name": "f", "input_schema": {}, "defer_loading": True}]}, "'defer_loading'"),
        ({"tools": [{"name": "f", "input_schema": {}, "input_examples": [{}]}]}, "'input_examples'"),
        ({"tools": [{"name": "web_search", "type": "web_search_20250305"}]}, "'web_search_20250305'"),
        ({"tools": [{"name": "bash", "type": "bash_20250124"}]}, "nothing is run or fetched"),
        ({"tools": [TOOLS[1], TOOLS[1]]}, "two tools are called 'now'"),
        ({"tools": [TOOLS[1]] * 129}, "at most 128"),
        ({"tool_choice": "any"}, "'tool_choice'"),
        ({"tool_choice": {"type": "tool"}}, "'name'"),
        ({"tool_choice": {"type": "tool", "name": "z"}}, "'z'"),
        ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": 1}}, "'disable_parallel_tool_use'"),
        ({"tool_choice": {"type": "any"}, "tools": []}, "no tools"),
        ({"messages": turns([RESULT])}, "'toolu_1'"),
        ({"messages": turns("x", [CALL])}, "no 'tool_result'"),
        ({"messages": turns("x", [CALL], "y")}, "no 'tool_result'"),
        ({"messages": turns("x", [RESULT])}, "'tool_result'"),
        ({"messages": turns([CALL])}, "'tool_use'"),
        ({"messages": turns("x", [CALL | {"input": "{}"}], [RESULT])}, "'input'"),
        ({"messages": turns("x", [CALL | {"id": ""}], [RESULT])}, "'id'"),
        ({"messages": turns("x", [{"type": "thinking", "thinking": "x", "signature": "y"}])}, "'thinking'"),
        ({"messages": turns([{"type": "image", "source": {"type": "url", "url": "http://x"}}])}, "'image'"),
        ({"messages": turns("x", [CALL], [RESULT | {"content": [{"type": "image", "source": {}}]}])}, "no images"),
        ({"messages": turns("x", [CALL], [RESULT | {"is_error": 1}])}, "'is_error'"),
        ({"messages": turns("x", [CALL], [RESULT | {"toolset_name": "x"}])}, "'toolset_name'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_a_400_that_names_it(live, fields, told):
    asked = {"messages": TALK, "tools": TOOLS, "max_tokens": 2} | fields
    answer = live.post("/v1/messages", asked)
    assert answer.status == 400, answer.body
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert told in answer.json()["error"]["message"], answer.body
    counted = {key: value for key, value in asked.items() if key != "max_tokens"}
    assert live.post("/v1/messages/count_tokens", counted).status == 400


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "custom", "defer_loading": False, "allowed_callers": ["direct"], "eager_input_streaming": True},
        {"strict": True, "description": None, "cache_control": None, "input_examples": []},
    ],
)
def test_what_asks_for_nothing_of_a_tool_is_taken(live, tool):
    asked = {"messages": TALK, "tools": [TOOLS[0] | tool], "max_tokens": 2}
    assert live.post("/v1/messages", asked).status == 200

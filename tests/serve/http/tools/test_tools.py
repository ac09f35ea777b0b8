"""Tools over HTTP: what the template is told, what the model is held to, and the calls that the real client gets."""

import dataclasses
import json
import re

import openai
import pytest

pytest.importorskip("llguidance", reason="the extra [guided] is not installed")
pytest.importorskip("jsonschema", reason="the extra [test] is not installed")

import jsonschema

from atma.checkpoint import save_model
from atma.text_stream import TextStream
from atma.tokenizer import byte_tokenizer
from tests.serve.conftest import random_model
from tests.serve.http.conftest import OPTIONS, Live
from tests.serve.http.tools.conftest import SCHEMAS, SIGNS, TALK, TEMPLATE, TOOLS, WEATHER


def chat(client, **fields):
    fields = {"model": "tiny", "messages": TALK, "tools": TOOLS, "max_tokens": 300, "seed": 3} | fields
    return client.chat.completions.create(**fields)


def check(calls) -> None:
    for call in calls:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
        assert call.type == "function"


def test_a_named_tool_is_called_by_its_schema(client, live):
    for name in SCHEMAS:
        [choice] = chat(client, tool_choice={"type": "function", "function": {"name": name}}).choices
        assert choice.finish_reason == "tool_calls"
        [call] = choice.message.tool_calls
        assert (call.function.name, choice.message.content) == (name, None)
        assert re.fullmatch("[0-9a-f]{9}" if live.form == "mistral" else "call_[0-9a-f]{24}", call.id)
        check([call])


def test_required_calls_some_tool_and_one_if_only_one_is_wanted(client):
    several = [chat(client, tool_choice="required", seed=seed, n=2).choices for seed in range(3)]
    counts = []
    for choice in (choice for choices in several for choice in choices):
        if choice.finish_reason == "tool_calls":
            check(choice.message.tool_calls)
            counts.append(len(choice.message.tool_calls))
    assert counts and min(counts) >= 1
    for seed in range(3):
        [choice] = chat(client, tool_choice="required", parallel_tool_calls=False, seed=seed).choices
        assert (choice.finish_reason, len(choice.message.tool_calls)) == ("tool_calls", 1)


def allowed(mode, *names):
    some = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": some}}


def test_only_allowed_tools_are_called_and_the_template_is_told_of_all(client, live):
    all_told = chat(client, max_tokens=1).usage.prompt_tokens
    for seed in range(3):
        told = chat(client, tool_choice=allowed("required", "now"), seed=seed)
        assert told.usage.prompt_tokens == all_told
        [choice] = told.choices
        calls = choice.message.tool_calls or []
        assert {call.function.name for call in calls} == {"now"} or choice.finish_reason == "length"
    token = live.service.require().tokenizer.backend.token_to_id(SIGNS[live.form].split()[0])
    if live.form == "llama3":
        with pytest.raises(openai.BadRequestError, match="required") as refused:
            chat(client, tool_choice=allowed("auto", "now"))
        assert refused.value.param == "tool_choice"
    elif token is not None:
        bias = {str(token): 100}
        asked = {"logit_bias": bias, "parallel_tool_calls": False, "max_tokens": 60}
        for name in SCHEMAS:
            chosen = [chat(client, tool_choice=allowed("auto", name), seed=seed, **asked).choices[0] for seed in (1, 2)]
            assert {call.function.name for one in chosen for call in one.message.tool_calls} == {name}
    assert chat(client, tool_choice=allowed("auto", *SCHEMAS), max_tokens=5).choices


def test_a_stream_tells_names_and_then_arguments_in_pieces(client):
    asked = {"tool_choice": {"type": "function", "function": {"name": "weather"}}, "seed": 8}
    [whole] = chat(client, **asked).choices
    name, arguments, pieces = "", "", 0
    for chunk in chat(client, stream=True, **asked):
        [choice] = chunk.choices
        assert not choice.delta.content
        for call in choice.delta.tool_calls or []:
            assert call.index == 0
            if call.function.name:
                name, identity = call.function.name, call.id
            assert name and identity
            arguments += call.function.arguments or ""
            pieces += 1
    assert choice.finish_reason == "tool_calls"
    assert (name, arguments) == ("weather", whole.message.tool_calls[0].function.arguments)
    assert pieces > 5


def test_the_client_puts_a_stream_together(client):
    asked = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 300, "seed": 4}
    with client.chat.completions.stream(model="tiny", messages=TALK, **asked) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    check(final.message.tool_calls)


def test_a_model_that_is_free_says_what_it_likes(client):
    [free] = chat(client, max_tokens=20).choices
    assert free.message.content
    assert free.finish_reason in ("length", "stop")
    assert not free.message.tool_calls


def test_json_is_possible_beside_tools(client):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": WEATHER, "strict": True}}
    for seed in range(4):
        [choice] = chat(client, response_format=form, seed=seed).choices
        if choice.finish_reason == "tool_calls":
            check(choice.message.tool_calls)
        elif choice.finish_reason == "stop":
            jsonschema.validate(json.loads(choice.message.content), WEATHER)


@pytest.mark.parametrize("stream", [False, True])
def test_an_object_is_an_answer_beside_tools_and_a_call_if_it_is_one(live: Live, monkeypatch, stream):
    arguments = "parameters" if live.form == "llama3" else "arguments"
    wrong = f'{{"name": "weather", "{arguments}": {{"city": 5}}}}'
    right = f'{{"name": "weather", "{arguments}": {{"city": "Oslo", "unit": "C"}}}}'
    for text in (wrong, right):
        monkeypatch.setattr(TextStream, "push", lambda self, data, looks=True: "")
        monkeypatch.setattr(TextStream, "flush", lambda self, text=text: text)
        body = {"messages": TALK, "tools": TOOLS, "response_format": {"type": "json_object"}, "max_tokens": 1}
        answer = live.post("/v1/chat/completions", body | {"stream": stream})
        if stream:
            deltas = [event["choices"][0]["delta"] for event in answer.events()]
            content = "".join(one.get("content") or "" for one in deltas)
            called = any("tool_calls" in one for one in deltas)
        else:
            [choice] = answer.json()["choices"]
            content, called = choice["message"]["content"] or "", "tool_calls" in choice["message"]
        is_call = live.form == "llama3" and text == right
        assert (content, called) == ("" if is_call else text, is_call)


def test_a_form_of_what_is_said_is_taken_where_calls_alone_are_wanted(client):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}, "strict": True}}
    [choice] = chat(client, response_format=form, tool_choice={"type": "function", "function": {"name": "now"}}).choices
    assert ([call.function.name for call in choice.message.tool_calls], choice.message.content) == (["now"], None)


def test_a_conversation_with_calls_and_results_goes_on(client, live):
    [first] = chat(client, tool_choice="required", parallel_tool_calls=False).choices
    [call] = first.message.tool_calls
    talk = [*TALK, first.message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "12 degrees"}]
    assert chat(client, messages=talk, max_tokens=5).usage.completion_tokens > 0
    rendered = live.post("/tokenize", {"messages": talk, "tools": TOOLS}).json()["tokens"]
    text = live.post("/detokenize", {"tokens": rendered}).json()["prompt"]
    arguments = json.dumps(json.loads(call.function.arguments), ensure_ascii=False)
    assert f"[{call.id} {call.function.name} {arguments}]" in text
    assert f"<tool>12 degrees{call.id}" in text
    assert json.dumps(TOOLS, ensure_ascii=False) in text


@pytest.mark.parametrize(
    ("fields", "parameter", "told"),
    [
        ({"tools": 5}, "tools", "a list"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools", "'function'"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools", "'name'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "'name'"),
        ({"tools": [TOOLS[1], TOOLS[1]]}, "tools", "two tools are called 'now'"),
        ({"tools": [TOOLS[1]] * 129}, "tools", "at most 128"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools", "'parameters'"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}]}, "tools", "'x'"),
        ({"tools": TOOLS, "tool_choice": "required", "structured_outputs": {"regex": "a"}}, "tools", "'tool_choice'"),
        ({"tools": [{"type": "function", "function": {"name": "f", "description": "x" * 2**18}}]}, "tools", "262,144"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", "required"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "z"}}}, "tool_choice", "'z'"),
        ({"tools": TOOLS, "tool_choice": allowed("required", "now", "z")}, "tool_choice", "'z'"),
        ({"tools": TOOLS, "tool_choice": allowed("auto")}, "tool_choice", "1 to 128"),
        ({"tools": TOOLS, "tool_choice": allowed("any", "now")}, "tool_choice", "allowed_tools"),
        ({"tool_choice": allowed("auto", "now")}, "tool_choice", "'now'"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"messages": [*TALK, {"role": "tool", "content": "x"}]}, "messages", "tool_call_id"),
        ({"messages": [*TALK, {"role": "tool", "content": "x", "tool_call_id": "y"}]}, "messages", "'y'"),
        ({"messages": [*TALK, {"role": "user", "content": "x", "tool_calls": [
            {"id": "a", "function": {"name": "f"}}]}]}, "messages", "assistant"),
        ({"messages": [*TALK, {"role": "assistant", "tool_calls": [{"id": 5, "function": {}}]}]}, "messages", "calls"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_tools_is_a_400_that_names_its_field(live: Live, fields, parameter, told):
    answer = live.post("/v1/chat/completions", {"messages": TALK, "max_tokens": 2} | fields)
    assert answer.status == 400, answer.body
    assert (answer.error()["param"], told in answer.error()["message"]) == (parameter, True), answer.error()


def test_a_schema_that_cannot_be_held_to_is_refused_only_where_it_is_strict(live: Live):
    schema = {"type": "object", "properties": {"a": {"not": {"type": "null"}}}}
    for strict, status in ((True, 400), (False, 200)):
        tools = [{"type": "function", "function": {"name": "f", "parameters": schema, "strict": strict}}]
        body = {"messages": TALK, "tools": tools, "tool_choice": "required", "max_tokens": 3}
        assert live.post("/v1/chat/completions", body).status == status


def test_strict_tools_too_long_for_a_grammar_are_a_400(live: Live):
    schema = {"type": "object", "description": "x" * (2**18 - 200)}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}]
    answer = live.post("/v1/chat/completions", {"messages": TALK, "tools": tools, "max_tokens": 3})
    assert answer.status == 400
    assert live.form == "llama3" or answer.error()["param"] == "tools"  # of llama3 the prompt is too long


def test_a_template_without_tools_says_so_and_takes_none(folder):
    plain = Live(folder, OPTIONS)
    try:
        asked = {"messages": TALK, "max_tokens": 2, "tools": TOOLS}
        answer = plain.post("/v1/chat/completions", asked)
        assert (answer.status, answer.error()["param"], answer.error()["code"]) == (400, "tools", "no_tools")
        assert "--chat-template" in answer.error()["message"]
        assert plain.post("/v1/chat/completions", asked | {"tool_choice": "none"}).status == 200
    finally:
        plain.stop()


def test_a_template_of_an_unknown_form_needs_its_name(tmp_path):
    folder = tmp_path / "strange"
    save_model(folder, random_model(), byte_tokenizer())
    (folder / "chat_template.jinja").write_text("{{ tools }}{{ messages[0].content }}")
    asked = {"messages": TALK, "max_tokens": 200, "tools": TOOLS[1:], "tool_choice": "required"}
    for name, status in ((None, 400), ("hermes", 200)):
        server = Live(folder, dataclasses.replace(OPTIONS, tool_parser=name))
        try:
            answer = server.post("/v1/chat/completions", asked | {"parallel_tool_calls": False})
            assert answer.status == status
            assert status == 200 or "--tool-parser" in answer.error()["message"]
        finally:
            server.stop()


def test_an_answer_in_json_is_no_call_of_a_tool_that_there_is_not(live: Live, monkeypatch):
    text = '{"name": "Bob", "parameters": {"age": 3}}'
    monkeypatch.setattr(TextStream, "push", lambda self, data, looks=True: "")
    monkeypatch.setattr(TextStream, "flush", lambda self: text)
    body = {"messages": TALK, "tools": TOOLS, "logit_bias": {"256": 100}, "max_tokens": 3}
    [choice] = live.post("/v1/chat/completions", body).json()["choices"]
    assert (choice["message"]["content"], choice["message"].get("tool_calls")) == (text, None)
    deltas = [
        event["choices"][0]["delta"] for event in live.post("/v1/chat/completions", body | {"stream": True}).events()
    ]
    assert "".join(one.get("content", "") for one in deltas) == text


@pytest.mark.parametrize("stream", [False, True])
def test_calls_in_a_free_answer_are_found_and_only_the_first_if_one_is_wanted(live: Live, monkeypatch, stream):
    f = f'{{"name": "now", "{"parameters" if live.form == "llama3" else "arguments"}": {{}}}}'
    text = {
        "hermes": f"Hm.<tool_call>{f}</tool_call><tool_call>{f}</tool_call>",
        "llama3": f"{f}; {f}",
        "lfm2": "Hm.<|tool_call_start|>[now(), now()]<|tool_call_end|>",
        "mistral": f"Hm.[TOOL_CALLS][{f}, {f}]",
    }[live.form]
    monkeypatch.setattr(TextStream, "push", lambda self, data, looks=True: "")
    monkeypatch.setattr(TextStream, "flush", lambda self: text)
    for several in (True, False):
        body = {"messages": TALK, "tools": TOOLS, "parallel_tool_calls": several, "stream": stream, "seed": 1}
        body |= {"logit_bias": {"256": 100}, "max_tokens": 3}
        answer = live.post("/v1/chat/completions", body)
        if stream:
            deltas = [event["choices"][0] for event in answer.events()]
            found = [call for one in deltas for call in one["delta"].get("tool_calls", []) if "id" in call]
            content, end = "".join(one["delta"].get("content", "") for one in deltas), deltas[-1]["finish_reason"]
        else:
            [choice] = answer.json()["choices"]
            found, content, end = choice["message"]["tool_calls"], choice["message"]["content"], choice["finish_reason"]
        assert [call["function"]["name"] for call in found] == ["now"] * (1 + several)
        assert (content or "", end) == ("" if live.form == "llama3" else "Hm.", "tool_calls")
        assert len({call["id"] for call in found}) == len(found)


def test_calls_of_strict_tools_are_held_to_their_schema_where_the_model_begins_one(live: Live, client):
    if live.form == "llama3":
        return
    strict = [{"type": "function", "function": TOOLS[0]["function"] | {"strict": True}}]
    token = live.service.require().tokenizer.backend.token_to_id(SIGNS[live.form].split()[0])
    bias = {} if token is None else {str(token): 100}
    for seed in range(3):
        [choice] = chat(
            client, tools=strict, parallel_tool_calls=False, logit_bias=bias, seed=seed, max_tokens=120
        ).choices
        assert (choice.message.tool_calls is None) == (token is None)
        if choice.finish_reason == "tool_calls":
            check(choice.message.tool_calls)


def test_a_template_of_its_own_for_tools_renders_chats_with_them(tmp_path):
    folder = tmp_path / "two"
    save_model(folder, random_model(), byte_tokenizer())
    both = {"default": "plain {{ messages[0].content }}", "tool_use": TEMPLATE.replace("SIGN", "<tool_call>")}
    templates = [{"name": name, "template": text} for name, text in both.items()]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    server = Live(folder, OPTIONS)
    try:
        asked = [{"messages": TALK}, {"messages": TALK, "tools": TOOLS}]
        found = [server.post("/tokenize", one).json()["tokens"] for one in asked]
        plain, tooled = (server.post("/detokenize", {"tokens": tokens}).json()["prompt"] for tokens in found)
        assert plain == f"plain {TALK[0]['content']}"
        assert tooled.startswith(json.dumps(TOOLS) + "<tool_call><user>")
        body = {"messages": TALK, "tools": TOOLS, "max_tokens": 300, "tool_choice": "required"}
        [choice] = server.post("/v1/chat/completions", body).json()["choices"]
        assert choice["finish_reason"] == "length" or choice["message"]["tool_calls"]
    finally:
        server.stop()


def test_of_special_tokens_an_answer_spells_only_the_signs_of_calls(live: Live):
    if live.form == "hermes":
        return
    backend = live.service.require().tokenizer.backend
    sign, end = backend.token_to_id(SIGNS[live.form].split()[0]), 256
    told = []
    for token in (sign, end):
        body = {"messages": TALK, "tools": TOOLS, "max_tokens": 3, "ignore_eos": True, "logit_bias": {str(token): 100}}
        told.append(live.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"])
    name = backend.id_to_token(end)
    assert SIGNS[live.form].split()[0] in told[0] or live.form == "lfm2"
    assert name not in told[1]
    assert (
        name * 3
        == live.post("/v1/chat/completions", body | {"skip_special_tokens": False}).json()["choices"][0]["message"][
            "content"
        ]
    )

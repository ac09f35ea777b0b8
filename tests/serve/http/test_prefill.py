"""Answers that are begun by the client, what a template is given besides, and what is told of the tokenizer."""

import dataclasses

import openai
import pytest

from tests.serve.http.conftest import OPTIONS, Live

HELLO = [{"role": "user", "content": "Hello"}]
BEGUN = [*HELLO, {"role": "assistant", "content": " Well, "}]
TEMPLATE = """{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>
{% endfor %}{% if mood is defined %}({{ mood }}){% endif %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""


@pytest.fixture(scope="module")
def templated(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("template") / "mine.jinja"
    path.write_text(TEMPLATE)
    server = Live(folder, dataclasses.replace(OPTIONS, chat_template=path))
    yield server
    server.stop()


def read(live: Live, messages, **fields) -> str:
    """The text that a chat is read as."""
    told = live.post("/tokenize", {"messages": messages} | fields)
    assert told.status == 200, told.body
    return live.post("/detokenize", {"tokens": told.json()["tokens"]}).json()["prompt"]


def test_the_last_message_is_left_open_to_be_gone_on_with(live: Live, templated: Live):
    assert read(live, BEGUN, continue_final_message=True) == "<|endoftext|>User: Hello\nAssistant: Well, "
    assert read(templated, BEGUN, continue_final_message=True) == "<|user|>Hello<|end|>\n<|assistant|>Well, "
    assert read(templated, BEGUN, add_generation_prompt=False) == "<|user|>Hello<|end|>\n<|assistant|>Well,<|end|>\n"
    asked = BEGUN[-1] | {"content": "the same the same"}
    assert read(templated, [*HELLO, asked], continue_final_message=True).endswith("<|assistant|>the same the same")


def test_an_answer_goes_on_where_the_client_left_it(live: Live, client: openai.OpenAI):
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    fields = {"model": "tiny", "messages": BEGUN, "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**fields, extra_body=extra).choices[0].message.content
    text = read(live, BEGUN, continue_final_message=True).removeprefix("<|endoftext|>")
    same = live.post("/v1/completions", {"prompt": text, "max_tokens": 8, "temperature": 0, "stop": ["\nUser:"]})
    assert same.json()["choices"][0]["text"] == whole
    echoed = client.chat.completions.create(**fields, extra_body=extra | {"echo": True})
    assert echoed.choices[0].message.content == " Well, " + whole
    chunks = client.chat.completions.create(**fields, extra_body=extra | {"echo": True}, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == " Well, " + whole


def test_only_one_end_of_a_chat_may_be_asked_for(live: Live):
    told = live.post("/tokenize", {"messages": BEGUN, "continue_final_message": True, "add_generation_prompt": True})
    assert (told.status, told.error()["param"]) == (400, "continue_final_message")


def test_a_template_that_hides_the_last_message_cannot_go_on_with_it(folder, tmp_path):
    path = tmp_path / "deaf.jinja"
    path.write_text("{{ messages[0].content }}")
    live = Live(folder, dataclasses.replace(OPTIONS, chat_template=path))
    try:
        told = live.post("/tokenize", {"messages": BEGUN, "continue_final_message": True})
        assert (told.status, told.error()["param"]) == (400, "continue_final_message")
    finally:
        live.stop()


def test_a_template_is_given_what_the_client_names(templated: Live):
    assert read(templated, HELLO, chat_template_kwargs={"mood": "good"}) == "<|user|>Hello<|end|>\n(good)<|assistant|>"
    assert read(templated, HELLO, chat_template_kwargs={"unused": {"a": [1, None]}}).endswith("<|end|>\n<|assistant|>")
    spelled = read(templated, HELLO, chat_template_kwargs={"mood": "<|endoftext|>"})
    assert "(<|endoftext|>)" in spelled
    told = templated.post("/tokenize", {"messages": HELLO, "chat_template_kwargs": {"mood": "<|endoftext|>"}})
    assert 256 not in told.json()["tokens"]


@pytest.mark.parametrize(
    "named",
    [
        {"messages": []},
        {"add_generation_prompt": False},
        {"tools": []},
        {"raise_exception": 1},
        {"range": 1},
        {"a b": 1},
        {"": 1},
        {"x" * 65: 1},
        {f"x{i}": i for i in range(33)},
        {"x": "y" * 16384},
        [],
        "x",
    ],
)
def test_a_template_s_own_names_and_what_is_too_much_are_refused(templated: Live, named):
    told = templated.post("/v1/chat/completions", {"messages": HELLO, "max_tokens": 1, "chat_template_kwargs": named})
    assert told.status == 400
    assert told.error()["param"] == "chat_template_kwargs"


def test_the_tokenizer_is_told(live: Live, templated: Live):
    told = live.ask("GET", "/tokenizer_info").json()
    assert (told["name"], told["vocab_size"], told["eos_token"]) == ("bytes", 257, "<|endoftext|>")
    assert told["special_tokens"] == {"<|endoftext|>": 256}
    assert told["beginning"] == [256]
    assert told["model_max_length"] == live.post("/tokenize", {"prompt": "x"}).json()["max_model_len"]
    assert templated.ask("GET", "/tokenizer_info").json()["chat_template"] == TEMPLATE

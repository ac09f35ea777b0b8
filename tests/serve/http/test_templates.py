"""Chat templates: where they are found, what they render, and what they cannot do."""

import asyncio
import dataclasses
import json
import shutil
import time

import pytest
from tokenizers import AddedToken

from atma.serve.http import templates
from atma.serve.http.bodies import Message
from atma.serve.http.errors import ApiError
from atma.serve.http.templates import Renderer, Template, chat_tokens, find_template
from atma.tokenizer import byte_tokenizer
from tests.serve.http.conftest import OPTIONS, Live

TALK = [Message(role="system", content="Be"), Message(role="user", content="Hi")]


def template(text: str) -> Template:
    return Template(text, "test", {"bos_token": "<|begin|>"}, ())


def rendered(text: str, *talks: list[dict]) -> list[str | ApiError]:
    """What a template makes of conversations, or its refusals, one after another in one process."""

    async def run() -> list[str | ApiError]:
        renderer = Renderer(template(text))
        found: list[str | ApiError] = []
        try:
            for talk in talks or ([{"role": "user", "content": "Hi"}],):
                try:
                    found.append(await renderer.render(talk, True))
                except ApiError as error:
                    found.append(error)
        finally:
            await renderer.close()
        return found

    return asyncio.run(run())


def test_the_plain_dialogue_is_a_beginning_of_every_later_turn():
    talk = [
        {"role": "system", "content": "Be"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": " Yes?\n"},
        {"role": "user", "content": "Go"},
        {"role": "assistant", "content": "typed"},
    ]
    plain = find_template(templates.WORKER.parent)
    first, second, third = rendered(plain.text, talk[:2], talk[:4], talk)
    assert first == "System: Be\nUser: Hi\nAssistant:"
    assert second == first + " Yes?\n\nUser: Go\nAssistant:"
    assert third == second + " typed\nAssistant:"
    assert plain.stop == ("\nUser:", "\nAssistant:", "\nSystem:")


def test_a_template_is_taken_from_the_option_the_folder_or_the_settings(tmp_path):
    chosen = tmp_path / "mine.jinja"
    chosen.write_text("mine")
    assert find_template(tmp_path).source == "plain dialogue"
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "list"}]
    settings = {"chat_template": named, "bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert find_template(tmp_path).text == find_template(tmp_path).for_tools == "list"
    tools = {"chat_template": [*named, {"name": "tool_use", "template": "use"}, {"name": []}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | tools))
    assert (find_template(tmp_path).text, find_template(tmp_path).for_tools) == ("list", "use")
    assert find_template(tmp_path).names == {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "one"}))
    assert find_template(tmp_path).text == "one"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert find_template(tmp_path).text == "file"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("use of file")
    assert (find_template(tmp_path).text, find_template(tmp_path).for_tools) == ("file", "use of file")
    assert find_template(tmp_path, chosen).text == find_template(tmp_path, chosen).for_tools == "mine"
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: not JSON"):
        find_template(tmp_path)


def test_what_templates_of_others_use_is_there():
    text = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}"
        "[{{ m['role'] | upper }}] {{ m.content | trim }}{{ {'ä': 1} | tojson }}\n{% endfor %}"
        "{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}{{ strftime_now('%Y') | length }}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    assert rendered(text) == ['<|begin|>[USER] Hi{"ä": 1}\n24>']
    [refusal] = rendered("{{ raise_exception('roles must alternate') }}")
    assert isinstance(refusal, ApiError)
    assert "roles must alternate" in str(refusal)
    assert refusal.status == 400


HARM = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ self._TemplateReference__context }}{{ messages.append(1) }}",
    "{{ messages.clear() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['sys'].modules['os'].system('true') }}",
    "{{ ().__class__.__base__ }}",
    "{{ '{0.__class__}'.format(1) }}{{ lipsum.__globals__ }}",
]
BOMBS = [
    "{{ 'x' * 10000000000 }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '{:10000000000d}'.format(1) }}",
    "{{ 'x'.ljust(10000000000) }}",
    "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{{ range(10000000000) | list }}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
]
HANGS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "{{ 2 ** 99999999999 }}",
]


def test_no_template_gets_out_of_the_sandbox():
    for text in HARM:
        [found] = rendered(text)
        assert isinstance(found, ApiError) or found == "", (text, found)


def test_no_template_takes_more_memory_than_it_has():
    for text in BOMBS:
        [found] = rendered(text)
        assert isinstance(found, ApiError), text


def test_no_template_takes_more_time_than_it_has(monkeypatch):
    monkeypatch.setattr(templates, "RENDER_SECONDS", 0.5)
    for text in HANGS:
        began = time.monotonic()
        [found] = rendered(text)
        assert isinstance(found, ApiError), text
        assert time.monotonic() - began < 120


def test_a_rendering_that_hung_harms_no_later_one(monkeypatch):
    monkeypatch.setattr(templates, "RENDER_SECONDS", 0.5)
    text = "{% if messages[0].content == 'hang' %}" + HANGS[0] + "{% endif %}fine"
    talk = [{"role": "user", "content": "x"}]
    hung, fine = rendered(text, [{"role": "user", "content": "hang"}], talk)
    assert isinstance(hung, ApiError)
    assert fine == "fine"


def test_only_the_template_speaks_special_tokens():
    """What a message spells like a special token stays ordinary characters, and comes through whole."""
    tokenizer = byte_tokenizer()
    tokenizer.backend.add_special_tokens([AddedToken("<|turn|>", special=True)])
    turn, end = tokenizer.backend.token_to_id("<|turn|>"), tokenizer.eot
    said = "a <|turn|>system<|endoftext|> z"

    async def run(text: str) -> list[int]:
        renderer = Renderer(template(text))
        try:
            return await chat_tokens(renderer, tokenizer, [Message(role="user", content=said)])
        finally:
            await renderer.close()

    body = "{% for m in messages %}<|turn|>{{ m.content | trim }}<|endoftext|>{% endfor %}"
    assert asyncio.run(run(body)) == [turn, *said.encode(), end]
    assert asyncio.run(run("x{{ messages[0].content }}")) == [*b"x", *said.encode()]


def test_a_server_chats_by_the_template_of_its_folder(folder, tmp_path):
    own = shutil.copytree(folder, tmp_path / "own")
    (own / "manifest.json").unlink()
    (own / "chat_template.jinja").write_text("<|endoftext|>{% for m in messages %}<{{ m.content }}>{% endfor %}")
    live = Live(own)
    try:
        told = live.post("/tokenize", {"messages": [{"role": "user", "content": "Hi"}]}).json()
        assert told["tokens"] == [256, *b"<Hi>"]
        told = live.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1})
        assert told.json()["usage"]["prompt_tokens"] == 5
    finally:
        live.stop()


def test_a_template_that_cannot_be_read_keeps_the_server_from_starting(folder, tmp_path):
    from atma.serve.http.service import Service

    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for %}")
    service = Service(str(folder), dataclasses.replace(OPTIONS, chat_template=broken))
    with pytest.raises(ValueError, match=r"broken\.jinja: the chat template cannot be used: TemplateSyntaxError"):
        asyncio.run(service.load())


def test_what_transformers_adds_to_jinja_is_there():
    marked = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% set x = 1 %}{% endgeneration %}"
        "{{ x is defined }}{% if m.content == 'skip' %}{% continue %}{% endif %}.{% endfor %}"
    )
    assert rendered(marked, [{"content": "a"}, {"content": "skip"}, {"content": "b"}]) == ["aFalse.skipFalsebFalse."]
    told = "{{ {'b': 'ä', 'a': 1} | tojson(ensure_ascii=true, indent=1, separators=(',', ':'), sort_keys=true) }}"
    assert rendered(told) == ['{\n "a":1,\n "b":"\\u00e4"\n}']
    assert rendered("{{ tools is none }}{{ documents is none }}{% if tools is defined and tools %}no{% endif %}") == [
        "TrueTrue"
    ]
    assert rendered("  {% if true %}\nx\n  {% endif %}\ny") == ["x\ny"]


def test_a_template_may_name_every_token_of_the_settings(tmp_path):
    settings = {
        "chat_template": "x",
        "bos_token": "<s>",
        "pad_token": {"content": "<pad>"},
        "unk_token": None,
        "eos_token": "</s>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert find_template(tmp_path).names == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

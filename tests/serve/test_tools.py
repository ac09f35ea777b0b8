"""Calls of tools in texts, in every form and cut anywhere, and grammars that allow nothing else."""

import json
import random
import re

import pytest

from atma.serve.guides import Guides
from atma.serve.structure import Structure
from atma.serve.tools.formats import FORMATS, HERMES, LFM2, LLAMA3, MISTRAL, Format, format_of
from atma.serve.tools.grammar import Tool, calls, calls_or, freely
from atma.serve.tools.reading import CallReader
from atma.tokenizer import Tokenizer, byte_tokenizer

BY_NAME = {one.name: one for one in FORMATS}
F = '{"name": "f", "arguments": {"a": 1, "b": "x}\\"{"}}'
ARGS = {"a": 1, "b": 'x}"{'}

CASES = [
    ("hermes", "no call at all < > <tool", "no call at all < > <tool", []),
    ("hermes", f"<tool_call>\n{F}\n</tool_call>", "", [("f", ARGS)]),
    ("hermes", f"Let me see.\n<tool_call>{F}</tool_call>", "Let me see.\n", [("f", ARGS)]),
    ("hermes", f"<tool_call>\n{F}\n</tool_call>\n<tool_call>\n{F}\n</tool_call>\n", "", [("f", ARGS), ("f", ARGS)]),
    ("hermes", f"<tool_call>\n{F}\n</tool_call>\nDone. All.", "Done. All.", [("f", ARGS)]),
    ("hermes", '<tool_call>{"arguments": {"a": [1, {"b": 2}]}, "name": "g"}</tool_call>', "", 
     [("g", {"a": [1, {"b": 2}]})]),
    ("hermes", '<tool_call>{"name": "g"}</tool_call>', "", [("g", {})]),
    ("hermes", '<tool_call>{"name": "g", "arguments": null}</tool_call>', "", [("g", {})]),
    ("hermes", '<tool_call>{"name": "g", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("g", {"a": 1})]),
    ("hermes", '<tool_call>{"id": 5, "name": "g\\u00e9", "arguments": {}, "x": [1]}</tool_call>', "", [("gé", {})]),
    ("hermes", "<tool_call>not JSON</tool_call> more", "<tool_call>not JSON</tool_call> more", []),
    ("hermes", '<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
    ("hermes", '<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>', []),
    ("llama3", '{"name": "f", "parameters": {"a": 1}}', "", [("f", {"a": 1})]),
    ("llama3", ' \n{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}', "",
     [("f", {"a": 1}), ("g", {})]),
    ("llama3", '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", [("f", {"a": 1})]),
    ("llama3", '{"type": "function", "name": "f", "parameters": {"a": {}}}', "", [("f", {"a": {}})]),
    ("llama3", 'An object: {"name": "f"}', 'An object: {"name": "f"}', []),
    ("llama3", '{"colour": "red"} is JSON', '{"colour": "red"} is JSON', []),
    ("llama3", "{ not JSON", "{ not JSON", []),
    ("mistral", f"[TOOL_CALLS][{F}]", "", [("f", ARGS)]),
    ("mistral", f"[TOOL_CALLS] [{F}, {F}]", "", [("f", ARGS), ("f", ARGS)]),
    ("mistral", f"Well [x] [TOOL_CALLS][{F}]", "Well [x] ", [("f", ARGS)]),
    ("mistral", '[TOOL_CALLS]get_it[ARGS]{"a": "}"}', "", [("get_it", {"a": "}"})]),
    ("mistral", '[TOOL_CALLS]a.b[CALL_ID]123456789[ARGS]{}', "", [("a.b", {})]),
    ("mistral", '[TOOL_CALLS]f{"a": 1}', "", [("f", {"a": 1})]),
    ("lfm2", "<|tool_call_start|>[f(a=1, b='x')]<|tool_call_end|>", "", [("f", {"a": 1, "b": "x"})]),
    ("lfm2", '<|tool_call_start|>[f(a={"b": [true, None, -1.5]}), m.g()]<|tool_call_end|>ok', "ok",
     [("f", {"a": {"b": [True, None, -1.5]}}), ("m.g", {})]),
    ("lfm2", "<|tool_call_start|>f(a='<|tool_call')<|tool_call_end|>", "", [("f", {"a": "<|tool_call"})]),
    ("lfm2", f"<|tool_call_start|>[{F}]<|tool_call_end|>", "", [("f", ARGS)]),
    ("lfm2", 'Said<|tool_call_start|>[f(**{"a b": 1})]<|tool_call_end|>', "Said", [("f", {"a b": 1})]),
    ("lfm2", "<|tool_call_start|>[f(1)]<|tool_call_end|>", "<|tool_call_start|>[f(1)]", []),
    ("lfm2", "<|tool_call_start|>[f(a=1)]", "", [("f", {"a": 1})]),
    ("llama3", '{"name": "f", "parameters": {}} bye', "bye", [("f", {})]),
    ("llama3", '<|python_tag|>{"name": "other"}', "", [("other", {})]),
    ("llama3", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
    ("llama3", ' {"name": "f", "age": 3}', ' {"name": "f", "age": 3}', []),
    ("llama3", '{"name": "Bob", "parameters": {"a": 1}}', '{"name": "Bob", "parameters": {"a": 1}}', []),
    ("llama3", '{"parameters": {"a": 1}, "name": "f"}', "", [("f", {"a": 1})]),
    ("hermes", f"<tool_call>{F}\nand then text", "and then text", [("f", ARGS)]),
    ("hermes", f"<tool_call>{F}\n</tool_ca", "", [("f", ARGS)]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}, oops} </tool_call>\nbye', "bye", [("f", {})]),
    ("mistral", f"[TOOL_CALLS][{F}] bye", "bye", [("f", ARGS)]),
    ("mistral", f"[TOOL_CALLS][{F}] bye {{x}}", "bye {x}", [("f", ARGS)]),
    ("lfm2", f"<|tool_call_start|>[{F}]<|tool_call_", "", [("f", ARGS)]),
]  # fmt: skip


@pytest.mark.parametrize("call", ['f(x={{"a": 1}})', "f(x={[1]})", "f(x=1e999)", "a." * 1500 + "a()"])
def test_python_that_is_no_call_is_text_and_no_error(call):
    text = f"<|tool_call_start|>{call}"
    assert read("lfm2", text + "<|tool_call_end|>", []) == (text, [])


def read(form: str, text: str, cuts: list[int]):
    """What is said, and the calls, of a text that comes in pieces."""
    reader, said, calls = CallReader(BY_NAME[form], {"f", "g"}), "", []
    pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    for one in [*(piece for some in pieces for piece in reader.push(some)), *reader.finish()]:
        said += one.content
        if one.name is not None:
            assert one.index == len(calls)
            calls.append([one.name, ""])
        if one.index is not None:
            calls[one.index][1] += one.arguments
    assert len(calls) == reader.count
    return said, calls


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES)
def test_calls_are_found_and_what_is_none_is_said_however_the_text_is_cut(form, text, content, calls):
    said, found = read(form, text, [])
    assert (said, [(name, json.loads(arguments)) for name, arguments in found]) == (content, calls)
    chance = random.Random(text)
    for cuts in [list(range(1, len(text))), *(sorted(chance.sample(range(len(text)), 3)) for _ in range(20))]:
        assert read(form, text, cuts) == (said, found)


def test_a_name_is_told_before_its_arguments_and_these_as_they_come():
    reader, told = CallReader(HERMES), []
    for character in f"<tool_call>{F}</tool_call>":
        told += reader.push(character)
    assert told[0].name == "f"
    assert len(told) > 10
    assert all(one.arguments and one.name is None for one in told[1:])


def test_arguments_that_are_no_json_are_told_as_they_were_written():
    broken = '<tool_call>{"name": "f", "arguments": {"x": oops}}\n</tool_call> bye'
    assert read("hermes", broken, []) == ("bye", [["f", '{"x": oops}']])


OTHERS = [
    ('{"name": "f", "parameters": {"a": "x"}}', [], "of the wrong type"),
    ('{"name": "f", "parameters": {"a": 1}, "more": 2}', [], "with more than a call has"),
    ('{"name": "other", "parameters": {"a": 1}}', [], "of another name"),
    ('{"colour": "red"}', [], "of another form"),
    ('[{"name": "f"}]', [], "no object"),
    ('{"name": "f", "parameters": {"a": 1}}', [["f", '{"a": 1}']], "a call"),
]


@pytest.mark.parametrize(("text", "found"), [one[:2] for one in OTHERS], ids=[one[2] for one in OTHERS])
def test_an_object_that_may_be_the_answer_is_a_call_only_as_a_whole_one_of_a_tool(text, found):
    pytest.importorskip("llguidance", reason="the extra [guided] is not installed")
    guides = Guides(byte_tokenizer())
    call = guides.compiled(calls(LLAMA3, TOOLS, byte_tokenizer(), False, "tools"))
    for step in (1, 3, len(text)):
        reader = CallReader(LLAMA3, {"f", "now"}, lambda one: guides.allows(call, one))
        pieces = [piece for i in range(0, len(text), step) for piece in reader.push(text[i : i + step])]
        pieces += reader.finish()
        assert "".join(piece.content for piece in pieces) == ("" if found else text)
        assert [piece.name for piece in pieces if piece.name] == [name for name, _ in found]
        assert "".join(piece.arguments for piece in pieces) == "".join(arguments for _, arguments in found)


def test_an_object_that_begins_as_no_call_is_said_at_once():
    reader = CallReader(LLAMA3, {"f"}, lambda one: False)
    assert [piece.content for piece in reader.push('{"c')] == ['{"c']
    assert [piece.content for piece in reader.push('olour": 1')] == ['olour": 1']


def test_a_call_that_is_cut_off_keeps_what_came():
    assert read("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1', []) == ("", [["f", '{"a": 1']])
    assert read("hermes", '<tool_call>{"name": "f', []) == ('<tool_call>{"name": "f', [])


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{% if tools %}<tool_call>{% endif %}", HERMES),
        ("{{ tools }}<|tool_call_start|>[", LFM2),
        ("{{ tools }}[AVAILABLE_TOOLS][TOOL_CALLS]", MISTRAL),
        ("{{ tools }}<|start_header_id|><|python_tag|>", LLAMA3),
        ("{{ tools }}<|start_header_id|> respond with {'name': , 'parameters': }", LLAMA3),
        ("{{ tools }} in some other way", None),
        ("<tool_call> without them", None),
    ],
)
def test_the_form_is_the_one_that_the_template_teaches(template, found):
    assert format_of(template) == found
    assert format_of(template, "mistral") == MISTRAL


def allows(grammar: Structure, tokenizer: Tokenizer, text: str) -> bool:
    """Whether a grammar allows a text, of which the special tokens are spelled, and an end behind it."""
    matcher = Guides(tokenizer).compiled(grammar).matcher.deep_copy()
    names = {token.content: i for i, token in tokenizer.backend.get_added_tokens_decoder().items()}
    parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
    ids = [i for part in parts for i in ([names[part]] if part in names else tokenizer.encode(part))]
    return matcher.consume_tokens(ids) and matcher.is_accepting()


WEATHER = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
TOOLS = [Tool("f", WEATHER, True), Tool("now")]
F1, NOW = ['{"name": "f", "%s": {"a": 1}}', '{"name": "now", "%s": {}}']


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_grammars_allow_calls_of_the_tools_and_nothing_else(form: Format, special: bool) -> None:
    pytest.importorskip("llguidance", reason="the extra [guided] is not installed")
    backend = byte_tokenizer().backend
    if special:
        backend.add_special_tokens([sign for sign in (form.opening.strip(), form.closing.strip()) if sign])
    tokenizer = Tokenizer(backend, 256)
    f, now = (call % form.arguments for call in (F1, NOW))
    begin, end = ("" if form.bare else form.opening) + "[" * form.listed, "]" * form.listed + form.closing
    one, two = begin + f + end, begin + f + form.between + now + end
    held = calls(form, TOOLS, tokenizer, False, "tools")
    many = calls(form, TOOLS, tokenizer, True, "tools")
    assert [allows(held, tokenizer, text) for text in (one, two, "text", "")] == [True, False, False, False]
    assert [allows(many, tokenizer, text) for text in (one, two, begin + end)] == [True, True, False]
    assert not allows(many, tokenizer, one.replace("1", '"1"'))
    for text, count in ((one, 1), (two, 2)):
        reader = CallReader(form)
        assert sum(piece.name is not None for piece in [*reader.push(text), *reader.finish()]) == count
    answer = calls_or(Structure(json={"const": [5]}), form, TOOLS, tokenizer, True)
    assert [allows(answer, tokenizer, text) for text in (one, two, "[5]", "[6]")] == [True, True, True, False]
    spaced, tight = "[5, 6]", "[5,6]"
    for compact, allowed in ((False, [True, True]), (True, [False, True])):
        answer = calls_or(Structure(json={"const": [5, 6]}, compact=compact), form, TOOLS, tokenizer, True)
        assert [allows(answer, tokenizer, text) for text in (spaced, tight)] == allowed
    if form.bare:
        return
    free = freely(form, TOOLS, tokenizer, True)
    texts = ("", "any\ntext", f"text {one}", f"text {one}more", f"text {one.replace('1', 'x')}", two)
    assert [allows(free, tokenizer, text) for text in texts] == [True, True, True, True, False, True]
    assert allows(freely(form, TOOLS, tokenizer, False), tokenizer, two) != form.listed

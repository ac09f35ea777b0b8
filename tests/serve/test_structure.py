"""Answers of a given form: what they are, when they end, and that nobody beside them notices."""

import dataclasses
import json
import re

import pytest

pytest.importorskip("llguidance", reason="the extra [guided] is not installed")
pytest.importorskip("jsonschema", reason="the extra [test] is not installed")

import jsonschema

from atma.loading import load
from atma.serve import guides
from atma.serve.engine import Engine
from atma.serve.request import Request, RequestError
from atma.serve.settings import EngineConfig
from atma.serve.structure import MOST_CHOICES, Structure
from atma.tokenizer import byte_tokenizer, train_bpe
from tests.harness.random_schemas import random_schema
from tests.serve.conftest import SMALL, AuditedEngine, finish, random_model

SCHEMA = {
    "type": "object",
    "properties": {
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "name": {"type": "string", "maxLength": 8},
    },
    "required": ["age", "name"],
    "additionalProperties": False,
}


def answer(engine: Engine, structure: Structure, **asked):
    handle = engine.submit(Request("A text", structure=structure, **({"max_tokens": 150, "seed": 1} | asked)))
    finish(engine, handle)
    return handle.outputs[0]


def held(structure: Structure, text: str) -> bool:
    """Whether a text has the form."""
    if structure.kind == "json":
        jsonschema.validate(json.loads(text), json.loads(structure.json))
        return True
    if structure.kind == "json_object":
        return isinstance(json.loads(text), dict)
    if structure.kind == "choice":
        return text in (structure.choice or ())
    return bool(re.fullmatch(structure.regex or r"[+-]?\d+(,[+-]?\d+)*", text, re.ASCII))


STRUCTURES = {
    "schema": Structure(json=SCHEMA),
    "schema as text": Structure(json=json.dumps(SCHEMA), compact=True),
    "regex": Structure(regex=r"[A-Z]{2}-[0-9]{3,6}(é|ü)"),
    "Lark": Structure(grammar='start: n ("," n){3}\nn: /[+-]?[0-9]{1,3}/'),
    "GBNF": Structure(grammar='root ::= n "," n\nn ::= [+-]? [0-9]'),
    "choice": Structure(choice=("yes", "no", 'für\nalle "€" \u2028', "\\d")),
}


@pytest.mark.parametrize("asked", [{"temperature": 0}, {"temperature": 1.5}, {"top_p": 0.9, "frequency_penalty": 1.0}])
@pytest.mark.parametrize("name", STRUCTURES)
def test_an_answer_has_the_form_that_was_asked_for_and_ends_by_itself(engine, name, asked) -> None:
    output = answer(engine, STRUCTURES[name], **asked)
    assert output.finish_reason == "stop", output
    assert held(STRUCTURES[name], output.text)
    assert output.tokens[-1] == engine.tokenizer.eot


def test_white_space_between_parts_can_be_ruled_out(engine) -> None:
    compact = answer(engine, Structure(json=SCHEMA, compact=True)).text
    assert re.fullmatch(r'\{"age":\d+,"name":".*"\}', compact, re.S)


def test_what_max_tokens_cuts_says_length(engine) -> None:
    output = answer(engine, Structure(json=SCHEMA), max_tokens=5)
    assert (output.finish_reason, len(output.tokens)) == ("length", 5)


@pytest.mark.parametrize("ignore_end", [False, True])
def test_a_form_that_must_end_ends_the_answer_whatever_ends_are_ignored(engine, ignore_end) -> None:
    output = answer(engine, Structure(regex="abc"), ignore_end=ignore_end)
    assert (output.text, output.finish_reason) == ("abc", "stop")


def test_a_form_that_may_go_on_does_so_where_the_end_is_ignored(engine) -> None:
    always = {engine.tokenizer.eot: 90.0}
    assert answer(engine, Structure(regex="a+"), logit_bias=always).text == "a"
    assert answer(engine, Structure(regex="a+"), logit_bias=always, ignore_end=True, max_tokens=9).text == "a" * 9


def test_tokens_that_end_a_turn_end_it_where_the_form_may_end_and_not_before(engine) -> None:
    turn = ord("~")
    output = answer(engine, Structure(regex="a{3,}"), stop_tokens=(turn,), logit_bias={turn: 90.0})
    assert (output.text, output.finish_reason, output.tokens[-1]) == ("aaa", "stop", turn)


@pytest.mark.parametrize("temperature", [0, 1])
def test_before_the_least_length_a_stop_token_that_the_form_needs_is_written(engine, temperature) -> None:
    """All other ends are ruled out: the form goes on while it can."""
    asked = {"temperature": temperature, "min_tokens": 6, "max_tokens": 9}
    needed = answer(engine, Structure(regex="xyz"), stop_tokens=(ord("x"),), **asked)
    assert (needed.finish_reason, needed.tokens) == ("stop", [ord("x")]), needed
    may_end = answer(engine, Structure(regex="a+~?"), stop_tokens=(ord("~"),), logit_bias={ord("~"): 90.0}, **asked)
    assert may_end.tokens == [*b"aaaaaa~"]
    must_end = answer(engine, Structure(regex="abc"), stop_tokens=(ord("~"),), **asked)
    assert (must_end.finish_reason, must_end.text) == ("stop", "abc")


def test_a_choice_may_have_as_many_texts_as_are_promised(engine) -> None:
    texts = tuple(f"text {i}" for i in range(MOST_CHOICES))
    assert answer(engine, Structure(choice=texts)).text in texts
    assert answer(engine, Structure(choice=("", "b")), logit_bias={ord("b"): -90.0}).text == ""
    assert answer(engine, Structure(choice=("ab", "ab", "a")), logit_bias={ord("b"): 90.0}).text == "ab"


def test_log_probabilities_are_those_of_what_the_form_allows(engine) -> None:
    output = answer(engine, Structure(regex="[01]{20}"), temperature=0, logprobs=3)
    for one in output.logprobs[:-1]:
        assert sum(2.718281828**value for _, value in one.best) == pytest.approx(1, abs=1e-5)
        assert {token for token, value in one.best[:2]} == {ord("0"), ord("1")}
    assert output.logprobs[-1].logprob == 0


def test_choices_of_a_request_stand_each_in_their_own_place(engine) -> None:
    handle = engine.submit(Request("p", structure=Structure(json=SCHEMA), max_tokens=150, seed=3, n=3))
    finish(engine, handle)
    assert len({output.text for output in handle.outputs}) == 3
    for output in handle.outputs:
        jsonschema.validate(json.loads(output.text), SCHEMA)


def test_interruptions_change_no_answer() -> None:
    asked = [Request("p" * 20, structure=Structure(json=SCHEMA), max_tokens=100, seed=i) for i in range(9)]
    alone = [finished(AuditedEngine(random_model(), byte_tokenizer(), SMALL), [one])[0].text for one in asked]
    crowded = AuditedEngine(random_model(), byte_tokenizer(), dataclasses.replace(SMALL, quantum=3))
    assert [output.text for output in finished(crowded, asked)] == alone
    assert crowded.counters["preemptions"] > 0


def finished(engine: Engine, requests: list[Request]):
    handles = [engine.submit(request) for request in requests]
    finish(engine, *handles)
    return [handle.outputs[0] for handle in handles]


def test_free_rows_beside_do_not_change_by_a_bit() -> None:
    free = [Request(f"text {i}", max_tokens=40, seed=i, logprobs=2, ignore_end=True) for i in range(3)]
    config = EngineConfig(32 << 20, 4 << 20)
    before = finished(Engine(random_model(), byte_tokenizer(), config), free)
    forms = [Request(f"form {i}", max_tokens=60, seed=i, structure=Structure(json=SCHEMA)) for i in range(5)]
    mixed = Engine(random_model(), byte_tokenizer(), config)
    after = finished(mixed, [forms[0], free[0], *forms[1:4], free[1], free[2], forms[4]])
    same = [(one.tokens, one.logprobs) for one in (after[1], after[5], after[6])]
    assert same == [(one.tokens, one.logprobs) for one in before]
    assert mixed.writing.recorded_bytes > 0 or not mixed.served.exact


def test_the_next_turn_goes_on_from_the_state_that_an_answer_left() -> None:
    engine = Engine(random_model(), byte_tokenizer(), EngineConfig(32 << 20, 8 << 20))
    first = answer(engine, Structure(json=SCHEMA), temperature=0)
    begun = [*engine.tokenizer.beginning, *engine.tokenizer.encode("A text"), *first.tokens[:-1]]
    [second] = finished(engine, [Request([*begun, 10, 11], max_tokens=5, temperature=0, logprobs=1)])
    assert second.usage.cached == len(begun)
    [cold] = finished(
        Engine(random_model(), byte_tokenizer(), EngineConfig(32 << 20, 0)),
        [Request([*begun, 10, 11], max_tokens=5, temperature=0, logprobs=1)],
    )
    assert (second.tokens, second.logprobs) == (cold.tokens, cold.logprobs)


@pytest.mark.parametrize(
    ("structure", "told"),
    [
        ({"json": {"type": "thing"}}, "Invalid type: thing"),
        ({"json": {"$ref": "http://127.0.0.1:9/x"}}, "'http://127.0.0.1:9/x' is elsewhere, and nothing is fetched"),
        ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 2}}, "Unsatisfiable"),
        ({"json": {"type": "object", "properties": {f"p{i}": {} for i in range(3000)}}}, "Too many items"),
        ({"json": {"type": "string", "pattern": "(?=a)"}}, "look-around"),
        ({"regex": "("}, "unclosed group"),
        ({"grammar": "start: missing"}, "unknown name"),
        ({"grammar": "root ::= (("}, "GBNF"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_the_reason(engine, structure, told) -> None:
    with pytest.raises(RequestError, match="'structure' cannot be compiled") as refused:
        engine.submit(Request("x", structure=Structure(**structure)))
    assert (refused.value.code, refused.value.parameter) == ("invalid", "structure")
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_a_lenient_schema_leaves_aside_what_cannot_be_held_to(engine) -> None:
    schema = {"type": "array", "items": {"type": "boolean"}, "maxItems": 2, "uniqueItems": True}
    assert isinstance(json.loads(answer(engine, Structure(json=schema, lenient=True)).text), list)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "exactly one of"),
        ({"json": {}, "regex": "a"}, "not json and regex"),
        ({"json": "{"}, "no JSON schema"),
        ({"json": [1]}, "an object, true or false"),
        ({"json": {"const": "x" * 300_000}}, "of at most 262,144"),
        ({"regex": "a" * 20_000}, "1 to 16,384 characters"),
        ({"regex": 5}, "1 to 16,384 characters"),
        ({"grammar": ""}, "1 to 262,144 characters"),
        ({"choice": []}, "1 to 4,096 texts"),
        ({"choice": ["a", 5]}, "1 to 4,096 texts"),
        ({"choice": ["x" * 300_000]}, "of at most 262,144"),
    ],
)
def test_a_structure_that_is_none_is_refused(given, told) -> None:
    with pytest.raises(ValueError, match="structure") as refused:
        Structure(**given)
    assert told in str(refused.value)


def test_without_the_extra_the_mend_is_told(engine, monkeypatch) -> None:
    monkeypatch.setattr(guides, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"pip install 'atma-lm\[guided\]'"):
        engine.submit(Request("x", structure=Structure(regex="a")))


def test_a_structure_is_compiled_once_and_the_oldest_are_forgotten(engine, monkeypatch) -> None:
    compile_, made = guides._compiled, []
    monkeypatch.setattr(guides, "_compiled", lambda one, reader: made.append(one) or compile_(one, reader))
    monkeypatch.setattr(guides, "REMEMBERED", 2)
    for regex in ("a", "b", "a", "c", "a", "b"):
        assert answer(engine, Structure(regex=regex)).text == regex
    assert [one.regex for one in made] == ["a", "b", "c", "b"]


def test_structures_are_forgotten_by_what_they_take_too(engine, monkeypatch) -> None:
    few = guides.FEW_PARTS * guides.PART_BYTES
    assert few < guides.MOST_PARTS * guides.PART_BYTES < guides.REMEMBERED_BYTES, "the largest is remembered"
    monkeypatch.setattr(guides, "REMEMBERED_BYTES", 2 * few + 5 * guides.TOKEN_BYTES)
    known = engine.guides._known
    for text in "abc":
        answer(engine, Structure(regex=text))
        assert Structure(regex=text) in known
    assert len(known) == 2
    long = Structure(regex="a{20}")
    assert answer(engine, long).text == "a" * 20
    assert answer(engine, long).text == "a" * 20
    assert list(known) == [long], "by the tokens that were written by it"


def test_a_large_structure_may_come_to_as_much_as_it_says_and_no_more(engine) -> None:
    made = engine.guides.compiled(Structure(choice=tuple(map(str, range(4096)))))
    assert made.bytes > guides.MANY_PARTS * guides.PART_BYTES
    for short in ("a{100000}", "(x{1000}){1000}"):
        with pytest.raises(RequestError, match=r"too many expressions constructed: shorten it, or its repetitions"):
            engine.guides.compiled(Structure(regex=short))


def test_a_structure_that_grows_too_wide_ends_its_answer_in_its_own_name(engine, monkeypatch) -> None:
    monkeypatch.setattr(guides, "MOST_ITEMS", 500)
    ambiguous = Structure(grammar='start: s\ns: s s s | s s | "a"', parameter="structured_outputs")
    free = Request("x", max_tokens=60, seed=1)
    alone = engine.submit(free)
    finish(engine, alone)
    handles = [
        engine.submit(one)
        for one in (free, dataclasses.replace(free, max_tokens=200, min_tokens=200, structure=ambiguous))
    ]
    finish(engine, *handles)
    assert handles[0].outputs[0].tokens == alone.outputs[0].tokens
    error = handles[1].outputs[0].error
    assert (error.code, error.parameter) == ("invalid", "structured_outputs")
    assert "'structured_outputs' cannot be written on: " in str(error)


@pytest.mark.parametrize("vocabulary", ["bpe", "nano"])
def test_tokens_of_several_bytes_keep_to_the_form(vocabulary) -> None:
    texts = ['{"age": 1, "name": "né"}, €', "some text to learn pairs from, twice: some text"] * 40
    if vocabulary == "nano":
        loaded = load("nano")
        model, tokenizer = loaded.model, loaded.tokenizer
    else:
        tokenizer = train_bpe(texts, 290)
        model = random_model(vocabulary=290)
    engine = Engine(model, tokenizer, EngineConfig(64 << 20, 0))
    for seed in range(8):
        output = answer(engine, Structure(json=SCHEMA), seed=seed)
        assert output.finish_reason == "stop"
        jsonschema.validate(json.loads(output.text), SCHEMA)
    for text in STRUCTURES["choice"].choice or ():
        assert answer(engine, Structure(choice=(text,))).text == text


def check_random_schemas(count: int, seed: int) -> int:
    """How many of so many answers ended; each is valid, and the free rows beside are those of a run alone."""
    config = EngineConfig(64 << 20, 8 << 20, max_rows=16, max_waiting=64)
    free = [Request(f"free {i}", max_tokens=300, seed=i, logprobs=1, ignore_end=True) for i in range(4)]
    expected = [(one.tokens, one.logprobs) for one in finished(Engine(random_model(), byte_tokenizer(), config), free)]
    engine, ended = Engine(random_model(), byte_tokenizer(), config), 0
    for first in range(0, count, 40):
        schemas = [random_schema(seed + i) for i in range(first, min(count, first + 40))]
        asked = [Request("x", max_tokens=600, seed=i, structure=Structure(json=s)) for i, s in enumerate(schemas)]
        outputs = finished(engine, [*asked[:20], *free, *asked[20:]])
        at = min(20, len(asked))
        assert [(one.tokens, one.logprobs) for one in outputs[at : at + 4]] == expected
        for schema, output in zip(schemas, outputs[:at] + outputs[at + 4 :], strict=True):
            assert output.finish_reason in ("stop", "length"), (schema, output)
            if output.finish_reason == "stop":
                jsonschema.validate(json.loads(output.text), schema)
                ended += 1
    return ended


def test_answers_to_random_schemas_are_valid() -> None:
    assert check_random_schemas(40, seed=0) >= 36


@pytest.mark.slow
def test_answers_to_2000_random_schemas_are_valid() -> None:
    ended = check_random_schemas(2000, seed=1000)
    print(f"{ended} of 2,000 ended within 600 tokens")
    assert ended >= 1800

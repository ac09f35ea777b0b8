"""Requests through the engine: what they get, when they end, and what they leave behind."""

import dataclasses

import pytest
import torch

from atma.config import ModelConfig
from atma.model import Model
from atma.serve import sampler
from atma.serve.engine import Engine
from atma.serve.request import Request, RequestError
from atma.serve.settings import EngineConfig
from atma.tokenizer import byte_tokenizer
from tests.serve.conftest import SMALL, AuditedEngine, audit, finish, random_model


def _answer(engine: Engine, request: Request):
    handle = engine.submit(request)
    finish(engine, handle)
    return handle.outputs[0]


def _nothing_is_held(engine: Engine) -> bool:
    engine.store.cache.clear()
    return not any(engine.store.pool.references) and engine.store.pool.free == engine.store.pool.count


def test_an_answer_has_as_many_tokens_as_asked_for_and_says_so(engine) -> None:
    output = _answer(engine, Request("some text", max_tokens=7, temperature=0, ignore_end=True))
    assert (len(output.tokens), output.finish_reason) == (7, "length")
    assert output.usage == (10, 0, 7)


def test_the_text_is_that_of_the_tokens(engine) -> None:
    output = _answer(engine, Request("some text", max_tokens=30, seed=1, ignore_end=True))
    data = b"".join(engine.tokenizer.token_bytes(token) for token in output.tokens)
    assert data.decode("utf-8", "replace").startswith(output.text)


def test_the_end_of_text_token_ends_an_answer_unless_it_is_ignored(engine) -> None:
    always = {engine.tokenizer.eot: 1000.0}
    assert _answer(engine, Request("a", max_tokens=5, logit_bias=always)).finish_reason == "stop"
    assert _answer(engine, Request("a", max_tokens=5, logit_bias=always, ignore_end=True)).finish_reason == "length"


def _spell(engine: Engine, text: str, request: Request):
    """The answer of an engine whose model is made to write this text's bytes."""
    data, commit = text.encode(), engine._commit

    def spelled(sequences, logits):
        return commit(sequences, torch.nn.functional.one_hot(torch.tensor([data[sequences[0].written]]), 257) * 50.0)

    engine._commit = spelled
    return _answer(engine, request)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one END two", ("END",), "one "),
        ("nähe… und weg", ("… und",), "nähe"),
        ("a 🙂 b 🙂🙂", ("🙂🙂",), "a 🙂 b "),
        ("EN EN END", ("END", "never"), "EN EN "),
        ("first or second", ("second", "or"), "first "),
    ],
)
def test_a_stop_text_ends_an_answer_wherever_tokens_and_characters_are_cut(engine, text, stop, expected) -> None:
    output = _spell(engine, text, Request("p", max_tokens=100, temperature=0, stop=stop))
    assert (output.text, output.finish_reason) == (expected, "stop")


def test_no_event_holds_part_of_a_stop_text_or_of_a_character(engine) -> None:
    step, seen = engine.step, []
    engine.step = lambda: seen.extend(step())
    _spell(engine, "ab € ENE END", Request("p", max_tokens=100, temperature=0, stop=("END",)))
    assert [event.text for event in seen][:6] == ["a", "b", " ", "", "", "€"]
    assert "".join(event.text for event in seen) == "ab € ENE "


def test_equal_seeds_give_equal_answers_in_any_company(model) -> None:
    tokenizer = byte_tokenizer()
    asked = [
        Request("the", max_tokens=20, seed=5, temperature=1.3),
        Request("the", max_tokens=20, seed=6, top_k=20, top_p=0.9, min_p=0.01),
        Request("the", max_tokens=20, seed=7, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2),
        Request("the", max_tokens=20, temperature=0, logit_bias={65: 2.0, 66: -torch.inf}),
    ]
    alone = [_answer(AuditedEngine(model, tokenizer, SMALL), request).tokens for request in asked]
    together = AuditedEngine(model, tokenizer, SMALL)
    handles = [together.submit(request) for request in [*asked, *reversed(asked)]]
    finish(together, *handles)
    assert [handle.outputs[0].tokens for handle in handles] == alone + alone[::-1]
    assert len({tuple(tokens) for tokens in alone}) == 4


def test_a_penalty_keeps_tokens_from_coming_again(engine) -> None:
    output = _answer(engine, Request("x", max_tokens=60, temperature=0, presence_penalty=1000.0, ignore_end=True))
    assert len(set(output.tokens)) == 60
    output = _answer(engine, Request("x", max_tokens=60, temperature=0, frequency_penalty=1000.0, ignore_end=True))
    assert len(set(output.tokens)) == 60


def test_a_bias_forbids_and_forces_tokens(engine) -> None:
    assert set(_answer(engine, Request("x", max_tokens=9, seed=1, logit_bias={65: 1000.0})).tokens) == {65}
    forbidden = {i: -torch.inf for i in range(257) if i != 70}
    assert set(_answer(engine, Request("x", max_tokens=9, seed=1, logit_bias=forbidden)).tokens) == {70}


def test_top_k_of_one_is_greedy(engine) -> None:
    greedy = _answer(engine, Request("x", max_tokens=20, temperature=0)).tokens
    assert _answer(engine, Request("x", max_tokens=20, top_k=1, seed=3)).tokens == greedy
    assert _answer(engine, Request("x", max_tokens=20, top_p=1e-9, seed=3)).tokens == greedy
    assert _answer(engine, Request("x", max_tokens=20, min_p=1.0, seed=3)).tokens == greedy


def test_choices_differ_share_one_reading_and_are_each_that_of_their_seed(engine) -> None:
    handle = engine.submit(Request("a prompt of some length", max_tokens=12, seed=40, n=5))
    finish(engine, handle)
    assert engine.reader.read == 24
    assert [output.usage.cached for output in handle.outputs] == [0, 24, 24, 24, 24]
    assert len({tuple(output.tokens) for output in handle.outputs}) == 5
    for i, output in enumerate(handle.outputs):
        assert _answer(engine, Request("a prompt of some length", max_tokens=12, seed=40 + i)).tokens == output.tokens


def test_log_probabilities_are_the_model_s_own_whatever_the_choice(engine) -> None:
    plain = _answer(engine, Request("abc", max_tokens=6, temperature=0, logprobs=4))
    assert [one.best[0] for one in plain.logprobs] == [(one.token, one.logprob) for one in plain.logprobs]
    assert all(len(one.best) == 4 and sum(2.718**p for _, p in one.best) < 1 for one in plain.logprobs)
    forced = _answer(engine, Request("abc", max_tokens=1, temperature=0, logprobs=4, logit_bias={1: 99.0}))
    assert forced.logprobs[0].best == plain.logprobs[0].best
    assert forced.logprobs[0].token == 1


def test_an_echo_begins_with_the_prompt_and_its_log_probabilities(engine) -> None:
    for _ in range(2):
        output = _answer(engine, Request("abc", max_tokens=2, temperature=0, logprobs=1, echo=True))
        assert output.text.startswith("abc")
        assert output.tokens[:4] == [engine.tokenizer.eot, *b"abc"]
        assert output.logprobs[0].logprob is None
        assert [one.token for one in output.logprobs] == output.tokens
    scored = _answer(engine, Request("abc", max_tokens=0, logprobs=1, echo=True))
    assert scored.logprobs == output.logprobs[:4]
    assert (scored.text, scored.finish_reason) == ("abc", "length")


def test_a_next_turn_reads_only_what_is_new(engine) -> None:
    first = _answer(engine, Request([256, *b"a first question"], max_tokens=9, temperature=0, ignore_end=True))
    text = [256, *b"a first question", *first.tokens]
    read = engine.reader.read
    second = _answer(engine, Request([*text, *b" and then"], max_tokens=9, temperature=0))
    assert second.usage.cached == len(text) - 1
    assert engine.reader.read - read == 1 + len(b" and then")
    _answer(engine, Request([*text, *b" and then"], max_tokens=9, temperature=0))
    assert engine.reader.read - read == 1 + len(b" and then")


def test_a_long_common_beginning_is_read_once(engine) -> None:
    common = [i % 251 for i in range(70)]
    _answer(engine, Request([*common, 1, 2, 3], max_tokens=1))
    assert _answer(engine, Request([*common, 7, 8, 9], max_tokens=1)).usage.cached == 64


def test_a_common_beginning_of_requests_that_come_together_is_read_once(engine) -> None:
    common = [i % 251 for i in range(100)]
    handles = [engine.submit(Request([*common, i, i], max_tokens=3, temperature=0)) for i in range(4)]
    finish(engine, *handles)
    assert engine.reader.read == 102 + 3 * 6
    assert [handle.outputs[0].usage.cached for handle in handles] == [0, 96, 96, 96]


def test_one_that_waits_for_a_beginning_goes_on_when_its_reader_ends(engine) -> None:
    common = [i % 251 for i in range(160)]
    first, second = (engine.submit(Request(common, max_tokens=3, temperature=0, id=name)) for name in "ab")
    engine.step()
    assert len(engine.scheduler.running) == 1
    engine.abort("a")
    finish(engine, second)
    assert first.outputs[0].finish_reason == "abort"
    assert second.outputs[0].usage.cached == 32


def test_states_are_shared_only_where_the_salt_is_equal_and_the_cache_allowed(engine) -> None:
    def cached(**changes) -> int:
        request = dataclasses.replace(Request("a text", max_tokens=2, temperature=0), **changes)
        return _answer(engine, request).usage.cached

    assert cached(cache=False) == 0
    assert cached() == 0
    assert cached() == 7
    assert cached(salt="other") == 0
    assert cached(salt="other") == 7
    assert cached(cache=False) == 0


def test_an_aborted_request_frees_everything_at_once_and_says_so(engine) -> None:
    reading = engine.submit(Request([1] * 200, max_tokens=5, id="reading"))
    writing = engine.submit(Request("b", max_tokens=100, id="writing", ignore_end=True))
    for _ in range(3):
        engine.step()
    waiting = engine.submit(Request("c", max_tokens=5, id="waiting"))
    for name in ("reading", "writing", "waiting", "unknown"):
        engine.abort(name)
    engine.step()
    assert [h.outputs[0].finish_reason for h in (reading, writing, waiting)] == ["abort"] * 3
    assert writing.outputs[0].usage.completion >= 1
    assert not engine.busy
    assert _nothing_is_held(engine)


def test_a_request_of_not_finite_logits_ends_alone(engine) -> None:
    expected = _answer(engine, Request("fine", max_tokens=12, temperature=0)).tokens
    healthy, commit = engine.submit(Request("fine", max_tokens=12, temperature=0)), engine._commit
    sick = engine.submit(Request("sick", max_tokens=12, temperature=0, id="sick"))

    def spoiled(sequences, logits):
        logits = logits.clone()
        for i, sequence in enumerate(sequences):
            if sequence.id == "sick" and sequence.written == 3:
                logits[i] = torch.nan
        commit(sequences, logits)

    engine._commit = spoiled
    finish(engine, healthy, sick)
    assert healthy.outputs[0].tokens == expected
    assert sick.outputs[0].finish_reason == "error"
    assert sick.outputs[0].error.code == "failed"
    assert len(sick.outputs[0].tokens) == 3
    assert _nothing_is_held(engine)


def test_a_token_without_text_ends_its_request_alone(engine, monkeypatch) -> None:
    spell = engine.tokenizer.token_bytes
    known = engine.submit(Request("x", max_tokens=3, logit_bias={65: 1000.0}))
    unknown = engine.submit(Request("x", max_tokens=3, logit_bias={66: 1000.0}))

    def partly(token: int) -> bytes:
        if token == 66:
            raise ValueError("token id 66 is outside the vocabulary")
        return spell(token)

    monkeypatch.setattr(engine.tokenizer, "token_bytes", partly)
    finish(engine, known, unknown)
    assert known.outputs[0].text == "AAA"
    assert str(unknown.outputs[0].error) == "token id 66 is outside the vocabulary"


def test_a_request_that_fails_while_it_is_read_ends_alone(engine) -> None:
    together = engine.reader._together

    def failing(sequences, count):
        if any(sequence.id == "bad" for sequence in sequences):
            raise RuntimeError("no luck")
        together(sequences, count)

    engine.reader._together = failing
    good, bad = engine.submit(Request("good", max_tokens=3, ignore_end=True)), engine.submit(Request("bad", id="bad"))
    finish(engine, good, bad)
    assert good.outputs[0].finish_reason == "length"
    assert str(bad.outputs[0].error) == "reading failed: no luck"
    assert _nothing_is_held(engine)


def test_a_preempted_text_goes_on_as_if_nothing_had_been(model) -> None:
    request = Request("a text to be interrupted", max_tokens=40, seed=3, logprobs=0, ignore_end=True)
    expected = _answer(AuditedEngine(model, byte_tokenizer(), SMALL), request)
    for keeps_state in (True, False):
        engine = AuditedEngine(model, byte_tokenizer(), SMALL)
        handle = engine.submit(request)
        while not handle.done:
            engine.step()
            if engine.counters["steps"] % 5 == 0 and not handle.done:
                engine._preempt(engine.scheduler.running[0])
                if not keeps_state:
                    engine.store.cache.clear()
        assert handle.outputs[0].tokens == expected.tokens
        assert handle.outputs[0].logprobs == expected.logprobs


def test_texts_that_outgrow_memory_take_turns_and_all_finish_as_if_alone(model) -> None:
    config = dataclasses.replace(SMALL, memory_bytes=314 << 10, cache_bytes=40 << 10, snapshot_tokens=0)
    requests = [Request(f"text {i} " * 4, max_tokens=150, seed=i, ignore_end=True) for i in range(6)]
    engine = AuditedEngine(model, byte_tokenizer(), config)
    assert engine.store.budget.pages < 6 * engine.store.pool.pages_for(180)
    handles = [engine.submit(request) for request in requests]
    finish(engine, *handles)
    assert engine.counters["preemptions"] > 0
    for request, handle in zip(requests, handles, strict=True):
        assert handle.outputs[0].tokens == _answer(AuditedEngine(model, byte_tokenizer(), SMALL), request).tokens


def test_more_texts_than_rows_take_turns(model) -> None:
    engine = AuditedEngine(model, byte_tokenizer(), dataclasses.replace(SMALL, max_rows=2, quantum=5, cache_bytes=0))
    handles = [engine.submit(Request(f"{i}", max_tokens=60, seed=i, ignore_end=True)) for i in range(6)]
    for _ in range(40):
        engine.step()
    assert all(len(handle.outputs[0].tokens) > 0 for handle in handles)
    finish(engine, *handles)


def test_a_long_prompt_does_not_hold_up_what_is_being_written(model) -> None:
    engine = AuditedEngine(model, byte_tokenizer(), dataclasses.replace(SMALL, memory_bytes=4 << 20))
    writing = engine.submit(Request("w", max_tokens=200, ignore_end=True, seed=1))
    engine.step()
    long = engine.submit(Request([2] * 1000, max_tokens=1))
    while not long.done:
        before = len(writing.outputs[0].tokens)
        engine.step()
        assert len(writing.outputs[0].tokens) == before + 1


def test_a_full_queue_and_what_can_never_fit_are_refused_with_the_number(engine) -> None:
    with pytest.raises(RequestError, match="that there is memory for") as caught:
        engine.submit(Request("x", max_tokens=10**9))
    assert caught.value.code == "too_long"
    longest = engine.stats()["longest_text"]
    engine.submit(Request([1], max_tokens=longest))
    with pytest.raises(RequestError, match=f"{longest:,}"):
        engine.submit(Request([1, 1], max_tokens=longest))
    for _ in range(engine.config.max_waiting - 1):
        engine.submit(Request("x"))
    with pytest.raises(RequestError) as caught:
        engine.submit(Request("x"))
    assert caught.value.code == "queue_full"
    audit(engine)


def test_a_text_as_long_as_memory_is_written_to_its_end(model) -> None:
    config = dataclasses.replace(SMALL, memory_bytes=291 << 10, cache_bytes=30 << 10, snapshot_tokens=16)
    engine = AuditedEngine(model, byte_tokenizer(), config)
    longest = engine.stats()["longest_text"]
    beside = engine.submit(Request("beside", max_tokens=30, ignore_end=True))
    output = _answer(engine, Request([1], max_tokens=longest, temperature=0, ignore_end=True))
    finish(engine, beside)
    assert len(output.tokens) == longest
    assert output.finish_reason == "length"


@pytest.mark.parametrize(
    ("changes", "parameter"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"min_p": 2.0}, "min_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": float("nan")}, "presence_penalty"),
        ({"n": 0}, "n"),
        ({"stop": ("",)}, "stop"),
        ({"stop": "END"}, "stop"),
        ({"logprobs": 1000}, "logprobs"),
        ({"logit_bias": {9999: 1.0}}, "logit_bias"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_request_that_cannot_be_served_names_what_is_wrong(engine, changes, parameter) -> None:
    with pytest.raises(RequestError, match=parameter) as caught:
        engine.submit(dataclasses.replace(Request("x"), **changes))
    assert (caught.value.code, caught.value.parameter) == ("invalid", parameter)
    assert not engine.busy


def test_two_requests_of_one_id_are_not_under_way_together(engine) -> None:
    first = engine.submit(Request("x", max_tokens=1, id="a"))
    with pytest.raises(RequestError, match="a request 'a' is under way"):
        engine.submit(Request("x", id="a"))
    finish(engine, first)
    engine.submit(Request("x", max_tokens=1, id="a"))


def test_a_closed_engine_has_ended_everything_and_takes_no_more(engine) -> None:
    handle = engine.submit(Request("x", ignore_end=True))
    engine.step()
    engine.close()
    assert handle.outputs[0].finish_reason == "abort"
    with pytest.raises(RequestError) as caught:
        engine.submit(Request("x", ignore_end=True))
    assert caught.value.code == "closed"
    assert _nothing_is_held(engine)


def test_a_budget_without_room_for_a_page_is_an_error_with_the_numbers(model) -> None:
    with pytest.raises(ValueError, match="leaves no page"):
        Engine(model, byte_tokenizer(), EngineConfig(memory_bytes=1 << 16, cache_bytes=0))
    with pytest.raises(ValueError, match="page_tokens"):
        EngineConfig(page_tokens=17)


def test_the_pools_take_the_bytes_that_were_counted(model) -> None:
    engine = AuditedEngine(model, byte_tokenizer(), SMALL)
    budget, pool = engine.store.budget, engine.store.pool
    assert sum(x.numel() * x.element_size() for x in pool.pools) == budget.pages * budget.page_bytes
    assert budget.set_aside >= 2 * budget.rows * budget.row_bytes + budget.recording.room
    whole = budget.pages * budget.page_bytes + budget.snapshots * budget.row_bytes + budget.set_aside
    assert SMALL.memory_bytes - budget.page_bytes < whole <= SMALL.memory_bytes


@pytest.mark.parametrize("core", ["nope", "rope"])
def test_the_controls_are_served_too(core: str) -> None:
    engine = AuditedEngine(random_model(core), byte_tokenizer(), SMALL)
    assert len(_answer(engine, Request("x", max_tokens=30, seed=1, ignore_end=True)).tokens) == 30


@pytest.mark.parametrize(
    ("text", "stop", "told"),
    [("one END two", "END", "one "), ("so it goes\n\nUser: no", "\nUser:", "so it goes\n"), ("EENEND", "END", "EEN")],
)
def test_a_turn_after_a_stop_text_goes_on_from_before_it(engine, text, stop, told) -> None:
    """The next prompt has what was told, and then other than the stop text."""
    commit = engine._commit
    output = _spell(engine, text, Request("p", max_tokens=100, temperature=0, stop=(stop,)))
    assert output.text == told
    engine._commit = commit
    turn = _answer(engine, Request(f"p{told}|then", max_tokens=1))
    assert turn.usage.cached == len([256, *f"p{told}".encode()])


def test_text_held_back_in_vain_leaves_no_state(engine) -> None:
    _spell(engine, "EN EN, then", Request("p", max_tokens=11, temperature=0, stop=("END",)))
    assert set(engine.store.cache._positions) == {2, 12}
    aborted = engine.submit(Request("q" * 9, max_tokens=50, temperature=0, stop=("END",), ignore_end=True))
    engine.step()
    [sequence] = engine.scheduler.running
    engine.store.mark(sequence, engine.writing.standing(sequence))
    engine.abort(aborted.id)
    assert sequence.mark is None
    assert _nothing_is_held(engine)


def test_a_paused_request_goes_on_as_if_nothing_had_been(engine, model) -> None:
    """It keeps nobody busy, gives up its row and its pages, and begins again where it stood."""
    asked = Request("to be paused", max_tokens=30, seed=3, n=2, ignore_end=True)
    alone = AuditedEngine(model, byte_tokenizer(), SMALL)
    expected = alone.submit(asked)
    finish(alone, expected)
    handle = engine.submit(asked)
    for _ in range(6):
        engine.step()
    engine.pause(handle.id)
    assert not engine.busy
    assert (len(engine.scheduler.running), len(engine.scheduler.waiting)) == (0, 2)
    other = engine.submit(Request("to be paused", max_tokens=4))
    finish(engine, other)
    assert not handle.done
    engine.resume(handle.id)
    finish(engine, handle)
    assert [output.tokens for output in handle.outputs] == [output.tokens for output in expected.outputs]
    assert _nothing_is_held(engine)


def test_a_request_whose_token_cannot_be_chosen_ends_alone(engine, monkeypatch) -> None:
    choose = sampler.choose

    def broken(logits, sequences, end):
        if any(sequence.request.seed == 666 for sequence in sequences):
            raise RuntimeError("no draw")
        return choose(logits, sequences, end)

    monkeypatch.setattr(sampler, "choose", broken)
    bad, good = engine.submit(Request("bad", seed=666)), engine.submit(Request("good", max_tokens=5, ignore_end=True))
    finish(engine, bad, good)
    assert "no draw" in str(bad.outputs[0].error)
    assert len(good.outputs[0].tokens) == 5
    assert _nothing_is_held(engine)


def test_any_text_may_be_a_salt(engine) -> None:
    assert _answer(engine, Request("a", max_tokens=1, salt="\ud800")).finish_reason in ("length", "stop")


def test_a_model_without_pages_keeps_as_many_states_as_its_budget_has_room_for() -> None:
    config = ModelConfig(257, width=16, depth=2, pattern=("gated_conv",))
    small = EngineConfig(memory_bytes=64 << 20)
    engine = Engine(Model(config, torch.Generator().manual_seed(0)), byte_tokenizer(), small)
    assert engine.store.budget.cache_bytes < small.memory_bytes < small.cache_bytes
    assert len(_answer(engine, Request("some text", max_tokens=3, ignore_end=True)).tokens) == 3

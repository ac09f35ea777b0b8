"""Answers written by drafts are to the bit those without: tokens, log-probabilities, and the states that stay."""

import dataclasses
import random
from pathlib import Path

import pytest
import torch

from atma.loading import load
from atma.ops import native
from atma.serve.engine import Engine
from atma.serve.passes import ROWS
from atma.serve.request import Event, Request
from atma.serve.settings import EngineConfig
from atma.serve.structure import Structure
from atma.tokenizer import byte_tokenizer
from tests.harness.conversations import Cold
from tests.harness.drafts import Drafts
from tests.harness.traces import Found, Traces
from tests.serve.conftest import SMALL, AuditedEngine, finish, random_model

KIB = 1 << 10
CORPUS = torch.randint(0, 257, (2000,), generator=torch.Generator().manual_seed(9)).tolist()
DRAFTING = dataclasses.replace(SMALL, memory_bytes=4100 * KIB, speculation=31)
AMPLE = dataclasses.replace(DRAFTING, memory_bytes=16 << 20, cache_bytes=8 << 20)
KINDS = [("polar", True, 40), ("nope", True, None), ("rope", True, 24), ("rope+canon", True, 24)]
exact = pytest.mark.skipif(not native.available(torch.float32), reason="exact only by the compiled kernels")


def _plain(model) -> Engine:
    return Engine(model, byte_tokenizer(), EngineConfig(64 << 20, 32 << 20, max_rows=1, page_tokens=16))


def _drafting(model, monkeypatch, seed: int = 0, config: EngineConfig = AMPLE) -> tuple[Engine, Drafts]:
    """An engine whose drafts are right to the end, in part, or not at all."""
    drafts = Drafts(_plain(model), seed)
    monkeypatch.setattr("atma.serve.speculation.Lookup", drafts)
    return AuditedEngine(model, byte_tokenizer(), config), drafts


def _traces(model, folder, count: int, monkeypatch) -> tuple[Found, Drafts]:
    config = dataclasses.replace(DRAFTING, cache_folder=folder, cache_folder_bytes=200_000, quantum=8)
    drafts = Drafts(_plain(model), 1)
    monkeypatch.setattr("atma.serve.speculation.Lookup", drafts)
    cold = Cold(model, 257, config.page_tokens)
    traces = Traces(lambda: AuditedEngine(model, byte_tokenizer(), config), 5, CORPUS, cold.differences, together=4)
    return traces.run(count, longest=120), drafts


@exact
@pytest.mark.parametrize(("core", "memory", "window"), KINDS)
def test_conversations_written_by_drafts_are_to_the_bit_cold_reads(core, memory, window, tmp_path, monkeypatch) -> None:
    found, drafts = _traces(random_model(core, memory, window), tmp_path, 4, monkeypatch)
    assert (found.traces, found.wrong_traces, found.wrong_tokens, found.wrong_logprobs) == (4, 0, 0, 0)
    assert found.answers >= 12
    assert found.exceeded == []
    assert {right == drafted for drafted, right in drafts.told} == {True, False}
    assert any(0 < right < drafted for drafted, right in drafts.told)


@exact
@pytest.mark.slow
@pytest.mark.parametrize(("core", "memory", "window"), KINDS)
def test_a_thousand_answers_written_by_drafts_are_to_the_bit_cold_reads(
    core, memory, window, tmp_path, monkeypatch
) -> None:
    found, drafts = _traces(random_model(core, memory, window), tmp_path, 260, monkeypatch)
    assert (found.wrong_traces, found.wrong_tokens, found.wrong_logprobs) == (0, 0, 0)
    assert found.answers >= 1000
    assert found.exceeded == []
    assert len(drafts.told) > 1000
    assert found.events["interruptions in all"] > 100


REQUESTS = {
    "greedy": Request("p", 60, temperature=0, logprobs=3, ignore_end=True),
    "drawn": Request("p", 60, temperature=0.7, top_k=3, seed=1, logprobs=0, ignore_end=True),
    "penalties": Request(
        "p", 60, temperature=0, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.5, ignore_end=True
    ),
    "at least": Request("p", 60, temperature=0, min_tokens=20, stop_tokens=tuple(range(64))),
    "a stop token": Request("p", 60, temperature=0, stop_tokens=tuple(range(0, 256, 9)), logprobs=0),
    "choices": Request("p", 40, temperature=0.5, n=3, seed=4, echo=True, logprobs=0, ignore_end=True),
    "not shared": Request("p", 60, temperature=0, cache=False, stop=("\x01",), ignore_end=True),
    "one token": Request("p", 1, temperature=0),
}


def _events(engine: Engine, request: Request) -> list[Event]:
    handle, events = engine.submit(dataclasses.replace(request, id="x")), []
    while not handle.done:
        events += engine.step()
    return events


def _texts(events: list[Event]) -> list[list[Event]]:
    """By choice, since several are not written in turn."""
    return [[event for event in events if event.index == i] for i in range(max(e.index for e in events) + 1)]


def _states(engine: Engine) -> dict[str, list[bytes]]:
    """Kept states by what they have read: all that they hold but the keys, which lie in pages."""
    kept = {key: one.standing for key, one in engine.store.cache._kept.items()}
    return {key: [x.numpy().tobytes() for x in (*one.carried, one.hidden)] for key, one in kept.items()}


@exact
@pytest.mark.parametrize("name", REQUESTS)
def test_events_and_kept_states_are_those_without_drafts(model, monkeypatch, name: str) -> None:
    plain = AuditedEngine(model, byte_tokenizer(), dataclasses.replace(AMPLE, speculation=0))
    engine, drafts = _drafting(model, monkeypatch)
    prompts = [CORPUS[at : at + 25] for at in range(0, 250, 50)]
    for prompt in prompts:
        request = dataclasses.replace(REQUESTS[name], prompt=prompt)
        assert _texts(_events(engine, request)) == _texts(_events(plain, request))
    assert _states(engine) == _states(plain)
    if name != "one token":
        assert any(right for _, right in drafts.told)
        assert engine.counters["steps"] < plain.counters["steps"]
        names = ("drafts", "draft_tokens", "accepted_tokens")
        assert [engine.stats()[name] for name in names] == [len(drafts.told), *map(sum, zip(*drafts.told, strict=True))]
    assert engine.stats()["written"] == plain.stats()["written"]


@exact
@pytest.mark.parametrize("size", [1, 2, 4])
def test_stop_texts_end_answers_and_leave_states_as_without_drafts(model, monkeypatch, size: int) -> None:
    plain = AuditedEngine(model, byte_tokenizer(), dataclasses.replace(AMPLE, speculation=0))
    engine, _ = _drafting(model, monkeypatch, seed=size)
    unstopped, stopped = _plain(model), 0
    for at in range(0, 400, 40):
        free = Request(CORPUS[at : at + 25], 60, temperature=0, ignore_end=True)
        [events] = _texts(_events(unstopped, free))
        text = "".join(event.text for event in events)
        begin = random.Random(at).randrange(len(text) - size)
        stops = text[begin : begin + size], text[begin // 2 : begin // 2 + size] + "never"
        request = dataclasses.replace(free, stop=stops)
        expected = _events(plain, request)
        assert _events(engine, request) == expected
        stopped += expected[-1].finish_reason == "stop"
        again = dataclasses.replace(free, prompt=[*free.prompt, *(t for e in expected for t in e.tokens)])
        assert _events(engine, again) == _events(plain, again)
    assert stopped > 5
    assert _states(engine) == _states(plain)


@exact
def test_texts_with_drafts_and_without_are_written_beside_each_other(model, monkeypatch) -> None:
    asked = [Request(CORPUS[20 * i : 20 * i + 9], 20 + 9 * i, temperature=i % 2, seed=i, logprobs=0) for i in range(9)]
    asked = [dataclasses.replace(request, ignore_end=True) for request in asked]
    alone = AuditedEngine(model, byte_tokenizer(), dataclasses.replace(AMPLE, speculation=0))
    wanted = [alone.submit(request) for request in asked]
    finish(alone, *wanted)
    for rows, together in ((ROWS, 0), (ROWS, 1 << 40), (6, 0)):
        monkeypatch.setattr("atma.serve.speculation.TOGETHER", together)
        engine, drafts = _drafting(model, monkeypatch, rows, dataclasses.replace(AMPLE, max_rows=rows))
        handles = [engine.submit(request) for request in asked]
        crowded = 0
        while not all(handle.done for handle in handles):
            before = len(drafts.told)
            engine.step()
            crowded += len(engine.writing.sequences) > ROWS
            assert len(engine.writing.sequences) <= ROWS or len(drafts.told) == before or crowded == 1
        assert [handle.outputs[0].logprobs for handle in handles] == [handle.outputs[0].logprobs for handle in wanted]
        assert [handle.outputs[0].usage for handle in handles] == [handle.outputs[0].usage for handle in wanted]
        assert drafts.told
        assert (crowded > 0) == (rows > ROWS)


@exact
def test_an_answer_of_a_form_is_that_without_drafts(model, monkeypatch) -> None:
    pytest.importorskip("llguidance")
    form = Structure(regex="(ab|ba){1,30}(c|d)[0-9]{10}")
    request = Request("p", 80, temperature=1.0, seed=3, structure=form, logprobs=2)
    plain = AuditedEngine(model, byte_tokenizer(), dataclasses.replace(AMPLE, speculation=0))
    expected = _events(plain, request)
    tokens = [token for event in expected for token in event.tokens]
    engine, drafts = _drafting(model, monkeypatch)
    monkeypatch.setattr(drafts, "ahead", lambda read, count: (tokens + [0] * 99)[len(read) - 1 :][:count])
    monkeypatch.setattr(drafts, "right", 0.7)
    assert _events(engine, dataclasses.replace(request, prompt=[256])) == _events(
        plain, dataclasses.replace(request, prompt=[256])
    )


def test_a_draft_takes_no_page_that_is_not_free(model, monkeypatch) -> None:
    config = dataclasses.replace(AMPLE, memory_bytes=16 << 20)
    engine, drafts = _drafting(model, monkeypatch, config=config)
    monkeypatch.setattr(drafts, "right", 1.0)
    handle = engine.submit(Request(CORPUS[:60], 60, temperature=0, ignore_end=True))
    engine.step()
    engine.step()
    pool, told = engine.store.pool, len(drafts.told)
    taken = pool.take(pool.free)
    before = engine.store.cache.evictions
    monkeypatch.setattr(AuditedEngine, "step", Engine.step)
    for _ in range(4):
        engine.step()
    assert all(drafted <= 15 for drafted, _ in drafts.told[told:])  # what the text's own page has room for
    assert engine.store.cache.evictions == before
    assert engine.counters["preemptions"] == 0
    pool.release(taken)
    finish(engine, handle)
    assert handle.outputs[0].finish_reason == "length"


def test_a_pass_that_fails_ends_its_texts_alone(model, monkeypatch) -> None:
    engine, _ = _drafting(model, monkeypatch)
    handles = [engine.submit(Request(CORPUS[i : i + 9], 40, temperature=0, ignore_end=True)) for i in (0, 20)]
    engine.step()

    def fail(tokens):
        raise RuntimeError("no memory")

    with monkeypatch.context() as broken:
        broken.setattr(engine.speculation._passes, "read", fail)
        for _ in range(6):
            engine.step()
    later = engine.submit(Request(CORPUS[40:50], 30, temperature=0, ignore_end=True))
    finish(engine, later, *handles)
    assert later.outputs[0].finish_reason == "length"
    failed = [handle.outputs[0] for handle in handles if handle.outputs[0].error is not None]
    assert failed and all("the step failed: no memory" in str(output.error) for output in failed)
    assert engine.store.pool.free + len(engine.store.cache._pages) == engine.store.pool.count


def test_a_text_that_has_ended_keeps_its_answer_where_its_state_cannot_be_kept(model, monkeypatch) -> None:
    engine, _ = _drafting(model, monkeypatch)
    asked = [Request(CORPUS[i : i + 9], 12 + i, temperature=0, ignore_end=True) for i in range(6)]
    plain, settle, failed = _plain(model), engine.speculation._settle, []

    def fail(passes, one):
        if one.sequence.finish is not None:
            failed.append(one.sequence)
            raise RuntimeError("no memory")
        settle(passes, one)

    monkeypatch.setattr(engine.speculation, "_settle", fail)
    for request in asked:
        pair = [one.submit(request) for one in (engine, plain)]
        for one, handle in zip((engine, plain), pair, strict=True):
            finish(one, handle)
        assert pair[0].outputs[0].tokens == pair[1].outputs[0].tokens
        assert pair[0].outputs[0].finish_reason == "length"
    assert failed and not engine.scheduler.running
    assert engine.counters["failures"] == 0


def test_a_token_that_cannot_be_written_ends_its_text(model, monkeypatch) -> None:
    engine, _ = _drafting(model, monkeypatch)
    handle = engine.submit(Request(CORPUS[:9], 400, temperature=0, ignore_end=True))
    for _ in range(3):
        engine.step()
    monkeypatch.setattr(engine.answers, "_spelled", lambda token, special: {}[token])
    finish(engine, handle)
    assert handle.outputs[0].finish_reason == "error"
    assert not engine.scheduler.running


@pytest.mark.parametrize("recorded_bytes", [0, SMALL.recorded_bytes])
def test_passes_are_recorded_within_their_room_and_give_the_same_bits(model, monkeypatch, recorded_bytes) -> None:
    config = dataclasses.replace(AMPLE, recorded_bytes=recorded_bytes)
    engine, _ = _drafting(model, monkeypatch, config=config)
    plain = AuditedEngine(model, byte_tokenizer(), dataclasses.replace(AMPLE, speculation=0))
    request = Request(CORPUS[:9], 600, temperature=0, ignore_end=True, logprobs=0)
    assert _events(engine, request) == _events(plain, request)
    recorded = {key[0] for key in engine.writing.recordings.by_key}
    assert ("pass" in recorded) == (recorded_bytes > 0 and engine.served.exact)
    assert engine.writing.recorded_bytes <= engine.store.budget.recording.room


@exact
@pytest.mark.parametrize("weights", [None, "int8"])
def test_the_packaged_model_repeats_a_file_by_drafts_and_to_the_bit(weights) -> None:
    loaded = load("nano", weights=weights)
    assert loaded.tokenizer is not None
    text = Path(__file__).read_text(encoding="utf-8")[:1200]
    asked = [
        Request(f"{text}\n# ----\n{text[:80]}", 120, temperature=0, logprobs=0, ignore_end=True),
        Request("x = [1, 2, 3]\n" * 6, 80, temperature=0.3, seed=2, logprobs=0, ignore_end=True),
        Request("The other day", 80, temperature=0, logprobs=0, ignore_end=True),
    ]
    answers, steps = [], []
    for drafted in (0, 31):
        config = EngineConfig(64 << 20, 16 << 20, speculation=drafted)
        engine = Engine(loaded.model, loaded.tokenizer, config)
        handles = [engine.submit(request) for request in asked]
        finish(engine, *handles)
        answers.append([(one.outputs[0].text, one.outputs[0].logprobs) for one in handles])
        steps.append(engine.counters["steps"])
    assert answers[0] == answers[1]
    assert engine.speculation.counters["accepted_tokens"] > 100


def test_without_the_compiled_kernels_drafts_leave_texts_that_go_on(model, monkeypatch) -> None:
    monkeypatch.setattr(native, "available", lambda *dtypes: False)
    monkeypatch.setattr("atma.ops.backend._decided", {})
    monkeypatch.setattr("atma.ops.backend._native_hindrance", lambda: "switched off")
    engine, drafts = _drafting(model, monkeypatch)
    plain = AuditedEngine(model, byte_tokenizer(), dataclasses.replace(AMPLE, speculation=0))
    request = Request(CORPUS[:9], 100, temperature=0, ignore_end=True, logprobs=0)
    written, expected = _events(engine, request), _events(plain, request)
    assert not engine.served.exact
    assert [event.tokens for event in written] == [event.tokens for event in expected]
    scores = [[one.logprob for event in events for one in event.logprobs or ()] for events in (written, expected)]
    assert torch.tensor(scores[0]).allclose(torch.tensor(scores[1]), rtol=0, atol=1e-3)
    assert any(right for _, right in drafts.told)


@pytest.mark.parametrize("value", [-1, 32, 1.5])
def test_a_length_of_drafts_that_is_none_is_refused(value) -> None:
    with pytest.raises(ValueError, match="speculation"):
        EngineConfig(speculation=value)

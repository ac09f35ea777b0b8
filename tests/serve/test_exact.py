"""Answers do not depend on what is served beside them, on how they were read, or on what was kept."""

import copy
import dataclasses
import functools
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from atma.loading import load
from atma.model import Model
from atma.ops import native
from atma.ops.native import operations
from atma.serve.exact import Served
from atma.serve.request import Request
from atma.tokenizer import byte_tokenizer
from tests.harness.conversations import Cold, Trace
from tests.serve.conftest import SMALL, AuditedEngine, finish, random_model

KINDS = [("polar", True, None), ("nope", True, None), ("rope", False, None), ("rope", True, 24), ("polar", True, 40)]
KINDS.append(("rope+canon", True, 24))
pytestmark = pytest.mark.skipif(not native.available(torch.float32), reason="exact only by the compiled kernels")


def _traces(model, folder, seeds, rounds: int) -> tuple[int, float]:
    """Answers compared, and the share of prompt tokens that came from kept states."""
    tokenizer, config = byte_tokenizer(), dataclasses.replace(SMALL, cache_folder=folder, cache_folder_bytes=1 << 22)
    cold = Cold(model, tokenizer.vocab_size, config.page_tokens)
    found, corpus = [], torch.randint(0, 257, (2000,), generator=torch.Generator().manual_seed(9)).tolist()

    def check(prompt, output) -> None:
        found.append(cold.differences(prompt, output))
        assert found[-1] == (0, 0), f"{len(prompt)} tokens, then {output.tokens}"

    cached = read = 0
    for seed in seeds:
        trace = Trace(lambda: AuditedEngine(model, tokenizer, config), seed, corpus, 180, check)
        trace.run(rounds)
        cached, read = cached + trace.cached, read + trace.read
    return len(found), cached / read


@pytest.mark.parametrize(("core", "memory", "window"), KINDS)
def test_every_answer_of_random_conversations_is_to_the_bit_that_of_a_cold_read(core, memory, window, tmp_path) -> None:
    compared, cached = _traces(random_model(core, memory, window), tmp_path, range(3), 8)
    assert compared >= 30
    assert cached > 0.2


def test_conversations_with_the_packaged_model_are_to_the_bit_those_of_a_cold_read(tmp_path) -> None:
    loaded = load("nano")
    config = dataclasses.replace(SMALL, memory_bytes=6 << 20, cache_bytes=3 << 20, cache_folder=tmp_path)
    cold = Cold(loaded.model, loaded.tokenizer.vocab_size, config.page_tokens)
    corpus = loaded.tokenizer.encode(Path(__file__).read_text(encoding="utf-8"))
    found = []
    for seed in range(2):
        make = functools.partial(AuditedEngine, loaded.model, loaded.tokenizer, config)
        Trace(make, seed, corpus, 180, lambda p, o: found.append(cold.differences(p, o))).run(4)
    assert set(found) == {(0, 0)}


@pytest.mark.slow
@pytest.mark.parametrize(("core", "memory", "window"), KINDS)
def test_thousands_of_answers_of_random_conversations_are_to_the_bit_those_of_a_cold_read(
    core, memory, window, tmp_path
) -> None:
    compared, _ = _traces(random_model(core, memory, window), tmp_path, range(100, 140), 12)
    assert compared >= 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("core", ["polar", "nope", "rope", "rope+canon"])
def test_hidden_states_are_the_same_bits_in_any_cut_and_beside_any_rows(core: str, dtype: torch.dtype) -> None:
    model = random_model(core) if dtype == torch.float32 else _of_type(core, dtype)
    cold = Cold(model, 257, 16)
    tokens = torch.randint(0, 257, (150,), generator=torch.Generator().manual_seed(1)).tolist()
    whole = cold.logits(tokens)
    engine = AuditedEngine(model, byte_tokenizer(), dataclasses.replace(SMALL, memory_bytes=SMALL.memory_bytes * 2))
    handles = [
        engine.submit(Request(tokens[:cut], max_tokens=1, temperature=0, logprobs=3, echo=True))
        for cut in (150, 149, 70)
    ]
    finish(engine, *handles)
    for handle in handles:
        output = handle.outputs[0]
        expected = whole[: len(output.tokens) - 2].float().log_softmax(-1)
        got = [one.logprob for one in output.logprobs[1:-1]]
        index = torch.tensor(output.tokens[1:-1])[:, None]
        assert got == expected.gather(1, index)[:, 0].tolist()


def _of_type(core: str, dtype: torch.dtype):
    import copy

    return copy.deepcopy(random_model(core)).to(dtype)


@pytest.mark.parametrize("others", [1, 7, 31])
def test_a_greedy_text_is_the_same_alone_and_in_any_batch(model, others: int) -> None:
    tokenizer, asked = byte_tokenizer(), Request("the text", max_tokens=40, temperature=0, ignore_end=True, logprobs=0)
    config = dataclasses.replace(SMALL, max_rows=32, step_tokens=100, memory_bytes=8 << 20)
    alone = AuditedEngine(model, tokenizer, config)
    expected = alone.submit(asked)
    finish(alone, expected)
    crowd = AuditedEngine(model, tokenizer, config)
    beside = [crowd.submit(Request(f"{i} " * (i + 1), max_tokens=3 * i + 1, seed=i)) for i in range(others // 2)]
    for _ in range(5):
        crowd.step()
    handle = crowd.submit(asked)
    beside += [crowd.submit(Request(f"{i} " * (i + 1), max_tokens=30, seed=i)) for i in range(others - others // 2)]
    finish(crowd, handle, *beside)
    assert handle.outputs[0].tokens == expected.outputs[0].tokens
    assert handle.outputs[0].logprobs == expected.outputs[0].logprobs


def test_the_number_of_threads_changes_no_bit(model) -> None:
    cold, tokens = Cold(model, 257, 16), list(range(200))
    before, threads = cold.logits(tokens), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(cold.logits(tokens), before)
            assert torch.equal(cold.logits(tokens[:5]), before[:5])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["nano", "nano-rope"])
def test_the_packaged_models_are_served_as_they_are(name: str) -> None:
    model = load(name).model
    tokens = torch.randint(0, model.config.vocab_size, (300,), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = model.logits(model(tokens[None])[0][0])
    got = Cold(model, model.config.vocab_size, 256).logits(tokens.tolist())
    assert (got - expected).abs().max() < 1e-3
    assert Served(model).exact


def test_without_the_compiled_kernels_answers_agree_up_to_near_ties(model, monkeypatch) -> None:
    expected = Cold(model, 257, 16).logits(list(range(100)))
    monkeypatch.setattr(native, "available", lambda *dtypes: False)
    monkeypatch.setattr("atma.ops.backend._decided", {})
    monkeypatch.setattr("atma.ops.backend._native_hindrance", lambda: "switched off")
    cold = Cold(model, 257, 16)
    assert not cold.served.exact
    assert (cold.logits(list(range(100))) - expected).abs().max() < 1e-4
    engine = AuditedEngine(model, byte_tokenizer(), SMALL)
    first = engine.submit(Request("hello there", max_tokens=40, temperature=0))
    second = engine.submit(Request("and another", max_tokens=40, temperature=0))
    finish(engine, first, second)
    again = engine.submit(Request("hello there", max_tokens=40, temperature=0))
    finish(engine, again)
    assert again.outputs[0].usage.cached == 12
    assert again.outputs[0].tokens == first.outputs[0].tokens


@pytest.mark.parametrize("core", ["polar", "nope", "rope", "rope+canon"])
def test_recorded_steps_give_the_bits_of_steps_as_they_are(core: str) -> None:
    answers = []
    for room in (0, 45_000, SMALL.recorded_bytes):
        engine = AuditedEngine(random_model(core), byte_tokenizer(), dataclasses.replace(SMALL, recorded_bytes=room))
        handles = [
            engine.submit(Request(f"text {i}", max_tokens=10 + 15 * i, temperature=0, logprobs=0)) for i in range(4)
        ]
        finish(engine, *handles)
        answers.append([handle.outputs[0].logprobs for handle in handles])
        assert bool(engine.writing.recordings.by_key) == (room > 0)
        assert engine.writing.recorded_bytes <= min(room, engine.store.budget.recording.room)
    assert answers[0] == answers[1] == answers[2]


def test_threads_share_out_the_rows_of_small_models_alone(model, monkeypatch) -> None:
    batch = AuditedEngine(model, byte_tokenizer(), SMALL).writing
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert [len(batch._parts(rows)) for rows in (1, 15, 16, 100)] == [1, 1, 2, 4]
    weights = sum(x.numel() for x in model.parameters() if x.ndim == 2)
    monkeypatch.setattr("atma.serve.writing.TOGETHER", 2 * weights)
    assert batch._parts(100) == [slice(0, 100)]


def test_rows_that_threads_share_out_give_the_bits_of_rows_together(model) -> None:
    config, answers = dataclasses.replace(SMALL, max_rows=26, memory_bytes=8 << 20), []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            engine = AuditedEngine(model, byte_tokenizer(), config)
            asked = [Request(f"text {i}", max_tokens=20 + i, temperature=0, logprobs=0) for i in range(26)]
            handles = [engine.submit(dataclasses.replace(one, ignore_end=True)) for one in asked]
            finish(engine, *handles)
            assert ("step", 26, 1) in engine.writing.recordings.by_key
            assert [len(engine.writing._parts(rows)) for rows in (15, 26)] == [1, count]
            answers.append([handle.outputs[0].logprobs for handle in handles])
    finally:
        torch.set_num_threads(threads)
    assert answers[0] == answers[1] == answers[2]


def test_a_step_that_cannot_be_recorded_is_made_as_ever(model, monkeypatch) -> None:
    request = Request("some text", max_tokens=30, temperature=0, logprobs=0, ignore_end=True)
    expected = AuditedEngine(model, byte_tokenizer(), SMALL)
    wanted = expected.submit(request)
    finish(expected, wanted)
    monkeypatch.delitem(operations.KERNELS, torch.ops.aten.cat.default)
    engine = AuditedEngine(model, byte_tokenizer(), SMALL)
    handle = engine.submit(request)
    finish(engine, handle)
    assert not engine.writing.recordings.by_key
    assert handle.outputs[0].logprobs == wanted.outputs[0].logprobs


@pytest.mark.parametrize("tied", [False, True])
def test_an_engine_that_takes_a_model_over_holds_each_weight_once_and_gives_the_same_bits(tied: bool) -> None:
    model = copy.deepcopy(random_model())
    if tied:
        model = Model(dataclasses.replace(model.config, tied_head=True), torch.Generator().manual_seed(3)).eval()
    request = Request("some text", max_tokens=20, temperature=0, logprobs=0, ignore_end=True)
    weights = [weakref.ref(x.weight) for x in model.modules() if isinstance(x, nn.Linear)]
    embedding, answers = weakref.ref(model.embed.weight), []
    for keep in (True, False):
        engine = AuditedEngine(model, byte_tokenizer(), SMALL, keep_model=keep)
        handle = engine.submit(request)
        finish(engine, handle)
        answers.append(handle.outputs[0].logprobs)
        assert engine.writing.recordings.by_key
        assert all((x() is not None) == keep for x in weights)
        del engine
    assert answers[0] == answers[1]
    assert (embedding() is None) == tied

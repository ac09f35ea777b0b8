"""Short conversations at once beside cold reads; the run of 5,000 is `benchmarks/serving.py exact --traces 5000`."""

import dataclasses
import random

import pytest
import torch

from atma.ops import native
from atma.serve.engine import Engine
from atma.tokenizer import byte_tokenizer
from tests.harness.conversations import Cold, Conversation
from tests.harness.traces import Found, Traces, held
from tests.serve.conftest import SMALL, AuditedEngine, finish, random_model

KINDS = [("polar", True, 40), ("nope", True, None), ("rope", False, None), ("rope", True, 24)]
CORPUS = torch.randint(0, 257, (2000,), generator=torch.Generator().manual_seed(9)).tolist()
exact = pytest.mark.skipif(not native.available(torch.float32), reason="exact only by the compiled kernels")


def _run(model, folder, count: int, read_by=None) -> Found:
    config = dataclasses.replace(SMALL, cache_folder=folder, cache_folder_bytes=200_000, quantum=8)
    cold = Cold(read_by or model, 257, config.page_tokens)
    traces = Traces(lambda: AuditedEngine(model, byte_tokenizer(), config), 5, CORPUS, cold.differences, together=8)
    return traces.run(count, longest=120)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Found:
    return _run(random_model(), tmp_path_factory.mktemp("states"), 24)


@exact
@pytest.mark.parametrize(("core", "memory", "window"), KINDS)
def test_every_trace_is_to_the_bit_that_of_cold_reads(core, memory, window, tmp_path):
    found = _run(random_model(core, memory, window), tmp_path, 8)
    assert (found.traces, found.wrong_traces, found.wrong_tokens, found.wrong_logprobs) == (8, 0, 0, 0)
    assert found.exceeded == []
    assert found.cached_tokens > 0.2 * found.prompt_tokens


@exact
def test_all_that_is_to_happen_happens_and_every_trace_is_that_of_cold_reads(found):
    assert (found.traces, found.wrong_traces, found.wrong_tokens, found.wrong_logprobs) == (24, 0, 0, 0)
    assert 3 * 24 <= found.answers == sum(found.turns.values()) <= 6 * 24
    assert set(found.turns) == {"new", "append", "edit", "again", "branch"}
    assert set(found.traces_with) == {*found.turns, "interruption", "restart"}
    assert min(found.turns.values()) > 0
    assert min(found.events.values()) > 0
    assert found.events["interruptions in all"] > found.events["interruptions at random"]
    assert set(found.most) == {"counted by the engine", "tensors", "kept states", "files"}
    assert all(0 < most <= bound for most, bound in found.most.values())


@exact
def test_answers_that_are_not_those_of_the_cold_read_are_counted(tmp_path):
    found = _run(random_model(), tmp_path, 8, read_by=random_model(seed=1))
    assert found.wrong_traces == found.traces == 8
    assert found.wrong_logprobs > 0.9 * found.tokens


@exact
def test_a_state_that_is_not_the_text_s_own_is_noticed(tmp_path, monkeypatch):
    plain = AuditedEngine.submit

    @torch.inference_mode()
    def submit(engine, request, tokens=None):
        for kept in engine.store.cache._kept.values():
            kept.standing.carried[0].zero_()
        return plain(engine, request, tokens)

    monkeypatch.setattr(AuditedEngine, "submit", submit)
    found = _run(random_model(), tmp_path, 8)
    assert found.wrong_traces > 0
    assert found.wrong_logprobs > 0


def test_what_is_held_is_counted_from_tensors_and_files(tmp_path):
    config = dataclasses.replace(SMALL, cache_folder=tmp_path)
    engine = Engine(random_model(), byte_tokenizer(), config)
    before = held(engine)
    prompt = [256, *range(40)]
    request = Conversation(random.Random(0), CORPUS, 100).request(prompt)
    finish(engine, engine.submit(request))
    engine.store.cache.flush()
    after, states = held(engine), len(engine.store.cache)
    assert states == 3
    assert after["tensors"][0] - before["tensors"][0] == states * engine.store.budget.row_bytes
    assert after["files"] == (sum(path.stat().st_size for path in tmp_path.iterdir()), config.cache_folder_bytes)
    assert Found(most={"files": (5, 4), "tensors": (4, 4)}).exceeded == ["files"]

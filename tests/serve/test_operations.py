"""Random operations on an engine short of everything: it stays within its bytes, ends everything, and leaks nothing."""

import random

import pytest

from atma.serve.request import Request, RequestError
from atma.serve.settings import EngineConfig
from atma.tokenizer import byte_tokenizer
from tests.serve.conftest import AuditedEngine, random_model

KIB = 1 << 10


def _engine(choice: random.Random, folder) -> AuditedEngine:
    config = EngineConfig(
        memory_bytes=choice.randint(320, 540) * KIB,
        cache_bytes=choice.choice([0, 20, 40]) * KIB,
        cache_folder=choice.choice([None, folder]),
        cache_folder_bytes=100 * KIB,
        max_rows=choice.randint(1, 5),
        max_waiting=choice.randint(4, 12),
        step_tokens=choice.randint(6, 64),
        page_tokens=16,
        snapshot_tokens=choice.choice([0, 8, 32]),
        overtakes=choice.randint(0, 4),
        quantum=choice.randint(1, 20),
    )
    return AuditedEngine(random_model(), byte_tokenizer(), config)


def _request(choice: random.Random) -> Request:
    prompt = [choice.randint(0, 3) for _ in range(choice.randint(1, 60))]
    return Request(
        prompt,
        max_tokens=choice.randint(1, 60),
        temperature=choice.choice([0.0, 1.0]),
        top_k=choice.choice([0, 5]),
        n=choice.choice([1, 1, 1, 3]),
        ignore_end=choice.random() < 0.5,
        logprobs=choice.choice([None, None, 2]),
        echo=choice.random() < 0.2,
        cache=choice.random() < 0.8,
        id=str(choice.random()),
    )


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_bytes_are_kept_to_and_nothing_leaks(seed: int, tmp_path) -> None:
    choice = random.Random(seed)
    engine, handles = _engine(choice, tmp_path), []
    for _ in range(120):
        action = choice.random()
        if action < 0.35:
            try:
                handles.append(engine.submit(_request(choice)))
            except RequestError as error:
                assert error.code in ("queue_full", "too_long")
        elif action < 0.42 and handles:
            engine.abort(choice.choice(handles).id)
        elif action < 0.45:
            engine.store.cache.evict()
        else:
            engine.step()
    for _ in range(5000):
        if not engine.busy:
            break
        engine.step()
    assert all(handle.done for handle in handles)
    assert {o.finish_reason for handle in handles for o in handle.outputs} <= {"length", "stop", "abort"}
    engine.store.cache.clear()
    assert not any(engine.store.pool.references)
    assert not engine.writing.sequences
    assert not engine.answers.handles

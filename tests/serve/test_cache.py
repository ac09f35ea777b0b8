"""Kept states: what is found, what goes first, and what comes back from disk."""

import dataclasses

import pytest

from atma.serve.request import Request
from atma.tokenizer import byte_tokenizer
from tests.serve.conftest import SMALL, AuditedEngine, finish, random_model

TEXT = [256, *b"the beginning of a conversation"]


def _answer(engine, tokens, count: int = 6):
    handle = engine.submit(Request(tokens, max_tokens=count, temperature=0, ignore_end=True, logprobs=0))
    finish(engine, handle)
    return handle.outputs[0]


def _on_disk(folder, seed: int = 0, **changes):
    config = dataclasses.replace(SMALL, cache_folder=folder, **changes)
    return AuditedEngine(random_model(seed=seed), byte_tokenizer(), config)


def test_the_longest_kept_beginning_is_found(engine) -> None:
    for length in (5, 9, 14):
        _answer(engine, TEXT[:length], 1)
    for length, expected in ((4, 0), (5, 5), (8, 5), (9, 9), (13, 9), (20, 14)):
        found = engine.store.cache.find(TEXT, length, "")
        assert (found.standing.position if found else 0) == expected


def test_another_text_of_the_same_length_is_not_found(engine) -> None:
    _answer(engine, TEXT, 1)
    assert engine.store.cache.find([*TEXT[:-1], 0], len(TEXT), "") is None


def test_the_least_recently_used_state_goes_first(engine) -> None:
    for start in range(3):
        _answer(engine, [start, *TEXT[:20]], 1)
    _answer(engine, [0, *TEXT[:20]], 1)
    engine.store.cache.evict()
    kept = [bool(engine.store.cache.find([start, *TEXT], 21, "")) for start in range(3)]
    assert kept == [True, False, True]


def test_pages_of_a_common_beginning_are_held_once(engine) -> None:
    text = list(range(96))
    _answer(engine, text, 1)
    pages = engine.store.pool.count - engine.store.pool.free
    _answer(engine, [*text, 1], 1)
    _answer(engine, [*text, 2], 1)
    assert engine.store.pool.count - engine.store.pool.free == pages + 2


def test_kept_states_never_pass_their_budget(engine) -> None:
    for start in range(40):
        _answer(engine, [start, *TEXT], 2)
        assert engine.store.cache.bytes <= SMALL.cache_bytes
        assert len(engine.store.cache) <= engine.store.budget.snapshots
    assert engine.store.cache.evictions > 0


def test_without_cache_bytes_nothing_is_kept_and_everything_works(model) -> None:
    engine = AuditedEngine(model, byte_tokenizer(), dataclasses.replace(SMALL, cache_bytes=0))
    first, again = _answer(engine, TEXT), _answer(engine, TEXT)
    assert again.tokens == first.tokens
    assert again.usage.cached == 0
    assert len(engine.store.cache) == 0


def test_states_survive_a_restart_to_the_bit(tmp_path) -> None:
    before = _on_disk(tmp_path)
    answer = _answer(before, TEXT)
    before.close()
    after = _on_disk(tmp_path)
    again = _answer(after, TEXT)
    assert again.usage.cached == len(TEXT)
    assert (again.tokens, again.logprobs) == (answer.tokens, answer.logprobs)
    following = [*TEXT, *answer.tokens, *b" on"]
    turn = _answer(after, following)
    assert turn.usage.cached == len(TEXT) + len(answer.tokens) - 1
    assert turn.logprobs == _answer(AuditedEngine(random_model(), byte_tokenizer(), SMALL), following).logprobs


def test_an_evicted_state_comes_back_from_disk(tmp_path) -> None:
    engine = _on_disk(tmp_path)
    answer = _answer(engine, TEXT)
    while engine.store.cache.evict():
        pass
    assert _answer(engine, [*TEXT, *answer.tokens]).usage.cached == len(TEXT) + len(answer.tokens) - 1


def test_a_damaged_file_is_a_miss_and_is_removed(tmp_path) -> None:
    engine = _on_disk(tmp_path)
    answer = _answer(engine, TEXT)
    engine.close()
    for path in tmp_path.iterdir():
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    after = _on_disk(tmp_path)
    again = _answer(after, TEXT)
    assert (again.tokens, again.usage.cached) == (answer.tokens, 0)
    assert after.stats()["files_damaged"] == 1
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("size", [0, 10, 1000])
def test_a_cut_file_is_a_miss_and_is_removed(tmp_path, size: int) -> None:
    engine = _on_disk(tmp_path)
    answer = _answer(engine, TEXT)
    engine.close()
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:size])
    again = _answer(_on_disk(tmp_path), TEXT)
    assert (again.tokens, again.usage.cached) == (answer.tokens, 0)


def test_files_keep_within_their_bytes_and_the_oldest_go(tmp_path) -> None:
    engine = _on_disk(tmp_path, cache_folder_bytes=60_000)
    for start in range(30):
        _answer(engine, [start, *TEXT], 1)
    engine.close()
    files = list(tmp_path.iterdir())
    assert 2 <= len(files) < 30
    assert sum(path.stat().st_size for path in files) <= 60_000


def test_another_model_or_page_size_finds_nothing_in_the_folder(tmp_path) -> None:
    engine = _on_disk(tmp_path)
    _answer(engine, TEXT)
    engine.close()
    assert _answer(_on_disk(tmp_path, seed=1), TEXT).usage.cached == 0
    assert _answer(_on_disk(tmp_path, page_tokens=32), TEXT).usage.cached == 0
    assert _answer(_on_disk(tmp_path), TEXT).usage.cached == len(TEXT)


def test_a_folder_that_cannot_be_written_costs_only_the_states(tmp_path, monkeypatch) -> None:
    engine = _on_disk(tmp_path)

    def full(*_) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("atma.state.save", full)
    _answer(engine, TEXT)
    engine.close()
    assert engine.stats()["file_failures"] == 2
    assert not list(tmp_path.iterdir())

"""States on their way to disk: no step waits for them, none is found changed, and no fault ends the engine."""

import dataclasses
import threading
import time
from pathlib import Path

import pytest

from atma import state as states
from atma.serve.request import Request
from atma.serve.settings import EngineConfig
from atma.tokenizer import byte_tokenizer
from tests.serve.conftest import SMALL, AuditedEngine, finish, random_model

TEXT = [256, *b"the beginning of a conversation"]
SHORT = TEXT[:20]
"""Shorter than the distance of states that are kept in passing: one state is kept of it."""


class Disk:
    """A disk that writes nothing until it is `opened`."""

    def __init__(self, monkeypatch) -> None:
        self.opened, self.began, save = threading.Event(), threading.Event(), states.save

        def slow(*arguments) -> None:
            self.began.set()
            assert self.opened.wait(60)
            save(*arguments)

        monkeypatch.setattr(states, "save", slow)


@pytest.fixture
def disk(monkeypatch):
    slow = Disk(monkeypatch)
    yield slow
    slow.opened.set()


def _engine(folder, **changes) -> AuditedEngine:
    return AuditedEngine(
        random_model(), byte_tokenizer(), dataclasses.replace(SMALL, **{"cache_folder": folder, **changes})
    )


def _answer(engine, tokens, count: int = 6):
    handle = engine.submit(Request(tokens, max_tokens=count, temperature=0, ignore_end=True, logprobs=0))
    finish(engine, handle)
    return handle.outputs[0]


def _evict_all(engine) -> None:
    while engine.store.cache.evict():
        pass


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _pending_size(engine, tokens: int) -> int:
    budget = engine.store.budget
    return budget.row_bytes + engine.store.pool.pages_for(tokens) * budget.page_bytes


def test_texts_go_on_while_the_disk_is_slow_and_what_waits_is_counted(disk, tmp_path) -> None:
    engine = _engine(tmp_path)
    _answer(engine, TEXT)
    used = engine.store.used_bytes
    _evict_all(engine)
    assert disk.began.wait(60)
    expected = _pending_size(engine, len(TEXT)) + _pending_size(engine, len(TEXT) + 5)
    assert engine.stats()["pending_bytes"] == expected
    assert engine.store.used_bytes == engine.store.budget.set_aside + expected
    assert used <= SMALL.memory_bytes
    assert _answer(engine, [1, 2, 3]).finish_reason == "length"
    assert engine.stats()["files"] == 0
    assert _files(tmp_path) == []
    disk.opened.set()
    engine.store.disk.flush()
    assert (engine.stats()["pending_bytes"], engine.stats()["files"]) == (0, 2)
    assert len(_files(tmp_path)) == 2


def test_a_state_that_waits_to_be_written_is_read_to_the_bit(disk, tmp_path) -> None:
    engine = _engine(tmp_path)
    answer = _answer(engine, TEXT)
    _evict_all(engine)
    following = [*TEXT, *answer.tokens, *b" on"]
    turn = _answer(engine, following)
    assert turn.usage.cached == len(TEXT) + len(answer.tokens) - 1
    alone = _answer(AuditedEngine(random_model(), byte_tokenizer(), SMALL), following)
    assert (turn.tokens, turn.logprobs) == (alone.tokens, alone.logprobs)
    assert _files(tmp_path) == []


def test_pages_used_again_meanwhile_change_nothing_in_what_is_written(disk, tmp_path) -> None:
    engine = _engine(tmp_path)
    answer = _answer(engine, TEXT)
    _evict_all(engine)
    assert engine.store.pool.free == engine.store.pool.count
    _answer(engine, [7] * (engine.store.pool.size * engine.store.pool.count - 1), 2)
    disk.opened.set()
    engine.close()
    again = _answer(_engine(tmp_path), TEXT)
    assert again.usage.cached == len(TEXT)
    assert (again.tokens, again.logprobs) == (answer.tokens, answer.logprobs)


def test_when_the_queue_is_full_states_are_dropped_and_counted_and_no_step_waits(disk, tmp_path) -> None:
    engine = _engine(tmp_path)
    for start in range(40):
        _answer(engine, [start, *TEXT], 1)
    assert disk.began.wait(60)
    evictions, dropped = engine.stats()["evictions"], engine.stats()["files_dropped"]
    waiting = len(engine.store.disk._pending)
    assert waiting >= 2
    assert dropped == evictions - waiting > 10
    assert engine.store.budget.pending_bytes - engine.stats()["pending_bytes"] < _pending_size(engine, len(TEXT) + 1)
    disk.opened.set()
    engine.store.disk.flush()
    assert len(_files(tmp_path)) == waiting
    assert _answer(engine, [0, *TEXT], 1).usage.cached == len(TEXT) + 1


def test_the_end_waits_for_what_is_not_written_and_drops_nothing(disk, tmp_path) -> None:
    engine = _engine(tmp_path)
    for start in range(8):
        _answer(engine, [start, *TEXT], 1)
    kept = engine.stats()["kept_states"] + len(engine.store.disk._pending)
    dropped = engine.stats()["files_dropped"]
    ending = threading.Thread(target=engine.close)
    ending.start()
    time.sleep(0.2)
    assert ending.is_alive()
    disk.opened.set()
    ending.join(300)
    assert not ending.is_alive()
    assert engine.stats()["files_dropped"] == dropped
    assert len(_files(tmp_path)) == kept > 4
    assert _answer(_engine(tmp_path), [7, *TEXT], 1).usage.cached == len(TEXT) + 1


def test_a_state_larger_than_the_queue_is_written_at_the_end_alone(tmp_path) -> None:
    engine = _engine(tmp_path, pending_bytes=1)
    answer = _answer(engine, TEXT)
    engine.store.cache.evict()
    assert engine.stats()["files_dropped"] == 1
    engine.close()
    assert len(_files(tmp_path)) == 1
    following = [*TEXT, *answer.tokens]
    assert _answer(_engine(tmp_path), following).usage.cached == len(TEXT) + len(answer.tokens) - 1


@pytest.mark.parametrize("fault", [OSError("no space left"), RuntimeError("a fault of the library")])
def test_a_disk_that_fails_costs_only_the_states_and_may_work_again(tmp_path, monkeypatch, fault) -> None:
    engine, save, faults = _engine(tmp_path, pending_bytes=1 << 16), states.save, [fault, fault]

    def failing(*arguments) -> None:
        if faults:
            raise faults.pop()
        save(*arguments)

    monkeypatch.setattr(states, "save", failing)
    for start in range(3):
        _answer(engine, [start, *SHORT], 1)
    _evict_all(engine)
    engine.store.disk.flush()
    stats = engine.stats()
    assert (stats["file_failures"], stats["files"], stats["pending_bytes"]) == (2, 1, 0)
    assert _answer(engine, [0, *SHORT], 1).usage.cached == 0
    assert _answer(engine, [2, *SHORT], 1).usage.cached == len(SHORT) + 1


def test_a_file_that_cannot_be_removed_is_counted(tmp_path, monkeypatch) -> None:
    engine, unlink = _engine(tmp_path, cache_folder_bytes=1), Path.unlink

    def refused(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".safetensors":
            raise PermissionError("not yours")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refused)
    _answer(engine, TEXT, 1)
    engine.close()
    assert (engine.stats()["files"], engine.stats()["file_failures"]) == (0, 1)


def test_the_thread_ends_when_nothing_is_left_to_write_and_begins_again(tmp_path) -> None:
    engine = _engine(tmp_path)
    for start in range(2):
        _answer(engine, [start, *SHORT], 1)
        _evict_all(engine)
        engine.store.disk.flush()
        until = time.monotonic() + 300
        while any(thread.name == "atma-states" for thread in threading.enumerate()):
            assert time.monotonic() < until
            time.sleep(0.01)
    assert len(_files(tmp_path)) == 2


def test_the_queue_is_part_of_the_bytes_for_kept_states(tmp_path) -> None:
    plain, queued = _engine(None).store.budget, _engine(tmp_path).store.budget
    assert (plain.pending_bytes, plain.cache_bytes) == (0, SMALL.cache_bytes)
    assert (queued.pending_bytes, queued.cache_bytes) == (SMALL.cache_bytes // 4, SMALL.cache_bytes * 3 // 4)
    for wrong in (-1, 2):
        with pytest.raises(ValueError, match=f"'pending_bytes' must be from 0 to cache_bytes 1, not {wrong}"):
            EngineConfig(cache_bytes=1, pending_bytes=wrong)

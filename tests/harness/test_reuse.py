"""What exact repeats reuse; the whole table is `benchmarks/serving.py reuse`."""

import dataclasses

import pytest
import torch

from atma.tokenizer import byte_tokenizer
from tests.harness.reuse import Repeats, Reusable, Reuse
from tests.serve.conftest import SMALL, AuditedEngine, random_model

CORPUS = torch.randint(0, 257, (2000,), generator=torch.Generator().manual_seed(9)).tolist()


def _repeats(kept: int, folder=None) -> Repeats:
    sizes = {"memory_bytes": kept + (8 << 20), "cache_bytes": kept, "pending_bytes": kept // 2}
    config = dataclasses.replace(SMALL, **sizes, cache_folder=folder)
    return Repeats(AuditedEngine(random_model(), byte_tokenizer(), config), CORPUS, 8, seed=3, longest=120)


def test_reusable_is_the_longest_beginning_after_which_there_was_a_state():
    reusable = Reusable(every=8)
    assert reusable.of([1, 2, 3]) == 0
    reusable.add([1] * 10, [2, 3, 4])
    assert reusable.of([1] * 10) == 10
    assert reusable.of([1] * 9) == 8
    assert reusable.of([1] * 7) == 0
    assert reusable.of([*[1] * 10, 2, 3, 4, 5]) == 12
    assert reusable.of([*[1] * 10, 2, 5]) == 10
    assert Reusable(every=0).of([1]) == 0


def test_with_room_for_all_every_reusable_token_is_reused():
    repeats = _repeats(8 << 20)
    first, again = repeats.hold(4), repeats.repeat()
    assert 0 < first.reusable == first.reused < first.prompts
    assert again.prompts == again.reusable == again.reused == first.prompts
    assert again.other == 0
    assert repeats.engine.store.cache.evictions == 0


def test_with_little_room_less_is_reused_and_the_answers_are_the_same():
    repeats = _repeats(100_000)
    repeats.hold(4)
    again = repeats.repeat()
    assert 0 < again.share < 0.8
    assert again.other == 0


def test_a_folder_makes_up_for_little_room(tmp_path):
    repeats = _repeats(100_000, tmp_path)
    repeats.hold(4)
    again = repeats.repeat()
    assert (again.share, again.other) == (1, 0)


def test_shares_are_of_the_reusable_tokens():
    assert Reuse(100, 50, 25, 0).share == pytest.approx(0.5)
    assert Reuse(100, 0, 0, 0).share == 1

"""A batch is a pure function of (seed, step, rank, world)."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atma.config import DataConfig, TrainConfig
from atma.data.batches import Batch, Batches, permuted
from atma.data.dataset import TokenSet

MIXED = DataConfig(recall_share=0.5, recall_vocabulary=32, copy_warmup_tokens=2 * 512, copy_vocabulary=8)
TRAIN = TrainConfig(length=64, batch_tokens=512, seed=3)


@pytest.fixture(scope="module")
def tokens(prepared):
    return TokenSet.open(prepared)


def equal(first: Batch, second: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("data", [DataConfig(), MIXED], ids=["text", "mixed"])
def test_any_step_is_the_same_whatever_was_asked_before(tokens, data):
    history = Batches(tokens, data, TRAIN)
    for step in range(6):
        history.batch(step)
    for step in (5, 0, 2, 1000):
        assert equal(history.batch(step), Batches(tokens, data, TRAIN).batch(step))


@pytest.mark.parametrize("data", [DataConfig(), MIXED], ids=["text", "mixed"])
def test_the_ranks_together_have_the_batch_of_one_rank(tokens, data):
    for step in (0, 3, 77):
        whole = Batches(tokens, data, TRAIN).batch(step)
        for world in (2, 4, 8):
            parts = [Batches(tokens, data, TRAIN, rank, world).batch(step) for rank in range(world)]
            joined = Batch(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
            assert equal(joined, whole)


def test_shapes_and_types(tokens):
    batch = Batches(tokens, MIXED, TRAIN, 1, 2).batch(9)
    assert {part.shape for part in batch} == {(4, 64)}
    assert [part.dtype for part in batch] == [torch.int64, torch.int64, torch.int32]


def test_seeds_steps_and_rows_differ(tokens):
    batches = [
        Batches(tokens, MIXED, TrainConfig(length=64, batch_tokens=512, seed=s)).batch(t)
        for s in (0, 1)
        for t in (0, 9)
    ]
    rows = {tuple(row.tolist()) for batch in batches for row in batch.tokens}
    assert len(rows) == 4 * 8


def test_text_rows_are_windows_of_the_stream_and_every_target_is_the_next_token(tokens):
    stream = tokens.read(0, tokens.tokens)
    windows = {tuple(window) for window in np.lib.stride_tricks.sliding_window_view(stream, 65).tolist()}
    batch = Batches(tokens, DataConfig(), TRAIN).batch(4)
    for row, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        assert (*row, targets[-1]) in windows
        assert row[1:] == targets[:-1]


def test_segments_are_the_documents_of_the_index(tokens):
    starts = np.cumsum(tokens.lengths) - tokens.lengths
    stream = tokens.read(0, tokens.tokens)
    owner = np.searchsorted(starts, np.arange(tokens.tokens), "right") - 1
    place = {tuple(stream[i : i + 65].tolist()): i for i in range(tokens.tokens - 64)}
    boundaries = 0
    for step in range(20):
        batch = Batches(tokens, DataConfig(), TRAIN).batch(step)
        for row, targets, segments in zip(*(part.tolist() for part in batch), strict=True):
            start = place[(*row, targets[-1])]
            expected = owner[start : start + 64] - owner[start]
            assert segments == expected.tolist()
            boundaries += segments[-1]
    assert boundaries > 5


def test_an_epoch_visits_every_window_once_in_an_order_of_its_own(tokens):
    train = TrainConfig(length=64, batch_tokens=64)
    batches = Batches(tokens, DataConfig(), train)
    count = (tokens.tokens - 64) // 64
    epochs = [batches._starts(np.arange(epoch * count, (epoch + 1) * count)) for epoch in range(3)]
    for starts in epochs:
        ordered = np.sort(starts)
        assert np.all(np.diff(ordered) == 64)
        assert ordered[0] < 64
        assert ordered[-1] + 65 <= tokens.tokens
    assert not np.array_equal(epochs[0] // 64, epochs[1] // 64)
    assert len({int(starts.min()) for starts in epochs}) > 1


@given(count=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
def test_the_permutation_takes_each_position_to_another(count, key):
    taken = permuted(np.arange(count), count, np.full(count, key, np.uint64))
    assert np.array_equal(np.sort(taken), np.arange(count))


def test_the_permutation_is_as_mixed_as_a_random_one():
    count = 10_000
    taken = permuted(np.arange(count), count, np.full(count, 5, np.uint64))
    correlation = np.corrcoef(np.arange(count), taken)[0, 1]
    neighbours = np.corrcoef(taken[:-1], taken[1:])[0, 1]
    assert abs(correlation) < 4 / np.sqrt(count)
    assert abs(neighbours) < 4 / np.sqrt(count)
    assert np.sum(taken == np.arange(count)) < 8


def test_the_share_of_synthetic_rows_is_the_share_asked_for(tokens):
    plain, mixed = Batches(tokens, DataConfig(), TRAIN), Batches(tokens, DataConfig(recall_share=0.3), TRAIN)
    changed = [(plain.batch(i).tokens != mixed.batch(i).tokens).any(1) for i in range(150)]
    share = torch.cat(changed).float().mean().item()
    assert abs(share - 0.3) < 4 * np.sqrt(0.3 * 0.7 / (150 * 8))


def test_the_copy_warm_up_is_copies_over_few_ids_and_then_ends(tokens):
    batches = Batches(tokens, MIXED, TRAIN)
    ids = set()
    for step in (0, 1):
        batch = batches.batch(step)
        ids |= set(batch.tokens[:, 1:].unique().tolist())
        assert batch.segment_ids.unique().tolist() == [0]
        scored = batch.targets != -100
        for row, targets, known in zip(batch.tokens, batch.targets, scored, strict=True):
            period = int(known.int().argmax()) - 1
            assert torch.equal(targets[known], row[known.nonzero()[:, 0] + 1 - period])
    assert len(ids) <= 8
    assert len(set(batches.batch(2).tokens.unique().tolist())) > 8


def test_synthetic_rows_are_one_segment(tokens):
    batches = Batches(tokens, DataConfig(recall_share=1.0), TRAIN)
    for step in range(20):
        assert batches.batch(step).segment_ids.unique().tolist() == [0]


def test_the_smallest_set_that_fills_a_row_serves_it(shard):
    tokens = TokenSet.open(shard("train.bin", np.arange(65)))
    batch = Batches(tokens, DataConfig(), TrainConfig(length=64, batch_tokens=128)).batch(3)
    assert batch.tokens.tolist() == [list(range(64))] * 2
    assert batch.targets.tolist() == [list(range(1, 65))] * 2


def test_a_row_that_begins_inside_a_document_counts_from_zero(shard):
    tokens = TokenSet.open(shard("train.bin", [1, 2, 9, 3, 9]), eot=9)
    batch = Batches(tokens, DataConfig(), TrainConfig(length=4, batch_tokens=4)).batch(0)
    assert batch.segment_ids.tolist() == [[0, 0, 1, 1]]
    assert batch.targets.tolist() == [[2, 9, 3, 9]]


@pytest.mark.parametrize(
    ("data", "train", "rank", "world", "message"),
    [
        (DataConfig(), TRAIN, 0, 3, "'batch_tokens' 512 makes 8 rows, which 3 ranks × 1 micro-batches cannot share"),
        (DataConfig(), TRAIN, 2, 2, "rank must be 0 to 1, not 2"),
        (DataConfig(), TrainConfig(length=2**17, batch_tokens=2**17), 0, 1, "do not fill one row of length 131072"),
        (MIXED, TrainConfig(length=16, batch_tokens=16), 0, 1, "synthetic rows need a length of at least 32, not 16"),
    ],
)
def test_what_cannot_be_shared_or_filled_is_refused(tokens, data, train, rank, world, message):
    with pytest.raises(ValueError, match=message):
        Batches(tokens, data, train, rank, world)


def test_a_batch_of_8192_tokens_is_quick(tokens):
    batches = Batches(tokens, DataConfig(recall_share=0.3), TrainConfig())
    batches.batch(0)

    def seconds(step: int) -> float:
        begun = time.thread_time()
        batches.batch(step)
        return time.thread_time() - begun

    assert np.median([seconds(step) for step in range(20)]) < 0.02  # 1.5 ms where this was written

"""Conversations in rows: packed tightly, never cut, and each learned from as if it were alone."""

import dataclasses
import json

import hypothesis
import hypothesis.strategies as some
import numpy as np
import pytest
import torch

from atma.config import DataConfig, TrainConfig
from atma.data.dataset import TokenSet
from atma.data.packing import Conversations, pack
from atma.data.prepare import Preparation, prepare
from atma.model import Model
from tests.conftest import tiny


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Sixty conversations of one to three turns in bytes."""
    folder = tmp_path_factory.mktemp("chats")
    lines = []
    for number in range(60):
        turns = []
        for turn in range(1 + number % 3):
            turns += [{"role": "user", "content": f"{number} and {turn}?"}]
            turns += [{"role": "assistant", "content": f"{number + turn}, " * (1 + number % 5) + "yes"}]
        lines.append(json.dumps({"messages": turns}))
    (folder / "chats.jsonl").write_text("\n".join(lines))
    prepare(folder / "chats.jsonl", folder / "set", Preparation(chat_template="plain"))
    return TokenSet.open(folder / "set")


def settings(length=256, rows=4, **changes) -> TrainConfig:
    return TrainConfig(length=length, batch_tokens=rows * length, **changes)


@hypothesis.given(some.lists(some.integers(1, 40), min_size=1, max_size=60))
def test_every_item_is_in_one_row_and_no_row_is_too_full(sizes):
    rows = pack(np.arange(len(sizes)), np.array(sizes), 40)
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in row) <= 40 for row in rows)
    assert len(rows) <= 11 / 9 * -(-sum(sizes) // 40) * 2  # far above what best fit decreasing promises


def test_best_fit_fills_rows_that_can_be_filled():
    rows = pack(np.arange(6), np.array([60, 50, 50, 40, 70, 30]), 100)
    assert sorted(sorted(row.tolist()) for row in rows) == [[0, 3], [1, 2], [4, 5]]


def test_an_epoch_shows_every_conversation_once_and_whole(chats):
    batches = Conversations(chats, DataConfig(), settings(rows=1))
    shown = []
    for step in range(len(batches.rows)):
        tokens, targets, segments = (x[0].numpy() for x in batches.batch(step))
        for segment in range(int(segments.max()) + 1):
            inside = segments == segment
            if (targets[inside] != -100).any():
                shown.append(tokens[inside].tolist())
    assert sorted(shown) == sorted(chats.document(i)[:-1].tolist() for i in range(chats.documents))


def test_only_answers_have_a_target_and_all_text_if_asked(chats):
    batch = Conversations(chats, DataConfig(), settings()).batch(0)
    everything = Conversations(chats, DataConfig(scored="everything"), settings()).batch(0)
    assert torch.equal(batch.tokens, everything.tokens)
    scored, all_scored = batch.targets != -100, everything.targets != -100
    assert 0 < scored.sum() < all_scored.sum() and not (scored & ~all_scored).any()
    text = bytes(int(i) for i in batch.targets[scored] if i < 256).decode()
    assert "yes" in text and "?" not in text


def test_packed_gradients_are_those_of_each_conversation_alone(chats):
    model = Model(dataclasses.replace(tiny(), vocab_size=257), torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    batches = Conversations(chats, DataConfig(), settings(rows=2))
    tokens, targets, segments = batches.batch(0)
    model.loss(model(tokens, segment_ids=segments)[0], targets).sum().backward()
    packed = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    for row in range(len(tokens)):
        for segment in range(int(segments[row].max()) + 1):
            inside = segments[row] == segment
            hidden, _ = model(tokens[row, inside][None])
            model.loss(hidden, targets[row, inside][None]).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-9, atol=1e-9, msg=name)


def test_ranks_share_the_rows_and_any_step_can_be_asked_for(chats):
    whole = Conversations(chats, DataConfig(), settings())
    halves = [Conversations(chats, DataConfig(), settings(), rank, 2) for rank in range(2)]
    for step in (3, 0):
        parts = [half.batch(step).tokens for half in halves]
        assert torch.equal(torch.cat(parts), whole.batch(step).tokens)


def test_epochs_have_orders_of_their_own(chats):
    batches = Conversations(chats, DataConfig(), settings(rows=1))
    count = len(batches.rows)
    first, second = ([batches.batch(epoch * count + i).tokens for i in range(count)] for epoch in range(2))
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert {tuple(x[0].tolist()) for x in first} == {tuple(x[0].tolist()) for x in second}


def test_what_is_longer_than_a_row_is_cut_or_left_out_and_counted(chats):
    most = int(chats.lengths.max())
    short = most - 10
    cut = Conversations(chats, DataConfig(), settings(short))
    assert len(cut.long) > 0 and "their ends cut off" in cut.told()
    skipped = Conversations(chats, DataConfig(too_long="skip"), settings(short))
    assert len(skipped.left_out) == len(cut.long) and f"{len(cut.long)} longer than a row left out" in skipped.told()
    with pytest.raises(ValueError, match="no conversation has an answer within 'length' 2"):
        Conversations(chats, DataConfig(), settings(2))


def test_for_validation_a_row_comes_once(chats):
    batches = Conversations(chats, DataConfig(), settings(rows=64), once=True)
    batch = batches.batch(0)
    assert ((batch.targets != -100).any(1)).sum() == len(batches.rows) < 64
    assert not (batches.batch(1).targets != -100).any()


def test_synthetic_rows_and_texts_are_refused(chats, prepared):
    with pytest.raises(ValueError, match="no synthetic rows"):
        Conversations(chats, DataConfig(recall_share=0.5), settings())
    with pytest.raises(ValueError, match="holds texts, not conversations"):
        Conversations(TokenSet.open(prepared), DataConfig(), settings())
    with pytest.raises(ValueError, match="cannot share equally"):
        Conversations(chats, DataConfig(), settings(), 0, 3)

"""Heads are chosen one after the other by what they do to the loss of the calibration texts, and told on the others."""

import itertools

import pytest
import torch

from atma.diagnose.choice import choose, passes, told
from atma.diagnose.interpolation import interpolated, movable_heads
from atma.diagnose.parts import Head
from atma.diagnose.plan import Plan
from atma.diagnose.texts import lay
from atma.eval.stream import score
from atma.tokenizer import byte_tokenizer

LENGTHS = (128, 256)


@pytest.fixture
def texts(documents):
    return lay(byte_tokenizer(), documents, 256, 1, 7)


def loss(model, texts, heads, strength=1.0):
    tokens = torch.stack([text.tokens[:257] for text in texts])
    with interpolated(model, heads, strength):
        return score(model, tokens, 128).double().mean(1)


def test_each_head_is_the_one_that_changes_the_loss_most_beside_those_before_it(model, texts):
    read = []
    rows = choose(model, texts, plan := Plan(lengths=LENGTHS, choose_heads=3), 64, read.append)
    chosen, last = [], loss(model, texts[:2], []).mean()
    for row in rows:
        free = [head for head in movable_heads(model) if head not in chosen]
        losses = {head: loss(model, texts[:2], [*chosen, head]).mean() for head in free}
        best = max(free, key=lambda head, losses=losses, last=last: abs(losses[head] - last))
        assert row["head"] == str(best) and row["loss"] == pytest.approx(float(losses[best]), rel=1e-6)
        assert row["tried"] == pytest.approx({str(head): float(x) for head, x in losses.items()}, rel=1e-6)
        chosen, last = [*chosen, best], losses[best]
    assert [row["step"] for row in rows] == [1, 2, 3]
    changed = loss(model, texts[2:], chosen) - loss(model, texts[2:], [])
    assert rows[-1]["rest_change"] == pytest.approx(float(changed.mean()), rel=1e-5)
    assert rows[-1]["rest_low"] is None  # of one text
    assert sum(read) == passes(plan, model, 3) * 256


def test_heads_that_help_are_chosen_until_none_does(model, texts):
    rows = choose(model, texts, Plan(lengths=LENGTHS, choose_heads=4, choose_by="help"), 64, lambda _: None)
    losses = [row["loss"] for row in rows if row["step"]]
    for before, after in itertools.pairwise([rows[0]["loss_before"], *losses]):
        assert after < before
    chosen = [Head(*map(int, row["head"].split("."))) for row in rows if row["step"]]
    rest = [head for head in movable_heads(model) if head not in chosen]
    last = losses[-1] if losses else rows[0]["loss_before"]
    assert all(float(loss(model, texts[:2], [*chosen, head]).mean()) >= last * (1 - 1e-6) for head in rest)


def test_the_order_is_told_in_a_sentence(model, texts):
    rows = choose(model, texts[:1], Plan(lengths=LENGTHS, choose_heads=2), 64, lambda _: None)
    [said] = told(rows)
    assert said.index(f"{rows[0]['head']} (") < said.index(f"{rows[1]['head']} (") and "at 256 tokens" in said
    assert rows[0]["rest_change"] is None and told([]) == []
    assert told([{"kind": "choice", "step": 0, "length": 256}])[0].startswith("Of no head")

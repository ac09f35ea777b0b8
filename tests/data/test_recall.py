"""Synthetic rows repeat what they ask for, and score nothing that could not be known."""

import re

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from atma.data.phrases import TEMPLATES, WORDS
from atma.data.recall import Recall, Records, has_digits
from atma.tokenizer import Tokenizer, byte_tokenizer, train_bpe

VOCABULARY, EOT, FILLER = 50_000, 17, 7
SEEDS = range(60)


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def seen_before(ids: np.ndarray) -> np.ndarray:
    """For each position, whether this token after the token before it has occurred earlier in the row."""
    pairs, found = set(), [False]
    for pair in zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True):
        found.append(pair in pairs)
        pairs.add(pair)
    return np.array(found)


@pytest.mark.parametrize("length", [32, 65, 257, 1025])
@pytest.mark.parametrize("subset", [0, 300])
@pytest.mark.parametrize("kind", ["span", "pairs"])
def test_a_scored_random_token_is_told_by_the_token_before_it(kind, subset, length):
    recall = Recall(VOCABULARY, EOT, subset)
    scored = 0
    for seed in SEEDS:
        row = getattr(recall, kind)(generator(seed), np.full(length, FILLER), length)
        assert len(row.ids) == len(row.scored) == length
        asked = row.scored & (row.ids != FILLER)
        told = seen_before(row.ids) | (kind == "pairs")
        assert np.all(told[asked])
        assert EOT not in row.ids
        scored += asked.sum()
    assert scored > 0.1 * length * len(SEEDS)


@pytest.mark.parametrize("length", [64, 257])
def test_values_follow_their_keys_again(length):
    recall = Recall(VOCABULARY, EOT)
    told = []
    for seed in SEEDS:
        row = recall.pairs(generator(seed), np.full(length, FILLER), length)
        asked = row.scored & (row.ids != FILLER)
        told.append(seen_before(row.ids)[asked])
    assert np.concatenate(told).mean() > 0.999  # a random value may by chance repeat a token and blur one pair


@pytest.mark.parametrize("length", [32, 257])
def test_a_pasted_span_is_scored_from_its_second_token(length):
    recall = Recall(VOCABULARY, EOT)
    for seed in SEEDS:
        row = recall.paste(generator(seed), np.arange(100, 100 + length), length)
        fresh = np.isin(np.arange(length), np.unique(row.ids, return_index=True)[1])
        assert np.all(row.scored[fresh])
        assert (~row.scored).any()
        assert not fresh[~row.scored].any()


@pytest.mark.parametrize("length", [32, 33, 257])
def test_a_copy_row_is_one_sequence_over_and_over(length):
    ids = np.array([3, 5, 900, 40_000])
    for seed in SEEDS:
        row = Recall(VOCABULARY, EOT).copies(generator(seed), ids, length)
        period = int(np.argmax(row.scored)) - 2
        assert 16 <= period <= length // 2
        assert row.ids[0] == EOT
        assert set(row.ids[1:].tolist()) <= set(ids.tolist())
        assert np.array_equal(row.ids[1 + period :], row.ids[1:-period])
        assert row.scored.sum() == length - period - 2


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), train_bpe([" the number for item box is\n" * 9, WORDS], 500)])
def test_a_record_comes_back_with_its_value(tokenizer, monkeypatch):
    monkeypatch.setattr("atma.data.recall.SENTENCE", 1000)
    recall = Recall(tokenizer.vocab_size, tokenizer.eot, 0, tokenizer)
    filler = tokenizer.encode("~")[0]
    for seed in SEEDS:
        row = recall.record(generator(seed), np.full(290, filler), 290)
        runs = np.split(np.arange(290), np.flatnonzero(np.diff(row.ids == filler)) + 1)
        runs = [run for run in runs if row.ids[run[0]] != filler]
        ids = np.concatenate([row.ids[run] for run in runs])
        half = len(ids) // 2
        assert np.array_equal(ids[:half], ids[half:])
        positions = np.concatenate(runs)
        assert not row.scored[positions[:half]].any()
        sentence = tokenizer.decode(ids[half:])
        known = "".join(
            tokenizer.decode([i]) for i, scored in zip(ids[half:], row.scored[positions[half:]], strict=True) if scored
        )
        value = re.findall(r"\d+", sentence)[-1]
        assert len(value) == 5
        assert value in known
        assert re.findall(r"\d+", sentence)[0] not in known


def test_many_records_in_a_row_are_told_apart_by_their_keys_in_half_of_the_rows(monkeypatch):
    monkeypatch.setattr("atma.data.recall.SENTENCE", 200)
    tokenizer = byte_tokenizer()
    recall = Recall(tokenizer.vocab_size, tokenizer.eot, 0, tokenizer)
    alike = 0
    for seed in SEEDS:
        row = recall.record(generator(seed), np.full(4000, ord("~")), 4000)
        digits = re.compile(r"\d+")
        sentences = [part for part in tokenizer.decode(row.ids.tolist()).split("~") if digits.search(part)]
        assert sentences.count(sentences[-1]) == 2
        alike += len({digits.sub("", sentence) for sentence in sentences}) == 1 < len(sentences) // 2
    assert 0 < alike < len(SEEDS)


def test_records_vary_and_never_use_the_sentence_of_the_evaluation():
    tokenizer = byte_tokenizer()
    records = Records(tokenizer)
    sentences = {
        tokenizer.decode(records.draw(generator(seed), records.wording(generator(seed))).ids) for seed in range(300)
    }
    assert len(sentences) == 300
    assert not re.search("access code", " ".join(TEMPLATES) + WORDS)
    assert all("access" not in sentence for sentence in sentences)


def test_records_need_single_digits():
    backend = Backend(models.BPE(vocab={"<eos>": 0, **{str(i): i + 1 for i in range(9)}}, merges=[]))
    assert not has_digits(Tokenizer(backend, 0))
    assert has_digits(byte_tokenizer())
    assert Recall(10, 0, 0, Tokenizer(backend, 0)).records is None


@pytest.mark.parametrize("text", [[], [EOT], [EOT, 5, EOT, 6]])
def test_a_row_is_one_document_whatever_the_text(text):
    recall = Recall(257, EOT, 0, byte_tokenizer())
    for seed in SEEDS:
        row = recall.row(generator(seed), np.array(text, np.int64), 257)
        assert row.ids[0] == EOT
        assert EOT not in row.ids[1:]
        assert len(row.ids) == len(row.scored) == 257
        assert 0 <= row.ids.min() <= row.ids.max() < 257


def test_a_row_depends_on_its_generator_alone():
    recall = Recall(257, 256, 16, byte_tokenizer())
    text = np.arange(200)
    for seed in SEEDS:
        first, second = recall.row(generator(seed), text, 129), recall.row(generator(seed), text, 129)
        assert np.array_equal(first.ids, second.ids)
        assert np.array_equal(first.scored, second.scored)


def test_the_subset_bounds_the_random_ids_of_a_row():
    recall = Recall(VOCABULARY, EOT, 16)
    for seed in SEEDS:
        row = recall.span(generator(seed), np.full(257, FILLER), 257)
        assert len(set(row.ids.tolist()) - {FILLER}) <= 16


def test_every_kind_is_written(monkeypatch):
    recall = Recall(257, 256, 0, byte_tokenizer())
    written = []
    for kind in ("span", "pairs", "paste", "record"):
        row = getattr(recall, kind)(generator(0), np.arange(128), 128)
        monkeypatch.setattr(recall, kind, lambda *arguments, kind=kind, row=row: written.append(kind) or row)
    for seed in range(400):
        recall.row(generator(seed), np.arange(128), 129)
    assert {kind: written.count(kind) > 60 for kind in set(written)} == dict.fromkeys(
        ("span", "pairs", "paste", "record"), True
    )

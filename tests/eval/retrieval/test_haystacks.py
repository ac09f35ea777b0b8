"""Haystacks: read round and round, cut between sentences and words, the same on every machine."""

import numpy as np
import pytest

from atma.data.prepare import Preparation, prepare
from atma.eval.retrieval import haystacks
from atma.eval.retrieval.haystacks import Haystack, haystack, natural_text
from atma.eval.retrieval.words import filler, made_up, prose, uuid
from atma.eval.suite import sha256


def test_the_synthetic_haystack_is_its_sentences_over_and_over(tokenizer):
    text = haystack("synthetic", tokenizer)
    n = len(text.ids)
    assert text.take(0, 3 * n).tolist() == tokenizer.encode(filler() * 3)
    assert text.take(-5, 10).tolist() == text.take(n - 5, 10).tolist()


def test_generated_prose_is_the_same_on_every_machine():
    assert sha256(prose(0)) == "86ab92b35955458f6da9a4feaa0e60bf98def0e96f6a862022ca3ac6381d09aa"
    assert len(prose(0)) > 900_000 and prose(1) != prose(0)


def test_a_place_moves_to_a_sentence_then_to_a_word_then_stays(byte_level):
    text = Haystack("t", np.frombuffer(b" one two. three four", np.uint8), "0", byte_level)
    assert text.between(12, 5) == 9
    assert text.between(13, 3) == 15
    assert text.between(12, 2) == 12
    assert text.between(20 + 12, 5) == 20 + 9


def test_every_beginning_of_a_word_is_a_blank_or_after_a_line(tokenizer):
    text = haystack("prose", tokenizer)
    for place in np.flatnonzero(text.words)[1:50].tolist():
        before, after = (tokenizer.decode(text.take(start, 1).tolist()) for start in (place - 1, place))
        assert after[0] in " \n" or before[-1] == "\n"
    assert 0 < text.sentences.sum() < text.words.sum()


def test_a_natural_haystack_is_the_documents_in_order_up_to_a_limit(tmp_path, byte_level, monkeypatch):
    (tmp_path / "a.txt").write_text("first text\n")
    (tmp_path / "b.txt").write_text("\nsecond text")
    assert natural_text(str(tmp_path)) == "first text\n\nsecond text\n\n"
    monkeypatch.setattr(haystacks, "NATURAL_CHARACTERS", 15)
    found = haystack("natural", byte_level, str(tmp_path))
    assert bytes(found.ids.tolist()) == b"first text\n\nsec" and found.sha256 == sha256("first text\n\nsec")


def test_prepared_data_is_read_in_its_own_tokens_and_no_others(tmp_path, byte_level):
    (tmp_path / "texts").mkdir()
    for i in range(12):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"Text number {i} says something.\n" * 20)
    prepare(tmp_path / "texts", tmp_path / "data", Preparation(tokenizer="bytes", validation_share=0.4))
    text = haystack("natural", byte_level, str(tmp_path / "data"))
    assert "says something." in byte_level.decode(text.ids.tolist()) and not (text.ids == byte_level.eot).any()


def test_data_of_another_tokenizer_is_refused(tmp_path, tokenizer, byte_level):
    if tokenizer.name == "bytes":
        pytest.skip("the same tokenizer")
    (tmp_path / "texts").mkdir()
    for i in range(12):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"Text number {i} says something.\n" * 20)
    prepare(tmp_path / "texts", tmp_path / "data", Preparation(tokenizer="bytes", validation_share=0.4))
    with pytest.raises(ValueError, match="prepared with another tokenizer"):
        haystack("natural", tokenizer, str(tmp_path / "data"))


def test_made_up_words_come_once_and_uuids_look_like_such():
    words = [word for word, _ in zip(made_up(np.random.default_rng(0)), range(5000), strict=False)]
    assert len(set(words)) == 5000 and all(len(word) == 6 for word in words)
    assert [len(part) for part in uuid(np.random.default_rng(0)).split("-")] == [8, 4, 4, 4, 12]

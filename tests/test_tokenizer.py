"""Tokenizers lose nothing, keep digits apart, and say clearly what they cannot read."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from atma import tokenizer as module
from atma.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe

CORPUS = ["def area(width, height):\n    return width * height  # 12 345\n\n"] * 20 + [
    "naïve café — width, height\r\n\t"
] * 20
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(CORPUS, 290)


def test_byte_b_is_id_b_and_end_of_text_is_last():
    tokenizer = byte_tokenizer()
    assert tokenizer.vocab_size == 257
    assert tokenizer.eot == 256
    assert tokenizer.encode("aé\n") == [97, 0xC3, 0xA9, 10]
    assert [tokenizer.token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]


def test_a_trained_tokenizer_has_the_size_asked_for_bytes_first_and_end_of_text_last(bpe):
    assert bpe.vocab_size == 290
    assert bpe.eot == 289
    assert [bpe.token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]
    assert bpe.name == "bpe-290"


@given(TEXT)
def test_bytes_give_every_text_back(text):
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(
    text=TEXT | st.lists(st.sampled_from(["width", " 12", "\n", "  ", "'s", "<|endoftext|>", "é", "9"])).map("".join)
)
def test_bpe_gives_every_text_back_and_counts_its_bytes(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert b"".join(bpe.token_bytes(i) for i in ids) == text.encode()
    assert bpe.bytes_of(ids) == len(text.encode())


@pytest.mark.parametrize("text", [" 4", "4", "x4", " 12", "1 2", "\n7", "3.14", "  90", "a 5b"])
def test_a_digit_is_one_token_whatever_stands_before_it(bpe, text):
    parts = [bpe.token_bytes(i).decode() for i in bpe.encode(text)]
    assert [part for part in parts if any(c.isdigit() for c in part)] == [c for c in text if c.isdigit()]


def test_a_space_joins_the_word_after_it(bpe):
    assert b" width" in [bpe.token_bytes(i) for i in bpe.encode("the width")]


def test_the_end_of_text_token_cannot_be_spelled(bpe):
    for tokenizer in (bpe, byte_tokenizer()):
        assert tokenizer.eot not in tokenizer.encode("a<|endoftext|>b")
        assert tokenizer.decode([tokenizer.eot]) == "<|endoftext|>"
        assert tokenizer.bytes_of([tokenizer.eot, 97, tokenizer.eot]) == 1


def test_training_twice_gives_the_same_tokenizer(bpe):
    assert train_bpe(iter(CORPUS), 290).hash() == bpe.hash()


@pytest.mark.parametrize("make", [byte_tokenizer, lambda: train_bpe(CORPUS, 290)])
def test_a_saved_tokenizer_loads_equal(tmp_path, make):
    tokenizer = make()
    tokenizer.save(tmp_path / "tokenizer.json")
    for loaded in (load_tokenizer(tmp_path / "tokenizer.json"), load_tokenizer(tmp_path)):
        assert loaded.hash() == tokenizer.hash()
        assert (loaded.name, loaded.eot, loaded.vocab_size) == (tokenizer.name, tokenizer.eot, tokenizer.vocab_size)
        assert loaded.encode("naïve width 42<|endoftext|>") == tokenizer.encode("naïve width 42<|endoftext|>")


@pytest.mark.parametrize("regex", [True, False])
@given(parts=st.lists(st.sampled_from(["width", "9", "\n", "\n    ", " ", "é", ";", "'s"]), max_size=60))
@settings(max_examples=50)
def test_cutting_a_long_text_changes_no_token(bpe, regex, parts):
    tokenizer = bpe
    if regex:
        backend = Backend.from_str(bpe.backend.to_str())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer = Tokenizer(backend, bpe.eot)
    text = "".join(parts)
    whole = tokenizer.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", 8)
        assert tokenizer.encode(text) == whole


def test_many_texts_encode_as_each_alone(bpe):
    texts = ["", "width", "12", "é" * 50]
    for ids, text in zip(bpe.encode_many(texts), texts, strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == bpe.encode(text)


def test_a_sentencepiece_like_tokenizer_loads_and_counts_bytes(tmp_path):
    backend = Backend(models.BPE(vocab={"</s>": 0, "<0x0A>": 1, "▁a": 2, "é": 3}, merges=[]))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eot == 0
    assert [tokenizer.token_bytes(i) for i in (1, 2, 3)] == [b"\n", b" a", "é".encode()]


def test_bits_per_byte_are_refused_for_tokens_without_bytes(tmp_path):
    Backend(models.WordLevel(vocab={"<eos>": 0, "word": 1})).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="bytes of token 1 are unknown"):
        load_tokenizer(tmp_path).token_bytes(1)


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path):
    Backend(models.WordLevel(vocab={"word": 0})).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer.json: no end-of-text token; one of <\|endoftext\|>"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("data", [b"{}", b"not json", b"\xff\xfe", json.dumps({"model": 3}).encode()])
def test_a_damaged_tokenizer_file_is_refused_by_name(tmp_path, data):
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizer.json"):
        load_tokenizer(tmp_path)


def test_a_missing_tokenizer_file_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"absent.json: no such tokenizer file"):
        load_tokenizer(tmp_path / "absent.json")


def test_a_vocabulary_that_the_texts_cannot_fill_is_refused_with_the_most_they_can():
    with pytest.raises(ValueError, match="take 259 or less"):
        train_bpe(["ab ab"], 1000)
    assert train_bpe(["ab ab"], 259).vocab_size == 259


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(ValueError, match=r"at least 257.*not 256"):
        train_bpe(CORPUS, 256)


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), train_bpe(CORPUS, 290)], ids=["bytes", "bpe"])
def test_text_and_ids_outside_the_vocabulary_are_refused(tokenizer):
    with pytest.raises(ValueError, match="at character 1, which UTF-8 cannot encode"):
        tokenizer.encode("a\ud800")
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token id {bad} is outside"):
            tokenizer.decode([bad])
        with pytest.raises(ValueError, match=f"token id {bad} is outside"):
            tokenizer.token_bytes(bad)
        with pytest.raises(ValueError, match="leave the vocabulary"):
            tokenizer.bytes_of([bad])

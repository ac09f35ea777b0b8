"""Tokenizers lose nothing, keep digits apart, and say clearly what they cannot read."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from atma import text_pieces
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
        patch.setattr(text_pieces, "PIECE", 8)
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


def byte_level(*special: AddedToken, **model) -> Backend:
    """A byte-level BPE with merges, as others make them."""
    backend = Backend(models.BPE(**model))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens(list(special))
    return backend


def special(text: str) -> AddedToken:
    return AddedToken(text, special=True, normalized=False)


def word_piece() -> Backend:
    backend = Backend(models.WordPiece({"[UNK]": 0, "[EOS]": 1, "a": 2, "##b": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return backend


def word_ends() -> Backend:
    backend = Backend(models.BPE({"a": 0, "a</w>": 1, "</s>": 2}, [], end_of_word_suffix="</w>"))
    backend.decoder = decoders.BPEDecoder()
    return backend


def begins(text: str) -> dict:
    """Settings whose merges cut a character in two when the library reads them, which would end the process."""
    settings = json.loads(Backend(models.BPE({text[0]: 0, text: 1}, [])).to_str())
    settings["model"] |= {"continuing_subword_prefix": "##", "merges": [[text[0], text[0]]]}
    return settings


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (word_piece, "a WordPiece tokenizer, whose tokens do not say where white space was"),
        (word_ends, "it ends parts of words with '</w>'"),
        (lambda: json.dumps(begins("\u00e9\u00e9")), "it begins parts of words with '##'"),
        (lambda: Backend(models.WordLevel({"<eos>": 0, "word": 1})), "it has no decoder"),
        (lambda: Backend(models.BPE({"a": 0, "</s>": 1}, [])), "it has no decoder"),
    ],
    ids=["word-piece", "word-ends", "word-begins", "word-level", "no-decoder"],
)
def test_a_tokenizer_whose_tokens_have_no_bytes_is_refused_with_what_to_take_instead(tmp_path, make, reason):
    made = make()
    (tmp_path / "tokenizer.json").write_text(made if isinstance(made, str) else made.to_str())
    with pytest.raises(ValueError, match=r"tokenizer.json: cannot be used: .*take --tokenizer bytes") as told:
        load_tokenizer(tmp_path)
    assert reason in str(told.value)


def test_the_end_of_text_is_found_by_name_beside_the_file_or_as_the_user_says(tmp_path):
    odd = "<\uff5cthe end\uff5c>"
    byte_level(special(odd), special("<|bos|>")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"no end-of-text token: none of <\|endoftext\|>.*name it with --end-of-text"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"the end-of-text token '<\|eos\|>' is not in the vocabulary"):
        load_tokenizer(tmp_path, "<|eos|>")
    assert load_tokenizer(tmp_path, "<|bos|>").end_to_record == "<|bos|>"
    end = load_tokenizer(tmp_path, odd).eot
    declared = {
        "tokenizer_config.json": {"eos_token": odd},
        "special_tokens_map.json": {"eos_token": {"content": odd, "lstrip": False}},
        "generation_config.json": {"eos_token_id": [end, 3]},
        "config.json": {"eos_token_id": end},
    }
    for name, data in declared.items():
        (tmp_path / name).write_text(json.dumps(data))
        assert load_tokenizer(tmp_path).eot == end
        (tmp_path / name).unlink()


def test_a_well_known_end_of_text_is_preferred_to_an_end_of_turn(tmp_path):
    byte_level(special("<|end_of_text|>"), special("<|eot_id|>")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|eot_id|>"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.backend.id_to_token(tokenizer.eot) == "<|end_of_text|>"
    assert tokenizer.end_to_record is None


def test_an_end_of_text_that_is_an_ordinary_token_becomes_special(tmp_path):
    backend = byte_level()
    backend.add_tokens(["<eos>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eot not in tokenizer.encode("a <eos> b")
    assert tokenizer.token_bytes(tokenizer.eot) == b""


def test_ids_that_no_token_has_are_told_and_have_no_bytes(tmp_path):
    settings = json.loads(byte_level(special("</s>")).to_str())
    settings["model"]["vocab"] = {t: i if i < 270 else i + 5 for t, i in settings["model"]["vocab"].items()}
    settings["added_tokens"][0]["id"] = settings["model"]["vocab"]["</s>"] = 300
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 301
    assert {270, 274, 299} <= set(tokenizer.holes.tolist())
    assert tokenizer.token_bytes(271) == b""
    assert tokenizer.bytes_of(tokenizer.encode("width é")) == len("width é".encode())


@pytest.mark.parametrize("far", [2**31, 2**32 - 1, 2**40, 10_000_000, 1_000_000])
@pytest.mark.parametrize("part", ["vocabulary", "added"])
def test_an_id_far_from_the_others_is_refused_before_anything_is_allocated(tmp_path, far, part):
    settings = json.loads(byte_level(special("</s>")).to_str())
    if part == "added":
        settings["added_tokens"][0]["id"] = far
    else:
        settings["model"]["vocab"]["a"] = far
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"tokenizer.json: a token has the id {far:,}, but there are only"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("bad", [-1, 1.5, None, "7", True])
def test_an_id_that_is_no_number_of_a_token_is_refused(tmp_path, bad):
    settings = json.loads(byte_level(special("</s>")).to_str())
    settings["model"]["vocab"]["a"] = bad
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizer.json"):
        load_tokenizer(tmp_path)


def test_dropout_is_turned_off(tmp_path):
    settings = json.loads(byte_level(special("</s>")).to_str())
    settings["model"]["dropout"] = 0.9
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    assert len({tuple(tokenizer.encode("width * height width")) for _ in range(20)}) == 1
    tokenizer.save(tmp_path / "tokenizer.json")
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["dropout"] is None


def unigram(*pieces: tuple[str, float], unk: int | None = None) -> Tokenizer:
    backend = Backend(models.Unigram([*pieces, ("a", -1.0), ("b", -2.0), ("\u2581", -1.0)], unk))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.add_special_tokens([special("</s>")])
    return Tokenizer(backend, backend.token_to_id("</s>"))


def test_a_character_without_a_token_is_refused_where_no_unknown_token_stands_for_it():
    tokenizer = unigram()
    with pytest.raises(ValueError, match="no token for 'x', nor an unknown token"):
        tokenizer.encode("abxy")
    assert tokenizer.without_unknown("abxyab") == "abab"


def test_characters_that_a_tokenizer_loses_are_counted(tmp_path):
    assert byte_tokenizer().keeps_all
    assert train_bpe(CORPUS, 290).keeps_all
    tokenizer = unigram(("<unk>", 0.0), unk=0)
    assert not tokenizer.keeps_all
    assert tokenizer.lost("ab xa\n") == {"x": 1, "\n": 1}
    assert tokenizer.token_bytes(0) == b""
    settings = json.loads(byte_level(special("</s>")).to_str())
    del settings["model"]["vocab"]["z"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    incomplete = load_tokenizer(tmp_path)
    assert not incomplete.keeps_all
    assert incomplete.lost("a z\u00e9") == {"z": 1}


def test_bytes_follow_the_decoder(tmp_path):
    backend = Backend(models.BPE({"</s>": 0, "_a": 1, "<0x0A>": 2, "<0x0a>": 3}, []))
    backend.decoder = decoders.Metaspace(replacement="_")
    assert [Tokenizer(backend, 0).token_bytes(i) for i in (1, 2)] == [b" a", b"<0x0A>"]
    backend.decoder = decoders.Sequence([decoders.Replace("_", " "), decoders.ByteFallback(), decoders.Fuse()])
    assert [Tokenizer(backend, 0).token_bytes(i) for i in (1, 2, 3)] == [b" a", b"\n", b"\n"]
    settings = json.loads(byte_level().to_str())
    settings["model"]["vocab"]["\u754c"] = 281
    backend = Backend.from_str(json.dumps(settings))
    assert Tokenizer(backend, 0).token_bytes(281) == "\u754c".encode()


@pytest.mark.parametrize("data", [b"{}", b"not json", b"\xff\xfe", b"[" * 200_000, json.dumps({"model": 3}).encode()])
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


def test_tokens_that_were_added_are_not_lost(tmp_path):
    backend = Backend(models.BPE({"a": 0, "b": 1}, []))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([special("</s>")])
    backend.add_tokens(["foo", "bar"])
    assert Tokenizer(backend, 2).lost("afoobarcb") == {"c": 1}


def test_a_decoder_that_is_nested_without_end_is_refused(tmp_path):
    settings = json.loads(byte_tokenizer().backend.to_str())
    nested = "[" * 900 + "]" * 900
    text = json.dumps(settings | {"decoder": {"type": "Sequence", "decoders": "HERE"}}).replace('"HERE"', nested)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="cannot be used: its decoder is nested without end"):
        load_tokenizer(tmp_path)

"""A rendered chat has the ids that the library gives the whole text, and messages cannot spell special tokens."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from atma.tokenizer import Tokenizer

CORPUS = ["the quick brown fox says hello to the world and the world says hello"] * 9
SIGN = "\ue000"


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    return backend


def pieces(scheme: str) -> Backend:
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False, initial_alphabet=["\n"]
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


BACKENDS = {
    "byte-level": byte_level,
    "first": lambda: pieces("first"),
    "always": lambda: pieces("always"),
    "never": lambda: pieces("never"),
}
FLAGS = [{}, {"rstrip": True}, {"lstrip": True}, {"single_word": True}, {"lstrip": True, "rstrip": True}]


def both(make, flags, normalized=False):
    """Our tokenizer, and the library's own reading of the same file."""
    theirs = make()
    theirs.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    theirs.add_special_tokens([AddedToken("<|end|>", special=True, normalized=normalized, **flags)])
    theirs.add_tokens([AddedToken("fox", normalized=False)])
    ours = Tokenizer(Backend.from_str(theirs.to_str()), theirs.token_to_id("</s>"))
    return ours, theirs


TEXTS = st.lists(
    st.sampled_from(["<|end|>", "</s>", " ", "\n", "  ", "fox", "hello", "the", "é", "<|end", "|>", "x"])
).map("".join)


@pytest.mark.parametrize("make", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_special_tokens_are_read_as_the_library_reads_the_whole_text(make, flags):
    pairs = [both(make, flags, normalized) for normalized in (False, True)]

    @given(TEXTS)
    @settings(max_examples=50)
    def same(text):
        for ours, theirs in pairs:
            assert ours.encode_rendered(text, {})[0] == theirs.encode(text, add_special_tokens=False).ids

    same()


@pytest.mark.parametrize("make", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_a_hidden_spelling_is_ordinary_and_changes_nothing_else(make, flags):
    ours, theirs = both(make, flags)
    end = theirs.token_to_id("<|end|>")
    ids = ours.encode_rendered(f"hello {SIGN}0{SIGN} the <|end|>\n fox", {f"{SIGN}0{SIGN}": "<|end|>"})[0]
    assert ids.count(end) == 1
    plain = theirs.encode("hello @ the <|end|>\n fox", add_special_tokens=False).ids
    after = plain[plain.index(end) :]
    assert ids[-len(after) :] == after


def test_a_text_of_rendered_tokens_stays_ordinary_for_encode():
    ours, theirs = both(byte_level, {"rstrip": True})
    ours.encode_rendered("<|end|>", {})
    assert theirs.token_to_id("<|end|>") not in ours.encode("<|end|>\n")


def test_a_character_without_a_token_is_named_where_nothing_stands_for_it():
    settings = json.loads(pieces("first").to_str())
    settings["model"]["unk_id"] = None
    settings["model"]["vocab"] = [entry for entry in settings["model"]["vocab"] if entry[0] != "<unk>"]
    settings["added_tokens"] = []
    backend = Backend.from_str(json.dumps(settings))
    backend.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    ours = Tokenizer(backend, backend.token_to_id("</s>"))
    assert ours.encode_rendered("hello</s>", {})[0][-1] == ours.eot
    for text, hidden in (("hello \U0001f642</s>", {}), (f"hello {SIGN}0{SIGN}", {f"{SIGN}0{SIGN}": "\U0001f642"})):
        with pytest.raises(ValueError, match="no token for '\U0001f642'"):
            ours.encode_rendered(text, hidden)

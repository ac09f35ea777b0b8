"""Tokenising a word at a time gives what the library gives of whole texts."""

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from atma.token_bytes import byte_characters
from atma.tokenizer import Tokenizer as Ours
from atma.words import GPT2, KNOWN, MOST_WORDS, words_of

TEXT = "It's we'll I'VE THEY'RE 1234 12ab foo_bar(x)\n\n  if a:\r\n\t\treturn -1 \n" * 30
ASCII = st.text(st.sampled_from("abstvedmlrSTVEDMLR019'_ -.(\n\r\t\x0b\x0c\x1c\x1f\x85"[:-1] + "\x00~"), max_size=60)
PLACES = pytest.mark.parametrize(
    "place", [*range(len(KNOWN)), None], ids=["atma", "gpt2", "llama3", "qwen", "byte-level"]
)


def backend(place: int | None, **split: object) -> Tokenizer:
    """A tokenizer that cuts by the expression of that place, or by the library's own."""
    made = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=place is None)
    if place is None:
        made.pre_tokenizer = level
    else:
        cut = pre_tokenizers.Split(Regex(KNOWN[place]), **({"behavior": "isolated"} | split))
        made.pre_tokenizer = pre_tokenizers.Sequence([cut, level])
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=byte_characters(), show_progress=False, special_tokens=["<|endoftext|>"]
    )
    made.train_from_iterator([TEXT], trainer)
    return made


MADE = {place: backend(place) for place in (*range(len(KNOWN)), None)}


@PLACES
@settings(max_examples=300, deadline=None)
@given(ASCII)
@example(TEXT)
@example("a\n \n  b  \r\n\r\n'S'Ll 12345 \x1c\x1d \x1f'")
def test_the_ids_of_ascii_texts_are_those_of_the_library(place, text):
    words = words_of(MADE[place], json.loads(MADE[place].to_str()))
    assert words is not None
    MADE[place].encode_special_tokens = True
    for one in (text, f"{text}<|endoftext|>{text}"):
        assert words.encode(one).tolist() == MADE[place].encode(one, add_special_tokens=False).ids


@PLACES
@settings(max_examples=30, deadline=None)
@given(st.text(st.sampled_from("ab é世\n 1'"), max_size=30).map(lambda text: f"word\n{text}\n" * 600))
def test_long_texts_of_any_script_are_cut_and_joined_to_the_same_ids(place, text):
    tokenizer = Ours(MADE[place], MADE[place].token_to_id("<|endoftext|>"))
    [ids] = tokenizer.encode_many([text])
    assert ids.dtype == np.int32
    assert ids.tolist() == MADE[place].encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told.update(normalizer={"type": "Lowercase"}),
        lambda told: told["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=GPT2 + "|x"),
        lambda told: told["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
        lambda told: told["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        lambda told: told["added_tokens"][0].update(special=False),
        lambda told: told.update(pre_tokenizer=None),
    ],
)
def test_any_other_tokenizer_is_left_to_the_library(change):
    told = json.loads(MADE[1].to_str())
    change(told)
    assert words_of(MADE[1], told) is None


def test_the_words_that_are_kept_are_bounded(monkeypatch):
    monkeypatch.setattr("atma.words.MOST_WORDS", 10)
    assert MOST_WORDS > 10
    words = words_of(MADE[0], json.loads(MADE[0].to_str()))
    for number in range(200):
        words.encode(f"{number:b} {number:x}")
    assert len(words._ids) < 20

"""End-of-turn tokens: where a folder may declare them, and what is no declaration."""

import json

import pytest
from tokenizers import AddedToken

from atma.stop_tokens import declared
from atma.tokenizer import Tokenizer, byte_tokenizer

PLAIN = {"generation_config.json": {"eos_token_id": 257}}


def tokenizer(*specials: str) -> Tokenizer:
    backend = byte_tokenizer().backend
    backend.add_special_tokens([AddedToken(name, special=True) for name in specials])
    return Tokenizer(backend, 256)


def ends(folder, files: dict[str, dict], *specials: str) -> tuple[int, ...]:
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values))
    return declared(folder, tokenizer(*specials))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ()),
        ({"generation_config.json": {"eos_token_id": 258}}, (258,)),
        ({"generation_config.json": {"eos_token_id": [258, 256, 65]}}, (65, 258)),
        ({"generation_config.json": {"eos_token_id": None}}, ()),
        ({"tokenizer_config.json": {"eos_token": "<|b|>"}}, (258,)),
        ({"tokenizer_config.json": {"eos_token": {"content": "<|b|>"}}}, (258,)),
        ({"tokenizer_config.json": {"eos_token": None}}, ()),
        (
            {"generation_config.json": {"eos_token_id": 257}, "tokenizer_config.json": {"eos_token": "<|b|>"}},
            (257, 258),
        ),
    ],
)
def test_a_folder_declares_ends_by_id_or_by_text(tmp_path, files, expected):
    assert ends(tmp_path, files, "<|a|>", "<|b|>") == expected


def test_a_special_token_named_an_end_of_turn_is_one_unless_ids_are_declared(tmp_path):
    assert ends(tmp_path, {}, "<|im_start|>", "<|im_end|>") == (258,)
    assert ends(tmp_path, PLAIN, "<|im_start|>", "<|im_end|>") == (257,)


def test_an_ordinary_token_of_that_name_is_none(tmp_path):
    backend = byte_tokenizer().backend
    backend.add_tokens([AddedToken("<|im_end|>", special=False)])
    assert declared(tmp_path, Tokenizer(backend, 256)) == ()


@pytest.mark.parametrize("wrong", [259, -1, True, "257", [257, 259], 1.5])
def test_an_id_that_is_no_token_is_an_error(tmp_path, wrong):
    with pytest.raises(
        ValueError, match=r"generation_config\.json: eos_token_id .* is no token of the 259; correct it"
    ):
        ends(tmp_path, {"generation_config.json": {"eos_token_id": wrong}}, "<|a|>", "<|b|>")


def test_a_text_that_is_no_token_and_a_broken_file_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: eos_token '</s>' is no token of tokenizer\.json"):
        ends(tmp_path, {"tokenizer_config.json": {"eos_token": "</s>"}})
    (tmp_path / "generation_config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"generation_config\.json: not JSON"):
        declared(tmp_path, tokenizer())

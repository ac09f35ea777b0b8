"""The tokens that end a model's turn, as its folder declares them.

A tokenizer has one end of text; chat models have an end of turn besides, which folders name in several places.
"""

from pathlib import Path
from typing import Any

from atma.folders import read_json
from atma.hub_files import end_of_turn
from atma.tokenizer import Tokenizer


def declared(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids of a folder's end-of-turn tokens, ascending; the tokenizer's end-of-text is not among them.

    They are `eos_token_id` of `generation_config.json`, one or a list, and `eos_token` of `tokenizer_config.json`;
    without the first, also special tokens that have the name of an end of turn. ValueError: a file that cannot be
    read, or that names what is no token.
    """
    named = _by_id(folder / "generation_config.json", tokenizer)
    found = named or end_of_turn(tokenizer)
    path = folder / "tokenizer_config.json"
    text = token_text(read_settings(path).get("eos_token"))
    if text:
        token = tokenizer.backend.token_to_id(text)
        if token is None:
            raise ValueError(f"{path}: eos_token '{text}' is no token of tokenizer.json; correct it")
        found = found | {token}
    return tuple(sorted(found - {tokenizer.eot}))


def read_settings(path: Path) -> dict[str, Any]:
    """What a JSON file says; nothing if there is none. ValueError: not JSON, or no table."""
    return read_json(path) if path.is_file() else {}


def token_text(token: object) -> str:
    """A token's text as tokenizer settings spell it: by itself, or as "content" of a table."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else ""


def _by_id(path: Path, tokenizer: Tokenizer) -> set[int]:
    given = read_settings(path).get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    for token in ids:
        if type(token) is not int or not 0 <= token < tokenizer.vocab_size:
            raise ValueError(f"{path}: eos_token_id {token!r} is no token of the {tokenizer.vocab_size}; correct it")
    return set(ids)

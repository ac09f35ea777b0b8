"""Byte-level BPE a word at a time, each word once: tokenising English or code in about a fifth of the time.

Such a tokenizer cuts a text into words by a regular expression and then merges within each word alone, so equal words
have equal ids. Texts repeat their words, yet `tokenizers` finds and writes out every one anew. Here Python's `re` finds
the words and a dictionary holds their ids, which the tokenizer's own model gives. That `re` finds the same words is
known of the expressions below on ASCII alone; everything else goes the library's way.
"""

import re
from itertools import chain
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend

from atma.bpe import SPLIT
from atma.token_bytes import byte_characters

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KNOWN = (SPLIT, GPT2, rf"{_ENDINGS}\p{{N}}{{1,3}}|{_SIGNS}", rf"{_ENDINGS}\p{{N}}|{_SIGNS}")
"""Expressions of ours, GPT-2, Llama 3 and Qwen. Each cuts all of a text, and looks at what is before no word."""
MOST_WORDS = 1 << 18
_CLASSES = {r"\p{L}": "a-zA-Z", r"\p{N}": "0-9"}


class Words:
    """The ids of ASCII texts under one tokenizer, from `words_of`."""

    def __init__(self, backend: Backend, pattern: str) -> None:
        self._words = re.compile(_of_ascii(pattern), re.ASCII).findall
        self._ids = _Ids(backend)

    def encode(self, text: str) -> np.ndarray:
        """Ids (n,) int32 of an ASCII text, special tokens written as ordinary characters."""
        if len(self._ids) > MOST_WORDS:
            self._ids.clear()
        return np.fromiter(chain.from_iterable(map(self._ids.__getitem__, self._words(text))), np.int32)


class _Ids(dict[str, list[int]]):
    """The ids of every word that was asked for."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self._tokenize = backend.model.tokenize
        self._spelled = dict(enumerate(byte_characters()))

    def __missing__(self, word: str) -> list[int]:
        ids = [token.id for token in self._tokenize(word.translate(self._spelled))]
        self[word] = ids
        return ids


def words_of(backend: Backend, settings: dict[str, Any]) -> Words | None:
    """For a tokenizer, `settings` being its tokenizer.json, of which that gives what the library gives; else None."""
    others = any(not token["special"] for token in settings["added_tokens"])
    pattern = _pattern(settings["pre_tokenizer"] or {})
    if settings["model"]["type"] != "BPE" or settings["normalizer"] or others or pattern not in KNOWN:
        return None
    return Words(backend, pattern)


def _pattern(settings: dict[str, Any]) -> str | None:
    """The expression that cuts texts into words, with nothing else done to them than to write bytes as characters."""
    if settings.get("type") == "ByteLevel" and settings["use_regex"] and not settings["add_prefix_space"]:
        return GPT2
    parts = settings.get("pretokenizers", [])
    if settings.get("type") != "Sequence" or [part["type"] for part in parts] != ["Split", "ByteLevel"]:
        return None
    split, level = parts
    plain = split["behavior"] == "Isolated" and not split["invert"]
    return split["pattern"].get("Regex") if plain and not (level["use_regex"] or level["add_prefix_space"]) else None


def _of_ascii(pattern: str) -> str:
    """The same expression for ASCII texts, where letters and digits are few, as Python writes it."""

    def written(found: re.Match[str]) -> str:
        if found[0] in _CLASSES:
            return f"[{_CLASSES[found[0]]}]"
        return found[0].replace(r"\p{L}", _CLASSES[r"\p{L}"]).replace(r"\p{N}", _CLASSES[r"\p{N}"])

    return re.sub(r"\[[^\]]*\]|\\p\{[LN]\}", written, pattern)

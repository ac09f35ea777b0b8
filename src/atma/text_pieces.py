"""Cutting long texts where it cannot change a token, so that memory and cores are used evenly."""

import json
import re
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend

from atma.token_bytes import kinds

CUT = re.compile(r"(?<=[^\W\d_])(?=\n)")
"""Between a letter and a line end byte-level tokenizers start a new word: long texts are cut there."""
PIECE = 1 << 12
"""Characters: so few that most pieces of an English text are ASCII, which `atma.words` is quick with."""
_PROBE = "word\nword word\n\nword\n  Word\nword"
_HARMLESS = {"Sequence", "NFC", "NFD", "NFKC", "NFKD", "Lowercase"}


def cuttable(backend: Backend, settings: dict[str, Any]) -> bool:
    """Whether a cut before a line end that follows a letter changes no token; `settings` is its tokenizer.json."""
    before = settings["pre_tokenizer"]
    if "ByteLevel" not in kinds(before) or '"add_prefix_space": true' in json.dumps(before):
        return False
    if kinds(settings["normalizer"]) - _HARMLESS:
        return False
    for token in settings["added_tokens"]:
        strips = token["rstrip"] or token["lstrip"] or token["single_word"] or "\n" in token["content"]
        if strips and not token["special"]:
            return False
    starts = {start for _, (start, _) in backend.pre_tokenizer.pre_tokenize_str(_PROBE)}
    return all(found.start() in starts for found in CUT.finditer(_PROBE))


def pieces(text: str) -> list[str]:
    """A text in pieces of about PIECE characters, cut before line ends that follow a letter."""
    found, start = [], 0
    while (cut := CUT.search(text, start + PIECE)) is not None:
        found.append(text[start : cut.start()])
        start = cut.start()
    return [*found, text[start:]]


def covered(places: np.ndarray, length: int) -> np.ndarray:
    """Which of `length` characters lie in one of the places (n, 2): start and end of each."""
    edges = np.zeros(length + 1, np.int64)
    np.add.at(edges, places[:, 0], 1)
    np.add.at(edges, places[:, 1], -1)
    return edges.cumsum()[:-1] > 0
